"""How the texts of a cache were made: what is recorded, which prompts hold, and what a changed setting would cost."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from songvec_assets.cache.cached_range import RangeFiles
from songvec_assets.cache.manifest import Completion, Manifest
from songvec_assets.cache.model_cache import ModelCache
from songvec_assets.cache.texts import (
    TextRecord,
    check_reembedding,
    choose_prompts,
    is_made_otherwise,
    model_storage,
    read_record,
    write_record,
)
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.embedding.prompts import Prompts, default_prompts
from songvec_assets.errors import ReembeddingError, StoreError
from songvec_assets.settings import Settings
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.text import TextSpec
from songvec_assets.storage.local import LocalStorage
from songvec_assets_tests.cache.rows import put

E5 = "intfloat/multilingual-e5-small"
SPEC = TextSpec("{name} by {artist}", 1000, "passage: {text}")
RECORD = TextRecord.of(SPEC, "query: {query}")
FIRST = SongIdRange(0, 100)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "model")


def test_a_record_is_read_as_it_was_written(storage: LocalStorage) -> None:
    assert read_record(storage) is None
    write_record(storage, RECORD)
    found = read_record(storage)
    assert (found, found and found.spec.identity) == (RECORD, SPEC.identity)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"template":1}', b"[]"])
def test_a_record_that_does_not_parse_is_named_with_a_way_out(storage: LocalStorage, content: bytes) -> None:
    storage.put("texts.json", content)
    with pytest.raises(StoreError, match="restore it, or set SONGVEC_QUERY_PROMPT") as refused:
        read_record(storage)
    assert refused.value.code == "store.damaged"


def test_prompts_are_those_that_are_set_else_recorded_else_of_the_models_family(tmp_path: Path) -> None:
    root, given = LocalStorage(tmp_path), {"fireworks_api_key": "k", "embedding_model": E5, "embedding_dimensions": 3}
    unset, storage = Settings(**given), model_storage(root, E5, 3)
    assert choose_prompts(root, unset) == default_prompts(E5)
    put(ModelCache(storage, E5, 3), [1])
    assert choose_prompts(root, unset).query == default_prompts(E5).query
    assert choose_prompts(root, unset).document == "{text}", "caches of earlier versions had none"
    write_record(storage, TextRecord.of(SPEC, "find {query}"))
    assert choose_prompts(root, unset) == Prompts("find {query}", "passage: {text}")
    both = Settings(**given, query_prompt="q {query}", document_prompt="d {text}")
    assert choose_prompts(root, both) == Prompts("q {query}", "d {text}")


def test_a_range_is_made_otherwise_by_its_completion_else_by_the_record(storage: LocalStorage) -> None:
    done = Completion("snapshot", SPEC.identity, 1, 0, 0, "", 1, b"")
    other = TextSpec("{name}", 1000)
    complete, begun = RangeFiles(Manifest(complete=done)), RangeFiles(Manifest(), sizes={"0-a-1.arrow": 1})
    assert (is_made_otherwise(storage, complete, SPEC), is_made_otherwise(storage, complete, other)) == (False, True)
    assert not is_made_otherwise(storage, begun, other), "nothing is recorded"
    write_record(storage, RECORD)
    assert (is_made_otherwise(storage, begun, SPEC), is_made_otherwise(storage, begun, other)) == (False, True)
    assert not is_made_otherwise(storage, RangeFiles(), other), "nothing is cached"


def test_who_would_pay_again_is_told_what_changed_and_what_it_costs(storage: LocalStorage) -> None:
    write_record(storage, RECORD)

    def estimate(ranges: Sequence[SongIdRange]) -> Estimate:
        assert ranges == [FIRST]
        return Estimate(9, 9, 90, 1.0, 0.1, n_again=1234, usd_again=0.5)

    changed = msgspec.structs.replace(RECORD, max_chars=500, template="{name}").spec
    with pytest.raises(ReembeddingError) as refused:
        check_reembedding(storage, [FIRST], changed, estimate)
    words = str(refused.value)
    assert "1,234 texts that are cached would be embedded again, for about $0.5000" in words
    assert "SONGVEC_TEXT_TEMPLATE was '{name} by {artist}' and is '{name}'" in words
    assert "SONGVEC_MAX_TEXT_CHARS was 1000 and is 500" in words
    assert "SONGVEC_DOCUMENT_PROMPT" not in words


def test_nobody_is_asked_where_nothing_is_paid_again(storage: LocalStorage) -> None:
    check_reembedding(storage, [], SPEC, lambda _: pytest.fail("nothing to estimate"))
    check_reembedding(storage, [FIRST], SPEC, lambda _: Estimate(9, 9, 90, 1.0, 0.1))
