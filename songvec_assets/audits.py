"""What is held against the whole deployment after a load: each method is one question, and its first line asks it.

Findings are figures and one sentence that says what to do where something is wrong. What follows from them, the face
decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from songvec_assets.deployment import Deployment
from songvec_assets.errors import SongvecError
from songvec_assets.status import RangeStatus, measure_status
from songvec_assets.vectors.index.audit import audit_index, audit_vectors
from songvec_assets.vectors.index.recall import audit_recall
from songvec_assets.vectors.index.upkeep import plan_build

MAX_SET_ASIDE_SHARE = 0.01
_BILLED_OFF_BY = 0.25
_FEW_TOKENS = 10_000
_SANE_USD_PER_MILLION = (0.001, 10.0)
_SANE_BYTES_PER_TOKEN = (1.0, 12.0)


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        passed: whether all is well.
        words: what was found, and what to do where it is not.
        figures: by name.
    """

    passed: bool
    words: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Auditor:
    """Asks about one deployment; what several questions need is looked up once."""

    deployment: Deployment

    def answer(self, ask: "Callable[[Auditor], Finding]") -> Finding:
        """One question's answer; where it cannot be had, that is the answer, and the others are asked all the same."""
        try:
            return ask(self)
        except SongvecError as error:
            return Finding(False, str(error))

    @cached_property
    def _total(self) -> RangeStatus:
        return measure_status(self.deployment).total

    def coverage(self) -> Finding:
        """Has every song of the source an embedding in the table, or a named reason why not?"""
        total = self._total
        n_songs = total.n_songs + total.n_unexported
        unexported = f" ({total.n_unexported:,} of them not exported yet)" if total.n_unexported else ""
        return Finding(
            total.n_missing == 0,
            f"{total.n_loaded:,} of {n_songs:,} songs are loaded, {total.n_set_aside:,} set aside, "
            f"{total.n_missing:,} missing{unexported}"
            + (": `songvec run` embeds and loads them" if total.n_missing else ""),
            {"songs": n_songs, "loaded": total.n_loaded, "set aside": total.n_set_aside,
             "missing": total.n_missing, "not exported yet": total.n_unexported},
        )  # fmt: skip

    def few_set_aside(self) -> Finding:
        """Are at most a hundredth of the songs set aside?"""
        total = self._total
        share = total.n_set_aside / max(1, total.n_songs)
        return Finding(
            share <= MAX_SET_ASIDE_SHARE,
            f"{total.n_set_aside:,} of {total.n_songs:,} songs are set aside ({share:.2%}); `songvec status` says why",
            {"share set aside": round(share, 6), "set aside": total.n_set_aside},
        )

    def texts_are_lyrics(self) -> Finding:
        """Are a sample's lyrics free of time stamps and leftovers of web pages?"""
        found = self.deployment.find_boilerplate()
        words = found.describe(self.deployment.token_estimator().bytes_per_token)
        return Finding(
            not found.is_common,
            f"{words}. To embed them without it: {found.view(self.deployment.source)}" if found.is_common else words,
            {"sampled": found.n_sampled, "songs with it": found.n_found},
        )

    def no_orphans(self) -> Finding:
        """Has every row of the table a song, and does the ledger know it?"""
        n_rows, total = self.deployment.table.count_rows(), self._total
        n_unknown = n_rows - total.n_loaded
        passed = not n_unknown and not total.n_orphans
        return Finding(
            passed,
            f"{n_rows:,} rows, {total.n_loaded:,} of them in the ledger, {total.n_orphans:,} without a song"
            + ("" if passed else ": `songvec run` removes rows of songs that are gone; rows that nobody here loaded "
               "are somebody else's to delete"),
            {"rows": n_rows, "not in the ledger": n_unknown, "without a song": total.n_orphans},
        )  # fmt: skip

    def vectors_are_sound(self) -> Finding:
        """Is no vector of a sample zero, not finite or of another size?"""
        audit = audit_vectors(self.deployment.database, self.deployment.table_spec)
        return Finding(
            not audit.bad_song_ids,
            f"{len(audit.bad_song_ids)} of {audit.n_sampled:,} sampled vectors are bad",
            {"sampled": audit.n_sampled, "bad song_ids": str(audit.bad_song_ids[:20]),
             "mean norm": round(audit.mean_norm, 6)},
        )  # fmt: skip

    def one_model(self) -> Finding:
        """Are all loaded ranges of the configured model and size?"""
        held = self.deployment.table.ledger.read_models()
        models = {f"{model} ({dimensions})": n_songs for (model, dimensions), n_songs in held.items()}
        expected = f"{self.deployment.settings.model} ({self.deployment.settings.dimensions})"
        words = f"expected only {expected}, the ledger has {', '.join(models) or 'nothing'}"
        return Finding(list(models) == [expected], words, models)

    def billed_as_estimated(self) -> Finding:
        """Did the provider bill what was estimated before the last run that sent anything?"""
        spending = self.deployment.read_spending()
        if spending is None or spending.n_tokens_expected < _FEW_TOKENS:
            return Finding(True, "too little was sent in the last run to hold its bill against the estimate")
        if self.deployment.price.is_free:
            return Finding(True, "nothing is paid for")
        ratio = spending.n_tokens / spending.n_tokens_expected
        needs = "needs experience, this was the first run of the model: " if spending.is_first else ""
        return Finding(
            spending.is_first or abs(ratio - 1) <= _BILLED_OFF_BY,
            f"{needs}{spending.n_tokens:,} tokens were billed, {spending.n_tokens_expected:,} estimated beforehand "
            f"({ratio:.0%}); the next estimate goes by {spending.bytes_per_token:.2f} bytes a token",
            {"billed / estimated": round(ratio, 4), "usd": round(self.deployment.price.usd(spending.n_tokens), 6)},
        )

    def price_is_sane(self) -> Finding:
        """Are price and bytes a token of an order that providers have?"""
        price, spending = self.deployment.price, self.deployment.read_spending()
        figures = {"usd per million tokens": price.usd_per_million_tokens}
        if price.is_free or spending is None:
            return Finding(True, "nothing is paid for, or nothing was sent yet", figures)
        low, high = _SANE_USD_PER_MILLION
        few, many = _SANE_BYTES_PER_TOKEN
        return Finding(
            low <= price.usd_per_million_tokens <= high and few <= spending.bytes_per_token <= many,
            f"${price.usd_per_million_tokens:g} a million tokens (expected ${low:g} to ${high:g}), "
            f"{spending.bytes_per_token:.2f} bytes a token (expected {few:g} to {many:g}): budgets and estimates hold "
            "as far as SONGVEC_USD_PER_MILLION_TOKENS is the provider's price",
            figures | {"bytes per token": round(spending.bytes_per_token, 3)},
        )

    def index_is_used(self) -> Finding:
        """Is the index valid, and used where the table is large enough for that?"""
        audit = audit_index(self.deployment.database, self.deployment.table_spec)
        return Finding(
            audit.valid and (audit.used or not audit.should_be_used),
            audit.describe(),
            {"valid": audit.valid, "used by the planner": audit.used, "rows": audit.n_rows},
        )

    def index_is_fresh(self) -> Finding:
        """Was the index built of the rows that the table has, but for a fifth?"""
        index, n_rows = self.deployment.table.index, self.deployment.table.count_rows()
        if index is None:
            return Finding(False, "there is no valid index: materialize ivfflat_index")
        spec, wanted = self.deployment.table_spec, self.deployment.index_settings
        reason = plan_build(self.deployment.table, spec, wanted, n_rows, index.n_changed).reason
        words = f"{index.n_changed:,} of {n_rows:,} rows changed since it was built"
        told = f"{reason}: materialize ivfflat_index" if reason else words
        return Finding(reason is None, told, {"rows changed": index.n_changed, "lists": index.lists})

    def recall_reaches_target(self) -> Finding:
        """Do searches find the target share of the true ten nearest songs?"""
        target = self.deployment.settings.target_recall
        found = audit_recall(self.deployment.table, self.deployment.cache, target)
        if found is None:
            return Finding(False, "there is no valid index to measure: materialize ivfflat_index", {"target": target})
        words = f"{found.describe()}; {found.n_changed:,} rows changed since the index was built"
        point = found.chosen
        return Finding(
            found.reached,
            words if found.reached else f"{words}: materialize ivfflat_index, which takes more probes or rebuilds it",
            {
                "target": target,
                "recall": round(point.recall, 4),
                "probes": point.probes,
                "median ms": round(point.ms_median, 3),
            },
        )
