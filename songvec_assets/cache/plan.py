"""What the cache lacks of a range's snapshot, and what that will cost. Writes nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import polars as pl

from songvec_assets.cache.shards import CachedRange
from songvec_assets.cache.texts import is_made_otherwise
from songvec_assets.embedding.pricing import Estimate, Price, Quota, TokenEstimator
from songvec_assets.errors import StoreError
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec


@dataclass(frozen=True)
class Text:
    """A text to send.

    Attributes:
        text: as it is sent.
        text_hash: its identity.
        song_ids: the songs that it stands for.
        n_bytes: its size in UTF-8.
        again: whether one of these songs has a vector already, of another text.
        rejected_before: whether it was rejected before.
    """

    text: str
    text_hash: bytes
    song_ids: list[int]
    n_bytes: int
    again: bool = False
    rejected_before: bool = False


@dataclass(frozen=True)
class FillPlan:
    """What a range lacks.

    Attributes:
        range: which.
        n_songs: songs of the snapshot, those set aside by the export included.
        n_unchanged: songs whose text has its vector already.
        song_ids: songs of the snapshot that can be embedded.
        deleted: song_ids that are cached but no longer among those.
        reused: songs (song_id, text_hash, row) whose text has a vector already, under another song or an older text.
        texts: what must be sent.
        n_new, n_changed, n_truncated, n_set_aside: songs; set aside by the export, or by the provider before.
        n_rejected: those of the last that the provider rejected before.
        made_otherwise: whether the cached texts were made with other settings.
    """

    range: SongIdRange
    n_songs: int
    n_unchanged: int
    song_ids: pl.Series
    deleted: list[int]
    reused: pl.DataFrame
    texts: list[Text]
    n_new: int
    n_changed: int
    n_truncated: int
    n_set_aside: int
    n_rejected: int = 0
    made_otherwise: bool = False

    def estimate_tokens(self, estimator: TokenEstimator) -> int:
        """About how many tokens its texts have."""
        return sum(estimator.estimate(each.n_bytes for each in self.texts))

    @property
    def texts_again(self) -> list[Text]:
        """The texts to send only because other settings make them of songs that are cached."""
        return [each for each in self.texts if each.again] if self.made_otherwise else []


def plan_fill(
    snapshots: Snapshots, shard: CachedRange, spec: TextSpec, since: int = 0, rejected_by: str | None = None
) -> FillPlan:
    """Compare a range's snapshot with what is cached of it.

    Args:
        snapshots: of the store.
        shard: the range.
        spec: how songs become texts.
        since: number of the first row that counts as an answer.
        rejected_by: the server whose rejections hold; songs that another one rejected are sent again; None: no
            rejection holds.

    Raises:
        StoreError: there is no snapshot: a cache alone does not say that its songs are deleted.
    """
    if shard.range not in snapshots:
        raise StoreError(
            f"range {shard.range.key} has cached embeddings but no snapshot: materialize songs_parquet first"
        )
    hashes, n_songs = snapshots.read_text_hashes(shard.range, spec), snapshots.count(shard.range)
    known = shard.rows.select("song_id", "text_hash")
    rejected = shard.rejected.select("song_id", "text_hash", "reason")
    holds = pl.lit(False) if rejected_by is None or since else pl.col("reason").str.starts_with(f"{rejected_by} ")
    answered = pl.concat(
        [
            (shard.asked_rows() if since else known).select("song_id", before="text_hash", refused=pl.lit(False)),
            rejected.filter(holds).select("song_id", before="text_hash", refused=pl.lit(True)),
        ]
    )
    compared = hashes.join(answered, on="song_id", how="left", maintain_order="left")
    unchanged = compared.filter(pl.col("before") == pl.col("text_hash"))
    missing = compared.filter(pl.col("before").ne_missing(pl.col("text_hash")))
    # whatever was paid for serves again: another song's vector, and one that no longer holds (a lyric changed back)
    stored = shard.all_rows.slice(since).join(missing, on="text_hash", how="semi")
    vectors = shard.find_sound(stored).unique("text_hash", keep="last").select("text_hash", "row")
    reused = missing.join(vectors, on="text_hash", how="inner", maintain_order="left")
    unpaid = (
        missing.join(vectors, on="text_hash", how="anti", maintain_order="left")
        .group_by("text_hash", maintain_order=True)
        .agg(pl.col("song_id"), (~pl.col("refused")).any().alias("again"))
        .with_columns(rejected_before=pl.col("text_hash").is_in(rejected.filter(~holds)["text_hash"].implode()))
    )
    # the rest is cached, or has the text of one of these
    texts = snapshots.render(shard.range, spec, unpaid["song_id"].list.first()).select("text_hash", "text")
    to_send = unpaid.join(texts, on="text_hash", how="inner", maintain_order="left")
    n_bytes = pl.col("text").str.len_bytes().alias("n_bytes")
    cached = pl.concat([known["song_id"], rejected["song_id"]])
    n_new = missing.filter(~pl.col("song_id").is_in(cached.implode())).height
    n_refused = int(unchanged["refused"].sum())
    return FillPlan(
        range=shard.range,
        n_songs=n_songs,
        n_unchanged=unchanged.height - n_refused,
        song_ids=hashes["song_id"],
        deleted=cached.filter(~cached.is_in(hashes["song_id"].implode())).to_list(),
        reused=reused.select("song_id", "text_hash", "row"),
        texts=[
            Text(*row)
            for row in to_send.select("text", "text_hash", "song_id", n_bytes, "again", "rejected_before").iter_rows()
        ],
        n_new=n_new,
        n_changed=missing.height - n_new,
        n_truncated=int(hashes["truncated"].sum()),
        n_set_aside=n_songs - hashes.height + n_refused,
        n_rejected=n_refused,
        made_otherwise=is_made_otherwise(shard.cache, shard.range, spec),
    )


def estimate_fills(plans: Iterable[FillPlan], estimator: TokenEstimator, price: Price, quota: Quota) -> Estimate:
    """Tokens, dollars and hours of some plans together."""
    n_songs = n_texts = n_tokens = n_again = n_tokens_again = 0
    for plan in plans:
        n_songs += plan.n_songs
        n_texts += len(plan.texts)
        n_tokens += plan.estimate_tokens(estimator)
        n_again += len(plan.texts_again)
        n_tokens_again += sum(estimator.estimate(each.n_bytes for each in plan.texts_again))
    return replace(
        price.estimate(n_songs, n_texts, n_tokens, quota), n_again=n_again, usd_again=price.usd(n_tokens_again)
    )
