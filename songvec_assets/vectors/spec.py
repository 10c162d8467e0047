"""The tables' names, and what a table holds, as it is recorded with it. Imports no frames: it is all a search reads.

When to add here: another property of all vectors of a table. Keep out: the table itself (`table`).
"""

import re
from dataclasses import dataclass, field

import sqlalchemy as sa

from songvec_assets.errors import TableMismatchError
from songvec_assets.postgres import schema

SERVING, STAGING, PREVIOUS = "song_embeddings", "song_embeddings_new", "song_embeddings_old"


@dataclass(frozen=True)
class TableSpec:
    """What a table holds.

    Attributes:
        model: the model id.
        dimensions: values per vector.
        vector_type: `vector` or `halfvec`.
        query_prompt, document_prompt: see `Prompts`; None: not recorded. They do not count when specs are compared.
    """

    model: str
    dimensions: int
    vector_type: str = "vector"
    query_prompt: str | None = field(default=None, compare=False)
    document_prompt: str | None = field(default=None, compare=False)

    @property
    def column_type(self) -> str:
        """The column's type as Postgres writes it."""
        return f"{self.vector_type}({self.dimensions})"

    def __str__(self) -> str:
        return f"{self.column_type} by {self.model}"


@dataclass(frozen=True)
class _SpecRecord:
    model: str
    column_type: str
    query_prompt: str | None = None
    document_prompt: str | None = None


def metadata_key(table: str, name: str) -> str:
    """The key of a table's value in `songvec.settings`: the serving table's values have the plain names."""
    return name if table == SERVING else f"{table}.{name}"


def read_spec(connection: sa.Connection, table: str = SERVING) -> TableSpec | None:
    """What a table holds, as recorded; None before a first load."""
    record = schema.read_record(connection, metadata_key(table, "table"), _SpecRecord)
    column = re.fullmatch(r"(vector|halfvec)\((\d+)\)", record.column_type) if record else None
    if record is None or column is None:
        return None
    return TableSpec(record.model, int(column[2]), column[1], record.query_prompt, record.document_prompt)


def read_serving(connection: sa.Connection) -> TableSpec:
    """What the serving table holds.

    Raises:
        TableMismatchError: nothing is loaded yet.
    """
    loaded = read_spec(connection)
    if loaded is None:
        raise TableMismatchError(
            "nothing is loaded yet, so nothing can be found: `songvec run` first", "table.not-loaded"
        )
    return loaded


def write_spec(connection: sa.Connection, table: str, spec: TableSpec) -> None:
    """Record what a table holds, within the connection's transaction; only if that changed."""
    record = _SpecRecord(spec.model, spec.column_type, spec.query_prompt, spec.document_prompt)
    key = metadata_key(table, "table")
    if schema.read_record(connection, key, _SpecRecord) != record:
        schema.write_value(connection, key, vars(record))
