"""What all commands do with the terminal: words as they are, one line per error, interrupts, bars or lines."""

import io

import pytest
from rich.console import Console

from songvec_assets.cli import terminal
from songvec_assets.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, bars, fail, hint, interruptible, say
from songvec_assets.progress import Progress

LONG = "a message [with brackets] that is longer than any terminal " * 5


@pytest.fixture(autouse=True)
def _consoles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Consoles of the test's own streams, 40 columns wide."""
    monkeypatch.setattr(terminal, "out", Console(width=40, emoji=terminal.out._emoji))
    monkeypatch.setattr(terminal, "err", Console(stderr=True, width=40, emoji=terminal.err._emoji))


def test_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold]not markup[/] :smile:")
    assert capsys.readouterr().out == "[bold]not markup[/] :smile:\n"


def test_what_a_program_reads_is_one_line_and_hints_do_not_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    hint(LONG)
    with pytest.raises(SystemExit) as ended:
        fail(LONG)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (EXIT_FAILED, "")
    assert [line.rstrip() for line in said.err.splitlines()] == [f"Next: {LONG}".rstrip(), LONG.rstrip()]


def test_an_interrupt_says_that_what_was_done_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, interruptible():
        raise KeyboardInterrupt
    assert ended.value.code == EXIT_INTERRUPTED
    assert "What was done is kept" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")


def test_where_lines_cannot_be_redrawn_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.showing_progress() as show:
        show(Progress("embed songs", 5, 10, "songs", "a note"))
    assert "embed songs: 5" in capsys.readouterr().err


def test_bars_show_counts_a_note_and_trouble() -> None:
    screen = io.StringIO()
    with bars(Console(file=screen, force_terminal=True, width=120, emoji=False)) as show:
        show(Progress("embed songs", 500, 1000, "songs", "range a"))
        show(Progress("embed songs", 1000, 1000, "songs", "503: [/b] [red]no", is_trouble=True))
        show(Progress("build index", 70, 100, "%"))
    shown = screen.getvalue()
    for words in ("1,000/1,000", "503: [/b] [red]no", "build index", "70%"):
        assert words in shown
    assert "70%/100" not in shown
