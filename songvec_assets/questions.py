"""The questions about the whole graph. None of them changes anything, sends a text or costs anything.

When to add here: another question. Keep out: what an answer looks like (`reports`, `checks`), and the steps
(`pipeline`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import polars as pl

from songvec_assets import checks
from songvec_assets.cache.elsewhere import OtherRanges
from songvec_assets.cache.model_cache import lock_name
from songvec_assets.cache.plan import FillPlan, estimate_fills, plan_fill
from songvec_assets.embedding.budget import MonthSpending, read_month_spending
from songvec_assets.embedding.pricing import Estimate
from songvec_assets.known import CachedOrLoaded
from songvec_assets.postgres.extension import read_pgvector_caution
from songvec_assets.postgres.locks import find_holders, lock_key
from songvec_assets.progress import RunContext
from songvec_assets.reports import RunPlan, Status
from songvec_assets.search.preview import Preview, preview_table
from songvec_assets.songs.counts import (
    check_ids,
    count_ranges,
    count_unreachable_ids,
    find_ends,
    get_numbers,
)
from songvec_assets.songs.missing import MissingSongs
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.vectors.index.neighbors import LoadedRows
from songvec_assets.vectors.index.recall import read_recall
from songvec_assets.vectors.plan import plan_load
from songvec_assets.vectors.swap import LOCK
from songvec_assets.vectors.table import describe_tables, read_embeddings
from songvec_assets.wiring import Wiring

_COUNTS = "n_songs n_unexported n_cached n_rejected n_loaded n_indexed n_missing n_orphans".split()


class Questions(Wiring):
    """The questions of `Pipeline`."""

    def held_ranges(self) -> list[SongIdRange]:
        """The ranges that hold songs or cache, in order.

        Raises:
            SettingsError, SourceError: songs have ids that the ranges do not reach; see `check_ids`.
        """
        check_ids(self.source, self.tiling)
        return self._with_cached(count_ranges(self.source, self.tiling))

    def find_span(self) -> tuple[SongIdRange, SongIdRange] | None:
        """The first and last of `held_ranges`; None if there are none. Counts no songs."""
        check_ids(self.source, self.tiling)
        held = self._with_cached(find_ends(self.source, self.tiling))
        return (held[0], held[-1]) if held else None

    def _with_cached(self, found: Iterable[SongIdRange]) -> list[SongIdRange]:
        """Some ranges and those that hold cache, in order."""
        tiling = self.tiling
        held = {*found}
        for song_range in self.cache.ranges():
            # a tail from before the stop was raised will be divided, from its start on
            start = max(song_range.start, tiling.start)
            held |= {song_range} if song_range in tiling else {tiling.range_of(start), tiling.tail}
        return sorted(held)

    def status(self, max_rejected: int = 20) -> Status:
        """What is exported, cached, loaded and indexed; names up to `max_rejected` rejected songs."""
        inventory = self.read_inventory()
        index = self.table.index
        ranges = inventory.frame.with_columns(
            pl.col("n_songs").fill_null(0), n_indexed=pl.col("n_loaded") if index else pl.lit(0, pl.Int64)
        )
        tasks = {lock_key(lock_name(SongIdRange.from_key(key))): ("filling", key) for key in ranges["key"]}
        tasks |= {
            lock_key(LOCK): ("loading", ""),
            lock_key(self.table.metadata_key("index")): ("building the index", ""),
        }
        with self.database.get_connection() as connection:
            recall = read_recall(connection, self.table)
            holders = find_holders(connection, tasks)
        return Status(
            ranges=ranges.select("key", *_COUNTS),
            tables=describe_tables(self.database),
            index=index,
            rejected=inventory.name_rejected(max_rejected),
            unreachable=dict(count_unreachable_ids(self.source)),
            recall=recall.describe() if recall else "",
            month=self.month_spending(),
            unreadable=inventory.errors,
            caution=self.source.caution,
            pgvector=read_pgvector_caution(self.database),
            holders=holders,
        )

    def month_spending(self) -> MonthSpending:
        """Dollars of this month, over all runs on this database."""
        with self.database.get_connection() as connection:
            return read_month_spending(connection)

    def estimate(self, ranges: Collection[SongIdRange] | None = None, reembed: bool = False) -> Estimate:
        """What a run over the snapshots as they are would send, and its price.

        Args:
            ranges: to embed; None: all.
            reembed: whether all their songs are to be embedded again.

        Raises:
            StoreError: a snapshot cannot be read; without its songs the price would be too low.
        """
        known = self.read_inventory(with_table=False, with_source=False).frame
        tiling = self.tiling
        to_plan, n_answered = [], 0
        for key, n_songs, is_answered in known.select("key", "n_songs", "is_answered").iter_rows():
            song_range = SongIdRange.from_key(key)
            # a range from before the stop was raised may hold songs of any range
            if ranges is not None and song_range in tiling and song_range not in ranges:
                continue
            if n_songs is None and song_range not in self.store.songs:
                continue  # not exported: the plan is of the snapshots as they are
            if is_answered and not reembed:
                n_answered += n_songs
            else:
                to_plan.append(song_range)
        others = OtherRanges(self.cache)

        def plan(song_range: SongIdRange) -> FillPlan:
            self.stop.check()
            generation = self.cache.look(song_range).last_generation + 1 if reembed else None
            cached = self.cache.open(song_range, generation)
            rejected_by = None if reembed else self.server
            return plan_fill(self.store.songs, cached, self.text_spec, rejected_by, partial(others.find, song_range))

        estimate = estimate_fills(map(plan, to_plan), self.token_estimator(), self.price, self.quota)
        return replace(estimate, n_songs=estimate.n_songs + n_answered)

    def dry_run(self, ranges: Sequence[SongIdRange] | None = None, reembed: bool = False) -> RunPlan:
        """What a run would do and cost, from the snapshots as they are. Sends no text and no key.

        Args:
            ranges: to embed; None: all that hold songs.
            reembed: whether all their songs are to be embedded again.

        Raises:
            ProviderError: the server's URL redirects to another one.
            StoreError: a snapshot, or the list of cached ranges, cannot be read.
        """
        if not self.settings.offline:
            from songvec_assets.embedding.transport import check_redirect

            check_redirect(self.server)
        run = RunContext(stop=self.stop)
        load_source = self.load_source
        load = plan_load(self.table, load_source, run) if load_source.ranges() else None
        check_ids(self.source, self.tiling)
        counts = count_ranges(self.source, self.tiling)
        missing = self.missing_songs()
        missing.find(self.source, self.store.songs, counts, run)
        n_songs = get_numbers(counts)
        return RunPlan(
            n_songs=sum(n_songs.values()),
            missing=missing,
            estimate=self.estimate(self._with_cached(counts) if ranges is None else ranges, reembed),
            load=load,
            index=self.table.index,
            month=self.month_spending(),
            max_usd=self.settings.max_usd,
            max_usd_a_month=self.settings.max_usd_a_month,
            boilerplate=self.describe_boilerplate(n_songs),
        )

    def missing_songs(self) -> MissingSongs:
        """The songs that are cached or loaded; compared with the source it stops an export if too many are missing."""
        given = self.settings
        known = CachedOrLoaded(self.database, self.cache, self.tiling)
        return MissingSongs(known.counts(), known.song_ids, given.max_missing_share, given.max_missing_range_share)

    def describe_boilerplate(self, n_songs: Mapping[SongIdRange, int] | None = None) -> list[str]:
        """What the lyrics hold that is no lyric, and a view that removes it; empty if there is little of it."""
        found = self.find_boilerplate(n_songs)
        if not found.is_common:
            return []
        described = found.describe(self.token_estimator().bytes_per_token)
        return [f"lyrics: {described}", f"To embed them without it: {found.view(self.source)}"]

    def verify(self) -> dict[str, checks.Finding]:
        """The finding of every check of the table and the index, by the check's name.

        Raises:
            TableMismatchError: nothing is loaded yet.
        """
        evidence = checks.Evidence(self)
        evidence.check_loaded()
        return {each.name: evidence.answer(each) for each in (*checks.TABLE_CHECKS, *checks.INDEX_CHECKS)}

    def embeddings(self, song_ids: Collection[int]) -> pl.DataFrame:
        """The vectors of some songs in the table, in the order of song_id; songs without one are left out.

        Returns:
            Columns song_id (Int32) and embedding (Array of Float32); `frame["embedding"].to_numpy()` is the matrix,
            float32, (n, dimensions).
        """
        return read_embeddings(self.database, song_ids)

    def preview(self) -> Preview:
        """A map of a sample of the songs, and some with their nearest; see `preview_table`."""
        return preview_table(LoadedRows.of(self.table, self.cache), self.source, self.table_spec)
