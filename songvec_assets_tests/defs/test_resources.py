"""What the launchpad shows of each job before anything is typed: its run config, and words on every option."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.snap import JobSnap
from dagster._core.snap.snap_to_yaml import default_values_yaml_from_type_snap

from songvec_assets.definitions import defs
from songvec_assets.defs.resources import (
    RESOURCES,
    FireworksResource,
    PostgresResource,
    RunResource,
    StorageResource,
    given,
    make_resources,
    present_values,
)
from songvec_assets.settings import (
    FIREWORKS_MODEL,
    GraphSettings,
    PostgresSettings,
    ProviderSettings,
    RunSettings,
    ServeSettings,
    Settings,
    StorageSettings,
)

OF_ANY_RUN = {
    "confirm_deletions": False, "confirm_model_change": False,
    "confirm_reembedding": False, "export_mode": "all", "ranges": "", "rebuild_index": False, "reembed": False,
    "retry_rejected": False,
}  # fmt: skip


OWN: dict[str, dict[str, dict[str, object]]] = {
    "rebuild_index": {"run": {"rebuild_index": True}},
    "swap": {
        "run": {"swap": True},
        "fireworks": {"embedding_model": FIREWORKS_MODEL, "embedding_dimensions": 2000},
        "postgres": {"vector_type": "vector"},
    },
}
"""What jobs have beyond the usual, by resource."""


JOBS = ["refresh", "embed", "load", "rebuild_index", "swap", "rollback", "verify", "dry_run"]


def _schema(job: dg.JobDefinition) -> tuple[Any, Any]:
    """The schema of a job's run config, and its root."""
    snap = JobSnap.from_job_def(job)
    (mode,) = snap.mode_def_snaps
    return snap.config_schema_snapshot, snap.config_schema_snapshot.get_config_snap(mode.root_config_key or "")


def _prefilled(job: dg.JobDefinition) -> Any:
    """The run config as the UI asks for it: `rootDefaultYaml`."""
    schema, root = _schema(job)
    return yaml.safe_load(default_values_yaml_from_type_snap(schema, root))


def _options(job: dg.JobDefinition) -> Iterator[tuple[str, str, str]]:
    """Resource, name and description of each option of the resources, as the UI lists them."""
    schema, root = _schema(job)

    def fields_of(key: str) -> list[Any]:
        return list(schema.get_config_snap(key).fields or [])

    resources = fields_of(root.get_field("resources").type_key)
    for resource in (each for each in resources if each.name in RESOURCES):
        for config in fields_of(resource.type_key):
            for option in fields_of(config.type_key):
                yield resource.name, option.name, option.description or ""


def test_every_job_is_listed_here() -> None:
    assert sorted(JOBS) == sorted(job.name for job in defs.jobs or [])


@pytest.mark.parametrize("name", JOBS)
def test_the_launchpad_of_a_job_is_prefilled_with_that_job(name: str) -> None:
    own = OWN.get(name, {})
    assert _prefilled(defs.resolve_job_def(name)) == {
        "resources": {
            **{resource: {"config": given} for resource, given in own.items()},
            "run": {"config": OF_ANY_RUN | own.get("run", {})},
        }
    }


@pytest.mark.parametrize("name", JOBS)
def test_every_option_says_what_it_is_and_its_default(name: str) -> None:
    options = list(_options(defs.resolve_job_def(name)))
    assert {"run"} <= {resource for resource, _, _ in options}
    for resource, option, description in options:
        said = "(default: " in description or option in OF_ANY_RUN
        assert (resource, option, said, len(description) > 20) == (resource, option, True, True), description
    described = {option: description for _, option, description in options}
    if "embedding_model" in described:
        assert (
            "SONGVEC_EMBEDDING_DIMENSIONS, read when the run starts (default: 2000)"
            in described["embedding_dimensions"]
        )
        assert f"(default: {FIREWORKS_MODEL})" in described["embedding_model"]
        assert "(default: unset)" in described["max_usd"]


def test_the_present_values_are_those_of_the_environment_and_a_bad_one_is_left_to_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SONGVEC_EMBEDDING_MODEL", "some/model")
    assert present_values(ProviderSettings, "embedding_model") == {"embedding_model": "some/model"}
    monkeypatch.setenv("SONGVEC_EMBEDDING_DIMENSIONS", "many")
    assert present_values(ProviderSettings, "embedding_model") == {}


def test_defaults_of_a_job_reach_its_run_and_what_is_typed_wins() -> None:
    seen: dict[str, object] = {}

    @dg.op
    def look(run: dg.ResourceParam[object]) -> None:
        seen.update(swap=run.swap, model=run.fireworks.embedding_model)  # type: ignore[attr-defined]

    @dg.job(resource_defs=make_resources(run={"swap": True}, fireworks={"embedding_model": "m"}))
    def job() -> None:
        look()

    assert job.execute_in_process().success
    assert seen == {"swap": True, "model": "m"}
    given = {"resources": {"fireworks": {"config": {"embedding_model": "n"}}}}
    assert job.execute_in_process(run_config=given).success
    assert seen == {"swap": True, "model": "n"}


def test_an_empty_option_reads_its_variable_when_the_run_starts_and_a_given_one_replaces_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    @dg.op
    def look(run: RunResource) -> None:
        with run.open() as pipeline:
            seen.append(pipeline.settings.max_text_chars)

    @dg.job(resource_defs=RESOURCES)
    def job() -> None:
        look()

    assert job.execute_in_process().success
    monkeypatch.setenv("SONGVEC_MAX_TEXT_CHARS", "700")
    assert job.execute_in_process().success
    given = {"resources": {"storage": {"config": {"max_text_chars": 80}}}}
    assert job.execute_in_process(run_config=given).success
    assert seen == [24_000, 700, 80]


def test_every_setting_is_an_option_of_one_resource_shapes_the_graph_serves_or_is_secret() -> None:
    secret = {name for name, field in Settings.model_fields.items() if not field.repr}
    assert secret == {"postgres_url", "direct_url", "fireworks_api_key", "webhook_url"}
    options = {
        PostgresResource: given(PostgresSettings, PostgresResource()),
        FireworksResource: given(ProviderSettings, FireworksResource()),
        StorageResource: given(StorageSettings, StorageResource()),
        RunResource: given(RunSettings, RESOURCES["run"]),
    }
    assert {value for values in options.values() for value in values.values()} == {None}
    names = [name for values in options.values() for name in values]
    others = [*GraphSettings.model_fields, *ServeSettings.model_fields]
    assert sorted([*names, *secret, *others]) == sorted(Settings.model_fields)
    for resource in options:
        assert not {*resource.model_fields} & secret
