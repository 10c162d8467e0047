"""What a refresh would do and cost, from what is there now.

Sends no text and no key; writes no snapshot, no vector and no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from songvec_assets.deployment import Deployment
from songvec_assets.embedding.budget import MonthSpending
from songvec_assets.embedding.contact import check_redirect
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.errors import StoreError
from songvec_assets.progress import RunContext, describe_seconds
from songvec_assets.songs.absence import Absence
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.watch import SourceState, measure_source
from songvec_assets.vectors.plan import LoadPlan, plan_load
from songvec_assets.vectors.table import IndexFacts


@dataclass(frozen=True)
class RunPlan:
    """A refresh, planned.

    Attributes:
        source: the table of songs as it is.
        absence: songs that are cached or loaded and no longer in that table.
        estimate: of what would be sent, over the ranges asked for.
        load: what the table lacks compared with the cache as it is; None where nothing is cached yet.
        index: as it is, or None.
        max_usd: the run's budget, or None.
        month, max_usd_a_month: what this month has cost, and its budget, or None.
        boilerplate: what the lyrics have that is no lyric, in words; empty where there is little of it.
    """

    source: SourceState
    absence: Absence
    estimate: Estimate
    load: LoadPlan | None
    index: IndexFacts | None
    max_usd: float | None
    month: MonthSpending
    max_usd_a_month: float | None
    boilerplate: Sequence[str] = ()

    def describe(self) -> list[str]:
        """A line a step."""
        each, load, index = self.estimate, self.load, self.index
        limits = [f"the run's budget is ${self.max_usd:,.2f}"] if self.max_usd is not None else ["no budget a run"]
        month = f"this month {self.month.describe()}"
        limits.append(month if self.max_usd_a_month is None else f"{month} of ${self.max_usd_a_month:,.2f}")
        return [
            f"export: {self.source.describe()}; the snapshots hold {each.n_songs:,} songs of the ranges asked for. "
            "Songs that changed since the last export are not in this plan: `songvec estimate` exports first",
            self._describe_deletions(),
            f"embed: {each.n_texts:,} texts, about {each.n_tokens:,} tokens, about ${each.usd:,.4f}, "
            f"{describe_seconds(each.hours * 3600)} at the full quota; {', '.join(limits)}"
            + (f". {each.describe_again()}" if each.n_again else ""),
            "load: nothing is cached yet" if load is None else
            f"load: {load.n_changed:,} of {load.n_rows:,} rows cached so far are to be written",
            "index: there is none yet" if index is None else
            f"index: {index.lists:,} lists over {index.n_rows:,} rows; {index.n_changed:,} rows changed since",
            *self.boilerplate,
        ]  # fmt: skip

    def _describe_deletions(self) -> str:
        if not self.absence.n_missing:
            return f"delete: no song; {self.absence.n_known:,} are loaded or cached, and all of them are in the source"
        stops = (
            ". That is so many that a run would stop before it changes anything, unless it is given --confirm-deletions"
            if self.absence.is_bulk else "; their rows would leave the table"
        )  # fmt: skip
        return f"delete: {self.absence.describe()} are no longer in the source{stops}"


def plan_run(deployment: Deployment, ranges: Sequence[SongIdRange], anew: bool = False) -> RunPlan:
    """Plan and price a refresh.

    Args:
        deployment: whose.
        ranges: to embed.
        anew: whether all their songs are to be embedded again.

    Raises:
        ProviderError: the server's URL leads elsewhere.
    """
    if not deployment.settings.offline:
        check_redirect(deployment.server)
    try:
        load = plan_load(deployment.table, deployment.load_source, RunContext(stop=deployment.stop))
    except StoreError:
        load = None
    return RunPlan(
        measure_source(deployment.database, deployment.source),
        deployment.find_absence(),
        deployment.estimate(set(ranges), anew),
        load,
        deployment.table.index,
        deployment.settings.max_usd,
        deployment.month_spending(),
        deployment.settings.max_usd_a_month,
        deployment.describe_boilerplate(),
    )
