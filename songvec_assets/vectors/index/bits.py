"""The functions that make bits of a vector, one per mean: they are made, never changed, and dropped when unused.

A bit says whether a value of the vector, at unit length, is above its mean over all rows. `songvec.bits_<digest>` has
the mean in its body. Postgres would keep an index as it is if its function were replaced, and find wrong neighbors:
therefore the name is a digest of the mean, and another mean is another function and another index. When to add here:
another question about a mean. Keep out: when an index is built again (`upkeep`).
"""

from hashlib import blake2b

import sqlalchemy as sa
from sqlalchemy import text

from songvec_assets.vectors.table import VectorTable

SAMPLE_ROWS = 5_000
"""About: the mean of this number of rows is off by 1.4 % of the vectors' spread about it."""

_READ_MEAN = """
    SELECT avg(l2_normalize(embedding::vector))::text FROM {table} TABLESAMPLE SYSTEM (:percent) REPEATABLE (0)
"""
# the function's body is the one place where its mean is kept
_READ_DRIFT = """
    SELECT (:mean)::vector <-> mean, vector_norm(mean) FROM (
        SELECT substring(pg_get_function_sqlbody(oid) FROM '\\[[^]]*\\]')::vector AS mean
        FROM pg_proc WHERE oid = to_regproc('songvec.' || :function)
    ) AS made
"""
_UNUSED = """
    SELECT p.oid::regprocedure::text FROM pg_proc p
    WHERE p.pronamespace = to_regnamespace('songvec') AND p.proname ~ '^bits_[0-9a-f]+$'
      AND pg_has_role(p.proowner, 'USAGE')
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.refclassid = 'pg_proc'::regclass AND d.refobjid = p.oid)
      AND NOT EXISTS (SELECT FROM songvec.settings s
                      WHERE s.key ~ '^(.*[.])?building$' AND s.value ->> 'function' = p.proname)
"""


def read_mean(connection: sa.Connection, table: str) -> str | None:
    """The mean of a sample of a table's rows at unit length, as the server prints it; None: there are no rows.

    The same rows give the same mean. Pages are drawn by chance; a vector of 2,000 values fills one.
    """
    n_rows = connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0
    percent = min(100.0, 100 * SAMPLE_ROWS / max(1, n_rows))
    mean: str | None = connection.scalar(text(_READ_MEAN.format(table=table)), {"percent": percent})
    return mean


def name_function(mean: str) -> str:
    """The name of a mean's function, in schema `songvec`."""
    return f"bits_{blake2b(mean.encode(), digest_size=8).hexdigest()}"


def create_function(connection: sa.Connection, mean: str) -> str:
    """Make the function of a mean, unless there is one; returns its name."""
    name = name_function(mean)
    if connection.scalar(text("SELECT to_regproc('songvec.' || :name) IS NULL"), {"name": name}):
        # a body in quotes would be read with the search_path of an index build, which lacks the extension
        connection.exec_driver_sql(f"""
            CREATE FUNCTION songvec.{name}(embedding vector) RETURNS bit LANGUAGE sql IMMUTABLE PARALLEL SAFE
            RETURN binary_quantize(l2_normalize(embedding) - '{mean}'::vector)
        """)
    return name


def read_drift(connection: sa.Connection, table: VectorTable) -> float | None:
    """How far the mean of the rows is from that of the index, relative to the spread of the rows about it.

    The spread is the root mean square of their distances from it. None: the table has no valid index by bits.
    """
    index = table.find_index(connection)
    if index is None or index.function is None:
        return None
    mean = read_mean(connection, table.name)
    if mean is None:
        return None
    distance, length = connection.execute(text(_READ_DRIFT), {"mean": mean, "function": index.function}).one()
    # of unit vectors
    return float(distance / max(1e-6, 1 - length**2) ** 0.5)


def drop_unused(connection: sa.Connection) -> None:
    """Drop the functions that no index uses, nor a build that began is about to."""
    for function in connection.scalars(text(_UNUSED)).all():
        connection.exec_driver_sql(f"DROP FUNCTION {function}")
