"""Every setting by its variable: default, good and bad values; what contradicts; what stays secret."""

import os
import re
import traceback
from pathlib import Path
from unittest import mock

import pytest

from songvec_assets.cli.render import settings_table
from songvec_assets.errors import SettingsError
from songvec_assets.pipeline import Pipeline
from songvec_assets.settings import (
    DEMO_DIMENSIONS,
    DEMO_MODEL,
    FIREWORKS_BASE_URL,
    FIREWORKS_MODEL,
    GROUPS,
    OFFLINE_MODEL,
    GraphSettings,
    ProviderSettings,
    RunSettings,
    Settings,
    variables,
)
from songvec_assets.settings_group import variable
from songvec_assets.songs.ranges import Tiling

README = Path(__file__).parents[1] / "README.md"
BASE = {"POSTGRES_URL": "postgresql://ann:geheim@db/songs", "FIREWORKS_API_KEY": "fw_secret"}

# variable: field, default, good values and what they parse to
GOOD = {
    "POSTGRES_URL": ("postgres_url", None, {"postgresql://x@y/z": "postgresql://x@y/z"}),
    "SONGVEC_DIRECT_URL": ("direct_url", None, {"postgresql://x@y/z": "postgresql://x@y/z"}),
    "SONGVEC_SONGS_TABLE": ("songs_table", "songs", {"music.tracks": "music.tracks"}),
    "SONGVEC_SONG_ID_COLUMN": ("song_id_column", None, {"track_id": "track_id"}),
    "SONGVEC_NAME_COLUMN": ("name_column", "name", {"title": "title"}),
    "SONGVEC_ARTIST_COLUMN": ("artist_column", "artist", {"band": "band"}),
    "SONGVEC_LYRICS_COLUMN": ("lyrics_column", "lyrics", {"words": "words"}),
    "SONGVEC_UPDATED_AT_COLUMN": ("updated_at_column", None, {"changed": "changed"}),
    "SONGVEC_FULL_COMPARE_HOURS": ("full_compare_hours", 24.0, {"0": 0.0, "168": 168.0}),
    "SONGVEC_MAX_MISSING_SHARE": ("max_missing_share", 0.1, {"1": 1.0, "0.02": 0.02}),
    "SONGVEC_MAX_MISSING_RANGE_SHARE": ("max_missing_range_share", 0.5, {"1": 1.0, "0.2": 0.2}),
    "SONGVEC_FILTER_COLUMNS": ("filter_columns", None, {"artist, year": "artist, year"}),
    "SONGVEC_VECTOR_TYPE": ("vector_type", "vector", {"vector": "vector", "halfvec": "halfvec"}),
    "SONGVEC_INDEX_KIND": ("index_kind", "ivfflat", {"hnsw_bit": "hnsw_bit"}),
    "SONGVEC_LISTS": ("lists", None, {"1": 1, "32768": 32_768}),
    "SONGVEC_INDEX_MEMORY_MB": ("index_memory_mb", None, {"64": 64}),
    "FIREWORKS_API_KEY": ("fireworks_api_key", None, {" fw_1 ": "fw_1"}),
    "FIREWORKS_BASE_URL": ("fireworks_base_url", FIREWORKS_BASE_URL, {"http://localhost:8000/v1": "http://localhost:8000/v1"}),
    "SONGVEC_EMBEDDING_MODEL": ("embedding_model", FIREWORKS_MODEL, {"nomic": "nomic", OFFLINE_MODEL: OFFLINE_MODEL}),
    "SONGVEC_MODEL_ID": ("model_id", None, {"fireworks/qwen3-embedding-8b": "fireworks/qwen3-embedding-8b"}),
    "SONGVEC_EMBEDDING_DIMENSIONS": ("embedding_dimensions", 2000, {"2": 2, "2000": 2000}),
    "SONGVEC_QUERY_PROMPT": ("query_prompt", None, {r"to\n{query}": "to\n{query}", "None": "{query}"}),
    "SONGVEC_DOCUMENT_PROMPT": ("document_prompt", None, {"passage: {text}": "passage: {text}", "none": "{text}"}),
    "SONGVEC_TRUNCATE": ("truncate", None, {"yes": True, "true": True, "no": False, "False": False}),
    "SONGVEC_REQUESTS_PER_MINUTE": ("requests_per_minute", 6000, {"1": 1, " 10 ": 10}),
    "SONGVEC_TOKENS_PER_MINUTE": ("tokens_per_minute", 900_000, {"5400000": 5_400_000}),
    "SONGVEC_MAX_REQUEST_TEXTS": ("max_request_texts", 2048, {"1": 1, "2048": 2048}),
    "SONGVEC_MAX_REQUEST_TOKENS": ("max_request_tokens", 100_000, {"1": 1}),
    "SONGVEC_PATIENCE_S": ("patience_s", 600.0, {"0": 0.0, "1.5": 1.5}),
    "SONGVEC_USD_PER_MILLION_TOKENS": ("usd_per_million_tokens", None, {"0": 0.0, "0.2": 0.2}),
    "SONGVEC_STORAGE": ("storage", None, {"/data/songs": "/data/songs"}),
    "SONGVEC_RETENTION_DAYS": ("retention_days", 30.0, {"0": 0.0, "365": 365.0}),
    "SONGVEC_TEXT_TEMPLATE": ("text_template", "{name} by {artist}\n{lyrics}", {r"a\n{name}": "a\n{name}"}),
    "SONGVEC_MAX_TEXT_CHARS": ("max_text_chars", 24_000, {"1": 1, "1000000": 1_000_000}),
    "SONGVEC_MAX_USD": ("max_usd", None, {"0": 0.0, "12.34": 12.34}),
    "SONGVEC_MAX_USD_A_MONTH": ("max_usd_a_month", None, {"0": 0.0, "480": 480.0}),
    "SONGVEC_CONCURRENCY": ("concurrency", 32, {"1": 1, "1000": 1000}),
    "SONGVEC_TARGET_RECALL": ("target_recall", 0.95, {"1": 1.0, "0.9": 0.9}),
    "SONGVEC_EVALUATION_QUERIES": ("evaluation_queries", None, {"queries.tsv": "queries.tsv"}),
    "SONGVEC_METRICS_TEXTFILE": ("metrics_textfile", None, {"/x/songvec.prom": "/x/songvec.prom"}),
    "SONGVEC_SWAP": ("swap", False, {"yes": True, "True": True, "no": False, "false": False}),
    "SONGVEC_WEBHOOK_URL": ("webhook_url", None, {"https://x.example/hook": "https://x.example/hook"}),
    "SONGVEC_SONG_ID_START": ("song_id_start", 0, {"0": 0, "1500000000": 1_500_000_000}),
    "SONGVEC_SONG_ID_STOP": ("song_id_stop", 16_000_000, {"50000": 50_000, "2147483648": 2**31}),
    "SONGVEC_RANGE_SIZE": ("range_size", 50_000, {"1": 1, "1000000": 1_000_000}),
    "SONGVEC_RANGES_PER_RUN": ("ranges_per_run", None, {"1": 1}),
    "SONGVEC_MAX_SEARCH_USD_A_MONTH": ("max_search_usd_a_month", None, {"0": 0.0, "3.5": 3.5}),
    "SONGVEC_SERVE_TOKEN_FILE": ("serve_token_file", None, {"/run/token": "/run/token"}),
    "SONGVEC_SERVE_HOSTS": ("serve_hosts", None, {"songs.example": "songs.example"}),
    "SONGVEC_SERVE_REQUESTS_PER_MINUTE": ("serve_requests_per_minute", 1200, {"1": 1}),
}  # fmt: skip

NOT_WHOLE = ["0", "-1", "1.5", "many", "1e3", "inf", "nan"]
NOT_A_NUMBER = ["-0.01", "many", "inf", "nan", "1,5"]
TOO_HIGH = {
    "SONGVEC_EMBEDDING_DIMENSIONS": "4001",
    "SONGVEC_REQUESTS_PER_MINUTE": "2147483648",
    "SONGVEC_TOKENS_PER_MINUTE": "2147483648",
    "SONGVEC_MAX_REQUEST_TEXTS": "2049",
    "SONGVEC_MAX_REQUEST_TOKENS": "2147483648",
    "SONGVEC_CONCURRENCY": "1001",
    "SONGVEC_MAX_TEXT_CHARS": "1000001",
    "SONGVEC_LISTS": "32769",
    "SONGVEC_INDEX_MEMORY_MB": "2147483648",
    "SONGVEC_SONG_ID_STOP": "2147483649",
    "SONGVEC_RANGE_SIZE": "1000001",
    "SONGVEC_RANGES_PER_RUN": "1000001",
    "SONGVEC_SERVE_REQUESTS_PER_MINUTE": "2147483648",
}
BAD = (
    [(variable, value) for variable, highest in TOO_HIGH.items() for value in [*NOT_WHOLE, highest]]
    + [
        (variable, value)
        for variable in ("SONGVEC_PATIENCE_S", "SONGVEC_MAX_USD", "SONGVEC_USD_PER_MILLION_TOKENS")
        for value in NOT_A_NUMBER
    ]
    + [("SONGVEC_INDEX_KIND", value) for value in ("hnsw", "IVFFlat")]
    + [("SONGVEC_VECTOR_TYPE", value) for value in ("bit", "Vector", "vector(3)")]
    + [
        (variable, value)
        for variable in ("SONGVEC_TARGET_RECALL", "SONGVEC_MAX_MISSING_SHARE", "SONGVEC_MAX_MISSING_RANGE_SHARE")
        for value in ("0", "1.01", "95", "nan", "most")
    ]
    + [
        (variable, value)
        for variable in ("SONGVEC_FULL_COMPARE_HOURS", "SONGVEC_RETENTION_DAYS")
        for value in NOT_A_NUMBER
    ]
    + [("SONGVEC_SONG_ID_START", value) for value in ("-1", "2147483648", "many")]
    + [(variable, value) for variable in ("SONGVEC_SWAP", "SONGVEC_TRUNCATE") for value in ("2", "perhaps")]
    + [("SONGVEC_QUERY_PROMPT", value) for value in ("query:", "{text}", "{query} or {query}")]
    + [("SONGVEC_DOCUMENT_PROMPT", value) for value in ("passage:", "{query}", "{name}")]
    + [("SONGVEC_MODEL_ID", value) for value in (DEMO_MODEL, OFFLINE_MODEL)]
    + [("SONGVEC_EMBEDDING_DIMENSIONS", value) for value in ("1", "2001")]
    + [("FIREWORKS_BASE_URL", value) for value in ("ftp://x/v1", "localhost:8000", "api.fireworks.ai/inference/v1")]
    + [("FIREWORKS_BASE_URL", value) for value in ("http://:8000/v1", "http://x:99999/v1")]
)


def read(**environment):
    """Settings of an environment that holds these variables."""
    with mock.patch.dict(os.environ, environment):
        return Settings()


def test_every_variable_is_tested_here():
    assert list(GOOD) == [variable(name) for group in GROUPS for name in group.model_fields]
    assert {field for field, _, _ in GOOD.values()} == set(Settings.model_fields)


@pytest.mark.parametrize("variable", GOOD)
def test_an_unset_variable_has_its_default(variable):
    field, default, _ = GOOD[variable]
    assert getattr(read(), field) == default
    assert type(getattr(read(), field)) is type(default)
    for blank in ("", "  "):
        assert getattr(read(**{variable: blank}), field) == default


@pytest.mark.parametrize(
    ("variable", "value", "parsed"),
    [(variable, value, parsed) for variable, (_, _, good) in GOOD.items() for value, parsed in good.items()],
)
def test_a_good_value_is_parsed(variable, value, parsed):
    settings = read(**{**BASE, variable: value})
    field = GOOD[variable][0]
    assert getattr(settings, field) == parsed
    assert type(getattr(settings, field)) is type(parsed)
    untouched = {each: getattr(settings, each) for each, _, _ in GOOD.values() if each != field}
    assert untouched == {each: getattr(read(**BASE), each) for each in untouched}


@pytest.mark.parametrize(("variable", "value"), BAD)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(variable, value):
    with pytest.raises(SettingsError, match=variable) as refusal:
        read(**{**BASE, variable: value})
    assert value in str(refusal.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SONGVEC_MAX_REQUEST_TEXTS", "2049", "expected a number less than or equal to 2048, got '2049'"),
        ("SONGVEC_LISTS", "many", "expected a valid integer, unable to parse string as an integer, got 'many'"),
        ("SONGVEC_MAX_USD", "-1", "expected a number greater than or equal to 0, got '-1'"),
        ("SONGVEC_MAX_USD", "inf", "expected a finite number, got 'inf'"),
        ("SONGVEC_VECTOR_TYPE", "bit", "expected 'vector' or 'halfvec', got 'bit'"),
        ("SONGVEC_SWAP", "perhaps", "expected a valid boolean, unable to interpret input, got 'perhaps'"),
        ("SONGVEC_METRICS_TEXTFILE", "/x", "expected a file whose name ends in .prom: others are not read, got '/x'"),
        ("SONGVEC_QUERY_PROMPT", "a\nb", r"expected a text that contains {query} once, or none, got 'a\nb'"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_that_says_what_was_expected(variable, value, words):
    with pytest.raises(SettingsError) as refusal:
        read(**{variable: value})
    assert str(refusal.value) == f"{variable}: {words}"


def test_over_2000_dimensions_need_halfvec():
    settings = read(**BASE, SONGVEC_EMBEDDING_DIMENSIONS="4000", SONGVEC_VECTOR_TYPE="halfvec")
    assert settings.embedding_dimensions == settings.dimensions == 4000
    with pytest.raises(SettingsError, match="SONGVEC_VECTOR_TYPE=halfvec"):
        read(SONGVEC_EMBEDDING_DIMENSIONS="2001")


def test_the_demos_model_has_its_own_dimensions():
    assert read().dimensions == read(SONGVEC_EMBEDDING_DIMENSIONS=str(DEMO_DIMENSIONS)).dimensions == DEMO_DIMENSIONS
    with pytest.raises(SettingsError, match=f"{DEMO_MODEL}.*512 values.*SONGVEC_EMBEDDING_DIMENSIONS is 64"):
        read(SONGVEC_EMBEDDING_DIMENSIONS="64")
    assert read(SONGVEC_EMBEDDING_DIMENSIONS="64", SONGVEC_EMBEDDING_MODEL=OFFLINE_MODEL).dimensions == 64


@pytest.mark.parametrize(
    ("environment", "model"),
    [
        ({}, DEMO_MODEL),
        ({"FIREWORKS_API_KEY": "fw_1"}, FIREWORKS_MODEL),
        (BASE, FIREWORKS_MODEL),
        ({"FIREWORKS_BASE_URL": "http://localhost/v1"}, FIREWORKS_MODEL),
        ({"FIREWORKS_BASE_URL": "http://localhost/v1", "POSTGRES_URL": "postgresql://x/y"}, FIREWORKS_MODEL),
        ({**BASE, "SONGVEC_EMBEDDING_MODEL": OFFLINE_MODEL}, OFFLINE_MODEL),
        ({"SONGVEC_EMBEDDING_MODEL": OFFLINE_MODEL}, OFFLINE_MODEL),
        ({"POSTGRES_URL": "postgresql://x/y", "SONGVEC_EMBEDDING_MODEL": DEMO_MODEL}, DEMO_MODEL),
        ({"POSTGRES_URL": "postgresql://x/y", "SONGVEC_EMBEDDING_MODEL": OFFLINE_MODEL}, OFFLINE_MODEL),
    ],
)
def test_vectors_are_made_here_only_if_nothing_is_configured_or_a_local_model_is_asked_for_by_name(environment, model):
    settings = read(**environment)
    assert settings.model == model
    assert settings.offline is (model != FIREWORKS_MODEL)


def test_the_model_id_names_the_vectors_and_the_providers_name_the_requests():
    given = {"SONGVEC_EMBEDDING_MODEL": "Qwen/Qwen3-Embedding-8B", "SONGVEC_MODEL_ID": FIREWORKS_MODEL}
    assert read(**BASE, **given).model == FIREWORKS_MODEL
    assert read(**given).model == DEMO_MODEL, "a local model's vectors never get another's name"


def test_a_url_without_a_key_is_refused_with_every_way_out():
    with pytest.raises(SettingsError) as refusal:
        read(POSTGRES_URL=BASE["POSTGRES_URL"])
    for way_out in ("FIREWORKS_API_KEY", ".env", "FIREWORKS_BASE_URL", f"SONGVEC_EMBEDDING_MODEL={DEMO_MODEL}"):
        assert way_out in str(refusal.value)


def test_a_given_value_replaces_its_variable_unless_it_is_none_or_empty():
    with mock.patch.dict(os.environ, {"SONGVEC_CONCURRENCY": "8", "SONGVEC_MAX_USD": "3", "SONGVEC_STORAGE": "/data"}):
        settings = Settings(concurrency=2, max_usd=None, storage="")
    assert (settings.concurrency, settings.max_usd, settings.storage) == (2, 3.0, "/data")


def test_a_given_value_is_checked_like_a_variable():
    with pytest.raises(SettingsError, match="SONGVEC_EMBEDDING_DIMENSIONS is 3000"):
        Settings(embedding_dimensions=3000)
    with pytest.raises(SettingsError, match=r"SONGVEC_CONCURRENCY: expected .* got 0"):
        Settings(concurrency=0)
    with pytest.raises(TypeError, match="no setting for SONGVEC_CONCURENCY"):
        Settings(concurency=2)


def test_a_variable_has_one_spelling():
    assert read(songvec_concurrency="5", SONGVEC_concurrency="5", concurrency="5").concurrency == 32


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Settings().concurrency = 5


def test_a_group_is_read_without_the_others():
    with mock.patch.dict(os.environ, {"SONGVEC_CONCURRENCY": "many", "SONGVEC_RANGE_SIZE": "100"}):
        assert GraphSettings().range_size == 100
        assert ProviderSettings().embedding_model == FIREWORKS_MODEL
        with pytest.raises(SettingsError, match="SONGVEC_CONCURRENCY"):
            RunSettings()


SECRETS = ("geheim", "fw_secret")


def test_no_secret_is_in_the_repr():
    settings = read(**BASE)
    assert (settings.postgres_url, settings.fireworks_api_key) == tuple(BASE.values())
    for text in (repr(settings), str(settings), f"{settings}"):
        assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    "environment",
    [
        {"FIREWORKS_API_KEY": ""},
        {"FIREWORKS_API_KEY": "fw_secret fw_secret"},
        {"FIREWORKS_API_KEY": "“fw_secret”"},
        {"FIREWORKS_BASE_URL": "ftp://x"},
        {"FIREWORKS_BASE_URL": "https://ann:geheim@host/v1"},
        {"FIREWORKS_BASE_URL": "https://host/v1?key=geheim"},
        {"SONGVEC_EMBEDDING_DIMENSIONS": "3000"},
        {"SONGVEC_CONCURRENCY": "x"},
    ],
)
def test_no_secret_is_in_a_refusal(environment):
    with pytest.raises(SettingsError) as refusal:
        read(**{**BASE, **environment})
    shown = "".join(traceback.format_exception(refusal.value))
    assert not [secret for secret in SECRETS if secret in shown]


def test_a_secret_of_the_wrong_type_is_refused_without_its_value():
    key = b"\xff" + SECRETS[1].encode()
    with pytest.raises(SettingsError) as refusal:
        Settings(fireworks_api_key=key)
    assert str(refusal.value).startswith("FIREWORKS_API_KEY: expected a valid string")
    assert "fw_secret" not in "".join(traceback.format_exception(refusal.value))


def test_the_table_has_a_row_for_every_variable():
    header, rule, *rows = settings_table().splitlines()
    assert header.startswith("| Variable | Default |")
    assert set(rule) <= set("| -")
    assert [row.split("`")[1] for row in rows] == list(GOOD)
    # a newline or a bar within a cell would end it
    assert {row.count("|") for row in rows} == {header.count("|")}
    by_variable = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert all(meaning for _, _, meaning, *_ in by_variable.values())
    assert by_variable["SONGVEC_TEXT_TEMPLATE"][1] == r"`{name} by {artist}\n{lyrics}`"
    assert by_variable["SONGVEC_MAX_USD"][1] == ""
    assert by_variable["SONGVEC_RANGE_SIZE"][1:2] + by_variable["SONGVEC_RANGE_SIZE"][3:] == [
        "`50000`",
        "when the graph loads",
        "yes",
    ]
    assert by_variable["SONGVEC_CONCURRENCY"][3:] == ["when a run starts", ""]


def test_the_readme_holds_the_table_of_all_settings():
    assert settings_table() in README.read_text(encoding="utf-8"), "put the output of `songvec settings` into README.md"


def test_the_readme_names_no_setting_that_is_none():
    named = set(re.findall(r"\bSONGVEC_[A-Z_]+[A-Z]\b", README.read_text(encoding="utf-8")))
    assert named - set(variables()) == set()


def test_how_song_ids_are_cut_follows_from_the_settings_alone() -> None:
    settings = Settings(range_size=100, song_id_start=200, song_id_stop=1_000)
    assert Pipeline(settings).tiling == Tiling(width=100, stop=1_000, start=200)
