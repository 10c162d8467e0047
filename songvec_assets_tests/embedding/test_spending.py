"""What is recorded of the last run that sent anything: for estimates, and for the check of the bill."""

from collections.abc import Callable

from songvec_assets.embedding.spending import SPENDING, Spending, SpendingLog
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.schema import write_value
from songvec_assets_tests.test_checks import ask


def test_it_is_read_as_it_was_written_and_the_first_of_a_model_says_so(pipeline: Pipeline) -> None:
    log = SpendingLog(pipeline.database, "a/model")
    assert (log.read(), log.read_bytes_per_token()) == (None, None)
    log.write(Spending(n_tokens_expected=90, n_tokens=100, bytes_per_token=3.14159))
    assert log.read() == Spending(90, 100, 3.14159, is_first=True)
    assert log.read_bytes_per_token() == 3.142
    log.write(Spending(n_tokens_expected=80, n_tokens=80, bytes_per_token=4.0))
    assert log.read() == Spending(80, 80, 4.0, is_first=False)
    other = SpendingLog(pipeline.database, "another/model")
    assert other.read_bytes_per_token() is None, "tokens are the model's"
    other.write(Spending(1, 1, 2.0))
    assert (log.read(), log.read_bytes_per_token()) == (Spending(1, 1, 2.0, is_first=True), 4.0)


def test_spending_that_another_version_recorded_otherwise_counts_as_not_recorded(
    pipeline: Pipeline, songs: Callable[..., None]
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    pipeline.bind()
    with pipeline.database.get_connection() as connection:
        write_value(connection, SPENDING, {"tokens": 12, "dollars": 3})
    assert pipeline.spending.read() is None
    assert ask(pipeline, "billed_as_estimated").passed
