"""Snapshots: one Parquet file per range, its rows in the order of song_id; see `content` for its columns and footer.

A snapshot of an earlier version, which has other columns, is exported again.
When to add here: another way to read or replace a snapshot. Keep out: what it contains (`content`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from songvec_assets.errors import StoreError
from songvec_assets.songs.content import BATCH_ROWS, FILE_SCHEMA, SNAPSHOT_SCHEMA, Footer
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.songs.text import TextSpec, render_texts
from songvec_assets.storage import Storage
from songvec_assets.storage.local import LocalStorage

_SUFFIX = ".parquet"


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of a store, each an object `<key of its range>.parquet`.

    Attributes:
        storage: of the snapshots; a range without a snapshot is a range without songs.
    """

    storage: Storage

    def __contains__(self, song_range: SongIdRange) -> bool:
        return _key(song_range) in self.storage

    def ranges(self) -> list[SongIdRange]:
        """The ranges that have a snapshot, in order.

        Raises:
            StoreError: a file has another name.
        """
        names = [Path(name) for name in self.storage.scan().objects]
        try:
            return sorted(SongIdRange.from_key(name.stem) for name in names if name.suffix == _SUFFIX)
        except ValueError as error:
            raise StoreError(
                f"a file that is not ours lies in the storage folder: {error}; move it away", "store.foreign-file"
            ) from error

    def read(
        self,
        song_range: SongIdRange,
        columns: list[str] | None = None,
        song_ids: Sequence[int] | pl.Series | None = None,
    ) -> pl.DataFrame:
        """The songs of a range; see the module for the columns.

        Args:
            columns: to read, including song_id; None: those of the content.
            song_ids: only these songs, in the order of the file; None: all.

        Raises:
            StoreError: the file is damaged.
        """
        columns = columns or SNAPSHOT_SCHEMA.names
        empty = FILE_SCHEMA.empty_table().select(columns)
        try:
            file = self._open(song_range)
            if not {*columns} <= {*file.schema_arrow.names}:
                raise StoreError(
                    f"{self.storage.describe(_key(song_range))} was written by an earlier version: export "
                    "again, with `songvec run`, which replaces it"
                )
            if song_ids is None:
                return pl.DataFrame(file.read(columns))
            wanted = pl.Series(song_ids, dtype=pl.Int32).to_arrow()
            batches = file.iter_batches(BATCH_ROWS, columns=columns) if len(wanted) else ()
            found = [batch.filter(pc.is_in(batch["song_id"], wanted)) for batch in batches]
            return pl.DataFrame(pa.Table.from_batches(found, empty.schema))
        except FileNotFoundError:
            return pl.DataFrame(empty)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(song_range, error) from error

    def _open(self, song_range: SongIdRange) -> pq.ParquetFile:
        """Open a snapshot; pages are checked against their checksums when they are read."""
        file = self.storage.open(_key(song_range)).file()
        return pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)

    def _damaged(self, song_range: SongIdRange, why: Exception | str) -> StoreError:
        return StoreError(
            f"{self.storage.describe(_key(song_range))} is damaged ({why}): remove it and export again, "
            "with `songvec run`",
            "store.damaged",
        )

    def try_to_read(self, song_range: SongIdRange, columns: list[str]) -> pl.DataFrame | None:
        """As `read`, for the export, which replaces damaged snapshots; None if there is no readable snapshot."""
        try:
            return self.read(song_range, columns) if song_range in self else None
        except StoreError:
            return None

    def read_rejected(self, song_range: SongIdRange) -> pl.DataFrame:
        """The rejected songs of a range: columns song_id and reason."""
        songs = self.read(song_range, ["song_id", "rejected"])
        return songs.rename({"rejected": "reason"}).drop_nulls("reason")

    def read_embeddable(self, song_range: SongIdRange) -> pl.Series:
        """The song_ids of a range that are not rejected, in order."""
        return self.read(song_range, ["song_id", "rejected"]).filter(pl.col("rejected").is_null())["song_id"]

    def read_text_hashes(self, song_range: SongIdRange, spec: TextSpec) -> pl.DataFrame:
        """The hash of the text of each song that is not rejected.

        Args:
            spec: how songs become texts; if it differs from that of the snapshot, all texts are rendered.

        Returns:
            Columns song_id (Int32), text_hash (Binary, 16 bytes) and truncated (Boolean), in the order of song_id.

        Raises:
            StoreError: the file is damaged, or of an earlier version.
        """
        if self.footer(song_range).text != spec.identity:
            return self.render(song_range, spec, self.read_embeddable(song_range)).drop("text")
        return self.read(song_range, ["song_id", "text_hash", "truncated"]).drop_nulls("text_hash")

    def render(self, song_range: SongIdRange, spec: TextSpec, song_ids: pl.Series) -> pl.DataFrame:
        """The texts of some songs, rendered, see `render_texts`.

        Args:
            song_ids: of songs that are not rejected.

        Raises:
            StoreError: the file is damaged, or a text does not have the hash that the snapshot keeps.
        """
        songs = self.read(song_range, [*SNAPSHOT_SCHEMA.names, "text_hash"], song_ids)
        texts = render_texts(songs, spec)
        differing = texts.join(songs, on=["song_id", "text_hash"], how="anti")
        if differing.height and self.footer(song_range).text == spec.identity:
            raise self._damaged(song_range, "texts do not have the hashes that the file keeps")
        return texts

    def footers(self, ranges: Sequence[SongIdRange]) -> dict[SongIdRange, Footer]:
        """`footer` of each of some ranges."""
        return dict(zip(ranges, self.storage.map(self.footer, ranges), strict=True))

    def footer(self, song_range: SongIdRange) -> Footer:
        """The footer of a snapshot; an empty one if the file cannot be read: reading the songs then gives the error."""
        try:
            file = pq.read_metadata(self.storage.open(_key(song_range)).file())
        except (FileNotFoundError, pa.ArrowInvalid):
            return Footer()
        return Footer.decode(file.metadata or {}, file.num_rows)

    def count(self) -> dict[SongIdRange, int]:
        """Number of songs by range, from the footers; in order, without empty ranges."""
        footers = self.footers(self.ranges())
        return {song_range: footer.n_songs for song_range, footer in footers.items() if footer.n_songs}

    def digest_all(self) -> str:
        """An identity of all snapshots, from their footers."""
        state = xxhash.xxh3_128()
        for song_range, footer in self.footers(self.ranges()).items():
            state.update(f"{song_range.key} {footer.digest}\n".encode())
        return state.hexdigest()

    def find_max_song_id(self) -> int | None:
        """The highest song_id of all snapshots, or None if there are none."""
        for song_range in reversed(self.ranges()):
            song_ids = self.read(song_range, ["song_id"])["song_id"]
            if len(song_ids):
                return int(song_ids[-1])
        return None

    def write(self, song_range: SongIdRange, songs: pa.Table, footer: Footer) -> None:
        """Write a range's songs durably, or nothing.

        Args:
            songs: of FILE_SCHEMA.
        """
        with self.storage.write(_key(song_range)) as file:
            pq.write_table(
                songs.replace_schema_metadata(footer.encode()),
                file,
                compression="zstd",
                compression_level=1,
                # names and lyrics rarely repeat: a dictionary for them would cost a twentieth of the time
                use_dictionary=["artist", "rejected"],
                write_statistics=False,
                write_page_checksum=True,
            )

    def delete(self, song_range: SongIdRange) -> None:
        """Delete a range's snapshot."""
        self.storage.delete(_key(song_range))

    def delete_other_ranges(self, tiling: Tiling) -> None:
        """Delete snapshots of ranges that the tiling does not have: an earlier tail, after the stop was raised."""
        for song_range in self.ranges():
            if tiling.range_of(song_range.start) != song_range:
                self.delete(song_range)

    def merge(self, song_range: SongIdRange, newer: pa.Table, song_ids: pl.Series) -> pa.Table:
        """The stored songs, with newer rows replacing those of the same song_id.

        Args:
            newer: of FILE_SCHEMA.
            song_ids: that the range has now; other rows are dropped.

        Returns:
            Of FILE_SCHEMA, in the order of song_id.

        Raises:
            pa.ArrowException, OSError: the snapshot is damaged.
        """
        newer = newer.filter(pc.is_in(newer["song_id"], song_ids.to_arrow()))
        newer_ids = newer["song_id"].to_numpy()
        pieces = []
        start = 0
        kept = song_ids.filter(~song_ids.is_in(newer_ids)).to_arrow()
        # in batches, so that the range is in memory only once. Threads gain nothing here, and take 30 MB
        for batch in self._open(song_range).iter_batches(BATCH_ROWS, use_threads=False):
            stop = int(np.searchsorted(newer_ids, batch["song_id"][-1].as_py(), side="right"))
            before = pa.Table.from_batches([batch.filter(pc.is_in(batch["song_id"], kept))]).cast(FILE_SCHEMA)
            both = pa.concat_tables([before, newer.slice(start, stop - start)])
            pieces.append(both.sort_by("song_id") if start < stop else both)
            start = stop
        return pa.concat_tables([*pieces, newer.slice(start)])


def _key(song_range: SongIdRange) -> str:
    return f"{song_range.key}{_SUFFIX}"


def load_songs_from_parquet(
    path: Path, columns: list[str] | None = None, song_ids: Sequence[int] | pl.Series | None = None
) -> pl.DataFrame:
    """Read one range's snapshot by its path; see `Snapshots.read`."""
    return Snapshots(LocalStorage(path.parent)).read(SongIdRange.from_key(path.stem), columns, song_ids)


def get_max_cached_song_id(folder: Path) -> int | None:
    """The highest song_id of all snapshots of a folder, or None if there are none."""
    return Snapshots(LocalStorage(folder)).find_max_song_id()
