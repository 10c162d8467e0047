"""The manifest of a range: which files hold, what is recorded of songs, and what is refused."""

import pytest

from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import (
    StoreError,
)
from songvec_assets_tests.cache.filling import FIRST, Run, Songs, fill, plain_songs
from songvec_assets_tests.provider import Provider


@pytest.mark.parametrize("content", ["", "5", "{}", '{"counts": [1]}', "\x00", '{"version": 1, "files": 3}', "flip"])
def test_a_manifest_that_does_not_parse_is_named_and_costs_no_request(
    songs: Songs, run: Run, provider: Provider, content: str
) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    good = path.read_text()
    flipped = good.replace('"n_songs":8', '"n_songs":9')
    assert flipped != good
    path.write_text(flipped if content == "flip" else content)
    provider.reset_ledger()
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert str(path) in str(reports[0].error)
    assert "does not parse" in str(reports[0].error)
    path.unlink()
    (report,) = fill(run())
    assert report.n_unchanged == 8
    assert provider.ledger()["requests"] == 0
    assert path.read_text() == good


def test_a_manifest_of_another_version_is_refused_by_its_name(songs: Songs, run: Run) -> None:
    songs(*plain_songs(range(1, 9)))
    first = run()
    fill(first)
    path = first.cache.storage.root / FIRST.key / "manifest.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    reports: list[FillReport] = []
    run().filler().fill_ranges([FIRST], reports.append)
    assert type(reports[0].error) is StoreError
    assert "has version 2, expected 1" in str(reports[0].error)
