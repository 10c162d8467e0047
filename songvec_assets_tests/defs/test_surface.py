"""All that a user sees by name, in one text: assets, what they depend on, jobs, checks, sensors, schedules, commands.

A change of it is a change for users: write `surface.txt` again with `python -m songvec_assets_tests.defs.test_surface`
and look at what changed.
"""

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from songvec_assets.cli import app
from songvec_assets.definitions import defs

SNAPSHOT = Path(__file__).with_name("surface.txt")


def describe_surface() -> str:
    """The snapshot's text."""
    return "\n".join([*_describe_graph(), "", *_describe_commands()]) + "\n"


def _describe_graph() -> Iterator[str]:
    graph = defs.resolve_asset_graph()
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        parents = ", ".join(sorted(parent.to_user_string() for parent in node.parent_keys))
        yield f"asset {key.to_user_string()} <- {parents or 'nothing'}{', partitioned' if node.is_partitioned else ''}"
    for check in sorted(graph.asset_check_keys):
        blocking = ", blocking" if graph.get(check).blocking else ""
        yield f"check {check.to_user_string()}{blocking}"
    repository = defs.get_repository_def()
    for job in sorted(repository.job_names):
        if not job.startswith("__"):
            yield f"job {job}: {', '.join(sorted(node.name for node in defs.resolve_job_def(job).nodes))}"
    for sensor in sorted(repository.sensor_defs, key=attrgetter("name")):
        yield f"sensor {sensor.name}, {sensor.default_status.value}"
    for schedule in sorted(repository.schedule_defs, key=attrgetter("name")):
        when = f"{schedule.default_status.value}, {schedule.cron_schedule}"
        yield f"schedule {schedule.name}, {when}: {schedule.job_name}"


def _describe_commands() -> Iterator[str]:
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"})
    for command in ((), *((name,) for name in get_command(app).commands)):  # type: ignore[attr-defined]
        yield f"$ songvec {' '.join(command)}".rstrip() + " --help"
        yield from (
            line.rstrip() for line in runner.invoke(app, [*command, "--help"], prog_name="songvec").stdout.splitlines()
        )


def test_what_users_see_by_name_is_as_recorded() -> None:
    assert describe_surface() == SNAPSHOT.read_text(encoding="utf-8")


if __name__ == "__main__":
    os.environ.pop("DAGSTER_HOME", None)
    SNAPSHOT.write_text(describe_surface(), encoding="utf-8")
