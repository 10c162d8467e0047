"""What methods of `Pipeline` take and return if no room below has a record of it: frozen; ranges as polars frames.

When to add here: the report of another method over the whole graph. Keep out: how its figures are found.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import polars as pl

from songvec_assets.embedding.budget import MonthSpending
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.errors import BudgetExceededError, DamagedCacheError, ProviderError, SongvecError, StoreError
from songvec_assets.postgres.locks import Holder
from songvec_assets.progress import describe_seconds
from songvec_assets.songs.missing import MissingSongs
from songvec_assets.vectors.index.catalog import IndexInfo, describe_knobs
from songvec_assets.vectors.index.upkeep import IndexReport
from songvec_assets.vectors.plan import LoadPlan
from songvec_assets.vectors.swap import LoadReport

Step = Literal["export", "embed", "load"]

if TYPE_CHECKING:
    from songvec_assets.cache.plan import FillReport
    from songvec_assets.songs.reports import ExportReport


class EmbedChoices(TypedDict, total=False):
    """What a caller may choose for one run; all are False unless given.

    Attributes:
        retry_rejected: whether songs that the provider rejected before are sent again.
        confirm_reembedding: whether cached texts may be paid for again because settings changed.
        confirm_model_change: whether the provider may give other vectors for the model than those that are cached.
    """

    retry_rejected: bool
    confirm_reembedding: bool
    confirm_model_change: bool


@dataclass(frozen=True)
class RunReport:
    """What a run of the whole graph did, step by step; `embed` has an entry per range that holds anything."""

    export: "ExportReport"
    embed: "list[FillReport]"
    load: LoadReport
    index: IndexReport


_OF_SOME_RANGES: dict[Step, tuple[type[SongvecError], ...]] = {
    "embed": (BudgetExceededError, ProviderError, StoreError),
    "load": (DamagedCacheError,),
}
"""The errors that leave ranges undone, and not the whole step."""


def continues_without(step: Step, error: Exception, is_swap: bool) -> bool:
    """Whether the steps after a failed one run without the ranges that it left undone; if not, the run ends.

    Args:
        is_swap: whether a staging table is built of another model, size or type: incomplete it would not be swapped in.
    """
    if step == "export":
        return bool(getattr(error, "is_partial", False))
    return not is_swap and isinstance(error, _OF_SOME_RANGES[step])


@dataclass(frozen=True, eq=False)
class Status:
    """What is exported, cached, loaded and indexed.

    Attributes:
        ranges: a row per range that holds anything, in order: key; n_songs (of the snapshot), n_unexported (in the
            source beyond those, by count), n_cached (with a vector), n_rejected (with the reason), n_loaded (in the
            table, by its ledger), n_indexed (loaded, and covered by a valid index), n_missing (with neither a row nor a
            reason; those not exported included), n_orphans (rows without a song).
        tables: what each table that exists holds, by its name.
        index: the serving table's, or None.
        rejected: song_id and reason of the first ones.
        unreachable: number of songs whose id is outside every range, by reason.
        recall: as measured last, in words; empty: not measured.
        month: what this month has cost, over all runs.
        unreadable: why some ranges of the cache cannot be read; they count as not cached.
        caution: why the source may hold more songs than this user sees; empty: no reason.
        pgvector: what is wrong with the server's version; empty: nothing.
        holders: the processes that fill a range, load or build the index at the moment, the longest first.
    """

    ranges: pl.DataFrame
    tables: dict[str, str]
    index: IndexInfo | None
    rejected: list[tuple[int, str]]
    unreachable: dict[str, int]
    recall: str
    month: MonthSpending
    unreadable: list[str]
    caution: str = ""
    pgvector: str = ""
    holders: Sequence[Holder] = ()

    @property
    def total(self) -> dict[str, Any]:
        """The sum over all ranges, by column; its key is `all`."""
        return {"key": "all", **self.ranges.select(pl.exclude("key").sum()).row(0, named=True)}

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, with the total."""
        found = {name: value for name, value in vars(self).items() if name != "month"}
        return found | {
            "ranges": self.ranges.to_dicts(),
            "index": asdict(self.index) if self.index else None,
            "holders": [each.as_dict() for each in self.holders],
            "month_usd": self.month.billed,
            "month_reserved_usd": self.month.reserved,
            "total": self.total,
            "missing": self.total["n_missing"],
        }

    def describe(self) -> list[str]:
        """Everything but the ranges, one line each."""
        index = "none yet"
        if self.index is not None:
            index = (
                f"{self.index.describe()}, {self.index.n_bytes / 1e6:,.1f} MB, "
                f"{describe_knobs(self.index.probes, self.index.candidates)}, {self.recall or 'recall not measured'}; "
                f"{self.index.n_changed:,} rows changed since"
            )
        lines = [f"Table {name}: {held}" for name, held in self.tables.items()]
        lines += [f"Index: {index}", f"Spent this month: {self.month.describe()}"]
        lines += [each.describe() for each in self.holders]
        lines += [f"Cannot be read: {error}" for error in self.unreadable]
        lines += [f"Rejected: song {song_id}: {reason}" for song_id, reason in self.rejected]
        lines += [f"Rejected: {n_songs:,} × {reason}" for reason, n_songs in self.unreachable.items()]
        if n_unexported := self.total["n_unexported"]:
            lines.append(f"Not exported yet: {n_unexported:,} songs: `songvec run` exports them")
        lines += [
            f"{name}: {caution}" for name, caution in (("Source", self.caution), ("Server", self.pgvector)) if caution
        ]
        return lines


@dataclass(frozen=True)
class RunPlan:
    """What a run would do and cost.

    Attributes:
        n_songs: songs of the source that ranges can hold.
        missing: songs that are cached or loaded and no longer in the source.
        estimate: of what would be sent for the requested ranges.
        load: what the table lacks compared with the cache as it is; None if nothing is cached yet.
        index: the serving table's, or None.
        month: what this month has cost.
        max_usd, max_usd_a_month: the budgets of the run and of a month; None: none.
        boilerplate: what the lyrics hold that is no lyric, in words; empty if there is little of it.
    """

    n_songs: int
    missing: MissingSongs
    estimate: Estimate
    load: LoadPlan | None
    index: IndexInfo | None
    month: MonthSpending
    max_usd: float | None = None
    max_usd_a_month: float | None = None
    boilerplate: Sequence[str] = ()

    def describe(self) -> list[str]:
        """One line per step."""
        each = self.estimate
        budget = "no budget per run" if self.max_usd is None else f"the run's budget is ${self.max_usd:,.2f}"
        of_month = "" if self.max_usd_a_month is None else f" of ${self.max_usd_a_month:,.2f}"
        load = "nothing is cached yet"
        if self.load is not None:
            load = f"{self.load.n_changed:,} of {self.load.n_rows:,} rows cached so far are to be written"
            for song_range, why in self.load.damaged.items():
                load += f"; not range {song_range.key}, which cannot be read: {why}"
        index = "there is none yet"
        if self.index is not None:
            index = f"{self.index.describe()}; {self.index.n_changed:,} rows changed since"
        return [
            f"export: {self.n_songs:,} songs in Postgres; the snapshots hold {each.n_songs:,} songs of these ranges. "
            "Songs that changed since the last export are not in this plan: `songvec estimate` exports first",
            f"delete: {self._describe_deletions()}",
            f"embed: {each.n_texts:,} texts, about {each.n_tokens:,} tokens, about ${each.usd:,.4f}, "
            f"{describe_seconds(each.hours * 3600)} at the full quota; {each.n_reused:,} songs take the stored vector "
            f"of their text; {budget}, this month {self.month.describe()}{of_month}"
            f"{'. ' if each.n_again else ''}{each.describe_again()}",
            f"load: {load}",
            f"index: {index}",
            *self.boilerplate,
        ]

    def _describe_deletions(self) -> str:
        if not self.missing.n_missing:
            return f"no song; {self.missing.n_known:,} are loaded or cached, and all of them are in the source"
        if self.missing.is_bulk:
            consequence = ". A run would stop before it changes anything, unless it is given --confirm-deletions"
        else:
            consequence = "; their rows would be deleted from the table"
        return f"{self.missing.describe()} are no longer in the source{consequence}"
