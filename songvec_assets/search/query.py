"""What is searched for: words, a vector or a song; how many songs; and which conditions they meet. Pure.

It is checked before a query is paid for; the SQL functions check the same again for those who call them. When to add
here: another part of a request. Keep out: the SQL that answers it (`nearest`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from songvec_assets.errors import SearchError

Mode = Literal["vector", "text", "hybrid"]
Condition = tuple[str, str, Any]
"""A column of the songs table, one of OPERATORS, and a value; for `in` a list of values."""

OPERATORS = ("=", "<>", "<", "<=", ">", ">=", "in", "contains", "starts")
"""`contains` and `starts` compare text, ignore case, and take `%` and `_` literally."""
MAX_LIMIT, MAX_CHARS, MAX_VALUES = 1000, 4000, 1000

_CONDITION = re.compile(r"""\s*("(?:[^"]|"")+"|[^\s=<>"]+)\s*(<=|>=|<>|=|<|>|(?:in|contains|starts)(?=\s))\s*(.*)""")


@dataclass(frozen=True)
class Query:
    """What is searched for: a vector, words, both (fused), or a song.

    Attributes:
        vector: (dimensions,).
        words: compared with names and artists.
        song_id: find the songs near this one, without itself.
        limit: songs at most, up to MAX_LIMIT.
        where: conditions that all hold: `[("artist", "=", "Ann"), ("year", "in", [1990, 1991])]`.
        columns: of the songs table that `where` may name.
        model: that made the vector; None: not known.
        explain: whether hits say how they were found.
        mode: what becomes of words: a vector, a comparison with names and artists, or both.
    """

    vector: NDArray[np.float32] | None = None
    words: str | None = None
    song_id: int | None = None
    limit: int = 10
    where: Sequence[Condition] = ()
    columns: Sequence[str] = ()
    model: str | None = None
    explain: bool = False
    mode: Mode = "vector"

    @classmethod
    def of(cls, given: str | int | NDArray[np.float32], mode: Mode, **options: Any) -> "Query":
        """A checked query from a text, a song_id or a vector. A text's vector is still to be made.

        Raises:
            SearchError: something is empty, too long, out of range, not listed or contradicts the mode.
        """
        if mode not in get_args(Mode):
            raise SearchError(f"expected a mode of {', '.join(get_args(Mode))}, got {mode!r}")
        if isinstance(given, str):
            query = cls(words=given, mode=mode, **options)
        elif mode != "vector":
            raise SearchError(f"mode {mode} compares words, and the query has none: give a text, or leave mode out")
        elif isinstance(given, int | np.integer):
            query = cls(song_id=int(given), **options)
        else:
            query = cls(vector=np.asarray(given, dtype=np.float32), **options)
        query.check()
        return query

    def check(self) -> None:
        """See `of`."""
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 1 <= self.limit <= MAX_LIMIT:
            raise SearchError(f"expected a limit from 1 to {MAX_LIMIT}, got {self.limit!r}")
        if self.words is not None and not self.words.strip("\0 \t\r\n"):
            raise SearchError("the query is empty: expected words, a song or a vector")
        if self.words is not None and len(self.words) > MAX_CHARS:
            raise SearchError(f"expected up to {MAX_CHARS} characters, got {len(self.words)}")
        if self.vector is not None and self.vector.ndim != 1:
            raise SearchError(f"expected a 1-d vector of finite values, got shape {self.vector.shape}")
        if self.vector is not None and not np.isfinite(self.vector).all():
            raise SearchError("expected a 1-d vector of finite values, got one with NaN or infinity")
        if self.song_id is not None and not -(2**31) <= self.song_id < 2**31:
            raise SearchError(f"song {self.song_id} has no vector in the table", "search.unknown-song")
        for condition in self.where:
            self._check_condition(condition)

    def _check_condition(self, condition: Condition) -> None:
        if isinstance(condition, str) or len(condition) != 3:
            raise SearchError(f"expected a condition (column, operator, value), got {condition!r}")
        column, operator, value = condition
        if column not in self.columns:
            raise SearchError(
                f"expected a filter of {', '.join(self.columns) or 'no column'}, got {column!r}: list the column in "
                "SONGVEC_FILTER_COLUMNS",
                "search.column",
            )
        is_list = isinstance(value, list | tuple)
        if operator not in OPERATORS or is_list != (operator == "in") or (is_list and len(value) > MAX_VALUES):
            raise SearchError(
                f"expected an operator of {', '.join(OPERATORS)}, with one value, or for in up to {MAX_VALUES} in a "
                f"list; got {operator!r} with {len(value) if is_list else 1}"
            )

    @property
    def needs_vector(self) -> bool:
        """Whether its words are still to be embedded."""
        return self.words is not None and self.mode != "text"

    @property
    def parameters(self) -> dict[str, Any]:
        """For the SQL functions. A value becomes text, which the server reads as the column's type."""
        return {
            "vector": None if self.vector is None else json.dumps(self.vector.tolist()),
            "words": None if self.words is None else self.words.replace("\0", " "),
            "song_id": self.song_id,
            "limit": self.limit,
            "filter": json.dumps([*map(list, self.where)], default=str),
            "model": self.model,
        }


def parse_condition(given: str) -> Condition:
    """A condition as it is typed: `artist = Ann`, `"release year" >= 1990`, `genre in folk, jazz`."""
    match = _CONDITION.fullmatch(given)
    if match is None:
        raise SearchError(f"expected a column, an operator of {', '.join(OPERATORS)}, and a value, got {given!r}")
    column, operator, value = match.groups()
    name = column[1:-1].replace('""', '"') if column.startswith('"') else column
    return name, operator, [each.strip() for each in value.split(",")] if operator == "in" else value.strip()
