"""The tables that `songvec` prints, and the last line of an incomplete run.

When to add here: another table. Keep out: what the figures are, and when to print.
"""

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from songvec_assets.songs.ranges import name_some

if TYPE_CHECKING:
    from songvec_assets.cli.run import RunResult
    from songvec_assets.embedding.pricing import Estimate
    from songvec_assets.reports import Status
    from songvec_assets.search.evaluate import Evaluation
    from songvec_assets.search.nearest import Hit

_MAX_REASONS, _MAX_KEYS = 2, 3


def run_table(result: "RunResult", width: int) -> Table:
    """A row per asset."""
    from songvec_assets.cache.plan import FillReport
    from songvec_assets.defs.reports import count_vectors
    from songvec_assets.songs.reports import ExportReport
    from songvec_assets.vectors.index.upkeep import IndexReport
    from songvec_assets.vectors.swap import LoadReport

    rows: list[list[str]] = []

    def add(asset: str, n_rows: int, *figures: int | str) -> None:
        seconds = result.seconds.get(asset)
        took = "–" if seconds is None else f"{seconds:,.{2 if seconds < 100 else 0}f}"
        shown = [each if isinstance(each, str) else f"{each:,}" for each in figures]
        rows.append([asset, f"{n_rows:,}", took, *(shown or [""] * 5)])

    for export in result.of(ExportReport):
        changes = export.changes
        add("songs_parquet", export.n_songs, "", "", "", changes.n_new, changes.n_changed)
    if fills := result.of(FillReport):
        names = ("n_tokens", "usd", "n_unchanged", "n_new", "n_changed")
        n_tokens, usd, *counts = (sum(getattr(each, name) for each in fills) for name in names)
        add("embedding_cache", sum(map(count_vectors, fills)), n_tokens, _describe_usd(usd), *counts)
    for load in result.of(LoadReport):
        add("song_embeddings_table", sum(each.n_rows for each in load.loads))
    for index in result.of(IndexReport):
        add("ivfflat_index", index.index.n_rows)
    columns = ("Asset", "Rows", "Seconds", "Tokens", "Cost", "Unchanged", "New", "Changed")
    return _table(columns, rows, width)


def describe_incomplete_run(result: "RunResult", status: "Status | None", loads: bool) -> str:
    """What is missing after a run that continued without some ranges, and why: one line.

    Args:
        status: as it is now; None if it could not be measured.
        loads: whether the run was to load what it embedded.
    """
    missing = []
    for each in [] if status is None else status.ranges.iter_rows(named=True):
        n_without_vector = each["n_songs"] + each["n_unexported"] - each["n_cached"] - each["n_rejected"]
        missing.append(each["n_missing"] if loads else n_without_vector)
    missing = [n_songs for n_songs in missing if n_songs]
    if status is None:
        counted = "some songs may be missing"
    elif missing:
        songs = "1 song is" if sum(missing) == 1 else f"{sum(missing):,} songs are"
        counted = f"{songs} missing, in {len(missing):,} of {len(status.ranges):,} ranges"
    else:
        counted = "no song is missing, but some are not up to date"
    done = (
        "the rest could not be done" if result.failures else f"the rest is {'loaded and indexed' if loads else 'kept'}"
    )
    named = {reason: name_some(keys, most=_MAX_KEYS) for reason, keys in result.incomplete.items()}
    reasons = [f"{keys}: {reason}" if keys else reason for reason, keys in named.items()]
    rest = f"; and {len(reasons) - _MAX_REASONS:,} more reasons" if len(reasons) > _MAX_REASONS else ""
    return f"Incomplete: {counted}; {done}. {'; '.join(reasons[:_MAX_REASONS])}{rest}"


def estimate_table(estimate: "Estimate", offline: bool) -> Table:
    """What a run would cost."""
    from songvec_assets.progress import describe_seconds

    table = Table(show_header=False, box=box.SIMPLE_HEAD)
    usd = _describe_usd(estimate.usd)
    for name, value in {
        "Songs in the snapshot": f"{estimate.n_songs:,}",
        "Songs that take the stored vector of their text": f"{estimate.n_reused:,}",
        "Texts to embed": f"{estimate.n_texts:,}",
        "Tokens, about": f"{estimate.n_tokens:,}",
        "Cost, about": f"{usd} (a local model costs nothing)" if offline else usd,
        "Time at full quota": "none" if offline else describe_seconds(estimate.hours * 3600),
    }.items():
        table.add_row(name, value)
    return table


def status_table(status: "Status", width: int) -> Table:
    """A row per range, and their total."""
    columns = ("Range", "Songs", "New", "Cached", "Rejected", "Loaded", "Indexed", "Missing", "Orphans")
    ranges = [*status.ranges.iter_rows(), [*status.total.values()]]
    return _table(columns, [[key, *(f"{count:,}" for count in counts)] for key, *counts in ranges], width)


def hits_table(hits: Sequence["Hit"]) -> Table:
    """The songs found, nearest first: name and artist, and below them the best line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("Near", width=5)
    table.add_column("Song, artist and best line", ratio=1)
    for hit in hits:
        near = "–" if hit.similarity is None else f"{hit.similarity:.3f}"
        song = Text.assemble((hit.name, "bold"), f" — {hit.artist}")
        line = Text(hit.best_line or "(no lyrics)", style="dim", no_wrap=True, overflow="ellipsis")
        below = [line, Text(hit.explanation, style="dim")] if hit.explanation else [line]
        table.add_row(near, Group(song, *below))
    return table


def evaluation_table(found: "Evaluation") -> Table:
    """A row per slice and mode: means over queries with their 95 % intervals."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("Slice", max_width=12, overflow="fold")
    for name in ("Mode", "Queries", "Recall@10", "MRR@10", "nDCG@10"):
        table.add_column(name, justify="left" if name == "Mode" else "right", no_wrap=True)
    before = None
    for each in found.scores:
        if each.slice != before:
            table.add_section()
        figures = [f"{of.mean:.3f} {of.low:.2f}–{of.high:.2f}" for of in (each.recall, each.mrr, each.ndcg)]
        table.add_row("" if each.slice == before else each.slice, each.mode, f"{each.n_queries:,}", *figures)
        before = each.slice
    return table


def settings_table() -> str:
    """All settings, as the Markdown table in the README."""
    from songvec_assets.settings import GROUPS, STORE_IDENTITY, GraphSettings, ServeSettings, describe_setting
    from songvec_assets.settings_group import variable

    lines = [
        "| Variable | Default | Meaning | Read | Store identity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group in GROUPS:
        reads = {GraphSettings: "when the graph loads", ServeSettings: "when a search or the server starts"}
        read = reads.get(group, "when a run starts")
        for name, field in group.model_fields.items():
            default = "" if field.default is None else f"`{field.default!s}`".replace("\n", "\\n")
            identity = "yes" if name in STORE_IDENTITY else ""
            meaning = describe_setting(field).removesuffix(".")
            lines.append(f"| `{variable(name)}` | {default} | {meaning} | {read} | {identity} |")
    return "\n".join(lines)


def _describe_usd(usd: float) -> str:
    return f"${usd:,.{2 if usd >= 1 else 4}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table whose row `all` is bold; if it is too wide for the terminal, without columns of nothing but zeros."""
    cells = [*zip(columns, *rows, strict=True)]
    is_narrow = 1 + sum(max(map(len, column)) + 1 for column in cells) > width
    shown = [not is_narrow or any(cell.strip("$0.") for cell in column[1:]) for column in cells]
    shown[:2] = True, True
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in compress(columns, shown):
        is_first = name == columns[0]
        table.add_column(name, no_wrap=is_first, justify="left" if is_first else "right", overflow="fold")
    for row in rows:
        table.add_row(*compress(row, shown), style="bold" if row[0] == "all" else None)
    return table
