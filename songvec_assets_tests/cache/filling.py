"""What tests of fills share: songs and their texts, a fill of all ranges, and what it has stored and paid."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    SongvecError,
)
from songvec_assets.pipeline import Pipeline
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets_tests.provider import Provider, vector_of

FIRST = SongIdRange(0, 100)


Songs = Callable[..., None]


Run = Callable[..., Pipeline]


def export(pipeline: Pipeline) -> None:
    """Bring the snapshots to the state of the songs table."""
    cache_songs_to_parquet(pipeline.source, pipeline.store.songs, pipeline.tiling)


def fill(pipeline: Pipeline, max_usd: float | None = None, confirm_reembedding: bool = False) -> list[FillReport]:
    """Export and fill all ranges; the reports of those that hold anything, none of them failed."""
    reports, error = try_fill(pipeline, max_usd, confirm_reembedding=confirm_reembedding)
    assert error is None
    assert [report.error for report in reports] == [None] * len(reports)
    return reports


def try_fill(
    pipeline: Pipeline,
    max_usd: float | None = None,
    report: Callable[[FillReport], None] | None = None,
    confirm_reembedding: bool = False,
) -> tuple[list[FillReport], SongvecError | None]:
    """Export and fill all ranges; the reports, and what ended the run."""
    export(pipeline)
    reports: list[FillReport] = []

    def keep(filled: FillReport) -> None:
        reports.append(filled)
        if report:
            report(filled)

    try:
        if max_usd is not None:
            pipeline.settings = pipeline.settings.model_copy(update={"max_usd": max_usd})
        pipeline.filler(confirm_reembedding=confirm_reembedding).fill_ranges(list(pipeline.tiling), keep)
    except SongvecError as error:
        return reports, error
    return reports, None


def stored(pipeline: Pipeline) -> dict[int, np.ndarray | str]:
    """What the cache answers for each song: its vector, or why there is none."""
    found: dict[int, np.ndarray | str] = {}
    for song_range in pipeline.cache.ranges():
        cached = pipeline.cache.open(song_range)
        found |= dict(zip(cached.rows["song_id"], cached.embeddings_at(cached.rows["row"]), strict=True))
        found |= dict(cached.rejected.select("song_id", "reason").iter_rows())
    return found


def files_of(pipeline: Pipeline, song_range: SongIdRange = FIRST) -> list[Path]:
    """The files with vectors that a range's manifest names, in order."""
    folder = pipeline.cache.storage.root / song_range.key
    return [folder / each.name for each in pipeline.cache.read_manifest(song_range).files]


def flip_bit(path: Path, value: bytes, last: bool = False) -> None:
    """Change a bit of a value that is in a file."""
    content = bytearray(path.read_bytes())
    content[content.rindex(value) if last else content.index(value)] ^= 4
    path.write_bytes(content)


def vector_bytes(pipeline: Pipeline, song_id: int) -> bytes:
    """A song's vector as it is stored."""
    cached = pipeline.cache.open(FIRST)
    return bytes(cached.embeddings_at(cached.rows.filter(pl.col("song_id") == song_id)["row"]).tobytes())


def assert_stored(pipeline: Pipeline, texts: dict[int, str]) -> None:
    """The cache holds these songs with the vectors of these texts, and no others."""
    found = stored(pipeline)
    assert set(found) == set(texts)
    for song_id, text in texts.items():
        answer = found[song_id]
        assert isinstance(answer, np.ndarray), f"{song_id}: {answer}"
        np.testing.assert_allclose(answer, vector_of(text, 64), rtol=0, atol=1e-6, err_msg=str(song_id))


def plain_songs(song_ids: Sequence[int]) -> list[tuple[int, str, str, str]]:
    """Songs with a text of 28 characters, 7 tokens, each its own."""
    return [(song_id, f"Song {song_id:06d}", "Ann", "la la la!") for song_id in song_ids]


def plain_texts(song_ids: Sequence[int]) -> dict[int, str]:
    """The texts of `plain_songs`."""
    return {song_id: f"Song {song_id:06d} by Ann\nla la la!" for song_id in song_ids}


def billed(provider: Provider) -> dict[str, int]:
    """How often each song's text was billed."""
    texts = provider.texts()
    texts.pop("probe", None)
    return texts


def down(count: int | None = None, after: int = 1) -> dict[str, object]:
    """A provider that answers 503."""
    return {"statuses": [{"status": 503, "count": count, "after": after}]}
