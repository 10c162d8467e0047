"""Asset checks: those of the core, as Dagster's. Invalid vectors block what is downstream.

When to add here: another asset that is checked. Keep out: the checks (`songvec_assets.checks`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import dagster as dg

from songvec_assets.checks import INDEX_CHECKS, TABLE_CHECKS, Check, Evidence, Finding
from songvec_assets.defs.assets import ivfflat_index, song_embeddings_table
from songvec_assets.defs.resources import RunResource
from songvec_assets.defs.steps import failing_clearly, notify


class CheckResult(NamedTuple):
    """What a check found."""

    check: str
    finding: Finding


def _define(asset: dg.AssetsDefinition, name: str, checks: Sequence[Check]) -> dg.AssetChecksDefinition:
    """All checks of an asset in one step, so that what several of them need is read once."""
    by_name = {check.name: check for check in checks}
    specs = [
        dg.AssetCheckSpec(check.name, asset=asset, description=check.ask.__doc__, blocking=check.blocks)
        for check in checks
    ]

    @dg.multi_asset_check(name=name, specs=specs, can_subset=True)
    def run_checks(context: dg.AssetCheckExecutionContext, run: RunResource) -> Iterator[dg.AssetCheckResult]:
        with failing_clearly(), run.open() as pipeline:
            evidence = Evidence(pipeline)
            evidence.check_loaded()
            for spec in (each for each in specs if each.key in context.selected_asset_check_keys):
                check = by_name[spec.name]
                finding = evidence.answer(check)
                notify(CheckResult(spec.name, finding))
                yield dg.AssetCheckResult(
                    check_name=spec.name,
                    asset_key=spec.asset_key,
                    passed=finding.passed,
                    severity=dg.AssetCheckSeverity.ERROR if check.is_error else dg.AssetCheckSeverity.WARN,
                    description=finding.message,
                    metadata=finding.figures,
                )

    return run_checks


table_checks = _define(song_embeddings_table, "check_table", TABLE_CHECKS)
index_checks = _define(ivfflat_index, "check_index", INDEX_CHECKS)
