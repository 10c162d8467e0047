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
from songvec_assets.embedding.client import Embedder
from songvec_assets.embedding.pricing import Quota, TokenEstimator
from songvec_assets.embedding.wire import EmbeddingBatch, Float32Matrix
from songvec_assets.errors import ProviderError, RequestRefusedError, RequestTooLargeError, StoppedError

MAX_REFUSALS_IN_A_ROW = 25
"""So many texts refused one after another, and none accepted between them, are not the songs' fault."""


class Tally(Protocol):
    """What is told of a range's texts."""

    def all_started(self) -> None:
        """The last request has begun: another range may use what is left of the quota."""

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
        halted: raises where no further request may start.
        max_bytes: of a request; smaller, once the provider has found one too large.
    """

    embedder: Embedder
    quota: Quota
    budget: Budget
    estimator: TokenEstimator
    slots: asyncio.Semaphore
    halted: Callable[[], None]
    max_bytes: float = math.inf

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
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, texts: Sequence[Text]) -> None:
        """Send all texts, each once; answers that are on their way when something fails are still stored.

        Raises:
            SongvecError: the first thing that went wrong, when nothing is on its way any more.
        """
        n_bytes = [len(each.text.encode()) for each in texts]
        pieces = pack_requests(n_bytes, self.postage.quota.max_request_texts, self.postage.n_bytes_allowed)
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
        await self._set_refused_aside()

    def _may_go_on(self) -> bool:
        try:
            self.postage.halted()
        except Exception as error:  # noqa: BLE001 - raised when the answers on their way are stored
            self._errors.append(error)
        return not self._errors

    async def _send_one(self, texts: Sequence[Text]) -> None:
        try:
            await self._send_divided(texts)
        except Exception as error:  # noqa: BLE001 - the other requests of the range are paid for: let them be stored
            self._errors.append(error)
        finally:
            self.postage.slots.release()

    async def _send_divided(self, texts: Sequence[Text]) -> None:
        """Send one request; one that is refused is halved until the text that is refused stands alone."""
        try:
            batch = await self._send_paid([each.text for each in texts])
        except RequestRefusedError as error:
            if isinstance(error, RequestTooLargeError) and len(texts) > 1:
                half = sum(len(each.text.encode()) for each in texts) / 2
                self.postage.max_bytes = min(self.postage.max_bytes, half)
            if len(texts) > 1:
                for part in bisect(texts):
                    await self._send_divided(part)
                return
            self._refused.append((texts[0], str(error)))
            self._check_refusals()
            return
        async with self._one_at_a_time:
            n_songs = await asyncio.to_thread(_store, self.shard, texts, batch.embeddings)
        self.tally.count_answer(n_songs, batch)
        await self._set_refused_aside()

    async def _send_paid(self, texts: list[str]) -> EmbeddingBatch:
        """Send one request within the budget, while the range is ours."""
        budget = self.postage.budget
        n_tokens = sum(self.postage.estimator.estimate(len(text.encode()) for text in texts))
        await asyncio.to_thread(budget.reserve, n_tokens)
        billed_tokens = 0
        try:
            async with self._one_at_a_time:
                await asyncio.to_thread(self.check_held)
            batch = await self.postage.embedder.generate_embeddings_batch(texts)
            billed_tokens = batch.n_tokens
        finally:
            await asyncio.to_thread(budget.settle, n_tokens, billed_tokens)
        return batch

    def _check_refusals(self) -> None:
        if len(self._refused) > MAX_REFUSALS_IN_A_ROW:
            raise ProviderError(
                f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. The provider "
                f"{self._refused[-1][1]}. None of them is set aside. Check the model, its dimensions and the account, "
                "then start the same command again"
            )

    async def _set_refused_aside(self) -> None:
        """Store refusals once another text was accepted: until then the fault may be the provider's."""
        refused, self._refused = self._refused, []
        for text, reason in refused:
            hashes = [text.text_hash] * len(text.song_ids)
            async with self._one_at_a_time:
                await asyncio.to_thread(self.shard.append_set_aside, text.song_ids, hashes, reason)
            self.tally.count_set_aside(text.song_ids, reason)


def _store(shard: Shard, texts: Sequence[Text], embeddings: Float32Matrix) -> int:
    """Append an answer: each text's vector for every song that has the text; how many songs that are."""
    rows = [(song_id, each.text_hash, place) for place, each in enumerate(texts) for song_id in each.song_ids]
    song_ids, text_hashes, places = zip(*rows, strict=True)
    vectors = embeddings if len(rows) == len(texts) else embeddings[list(places)]
    write_embeddings_to_file(shard, song_ids, text_hashes, vectors)
    return len(rows)
