"""The commands that do something: demo, dev, run, embed, load, index, verify, swap, adopt.

Exit codes: 0 done, 1 failed or incomplete, 2 wrong usage, 3 songs are missing (`status`) or a check failed (`verify`),
130 interrupted. When to add here: another command that changes something. Keep out: how a job runs (`run`).
"""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from songvec_assets.cli import base
from songvec_assets.cli.base import ConfirmDeletions, app, takes_options
from songvec_assets.cli.terminal import EXIT_INCOMPLETE, hint, interruptible, say, warn
from songvec_assets.errors import SettingsError, TableMismatchError

if TYPE_CHECKING:
    from songvec_assets.cli.run import RunResult
    from songvec_assets.pipeline import Pipeline
    from songvec_assets.songs.ranges import SongIdRange

DEMO_QUERIES = ("leaving home to begin a new life overseas", "cycling", "nonna in cucina")

MaxUsd = Annotated[float | None, typer.Option(min=0, help="Budget in dollars; the run stops before it exceeds it.")]
ConfirmReembedding = Annotated[
    bool, typer.Option("--confirm-reembedding", help="Pay again for cached texts that a changed setting alters.")
]
ConfirmModelChange = Annotated[
    bool,
    typer.Option(
        "--confirm-model-change",
        help="Continue even if the provider returns other vectors for the model than those that are cached.",
    ),
]


@app.command()
def demo(
    context: typer.Context,
    songs: Annotated[
        int, typer.Option(min=0, help="Number of generated songs to add to the samples, to try a larger catalogue.")
    ] = 0,
) -> None:
    """Fill an embedded Postgres with sample songs, run the whole graph on it, and search."""
    from songvec_assets.cli.queries import print_hits
    from songvec_assets.postgres.embedded import add_generated_songs
    from songvec_assets.settings import LOCAL_MODELS

    pipeline = base.make_pipeline()
    pipeline.check_model()
    held = pipeline.table.spec
    if held is not None and held.model not in LOCAL_MODELS:
        raise TableMismatchError(
            f"the embedded database holds vectors of {held.model}, made with a key: the demo would replace them. "
            "Search them with `songvec search` and the key, or remove .songvec to start again",
            "table.not-demo",
        )
    if songs:
        add_generated_songs(pipeline.database, songs)
    _run_job("refresh", pipeline, base.choose_span(pipeline, ""))
    for query in DEMO_QUERIES:
        print_hits(pipeline, query, 3)
    has_own = bool(context.obj)
    in_clone = Path("Makefile").exists() and Path("songvec_assets").is_dir()
    command = "songvec" if shutil.which("songvec") else sys.argv[0]
    show = f"{command} dev --demo" if has_own else "make dev" if in_clone else f"{command} dev"
    find = "" if has_own else f"; {command} search “…” finds more"
    hint(f"{show} shows this run in the Dagster UI{find}.")


@app.command()
def dev(
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="Port of the UI.")] = 3000,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show the demo's runs, even if the environment or .env names a database.")
    ] = False,
) -> None:
    """Start the Dagster UI, with the runs of `songvec` in this folder: those of the demo, or of POSTGRES_URL."""
    from songvec_assets.defs.instance import WORKSPACE, choose_home

    if demo:
        from songvec_assets.settings import variables

        # empty, not unset: dagster reads `.env`, too
        os.environ.update(dict.fromkeys(variables(), ""))
    os.environ["DAGSTER_HOME"] = str(choose_home())
    # dagster looks for its commands on the PATH, which has them only if the environment is activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "dagster", "dev", "--workspace", str(WORKSPACE), "--port", str(port)]
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingsError(
                f"expected a free port, got {port} ({error.strerror}): end what listens there, or name another with "
                "--port"
            ) from error
    # a script's background job ignores Ctrl+C, and dagster would ignore SIGTERM with it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hint(f"open http://127.0.0.1:{port} in about 20 s; Ctrl+C ends it.")
    sys.stdout.flush()
    os.execv(sys.executable, command)


@dataclass(frozen=True)
class RunOptions:
    """The options of `run` and `embed`; `--anew` is the former name of `--reembed`."""

    ranges: Annotated[str, typer.Option(help="FIRST...LAST range keys. Default: all that hold songs.")] = ""
    max_usd: MaxUsd = None
    append: Annotated[
        bool, typer.Option("--append", help="Export only songs above the highest song_id exported so far.")
    ] = False
    reembed: Annotated[
        bool, typer.Option("--reembed", help="Embed all songs of the ranges again, and pay for them again.")
    ] = False
    anew: Annotated[bool, typer.Option("--anew", hidden=True)] = False
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Send again the songs that the provider rejected.")
    ] = False
    confirm_deletions: ConfirmDeletions = False
    confirm_reembedding: ConfirmReembedding = False
    confirm_model_change: ConfirmModelChange = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what a run would do and cost.")] = False

    def as_config(self) -> dict[str, Any]:
        """The config of the resource `run`."""
        return {
            "max_usd": self.max_usd,
            "export_mode": "append" if self.append else "all",
            "reembed": self.reembed or self.anew,
            "retry_rejected": self.retry_rejected,
            "confirm_deletions": self.confirm_deletions,
            "confirm_reembedding": self.confirm_reembedding,
            "confirm_model_change": self.confirm_model_change,
        }


@app.command()
@takes_options
def run(options: RunOptions) -> None:
    """Run the whole graph: export, embed, load, index. Processes only what changed."""
    _run_or_plan(
        "refresh",
        options,
        "`songvec search “…”` finds songs, `songvec status` shows each range, `songvec verify` runs all checks.",
    )


@app.command()
@takes_options
def embed(options: RunOptions) -> None:
    """Export and embed: pays for what is missing. Does not change the table."""
    _run_or_plan(
        "embed", options, "`songvec load` loads what was embedded, `songvec index` indexes it; `songvec run` does both."
    )


def _run_or_plan(job: str, options: RunOptions, next_step: str) -> None:
    from songvec_assets.cli.queries import print_plan

    pipeline = base.make_pipeline()
    if not options.dry_run:
        pipeline.check_model()
    span = base.choose_span(pipeline, options.ranges)
    if options.dry_run:
        print_plan(pipeline, span, options.reembed or options.anew)
        return
    _run_job(job, pipeline, span, run=options.as_config())
    hint(next_step)


@app.command()
def load() -> None:
    """Load the cache into the table: writes what changed. Sends no song to the provider."""
    _run_job("load", base.make_pipeline())
    hint("`songvec index` builds the index.")


@app.command()
def index() -> None:
    """Build a new index while the current one serves, and measure its recall."""
    _run_job("rebuild_index", base.make_pipeline(), run={"rebuild_index": True})
    hint("`songvec verify` runs all checks.")


@app.command()
def verify() -> None:
    """Run all checks of the table and the index; changes nothing. Exit code 3 if one does not pass."""
    from songvec_assets.defs.checks import CheckResult

    results = _run_job("verify", base.make_pipeline()).of(CheckResult)
    for each in results:
        if each.finding.passed:
            say(f"{each.check}: {each.finding.message}")
    if not all(each.finding.passed for each in results):
        hint("docs/operations.md says what to do about each check; `songvec run` often is enough.")
        raise typer.Exit(EXIT_INCOMPLETE)
    hint("`songvec search “…”` finds songs.")


@dataclass(frozen=True)
class SwapOptions:
    """The options of `swap`."""

    model: Annotated[str | None, typer.Option(help="Model to switch to. Default: SONGVEC_EMBEDDING_MODEL.")] = None
    dimensions: Annotated[
        int | None, typer.Option(help="Values per vector. Default: SONGVEC_EMBEDDING_DIMENSIONS.")
    ] = None
    vector_type: Annotated[str | None, typer.Option(help="vector or halfvec. Default: SONGVEC_VECTOR_TYPE.")] = None
    max_usd: MaxUsd = None
    confirm_deletions: ConfirmDeletions = False
    confirm_reembedding: ConfirmReembedding = False
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the previous table serve again.")] = False
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Drop the tables that earlier swaps kept.")] = False


@app.command()
@takes_options
def swap(options: SwapOptions) -> None:
    """Switch to another model, size or type: build a staging table, compare it, and replace the serving one."""
    from songvec_assets.settings import ProviderSettings
    from songvec_assets.vectors.swap import LoadReport

    if options.rollback or options.drop_old:
        with interruptible():
            _undo_swap(options.rollback)
        return
    resources: dict[str, dict[str, Any]] = {
        "postgres": {"vector_type": options.vector_type},
        "fireworks": {
            "embedding_model": options.model,
            "model_id": options.model,
            "embedding_dimensions": options.dimensions,
        },
        "run": {"swap": True, "max_usd": options.max_usd},
    }
    pipeline = base.make_pipeline(**resources["postgres"], **resources["fireworks"], **resources["run"])
    resources["run"] |= {
        "confirm_deletions": options.confirm_deletions,
        "confirm_reembedding": options.confirm_reembedding,
    }
    pipeline.check_model()
    if pipeline.table.spec == pipeline.table_spec:
        raise SettingsError(
            f"searches find {pipeline.table_spec} already: name another --model, --dimensions or --vector-type",
            "settings.unchanged",
        )
    swapped = _run_job("swap", pipeline, base.choose_span(pipeline, ""), **resources)
    each = pipeline.settings
    name = each.model if each.offline else each.embedding_model
    model_id = f"SONGVEC_MODEL_ID={each.model} " if ProviderSettings().model_id else ""
    say(
        f"Searches now find {pipeline.table_spec}. Keep these settings: SONGVEC_EMBEDDING_MODEL={name} "
        f"{model_id}SONGVEC_EMBEDDING_DIMENSIONS={each.dimensions} SONGVEC_VECTOR_TYPE={each.vector_type}"
    )
    if any(load.comparison for load in swapped.of(LoadReport)):
        hint("`songvec swap --rollback` makes the previous table serve again, `songvec swap --drop-old` drops it.")


def _undo_swap(rollback: bool) -> None:
    from songvec_assets.progress import RunContext
    from songvec_assets.vectors.swap import drop_others, roll_back

    pipeline = base.make_pipeline()
    run = RunContext(lambda _: warn("Waiting for a load or swap to end."), pipeline.stop)
    if rollback:
        say(f"Searches now find {roll_back(pipeline.database, run)}; set the settings back to it.")
        hint("`songvec swap --rollback` again undoes this.")
    else:
        dropped = drop_others(pipeline.database, run)
        say(f"Dropped: {', '.join(dropped) or 'nothing, there was no other table'}")


def _run_job(
    job: str,
    pipeline: "Pipeline",
    span: "tuple[SongIdRange, SongIdRange] | None" = None,
    **resources: Mapping[str, Any],
) -> "RunResult":
    # here: Dagster takes 2 s to import
    from songvec_assets.cli.run import run_and_print

    return run_and_print(job, pipeline, span, resources)
