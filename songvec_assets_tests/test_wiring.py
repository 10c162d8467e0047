"""From settings to what a run works with: opened when it is first used, and nothing before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from songvec_assets.cache.texts import TextRecord, write_record
from songvec_assets.embedding.pricing import UTF8_BYTES_PER_TOKEN
from songvec_assets.embedding.prompts import Prompts
from songvec_assets.errors import SettingsError, SourceError, StoppedError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.settings import Settings
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage.local import LocalStorage
from songvec_assets.wiring import Wiring
from songvec_assets_tests.administration import execute
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider


@pytest.mark.parametrize(
    ("settings", "folder"),
    [({}, ".songvec/main"), ({"postgres_url": None}, ".songvec/demo"), ({"storage": "/data/songs"}, "/data/songs")],
)
def test_the_store_is_in_the_folder_that_is_set_else_in_that_of_the_database(
    settings: dict[str, object], folder: str
) -> None:
    given = {"postgres_url": "postgresql://127.0.0.1:1/music", "fireworks_api_key": "fw_secret"} | settings
    assert Wiring(Settings(**given)).storage == LocalStorage(Path(folder))


def test_both_sides_know_each_other_from_the_first_write_on(
    songs: Callable[..., None], pipeline: Pipeline, database: Database, provider: Provider, tmp_path: Path
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    assert not pipeline.storage.root.exists(), "it was only made"
    pipeline.bind()
    assert make_pipeline(database, provider, pipeline.storage.root).store.store_id == pipeline.store.store_id
    with pytest.raises(StoreError, match="belongs to another database"):
        make_pipeline(database, provider, tmp_path / "another").bind()


def test_a_database_without_songs_and_songs_that_no_range_reaches_bind_nothing(
    database: Database, pipeline: Pipeline, songs: Callable[..., None]
) -> None:
    with pytest.raises(SourceError, match="no table songs"):
        pipeline.bind()
    execute(database.adbc_uri, "CREATE TABLE songs (id bigint PRIMARY KEY, name text, artist text, lyrics text)")
    execute(database.adbc_uri, "INSERT INTO songs VALUES (5000000000, 'Sea', 'Ann', 'la')")
    with pytest.raises((SettingsError, SourceError)):
        Pipeline(pipeline.settings).bind()
    assert not pipeline.storage.root.exists()


def test_what_another_process_recorded_of_the_prompts_counts_from_the_next_write_on(
    pipeline: Pipeline, songs: Callable[..., None]
) -> None:
    songs((1, "Sea", "Ann", "waves"))
    pipeline.bind()
    before = pipeline.prompts
    recorded = TextRecord.of(replace(pipeline.text_spec, document_prompt="song: {text}"), "find: {query}")
    write_record(pipeline.cache.storage, recorded)
    assert pipeline.prompts == before, "they are read once for all ranges of a run"
    pipeline.bind()
    assert pipeline.prompts == Prompts("find: {query}", "song: {text}")


def test_a_range_is_filled_by_one_run_at_a_time(pipeline: Pipeline) -> None:
    other, waited = Pipeline(pipeline.settings), []
    song_range = SongIdRange(0, 100)

    def wait() -> None:
        waited.append(1)
        other.cancel()

    with pipeline.lock_range(song_range, lambda: None, lambda: None) as check_held:
        check_held()
        with pytest.raises(StoppedError), other.lock_range(song_range, wait, other.stop.check):
            pass
    assert waited == [1]


def test_the_estimator_begins_with_what_was_learned_of_the_model(pipeline: Pipeline) -> None:
    assert pipeline.token_estimator().bytes_per_token == UTF8_BYTES_PER_TOKEN
    with pipeline.database.get_connection() as connection:
        connection.execute(
            sa.text("INSERT INTO songvec.settings (key, value) VALUES (:key, '2.5')"),
            {"key": f"bytes per token of {pipeline.settings.model}"},
        )
    assert pipeline.token_estimator().bytes_per_token == 2.5
