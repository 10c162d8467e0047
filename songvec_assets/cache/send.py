"""A range's missing texts on their way: packed into requests, divided where refused, stored as the answers come.

What goes wrong with a request is decided in `embedding.client`; here, what becomes of the texts in it.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from songvec_assets.cache.plan import Text
from songvec_assets.cache.shards import Shard, write_embeddings_to_file
from songvec_assets.embedding.batching import bisect, pack_requests
from songvec_assets.embedding.budget import Budget
from songvec_assets.embedding.client import Embedder, Watch
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix
from songvec_assets.errors import (
    BudgetExceededError,
    ProviderError,
    RequestRefusedError,
    RequestTooLargeError,
    StoppedError,
)

MAX_REFUSALS_IN_A_ROW = 25
"""So many texts refused one after another, and none accepted between them, are not the songs' fault."""


class Tally(Protocol):
    """What is told of a range's texts."""

    def all_started(self) -> None:
        """The last request has begun: another range may use what is left of the quota."""

    def count_tokens(self, n_tokens: int) -> None:
        """So many tokens were billed."""

    def count_answer(self, n_songs: int, batch: EmbeddingBatch) -> None:
        """So many songs have their vectors on disk."""

    def count_set_aside(self, song_ids: list[int], reason: str) -> None:
        """These songs are set aside."""


@dataclass
class Postage:
    """What all requests of a run share.

    Attributes:
        embedder: makes the vectors.
        quota: limits of a request.
        budget: stops before the request that would exceed it.
        estimator: of tokens; the embedder corrects it.
        slots: requests in flight at most, over all ranges.
        check_halted: raises where no further request may start.
        on_error: told of each request's error at once.
        max_bytes: of a request; smaller, once the provider has found one too large.
        n_refused_in_a_row: texts that were refused since one was accepted, in any range.
    """

    embedder: Embedder
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    slots: asyncio.Semaphore
    check_halted: Callable[[], None]
    on_error: Callable[[Exception], None]
    max_bytes: float = math.inf
    n_refused_in_a_row: int = 0

    def n_bytes_allowed(self) -> float:
        """What a request may hold now, as far as tokens and the provider's limit are known."""
        return min(self.estimator.n_bytes(self.quota.max_request_tokens), self.max_bytes)


@dataclass
class RangeSender:
    """Sends one range's texts and stores what comes back.

    Attributes:
        postage: what all requests share.
        shard: where the vectors go.
        check_held: raises where the range's lock was lost.
        tally: is told.
    """

    postage: Postage
    shard: Shard
    check_held: Callable[[], None]
    tally: Tally
    _errors: list[Exception] = field(default_factory=list)
    _refused: list[tuple[Text, str]] = field(default_factory=list)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, texts: Sequence[Text]) -> None:
        """Send all texts, each once; answers that are on their way when something fails are still stored.

        Raises:
            SongvecError: the first thing that went wrong, when nothing is on its way any more.
        """
        pieces = pack_requests(
            [each.n_bytes for each in texts], self.postage.quota.max_request_texts, self.postage.n_bytes_allowed
        )
        sending: list[asyncio.Task[None]] = []
        while True:
            await self.postage.slots.acquire()
            # cut now, not before: answers that came meanwhile may have taught what a request may hold
            piece = next(pieces, None) if self._may_go_on() else None
            if piece is None:
                self.postage.slots.release()
                break
            sending.append(asyncio.create_task(self._send_one(texts[piece])))
        self.tally.all_started()
        await asyncio.gather(*sending)
        if self._errors:
            raise next((error for error in self._errors if not isinstance(error, StoppedError)), self._errors[0])
        if self._refused:
            await self._check_that_something_is_accepted()
        await self._set_refused_aside()

    def _may_go_on(self) -> bool:
        try:
            self._check_going_on()
        except Exception as error:  # noqa: BLE001 - raised when the answers on their way are stored
            self._errors.append(error)
        return not self._errors

    def _check_going_on(self) -> None:
        self.postage.check_halted()
        if any(not isinstance(error, BudgetExceededError) for error in self._errors):
            raise StoppedError("another request of the range failed")

    async def _send_one(self, texts: Sequence[Text]) -> None:
        try:
            await self._send_divided(texts)
        except Exception as error:  # noqa: BLE001 - the other requests of the range are paid for: let them be stored
            self._errors.append(error)
            # what had its share of the budget before may still go; what was stopped had its reason elsewhere
            if not isinstance(error, (BudgetExceededError, StoppedError)):
                self.postage.on_error(error)
        finally:
            self.postage.slots.release()

    async def _send_divided(self, texts: Sequence[Text]) -> bool:
        """Send one request; one that is refused is halved until the text that is refused stands alone.

        Returns:
            Whether all texts were accepted.
        """
        payment = _Payment(self, sum(self.postage.estimator.estimate(each.n_bytes for each in texts)))
        refusal: RequestRefusedError | None = None
        try:
            # before anything goes, the provider's probe included
            await payment.before_try()
            batch = await self.postage.embedder.generate_embeddings_batch([each.text for each in texts], payment)
            payment.n_billed += batch.n_tokens
            async with self._writing:
                n_songs = await asyncio.to_thread(_store, self.shard, texts, batch.embeddings)
        except RequestRefusedError as error:
            refusal = error
        finally:
            # after the answer is stored: what goes wrong here must not cost it
            self.tally.count_tokens(payment.n_billed)
            await asyncio.to_thread(self.postage.budget.settle, payment.n_reserved, payment.n_billed, payment.month)
        if refusal:
            return await self._divide(texts, refusal)
        self.postage.n_refused_in_a_row = 0
        self.tally.count_answer(n_songs, batch)
        await self._set_refused_aside()
        return True

    async def _divide(self, texts: Sequence[Text], refusal: RequestRefusedError) -> bool:
        if len(texts) == 1:
            self._refused.append((texts[0], str(refusal)))
            self.postage.n_refused_in_a_row += 1
            self._check_refusals()
            return False
        first, second = [await self._send_divided(half) for half in bisect(texts)]
        if isinstance(refusal, RequestTooLargeError) and first and second:
            # it was the size, and not one long text
            half_bytes = sum(each.n_bytes for each in texts) / 2
            self.postage.max_bytes = min(self.postage.max_bytes, half_bytes)
        return first and second

    async def check_sendable(self) -> None:
        """Raise where a request must not go now."""
        self._check_going_on()
        async with self._checking:
            await asyncio.to_thread(self.check_held)

    def _check_refusals(self) -> None:
        if self.postage.n_refused_in_a_row > MAX_REFUSALS_IN_A_ROW:
            raise ProviderError(
                f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. The provider "
                f"{self._refused[-1][1]}. None of this range's is set aside. Check the model, its dimensions and the "
                "account, then start the same command again"
            )

    async def _check_that_something_is_accepted(self) -> None:
        """Where the last texts of a range were refused, a plain one tells whether it was their fault."""
        try:
            n_tokens = await self.postage.embedder.probe()
        except RequestRefusedError as error:
            raise ProviderError(
                f"the last {len(self._refused)} texts were refused, and so is a plain one: the provider {error}. None "
                "of them is set aside. Check the model and the account, then start the same command again"
            ) from None
        self.tally.count_tokens(n_tokens)
        await asyncio.to_thread(self.postage.budget.settle, 0, n_tokens)

    async def _set_refused_aside(self) -> None:
        """Store refusals once another text was accepted: until then the fault may be the provider's."""
        refused, self._refused = self._refused, []
        for text, reason in refused:
            hashes = [text.text_hash] * len(text.song_ids)
            async with self._writing:
                await asyncio.to_thread(self.shard.append_set_aside, text.song_ids, hashes, reason)
            self.tally.count_set_aside(text.song_ids, reason)


@dataclass
class _Payment(Watch):
    """What one request has reserved of the budget and was billed, over all its tries."""

    sender: RangeSender
    n_tokens: int
    n_reserved: int = 0
    n_billed: int = 0
    month: str | None = None

    async def before_try(self) -> None:
        await self.sender.check_sendable()
        # spoilt answers are paid for, and this try comes on top
        if (missing := self.n_billed + self.n_tokens - self.n_reserved) > 0:
            self.month = await asyncio.to_thread(self.sender.postage.budget.reserve, missing)
            self.n_reserved += missing

    def count_spoilt(self, n_tokens: int) -> None:
        self.n_billed += n_tokens


def _store(shard: Shard, texts: Sequence[Text], embeddings: Float32Matrix) -> int:
    """Append an answer: each text's vector for every song that has the text; how many songs that are."""
    rows = [(song_id, each.text_hash, place) for place, each in enumerate(texts) for song_id in each.song_ids]
    song_ids, text_hashes, places = zip(*rows, strict=True)
    vectors = embeddings if len(rows) == len(texts) else embeddings[list(places)]
    write_embeddings_to_file(shard, song_ids, text_hashes, vectors)
    return len(rows)
