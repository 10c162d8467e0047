"""Cached songs that a server embeds again before it is paid for others: does it give the vectors that are stored?

Done once per server and name (`embedding.drift` records it), as the provider, or its name for the model, may have
changed. Each text is sent alone, which every server takes.
When to add here: another choice of these songs. Keep out: what a difference means (`embedding.drift`).
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np

from songvec_assets.cache.context import SendContext
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.plan import FillReport
from songvec_assets.embedding.drift import ModelRecord, get_cosine
from songvec_assets.embedding.reservation import Reservation
from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import RequestRefusedError, StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec

N_SONGS = 20


@dataclass(frozen=True)
class CachedSong:
    """A song whose text is the one that its cached vector was made of.

    Attributes:
        song_id, text: the song, and its text as it was sent.
        embedding: (dimensions,).
    """

    song_id: int
    text: str
    embedding: Float32Matrix


async def compare_server(
    record: ModelRecord, find_songs: Callable[[], list[CachedSong]], context: SendContext, report: FillReport
) -> None:
    """Compare a server with cached songs, if nothing is recorded of it.

    Args:
        find_songs: finds the songs to compare with; called in a thread.
        report: of the range whose fill is to begin; counts what is billed.

    Raises:
        ModelChangedError: a vector differs; the message has the worst.
        SongvecError: no answer, or the budget is too small.
    """
    if not await asyncio.to_thread(record.needs_comparison):
        return
    songs = await asyncio.to_thread(find_songs)
    cosines = {}
    if songs:
        context.report(f"comparing {context.server} with {len(songs)} cached songs")
    for each in songs:
        vector = await _embed(each.text, context, report)
        cosines[each.song_id] = 0.0 if vector is None else get_cosine(each.embedding, vector)
    record.check_songs(cosines)
    await asyncio.to_thread(record.confirm)


async def _embed(text: str, context: SendContext, report: FillReport) -> Float32Matrix | None:
    """A text's vector, (dimensions,); None: the server refuses the text, or gives it no vector."""
    [n_tokens] = context.estimator.estimate([len(text.encode())])
    report.n_tokens_expected += n_tokens
    reservation = Reservation(context.embedder, context.budget, n_tokens, context.check_halted)
    try:
        async with reservation:
            batch = await reservation.send([text])
        return None if batch.bad else batch.embeddings[0]
    except RequestRefusedError:
        return None
    finally:
        report.n_tokens += reservation.n_billed


def find_songs(cache: ModelCache, snapshots: Snapshots, spec: TextSpec) -> list[CachedSong]:
    """Up to N_SONGS cached songs, spread over the ranges and within each; all if there are fewer.

    Args:
        cache: of the model.
    """
    ranges = sorted({*cache.ranges()} & {*snapshots.ranges()})
    step = max(1, math.ceil(len(ranges) / N_SONGS))
    found: list[list[CachedSong]] = []
    # ranges far apart first; more of them only if these have too few songs
    for song_range in chain.from_iterable(ranges[start::step] for start in range(step)):
        # its own fill and `songvec status` name what is wrong with it
        with contextlib.suppress(StoreError):
            found.append([*_find_in_range(cache, snapshots, spec, song_range)])
        if len(found) >= N_SONGS and sum(map(len, found)) >= N_SONGS:
            break
    turns = chain.from_iterable(zip_longest(*found))
    return [*islice(filter(None, turns), N_SONGS)]


def _find_in_range(
    cache: ModelCache, snapshots: Snapshots, spec: TextSpec, song_range: SongIdRange
) -> Iterator[CachedSong]:
    cached, hashes = cache.open(song_range), snapshots.read_text_hashes(song_range, spec)
    same = cached.rows.join(hashes, on=["song_id", "text_hash"], how="semi", maintain_order="left")
    spread = np.linspace(0, same.height - 1, min(N_SONGS, same.height)).astype(np.int64)
    chosen = cached.find_sound(same[spread])
    texts = snapshots.render(song_range, spec, chosen["song_id"])
    chosen = chosen.join(texts, on=["song_id", "text_hash"], how="inner", maintain_order="left")
    vectors = cached.embeddings_at(chosen["row"])
    return map(CachedSong, chosen["song_id"], chosen["text"], vectors)
