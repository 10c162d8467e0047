"""The kinds of index, in the words of CREATE INDEX."""

import pytest

from songvec_assets.settings import PostgresSettings
from songvec_assets.vectors.index.kinds import KINDS, choose_kind


@pytest.mark.parametrize(
    ("name", "vector_type", "definition"),
    [
        ("ivfflat", "vector", "USING ivfflat (embedding vector_cosine_ops) WITH (lists = 7)"),
        ("ivfflat", "halfvec", "USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = 7)"),
        (
            "ivfflat_halfvec",
            "vector",
            "USING ivfflat ((embedding::halfvec(8)) halfvec_cosine_ops) WITH (lists = 7)",
        ),
        ("ivfflat_halfvec", "halfvec", "USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = 7)"),
        (
            "ivfflat_bit",
            "halfvec",
            "USING ivfflat (((songvec.bits_1(embedding::vector))::bit(8)) bit_hamming_ops) WITH (lists = 7)",
        ),
        (
            "hnsw_bit",
            "vector",
            "USING hnsw (((songvec.bits_1(embedding::vector))::bit(8)) bit_hamming_ops) "
            "WITH (m = 16, ef_construction = 64)",
        ),
    ],
)
def test_each_is_defined_for_each_type_of_column(name: str, vector_type: str, definition: str) -> None:
    assert choose_kind(name, vector_type).define(vector_type, 8, 7, "bits_1") == definition


def test_each_is_a_value_of_the_setting_and_no_other() -> None:
    allowed = PostgresSettings.model_fields["index_kind"].annotation
    assert [*KINDS] == [*allowed.__args__]  # type: ignore[union-attr]
