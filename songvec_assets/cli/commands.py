"""The commands: each reads its options, calls the core or runs a job, and prints.

Exit codes: 0 done, 1 failed or done in part, 2 wrong words, 3 songs are missing (`status`) or a check did not pass
(`verify`), 130 interrupted.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from dotenv import dotenv_values, load_dotenv
from rich.console import Console
from rich.text import Text

from songvec_assets.errors import SettingsError, SongvecError
from songvec_assets.progress import Progress, run_in_worker
from songvec_assets.signals import discard_unwritable_output, interrupted_by_hangup

if TYPE_CHECKING:
    from songvec_assets.cli.run import RunResult
    from songvec_assets.deployment import Deployment
    from songvec_assets.embedding.pricing import Estimate
    from songvec_assets.songs.ranges import SongIdRange

app = typer.Typer(
    help="Songs in Postgres become an indexed pgvector table of embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

DEMO_QUERIES = ("leaving home to begin a new life overseas", "cycling", "nonna in cucina")
EXIT_FAILED, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 3, 130

Ranges = Annotated[str, typer.Option(help="FIRST...LAST range keys; default: all that hold songs.")]
MaxUsd = Annotated[float | None, typer.Option(min=0, help="Budget in dollars; stops before exceeding it.")]
Append = Annotated[bool, typer.Option("--append", help="Export only above the highest song_id there.")]
Anew = Annotated[bool, typer.Option("--anew", help="Embed, and pay for, all songs of the ranges again.")]

RetryRejected = Annotated[
    bool, typer.Option("--retry-rejected", help="Send songs again that the provider rejected before.")
]
ConfirmDeletions = Annotated[
    bool, typer.Option("--confirm-deletions", help="Songs missing in bulk are meant to be deleted: do not stop.")
]

ConfirmReembedding = Annotated[
    bool,
    typer.Option("--confirm-reembedding", help="Pay again for cached texts that a changed setting makes otherwise."),
]


@app.callback()
def read_dotenv(context: typer.Context) -> None:
    """Read `.env`, as dagster does; the demo looks at neither it nor the environment."""
    dotenv = Path.cwd() / ".env"
    if context.invoked_subcommand == "demo":
        from songvec_assets.settings import variables

        context.obj = any((os.environ | dotenv_values(dotenv)).get(variable) for variable in variables())
        for variable in variables():
            os.environ.pop(variable, None)
    else:
        load_dotenv(dotenv)


@app.command()
def demo(
    context: typer.Context,
    songs: Annotated[int, typer.Option(min=0, help="Generated songs to have beyond the samples, for trying size.")] = 0,
) -> None:
    """Fill an embedded Postgres with sample songs, run the whole graph on it, and search."""
    from songvec_assets.embedding.demo import find_files
    from songvec_assets.postgres.embedded import add_generated_songs
    from songvec_assets.settings import LOCAL_MODELS

    find_files()  # a model that is not installed is refused before anything starts
    deployment = _deploy()
    held = deployment.table.spec
    if held is not None and held.model not in LOCAL_MODELS:
        _fail(
            f"the embedded database holds vectors of {held.model}, made with a key: the demo would replace them. "
            "Search them with `songvec search` and the key, or remove .songvec to start again"
        )
    if songs:
        add_generated_songs(deployment.database, songs)
    _run_job("refresh", deployment, _span(deployment, ""))
    for query in DEMO_QUERIES:
        _print_hits(deployment, query, 3)
    in_clone, own = Path("Makefile").exists() and Path("songvec_assets").is_dir(), bool(context.obj)
    command = "songvec" if shutil.which("songvec") else sys.argv[0]
    show = f"{command} dev --demo" if own else "make dev" if in_clone else f"{command} dev"
    find = "" if own else f"; {command} search “…” finds more"
    out.print(f"Next: {show} shows this run in the Dagster UI{find}.", markup=False, style="bold", soft_wrap=True)


@app.command()
def dev(
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="Where the UI listens.")] = 3000,
    demo: Annotated[
        bool, typer.Option("--demo", help="What the demo did, where the environment or .env names another database.")
    ] = False,
) -> None:
    """Start the Dagster UI, with the runs of `songvec` in this folder: those of the demo, or of POSTGRES_URL."""
    from songvec_assets.defs.instance import WORKSPACE, choose_home

    if demo:
        from songvec_assets.settings import variables

        # empty, not unset: dagster reads `.env`, too
        os.environ.update(dict.fromkeys(variables(), ""))
    os.environ["DAGSTER_HOME"] = str(choose_home())
    # dagster looks for its commands on the PATH, which has them only where the environment is activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "dagster", "dev", "--workspace", str(WORKSPACE), "--port", str(port)]
    sys.stdout.flush()
    os.execv(sys.executable, command)


@app.command()
def run(
    ranges: Ranges = "",
    max_usd: MaxUsd = None,
    append: Append = False,
    anew: Anew = False,
    retry_rejected: RetryRejected = False,
    confirm_deletions: ConfirmDeletions = False,
    confirm_reembedding: ConfirmReembedding = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a run would do and cost; do nothing.")] = False,
) -> None:
    """Run the whole graph: export, embed, load, index. Does what changed, and nothing else."""
    if dry_run:
        _print_plan(ranges, anew)
        return
    choices = {"embed_anew": anew, "retry_rejected": retry_rejected, "confirm_deletions": confirm_deletions}
    choices["confirm_reembedding"] = confirm_reembedding
    _embed("refresh", ranges, max_usd, append, **choices)


@app.command()
def embed(
    ranges: Ranges = "",
    max_usd: MaxUsd = None,
    append: Append = False,
    anew: Anew = False,
    retry_rejected: RetryRejected = False,
    confirm_deletions: ConfirmDeletions = False,
    confirm_reembedding: ConfirmReembedding = False,
) -> None:
    """Export and embed: pays for what is missing; the table stays as it is."""
    choices = {"embed_anew": anew, "retry_rejected": retry_rejected, "confirm_deletions": confirm_deletions}
    choices["confirm_reembedding"] = confirm_reembedding
    _embed("embed", ranges, max_usd, append, **choices)


@app.command()
def load() -> None:
    """Make the table equal the cache. Sends nothing to the provider."""
    _run_job("load", _deploy())


@app.command()
def index() -> None:
    """Build the index anew beside the one that serves, and measure its recall."""
    _run_job("rebuild_index", _deploy(), run={"rebuild_index": True})


@app.command()
def verify() -> None:
    """Ask all checks of table and index; changes nothing. Exit code 3 where one does not pass."""
    result = _run_job("verify", _deploy())
    for answer in result.answers:
        out.print(answer, markup=False, highlight=False)
    if result.warnings:
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def estimate(
    refresh: Annotated[bool, typer.Option(help="Bring the snapshots up to date first; costs time, no money.")] = True,
    confirm_deletions: ConfirmDeletions = False,
) -> None:
    """Say what a run would cost: songs, tokens, dollars, hours. Spends nothing."""
    from songvec_assets.cli.render import estimate_table

    deployment = _deploy()

    def measure(show: Callable[[Progress], None]) -> "tuple[Estimate, list[str]]":
        if refresh:
            deployment.export(progress=show, confirm_deletions=confirm_deletions)
        return deployment.estimate(), deployment.describe_boilerplate()

    with _interruptible(), _showing_progress() as show:
        result, boilerplate = run_in_worker(measure, report=show, stop=deployment.cancel)
    out.print(deployment.describe())
    out.print(estimate_table(result, deployment.settings.offline))
    if result.n_again:
        out.print(result.describe_again(), style="yellow", markup=False, highlight=False)
    for line in boilerplate:
        out.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="The same for scripts.")] = False,
) -> None:
    """Say per range what is exported, cached, loaded and indexed. Exit code 3 where songs are missing."""
    from songvec_assets.cli.render import status_table
    from songvec_assets.status import measure_status

    deployment = _deploy()
    measured = measure_status(deployment)
    if as_json:
        print(json.dumps(asdict(measured) | {"total": asdict(measured.total), "missing": measured.total.n_missing}))
    else:
        out.print(deployment.describe())
        out.print(status_table(measured))
        for line in measured.describe():
            out.print(line, markup=False, highlight=False)
    raise typer.Exit(EXIT_INCOMPLETE if measured.total.n_missing else 0)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What the songs are about.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Songs at most.")] = 10,
) -> None:
    """Find the songs nearest to a text."""
    _print_hits(_deploy(), query, limit)


@app.command()
def swap(
    model: Annotated[str | None, typer.Option(help="Model to have; default: that of the settings.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Values a vector; default: those of the settings.")] = None,
    vector_type: Annotated[str | None, typer.Option(help="vector or halfvec; default: that of the settings.")] = None,
    max_usd: Annotated[float | None, typer.Option(min=0, help="Budget in dollars; stops before exceeding it.")] = None,
    confirm_deletions: ConfirmDeletions = False,
    confirm_reembedding: ConfirmReembedding = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Let the table before serve again.")] = False,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Drop what earlier swaps kept.")] = False,
) -> None:
    """Build another model, size or type beside the serving table, compare, and put it in its place."""
    from songvec_assets.vectors.table import PREVIOUS

    if rollback or drop_old:
        with _interruptible():
            _undo_swap(rollback)
        return
    given: dict[str, dict[str, Any]] = {
        "postgres": {"vector_type": vector_type},
        "fireworks": {"embedding_model": model, "embedding_dimensions": dimensions},
        "run": {"swap": True, "max_usd": max_usd},
    }
    resources = {name: {key: value for key, value in each.items() if value is not None} for name, each in given.items()}
    deployment = _deploy(**resources["postgres"], **resources["fireworks"], **resources["run"])
    resources["run"] |= {"confirm_deletions": confirm_deletions, "confirm_reembedding": confirm_reembedding}
    if deployment.table.spec == deployment.table_spec:
        _fail(f"searches find {deployment.table_spec} already: name another --model, --dimensions or --vector-type")
    _run_job("swap", deployment, _span(deployment, ""), **resources)
    each = deployment.settings
    out.print(
        f"Searches now find {deployment.table_spec}. Keep it so: SONGVEC_EMBEDDING_MODEL={each.model} "
        f"SONGVEC_EMBEDDING_DIMENSIONS={each.dimensions} SONGVEC_VECTOR_TYPE={each.vector_type}\n"
        f"The table before is kept as {PREVIOUS}: `songvec swap --rollback` lets it serve again, `songvec swap "
        "--drop-old` drops it.",
        markup=False,
    )


def _undo_swap(rollback: bool) -> None:
    from songvec_assets.progress import RunContext
    from songvec_assets.vectors.swap import drop_others, roll_back

    deployment = _deploy()
    run = RunContext(lambda _: err.print("Waiting for a load or swap to end.", style="yellow"), deployment.stop)
    if rollback:
        serving = roll_back(deployment.database, run)
        out.print(f"Searches now find {serving}; set the settings back to it.", markup=False)
    else:
        dropped = drop_others(deployment.database, run)
        out.print(f"Dropped: {', '.join(dropped) or 'nothing, there was no other table'}", markup=False)


@app.command()
def adopt() -> None:
    """Bind the storage folder to the database, after one of them was moved, copied or restored."""
    from songvec_assets.cache.store import adopt_store, open_store
    from songvec_assets.postgres.schema import ensure_schema

    deployment = _deploy()
    ensure_schema(deployment.database)
    store = open_store(deployment.storage_root, deployment.tiling)
    adopt_store(store, deployment.database)
    out.print(f"{store.root} now belongs to {deployment.database.describe()}", markup=False)


@app.command("settings")
def print_settings() -> None:
    """Print every setting as a Markdown table, and the prompts of the configured model."""
    from songvec_assets.settings import settings_table

    print(settings_table())
    deployment = _deploy()
    prompts = deployment.prompts
    print(
        f"\nPrompts of {deployment.settings.model}: {_show_prompt(prompts.query)} for queries, "
        f"{_show_prompt(prompts.document)} for songs."
    )


def _show_prompt(prompt: str) -> str:
    return "none" if prompt in ("{query}", "{text}") else f"`{prompt}`".replace("\n", "\\n")


def main() -> None:
    """Run the command; the package's errors are one line, not a traceback. SIGTERM and SIGHUP interrupt it."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with interrupted_by_hangup():
        try:
            app()
        except SongvecError as error:
            _fail(str(error))
        finally:
            discard_unwritable_output()


def _fail(message: str) -> NoReturn:
    # one line stays one where another program reads it
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=not err.is_terminal)
    sys.exit(EXIT_FAILED)


def _deploy(**overrides: Any) -> "Deployment":
    from songvec_assets.deployment import Deployment
    from songvec_assets.settings import Settings

    return Deployment(Settings(**overrides))


def _span(deployment: "Deployment", ranges: str) -> "tuple[SongIdRange, SongIdRange]":
    """First and last range of a run: those asked for, else all that hold songs or cache."""
    from songvec_assets.defs.resources import parse_span

    if ranges:
        try:
            return parse_span(ranges, deployment.tiling)
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from error
    held = deployment.held_ranges()
    if not held:
        caution = f" ({deployment.source.caution})" if deployment.source.caution else ""
        _fail(
            f"table {deployment.source.table} holds no songs with an id from {deployment.tiling.start} on: nothing to "
            f"do{caution}"
        )
    return held[0], held[-1]


def _embed(job: str, ranges: str, max_usd: float | None, append: bool, **choices: bool) -> None:
    deployment = _deploy()
    options: dict[str, Any] = {"export_mode": "append" if append else "all", **choices}
    if max_usd is not None:
        options["max_usd"] = max_usd
    _run_job(job, deployment, _span(deployment, ranges), run=options)


def _run_job(
    job: str,
    deployment: "Deployment",
    span: "tuple[SongIdRange, SongIdRange] | None" = None,
    **resources: "Mapping[str, Any]",
) -> "RunResult":
    """Run a job, in this process and the project's Dagster instance, and sum it up."""
    from songvec_assets.cli.render import run_table
    from songvec_assets.cli.run import run_job
    from songvec_assets.definitions import defs
    from songvec_assets.postgres.schema import read_pgvector_caution

    out.print(deployment.describe())
    with _interruptible(), _showing_progress():
        result = run_job(defs.resolve_job_def(job), span, resources)
    if result.rows:
        out.print(run_table(result))
    if result.comparison:
        out.print(f"Swapped in: {result.comparison}.", markup=False, highlight=False)
    if result.n_set_aside:
        out.print(f"Set aside: {result.n_set_aside:,}; `songvec status` says which and why.", markup=False)
    for warning in [*result.warnings, *filter(None, [read_pgvector_caution(deployment.database)])]:
        out.print(warning, style="yellow", markup=False, highlight=False)
    if result.incomplete:
        _fail("\n".join([*result.failures, _describe_incomplete(result, deployment, job)]))
    if result.failures:
        _fail("\n".join(result.failures))
    return result


def _describe_incomplete(result: "RunResult", deployment: "Deployment", job: str) -> str:
    from songvec_assets.cli.render import describe_incomplete_run
    from songvec_assets.status import measure_status

    try:
        status = measure_status(deployment)
    except SongvecError:  # why the run failed is what counts
        status = None
    return describe_incomplete_run(result, status, loads=job != "embed")


def _print_plan(ranges: str, anew: bool) -> None:
    from songvec_assets.dry_run import plan_run

    deployment = _deploy()
    first, last = _span(deployment, ranges)
    out.print(deployment.describe())
    planned = plan_run(deployment, [each for each in deployment.tiling if first <= each <= last], anew)
    for line in planned.describe():
        # statements are to be copied
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_hits(deployment: "Deployment", query: str, limit: int) -> None:
    from songvec_assets.cli.render import hits_table
    from songvec_assets.search.nearest import search_songs

    vector = deployment.embed_query(query, on_trouble=lambda words: err.print(words, style="yellow", markup=False))
    hits = search_songs(deployment.database, deployment.source, deployment.as_loaded().table_spec, vector, limit)
    out.print(Text(f"“{query}”", style="bold"))
    out.print(hits_table(hits))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """End on Ctrl+C with a word about what is kept, before the command line's own silent exit."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, SystemExit):  # the terminal, or who reads the pipe, may be what ended it
            err.print("Interrupted. What was done is kept: the same command goes on from there.", style="yellow")
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _showing_progress() -> Iterator[Any]:
    """Bars on a terminal, plain lines elsewhere."""
    from songvec_assets.cli.render import Bars, Lines
    from songvec_assets.defs.steps import show_progress

    with _progress_console() as console, Bars(console) if err.is_terminal else Lines(console) as shown:
        token = show_progress.set(shown)
        try:
            yield shown
        finally:
            show_progress.reset(token)


@contextlib.contextmanager
def _progress_console() -> Iterator[Console]:
    """Standard error; where that is a terminal, the terminal itself: Dagster redirects a step's output to a file."""
    if not err.is_terminal:
        yield err
        return
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding)
    try:
        yield Console(file=terminal)
    finally:
        with contextlib.suppress(OSError):  # the terminal was closed
            terminal.close()
