"""docs/search.md: each example is run as it stands, by the shell, Python or the role that the page names."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa

from songvec_assets.errors import DatabaseError, SearchError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets_tests.administration import borrow_database, dispose, execute, free_port, wait_until, with_parts
from songvec_assets_tests.conftest import TEMPLATE, environment_of, make_pipeline
from songvec_assets_tests.pooler import running_pgbouncer
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.search.conftest import N_SONGS, SONGS

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
ROLES = ("songvec_builder", "songvec_loader", "songvec_reader")


def read_examples(heading: str, language: str) -> list[str]:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, f"{heading}: no example in {language}"
    return found


@pytest.fixture
def environment(pipeline: Pipeline, songs_provider: Provider, tmp_path: Path) -> dict[str, str]:
    """The variables of the examples, with this environment's commands."""
    given = environment_of(pipeline.database, songs_provider, tmp_path) | {
        "SONGVEC_STORAGE": pipeline.settings.storage,
        "SONGVEC_FILTER_COLUMNS": "artist, year",
        "SONGVEC_RANGE_SIZE": "100",
        "SONGVEC_SONG_ID_STOP": "1000",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    return given | {"POSTGRES_URL": pipeline.database.adbc_uri}


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_python(environment: dict[str, str], tmp_path: Path) -> None:
    [example] = read_examples("From Python", "python")
    shown = run([sys.executable, "-c", f"{example}\nprint(*[hit.song_id for hit in hits])"], environment, tmp_path)
    assert len(shown.split()) == 20


def test_from_the_command_line(environment: dict[str, str], tmp_path: Path) -> None:
    [example] = read_examples("From the command line", "sh")
    shown = run(["bash", "-ec", example], environment, tmp_path)
    assert shown.count("Ann") >= 5
    assert '"explanation": "1. matching' in shown or "1. matching" in shown


@pytest.mark.skipif(not (shutil.which("psql") and shutil.which("curl")), reason="psql and curl are not installed")
def test_with_curl_and_psql(
    environment: dict[str, str], pipeline: Pipeline, songs_provider: Provider, tmp_path: Path
) -> None:
    [example] = read_examples("From SQL", "sh")
    shown = run(["bash", "-ec", example], environment, tmp_path)
    rows = [line.split("|") for line in shown.splitlines()]
    hits = pipeline.search("a storm at sea", 5)
    assert [(int(song_id), pytest.approx(float(similarity))) for song_id, similarity in rows] == [
        (hit.song_id, hit.similarity) for hit in hits
    ]
    moved = {"SONGVEC_MODEL_ID": pipeline.settings.model, "SONGVEC_EMBEDDING_MODEL": "otherwise"}
    songs_provider.control(model="otherwise")
    try:
        assert run(["bash", "-ec", example], environment | moved, tmp_path) == shown
    finally:
        songs_provider.control()


@contextlib.contextmanager
def serving(example: str, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """An example that goes on until it is ended, once it listens."""
    started = subprocess.Popen(
        ["bash", "-ec", example], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with started as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith("Serving searches on http://127.0.0.1:")
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("openssl")), reason="curl or openssl is not installed")
def test_over_http(environment: dict[str, str], pipeline: Pipeline, tmp_path: Path) -> None:
    serve, ask, open_to_others = read_examples("HTTP", "sh")
    port, other_port = str(free_port()), str(free_port())
    with serving(serve.replace("8765", port), environment, tmp_path):
        text, song, both, health = ask.replace("\\\n", "").strip().split("\n")
        found = [json.loads(run(["bash", "-ec", each.replace("8765", port)], environment, tmp_path))
                 for each in (text, song, both, health)]  # fmt: skip
    where = [("artist", "=", "Ann"), ("year", "in", ["1990", "1991"])]
    expected = (
        pipeline.search("a storm at sea", 5),
        pipeline.similar_to(7, 20),
        pipeline.search("Song 7", 10, where, "hybrid", explain=True),
    )
    assert [each["hits"] for each in found[:3]] == [[asdict(hit) for hit in hits] for hits in expected]
    assert found[3]["filters"] == ["id", "artist", "year"]
    # here on loopback: the tests open no port to others
    open_to_others = open_to_others.replace("0.0.0.0", "127.0.0.1").replace("8766", other_port)
    with serving(open_to_others, environment, tmp_path):
        assert (tmp_path / "token").stat().st_mode & 0o077 == 0
        asked = f"curl -sS -H 'Host: songs.example' http://127.0.0.1:{other_port}/similar/7"
        assert "serve.unauthorized" in run(["bash", "-ec", asked], environment, tmp_path)
        asked += ' -H "Authorization: Bearer $(cat token)"'
        assert len(json.loads(run(["bash", "-ec", asked], environment, tmp_path))["hits"]) == 10


def test_from_sql(pipeline: Pipeline) -> None:
    for example in read_examples("From SQL", "sql"):
        for statement in example.split(";\n")[:-1]:
            assert execute(pipeline.database.adbc_uri, statement), statement


def test_how_good_it_is(environment: dict[str, str], tmp_path: Path) -> None:
    [example], [content] = (read_examples("How good it is", language) for language in ("sh", "tsv"))
    (tmp_path / "queries.tsv").write_text(content)
    shown = run(["bash", "-ec", example], environment, tmp_path)
    assert "1 of 4 labelled song_ids are not in table songs (204)" in shown
    assert '"query": "whale song"' in shown


def test_the_index_of_words_is_used(pipeline: Pipeline) -> None:
    [example] = read_examples("Words, and both", "sql")
    url = pipeline.database.adbc_uri
    large = "UPDATE pg_class SET reltuples = 60000 WHERE oid = 'songs'::regclass"
    execute(url, large)
    with pytest.raises(SearchError) as refused:
        pipeline.search("song 7", mode="text")
    assert refused.value.code == "search.no-index"
    assert len(pipeline.search("song 7", 5)) == 5
    helping = re.search(r"CREATE INDEX CONCURRENTLY ON public.songs .*\)\)\)", str(refused.value))
    assert helping, refused.value
    was_scanned = "SELECT idx_scan > 0 FROM pg_stat_user_indexes WHERE indexrelname = 'songs_to_tsvector_idx'"
    for statement in (example, helping.group()):
        execute(url, statement)
        execute(url, large)
        assert [hit.song_id for hit in pipeline.search("song 7", mode="text")] == [7]
        dispose(url)  # a session's statistics are there once it has ended
        wait_until(lambda: execute(url, was_scanned) == [(True,)])
        execute(url, "DROP INDEX songs_to_tsvector_idx")
    execute(url, "ANALYZE songs")


@pytest.fixture
def as_roles(server_url: str, songs_provider: Provider, tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """A pipeline of one of the page's roles, through a pooler in transaction mode; row security is on."""
    setup, grants = read_examples("Roles", "sql")
    with borrow_database(server_url, TEMPLATE) as database:
        url = database.adbc_uri
        execute(url, "DROP SCHEMA songvec CASCADE")
        execute(url, SONGS)
        execute(url, setup.replace(':"DBNAME"', str(sa.make_url(database.url).database)))
        execute(
            url,
            """
            ALTER TABLE songs ENABLE ROW LEVEL SECURITY;
            CREATE POLICY everything ON songs TO songvec_builder, songvec_loader USING (true);
            CREATE POLICY anns ON songs TO songvec_reader USING (artist = 'Ann')
            """,
        )
        poolers = {role: running_pgbouncer(with_parts(database.url, username=role)) for role in ROLES}
        urls: dict[str, str] = {}

        def begin(role: str, direct: bool = False, **settings: object) -> Pipeline:
            if role not in urls:
                urls[role] = poolers[role].__enter__()
            past = with_parts(database.url, username=role)
            given = {"direct_url": past, "filter_columns": "artist, year"} | settings
            return make_pipeline(Database(urls[role]), songs_provider, tmp_path / "store", **given)

        try:
            begin("songvec_builder").run()
            execute(with_parts(database.url, username="songvec_builder"), grants)
            yield begin
        finally:
            for role, pooled in urls.items():
                dispose(pooled)
                dispose(with_parts(database.url, username=role))
                poolers[role].__exit__(None, None, None)
            execute(url, f"DROP OWNED BY {', '.join(ROLES)}")
            execute(url, f"DROP ROLE {', '.join(ROLES)}")


def test_each_role_does_its_part_and_no_more(as_roles: Callable[..., Pipeline]) -> None:
    builder, loader, reader = (as_roles(role) for role in ROLES)
    # the reader finds what it may see, and as many
    visible = {n for n in range(1, N_SONGS + 1) if n % 3 == 0}
    for query in ("a storm", 7):
        hits = reader.search(query, 1000)
        assert {hit.song_id for hit in hits} == visible - {query}
        assert {hit.artist for hit in hits} == {"Ann"}
    assert len(reader.search("song 9", 5, [("year", ">", 1980)], mode="hybrid")) == 5
    for _ in range(4):  # whichever session the pooler gives
        rows = execute(reader.database.url, "SELECT song_id FROM songvec.similar(7, 5)")
        assert {song_id for (song_id,) in rows} < visible
    with pytest.raises(DatabaseError) as refused:
        reader.build_index(rebuild=True)
    assert refused.value.code == "database.no-right"
    for forbidden in ("DELETE FROM song_embeddings", "UPDATE songvec.settings SET value = '1'"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            execute(reader.database.url, forbidden)
    # the loader brings a new song to what is searched
    administrator = with_parts(builder.settings.direct_url, username="postgres")
    execute(administrator, "INSERT INTO songs VALUES (99, 'Moon', 'Ann', 'a silver light')")
    loader.export()
    loader.embed()
    assert sum(each.n_written for each in loader.load().loads) == 1
    assert [hit.song_id for hit in reader.search("moon", mode="text")] == [99]
    assert 99 in {hit.song_id for hit in reader.search(3, 1000)}
    with pytest.raises(DatabaseError) as refused:
        loader.build_index(rebuild=True)
    assert refused.value.code == "database.no-right"
    # the builder swaps, and the others' rights stay
    builder.swap(dimensions=32)
    assert len(reader.search("a storm", 1000)) == len(visible) + 1
    assert len(execute(reader.database.url, "SELECT song_id FROM songvec.similar(3, 5)")) == 5
