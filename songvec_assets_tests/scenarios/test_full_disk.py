"""The disk of the store is full: what was paid for before is kept, and nothing more is paid for than was in flight."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from songvec_assets.cache.fill import MAX_OPEN_RANGES
from songvec_assets.errors import UnwritableError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.engine import Database
from songvec_assets.storage import local
from songvec_assets.storage.local import SPARE_BYTES, LocalStorage
from songvec_assets.storage.messages import clear_disk_errors
from songvec_assets_tests.administration import execute
from songvec_assets_tests.cache.filling import assert_stored, billed, plain_songs, plain_texts
from songvec_assets_tests.conftest import make_pipeline
from songvec_assets_tests.provider import Provider

Songs = Callable[..., None]
SONG_IDS = range(1, 1_900)


@pytest.fixture
def run(songs: Songs, database: Database, provider: Provider, tmp_path) -> Callable[[], Pipeline]:
    """Pipelines over the same ranges, which are exported."""
    songs(*plain_songs(SONG_IDS))

    def make() -> Pipeline:
        return make_pipeline(database, provider, tmp_path / "store", song_id_stop=2_000)

    make().export()
    return make


@contextlib.contextmanager
def disk_of(n_parts: int, free: int) -> Iterator[None]:
    """A disk with room for so many parts, that says what it has free."""
    write, left = LocalStorage.write, iter(range(n_parts))

    @contextlib.contextmanager
    def write_if_room(self: LocalStorage, key: str) -> Iterator[BinaryIO]:
        with clear_disk_errors(self.describe(key)):
            if key.endswith(".arrow") and next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with write(self, key) as file:
            yield file

    usage = shutil.disk_usage("/")._replace(free=free)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "write", write_if_room)
        patch.setattr(local, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
        yield


def test_no_range_after_the_first_that_cannot_be_stored_is_paid_for(
    run: Callable[[], Pipeline], database: Database, provider: Provider
) -> None:
    # what other programs take is not known beforehand
    with disk_of(n_parts=6, free=1 << 40), pytest.raises(UnwritableError, match="No space left on device") as caught:
        run().run()
    assert caught.value.code == "store.not-writable"
    n_billed, [(n_rows,)] = len(billed(provider)), execute(database.url, "SELECT count(*) FROM song_embeddings")
    assert n_rows >= 200, "what was stored is loaded"
    assert n_billed - n_rows <= 100 * (MAX_OPEN_RANGES + 1), "what was in flight"
    assert n_billed < len(SONG_IDS) / 2
    run().run()
    assert_stored(run(), plain_texts(SONG_IDS))


def test_a_disk_without_room_for_a_range_is_refused_before_it_is_paid_for(
    run: Callable[[], Pipeline], provider: Provider
) -> None:
    with disk_of(n_parts=0, free=SPARE_BYTES + 25_000), pytest.raises(UnwritableError, match="make room"):
        run().embed()
    assert not billed(provider)
    with disk_of(n_parts=1_000, free=SPARE_BYTES + 50_000):
        run().embed()
    assert_stored(run(), plain_texts(SONG_IDS))
