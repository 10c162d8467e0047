"""Labelled queries: which songs answer a query, and how well; from a file, or those of the sample catalogue.

A line of the file is a query, its songs and optionally a slice, separated by tabs; docs/search.md has the format. When
to add here: another source of labelled queries. Keep out: how well they are answered (`evaluate`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from songvec_assets.errors import SearchError
from songvec_assets.postgres.engine import Database
from songvec_assets.samples import read_sample_queries, read_sample_songs
from songvec_assets.search.query import Query
from songvec_assets.songs.ranges import name_some
from songvec_assets.songs.source import SongsSource

ALL = "all"
"""The slice of a query that names none."""
MAX_GRADE = 4
_CODE = "search.labels"
_HEADER = re.compile(r"\s*query\s*\t\s*song_ids\b.*", re.IGNORECASE)
_SONG = re.compile(r"(-?\d{1,10})(?::(\d{1,3}))?")
_NAMED = 10


@dataclass(frozen=True)
class LabelledQuery:
    """A query, and the songs that answer it.

    Attributes:
        words: what is searched for.
        grades: by song_id, from 1 (in part) to MAX_GRADE; other songs are not relevant.
        slice: a name for queries of one kind, which are also measured on their own.
    """

    words: str
    grades: dict[int, int] = field(hash=False)
    slice: str = ALL


def read_labels(path: str | Path) -> list[LabelledQuery]:
    """The labelled queries of a file.

    Raises:
        SearchError: it cannot be read, is empty, or has bad lines, which are named with what was expected.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SearchError(f"{path}: expected a file of labelled queries, got {error.strerror}", _CODE) from None
    except UnicodeDecodeError as error:
        at = error.object.count(b"\n", 0, error.start) + 1
        raise SearchError(f"{path}, line {at}: expected UTF-8, got {error.object[error.start]:#x}", _CODE) from None
    found: dict[tuple[str, str], LabelledQuery] = {}
    wrong: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or (number == 1 and _HEADER.fullmatch(line)):
            continue
        try:
            _add(found, _parse(line))
        except SearchError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
        raise SearchError(f"{path}: {'; '.join(wrong[:_NAMED])}{more}", _CODE)
    if not found:
        raise SearchError(f"{path}: expected a line per query: query, song_ids, slice; got none", _CODE)
    return [*found.values()]


def _parse(line: str) -> LabelledQuery:
    columns = line.split("\t")
    if len(columns) > 3:
        raise SearchError(f"expected up to 3 columns, separated by tabs, got {len(columns)}")
    words, songs, kind = map(str.strip, [*columns, "", ""][:3])
    Query(words=words).check()
    if not songs:
        raise SearchError("expected song_ids after a tab, got none")
    query = LabelledQuery(words, {}, kind or ALL)
    for song in filter(None, re.split(r"[\s,;]+", songs)):
        match = _SONG.fullmatch(song)
        song_id, grade = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if not (1 <= grade <= MAX_GRADE):
            raise SearchError(
                f"expected a song_id such as 17, or 17:2 with a grade from 1 to {MAX_GRADE}, got {song!r}"
            )
        _grade(query, song_id, grade)
    return query


def _add(found: dict[tuple[str, str], LabelledQuery], query: LabelledQuery) -> None:
    """Songs of one query may be on several lines."""
    known = found.setdefault((query.slice, query.words), query)
    for song_id, grade in query.grades.items():
        _grade(known, song_id, grade)


def _grade(query: LabelledQuery, song_id: int, grade: int) -> None:
    if query.grades.setdefault(song_id, grade) != grade:
        raise SearchError(f"expected one grade per song, got two for song {song_id}")


def drop_unknown(
    database: Database, source: SongsSource, queries: Sequence[LabelledQuery]
) -> tuple[list[LabelledQuery], list[str]]:
    """The queries without songs that the songs table does not have, and without queries that no other song answers.

    Returns:
        The queries, and a note that names what was left out.

    Raises:
        SearchError: no query is left.
    """
    named = sorted({song_id for query in queries for song_id in query.grades})
    statement = sa.text(f"SELECT {source.song_id} FROM {source.relation} WHERE {source.song_id} = ANY (:named)")
    with database.get_connection("web") as connection:
        known = {*connection.scalars(statement, {"named": named})}
    unknown = [song_id for song_id in named if song_id not in known]
    kept = []
    for query in queries:
        grades = {song_id: grade for song_id, grade in query.grades.items() if song_id in known}
        if grades:
            kept.append(LabelledQuery(query.words, grades, query.slice))
    if not unknown:
        return kept, []
    listed = name_some([*map(str, unknown)], most=_NAMED)
    which = f"{len(unknown):,} of {len(named):,} labelled song_ids are not in table {source.table} ({listed})"
    if not kept:
        raise SearchError(f"{which}: expected song_ids of its column {source.song_id_column}", _CODE)
    return kept, [f"left out: {which}, and {len(queries) - len(kept):,} queries that no other song answers"]


def label_samples(database: Database, source: SongsSource) -> list[LabelledQuery] | None:
    """The labelled queries of the sample catalogue; None if the songs table holds anything else."""
    samples = read_sample_songs()
    expected = {*zip(samples["name"], samples["artist"], strict=True)}
    columns = ", ".join((source.song_id, source.name, source.artist))
    with database.get_connection("web") as connection:
        rows = connection.execute(sa.text(f"SELECT {columns} FROM {source.relation} LIMIT {len(expected) + 1}")).all()
    if {(name, artist) for _, name, artist in rows} != expected:
        return None
    song_ids = {name: song_id for song_id, name, _ in rows}
    found: dict[tuple[str, str], LabelledQuery] = {}
    for kind, words, song, grade in read_sample_queries().iter_rows():
        _add(found, LabelledQuery(words, {song_ids[song]: grade}, kind))
    return [*found.values()]
