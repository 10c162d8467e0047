"""What commands start from: `.env`, errors in one line, and the ranges of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from songvec_assets.cli import base
from songvec_assets.cli.base import app, choose_span, main, takes_options
from songvec_assets.errors import SourceError
from songvec_assets.pipeline import Pipeline
from songvec_assets.songs.ranges import SongIdRange

FIRST, THIRD = SongIdRange(0, 100), SongIdRange(200, 300)


def test_a_file_of_settings_is_read_where_the_environment_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SONGVEC_LISTS=7\nSONGVEC_CONCURRENCY=3\n")
    monkeypatch.setenv("SONGVEC_LISTS", "9")
    monkeypatch.setenv("SONGVEC_CONCURRENCY", "")  # so that it is restored after the test
    monkeypatch.delenv("SONGVEC_CONCURRENCY")
    result = CliRunner().invoke(app, ["settings"])
    assert result.exit_code == 0, result.output
    made = base.make_pipeline(max_usd=2.0).settings
    assert (made.lists, made.concurrency, made.max_usd) == (9, 3, 2.0)


def test_an_error_of_ours_is_one_line_with_its_code_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SONGVEC_LISTS", "many")
    monkeypatch.setattr("sys.argv", ["songvec", "status"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    (line,) = said.err.splitlines()
    assert line.startswith("SONGVEC_LISTS: expected")
    assert line.endswith("[settings.invalid]")


def test_a_run_goes_from_the_first_to_the_last_range_that_holds_anything_or_as_given(
    pipeline: Pipeline, songs: Callable[..., None]
) -> None:
    songs((1, "Sea", "Ann", "waves"), (250, "Hill", "Ben", "stones"))
    assert choose_span(pipeline, "") == (FIRST, THIRD)
    assert choose_span(pipeline, f"{FIRST.key}...{THIRD.key}") == (FIRST, THIRD)
    assert choose_span(pipeline, THIRD.key) == (THIRD, THIRD)
    for wrong in (f"{THIRD.key}...{FIRST.key}", "000000000-000000050", "first"):
        with pytest.raises(typer.BadParameter):
            choose_span(pipeline, wrong)


def test_without_songs_there_is_nothing_to_do(pipeline: Pipeline, songs: Callable[..., None]) -> None:
    songs()
    with pytest.raises(SourceError, match="table songs holds no songs with an id from 0 on: nothing to do") as refused:
        choose_span(pipeline, "")
    assert refused.value.code == "source.empty"


def test_a_command_may_take_its_options_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Options:
        limit: Annotated[int, typer.Option(min=1, help="How many.")] = 3
        quiet: bool = False

    @takes_options
    def show(options: Options) -> None:
        """Show some."""
        print(options.limit, options.quiet)

    commands = typer.Typer()
    commands.command()(show)
    assert CliRunner().invoke(commands, ["--limit", "5", "--quiet"]).output == "5 True\n"
    assert CliRunner().invoke(commands, []).output == "3 False\n"
    assert CliRunner().invoke(commands, ["--limit", "0"]).exit_code == 2
    assert "How many." in CliRunner().invoke(commands, ["--help"]).output
