"""Files of labelled queries: what is read, and how bad lines are named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from songvec_assets.errors import SearchError
from songvec_assets.postgres.embedded import create_songs_table
from songvec_assets.postgres.engine import Database
from songvec_assets.samples import read_sample_queries
from songvec_assets.search.labels import ALL, LabelledQuery, drop_unknown, label_samples, read_labels
from songvec_assets.settings import PostgresSettings
from songvec_assets.songs.source import find_source
from songvec_assets_tests.administration import execute

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file."""

    def put(content: str | bytes) -> Path:
        path = tmp_path / "queries.tsv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_a_line_is_a_query_its_songs_with_their_grades_and_a_slice(write: Write) -> None:
    content = (
        "\ufeffquery\tsong_ids\tslice\r\n"
        "a storm at sea\t17, 4:2 9:1\tthemes\r\n"
        "\r\n"
        "#1 Crush\t5\r\n"
        "a storm at sea\t30:4\tthemes\r\n"
        "a storm at sea\t30\ttitles\r\n"
    )
    assert read_labels(write(content)) == [
        LabelledQuery("a storm at sea", {17: 1, 4: 2, 9: 1, 30: 4}, "themes"),
        LabelledQuery("#1 Crush", {5: 1}, ALL),
        LabelledQuery("a storm at sea", {30: 1}, "titles"),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a storm", "expected song_ids after a tab, got none"),
        ("\t5", "the query is empty"),
        (f"{'x' * 4001}\t5", "expected up to 4000 characters, got 4001"),
        ("sea\tx5", "expected a song_id such as 17, or 17:2 with a grade from 1 to 4, got 'x5'"),
        ("sea\t5:0", "got '5:0'"),
        ("sea\t5:5", "got '5:5'"),
        ("sea\t5 5:2", "expected one grade per song, got two for song 5"),
        ("storm\t1:3", "expected one grade per song, got two for song 1"),
        ("sea\t5\tthemes\tmore", "expected up to 3 columns, separated by tabs, got 4"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected(write: Write, line: str, words: str) -> None:
    with pytest.raises(SearchError) as refused:
        read_labels(write(f"storm\t1\n{line}\nwave\t\n"))
    assert refused.value.code == "search.labels"
    assert f"line 2: {words}" in str(refused.value) or "line 2: expected a song_id" in str(refused.value)
    assert words in str(refused.value)
    assert "line 3: expected song_ids" in str(refused.value)
    assert "line 1" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a line per query"),
        ("query\tsong_ids\n", "expected a line per query"),
        (b"storm\t1\nna\xefve\t2\n", "line 2: expected UTF-8, got 0xef"),
        ("x\n" * 30, "line 10: expected song_ids after a tab, got none; and 20 more"),
    ],
)
def test_a_file_without_a_query_or_with_many_bad_lines(write: Write, content: str | bytes, words: str) -> None:
    with pytest.raises(SearchError, match=words):
        read_labels(write(content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"none.tsv: expected a file of labelled queries, got No such file"):
        read_labels(tmp_path / "none.tsv")


def test_unknown_songs_are_named_and_left_out(database: Database, songs: Callable[..., None]) -> None:
    songs((1, "Sea", "Ann", None), (2, "Hill", "Ben", None))
    source = find_source(database, PostgresSettings())
    queries = [LabelledQuery("sea", {1: 2, 70: 1}), LabelledQuery("sun", {71: 1})]
    kept, [note] = drop_unknown(database, source, queries)
    assert kept == [LabelledQuery("sea", {1: 2})]
    assert note == (
        "left out: 2 of 3 labelled song_ids are not in table songs (70, 71), and 1 queries that no other song answers"
    )
    assert drop_unknown(database, source, kept) == (kept, [])
    with pytest.raises(SearchError, match="expected song_ids of its column id"):
        drop_unknown(database, source, queries[1:])


def test_the_sample_catalogue_has_labelled_queries_whatever_its_song_ids(database: Database) -> None:
    create_songs_table(database, 50_000)
    source = find_source(database, PostgresSettings())
    labelled = label_samples(database, source)
    assert labelled is not None
    assert len(labelled) == read_sample_queries().select("slice", "query").n_unique()
    storm = next(query for query in labelled if query.words == "storm at sea")
    names = execute(database.url, "SELECT name FROM songs WHERE id = ANY (%s)", ([*storm.grades],))
    assert ("Nine Feet Over the Harbour Wall",) in names
    execute(database.url, "INSERT INTO songs (name, artist) VALUES ('Another', 'Ann')")
    assert label_samples(database, source) is None
