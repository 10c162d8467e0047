"""Prompts from the settings to the server and to the table's record; and settings that would embed cached texts again.

It crosses rooms: what is sent is read from the provider's ledger, what is recorded from `songvec.settings`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from songvec_assets.cli import app, base
from songvec_assets.embedding.prompts import TASK
from songvec_assets.errors import BudgetExceededError, ReembeddingError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_value
from songvec_assets.songs.text import TextSpec
from songvec_assets.vectors.swap import roll_back
from songvec_assets.vectors.table import VectorTable
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider, running_provider

pytestmark = pytest.mark.slow

E5 = "intfloat/multilingual-e5-small"
QWEN_QUERY = f"Instruct: {TASK}\nQuery:waves"
N_SONGS = 120

Begin = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def e5_server() -> Iterator[Provider]:
    with running_provider(model=E5) as running:
        yield running


@pytest.fixture
def e5(e5_server: Provider) -> Provider:
    e5_server.control()
    e5_server.reset_ledger()
    return e5_server


@pytest.fixture
def begin(database: Database, provider: Provider, songs: Callable[..., None], tmp_path: Path) -> Begin:
    """Begins a run with some settings over one store and one database, with songs in two ranges."""
    songs(*((song_id, f"Song {song_id}", "Ann", "la la") for song_id in range(1, N_SONGS + 1)))

    def deploy_with(server: Provider = provider, **settings: object) -> Pipeline:
        return make_pipeline(database, server, tmp_path / "store", **settings)

    return deploy_with


def run_all(pipeline: Pipeline, **choices: Any) -> int:
    """Export, fill and load; the number of texts that were embedded."""
    embedded: list[int] = []
    pipeline.export()
    pipeline.filler(**choices).fill_ranges(list(pipeline.tiling), lambda report: embedded.append(report.n_embedded))
    pipeline.load()
    return sum(embedded)


def sent(provider: Provider) -> set[str]:
    """The texts that the server was given since the ledger was reset."""
    texts = {*provider.texts()} - {"probe"}
    provider.reset_ledger()
    return texts


def search(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(base, "make_searches", lambda **_: pipeline)
    result = CliRunner().invoke(app, ["search", "waves"])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_model_of_another_family_gets_its_own_prompts(
    begin: Begin, e5: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = begin(e5, embedding_model=E5)
    run_all(pipeline)
    assert sent(e5) == {f"passage: Song {song_id} by Ann\nla la" for song_id in range(1, N_SONGS + 1)}
    search(begin(e5, embedding_model=E5), monkeypatch)
    assert sent(e5) == {"query: waves"}


def test_qwen3_is_asked_as_before_and_its_songs_are_sent_as_they_are(
    begin: Begin, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(begin())
    assert "Song 7 by Ann\nla la" in sent(provider)
    search(begin(), monkeypatch)
    assert sent(provider) == {QWEN_QUERY}


def test_without_a_document_prompt_the_identity_of_texts_is_what_it_always_was() -> None:
    """What was paid for is found by it, and complete ranges are."""
    assert TextSpec().identity == "20419fec9c0101de8c0a108388842fa9"
    assert TextSpec(document_prompt="passage: {text}").identity != TextSpec().identity


def test_what_is_set_wins_and_none_is_said_by_name(begin: Begin, e5: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"embedding_model": E5, "query_prompt": "none", "document_prompt": r"song:\n{text}."}
    run_all(begin(e5, **settings))
    assert "song:\nSong 7 by Ann\nla la." in sent(e5)
    search(begin(e5, **settings), monkeypatch)
    assert sent(e5) == {"waves"}


def test_the_length_limit_counts_the_text_without_its_prompt(begin: Begin, e5: Provider) -> None:
    run_all(begin(e5, embedding_model=E5, max_text_chars=6))
    assert {text for text in sent(e5) if not text[-1].isdigit()} == set()
    assert begin(e5, embedding_model=E5, max_text_chars=6).text_spec.document_prompt == "passage: {text}"


def test_a_store_keeps_the_prompts_that_it_was_made_with(begin: Begin, e5: Provider) -> None:
    run_all(begin(e5, embedding_model=E5, document_prompt="none", query_prompt="find {query}"))
    sent(e5)
    later = begin(e5, embedding_model=E5)
    assert run_all(later) == 0
    assert (later.prompts.query, later.prompts.document) == ("find {query}", "{text}")
    assert sent(e5) == set()


def test_a_store_from_before_there_were_records_is_not_paid_for_again(begin: Begin, e5: Provider) -> None:
    first = begin(e5, embedding_model=E5, document_prompt="none")
    run_all(first)
    (first.cache.storage.root / "texts.json").unlink()
    assert run_all(begin(e5, embedding_model=E5)) == 0
    assert begin(e5, embedding_model=E5).prompts.query == "query: {query}"
    assert "passage" not in str(sent(e5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_template": "{artist}: {name}"}, "SONGVEC_TEXT_TEMPLATE was"),
        ({"document_prompt": "passage: {text}"}, "SONGVEC_DOCUMENT_PROMPT was '{text}' and is 'passage: {text}'"),
        ({"max_text_chars": 8}, "SONGVEC_MAX_TEXT_CHARS was 24000 and is 8"),
    ],
)
def test_a_setting_that_would_embed_cached_texts_again_stops_with_count_and_price_until_it_is_confirmed(
    begin: Begin, provider: Provider, settings: dict[str, object], words: str
) -> None:
    run_all(begin())
    sent(provider)
    expected = begin(**settings).estimate()
    assert (expected.n_again, expected.usd_again) == (N_SONGS, expected.usd)
    with pytest.raises(ReembeddingError) as refusal:
        run_all(begin(**settings))
    assert f"{N_SONGS:,} texts that are cached would be embedded again" in str(refusal.value)
    assert f"${expected.usd_again:,.4f}" in str(refusal.value)
    assert words in str(refusal.value)
    assert provider.ledger()["requests"] == 0, "something was paid for"
    changed = begin(**settings)
    planned = changed.dry_run([*changed.tiling]).describe()
    assert any(f"{N_SONGS} of the texts" in line and "--confirm-reembedding" in line for line in planned)
    assert run_all(begin()) == 0, "a refused run left something behind"
    assert run_all(begin(**settings), confirm_reembedding=True) == N_SONGS
    assert run_all(begin(**settings)) == 0


def test_changed_lyrics_and_new_songs_are_embedded_without_a_question(
    begin: Begin, provider: Provider, songs: Callable[..., None]
) -> None:
    run_all(begin())
    sent(provider)
    songs((7, "Song 7", "Ann", "other words"), (N_SONGS + 1, "New", "Ann", "la"))
    assert begin().estimate().n_again == 0
    assert run_all(begin()) == 2


def test_new_songs_do_not_count_as_embedded_again(begin: Begin, songs: Callable[..., None]) -> None:
    run_all(begin())
    songs((N_SONGS + 1, "New", "Ann", "la"))
    changed = begin(document_prompt="passage: {text}")
    changed.export()
    assert (changed.estimate().n_texts, changed.estimate().n_again) == (N_SONGS + 1, N_SONGS)


def test_a_setting_that_is_set_back_after_its_vectors_were_replaced_asks_again(begin: Begin) -> None:
    run_all(begin())
    run_all(begin(document_prompt="passage: {text}"), confirm_reembedding=True)
    with pytest.raises(ReembeddingError, match=r"SONGVEC_DOCUMENT_PROMPT was 'passage: \{text\}' and is '\{text\}'"):
        run_all(begin(document_prompt="none"))


def test_a_confirmed_run_that_was_cut_short_goes_on_unasked_but_ranges_that_it_did_not_have_ask_again(
    begin: Begin, provider: Provider
) -> None:
    run_all(begin())
    changed = begin(document_prompt="passage: {text}", max_usd=0.00004, max_request_texts=8)
    first, second = changed.held_ranges()
    with pytest.raises(BudgetExceededError):
        changed.filler(confirm_reembedding=True).fill_ranges([first], lambda _: None)
    again = begin(document_prompt="passage: {text}")
    assert 0 < again.estimate({first}).n_texts < 100
    again.filler().fill_ranges([first], lambda _: None)
    assert again.estimate({first}).n_texts == 0
    with pytest.raises(ReembeddingError, match=r"^21 texts that are cached"):
        again.filler().fill_ranges([first, second], lambda _: None)


def test_an_unfinished_cache_of_other_settings_asks_too(begin: Begin) -> None:
    """Without a mark of completeness it is the model's record that says how its texts were made."""
    with pytest.raises(BudgetExceededError):
        run_all(begin(max_usd=0.00004, max_request_texts=8))
    with pytest.raises(ReembeddingError):
        run_all(begin(text_template="{name}"))


def test_who_embeds_all_again_is_not_asked(begin: Begin) -> None:
    run_all(begin())
    changed = begin(text_template="{name}")
    assert changed.estimate(reembed=True).n_again == 0
    assert run_all(changed, reembed="a person") == N_SONGS


def test_a_record_that_does_not_parse_stops_before_payment(begin: Begin, provider: Provider) -> None:
    pipeline = begin()
    run_all(pipeline)
    sent(provider)
    (pipeline.cache.storage.root / "texts.json").write_text("{")
    with pytest.raises(StoreError, match=r"texts\.json does not parse"):
        run_all(begin())
    assert provider.ledger()["requests"] == 0


def recorded(database: Database) -> dict[str, str]:
    """What an application reads to ask rightly."""
    with database.get_connection() as connection:
        fact: dict[str, str] = read_value(connection, "table")
    return fact


def test_the_prompts_are_recorded_with_the_table_and_go_with_it_through_swaps(
    begin: Begin, e5: Provider, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(begin())
    database = begin().database
    assert recorded(database)["query_prompt"] == f"Instruct: {TASK}\nQuery:{{query}}"
    other = begin(e5, embedding_model=E5, swap=True)
    run_all(other)
    assert (recorded(database)["query_prompt"], recorded(database)["document_prompt"]) == (
        "query: {query}", "passage: {text}",
    )  # fmt: skip
    roll_back(database)
    assert recorded(database)["query_prompt"] == f"Instruct: {TASK}\nQuery:{{query}}"
    sent(provider)
    search(begin(embedding_model=E5, query_prompt="query: {query}"), monkeypatch)
    assert sent(provider) == {QWEN_QUERY}, "the table's prompt, and not that of the model that is set"


def test_another_query_prompt_costs_nothing_and_is_recorded_by_the_next_load(
    begin: Begin, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(begin())
    sent(provider)
    search(begin(query_prompt="find {query}"), monkeypatch)
    assert sent(provider) == {"find waves"}
    begin(query_prompt="find {query}").load()
    search(begin(), monkeypatch)
    assert sent(provider) == {"find waves"}


def test_a_document_prompt_that_is_not_embedded_yet_is_not_recorded_with_the_table(begin: Begin) -> None:
    run_all(begin())
    changed = begin(document_prompt="passage: {text}")
    changed.load()
    loaded = VectorTable(changed.database).spec
    assert loaded and loaded.document_prompt == "{text}"


@pytest.fixture
def environment(begin: Begin, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a person with a key and a provider of their own, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "POSTGRES_URL": begin().database.url,
        "FIREWORKS_API_KEY": provider.api_key,
        "FIREWORKS_BASE_URL": provider.base_url,
        "SONGVEC_STORAGE": str(tmp_path / "by_command"),
        "SONGVEC_EMBEDDING_DIMENSIONS": "64",
        "COLUMNS": "300",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
@pytest.mark.filterwarnings("ignore::dagster.BetaWarning", "ignore:InitResourceContext.dagster_run:DeprecationWarning")
def test_the_commands_show_the_prompts_and_take_the_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["settings"])
    assert f"`Instruct: {TASK}\\nQuery:{{query}}` for queries, none for songs." in result.output
    assert CliRunner().invoke(app, ["run"]).exit_code == 0
    monkeypatch.setenv("SONGVEC_DOCUMENT_PROMPT", "passage: {text}")
    result = CliRunner().invoke(app, ["settings"])
    assert "`passage: {text}` for songs" in result.output
    result = CliRunner().invoke(app, ["estimate"])
    assert f"{N_SONGS} of the texts" in result.output
    result = CliRunner().invoke(app, ["run"])
    assert (result.exit_code, f"{N_SONGS} texts that are cached would be embedded again" in result.output) == (1, True)
    result = CliRunner().invoke(app, ["run", "--confirm-reembedding"])
    assert result.exit_code == 0, result.output
