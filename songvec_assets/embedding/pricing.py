"""Tokens, dollars and time: what a run will cost at the provider's price and quota. Pure.

Dollars are floats: they are forecasts; the provider's invoice is exact.
When to add here: another number of the estimate. Keep out: what was spent (`budget`), and the rate of requests
(`limits`).
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

UTF8_BYTES_PER_TOKEN = 4.0
"""About the same in all scripts: 4 characters per token in English, 2 in Cyrillic, 1.3 in Chinese."""


@dataclass(frozen=True)
class Estimate:
    """What is left to do, and its price.

    Attributes:
        n_songs: songs in the snapshots.
        n_texts: texts to send.
        n_tokens: their estimated tokens.
        usd: their price in dollars.
        hours: at the full quota.
        n_again, usd_again: number and price of the texts that are sent again only because settings changed.
        n_reused: songs that get the stored vector of their text, for nothing.
    """

    n_songs: int
    n_texts: int
    n_tokens: int
    usd: float
    hours: float
    n_again: int = 0
    usd_again: float = 0.0
    n_reused: int = 0

    def describe_again(self) -> str:
        """Why a run would stop for confirmation, in a sentence; empty if it would not."""
        if not self.n_again:
            return ""
        return (
            f"{self.n_again:,} of the texts (about ${self.usd_again:,.4f}) are cached as other settings made them: a "
            "run stops before it sends them again, unless it is given --confirm-reembedding"
        )


class TokenEstimator:
    """Estimates tokens from UTF-8 bytes, corrected by what the provider bills. Thread-safe."""

    def __init__(self, bytes_per_token: float = UTF8_BYTES_PER_TOKEN) -> None:
        self._lock = threading.Lock()
        # the prior weighs as much as one small request, so the first real ones decide
        self._n_tokens = 1000.0
        self._n_bytes = self._n_tokens * bytes_per_token

    def estimate(self, n_bytes: Iterable[int]) -> list[int]:
        """Estimated tokens of texts of `n_bytes` UTF-8 bytes each; at least one per text."""
        tokens_per_byte = self._n_tokens / self._n_bytes
        return [max(1, round(each * tokens_per_byte)) for each in n_bytes]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token, as known so far."""
        return self._n_bytes / self._n_tokens

    def n_bytes(self, n_tokens: int) -> float:
        """The inverse: UTF-8 bytes that make about `n_tokens`."""
        return n_tokens * self.bytes_per_token

    def observe(self, n_bytes: int, n_tokens: int) -> None:
        """Learn that texts of `n_bytes` were billed `n_tokens`; 0 tokens means that the provider did not say."""
        if n_tokens > 0:
            with self._lock:
                self._n_bytes += n_bytes
                self._n_tokens += n_tokens


@dataclass(frozen=True)
class Price:
    """Dollars per million prompt tokens."""

    usd_per_million_tokens: float

    def usd(self, n_tokens: int) -> float:
        """What `n_tokens` cost."""
        return n_tokens * self.usd_per_million_tokens / 1e6

    def exact_usd(self, n_tokens: int) -> Decimal:
        """The same without rounding: a price such as 0.1 has no exact binary form."""
        return Decimal(str(self.usd_per_million_tokens)) * n_tokens / 1_000_000

    @property
    def is_free(self) -> bool:
        """Whether the price is zero."""
        return not self.usd_per_million_tokens


@dataclass(frozen=True)
class Quota:
    """What the provider allows, and what one request may hold.

    Attributes:
        requests_per_minute, tokens_per_minute: over all processes of a deployment.
        max_request_texts: maximum texts per request.
        max_request_tokens: maximum tokens per request: the setting, but up to 1/50 of the token quota, so that no
            single request is a large part of a minute; below 50 requests per minute, one request's share of the quota.
    """

    requests_per_minute: int
    tokens_per_minute: int
    max_request_texts: int
    max_request_tokens: int

    def __post_init__(self) -> None:
        share = self.tokens_per_minute // min(50, self.requests_per_minute)
        lesser = max(1, min(self.max_request_tokens, share))
        object.__setattr__(self, "max_request_tokens", lesser)

    def hours(self, n_texts: int, n_tokens: int) -> float:
        """The time in which n texts with n tokens are sent, if the quota is used in full."""
        n_requests = max(n_texts / self.max_request_texts, n_tokens / self.max_request_tokens)
        return max(n_tokens / self.tokens_per_minute, n_requests / self.requests_per_minute) / 60
