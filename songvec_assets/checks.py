"""The data-quality checks: a function each, with the name of the check and its question as the docstring.

A finding has figures, and one sentence that says what to do if something is wrong. When to add here: another check,
with a row in docs/operations.md. Keep out: how a sample is taken or measured (the rooms below).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from songvec_assets.errors import SongvecError, TableMismatchError, describe
from songvec_assets.search.evaluate import evaluate, find_songs
from songvec_assets.search.labels import label_samples
from songvec_assets.search.queries import embed_queries
from songvec_assets.settings import DEMO_MODEL
from songvec_assets.vectors.index.audit import audit_index, audit_recall, audit_vectors
from songvec_assets.vectors.index.build_plan import plan_build, reason_of_drift
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.wiring import Wiring

MAX_REJECTED_SHARE = 0.01
_BILLED_OFF_BY = 0.25
"""Bytes per token vary with the language of the songs, which an estimate knows from earlier runs only."""
_FEW_TOKENS = 10_000
_SANE_USD_PER_MILLION, _SANE_BYTES_PER_TOKEN = (0.001, 10.0), (1.0, 12.0)
_EVERY_SAMPLE_QUERY, _SAMPLE_NDCG = 8, 0.65
"""A run with nothing to do checks, too: hybrid searches for an eighth of the queries take about half a second."""


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        passed: whether all is well.
        message: what was found, and what to do if it is wrong.
        figures: by name.
    """

    passed: bool
    message: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evidence:
    """What the checks look at; what several of them need is read once."""

    wiring: Wiring

    @cached_property
    def total(self) -> dict[str, int]:
        """The sums of the inventory."""
        return self.wiring.read_inventory().total

    @cached_property
    def n_rows(self) -> int:
        """Rows of the table, counted by the server: 0.7 s for 12 million."""
        return self.wiring.table.count_rows()

    def check_loaded(self) -> None:
        """Refuse to check a table that does not exist.

        Raises:
            TableMismatchError: nothing is loaded.
        """
        if self.wiring.table.spec is None:
            raise TableMismatchError(
                "nothing is loaded yet, so there is nothing to check: `songvec run` first", "table.not-loaded"
            )

    def answer(self, check: "Check") -> Finding:
        """The finding of one check. An error is a finding, too, so that it does not keep the others from running."""
        try:
            return check.ask(self)
        except SongvecError as error:
            return Finding(False, describe(error))


def coverage(evidence: Evidence) -> Finding:
    """Does every song of the source have an embedding in the table, or a reason why not?"""
    total = evidence.total
    n_missing, n_unexported = total["n_missing"], total["n_unexported"]
    n_songs = total["n_songs"] + n_unexported
    unexported = f" ({n_unexported:,} of them not exported yet)" if n_unexported else ""
    cure = ": `songvec run` embeds and loads them" if n_missing else ""
    return Finding(
        n_missing == 0,
        f"{total['n_loaded']:,} of {n_songs:,} songs are loaded, {total['n_rejected']:,} rejected, "
        f"{n_missing:,} missing{unexported}{cure}",
        {"songs": n_songs, "not exported yet": n_unexported}
        | {name: total[f"n_{name}"] for name in ("loaded", "rejected", "missing")},
    )


def few_rejected(evidence: Evidence) -> Finding:
    """Are at most 1 % of the songs rejected?"""
    n_rejected, n_songs = evidence.total["n_rejected"], evidence.total["n_songs"]
    share = n_rejected / max(1, n_songs)
    return Finding(
        share <= MAX_REJECTED_SHARE,
        f"{n_rejected:,} of {n_songs:,} songs are rejected ({share:.2%}); `songvec status` says why",
        {"share rejected": round(share, 6), "rejected": n_rejected},
    )


def texts_are_lyrics(evidence: Evidence) -> Finding:
    """Are a sample's lyrics free of time stamps and leftovers of web pages?"""
    found = evidence.wiring.find_boilerplate()
    message = found.describe(evidence.wiring.token_estimator().bytes_per_token)
    if found.is_common:
        message += f". To embed them without it: {found.view(evidence.wiring.source)}"
    return Finding(not found.is_common, message, {"sampled": found.n_sampled, "songs with it": found.n_found})


def no_orphans(evidence: Evidence) -> Finding:
    """Does every row of the table belong to a song, and is it in the ledger?"""
    n_rows, total = evidence.n_rows, evidence.total
    n_loaded, n_orphans = total["n_loaded"], total["n_orphans"]
    n_unknown = n_rows - n_loaded
    cure = ""
    if n_unknown or n_orphans:
        cure = ": `songvec run` removes rows of deleted songs; rows that the ledger lacks are not from here"
    return Finding(
        not cure,
        f"{n_rows:,} rows, {n_loaded:,} of them in the ledger, {n_orphans:,} without a song{cure}",
        {"rows": n_rows, "not in the ledger": n_unknown, "without a song": n_orphans},
    )


def vectors_are_sound(evidence: Evidence) -> Finding:
    """Are all vectors of a sample finite, other than zero, and of the right size?"""
    audit = audit_vectors(evidence.wiring.database, evidence.wiring.table_spec, evidence.n_rows)
    bad = audit.bad_song_ids
    cure = ": somebody else wrote them; delete these rows, then `songvec run` loads them again" if bad else ""
    return Finding(
        not bad,
        f"{len(bad)} of {audit.n_sampled:,} sampled vectors are bad{cure}",
        {"sampled": audit.n_sampled, "bad song_ids": str(bad[:20]), "mean norm": round(audit.mean_norm, 6)},
    )


def one_model(evidence: Evidence) -> Finding:
    """Are all loaded ranges of the configured model and size?"""
    loaded, spec = evidence.wiring.table.ledger.read_models(), evidence.wiring.table_spec
    models = {f"{model} ({dimensions})": n_songs for (model, dimensions), n_songs in loaded.items()}
    expected = f"{spec.model} ({spec.dimensions})"
    passed = [*models] == [expected]
    message = f"expected only {expected}, the ledger has {', '.join(models) or 'nothing'}"
    if not passed:
        names = "SONGVEC_EMBEDDING_MODEL or SONGVEC_MODEL_ID, and SONGVEC_EMBEDDING_DIMENSIONS"
        message += f": set {names} to what is loaded; or `songvec swap`"
    return Finding(passed, message, models)


def billed_as_estimated(evidence: Evidence) -> Finding:
    """Did the provider bill what was estimated before the last run that sent anything?"""
    spending, price = evidence.wiring.spending.read(), evidence.wiring.price
    if spending is None or spending.n_tokens_expected < _FEW_TOKENS:
        return Finding(True, "too little was sent in the last run to compare its bill with the estimate")
    if price.is_free:
        return Finding(True, "nothing is paid for")
    ratio = spending.n_tokens / spending.n_tokens_expected
    needs = "needs experience, this was the first run of the model: " if spending.is_first else ""
    return Finding(
        spending.is_first or abs(ratio - 1) <= _BILLED_OFF_BY,
        f"{needs}{spending.n_tokens:,} tokens were billed, {spending.n_tokens_expected:,} estimated beforehand "
        f"({ratio:.0%}); the next estimate assumes {spending.bytes_per_token:.2f} bytes per token",
        {"billed / estimated": round(ratio, 4), "usd": round(price.usd(spending.n_tokens), 6)},
    )


def price_is_sane(evidence: Evidence) -> Finding:
    """Are price and bytes per token of an order of magnitude that providers have?"""
    spending, price = evidence.wiring.spending.read(), evidence.wiring.price
    usd = price.usd_per_million_tokens
    figures = {"usd per million tokens": usd}
    if price.is_free or spending is None:
        return Finding(True, "nothing is paid for, or nothing was sent yet", figures)
    (low, high), (few, many) = _SANE_USD_PER_MILLION, _SANE_BYTES_PER_TOKEN
    return Finding(
        low <= usd <= high and few <= spending.bytes_per_token <= many,
        f"${usd:g} per million tokens (expected ${low:g} to ${high:g}), {spending.bytes_per_token:.2f} bytes per token "
        f"(expected {few:g} to {many:g}): budgets and estimates hold only if SONGVEC_USD_PER_MILLION_TOKENS is the "
        "provider's price",
        figures | {"bytes per token": round(spending.bytes_per_token, 3)},
    )


def index_is_used(evidence: Evidence) -> Finding:
    """Is the index valid, and used if the table is large enough for that?"""
    audit = audit_index(evidence.wiring.database, evidence.wiring.table_spec, evidence.n_rows)
    return Finding(
        audit.valid and (audit.used or not audit.should_be_used),
        audit.describe(),
        {"valid": audit.valid, "used by the planner": audit.used, "rows": audit.n_rows},
    )


def index_is_fresh(evidence: Evidence) -> Finding:
    """Does the index still fit the rows, of which at most a fifth changed since it was built?"""
    table, wiring = evidence.wiring.table, evidence.wiring
    index, n_rows = table.index, evidence.n_rows
    if index is None:
        return Finding(False, "there is no valid index: run `songvec index`")
    with table.database.get_connection() as connection:
        recall = read_recall(connection, table)
    plan = plan_build(table, wiring.table_spec, wiring.index_settings, n_rows, index.n_changed)
    reason = plan.reason or reason_of_drift(recall)
    unchanged = f"{index.n_changed:,} of {n_rows:,} rows changed since it was built"
    message = f"{reason}: run `songvec index`" if reason else unchanged
    figures: dict[str, Any] = {"rows changed": index.n_changed, "kind": index.kind, "lists": index.lists}
    if recall is not None and recall.drift is not None:
        figures["drift of the mean (%)"] = round(100 * recall.drift, 2)
    return Finding(reason is None, message, figures)


def recall_reaches_target(evidence: Evidence) -> Finding:
    """Do searches find the target share of the true ten nearest songs?"""
    wiring, target = evidence.wiring, evidence.wiring.settings.target_recall
    found = audit_recall(wiring.table, wiring.cache, target)
    if found is None:
        return Finding(False, "there is no valid index to measure: run `songvec index`", {"target": target})
    message, point = f"{found.describe()}; {found.n_changed:,} rows changed since the index was built", found.chosen
    if not found.reached:
        message += ": run `songvec index`, which takes more probes or rebuilds it"
    return Finding(
        found.reached,
        message,
        {
            "target": target,
            "recall": round(point.recall, 4),
            "recall, low": round(point.low, 4),
            "recall, high": round(point.high, 4),
            "queries": point.n_queries,
            "probes": point.probes,
            "candidates": found.candidates or 0,
            "median ms": round(point.ms_median, 3),
        },
    )


def samples_are_found(evidence: Evidence) -> Finding:
    """Do searches of the sample catalogue find the songs that labelled queries ask for?"""
    wiring = evidence.wiring
    is_demo = wiring.database.embedded and wiring.settings.model == DEMO_MODEL
    queries = label_samples(wiring.database, wiring.source) if is_demo else None
    if not queries:
        return Finding(
            True, "the songs are not those of the demo; `songvec evaluate` measures searches with your queries"
        )
    asked = queries[::_EVERY_SAMPLE_QUERY]
    vectors = embed_queries(wiring.embedder(), [query.words for query in asked], wiring.prompts.query)
    found, _ = find_songs(wiring.source, asked, vectors, wiring.settings.model, ["hybrid"])
    ndcg = evaluate(asked, found).scores[0].ndcg.mean
    return Finding(
        ndcg >= _SAMPLE_NDCG,
        f"nDCG@10 of {len(asked)} labelled queries is {ndcg:.3f}, expected {_SAMPLE_NDCG} or more"
        f"{'' if ndcg >= _SAMPLE_NDCG else ': `songvec evaluate` shows where searches became worse'}",
        {"labelled queries": len(asked), "nDCG@10": round(ndcg, 4)},
    )


@dataclass(frozen=True)
class Check:
    """A check, and what it means if it does not pass.

    Attributes:
        ask: the function; its name is the check's name, its docstring the question.
        is_error: whether a failure is an error; else it is a warning.
        blocks: whether a failure stops what is downstream.
    """

    ask: Callable[[Evidence], Finding]
    is_error: bool = False
    blocks: bool = False

    @property
    def name(self) -> str:
        """What the UI and the command line call it."""
        return self.ask.__name__


TABLE_CHECKS = (
    Check(coverage),
    Check(few_rejected),
    Check(texts_are_lyrics),
    Check(no_orphans),
    Check(vectors_are_sound, is_error=True, blocks=True),
    Check(one_model, is_error=True, blocks=True),
    Check(billed_as_estimated),
    Check(price_is_sane),
)
INDEX_CHECKS = (
    Check(index_is_used, is_error=True),
    Check(index_is_fresh),
    Check(recall_reaches_target, is_error=True),
    Check(samples_are_found),
)
