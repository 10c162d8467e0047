"""The commands that only read: estimate, status, search, evaluate, settings, and the plan of a dry run.

Each imports what it needs when it runs: `status` and `search` load neither Dagster nor matplotlib. When to add here:
another command that changes nothing. Keep out: tables (`render`).
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from songvec_assets.cli import base
from songvec_assets.cli.base import ConfirmDeletions, app
from songvec_assets.cli.terminal import EXIT_INCOMPLETE, hint, interruptible, out, say, showing_progress, warn
from songvec_assets.progress import Progress, run_in_worker

if TYPE_CHECKING:
    from songvec_assets.embedding.pricing import Estimate
    from songvec_assets.pipeline import Pipeline
    from songvec_assets.searches import Searches
    from songvec_assets.songs.ranges import SongIdRange

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def estimate(
    refresh: Annotated[bool, typer.Option(help="Update the snapshots first; takes time, costs no money.")] = True,
    confirm_deletions: ConfirmDeletions = False,
) -> None:
    """Show what a run would cost: songs, tokens, dollars, hours. Spends nothing."""
    from songvec_assets.cli.render import estimate_table

    pipeline = base.make_pipeline()

    def measure(show: Callable[[Progress], None]) -> "tuple[Estimate, list[str]]":
        if refresh:
            pipeline.export(progress=show, confirm_deletions=confirm_deletions)
        return pipeline.estimate(), pipeline.describe_boilerplate()

    with interruptible(), showing_progress() as show:
        result, boilerplate = run_in_worker(measure, report=show, stop=pipeline.cancel)
    say(pipeline.describe())
    out.print(estimate_table(result, pipeline.settings.offline))
    if result.n_again:
        say(result.describe_again(), style="yellow")
    for line in boilerplate:
        out.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if result.n_texts:
        hint("`songvec run --max-usd N` embeds them and stops before it costs more than N dollars.")
    else:
        hint("`songvec run` has nothing to pay for.")


@app.command()
def status(
    as_json: AsJson = False,
) -> None:
    """Show per range what is exported, cached, loaded and indexed. Exit code 3 if songs are missing."""
    from songvec_assets.cli.render import status_table

    pipeline = base.make_pipeline()
    measured = pipeline.status()
    n_missing = measured.total["n_missing"]
    if as_json:
        print(json.dumps(measured.as_dict()))
    else:
        say(pipeline.describe())
        out.print(status_table(measured, out.width))
        for line in measured.describe():
            say(line)
        hint(
            "`songvec run` exports, embeds and loads the missing songs." if n_missing
            else "`songvec search “…”` finds songs, `songvec verify` runs all checks."
        )  # fmt: skip
    raise typer.Exit(EXIT_INCOMPLETE if n_missing else 0)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What the songs are about.", show_default=False)] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="Number of songs, up to 1000.")] = 10,
    like: Annotated[int | None, typer.Option(help="Find songs near this song_id, instead of a text.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="A condition, such as 'artist = Ann' or 'year in 1990, 1991'; repeatable.")
    ] = None,
    mode: Annotated[str, typer.Option(help="vector; text, by name and artist; or hybrid, both.")] = "vector",
    explain: Annotated[bool, typer.Option("--explain", help="Show how each song was found.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the songs nearest to a text or a song."""
    from songvec_assets.search.query import parse_condition

    if query and like is not None:
        raise typer.BadParameter("expected a text or --like, got both")
    options = {"where": [*map(parse_condition, where or ())], "mode": mode, "explain": explain}
    searches = base.make_searches(embeds_query=bool(query) and mode != "text")
    print_hits(searches, query if like is None else like, limit, as_json, **options)
    if not as_json:
        hint("-n shows more or fewer songs, --json prints them with their lyrics.")


@app.command()
def evaluate(
    queries: Annotated[
        str | None,
        typer.Argument(
            help="File with a query, its song_ids and a slice per line. Default: SONGVEC_EVALUATION_QUERIES, or the "
            "queries of the sample catalogue.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well searches answer labelled queries: by text, by vector, and by both."""
    from songvec_assets.cli.render import evaluation_table

    pipeline = base.make_pipeline()
    with interruptible():
        found = pipeline.evaluate(queries, on_trouble=warn)
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return
    say(pipeline.describe())
    out.print(evaluation_table(found))
    for verdict in found.verdicts:
        say(verdict.describe())
    for note in found.notes:
        say(note, style="yellow")
    hint("--json prints what each query found; docs/search.md explains the figures.")


@app.command("settings")
def print_settings() -> None:
    """Print all settings as a Markdown table, and the prompts of the configured model."""
    from songvec_assets.cache.texts import choose_prompts
    from songvec_assets.cli.render import settings_table
    from songvec_assets.settings import Settings
    from songvec_assets.storage import open_storage

    print(settings_table())
    given = Settings()
    prompts = choose_prompts(open_storage(given.storage_location), given)
    print(
        f"\nPrompts of {given.model}: {_show_prompt(prompts.query)} for queries, "
        f"{_show_prompt(prompts.document)} for songs."
    )
    hint("set them in the environment or in .env; `songvec estimate` shows what a run would cost.")


def _show_prompt(prompt: str) -> str:
    return "none" if prompt in ("{query}", "{text}") else f"`{prompt}`".replace("\n", "\\n")


def print_plan(pipeline: "Pipeline", span: "tuple[SongIdRange, SongIdRange]", reembed: bool) -> None:
    first, last = span
    say(pipeline.describe())
    planned = pipeline.dry_run([each for each in pipeline.tiling if first <= each <= last], reembed)
    for line in planned.describe():
        # one line each: people copy the statements in them
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    hint("the same command without --dry-run does it.")


def print_hits(searches: "Searches", query: str | int, limit: int, as_json: bool = False, **options: Any) -> None:
    from songvec_assets.cli.render import hits_table

    hits = searches.search(query, limit, on_trouble=warn, **options)
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False))
        return
    out.print(Text(f"“{query}”" if isinstance(query, str) else f"songs like {query}", style="bold"))
    out.print(hits_table(hits) if hits else "No song was found.")
