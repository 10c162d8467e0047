"""Asset checks: the auditor's questions, each with the severity that fits. A wrong vector blocks what is downstream."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import dagster as dg

from songvec_assets.audits import Auditor, Finding
from songvec_assets.defs.assets import ivfflat_index, song_embeddings_table
from songvec_assets.defs.resources import RunResource
from songvec_assets.defs.steps import failing_clearly


class Question(NamedTuple):
    """A question, and what a bad answer means."""

    ask: Callable[[Auditor], Finding]
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.WARN
    blocking: bool = False


_ERROR = dg.AssetCheckSeverity.ERROR


def _ask(asset: dg.AssetsDefinition, name: str, *questions: Question) -> dg.AssetChecksDefinition:
    """All questions about an asset in one step, which looks up once what several need."""
    by_name = {question.ask.__name__: question for question in questions}
    specs = [
        dg.AssetCheckSpec(check, asset=asset, description=question.ask.__doc__, blocking=question.blocking)
        for check, question in by_name.items()
    ]

    @dg.multi_asset_check(name=name, specs=specs, can_subset=True)
    def ask(context: dg.AssetCheckExecutionContext, run: RunResource) -> Iterator[dg.AssetCheckResult]:
        with failing_clearly(), run.open() as deployment:
            auditor = Auditor(deployment)
            for spec in specs:
                if spec.key in context.selected_asset_check_keys:
                    question = by_name[spec.name]
                    finding = auditor.answer(question.ask)
                    yield dg.AssetCheckResult(
                        check_name=spec.name, asset_key=spec.asset_key, passed=finding.passed,
                        severity=question.severity, description=finding.words, metadata=finding.figures,
                    )  # fmt: skip

    return ask


table_checks = _ask(
    song_embeddings_table,
    "ask_about_table",
    Question(Auditor.coverage),
    Question(Auditor.few_set_aside),
    Question(Auditor.texts_are_lyrics),
    Question(Auditor.no_orphans),
    Question(Auditor.vectors_are_sound, _ERROR, blocking=True),
    Question(Auditor.one_model, _ERROR, blocking=True),
    Question(Auditor.billed_as_estimated),
    Question(Auditor.price_is_sane),
)

index_checks = _ask(
    ivfflat_index,
    "ask_about_index",
    Question(Auditor.index_is_used, _ERROR),
    Question(Auditor.index_is_fresh),
    Question(Auditor.recall_reaches_target, _ERROR),
)
