"""How the provider can be told to misbehave: the vocabulary of `PUT /control`, and what was used up of it.

Decides whether something goes wrong with a request; the endpoint and the server make it go wrong.
Durations are in seconds, shares are probabilities of one request, drawn from `seed` in order of arrival.
"""

import asyncio
import math
import time
from collections import Counter, deque
from random import Random
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from .vectors import MAX_CLUSTERS, MAX_DIMENSIONS, MIN_DIMENSIONS

Share = Annotated[float, Meta(ge=0, le=1)]
Corruption = Literal["drop_item", "duplicate_index", "wrong_size", "nan", "zero", "bad_base64", "not_json"]


class StatusFault(Struct, frozen=True, forbid_unknown_fields=True):
    """Answer `status` to the next `count` requests (None: all), or to a `share`, from the `after`-th on.

    Requests are counted from `PUT /control`, without those that were reset before or had a wrong key.
    """

    status: int
    count: int | None = None
    share: Share = 1.0
    after: int = 1
    retry_after_s: float | None = None
    body: str | dict[str, Any] | None = None


class Quota(Struct, frozen=True, forbid_unknown_fields=True):
    """Rates a minute, enforced over every stretch of `window_s`: in one second, a sixtieth of each passes."""

    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    window_s: Annotated[float, Meta(gt=0)] = 60.0
    retry_after_s: float | None = None


class Faults(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `PUT /control`; the defaults behave well.

    Oddities of real servers, bound to words of a text or to a request, seen in public threads (read 2026-11):
    `nan` (Qwen3-Embedding #164, ollama #12921: NaN in fp16 for texts that begin with "import"), with `nan_spoils` for
    all vectors of the answer; `fail` with `fail_status` (llama.cpp #11105, ollama #9639: 500 for one text; 0: the
    connection is reset, as when the server crashes); `poison_inside` (OpenRouter: the refusal, 400, inside a 200);
    `lane_tokens_per_s` (a server that computes one request at a time, and on for clients that hung up); `late`, tries
    of each request that are answered after `late_s`, and billed. What whole servers do is named in `modes.py`:
    `max_texts` of a request; `every` n-th request answered with `every_status`; `index` of the items; `cold_s`, in
    which the first request loads a model, from the beginning again where the client hangs up; `page`, answered to
    everything; `redirect`, a Location; `wrong_path_200`; `model`, the alias that it is served under; `refuse_encoding`,
    of any format that is asked for; `errors_as`, where an error's words are, and `error_type`; `usage`, the JSON of it,
    with `{n}` for the tokens, or nothing for no such field; `base64_of`, the number type of its base64 ("of all bits":
    read as float32 its halves are NaN); `clusters`, around which its vectors lie; `turn`, how far they point away, as
    those of another model (1: at right angles); `blank_status`, for a text without a visible character; `idle`, what
    becomes of a connection after an answer: it is closed, or reset at the next request; `native_at_api`, Ollama's own
    answer under `/api`; `gzip`, `mark` (a byte order mark) and `content_type`.

    `hold_after` is for tests: all requests after so many are answered after the next `PUT /control`, not before.
    """

    seed: int = 0
    # Plain floats: msgspec 0.22.0 crashes in the garbage collector on constrained float | fixed tuple.
    latency_s: float | tuple[float, float] = 0.0
    refuse_base64: bool = False
    refuse_encoding: bool = False
    refuse_base64_status: int = 400
    refuse_base64_words: str = "Extra inputs are not permitted, field: 'encoding_format'"
    base64_of: Literal["float32", "int8", "float64", "float64 of all bits"] = "float32"
    ignore_base64: bool = False
    refuse_dimensions: bool = False
    ignore_dimensions: bool = False
    native_dimensions: Annotated[int, Meta(ge=MIN_DIMENSIONS, le=MAX_DIMENSIONS)] = MAX_DIMENSIONS
    statuses: list[StatusFault] = []
    reset: Share = 0.0
    reset_when: Literal["before", "after"] = "before"
    truncate: Share = 0.0
    stall: Share = 0.0
    stall_s: float = 3600.0
    reorder: bool = False
    corrupt: Corruption | None = None
    corrupt_share: Share = 1.0
    poison: list[str] = []
    poison_inside: bool = False
    turn: Share = 0.0
    nan: list[str] = []
    nan_spoils: bool = False
    fail: list[str] = []
    fail_status: int = 500
    lane_tokens_per_s: float | None = None
    hold_after: int | None = None
    late: int = 0
    late_s: float = 0.0
    max_request_tokens: float = math.inf
    max_request_tokens_status: int = 413
    max_request_tokens_words: str = "{n} tokens in one request, at most {most}"
    max_texts: int | None = None
    max_texts_status: int = 400
    max_texts_words: str = "Invalid value"
    refuse_dimensions_status: int = 400
    refuse_dimensions_words: str = "Extra inputs are not permitted, field: 'dimensions'"
    every: int | None = None
    every_status: int = 424
    every_body: dict[str, Any] | None = None
    index: Literal["all", "not first", "none"] = "all"
    cold_s: float = 0.0
    page: str | None = None
    redirect: str | None = None
    wrong_path_200: bool = False
    model: str | None = None
    errors_as: Literal["error", "detail", "detail list"] = "error"
    error_type: str = "invalid_request_error"
    usage: str = '{"prompt_tokens":{n},"total_tokens":{n}}'
    blank_status: int | None = None
    idle: Literal["kept", "closed", "reset"] = "kept"
    native_at_api: bool = False
    gzip: bool = False
    mark: bool = False
    content_type: str = "application/json"
    retry_after_date: bool = False
    quota: Quota | None = None
    clusters: Annotated[int, Meta(ge=0, le=MAX_CLUSTERS)] = 0
    keep_texts: bool = True


class FaultPlan:
    """Faults in force, and how much of them the requests since `PUT /control` have drawn and used up."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.random = Random(faults.seed)
        self._n_requests = 0
        self._left = [math.inf if rule.count is None else rule.count for rule in faults.statuses]
        self._admitted: deque[tuple[float, int]] = deque()
        self._tries: Counter[bytes] = Counter()
        self._lane_free_at = 0.0
        self._n_passed = 0
        self.released = asyncio.Event()
        self.is_warm = not faults.cold_s

    def happens(self, share: float) -> bool:
        """Draw once; a share of 0 draws nothing, so that other faults keep their sequence."""
        return share > 0 and self.random.random() < share

    def next_status(self) -> StatusFault | None:
        """Count one request; the first rule that applies to it, if any."""
        self._n_requests += 1
        for position, rule in enumerate(self.faults.statuses):
            if self._n_requests >= rule.after and self._left[position] > 0 and self.happens(rule.share):
                self._left[position] -= 1
                return rule
        if self.faults.every and self._n_requests % self.faults.every == 0:
            return StatusFault(self.faults.every_status, body=self.faults.every_body)
        return None

    async def hold(self) -> None:
        """Wait until the test has seen what it waits for, if enough requests were let through."""
        self._n_passed += 1
        if self.faults.hold_after is not None and self._n_passed > self.faults.hold_after:
            await self.released.wait()

    def latency_s(self, body: bytes, n_tokens: int) -> float:
        """How long the answer to this request takes."""
        latency = self.faults.latency_s
        seconds = self.random.uniform(*latency) if isinstance(latency, tuple) else latency
        if self.faults.late:
            self._tries[body] += 1
            seconds += self.faults.late_s * (self._tries[body] <= self.faults.late)
        if self.faults.lane_tokens_per_s:
            now = time.monotonic()
            self._lane_free_at = max(now, self._lane_free_at) + n_tokens / self.faults.lane_tokens_per_s
            seconds += self._lane_free_at - now
        return seconds

    def admit(self, quota: Quota, n_tokens: int) -> tuple[bool, dict[str, str]]:
        """Whether the quota lets a request through (only then it counts), and the headers that tell so.

        Header names: docs.fireworks.ai/guides/quotas_usage/rate-limits, read in November 2026.
        """
        now = time.monotonic()
        while self._admitted and self._admitted[0][0] <= now - quota.window_s:
            self._admitted.popleft()
        self._admitted.append((now, n_tokens))
        rates = {"requests": quota.requests_per_minute, "tokens-prompt": quota.tokens_per_minute}
        used = {"requests": len(self._admitted), "tokens-prompt": sum(n for _, n in self._admitted)}
        left = {unit: rate * quota.window_s / 60 - used[unit] for unit, rate in rates.items()}
        over = min(left.values()) < 0
        if over:
            self._admitted.pop()
        headers = {"x-ratelimit-over-limit": "yes" if over else "no"}
        for unit, rate in rates.items():
            if rate < math.inf:
                headers[f"x-ratelimit-limit-{unit}"] = f"{rate:.0f}"
                headers[f"x-ratelimit-remaining-{unit}"] = f"{max(0.0, left[unit]):.0f}"
        return not over, headers
