"""The `songvec` application: its entry point, `.env`, and what commands start from.

When to add here: what several commands need before they begin. Keep out: the commands.
"""

import atexit
import functools
import gc
import inspect
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from dotenv import dotenv_values, load_dotenv

from songvec_assets.cli.terminal import fail
from songvec_assets.errors import SettingsError, SongvecError, SourceError, describe
from songvec_assets.signals import discard_unwritable_output, interrupted_by_hangup

if TYPE_CHECKING:
    from songvec_assets.pipeline import Pipeline
    from songvec_assets.searches import Searches
    from songvec_assets.settings import Settings
    from songvec_assets.songs.ranges import SongIdRange

Options = TypeVar("Options")
_GARBAGE_OBJECTS = 50_000

app = typer.Typer(
    help="Songs in Postgres become an indexed pgvector table of embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


ConfirmDeletions = Annotated[
    bool, typer.Option("--confirm-deletions", help="Accept that songs missing in bulk were deleted on purpose.")
]


@app.callback()
def read_dotenv(context: typer.Context) -> None:
    """Read `.env`, as Dagster does; the demo ignores both `.env` and the environment."""
    from songvec_assets.settings import variables
    from songvec_assets.settings_group import check_names

    dotenv = Path.cwd() / ".env"
    if context.invoked_subcommand == "demo":
        context.obj = any((os.environ | dotenv_values(dotenv)).get(variable) for variable in variables())
        for variable in [*variables(), *(name for name in os.environ if name.startswith("SONGVEC_"))]:
            os.environ.pop(variable, None)
    else:
        load_dotenv(dotenv)
        check_names(os.environ, variables())


def main() -> None:
    """Run the command. The package's errors are one line without a traceback; SIGTERM and SIGHUP interrupt it."""
    # a command makes little garbage; looking for it takes a fifth of a run, most of it at the end, among all imports
    gc.set_threshold(_GARBAGE_OBJECTS)
    atexit.register(gc.freeze)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with interrupted_by_hangup():
        try:
            app()
        except SongvecError as error:
            fail(describe(error))
        finally:
            discard_unwritable_output()


def takes_options(command: Callable[[Options], None]) -> Callable[..., None]:
    """Let a command take its options as one dataclass; typer sees an option for each of its fields."""
    [parameter] = inspect.signature(command).parameters.values()
    options = parameter.annotation

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(options(**given))

    with_options.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
    return with_options


def make_pipeline(**overrides: Any) -> "Pipeline":
    """A pipeline with the settings of the environment.

    Args:
        overrides: replace settings, by name.
    """
    settings = _begin(overrides)
    from songvec_assets.pipeline import Pipeline

    return Pipeline(settings)


def make_searches(embeds_query: bool = False, **overrides: Any) -> "Searches":
    """What only searches: it loads less than `make_pipeline`, and needs no store.

    Args:
        embeds_query: whether the command embeds a query: the demo's model is then read ahead.
        overrides: replace settings, by name.
    """
    from songvec_assets.settings import DEMO_MODEL

    settings = _begin(overrides)
    if embeds_query and settings.model == DEMO_MODEL:
        from songvec_assets.embedding.demo import read_ahead

        read_ahead()
    from songvec_assets.searches import Searches

    return Searches(settings)


def _begin(overrides: Mapping[str, Any]) -> "Settings":
    """The settings. The embedded server starts while the libraries are loaded, which takes as long."""
    from songvec_assets.settings import Settings

    settings = Settings(**overrides)
    if not settings.postgres_url:
        from songvec_assets.postgres.server import DEFAULT_FOLDER, start_server_ahead

        start_server_ahead(DEFAULT_FOLDER)
    return settings


def choose_span(pipeline: "Pipeline", ranges: str) -> "tuple[SongIdRange, SongIdRange]":
    """First and last range of a run: those given, else those of all that hold songs or cached vectors."""
    from songvec_assets.songs.ranges import parse_span

    if ranges:
        try:
            return parse_span(ranges, pipeline.tiling)
        except SettingsError as error:
            raise typer.BadParameter(describe(error)) from error
    span = pipeline.find_span()
    if span is None:
        caution = f" ({pipeline.source.caution})" if pipeline.source.caution else ""
        raise SourceError(
            f"table {pipeline.source.table} holds no songs with an id from {pipeline.tiling.start} on: nothing to "
            f"do{caution}",
            "source.empty",
        )
    return span
