"""Python, the command and SQL: the same songs, under conditions and limits, and clear refusals."""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from importlib import resources
from typing import Any

import numpy as np
import psycopg2
import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app, base
from songvec_assets.errors import SearchError, SongvecError
from songvec_assets.pipeline import Pipeline
from songvec_assets.search.query import Query, parse_condition
from songvec_assets.vectors.swap import drop_others
from songvec_assets_tests.administration import execute, wait_until
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.search.conftest import N_SONGS

Ask = Callable[..., list[tuple[Any, ...]]]


def as_literal(vector: np.ndarray) -> str:
    return json.dumps(vector.tolist())


@pytest.fixture
def in_sql(pipeline: Pipeline) -> Ask:
    """Runs a statement in a new session."""
    return lambda statement, *parameters: execute(pipeline.database.adbc_uri, statement, parameters)


@pytest.fixture
def by_command(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the command prints as JSON; or, if it fails, its error."""
    monkeypatch.setattr(base, "make_searches", lambda **_: pipeline)

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["search", *arguments, "--json"])
        return json.loads(result.stdout) if result.exit_code == 0 else result.exception

    return run


WHERE = [("artist", "=", "Ann"), ("year", "in", [1983, 1984, 1985, 1986])]
FILTER = json.dumps(WHERE)
TYPED = ("--where", "artist = Ann", "--where", "year in 1983, 1984,1985,1986")


class TestTheDoorsAgree:
    """On the songs, their order and their similarity."""

    def test_on_a_text(self, pipeline: Pipeline, in_sql: Ask, by_command: Callable[..., Any]) -> None:
        hits = pipeline.search("a storm", 3, WHERE)
        assert len(hits) == 3
        vector = as_literal(pipeline.embed_query("a storm"))
        rows = in_sql("SELECT song_id, similarity FROM songvec.search(%s, 3, NULL, %s)", vector, FILTER)
        assert [(hit.song_id, pytest.approx(hit.similarity)) for hit in hits] == rows
        printed = by_command("a storm", "-n", "3", *TYPED)
        assert [(each["song_id"], each["name"]) for each in printed] == [(hit.song_id, hit.name) for hit in hits]

    def test_on_a_song(self, pipeline: Pipeline, in_sql: Ask, by_command: Callable[..., Any]) -> None:
        hits = pipeline.similar_to(9, 1000)
        assert len(hits) == N_SONGS - 1
        assert 9 not in {hit.song_id for hit in hits}
        assert pipeline.search(9, 1000) == hits
        assert [each["song_id"] for each in by_command("--like", "9", "-n", "1000")] == [hit.song_id for hit in hits]
        rows = in_sql("SELECT song_id FROM songvec.similar(9, 1000)")
        assert [song_id for (song_id,) in rows] == [hit.song_id for hit in hits]

    def test_on_a_vector_and_words(self, pipeline: Pipeline, in_sql: Ask, by_command: Callable[..., Any]) -> None:
        hits = pipeline.search("song 9", 12, mode="hybrid", explain=True)
        assert (hits[0].song_id, hits[0].name) == (9, "Song 9")
        assert "1. matching" in hits[0].explanation
        vector = as_literal(pipeline.embed_query("song 9"))
        rows = in_sql("SELECT song_id FROM songvec.search(%s, 12, 'song 9')", vector)
        assert [song_id for (song_id,) in rows] == [hit.song_id for hit in hits]
        printed = by_command("song 9", "-n", "12", "--mode", "hybrid", "--explain")
        assert [(each["song_id"], each["explanation"]) for each in printed] == [
            (hit.song_id, hit.explanation) for hit in hits
        ]

    def test_on_words(self, pipeline: Pipeline, in_sql: Ask, songs_provider: Provider) -> None:
        n_sent = songs_provider.ledger()["requests"]
        hits = pipeline.search("ann song", 1000, mode="text")
        assert songs_provider.ledger()["requests"] == n_sent
        assert {hit.artist for hit in hits} == {"Ann"}
        assert [hit.similarity for hit in hits] == [None] * (N_SONGS // 3)
        rows = in_sql("SELECT song_id FROM songvec.search(NULL, 1000, 'ann song')")
        assert [song_id for (song_id,) in rows] == [hit.song_id for hit in hits]

    def test_from_an_event_loop(self, pipeline: Pipeline) -> None:
        hits = asyncio.run(asyncio.to_thread(pipeline.search, "a storm"))  # type: ignore[arg-type]
        assert hits == pipeline.search("a storm")


class TestConditions:
    """Each by arithmetic of its own, in Python, through the index."""

    @pytest.mark.parametrize(
        ("condition", "wanted"),
        [
            (("artist", "=", "Ann"), lambda n: n % 3 == 0),
            (("artist", "<>", "Ann"), lambda n: n % 3 != 0),
            (("year", "<", 1982), lambda n: n % 20 < 2),
            (("year", "<=", "1982"), lambda n: n % 20 <= 2),
            (("year", ">", 1997), lambda n: n % 20 > 17),
            (("year", ">=", 1997.0), None),
            (("released", ">=", date(2020, 2, 20)), lambda n: n >= 50),
            (("feeling", "=", "high"), lambda n: n % 2 == 1),
            (("feeling", "in", ("high", "low")), lambda _: True),
            (("year", "in", [1981, 1982]), lambda n: n % 20 in (1, 2)),
            (("year", "in", []), lambda _: False),
            (("id", "in", [*range(1, 1001)]), lambda _: True),
            (("id", "<>", 7), lambda n: n != 7),
            (("genre", "=", "folksong"), lambda _: False),
            (("genre", "in", ["folksong", "jazz"]), lambda n: n % 2 == 1),
            (("artist", "contains", "%_c"), lambda n: n % 3 == 2),
            (("artist", "contains", "_"), lambda n: n % 3 == 2),
            (("artist", "contains", "\\"), lambda _: False),
            (("artist", "starts", "100"), lambda n: n % 3 == 2),
            (("artist", "starts", "%"), lambda _: False),
            (("artist", "=", "Ann' OR true --"), lambda _: False),
            (("artist", "=", "'; DROP TABLE songs; --"), lambda _: False),
            (("artist", "contains", "' OR '' = '"), lambda _: False),
            (("artist", "in", ["x\"}'::text[]) OR (true", "a,b", "{Ann}"]), lambda _: False),
        ],
    )
    def test_as_many_songs_as_meet_it(
        self, pipeline: Pipeline, condition: tuple[str, str, Any], wanted: Callable[[int], bool] | None
    ) -> None:
        if wanted is None:
            with pytest.raises(SearchError, match="cannot read: invalid input syntax for type integer"):
                pipeline.similar_to(1, 1000, [condition])
            return
        expected = {n for n in range(2, N_SONGS + 1) if wanted(n)}
        assert {hit.song_id for hit in pipeline.similar_to(1, 1000, [condition])} == expected
        assert len(pipeline.similar_to(1, 3, [condition])) == min(3, len(expected))
        texts = {hit.song_id for hit in pipeline.search("song", 1000, [condition], mode="text")} - {1}
        assert texts == expected

    def test_all_of_several(self, pipeline: Pipeline) -> None:
        where = [("artist", "=", "Ann"), ("year", ">", 1990), ("year", "<", 1995)]
        found = {hit.song_id for hit in pipeline.similar_to(1, 1000, where)}
        assert found == {n for n in range(1, N_SONGS + 1) if n % 3 == 0 and 10 < n % 20 < 15}

    @pytest.mark.parametrize(
        ("typed", "condition"),
        [
            ("artist = Ann B. ", ("artist", "=", "Ann B.")),
            ("year>=1990", ("year", ">=", "1990")),
            ("year in 1, 2,3", ("year", "in", ["1", "2", "3"])),
            ('"a ""b"" c" <> =', ('a "b" c', "<>", "=")),
            ("artist contains in love", ("artist", "contains", "in love")),
            ("inner starts x", ("inner", "starts", "x")),
            ("artist = ", ("artist", "=", "")),
        ],
    )
    def test_are_typed_as_they_are_read(self, typed: str, condition: tuple[str, str, Any]) -> None:
        assert parse_condition(typed) == condition

    @pytest.mark.parametrize("typed", ["", "artist", "artist is Ann", "= Ann", "artist containsAnn"])
    def test_that_are_none_are_refused(self, typed: str) -> None:
        with pytest.raises(SearchError, match="expected a column, an operator of"):
            parse_condition(typed)


ONE = "'[1" + ",0" * 63 + "]'"
UNLISTED = [("secret", "=", "x"), ("missing", "=", "x"), ("artist; DROP TABLE songs", "=", "x"), ('a" OR "b', "=", "x")]
MISSHAPEN = [
    ("artist", "LIKE", "x"), ("artist", "= 1 OR true --", "x"), ("artist", "in", "x"), ("artist", "=", ["x"]),
    ("year", "in", [*range(1001)]), ("artist", "=", None),
]  # fmt: skip


class TestRefusals:
    """The same code from each door, before anything is paid for."""

    @pytest.mark.parametrize(
        ("query", "options", "code"),
        [
            ("", {}, "search.invalid"),
            (" \t\n", {"mode": "hybrid"}, "search.invalid"),
            ("\0", {"mode": "text"}, "search.invalid"),
            ("x" * 4001, {}, "search.invalid"),
            ("sea", {"limit": 0}, "search.invalid"),
            ("sea", {"limit": 1001}, "search.invalid"),
            ("sea", {"limit": True}, "search.invalid"),
            ("sea", {"limit": "7"}, "search.invalid"),
            ("sea", {"mode": "fuzzy"}, "search.invalid"),
            (7, {"mode": "hybrid"}, "search.invalid"),
            (10**12, {}, "search.unknown-song"),
            (N_SONGS + 1, {}, "search.unknown-song"),
            (np.full(64, np.nan), {}, "search.invalid"),
            (np.zeros(64), {}, "search.invalid"),
            (np.ones((2, 64)), {}, "search.invalid"),
            (np.ones(63), {}, "table.mismatch"),
            ("sea", {"where": ["artist = Ann"]}, "search.invalid"),
            (7, {"where": [("tags", "=", "{}")]}, "database.failed"),
            (7, {"where": [("year", "=", "many")]}, "search.invalid"),
            (7, {"where": [("feeling", "=", "mixed")]}, "search.invalid"),
            *(("sea", {"where": [each]}, "search.column") for each in UNLISTED if each[0] != "missing"),
            (7, {"where": [UNLISTED[1]]}, "search.column"),
            *(("sea", {"where": [each]}, "search.invalid") for each in MISSHAPEN[:-1]),
            (7, {"where": [MISSHAPEN[-1]]}, "search.invalid"),
        ],
    )
    def test_in_python(
        self, pipeline: Pipeline, songs_provider: Provider, query: Any, options: dict[str, Any], code: str
    ) -> None:
        n_sent = songs_provider.ledger()["requests"]
        with pytest.raises(SongvecError) as refused:
            pipeline.search(query, **options)
        assert refused.value.code == code, refused.value
        assert songs_provider.ledger()["requests"] == n_sent

    @pytest.mark.parametrize(
        ("vector", "words"),
        [
            (np.ones((2, 64)), r"^expected a 1-d vector of finite values, got shape \(2, 64\)$"),
            (np.full(64, np.nan), "got one with NaN or infinity$"),
        ],
    )
    def test_a_vector_with_words_for_what_is_wrong(self, vector: Any, words: str) -> None:
        with pytest.raises(SearchError, match=words):
            Query.of(vector, "vector")

    @pytest.mark.parametrize(
        ("call", "code"),
        [
            ("search(NULL)", "search.invalid"),
            ("search(NULL, 10, ' ')", "search.invalid"),
            (f"search({ONE}, NULL)", "search.invalid"),
            (f"search({ONE}, 0)", "search.invalid"),
            (f"search({ONE}, 1001)", "search.invalid"),
            (f"search({ONE}, 10, repeat('x', 4001))", "search.invalid"),
            (f"search({ONE.replace('1', '0')})", "search.invalid"),
            ("search('[1,2]')", "table.mismatch"),
            (f"search({ONE}, model => 'another')", "table.mismatch"),
            ("similar(1000)", "search.unknown-song"),
            ("similar(NULL)", "search.unknown-song"),
            (f"search({ONE}, filter => '7')", "search.invalid"),
            (f"search({ONE}, filter => NULL)", "search.invalid"),
            (f"search({ONE}, filter => '[7]')", "search.column"),
            *((f"search({ONE}, filter => '{json.dumps([each])}')", "search.column") for each in UNLISTED),
            *((f"search({ONE}, filter => '{json.dumps([each])}')", "search.invalid") for each in MISSHAPEN),
        ],
    )
    def test_in_sql(self, in_sql: Ask, call: str, code: str) -> None:
        with pytest.raises(psycopg2.Error) as refused:
            in_sql(f"SELECT * FROM songvec.{call}")
        assert (refused.value.pgcode, refused.value.diag.message_detail) == ("SONGV", code), refused.value

    def test_of_the_command(self, by_command: Callable[..., Any]) -> None:
        refused = by_command("sea", "--where", "secret = x")
        assert (type(refused), refused.code) == (SearchError, "search.column")
        assert by_command("", "--mode", "hybrid").code == "search.invalid"
        assert isinstance(by_command("sea", "--like", "7"), SystemExit)

    def test_leave_the_session_as_it_was(self, pipeline: Pipeline) -> None:
        with closing(psycopg2.connect(pipeline.database.adbc_uri)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT '[1]'::vector; SAVEPOINT before")
            with pytest.raises(psycopg2.Error):
                cursor.execute("""SELECT * FROM songvec.similar(1, 10, '[["year", "=", "many"]]')""")
            cursor.execute("ROLLBACK TO before; SELECT current_setting('ivfflat.iterative_scan')")
            assert cursor.fetchone() == ("off",)


def test_fifty_callers_at_once_get_what_one_gets(pipeline: Pipeline) -> None:
    expected = {song_id: pipeline.similar_to(song_id, 5) for song_id in range(1, 51)}
    ready = threading.Barrier(50)

    def call(song_id: int) -> object:
        ready.wait(30)
        return [pipeline.similar_to(song_id, 5) for _ in range(4)][-1]

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(call, expected)) == [*expected.values()]


def test_fifty_texts_at_once_are_found(pipeline: Pipeline) -> None:
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda n: pipeline.search(f"query {n}", 5), range(50)))
    assert [len(each) for each in found] == [5] * 50


def test_a_scan_that_cannot_go_on_is_repeated_over_all_lists(pipeline: Pipeline, in_sql: Ask) -> None:
    """As with pgvector 0.7, which has no setting for it."""
    migration = (resources.files("songvec_assets.postgres") / "migrations" / "0002_search.sql").read_text()
    body = migration[migration.index("CREATE OR REPLACE FUNCTION songvec.search(") :]
    body = body[: body.index("END $$;") + len("END $$;")]
    former = body.replace("songvec.search(", "public.former_search(", 1)
    former = former.replace("'{ivfflat.probes,ivfflat.iterative_scan,", "'{ivfflat.probes,ivfflat.none,")
    execute(pipeline.database.adbc_uri, former)
    try:
        vector = as_literal(pipeline.embed_query("a storm"))
        for limit in (3, 30, 100):
            rows = in_sql("SELECT * FROM public.former_search(%s, %s)", vector, limit)
            assert len(rows) == min(limit, N_SONGS)
        assert [row[0] for row in rows] == [hit.song_id for hit in pipeline.search("a storm", 100)]
        # without either it would have found what one list of eight holds
        stuck = former.replace("'32768'", "'1'").replace("former_search", "stuck_search")
        execute(pipeline.database.adbc_uri, stuck)
        assert len(in_sql("SELECT * FROM public.stuck_search(%s, 100)", vector)) < N_SONGS
    finally:
        for name in ("former_search", "stuck_search"):
            execute(pipeline.database.adbc_uri, f"DROP FUNCTION IF EXISTS public.{name}")


class TestSwaps:
    """Searches find the old table or the new one, by its model."""

    @pytest.mark.slow
    def test_a_pipeline_that_searched_before_embeds_again_by_the_new_size(self, pipeline: Pipeline) -> None:
        assert len(pipeline.search("a storm", 5)) == 5
        for dimensions in (32, 64):
            other = type(pipeline)(pipeline.settings)
            other.swap(dimensions=dimensions)
            assert len(pipeline.search("a storm", 5)) == 5
            assert pipeline.embed_query("a storm").shape == (dimensions,)
            drop_others(other.database)

    def test_a_search_that_meets_a_swap_waits_and_reads_the_new_tables_records(
        self, pipeline: Pipeline, in_sql: Ask
    ) -> None:
        url = pipeline.database.adbc_uri
        execute(url, "CREATE TABLE song_embeddings_new (LIKE song_embeddings INCLUDING ALL)")
        execute(url, "INSERT INTO song_embeddings_new SELECT * FROM song_embeddings WHERE song_id = 5")
        found: dict[str, Any] = {}
        search = f"SELECT song_id FROM songvec.search({ONE}, 10, model => %s)"

        def ask(model: str) -> None:
            try:
                found[model] = in_sql(search, model)
            except psycopg2.Error as error:
                found[model] = error.diag.message_detail

        with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute("LOCK TABLE song_embeddings, song_embeddings_new IN ACCESS EXCLUSIVE MODE")
            threads = [threading.Thread(target=ask, args=(model,)) for model in ("new", pipeline.settings.model)]
            for thread in threads:
                thread.start()
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: execute(url, waiting) == [(2,)])
            cursor.execute("""
                ALTER TABLE song_embeddings RENAME TO song_embeddings_old;
                ALTER TABLE song_embeddings_new RENAME TO song_embeddings;
                UPDATE songvec.settings SET value = value || '{"model": "new"}' WHERE key = 'table'
            """)
            connection.commit()
            for thread in threads:
                thread.join()
        assert found == {"new": [(5,)], pipeline.settings.model: "table.mismatch"}
        execute(url, "DROP TABLE song_embeddings; ALTER TABLE song_embeddings_old RENAME TO song_embeddings")
        execute(
            url,
            "UPDATE songvec.settings SET value = value || jsonb_build_object('model', %s::text) WHERE key = 'table'",
            (pipeline.settings.model,),
        )
