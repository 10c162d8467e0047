"""What the cache lacks of a range's snapshot, and what filling it will cost. Writes nothing itself.

When to add here: another count of a fill, or another reason to send a text. Keep out: sending (`requests`), storing
(`fill`), and prices (`embedding.pricing`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import polars as pl

from songvec_assets.cache.cached_range import CachedRange
from songvec_assets.cache.texts import is_made_otherwise
from songvec_assets.embedding.pricing import Estimate, Price, Quota, TokenEstimator
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec


class Text(msgspec.Struct, frozen=True, gc=False):
    """A text to send.

    Attributes:
        text: as sent.
        text_hash: its identity.
        song_ids: the songs that have this text.
        n_bytes: its size in UTF-8.
        again: whether one of these songs already has a vector of another text.
        rejected_before: whether it was rejected before.

    The garbage collector skips it: a large range has 50,000 of them, and each pass over them costs time.
    """

    text: str
    text_hash: bytes
    song_ids: list[int]
    n_bytes: int
    again: bool = False
    rejected_before: bool = False


@dataclass
class FillReport:
    """What a fill does to one range: counts of songs, and the cost.

    Attributes:
        range: that is filled.
        n_songs: songs of the snapshot, including rejected ones.
        n_new, n_changed, n_deleted, n_reused, n_unchanged: compared with the cache before the fill; a reused vector is
            that of another song with the same text, in any range, or of an older row of the song.
        n_embedded: songs that got a vector from the provider.
        n_rejected: songs rejected by the export or by the provider.
        n_truncated: songs whose text was cut.
        n_retries, n_limited: bad answers before good ones, and those of them with status 429.
        n_tokens: billed; estimated if the provider does not say, or if the answer is unusable.
        n_tokens_expected: as estimated before the first request.
        usd: price of `n_tokens`.
        seconds: duration of the fill.
        n_bytes_damaged: size of the damaged or missing files.
        rejected: (song_id, reason) of songs that the provider rejected in this fill.
        error: why the range is not complete; None if it is.
    """

    range: SongIdRange
    n_songs: int = 0
    n_new: int = 0
    n_changed: int = 0
    n_deleted: int = 0
    n_reused: int = 0
    n_unchanged: int = 0
    n_embedded: int = 0
    n_rejected: int = 0
    n_truncated: int = 0
    n_retries: int = 0
    n_limited: int = 0
    n_tokens: int = 0
    n_tokens_expected: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    n_bytes_damaged: int = 0
    rejected: list[tuple[int, str]] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True)
class FillPlan:
    """What a range lacks.

    Attributes:
        report: the counts of the plan.
        deleted: song_ids that are cached but no longer embeddable.
        reused: songs (song_id, text_hash, row) whose text has a vector in this range, of another song or in an older
            row.
        texts: to send.
        snapshot: digest of the snapshot that was compared.
        has_rejected: whether an earlier rejection by the provider still counts.
        made_otherwise: whether the cached texts were made with other settings.
        spared: numbers of the rows that this fill does not drop, even if their songs now have other texts: if songs
            changed their ids, another range may lack these texts.
    """

    report: FillReport
    deleted: list[int]
    reused: pl.DataFrame
    texts: list[Text]
    snapshot: str = ""
    has_rejected: bool = False
    made_otherwise: bool = False
    spared: Sequence[int] | pl.Series = ()

    def estimate_tokens(self, estimator: TokenEstimator) -> int:
        """Estimated tokens of the texts to send."""
        return sum(estimator.estimate(each.n_bytes for each in self.texts))

    @property
    def texts_again(self) -> list[Text]:
        """The texts that are sent only because settings changed: their songs have vectors."""
        return [each for each in self.texts if each.again] if self.made_otherwise else []


def plan_fill(
    snapshots: Snapshots,
    cached: CachedRange,
    spec: TextSpec,
    rejected_by: str | None,
    find_elsewhere: Callable[[pl.DataFrame], pl.DataFrame],
) -> FillPlan:
    """Compare a range's snapshot with what is cached of it.

    Args:
        rejected_by: the server whose earlier rejections count; songs rejected by another server are sent again. None:
            no earlier rejection counts.
        find_elsewhere: returns those songs whose text another range has, see `OtherRanges`; of no song if all are
            embedded again.

    Raises:
        StoreError: there is no snapshot; its absence does not mean that the cached songs were deleted.
    """
    if cached.range not in snapshots:
        raise StoreError(
            f"range {cached.range.key} has cached embeddings but no snapshot: export first, with `songvec run`",
            "cache.missing",
        )
    # before the songs: after an export in between, the digest is that of the old ones, and the range is filled again
    footer = snapshots.footer(cached.range)
    hashes, rejected = snapshots.read_text_hashes(cached.range, spec), cached.rejected
    holds = pl.lit(False) if rejected_by is None else pl.col("reason").str.starts_with(f"{rejected_by} ")
    unchanged, missing = _compare(hashes, cached.rows, rejected.filter(holds))
    # any stored vector of the text is reused: of another song, or of an older row (lyrics changed back)
    stored = cached.all_rows.join(missing, on="text_hash", how="semi")
    vectors = cached.find_sound(stored).unique("text_hash", keep="last").select("text_hash", "row")
    reused = missing.join(vectors, on="text_hash", maintain_order="left").select("song_id", "text_hash", "row")
    left = missing.join(vectors, on="text_hash", how="anti", maintain_order="left")
    elsewhere = find_elsewhere(left.select("song_id", "text_hash") if cached.replaces is None else left.clear())
    left = left.join(elsewhere, on="song_id", how="anti", maintain_order="left").with_columns(
        rejected_before=pl.col("text_hash").is_in(rejected.filter(~holds)["text_hash"].implode())
    )
    sent = _render(snapshots, cached.range, spec, left)
    held = (cached.replaces or cached).rows, cached.rows, rejected
    known = pl.concat([each["song_id"] for each in held]).unique()
    deleted = known.filter(~known.is_in(hashes["song_id"].implode())).to_list()
    n_new = missing.filter(~pl.col("song_id").is_in(known.implode())).height
    n_refused = int(unchanged["refused"].sum())
    report = FillReport(
        cached.range,
        footer.n_songs,
        n_new=n_new,
        n_changed=missing.height - n_new,
        n_deleted=len(deleted),
        n_reused=reused.height + elsewhere.height,
        n_unchanged=unchanged.height - n_refused,
        n_rejected=footer.n_songs - hashes.height + n_refused,
        n_truncated=int(hashes["truncated"].sum()),
        n_bytes_damaged=sum(each.n_bytes for each in cached.manifest.files if each.name in cached.damaged),
    )
    made_otherwise = is_made_otherwise(cached.storage, cached.files, spec)
    # of an interrupted fill, also the rows that it replaced
    spared = () if made_otherwise else (cached.rows if cached.files.done else cached.all_rows)["row"]
    return FillPlan(report, deleted, reused, sent, footer.digest, n_refused > 0, made_otherwise, spared)


def _render(snapshots: Snapshots, song_range: SongIdRange, spec: TextSpec, songs: pl.DataFrame) -> list[Text]:
    """The texts to send, each once."""
    unpaid = songs.group_by("text_hash", maintain_order=True).agg(
        pl.col("song_id"), (~pl.col("refused")).any().alias("again"), pl.col("rejected_before").first()
    )
    # one song per text to send; all other songs are cached or share such a text
    texts = snapshots.render(song_range, spec, unpaid["song_id"].list.first()).select("text_hash", "text")
    to_send = unpaid.join(texts, on="text_hash", how="inner", maintain_order="left").select(
        "text", "text_hash", "song_id", pl.col("text").str.len_bytes().alias("n_bytes"), "again", "rejected_before"
    )
    return [Text(*row) for row in to_send.iter_rows()]


def _compare(hashes: pl.DataFrame, rows: pl.DataFrame, refused: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The songs whose text has a vector or a rejection that counts; and the others."""
    answered = pl.concat(
        [
            rows.select("song_id", before="text_hash", refused=pl.lit(False)),
            refused.select("song_id", before="text_hash", refused=pl.lit(True)),
        ]
    )
    compared = hashes.join(answered, on="song_id", how="left", maintain_order="left")
    is_missing = pl.col("before").ne_missing(pl.col("text_hash"))
    return compared.filter(~is_missing), compared.filter(is_missing)


def estimate_fills(plans: Iterable[FillPlan], estimator: TokenEstimator, price: Price, quota: Quota) -> Estimate:
    """Tokens, dollars and hours of several plans together."""
    n_songs = n_texts = n_tokens = n_again = n_tokens_again = n_reused = 0
    for plan in plans:
        n_songs += plan.report.n_songs
        n_texts += len(plan.texts)
        n_tokens += plan.estimate_tokens(estimator)
        n_reused += plan.report.n_reused
        n_again += len(plan.texts_again)
        n_tokens_again += sum(estimator.estimate(each.n_bytes for each in plan.texts_again))
    hours = quota.hours(n_texts, n_tokens)
    usd_again = price.usd(n_tokens_again)
    return Estimate(n_songs, n_texts, n_tokens, price.usd(n_tokens), hours, n_again, usd_again, n_reused)
