"""Metrics of the state: read seldom, missing where they could not be read, and what each counts."""

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from songvec_assets import metrics
from songvec_assets.errors import DatabaseError
from songvec_assets.metrics import Part, StateCollector
from songvec_assets.pipeline import Pipeline
from songvec_assets.wiring import Wiring
from songvec_assets_tests.administration import as_role, execute


class Clock:
    """The time, as a test sets it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


class TestPart:
    def test_is_read_when_it_is_due_or_at_once(self, clock: Clock) -> None:
        values: list[float] = []

        def read() -> Iterator[Metric]:
            values.append(clock.now)
            yield GaugeMetricFamily("value", "A value.", clock.now)

        part = Part("value", read, 10.0)
        assert not part.metrics
        for clock.now in (1_000.0, 1_009.0, 1_010.0):
            part.refresh()
        assert values == [1_000.0, 1_010.0]
        part.refresh(at_once=True)
        assert (len(values), part.metrics[0].samples[0].value) == (3, 1_010.0)

    def test_that_takes_long_is_read_more_seldom(self, clock: Clock) -> None:
        read_at: list[float] = []

        def read() -> Iterator[Metric]:
            clock.now += 4.0
            read_at.append(clock.now)
            yield GaugeMetricFamily("value", "A value.", 1)

        part = Part("value", read, 10.0)
        for wait_s in (0.0, 79.0, 2.0):
            clock.now += wait_s
            part.refresh()
        assert read_at == [1_004.0, 1_089.0]

    def test_that_fails_is_missing_and_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        fails = True

        def read() -> Iterator[Metric]:
            if fails:
                raise DatabaseError("no server answers")
            yield GaugeMetricFamily("value", "A value.", 1)

        part = Part("value", read, 10.0)
        for _ in range(3):
            part.refresh(at_once=True)
            assert not part.metrics
        assert caplog.text.count("metrics of the value cannot be read: no server answers [database.failed]") == 1
        fails = False
        part.refresh(at_once=True)
        assert part.metrics

    def test_that_is_not_read_any_more_expires(self, clock: Clock) -> None:
        part = Part("value", lambda: iter([GaugeMetricFamily("value", "A value.", 1)]), 10.0)
        part.refresh()
        clock.now += 59.0
        assert part.metrics
        clock.now += 2.0
        assert not part.metrics


def collect(state: StateCollector) -> dict[str, float]:
    for part in state.parts:
        part.refresh(at_once=True)
    samples = (sample for family in state.collect() for sample in family.samples)
    return {" ".join([each.name.removeprefix("songvec_"), *each.labels.values()]): each.value for each in samples}


def test_the_state_of_each_song_and_range_is_counted_once(pipeline: Pipeline, songs: Callable[..., None]) -> None:
    songs((1, "Sea", "Ann", "waves"), (2, None, "Ben", "stones"), (150, "Moon", "Cy", "light"), (250, "Sun", "Di", "x"))
    pipeline.export()
    pipeline.embed([pipeline.tiling.range_of(1)])
    pipeline.load()
    pipeline.embed([pipeline.tiling.range_of(150)])
    songs((251, "Star", "Ed", "y"), (350, "Air", "Flo", "z"))
    found = collect(StateCollector(pipeline))
    ranges = {name: found[f"ranges {name}"] for name in ("unreadable", "behind", "cached", "loaded")}
    assert ranges == {"unreadable": 0, "behind": 2, "cached": 1, "loaded": 1}
    counted = {name: found[f"songs {name}"] for name in ("loaded", "rejected", "cached", "missing", "unexported")}
    assert counted == {"loaded": 1, "rejected": 1, "cached": 1, "missing": 1, "unexported": 2}
    assert found["state_read_success ranges"] == 1


def test_a_part_that_cannot_be_read_leaves_the_other_one(
    pipeline: Pipeline, songs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    pipeline.run()

    def fail(*_: object, **__: object) -> None:
        raise DatabaseError("no right on songs")

    monkeypatch.setattr(Wiring, "read_inventory", fail)
    found = collect(StateCollector(pipeline))
    assert (found["state_read_success database"], found["state_read_success ranges"]) == (1, 0)
    assert found["embedded_songs_total"] == 1
    assert not [name for name in found if name.startswith("ranges ")]


def test_a_role_that_only_reads_sees_all_of_it(pipeline: Pipeline, songs: Callable[..., None]) -> None:
    songs((1, "Sea", "Ann", "waves"))
    pipeline.run()
    tables = "songs, song_embeddings, songvec.settings, songvec.loaded_ranges, songvec.budgets"
    with as_role(pipeline.database) as seen:
        role = sa.make_url(seen.url).username
        execute(pipeline.database.adbc_uri, f"GRANT USAGE ON SCHEMA songvec TO {role}; GRANT SELECT ON {tables}, "
                f"songvec.rate_limits, songvec.rate_seconds TO {role}")  # fmt: skip
        reader = Pipeline(pipeline.settings.model_copy(update={"postgres_url": seen.url}))
        assert collect(StateCollector(reader)) == collect(StateCollector(pipeline))
        reader.close()


def test_limits_are_shown_where_there_are_some(pipeline: Pipeline) -> None:
    assert not [name for name in collect(StateCollector(pipeline)) if name.startswith("month_limit")]
    limited = Pipeline(pipeline.settings.model_copy(update={"max_search_usd_a_month": 2.5}))
    assert collect(StateCollector(limited))["month_limit_dollars searches"] == 2.5
