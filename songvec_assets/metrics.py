"""Metrics of what database and store hold, for Prometheus: what runs spent and did, the ranges, the index.

They describe the whole deployment. `serve/metrics` serves them, and steps of runs write them to a file.
When to add here: another metric of what is kept. Keep out: those of one server's requests (`serve/metrics`).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Metric, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from songvec_assets import totals
from songvec_assets.embedding.budget import read_spending
from songvec_assets.embedding.limits import read_quota_use
from songvec_assets.errors import SongvecError, describe
from songvec_assets.searches import Searches

log = logging.getLogger(__name__)

DATABASE_EVERY_S, RANGES_EVERY_S = 10.0, 300.0
"""How often a few rows of schema `songvec` are read at most; how often all ranges, whose songs are counted."""
_EASE = 20
"""Reading takes at most a twentieth of the time."""
_EXPIRY = 6
"""Intervals after which values that could not be read again are no longer shown."""


def _gauge(name: str, meaning: str, values: Mapping[str, float] | float, label: str = "") -> Metric:
    if not isinstance(values, Mapping):
        return GaugeMetricFamily(f"songvec_{name}", meaning, values)
    family = GaugeMetricFamily(f"songvec_{name}", meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def read_database(songs: Searches) -> Iterator[Metric]:
    """What a few rows of schema `songvec` hold: spending, quota, totals of all runs, recall."""
    # a server starts without the libraries that these bring along
    from songvec_assets.vectors.index.recall import read_recall
    from songvec_assets.vectors.table import VectorTable

    given, database = songs.settings, songs.database
    with database.get_connection("web") as connection:
        spent = read_spending(connection)
        used, speed = read_quota_use(
            connection, given.fireworks_base_url, given.requests_per_minute, given.tokens_per_minute
        )
        counts = totals.read(connection)
        recall = read_recall(connection, VectorTable(database))
    limits = {"month": given.max_usd_a_month, "searches": given.max_search_usd_a_month}
    yield CounterMetricFamily("songvec_spent_dollars", "Dollars billed for songs and queries.", spent["month"][0])
    yield _gauge(
        "month_spent_dollars",
        "Dollars of this month (UTC), billed or reserved, by budget: all of them, and those of searches.",
        {name: of_month for name, (_, of_month) in spent.items()},
        "budget",
    )
    yield _gauge(
        "month_limit_dollars",
        "Limit of a month's budget; absent: none.",
        {name: limit for name, limit in limits.items() if limit is not None},
        "budget",
    )
    yield _gauge("quota_used_ratio", "Share of the provider's quota that was used in the last minute.", used)
    yield _gauge("quota_speed_ratio", "Share of the quota that may be used; below 1 after a 429.", speed)
    for name, meaning in totals.COUNTS.items():
        yield CounterMetricFamily(f"songvec_{name}", meaning, counts[name])
    if recall is not None:
        yield _gauge("recall_ratio", "Recall@10 of searches, as measured last.", recall.recall)
        yield _gauge("recall_target_ratio", "Recall to reach.", recall.target)


def read_ranges(songs: Searches) -> Iterator[Metric]:
    """The ranges and their songs, of the table that serves: counts all songs of the source, and reads all manifests."""
    from songvec_assets.inventory import STATES
    from songvec_assets.wiring import Wiring

    # a new one each time: since the last read another model may serve, and the store and its texts have changed
    wiring = Wiring(songs.as_loaded().settings, songs.stop)
    wiring.database = songs.database
    inventory = wiring.read_inventory()
    counted = inventory.coverage.drop("key").sum().row(0, named=True) if len(inventory.frame) else {}
    counted["unexported"] = inventory.total["n_unexported"]
    yield _gauge("ranges", "Ranges of song_ids, by state.", {**dict.fromkeys(STATES, 0), **inventory.states}, "state")
    yield _gauge("songs", "Songs by state.", counted, "state")


class Part:
    """Metrics that are read together, and kept until they are due again. One thread at a time refreshes it.

    Args:
        name: of the part.
        read: reads them.
        every_s: seconds between two reads; more if a read takes long.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[Metric]], every_s: float) -> None:
        self.name, self._read, self._every_s = name, read, every_s
        self._metrics: Sequence[Metric] = ()
        self._is_good = True
        self._due_at = self._expires_at = float("-inf")

    @property
    def metrics(self) -> Sequence[Metric]:
        """As read last; empty if that failed, or is long ago."""
        return self._metrics if time.monotonic() < self._expires_at else ()

    def refresh(self, at_once: bool = False) -> None:
        """Read, if it is due or `at_once`. A failure is logged, and shows as metrics that are missing."""
        started = time.monotonic()
        if started < self._due_at and not at_once:
            return
        try:
            self._metrics, failure = [*self._read()], ""
        except SongvecError as error:
            self._metrics, failure = (), describe(error)
        if failure and self._is_good:
            log.warning("metrics of the %s cannot be read: %s", self.name, failure)
        self._is_good, now = not failure, time.monotonic()
        interval_s = max(self._every_s, _EASE * (now - started))
        self._due_at, self._expires_at = now + interval_s, now + _EXPIRY * interval_s


class StateCollector:
    """The metrics of a deployment's state, in two parts; a collector of prometheus_client."""

    def __init__(self, songs: Searches) -> None:
        self.parts = (
            Part("database", lambda: read_database(songs), DATABASE_EVERY_S),
            Part("ranges", lambda: read_ranges(songs), RANGES_EVERY_S),
        )

    def collect(self) -> Iterator[Metric]:
        """All that is known, and whether each part could be read."""
        read = {part.name: part.metrics for part in self.parts}
        for metrics in read.values():
            yield from metrics
        yield _gauge(
            "state_read_success",
            "Whether a part of the state could be read; if not, its metrics are missing.",
            {name: float(bool(metrics)) for name, metrics in read.items()},
            "part",
        )

    def write(self, path: str, at_once: bool) -> None:
        """Write a file for node_exporter's textfile collector; a failure is logged, and ends no run.

        Args:
            path: replaced as a whole.
            at_once: whether to read all parts again; otherwise those that are due.
        """
        for part in self.parts:
            part.refresh(at_once)
        registry = CollectorRegistry()
        registry.register(self)
        try:
            write_to_textfile(path, registry)
        except OSError as error:
            log.warning("SONGVEC_METRICS_TEXTFILE cannot be written: %s", error)
