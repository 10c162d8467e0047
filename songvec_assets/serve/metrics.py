"""Metrics of this server's requests, with those of the deployment's state, as text for Prometheus.

When to add here: another metric of requests. Labels are codes, modes and the like, of which there are few; never a
query. Keep out: what database and store hold (`songvec_assets.metrics`).
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import get_args

import prometheus_client as prometheus
from starlette.responses import Response

from songvec_assets.errors import ServeError, SongvecError
from songvec_assets.metrics import Part, StateCollector
from songvec_assets.search.query import Mode
from songvec_assets.searches import Searches
from songvec_assets.serve.answers import Found, Wanted, find_status
from songvec_assets.serve.workers import Workers

READ_S = 3.0
"""How long a scrape waits for a part of the state; Prometheus ends a scrape after 10 s."""
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0)

# a series per counter that says when it began: nothing here needs it
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """What is counted in this server.

    Args:
        songs: whose state is shown.
    """

    def __init__(self, songs: Searches) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self._state = StateCollector(songs)
        registry.register(self._state)
        prometheus.ProcessCollector(registry=registry)
        # a part that hangs keeps its own thread, and no other's
        self._workers = {part: Workers(n_at_once=1, wait_s=READ_S, call_s=READ_S) for part in self._state.parts}
        self._searches = prometheus.Histogram(
            "songvec_search_duration_seconds",
            "Time that searches took, by mode (song: similar ones) and outcome: found; words (by words alone, as the "
            "query could not be embedded); refused (the request's fault); failed.",
            ["mode", "outcome"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._running = prometheus.Gauge("songvec_searches_running", "Searches under way.", registry=registry)
        self._degraded = prometheus.Counter(
            "songvec_degraded_searches",
            "Searches answered by words alone, by the code of the reason: the provider, or the budget.",
            ["code"],
            registry=registry,
        )
        self._errors = prometheus.Counter(
            "songvec_http_errors", "Requests answered by an error, by its code.", ["code"], registry=registry
        )

    def count_error(self, code: str) -> None:
        """Count an answer that is an error."""
        self._errors.labels(code).inc()

    async def measure(self, wanted: Wanted, search: Awaitable[Found]) -> Found:
        """Await a search, and count it."""
        known_mode = wanted.mode if wanted.mode in get_args(Mode) else "unknown"
        mode = "song" if isinstance(wanted.query, int) else known_mode
        outcome = "failed"
        started = time.monotonic()
        try:
            with self._running.track_inprogress():
                found = await search
            outcome = "words" if found.notice else "found"
            if found.notice:
                self._degraded.labels(found.notice.code).inc()
            return found
        except SongvecError as error:
            outcome = "refused" if find_status(error.code) < 500 else "failed"
            raise
        finally:
            self._searches.labels(mode, outcome).observe(time.monotonic() - started)

    async def answer(self) -> Response:
        """All metrics, those of the state as far as they can be read in READ_S."""
        await asyncio.gather(*map(self._refresh, self._workers))
        text = prometheus.generate_latest(self._registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4)

    async def _refresh(self, part: Part) -> None:
        with contextlib.suppress(ServeError):  # it goes on; what was read before is shown until it expires
            await self._workers[part].run(part.refresh)
