"""Fills killed with SIGKILL, many times in a row, over one catalogue: is anything lost that was paid for?

    python -m benchmarks.chaos                                  25 kills, four minutes; exit code 1 if a check fails
    python -m benchmarks.chaos --store weed                     the same over a bucket of SeaweedFS; or moto
    python -m benchmarks.chaos --kills 6 --songs 2200 --seed 7 --markdown

A real Postgres; a provider in its own process, with latency and faults, that writes down each text as it bills it; and
processes that fill (every sixth is `songvec run`), each killed a random time after its first billed texts. After every
kill the provider's ledger is compared with the files. Between kills a file is truncated, gets a bit flipped or is
replaced. In these ranges faults come before billing, so that what is billed is delivered; in a last range answers are
spoilt after billing. The seed repeats songs and draws; timing is the machine's own. A kill leaves the
kernel's page cache intact: a loss of power is not measured here.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import sqlalchemy as sa

from songvec_assets.cache.manifest import NAME
from songvec_assets.cache.plan import FillReport
from songvec_assets.errors import SongvecError, StoreError
from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import start_embedded_server
from songvec_assets.settings import Settings, variables
from songvec_assets.songs.export import cache_songs_to_parquet
from songvec_assets.songs.ranges import SongIdRange, Tiling
from songvec_assets.storage import Storage
from songvec_assets.vectors.load import upload_cached_embeddings_to_database
from songvec_assets_tests.administration import dispose
from songvec_assets_tests.provider import Provider, digest_of, running_provider
from songvec_assets_tests.provider.vectors import vector_of_digest
from songvec_assets_tests.s3 import running_s3
from songvec_assets_tests.warm import WarmProcess
from songvec_assets_tests.warm import start as start_warm

N_RANGES, DIMENSIONS, REQUEST_TEXTS, CONCURRENCY = 10, 256, 8, 6
IN_FLIGHT = REQUEST_TEXTS * CONCURRENCY
PROMISED_TEXTS = 2048
"""What a kill may cost at most, and what a flipped bit may: one request of the largest size."""
LATENCY_S, SETTLED_S, STALLED_S, COMMAND_EVERY, DAMAGE_EVERY = (0.05, 0.4), 1.0, 120.0, 6, 2
TEXTS_PER_S = IN_FLIGHT / (sum(LATENCY_S) / 2)
FAULTS: dict[str, Any] = {
    "latency_s": LATENCY_S,
    "statuses": [{"status": 429, "share": 0.03, "retry_after_s": 0.2}, {"status": 502, "share": 0.03}],
    "reset": 0.02,
    "poison": ["POISON"],
    "keep_texts": False,
}
SPOILT = {"truncate": 0.08, "reset": 0.08, "reset_when": "after", "corrupt": "duplicate_index", "corrupt_share": 0.08}
DAMAGES = ("cut", "flip", "head flip", "foreign", "manifest flip", "garbage", "flip")
ROOT = Path(__file__).parents[1]

MIDDLE = "every kill fell into the middle of filling"
SETTLED = f"a text billed {SETTLED_S:g} s or more before a kill is on disk, sound"
KEPT = "what was on disk once stays there"
TRUE = "every vector on disk is its text's"
FLIGHT = f"a kill costs at most what is in flight: {CONCURRENCY} requests of {REQUEST_TEXTS} texts"
PROMISE = f"texts billed twice are at most {PROMISED_TEXTS:,} a kill"
ONCE = "every text was billed once, and once more for each time it was lost, no more"
FOUND = "damage that costs a vector is named, by the load's error or the fill's report"
SMALL = f"a flipped bit costs at most {PROMISED_TEXTS:,} texts"
REBUILT = "the next fill rebuilds a damaged range"
UNLOADED = "a damaged vector is never loaded"
SPOILED = "spoilt answers are paid for again and never stored"
COMPLETE = "in the end every song has its text's vector, and refused songs their reason"
TABLE = "the table equals the cache"
IDLE = "a run with nothing to do sends nothing"
CHECKS = (
    MIDDLE, SETTLED, KEPT, TRUE, FLIGHT, PROMISE, ONCE, FOUND, SMALL, REBUILT, UNLOADED, SPOILED, COMPLETE, TABLE, IDLE
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """One kill; counts are of texts, `billed_before`, `on_disk` and `billed_twice` since the campaign began."""

    number: int
    process: str
    after_s: float
    billed_before: int
    on_disk: int
    in_flight_lost: int
    oldest_lost_ms: int
    billed_twice: int


@dataclass(frozen=True)
class Damage:
    """What was done to a file between two kills, how many texts it cost, and what reported it."""

    after_kill: int
    kind: str
    file: str
    at_byte: int
    of_bytes: int
    texts_lost: int
    named_by: str


@dataclass
class CampaignReport:
    """What a campaign found. `failures` names each check that failed."""

    kills: list[Kill] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def expect(self, check: str, holds: bool, words: str) -> None:
        """Record a check that fails."""
        if not holds:
            self.failures.setdefault(check, []).append(words)

    def render(self, markdown: bool = False) -> str:
        """Tables and checks as text."""
        checks = [
            ("FAIL" if check in self.failures else "PASS", "; ".join([check, *self.failures.get(check, [])[:3]]))
            for check in CHECKS
        ]
        tables: list[list[dict[str, object]]] = [
            [vars(each) for each in self.kills],
            [vars(each) for each in self.damages],
            [{"figure": name, "value": value} for name, value in self.figures.items()],
            [{"": verdict, "check": words} for verdict, words in checks],
        ]
        return "\n\n".join(_table(rows, markdown) for rows in tables if rows)


@dataclass(frozen=True)
class Song:
    """A row of the source table."""

    id: int
    name: str
    artist: str
    lyrics: str

    @property
    def text_hash(self) -> bytes:
        """The hash of its text, as the provider's ledger and the files have it."""
        return digest_of(f"{self.name} by {self.artist}\n{self.lyrics}")

    @property
    def refused(self) -> bool:
        """Whether the provider refuses its text."""
        return "POISON" in self.lyrics


def make_songs(tiling: Tiling, rng: Random) -> list[Song]:
    """A full catalogue: in every other range a tenth repeats the text before; two songs are refused."""
    words = "sea wind stone river night morning salt light road snow bird iron glass rain ember".split()
    songs: list[Song] = []
    refused = {tiling.width * 5 // 2, tiling.width * (N_RANGES - 1) + 1}
    for song_id in range(tiling.stop):
        lyrics = " ".join(rng.choices(words, k=rng.randint(10, 60)))
        if song_id in refused:
            songs.append(Song(song_id, f"Song {song_id}", "Ann", f"POISON {lyrics}"))
        elif song_id // tiling.width % 2 and song_id % 10 == 9:
            songs.append(Song(song_id, songs[-1].name, songs[-1].artist, songs[-1].lyrics))
        else:
            songs.append(Song(song_id, f"Song {song_id}", "Ann", lyrics))
    return songs


@dataclass
class Campaign:
    """One catalogue, its database, store and provider, and what is counted about them.

    Attributes:
        on_disk: texts that were found on disk, sound, at the last look.
        excused: how often each text may be billed again: lost in flight, or in a file that was damaged on purpose.
        warm: whether processes are forked from one that has loaded the libraries.
    """

    pipeline: Pipeline
    provider: Provider
    ledger: Path
    folder: Path
    songs: list[Song]
    rng: Random
    warm: bool = False
    report: CampaignReport = field(default_factory=CampaignReport)
    on_disk: set[bytes] = field(default_factory=set)
    excused: Counter[bytes] = field(default_factory=Counter)
    excused_damage: Counter[bytes] = field(default_factory=Counter)
    _billed: list[tuple[float, list[bytes]]] = field(default_factory=list)
    _read_up_to: int = 0

    def __post_init__(self) -> None:
        *self.ranges, self.spoilt_range = list(self.pipeline.tiling)[:-1]
        self.paid_for = {song.text_hash for song in self.songs if not song.refused}
        self.by_range: dict[SongIdRange, list[Song]] = {}
        for song in self.songs:
            self.by_range.setdefault(self.pipeline.tiling.range_of(song.id), []).append(song)

    def read_ledger(self) -> list[tuple[float, list[bytes]]]:
        """When which texts were billed; the dialect's probe left out."""
        with self.ledger.open("rb") as file:
            file.seek(self._read_up_to)
            fresh = file.read().rpartition(b"\n")[0] + b"\n"
        self._read_up_to += len(fresh) if len(fresh) > 1 else 0
        for line in map(json.loads, fresh.splitlines() if len(fresh) > 1 else ()):
            texts = [bytes.fromhex(text_hash) for text_hash in line["hashes"]]
            if self.paid_for.issuperset(texts):
                self._billed.append((line["time"], texts))
        return self._billed

    def count_billings(self) -> Counter[bytes]:
        """How often each text was billed."""
        return Counter(text for _, texts in self.read_ledger() for text in texts)

    def count_billed_twice(self) -> int:
        """Texts billed again, without those that were damaged on purpose."""
        return sum(max(0, n - 1 - self.excused_damage[text]) for text, n in self.count_billings().items())

    def read_range(self, song_range: SongIdRange) -> set[bytes]:
        """A range's texts whose vector can be read, fits its checksum and is right.

        Raises:
            StoreError: a file is of another range.
        """
        cached = self.pipeline.cache.open(song_range)
        sound = cached.find_sound(cached.all_rows)
        texts, vectors = sound["text_hash"].to_list(), cached.embeddings_at(sound["row"].to_list())
        wrong = [text for text, vector in zip(texts, vectors, strict=True) if not _is_of(vector, text)]
        self.report.expect(TRUE, not wrong, f"{song_range.key}: {len(wrong)} rows have another text's vector")
        return set(texts) - set(wrong)

    def read_disk(self) -> set[bytes]:
        """All texts on disk."""
        return {text for song_range in self.pipeline.cache.ranges() for text in self.read_range(song_range)}

    def find_wrong_songs(self, song_range: SongIdRange) -> list[int]:
        """Songs of a range whose holding row is not the vector of their text, or the reason of their refusal."""
        cached = self.pipeline.cache.open(song_range)
        rows = {song_id: (each, None, row) for song_id, each, _, row in cached.rows.iter_rows()}
        rows |= {song_id: (each, reason, 0) for song_id, each, reason in cached.rejected.iter_rows()}
        wrong = set(rows) - {song.id for song in self.by_range[song_range]}
        for song in self.by_range[song_range]:
            text_hash, reason, row = rows.get(song.id, (b"", None, -1))
            refused = reason is not None
            right = refused or _is_of(cached.embeddings_at([row])[0], text_hash) if row >= 0 else False
            if not right or text_hash != song.text_hash or refused != song.refused:
                wrong.add(song.id)
        return sorted(wrong)

    def read_table(self) -> dict[int, bool]:
        """The table's songs, and whether each has its text's vector."""
        with self.pipeline.database.get_connection() as connection:
            if connection.scalar(sa.text("SELECT to_regclass('song_embeddings') IS NULL")):
                return {}
            rows = connection.execute(sa.text("SELECT song_id, vector_send(embedding) FROM song_embeddings"))
            return {
                song_id: song_id < len(self.songs)
                and _is_of(np.frombuffer(sent, ">f4", offset=4), self.songs[song_id].text_hash)
                for song_id, sent in rows
            }

    def fill(self, ranges: Sequence[SongIdRange]) -> list[FillReport]:
        """Fill in this process, undisturbed; an error that ends it counts as the last range's."""
        reports: list[FillReport] = []
        try:
            self.pipeline.filler().fill_ranges(ranges, reports.append)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding, and the campaign goes on
            reports = reports or [FillReport(ranges[0])]
            reports[-1].error = error
        return reports

    def load(self) -> SongvecError | None:
        """Load a new table, so that every vector is read; what stopped it."""
        with self.pipeline.database.get_connection() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS song_embeddings"))
        each = self.pipeline
        try:
            upload_cached_embeddings_to_database(each.table, each.load_source, each.table_spec)
        except SongvecError as error:
            return error
        return None

    def start(self, by_command: bool, environment: dict[str, str]) -> "subprocess.Popen[str] | WarmProcess":
        """A process that fills the kills' ranges once its stdin says so; the command does so at once."""
        asked = f"{self.ranges[0].key}...{self.ranges[-1].key}"
        command = ["-c", "from songvec_assets.cli import main; main()", "run", "--ranges", asked]
        arguments = command if by_command else ["-m", "benchmarks.chaos", "--fill", asked]
        if self.warm:
            return start_warm(arguments, self.folder, environment)
        with (self.folder / "processes.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], text=True,
                cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_for_provider(self) -> None:
        """Until it has answered what was in flight: it bills that, though nobody waits for it any more."""
        n_open = 1
        while n_open:
            time.sleep(LATENCY_S[1])
            figures = self.provider.ledger()
            n_open = figures["requests"] - sum(figures["requests_by_status"].values())

    def kill(self, process: "subprocess.Popen[str] | WarmProcess", number: int, n_kills: int, by_command: bool) -> bool:
        """Let a process begin, kill it in its middle, audit; False if it ended by itself, or billed nothing."""
        known, began = len(self.read_ledger()), time.monotonic()
        n_missing = len(self.paid_for) - len(self.on_disk) - len(self.by_range[self.spoilt_range])
        # so long that on average as much is left for each kill to come
        delay_s = self.rng.uniform(0.05, 1.95) * n_missing / (n_kills - number + 2) / TEXTS_PER_S
        assert process.stdin
        process.stdin.write("begin\n")
        process.stdin.flush()
        while process.poll() is None and len(self.read_ledger()) == known:
            if time.monotonic() - began > STALLED_S:
                return False
            time.sleep(0.01)
        time.sleep(delay_s)
        after_s, killed_at = time.monotonic() - began, time.time()
        process.kill()
        if process.wait() != -signal.SIGKILL:
            return False
        self.wait_for_provider()
        billed, on_disk = self.read_ledger(), self.read_disk()
        lost = {text: at for at, texts in billed[known:] for text in texts if text not in on_disk}
        ages = [killed_at - at for at in lost.values()]
        n_settled = sum(age >= SETTLED_S for age in ages)
        expect = self.report.expect
        expect(SETTLED, not n_settled, f"kill {number}: {n_settled} texts, up to {max(ages, default=0):.1f} s old")
        expect(KEPT, self.on_disk <= on_disk, f"kill {number}: {len(self.on_disk - on_disk)} texts vanished")
        expect(FLIGHT, len(lost) <= IN_FLIGHT, f"kill {number}: {len(lost)} texts lost")
        self.excused.update(lost.keys())
        self.on_disk |= on_disk
        n_billed, n_twice = sum(len(texts) for at, texts in billed if at < killed_at), self.count_billed_twice()
        expect(PROMISE, n_twice <= PROMISED_TEXTS * number, f"kill {number}: {n_twice}")
        name, oldest_ms = "songvec run" if by_command else "fill", int(1000 * max([0.0, *ages]))
        row = Kill(number, name, round(after_s, 2), n_billed, len(on_disk), len(lost), oldest_ms, n_twice)
        self.report.kills.append(row)
        return True

    def damage(self, kind: str, after_kill: int) -> None:
        """Damage a file or a manifest, load, fill its range, load again; the range is complete afterwards."""
        cache, expect = self.pipeline.cache, self.report.expect
        storage = cache.storage
        named = {each: [file.name for file in cache.open(each).manifest.files] for each in cache.ranges()}
        if kind == "manifest flip" and any(f"{each.key}/{NAME}" in storage for each in named):
            named = {each: [NAME] for each in named if f"{each.key}/{NAME}" in storage}
        keys = {each: f"{each.key}/{self.rng.choice(names)}" for each, names in named.items() if names}
        song_range = self.rng.choice(list(keys))
        key, before = keys.pop(song_range), self.read_range(song_range)
        name, size = key.rpartition("/")[2], storage.open(key).size
        at_byte = spoil(storage, key, kind, list(keys.values()), self.rng)
        what = f"{kind} at byte {at_byte} of {name} after kill {after_kill}"
        try:
            lost = before - self.read_range(song_range)
        except StoreError:
            lost = before
        load_error = self.load()
        n_loaded_wrong = sum(not right for right in self.read_table().values())
        expect(UNLOADED, not n_loaded_wrong, f"{what}: {n_loaded_wrong} rows")
        [report] = self.fill([song_range])
        by_load = song_range.key in str(load_error)
        by_fill = report.n_bytes_damaged > 0 or name in str(report.error)
        named_by = " and ".join(["load"] * by_load + ["fill"] * by_fill)
        expect(FOUND, bool(named_by or not lost), f"{what}: {len(lost)} texts")
        expect(SMALL, "flip" not in kind or len(lost) <= PROMISED_TEXTS, f"{what}: {len(lost)} texts")
        # as the message says, from fill or load: a fill does not open files that are as large as its manifest has them
        errors = [words for words in (str(load_error), str(report.error)) if name in words]
        if any(advice in words for words in errors for advice in ("move it away", "remove it")):
            storage.delete(key)
            # without its manifest a range still has the vectors of its parts
            lost = before - self.read_range(song_range)
            [report] = self.fill([song_range])
        wrong = [] if report.error else self.find_wrong_songs(song_range)
        expect(REBUILT, not wrong and not report.error, f"{what}: {len(wrong)} songs left without, {report.error!r}")
        if wrong or report.error:
            cache.open(song_range).discard([])
            self.fill([song_range])
        load_error, table = self.load(), self.read_table()
        loaded = {song_id: right for song_id, right in table.items() if song_id in song_range}
        expected = {song.id: True for song in self.by_range[song_range] if not song.refused}
        expect(REBUILT, not load_error and loaded == expected, f"{what}: then loaded {len(loaded)}, {load_error}")
        self.excused.update(lost)
        self.excused_damage.update(lost)
        self.on_disk |= self.read_disk()
        self.report.damages.append(
            Damage(after_kill, kind, name, at_byte, size, len(lost), named_by or ("nobody" if lost else ""))
        )

    def finish(self) -> None:
        """Run to the end, a last range with answers spoilt after billing; hold ledger, cache and table together."""
        expect, figures = self.report.expect, self.report.figures
        errors = [str(report.error) for report in self.fill(self.ranges) if report.error]
        billings, n_twice = self.count_billings(), self.count_billed_twice()
        wrong = [text for text, n in billings.items() if n != 1 + self.excused[text]]
        expect(ONCE, not wrong, f"{len(wrong)} texts")
        kills = self.report.kills
        figures |= {
            "songs": len(self.songs),
            "songs refused": sum(song.refused for song in self.songs),
            "kills": len(kills),
            "in flight at most": IN_FLIGHT,
            "lost in flight, worst kill": max((kill.in_flight_lost for kill in kills), default=0),
            "lost in flight, all kills": sum(kill.in_flight_lost for kill in kills),
            "oldest lost text, ms before its kill": max((kill.oldest_lost_ms for kill in kills), default=0),
            "texts billed twice through kills": n_twice,
            "allowed by the promise": PROMISED_TEXTS * len(kills),
            "texts billed again after damage": sum(self.excused_damage.values()),
        }

        self.provider.control(**{**FAULTS, "latency_s": 0.01, **SPOILT})
        errors += [str(report.error) for report in self.fill([self.spoilt_range]) if report.error]
        spoilt = self.find_wrong_songs(self.spoilt_range)
        expect(SPOILED, not spoilt, f"{len(spoilt)} songs")
        mine = {song.text_hash for song in self.by_range[self.spoilt_range]}
        billings = self.count_billings()
        figures["texts of the range with spoilt answers"] = len(mine)
        figures["of them billed again"] = sum(billings[text] - 1 for text in mine)

        self.provider.control(**FAULTS)
        left = [song_id for song_range in self.by_range for song_id in self.find_wrong_songs(song_range)]
        expect(COMPLETE, not left and not errors, f"{len(left)} songs {left[:5]}, {errors[:3]}")
        expect(COMPLETE, set(billings) == self.paid_for, f"{len(self.paid_for - set(billings))} texts never billed")
        error, table = self.load(), self.read_table()
        expected = {song.id: True for song in self.songs if not song.refused}
        expect(TABLE, not error and table == expected, f"{len(table)} rows for {len(expected)} songs, {error}")
        n_requests = self.provider.ledger()["requests"]
        self.fill(list(self.pipeline.tiling))
        expect(IDLE, self.provider.ledger()["requests"] == n_requests, "it sent requests")


def spoil(storage: Storage, key: str, kind: str, others: Sequence[str], rng: Random) -> int:
    """Damage a file in one of the ways of DAMAGES; at which byte."""
    content = bytearray(_read(storage, key))
    at_byte = rng.randrange(len(content))
    if kind == "cut":
        del content[at_byte:]
    elif kind == "foreign" and others:
        at_byte, content = 0, bytearray(_read(storage, rng.choice(others)))
    elif "flip" in kind:
        if kind == "head flip":  # where a batch says how long it is, which random bytes seldom are
            heads = [at for at in range(8, len(content), 8) if content[at : at + 4] == b"\xff\xff\xff\xff"]
            at_byte = rng.choice(heads or [0]) + rng.randrange(64)
        content[at_byte] ^= 1 << rng.randrange(8)
    else:
        at_byte, content = 0, bytearray(rng.randbytes(len(content)))
    storage.put(key, bytes(content))
    return at_byte


def _read(storage: Storage, key: str) -> bytes:
    read = storage.read(key)
    assert read is not None, key
    return read.content


def run_campaign(
    n_kills: int = 25,
    seed: int = 0,
    n_songs: int = 11_000,
    say: Callable[[str], None] = lambda _: None,
    warm: bool = False,
    store: Literal["folder", "moto", "weed"] = "folder",
) -> CampaignReport:
    """Kill fills in their middle, damage files in between, finish, audit.

    Args:
        n_kills: number of kills; with fewer songs per kill each fill is shorter.
        seed: of songs, moments and damage.
        n_songs: of the catalogue; rounded to full ranges.
        say: called with each kill and each damage.
        warm: whether processes are forked from one that has loaded the libraries; then they print nothing.
        store: where the cache is: a folder, or a bucket of one of the tests' S3 servers.
    """
    rng = Random(seed)
    width = max(20, n_songs // (N_RANGES + 1))
    tiling = Tiling(width, width * (N_RANGES + 1))
    songs = make_songs(tiling, rng)
    with (
        _in_store(store) as (location, lead),
        _running_pipeline(tiling, songs, location, lead) as (pipeline, provider, folder, environment),
    ):
        campaign = Campaign(pipeline, provider, folder / "billed.jsonl", folder, songs, rng, warm)
        kinds, waiting, n_early = iter(DAMAGES * n_kills), campaign.start(False, environment), 0
        try:
            while (number := len(campaign.report.kills) + 1) <= n_kills and n_early < 3:
                by_command = number % COMMAND_EVERY == 0
                process = campaign.start(True, environment) if by_command else waiting
                if not by_command:  # it loads its modules while this one fills
                    waiting = campaign.start(False, environment)
                with _ended(process):
                    was_filling = campaign.kill(process, number, n_kills, by_command)
                n_early += not was_filling
                if was_filling:
                    say(str(campaign.report.kills[-1]))
                if was_filling and number % DAMAGE_EVERY == 0 and campaign.on_disk:
                    campaign.damage(next(kinds), number)
                    say(str(campaign.report.damages[-1]))
        finally:
            with _ended(waiting):
                pass
        log = folder / "processes.log"
        words = log.read_text(encoding="utf-8")[-500:] if log.exists() else "nothing that is kept"
        done = len(campaign.report.kills)
        campaign.report.expect(MIDDLE, done == n_kills, f"{done} of {n_kills}, the last said: {words}")
        campaign.finish()
        return campaign.report


@contextmanager
def _ended(process: "subprocess.Popen[str] | WarmProcess") -> Iterator[None]:
    """End the process at the end of the block, even after an error."""
    with process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _in_store(store: Literal["folder", "moto", "weed"]) -> Iterator[tuple[str, dict[str, str]]]:
    """The location of a new store, empty for a folder; and the variables that lead there."""
    if store == "folder":
        yield "", {}
        return
    with running_s3(store) as s3, patch.dict(os.environ, s3.environment):
        yield s3.new_url(), s3.environment


@contextmanager
def _running_pipeline(
    tiling: Tiling, songs: Sequence[Song], location: str, lead: dict[str, str]
) -> Iterator[tuple[Pipeline, Provider, Path, dict[str, str]]]:
    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    with tempfile.TemporaryDirectory(prefix="songvec-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # the embedded server's user must reach it
        database = start_embedded_server(folder / "pg")
        with database.get_connection() as connection:
            connection.execute(
                sa.text("CREATE TABLE songs (id integer PRIMARY KEY, name text, artist text, lyrics text)")
            )
            connection.execute(
                sa.text("INSERT INTO songs VALUES (:id, :name, :artist, :lyrics)"), [vars(song) for song in songs]
            )
        with running_provider(ledger_file=folder / "billed.jsonl", **FAULTS) as provider:
            settings = {
                "POSTGRES_URL": database.url,
                "FIREWORKS_API_KEY": provider.api_key,
                "FIREWORKS_BASE_URL": provider.base_url,
                "SONGVEC_STORAGE": location or str(folder / "store"),
                "SONGVEC_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
                "SONGVEC_REQUESTS_PER_MINUTE": "1000000",
                "SONGVEC_TOKENS_PER_MINUTE": "1000000000",
                "SONGVEC_MAX_REQUEST_TEXTS": str(REQUEST_TEXTS),
                "SONGVEC_CONCURRENCY": str(CONCURRENCY),
                "SONGVEC_RANGE_SIZE": str(tiling.width),
                "SONGVEC_SONG_ID_STOP": str(tiling.stop),
            }
            own = {name: value for name, value in os.environ.items() if name not in {*variables(), "DAGSTER_HOME"}}
            pipeline = Pipeline(Settings(**settings))
            cache_songs_to_parquet(pipeline.source, pipeline.store.songs, tiling)
            try:
                yield pipeline, provider, folder, own | settings | lead | {"PYTHONPATH": str(ROOT)}
            finally:
                dispose(database.url)


def _is_of(vector: np.ndarray, text_hash: bytes) -> bool:
    return np.array_equal(vector, vector_of_digest(text_hash, DIMENSIONS))


def _table(rows: Sequence[dict[str, object]], markdown: bool) -> str:
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligns = ["<" if isinstance(value, str) else ">" for value in rows[0].values()]
    if markdown:
        cells.insert(
            1, ["-" * (width - 1) + ("-" if align == "<" else ":") for width, align in zip(widths, aligns, strict=True)]
        )
    formats = [f"{align}{width}" for align, width in zip(aligns, widths, strict=True)]
    lines = [[format(*pair) for pair in zip(line, formats, strict=True)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)


def fill_on_signal(asked: str) -> None:
    """What is killed: wait for a line, then fill."""
    pipeline = Pipeline(Settings())
    first, last = (SongIdRange.from_key(key) for key in asked.split("..."))
    ranges = [song_range for song_range in pipeline.tiling if first <= song_range <= last]
    sys.stdin.readline()
    pipeline.filler().fill_ranges(ranges, lambda report: print(report, flush=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--songs", type=int, default=11_000)
    parser.add_argument("--store", choices=["folder", "moto", "weed"], default="folder", help="where the cache is")
    parser.add_argument("--markdown", action="store_true", help="tables for the documentation")
    parser.add_argument("--fill", metavar="FIRST...LAST", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fill:
        fill_on_signal(given.fill)
        return
    began = time.monotonic()
    report = run_campaign(
        given.kills, given.seed, given.songs, lambda line: print(line, file=sys.stderr, flush=True), store=given.store
    )
    report.figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(report.render(given.markdown))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
