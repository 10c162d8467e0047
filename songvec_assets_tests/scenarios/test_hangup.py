"""A terminal that closes in the middle of a command: real pseudo-terminals, real processes, a real provider."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from songvec_assets.postgres.embedded import create_songs_table
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import wait_until
from songvec_assets_tests.cli.test_commands import (
    BIN,
    FIRST,
    N_AT_ONCE,
    Project,
    holding_provider,
    project,
    provider_settings,
    wait_until_held,
)
from songvec_assets_tests.processes import send_signal
from songvec_assets_tests.provider import Provider

pytestmark = pytest.mark.slow

__all__ = ["holding_provider", "project"]

_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    # who runs the tests by `nohup` has it ignored, in all processes
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int, bytearray]]:
    """A pseudo-terminal: what closes it, what a process has of it, and what was shown so far."""
    master, slave = pty.openpty()
    shown = bytearray()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(master, 1 << 16):
                shown.extend(piece)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield master, slave, shown
    finally:
        for number in (master, slave):
            with contextlib.suppress(OSError):
                os.close(number)


def in_terminal(project: Project, slave: int, *command: str, **settings: str) -> "subprocess.Popen[bytes]":
    """Type a command in a session of its own whose terminal that is."""
    return subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, str(BIN / command[0]), *command[1:]],
        cwd=project.folder,
        env=project.environment | settings | {"TERM": "xterm", "COLUMNS": "80"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )


def billed(provider: Provider) -> set[int]:
    """How often texts were billed."""
    return {count for text, count in provider.texts().items() if text != "probe"}


def test_a_terminal_that_closes_is_an_interrupt_and_no_text_is_paid_twice(
    project: Project, database: Database, holding_provider: Provider
) -> None:
    create_songs_table(database)
    settings = provider_settings(holding_provider) | {"POSTGRES_URL": database.url}
    with terminal() as (master, slave, shown):
        process = in_terminal(project, slave, "songvec", "run", **settings)
        os.close(slave)
        wait_until_held(holding_provider)
        wait_until(lambda: b"embed songs" in shown)  # bars
        requests = holding_provider.ledger()["requests"]
        os.close(master)
        # as a shell does, which passes on to its jobs that the terminal is closed
        send_signal(process, signal.SIGHUP)
        holding_provider.control(latency_s=1.0)
        assert process.wait(timeout=60) == 130, bytes(shown).decode(errors="replace")
    assert holding_provider.ledger()["requests"] <= requests + N_AT_ONCE
    holding_provider.control()
    code, output = project.run("songvec", "run", **settings)
    assert (code, billed(holding_provider)) == (0, {1}), output


def test_dagsters_own_command_takes_sighup_as_sigterm(
    project: Project, database: Database, holding_provider: Provider
) -> None:
    create_songs_table(database)
    settings = provider_settings(holding_provider) | {"POSTGRES_URL": database.url}
    command = ("dagster", "asset", "materialize", "--select", "*", "--partition-range", f"{FIRST}...{FIRST}")
    process = project.start(*command, cold=False, **settings)
    wait_until_held(holding_provider)
    for _ in range(2):
        send_signal(process, signal.SIGHUP)
    holding_provider.control(latency_s=1.0)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGHUP), output
    assert "Interrupted. What was done is kept" in output, output
    holding_provider.control()
    code, output = project.run("songvec", "run", **settings)
    assert (code, billed(holding_provider)) == (0, {1}), output


def test_nohup_goes_on_to_the_end(project: Project, database: Database, holding_provider: Provider) -> None:
    create_songs_table(database)
    settings = provider_settings(holding_provider) | {"POSTGRES_URL": database.url}
    process = project.start("nohup", "songvec", "run", cold=True, **settings)
    wait_until_held(holding_provider)
    send_signal(process, signal.SIGHUP)
    holding_provider.control()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, billed(holding_provider)) == (0, {1}), output
