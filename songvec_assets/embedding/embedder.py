"""The interface of an embedder, and the values that configure a client.

When to add here: what a caller passes to an embedder, or is notified of. Keep out: how a client works.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from songvec_assets.embedding.wire import EmbeddingBatch
from songvec_assets.errors import VectorSizeError
from songvec_assets.progress import StopSignal

MATRYOSHKA_MODELS = (
    "qwen3-embedding", "gemini-embedding", "embeddinggemma", "text-embedding-3", "nomic-embed-text-v1.5",
    "nomic-embed-text:v1.5", "nomic-embed-text-v2", "mxbai-embed-large", "snowflake-arctic-embed-l-v2",
    "snowflake-arctic-embed-m-v2", "jina-embeddings-v3",
)  # fmt: skip
"""Parts of names of models whose cards say that they are trained for truncation (read 2026-11)."""
_MAX_DIMENSIONS, _MAX_VECTOR_DIMENSIONS = 4000, 2000
_POLL_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, its model, and the size of the vectors:

        Endpoint("https://api.fireworks.ai/inference/v1", key, "fireworks/qwen3-embedding-8b", 2000)

    Attributes:
        url: the API's root, with its version.
        key: bearer key; None for servers that need none.
        model: the model's name there.
        dimensions: values per vector.
        truncate: whether longer vectors may be truncated; None: if the model is known to be trained for it.
    """

    url: str
    key: str | None
    model: str
    dimensions: int
    truncate: bool | None = None

    def redact(self, message: str) -> str:
        """A server's message without the key, which some servers repeat."""
        return message.replace(self.key, "[key]") if self.key else message

    def check_size(self, n_values: int) -> None:
        """Raise VectorSizeError if vectors of `n_values` have the wrong size and may not be truncated."""
        is_longer = n_values > self.dimensions
        is_known = any(name in self.model.lower() for name in MATRYOSHKA_MODELS)
        if n_values == self.dimensions or (is_longer and (is_known if self.truncate is None else self.truncate)):
            return
        cures = [f"set SONGVEC_EMBEDDING_DIMENSIONS={n_values}"] if n_values <= _MAX_DIMENSIONS else []
        if n_values > _MAX_VECTOR_DIMENSIONS and cures:
            cures[0] += " and SONGVEC_VECTOR_TYPE=halfvec"
        why = ""
        if is_longer:
            cures.append("set SONGVEC_TRUNCATE=yes if its makers say that it may be truncated (Matryoshka)")
            why = (
                " and is not known to be trained for truncation"
                if self.truncate is None
                else " and is not to be truncated"
            )
        raise VectorSizeError(
            f"expected vectors of {self.dimensions} values, model {self.model!r} gives {n_values}{why}: "
            f"{', or '.join(cures)}"
        )


@dataclass(frozen=True)
class Patience:
    """How long and how hard a client tries:

        Patience(seconds=60, concurrency=8, on_trouble=log.warning)

    Attributes:
        seconds: since the last good answer to any request, before ProviderUnavailableError.
        concurrency: maximum requests in flight; fewer after time-outs, until answers arrive.
        stop: once set, nothing more is sent or waited for; requests in flight finish.
        on_trouble: called with a note on every bad answer, and if the first answer takes long.
    """

    seconds: float = 600.0
    concurrency: int = 32
    stop: StopSignal = field(default_factory=StopSignal)
    on_trouble: Callable[[str], None] = lambda _: None

    async def sleep(self, seconds: float) -> None:
        """Sleep; raises StoppedError once the stop signal is set."""
        end = time.monotonic() + seconds
        self.stop.check()
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _POLL_S))
            self.stop.check()


class RequestHooks:
    """Callbacks around the tries of one request; these do nothing.

    Attributes:
        is_part: whether the request is part of one that was divided because it failed.
    """

    is_part: bool = False

    async def before_try(self) -> None:
        """Called before a try waits for window and quota; raises to cancel it."""

    async def before_send(self) -> None:
        """Called immediately before a try is sent; raises to cancel it."""

    def check_size(self) -> None:
        """Called when a try may be in flight, before it waits for the quota; raises to cancel it."""

    def count_unusable(self, n_tokens: int) -> None:
        """Called after each try without a usable answer, which may have been billed about n tokens."""


NO_HOOKS = RequestHooks()


class Embedder(ABC):
    """Turns texts into vectors: the provider's client, or a local model, which never fails.

    Attributes:
        dimensions: values per vector.
        n_probe_tokens: to reserve for the probes that go before the next request, about; 0 if none does.
    """

    dimensions: int
    n_probe_tokens: int = 0

    @property
    def quota_used(self) -> float | None:
        """Share of the provider's quota that all processes used in the last minute; None if there is no quota."""
        return None

    @abstractmethod
    async def generate_embeddings_batch(self, texts: Sequence[str], hooks: RequestHooks = NO_HOOKS) -> EmbeddingBatch:
        """Embed one request's texts."""

    async def answers_well(self, since: float) -> bool:  # noqa: ARG002 - a local model always answers
        """Whether the server gave a good vector after `since`, by `time.monotonic()`; may send a probe."""
        return True

    def take_probe_tokens(self) -> int:
        """The billed tokens of probes since the last call."""
        return 0

    async def close(self) -> None:  # noqa: B027 - a local model has no connections
        """Close the connections."""
