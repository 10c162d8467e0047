"""The kinds of index that a table may have: what each indexes, and by which method. Pure.

    ivfflat          the vectors, in lists
    ivfflat_halfvec  the vectors rounded to half floats, in lists: half the size
    ivfflat_bit      a bit per value, above or below the mean, in lists: a thirtieth of the size
    hnsw_bit         the same bits, in a graph

A search by bits finds candidates, and then puts these into exact order by their vectors. All kinds are built and
searched by the same code. When to add here: another kind. Keep out: the bits' function (`index/bits`), what a build
takes (`index/sizing`), and the SQL of a search, which the function `songvec.nearest_sql` makes of the index itself.
"""

from dataclasses import dataclass

_M, _EF_CONSTRUCTION = 16, 64
"""Neighbors of a row in the graph, and how widely a build looks for them: pgvector's defaults."""
MOST_EF_SEARCH = 1000
"""pgvector's own limit."""
FIRST_CANDIDATES = 400
"""Until recall is measured; the SQL function `songvec.search` has the same number."""


@dataclass(frozen=True)
class IndexKind:
    """A kind of index.

    Attributes:
        name: as in SONGVEC_INDEX_KIND.
        method: of Postgres: `ivfflat` or `hnsw`.
        indexed: the type of what is indexed: `halfvec` or `bit`; None: the column's own.
    """

    name: str
    method: str
    indexed: str | None = None

    @property
    def is_bits(self) -> bool:
        """Whether it finds candidates, whose exact order is found by their vectors."""
        return self.indexed == "bit"

    @property
    def has_lists(self) -> bool:
        """Whether its rows are in lists, of which a search visits some; else they are in a graph."""
        return self.method == "ivfflat"

    def indexed_type(self, vector_type: str) -> str:
        """The type of what is indexed of a column of this type."""
        return self.indexed or vector_type

    def define(self, vector_type: str, dimensions: int, lists: int, function: str = "") -> str:
        """The end of CREATE INDEX, from USING on.

        Args:
            vector_type: of the column.
            dimensions: of its vectors.
            lists: of the index, if it has any.
            function: that makes bits of a vector, if it indexes bits.
        """
        if self.is_bits:
            # without the outer cast Postgres does not know how many bits there are
            key = f"((songvec.{function}(embedding::vector))::bit({dimensions})) bit_hamming_ops"
        elif self.indexed in (None, vector_type):
            key = f"embedding {vector_type}_cosine_ops"
        else:
            key = f"(embedding::{self.indexed}({dimensions})) {self.indexed}_cosine_ops"
        options = f"lists = {lists:d}" if self.has_lists else f"m = {_M}, ef_construction = {_EF_CONSTRUCTION}"
        return f"USING {self.method} ({key}) WITH ({options})"


IVFFLAT = IndexKind("ivfflat", "ivfflat")
KINDS = {
    kind.name: kind
    for kind in (
        IVFFLAT,
        IndexKind("ivfflat_halfvec", "ivfflat", "halfvec"),
        IndexKind("ivfflat_bit", "ivfflat", "bit"),
        IndexKind("hnsw_bit", "hnsw", "bit"),
    )
}


def choose_kind(name: str, vector_type: str) -> IndexKind:
    """The kind of a setting for a column of this type: half floats need no rounding."""
    kind = KINDS[name]
    return IVFFLAT if kind.indexed == vector_type else kind
