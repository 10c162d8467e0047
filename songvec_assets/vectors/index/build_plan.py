"""Whether an index is to be built, of which kind and with how many lists, and what that needs.

When to add here: another reason to build. Keep out: the build itself, and what measured recall asks for (`upkeep`).
"""

from dataclasses import dataclass

from songvec_assets.errors import SettingsError
from songvec_assets.vectors.index import sizing
from songvec_assets.vectors.index.kinds import IndexKind, choose_kind
from songvec_assets.vectors.index.recall import DEFAULT_TARGET, RecallReport
from songvec_assets.vectors.index.sizing import BuildEstimate, Capacity, choose_lists, read_capacity
from songvec_assets.vectors.spec import TableSpec
from songvec_assets.vectors.table import VectorTable

CHANGED_SHARE = 0.2
"""If more rows changed, the lists' centers no longer fit them: the index is built again."""
_LISTS_OFF_BY = 0.25
"""Lists grow as the square root of the rows: a quarter more are due once the rows have grown by half."""
MAX_DRIFT = 0.1
"""How far the mean of an index by bits may move, relative to the vectors' spread: seven times what chance does."""


@dataclass(frozen=True)
class IndexSettings:
    """Settings of the index.

    Attributes:
        lists: how many; None: the square root of the rows.
        target_recall: share of the true ten nearest that searches are to find.
        memory_bytes: that a build may take on the server; None: half of what is available, if that can be read.
        rebuild: whether it is to be built even if it fits.
        kind: one of `kinds.KINDS`.
    """

    lists: int | None = None
    target_recall: float = DEFAULT_TARGET
    memory_bytes: int | None = None
    rebuild: bool = False
    kind: str = "ivfflat"


DEFAULT_SETTINGS = IndexSettings()


def reason_to_build(n_rows: int, lists: int, lists_now: int | None, n_changed: int, exact: bool = False) -> str | None:
    """Why the index should be built now, or None.

    Args:
        lists: that suit them.
        lists_now: of the valid index that is there, or None.
        n_changed: rows written or deleted since it was built.
        exact: whether the number of lists was set: then only that number fits.
    """
    if lists_now is None:
        return "there is none"
    if abs(lists - lists_now) > (0 if exact else _LISTS_OFF_BY * lists_now):
        return f"{n_rows:,} rows want {lists:,} lists, it has {lists_now:,}"
    if n_changed > CHANGED_SHARE * n_rows:
        return f"{n_changed:,} rows changed since it was built, over a fifth of {n_rows:,}"
    return None


def plan_lists(
    n_rows: int, wanted: IndexSettings, lists_now: int | None, capacity: Capacity, spec: TableSpec
) -> tuple[int, str]:
    """How many lists the index is to have, 0 if its kind has none; and if those that suit the rows do not fit, why.

    Raises:
        SettingsError: more lists were set than fit into memory.
        DatabaseError: not even one fits.
    """
    kind = choose_kind(wanted.kind, spec.vector_type)
    if not kind.has_lists:
        return 0, ""
    lists = wanted.lists or choose_lists(n_rows)
    if lists == lists_now:
        return lists, ""
    fitting, shortage = capacity.fit_lists(lists, spec.dimensions, kind.indexed_type(spec.vector_type))
    if not shortage:
        return lists, ""
    if wanted.lists:
        raise SettingsError(
            f"SONGVEC_LISTS: {shortage}: set {fitting:,} or fewer, or none, or raise SONGVEC_INDEX_MEMORY_MB",
            "index.no-room",
        )
    # the index stays good, even if there is less memory now than when it was built
    if lists_now is not None and fitting <= lists_now <= lists:
        return lists_now, ""
    return fitting, f"{shortage}, so it gets {fitting:,}"


@dataclass(frozen=True)
class BuildPlan:
    """Whether an index is to be built, and what that needs.

    Attributes:
        n_changed: rows changed since the table's index was built.
        lists_now: of its valid index of this kind; None: there is none.
        reason: why it is to be built; None: it is not.
        limit: why it does not get the number of lists that suits the rows; empty: it does.
        estimate: what a build needs, and its number of lists.
    """

    kind: IndexKind
    n_changed: int
    lists_now: int | None
    reason: str | None
    limit: str
    capacity: Capacity
    estimate: BuildEstimate


def plan_build(table: VectorTable, spec: TableSpec, wanted: IndexSettings, n_rows: int, n_changed: int) -> BuildPlan:
    """Decide whether an index is to be built.

    Args:
        table: whose; it need not exist.
        n_rows: that it has, or is to have.
        n_changed: of them, since the index was built.

    Raises:
        SettingsError, DatabaseError: see `plan_lists`.
    """
    kind = choose_kind(wanted.kind, spec.vector_type)
    with table.database.get_connection() as connection:
        found = table.find_index(connection)
        is_searched = VectorTable(table.database).find_index(connection) is not None
    lists_now = found.lists if found is not None and found.kind == kind.name else None
    capacity = read_capacity(table.database, wanted.memory_bytes, is_searched)
    lists, limit = plan_lists(max(1, n_rows), wanted, lists_now, capacity, spec)
    if found is not None and lists_now is None:
        reason: str | None = f"SONGVEC_INDEX_KIND asks for {kind.name}, it is {found.kind}"
    else:
        reason = reason_to_build(n_rows, lists, lists_now, n_changed, exact=wanted.lists is not None)
    if reason is None and wanted.rebuild:
        reason = "a rebuild was requested"
    if reason is not None:
        # what it has now may have fitted into memory once
        lists, limit = plan_lists(max(1, n_rows), wanted, None, capacity, spec)
    if kind.has_lists:
        indexed = kind.indexed_type(spec.vector_type)
        estimate = sizing.estimate_build(n_rows, lists, spec.dimensions, indexed, capacity.workers)
    else:
        estimate = sizing.estimate_graph(n_rows, spec.dimensions, capacity.memory_bytes, capacity.workers)
        if estimate.memory_bytes < sizing.graph_memory_bytes(n_rows, spec.dimensions):
            limit = (
                f"the graph does not fit into {sizing.format_bytes(estimate.memory_bytes)} of memory "
                f"({capacity.memory_source}), so that the build takes much longer"
            )
    return BuildPlan(kind, n_changed, lists_now, reason, limit, capacity, estimate)


def reason_of_drift(report: RecallReport | None) -> str | None:
    """Why an index by bits should be built again though its lists fit, or None."""
    if report is None or report.drift is None or report.drift <= MAX_DRIFT:
        return None
    return f"the mean of the vectors has moved by {report.drift:.0%} of their spread since the index was built"
