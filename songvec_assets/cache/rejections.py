"""Texts of a range that were sent alone and got no vector: rejected if others succeed, else the server is at fault.

Who decides what a failure means, from the request to the run:

- `embedding.client`: a try may be repeated, until `contact` says that the server has not answered for too long;
- `requests`: a request that is refused, or fails each time, is divided until the failing text is alone;
- here: a text that fails alone is rejected once others succeeded after it; if too many fail, the server is at fault;
- `embedding.health`: how many of the last texts of the run failed, over all ranges;
- `fill`: a range that fails is reported, the others go on; two in a row without an answer end the run;
- `context.note_error`: an error that every range would meet ends the run.

When to add here: another sign that the server is at fault. Keep out: how a request is divided down to single texts.
"""

import time
from dataclasses import dataclass, field

from songvec_assets.cache.context import SendContext
from songvec_assets.cache.manifest import Rejection
from songvec_assets.cache.plan import FillReport, Text
from songvec_assets.errors import ProviderError, ServerFailingError

MAX_REFUSALS_IN_A_ROW = 25
"""If more texts in a row are refused, the songs are not at fault."""
_ENOUGH_TEXTS = 400
"""From this number of texts on, too many bad ones end the run at once; among fewer texts they may be chance."""


@dataclass
class RefusedTexts:
    """The texts of one range that got no vector.

    Attributes:
        rejected: the rejected songs, once it is clear that the server is not at fault.
    """

    context: SendContext
    report: FillReport
    rejected: list[Rejection] = field(default_factory=list)
    _texts: list[tuple[Text, str]] = field(default_factory=list)
    _last_at: float = 0.0
    _is_server_fault: bool = False

    @property
    def others_succeeded(self) -> bool:
        """Whether another text got a vector after the last of them."""
        return not self._is_server_fault and self.context.health.last_good_at > self._last_at

    async def answers_well(self, since: float) -> bool:
        """Whether the server gave a good vector after `since`; may send a probe, whose tokens are counted."""
        answers = await self.context.embedder.answers_well(since)
        self.report.n_tokens += await self.context.settle_probes()
        return answers

    def add(self, text: Text, reason: str, is_refusal: bool) -> None:
        """Count a text that was sent alone and got no vector; `is_refusal`: the provider refused it.

        Raises:
            ProviderError: there are too many: the songs are not at fault.
        """
        self._texts.append((text, reason))
        self._last_at = time.monotonic()
        if text.rejected_before:  # its failure says nothing new about the server
            return
        health = self.context.health
        if is_refusal:
            health.n_refused_in_a_row += 1
            if health.n_refused_in_a_row > MAX_REFUSALS_IN_A_ROW:
                self._is_server_fault = True
                raise ProviderError(
                    f"{MAX_REFUSALS_IN_A_ROW} texts in a row were refused, so the fault is not the songs'. {reason}. "
                    "None of this range's is rejected. Check the model, its dimensions and the account, then start the "
                    "same command again",
                    "provider.refuses-all",
                )
            return
        health.count_bad(text.text_hash)
        if health.is_failing() and health.n_texts >= _ENOUGH_TEXTS:
            self._is_server_fault = True
            raise ProviderError(
                f"{health.n_bad:,} of the last {health.n_texts:,} texts fail while others succeed: too many "
                f"for the songs to be at fault. {reason}. None of this range's is rejected, and nothing more is sent. "
                "See the server's log, then start the same command again",
                "provider.failing",
            )

    async def check(self) -> None:
        """Refuse to reject texts that may not be at fault.

        Raises:
            ServerFailingError: too many fail; other ranges may still show that the texts are at fault.
            ProviderError: no other text was accepted after them, and the probe fails too.
        """
        if not self._texts:
            return
        health = self.context.health
        if health.is_failing() and not all(text.rejected_before for text, _ in self._texts):
            raise ServerFailingError(
                f"{health.n_bad:,} of {health.n_texts:,} texts fail while others succeed: too many for the "
                f"songs to be at fault. {self._texts[-1][1]}. None of this range's is rejected. See the server's "
                "log, then start the same command again"
            )
        if not await self.answers_well(self._last_at):
            raise ProviderError(
                f"the last {len(self._texts)} texts were refused, and so is a plain one: {self._texts[-1][1]}. "
                "None of them is rejected. Check the model and the account, then start the same command again",
                "provider.refuses-all",
            )

    def reject(self) -> None:
        """Reject the songs of these texts."""
        for text, reason in self._texts:
            self.rejected += [Rejection(song_id, text.text_hash, reason) for song_id in text.song_ids]
            self.report.rejected += [(song_id, reason) for song_id in text.song_ids]
            self.report.n_rejected += len(text.song_ids)
            self.context.advance(len(text.song_ids), self.report.range)
