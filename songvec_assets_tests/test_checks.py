"""Each check passes for a sound pipeline, and fails for one in which that thing is wrong."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.checks import INDEX_CHECKS, TABLE_CHECKS, Evidence, Finding
from songvec_assets.embedding.spending import SPENDING
from songvec_assets.errors import BudgetExceededError, SourceError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import create_songs_table
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value, write_value
from songvec_assets.settings import DEMO_MODEL, Settings
from songvec_assets.vectors.index.sizing import Capacity
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, running_provider

CHECKS = {check.name: check for check in (*TABLE_CHECKS, *INDEX_CHECKS)}
N_SONGS = 40


def run_all(pipeline: Pipeline) -> None:
    pipeline.export()
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    pipeline.load()
    pipeline.build_index()


@pytest.fixture
def begin(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> Callable[..., Pipeline]:
    """Begins a look at a pipeline whose songs are all embedded, loaded and indexed."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la la") for song_id in range(1, N_SONGS + 1)))
    run_all(make_pipeline(database, provider, tmp_path))
    return lambda **settings: make_pipeline(database, provider, tmp_path, **settings)


def ask(pipeline: Pipeline, name: str) -> Finding:
    return CHECKS[name].ask(Evidence(pipeline))


def test_every_check_passes_for_a_sound_pipeline(begin: Callable[..., Pipeline]) -> None:
    found = begin().verify()
    assert len(found) == 12
    assert {name: finding.message for name, finding in found.items() if not finding.passed} == {}
    assert all(finding.message for finding in found.values())


def test_the_rows_of_a_table_are_counted_once_for_all_checks(begin: Callable[..., Pipeline]) -> None:
    evidence, statements = Evidence(begin()), []

    @sa.event.listens_for(evidence.wiring.database.get_engine(), "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(" ".join(statement.split()))

    assert all(evidence.answer(check).passed for check in CHECKS.values())
    counts = [each for each in statements if "SELECT count(*) FROM song_embeddings" in each]
    assert counts == ["SELECT count(*) FROM song_embeddings"]


def delete_row(url: str) -> None:
    execute(url, "DELETE FROM song_embeddings WHERE song_id = 7")


def delete_song(url: str) -> None:
    execute(url, "DELETE FROM songs WHERE id = 7")


def add_song(url: str) -> None:
    execute(url, "INSERT INTO songs VALUES (50, 'New', 'Ann', 'la')")


def unname_songs(url: str) -> None:
    execute(url, "UPDATE songs SET name = '' WHERE id <= 3")


def stamp_lyrics(url: str) -> None:
    execute(url, "UPDATE songs SET lyrics = '[00:12.34] la la' WHERE id <= 3")


def zero_vector(url: str) -> None:
    execute(url, "UPDATE song_embeddings SET embedding = array_fill(0, ARRAY[64])::vector WHERE song_id = 7")


def another_model(url: str) -> None:
    execute(url, "UPDATE songvec.loaded_ranges SET model = 'other'")


def drop_index(url: str) -> None:
    execute(url, "DROP INDEX embeddings_ivfflat_idx")


@pytest.mark.parametrize(
    ("name", "break_it", "export", "words"),
    [
        ("coverage", add_song, True, "1 missing: `songvec run`"),
        (
            "coverage",
            add_song,
            False,
            "40 of 41 songs are loaded, 0 rejected, 1 missing (1 of them not exported yet): ",
        ),
        ("few_rejected", unname_songs, True, "3 of 40 songs are rejected"),
        ("texts_are_lyrics", stamp_lyrics, False, "LRC time stamps in 3"),
        ("no_orphans", delete_row, False, "39 rows, 40 of them in the ledger"),
        ("no_orphans", delete_song, True, "1 without a song"),
        (
            "vectors_are_sound",
            zero_vector,
            False,
            "1 of 40 sampled vectors are bad: somebody else wrote them; delete",
        ),
        ("one_model", another_model, False, "the ledger has other"),
        ("one_model", another_model, False, "SONGVEC_MODEL_ID, and SONGVEC_EMBEDDING_DIMENSIONS to what"),
        ("index_is_used", drop_index, False, "run `songvec index`"),
        ("index_is_fresh", drop_index, False, "run `songvec index`"),
        ("recall_reaches_target", drop_index, False, "run `songvec index`"),
    ],
)
def test_what_is_wrong_is_found_and_named(
    begin: Callable[..., Pipeline], name: str, break_it: Callable[[str], None], export: bool, words: str
) -> None:
    break_it(begin().database.adbc_uri)
    if export:
        begin().export()
    finding = ask(begin(), name)
    assert not finding.passed
    assert words in finding.message


def test_rows_changed_beyond_a_fifth_make_the_index_stale(begin: Callable[..., Pipeline]) -> None:
    with begin().database.get_connection() as connection:
        write_value(connection, "rows_changed_since_index", 9)
    finding = ask(begin(), "index_is_fresh")
    assert (finding.passed, "9 rows changed" in finding.message) == (False, True)


def test_an_index_of_another_kind_or_about_a_mean_that_moved_is_stale(begin: Callable[..., Pipeline]) -> None:
    assert "asks for ivfflat_bit, it is ivfflat" in ask(begin(index_kind="ivfflat_bit"), "index_is_fresh").message
    begin(index_kind="ivfflat_bit").build_index()
    finding = ask(begin(index_kind="ivfflat_bit"), "index_is_fresh")
    assert (finding.passed, finding.figures["drift of the mean (%)"]) == (True, 0)
    with begin().database.get_connection() as connection:
        recorded = read_value(connection, "recall")
        write_value(connection, "recall", recorded | {"drift": 0.11})
    finding = ask(begin(index_kind="ivfflat_bit"), "index_is_fresh")
    assert not finding.passed
    assert "the mean of the vectors has moved by 11% of their spread" in finding.message


def test_a_check_that_cannot_run_does_not_pass_and_stops_no_other(
    begin: Callable[..., Pipeline],
) -> None:
    evidence = Evidence(begin())
    snapshot = next(evidence.wiring.store.songs.storage.root.glob("*.parquet"))
    snapshot.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    finding = evidence.answer(CHECKS["coverage"])
    assert not finding.passed
    assert re.search(r"is damaged.*\[store\.damaged\]$", finding.message)
    assert evidence.answer(CHECKS["vectors_are_sound"]).passed


def test_an_index_as_large_as_memory_allows_is_fresh(
    begin: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin().database.get_connection() as connection:
        connection.execute(sa.text("ALTER INDEX embeddings_ivfflat_idx SET (lists = 2)"))
    assert not ask(begin(), "index_is_fresh").passed
    monkeypatch.setattr(Capacity, "fit_lists", lambda *_: (2, "there is no memory for more"))
    assert ask(begin(), "index_is_fresh").passed


@pytest.mark.parametrize(
    ("expected", "billed", "passed"),
    [(10**5, 124_000, True), (10**5, 126_000, False), (10**5, 70_000, False), (9_999, 20_000, True)],
)
def test_the_bill_is_compared_with_the_estimate(
    begin: Callable[..., Pipeline], expected: int, billed: int, passed: bool
) -> None:
    pipeline = begin()
    with pipeline.database.get_connection() as connection:
        fact = {"n_tokens_expected": expected, "n_tokens": billed, "bytes_per_token": 4.0}
        write_value(connection, SPENDING, fact)
    assert ask(pipeline, "billed_as_estimated").passed == passed


def embed_cyrillic(pipeline: Pipeline, songs: Callable[..., None], song_id: int) -> Pipeline:
    """Embed a song's worth of tokens that the first estimate takes for twice as many."""
    songs(
        *((song_id + n, f"Песня {song_id + n}", "Анна", f"ля{'абвгдежзийклмнопрстуфхцч'[n]} " * 700) for n in range(20))
    )
    run_all(pipeline)
    return pipeline


def test_a_first_run_does_not_fail_for_want_of_experience_but_a_later_one_may(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    first = embed_cyrillic(make_pipeline(database, provider, tmp_path), songs, 1)
    finding = ask(first, "billed_as_estimated")
    assert (finding.passed, "needs experience" in finding.message) == (True, True)
    assert abs(finding.figures["billed / estimated"] - 1) > 0.25, "nothing was to be forgiven"
    with database.get_connection() as connection:
        write_value(connection, f"bytes per token of {first.settings.model}", 1.0)
    later = embed_cyrillic(make_pipeline(database, provider, tmp_path), songs, 101)
    finding = ask(later, "billed_as_estimated")
    assert (finding.passed, "needs experience" in finding.message) == (False, False)


@pytest.fixture
def own_server() -> Iterator[Provider]:
    with running_provider(api_key="none") as running:
        yield running


def test_a_server_of_ones_own_without_a_key_costs_nothing(
    database: Database, own_server: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    def begin(**settings: object) -> Pipeline:
        return make_pipeline(database, own_server, tmp_path, fireworks_api_key=None, **settings)

    pipeline = embed_cyrillic(begin(max_usd=0.0, max_usd_a_month=0.0), songs, 1)
    assert (pipeline.estimate(reembed=True).usd, pipeline.month_spending().billed) == (0.0, 0.0)
    assert pipeline.status().month.billed == 0.0
    found = begin().verify()
    assert {name: finding.message for name, finding in found.items() if not finding.passed} == {}
    with pytest.raises(BudgetExceededError):
        embed_cyrillic(begin(usd_per_million_tokens=0.5, max_usd=0.0), songs, 101)


@pytest.mark.parametrize(
    ("environment", "price"),
    [
        ({}, 0.1),
        ({"FIREWORKS_API_KEY": "fw_1"}, 0.1),
        ({"FIREWORKS_BASE_URL": "http://localhost/v1"}, 0.0),
        ({"FIREWORKS_BASE_URL": "http://localhost/v1", "FIREWORKS_API_KEY": "k"}, 0.1),
        ({"FIREWORKS_BASE_URL": "http://localhost/v1", "SONGVEC_USD_PER_MILLION_TOKENS": "0.3"}, 0.3),
        ({"FIREWORKS_API_KEY": "fw_1", "SONGVEC_USD_PER_MILLION_TOKENS": "0"}, 0.0),
    ],
)
def test_the_price_is_what_is_set_else_that_of_who_sends_a_bill(environment: dict[str, str], price: float) -> None:
    assert Settings(**environment).price == price


@pytest.mark.parametrize(
    ("price", "bytes_per_token", "passed"), [(0.1, 4.0, True), (100.0, 4.0, False), (0.1, 0.2, False), (0.0, 0.2, True)]
)
def test_a_price_that_no_provider_has_is_named(
    begin: Callable[..., Pipeline], price: float, bytes_per_token: float, passed: bool
) -> None:
    pipeline = begin(usd_per_million_tokens=price)
    with pipeline.database.get_connection() as connection:
        write_value(connection, SPENDING, {"n_tokens_expected": 9, "n_tokens": 9, "bytes_per_token": bytes_per_token})
    assert ask(pipeline, "price_is_sane").passed == passed


def read_coverage(pipeline: Pipeline) -> list[tuple[int, ...]]:
    return pipeline.read_inventory(with_source=False).coverage.drop("key").rows()


def test_coverage_counts_each_song_once_as_status_does(begin: Callable[..., Pipeline]) -> None:
    url = begin().database.adbc_uri
    unname_songs(url)
    execute(url, "INSERT INTO songs SELECT n, 'New', 'Ann', 'la ' || n FROM generate_series(110, 119) AS n")
    begin().export()
    pipeline = begin()
    first, second = read_coverage(pipeline)
    assert [sum(first), sum(second)] == pipeline.status().ranges["n_songs"].to_list() == [40, 10]
    assert second == (0, 0, 0, 10), "loaded, cached, rejected, missing"
    pipeline.filler().fill_ranges(list(pipeline.tiling), lambda _: None)
    first, second = read_coverage(begin())
    assert first == (40, 0, 0, 0), "a song that is loaded counts as that until the next load"
    assert second == (0, 10, 0, 0)
    begin().load()
    assert read_coverage(begin()) == [(37, 0, 3, 0), (10, 0, 0, 0)]


def test_ranges_behind_are_those_whose_songs_changed(begin: Callable[..., Pipeline]) -> None:
    assert begin().read_inventory(with_table=False, with_source=False).behind == []
    execute(begin().database.adbc_uri, "INSERT INTO songs VALUES (150, 'New', 'Ann', 'la')")
    begin().export()
    assert [each.key for each in begin().read_inventory(with_table=False, with_source=False).behind] == [
        "000000100-000000200"
    ]
    rendered = begin()
    rendered.settings = rendered.settings.model_copy(update={"max_text_chars": 5})
    assert len(rendered.read_inventory(with_table=False, with_source=False).behind) == 2, (
        "another way of rendering changes them all"
    )


def test_songs_that_are_not_exported_yet_are_missing(
    database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path
) -> None:
    songs(*((song_id, f"Song {song_id}", "Ann", "la") for song_id in (1, 2, 3, 150, 5_000)))

    def look() -> dict[str, tuple[int, int, int]]:
        status = make_pipeline(database, provider, tmp_path).status()
        rows = [*status.ranges.iter_rows(named=True), status.total]
        return {each["key"]: (each["n_songs"], each["n_unexported"], each["n_missing"]) for each in rows}

    first, second, tail = "000000000-000000100", "000000100-000000200", "000001000-max"
    assert look() == {first: (0, 3, 3), second: (0, 1, 1), tail: (0, 1, 1), "all": (0, 5, 5)}
    finding = ask(make_pipeline(database, provider, tmp_path), "coverage")
    assert (finding.passed, finding.figures["missing"], finding.figures["songs"]) == (False, 5, 5)
    execute(database.adbc_uri, "DELETE FROM songs WHERE id > 100")
    run_all(make_pipeline(database, provider, tmp_path))
    assert look() == {first: (3, 0, 0), "all": (3, 0, 0)}
    songs((4, "New", "Ann", "la"), (150, "Song 150", "Ann", "la"))
    assert look() == {first: (3, 1, 1), second: (0, 1, 1), "all": (3, 2, 2)}
    execute(database.adbc_uri, "DELETE FROM songs WHERE id < 3")
    assert look() == {first: (3, 0, 0), second: (0, 1, 1), "all": (3, 1, 1)}, "songs that left the source wait too"
    make_pipeline(database, provider, tmp_path).export()
    assert look() == {first: (2, 0, 1), second: (1, 0, 1), "all": (3, 0, 2)}
    execute(database.adbc_uri, "DROP TABLE songs")
    with pytest.raises(SourceError, match="this database has no table songs"):
        look()


@pytest.mark.slow
def test_the_samples_of_the_demo_are_found_unless_the_table_is_another(database: Database, tmp_path: Path) -> None:
    create_songs_table(database)
    settings = Settings(postgres_url=database.url, embedding_model=DEMO_MODEL, storage=str(tmp_path))
    pipeline = Pipeline(settings)
    pipeline.run()
    assert "not those of the demo" in ask(pipeline, "samples_are_found").message
    pipeline.database = Database(database.url, embedded=True)
    found = ask(pipeline, "samples_are_found")
    assert (found.passed, found.figures["labelled queries"]) == (True, 35)
    execute(database.url, "UPDATE song_embeddings SET embedding = (SELECT embedding FROM song_embeddings LIMIT 1)")
    found = ask(pipeline, "samples_are_found")
    assert not found.passed
    assert "`songvec evaluate` shows where" in found.message
    # with other songs beside them the figures are not those of the samples
    execute(database.url, "INSERT INTO songs (name, artist) VALUES ('Another', 'Ann')")
    assert ask(pipeline, "samples_are_found").passed
