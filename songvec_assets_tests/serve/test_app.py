"""The paths: the same songs as from Python, the command and SQL, and the same refusals."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import httpx2
import jsonschema
import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app as commands
from songvec_assets.cli import base
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.search.query import MAX_CHARS, MAX_LIMIT, Mode
from songvec_assets.serve.app import create_app
from songvec_assets_tests.administration import execute
from songvec_assets_tests.provider import Provider
from songvec_assets_tests.search.conftest import N_SONGS
from songvec_assets_tests.serve.conftest import Get, running_server

CONDITIONS = ["artist = Ann", "year in 1983, 1984, 1985, 1986"]
WHERE = [("artist", "=", "Ann"), ("year", "in", ["1983", "1984", "1985", "1986"])]


@pytest.fixture
def by_command(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the command prints as JSON."""
    monkeypatch.setattr(base, "make_searches", lambda **_: pipeline)
    return lambda *given: json.loads(CliRunner().invoke(commands, ["search", *given, "--json"]).stdout)


@pytest.mark.parametrize(
    ("mode", "conditions", "where"),
    [
        ("vector", [], []),
        ("text", [], []),
        ("hybrid", [], []),
        ("vector", CONDITIONS, WHERE),
        ("hybrid", CONDITIONS, WHERE),
    ],
)
def test_the_four_doors_agree_on_a_text(
    pipeline: Pipeline, get: Get, by_command: Callable[..., Any], mode: Mode, conditions: list[str], where: list[Any]
) -> None:
    hits = [asdict(hit) for hit in pipeline.search("song 9", 12, where, mode, explain=True)]
    assert hits
    found = get("/search", q="song 9", limit=12, mode=mode, where=conditions, explain="true").json()
    assert (found["hits"], found["mode"], found["notice"]) == (hits, mode, None)
    typed = [part for condition in conditions for part in ("--where", condition)]
    assert by_command("song 9", "-n", "12", "--mode", mode, "--explain", *typed) == hits
    vector = None if mode == "text" else json.dumps(pipeline.embed_query("song 9").tolist())
    words = None if mode == "vector" else "song 9"
    statement = "SELECT song_id, similarity FROM songvec.search(%s, 12, %s, %s)"
    rows = execute(pipeline.database.adbc_uri, statement, (vector, words, json.dumps(where)))
    assert [(hit["song_id"], pytest.approx(hit["similarity"])) for hit in hits] == rows


def test_the_four_doors_agree_on_a_song(pipeline: Pipeline, get: Get, by_command: Callable[..., Any]) -> None:
    hits = [asdict(hit) for hit in pipeline.similar_to(9, 1000)]
    assert len(hits) == N_SONGS - 1
    assert get("/similar/9", limit=1000).json()["hits"] == hits == by_command("--like", "9", "-n", "1000")
    rows = execute(pipeline.database.adbc_uri, "SELECT song_id FROM songvec.similar(9, 1000)")
    assert [song_id for (song_id,) in rows] == [hit["song_id"] for hit in hits]


BAD = [
    ("/search", {}, 400, "search.invalid"),
    ("/search", {"q": ""}, 400, "search.invalid"),
    ("/search", {"q": " \t\n", "mode": "hybrid"}, 400, "search.invalid"),
    ("/search", {"q": "\0", "mode": "text"}, 400, "search.invalid"),
    ("/search", {"q": "x" * 4001}, 400, "search.invalid"),
    ("/search", {"q": "𝄞" * 4001}, 400, "search.invalid"),
    ("/search", {"q": "sea", "limit": 0}, 400, "search.invalid"),
    ("/search", {"q": "sea", "limit": 1001}, 400, "search.invalid"),
    ("/search", {"q": "sea", "limit": "7.5"}, 400, "search.invalid"),
    ("/search", {"q": "sea", "mode": "fuzzy"}, 400, "search.invalid"),
    ("/search", {"q": "sea", "where": ["secret = x"]}, 400, "search.column"),
    ("/search", {"q": "sea", "where": ["missing = x"], "mode": "text"}, 400, "search.column"),
    ("/search", {"q": "sea", "where": ['"artist; DROP TABLE songs" = x']}, 400, "search.column"),
    ("/search", {"q": "sea", "where": ['"a"" OR ""b" = x']}, 400, "search.column"),
    ("/search", {"q": "sea", "where": ["artist LIKE x"]}, 400, "search.invalid"),
    ("/search", {"q": "sea", "where": ["year in " + ",".join(map(str, range(1001)))]}, 400, "search.invalid"),
    ("/similar/7", {"where": ["year = many"]}, 400, "search.invalid"),
    ("/similar/7", {"where": ["tags = {}"]}, 500, "database.failed"),
    (f"/similar/{N_SONGS + 1}", {}, 404, "search.unknown-song"),
    ("/similar/1000000000000", {}, 404, "search.unknown-song"),
    ("/similar/seven", {}, 400, "search.invalid"),
    ("/similar/7", {"q": "sea"}, 400, "serve.request"),
    ("/similar/", {}, 404, "serve.not-found"),
    ("/similar/7/8", {}, 404, "serve.not-found"),
    ("/search/", {"q": "sea"}, 404, "serve.not-found"),
    ("/../pyproject.toml", {}, 404, "serve.not-found"),
    ("/%2e%2e/app.py", {}, 404, "serve.not-found"),
    ("/static/page.js", {}, 404, "serve.not-found"),
]


@pytest.mark.parametrize(("path", "given", "status", "code"), BAD)
def test_bad_input_is_named_and_costs_nothing(
    get: Get, songs_provider: Provider, path: str, given: dict[str, Any], status: int, code: str
) -> None:
    n_sent = songs_provider.ledger()["requests"]
    refused = get(path, **given)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
    assert refused.headers["content-type"] == "application/json"
    assert refused.json()["error"]["message"]
    if "many" not in str(given):
        assert songs_provider.ledger()["requests"] == n_sent


@pytest.mark.parametrize("value", ["Ann' OR true --", "'; DROP TABLE songs; --", "' OR '' = '", "%"])
def test_a_value_is_only_a_value(get: Get, value: str) -> None:
    assert get("/similar/1", limit=1000, where=[f"artist = {value}"]).json()["hits"] == []
    assert get("/similar/1", limit=1000, where=[f"artist starts {value}"]).json()["hits"] == []


def test_health_says_what_is_served(get: Get, pipeline: Pipeline) -> None:
    columns = ["id", "artist", "year", "genre", "feeling", "released", "tags", "missing"]
    expected = {"status": "ok", "model": pipeline.settings.model, "dimensions": 64, "filters": columns}
    assert get("/healthz").json() == expected


def test_head_is_get_without_a_body(get: Get) -> None:
    shown = get("/page.js", "HEAD")
    assert (shown.status_code, shown.content) == (200, b"")


def test_a_server_whose_database_or_table_is_missing_starts_and_says_so(
    pipeline: Pipeline, database: Database, tmp_path: Path
) -> None:
    nowhere = type(pipeline)(pipeline.settings.model_copy(update={"postgres_url": "postgresql://127.0.0.1:1/none"}))
    with running_server(nowhere) as address:
        for path in ("/healthz", "/similar/7"):
            failed = httpx2.get(f"{address}{path}", timeout=30)
            assert (failed.status_code, failed.json()["error"]["code"]) == (503, "database.unavailable")
        assert httpx2.get(address).status_code == 200
    execute(database.adbc_uri, "CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
    empty = type(pipeline)(
        pipeline.settings.model_copy(update={"postgres_url": database.url, "storage": str(tmp_path)})
    )
    with running_server(empty) as address:
        failed = httpx2.get(f"{address}/healthz", timeout=30)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "table.not-loaded")
        assert "songvec run" in failed.json()["error"]["message"]


class TestDescription:
    """`openapi.json` is what the server does."""

    @pytest.fixture
    def described(self, get: Get) -> Iterator[dict[str, Any]]:
        yield get("/openapi.json").json()

    def check(self, described: dict[str, Any], name: str, content: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        jsonschema.validate(content, schema)

    def test_has_the_answers(self, described: dict[str, Any], get: Get) -> None:
        for found in (
            get("/search", q="sea"),
            get("/search", q="song", mode="text"),
            get("/similar/7", explain="true"),
        ):
            self.check(described, "Found", found.json())
        self.check(described, "Health", get("/healthz").json())
        self.check(described, "Error", get("/nothing").json())

    def test_has_the_paths_and_limits(self, described: dict[str, Any], pipeline: Pipeline) -> None:
        routes = {route.path for route in create_app(pipeline).app.routes}
        assert {*described["paths"]} == {route for route in routes if "." not in route and route != "/"}
        search = {each["name"]: each["schema"] for each in described["paths"]["/search"]["get"]["parameters"]}
        assert [*search] == ["q", "limit", "mode", "where", "explain"]
        assert (search["q"]["maxLength"], search["limit"]["maximum"]) == (MAX_CHARS, MAX_LIMIT)
        assert search["mode"]["enum"] == [*get_args(Mode)]


def test_songs_without_vectors_have_no_similarity(get: Get, pipeline: Pipeline) -> None:
    [hit] = pipeline.search("song 7", 1, mode="text")
    assert get("/search", q="song 7", limit=1, mode="text").json()["hits"] == [asdict(replace(hit, similarity=None))]
