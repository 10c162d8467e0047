"""The line that is shown for a song: the one that shares words with the query, or that means the same."""

import numpy as np
import pytest

from songvec_assets.embedding.demo import DemoEmbedder
from songvec_assets.embedding.embedder import Embedder
from songvec_assets.search.lines import N_BY_MEANING, add_best_lines
from songvec_assets.search.nearest import Hit
from songvec_assets.search.queries import embed_queries

SEA = "Haul in, the bell is gone\n\n  A storm is at the door \nSalt in the bread\nStormy, and a storm at sea"


def best_line(query: str, lyrics: str | None, embedder: Embedder | None = None) -> str | None:
    """Of one song, for a query that is embedded by the model if one is given."""
    vector = np.zeros(0, np.float32) if embedder is None else embed_queries(embedder, [query], None)[0]
    (hit,) = add_best_lines([Hit(1, "Sea", "Ann", lyrics, 0.5)], query, vector, embedder)
    return hit.best_line


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("bread", "Salt in the bread"),
        ("a STORM in Seattle", "A storm is at the door"),
        ("storms at sea", "Stormy, and a storm at sea"),
        ("the doors", "A storm is at the door"),
        ("losing my job", "Haul in, the bell is gone"),
        ("at the", "Haul in, the bell is gone"),
        ("…", "Haul in, the bell is gone"),
        ("", "Haul in, the bell is gone"),
        ("b(r[ea]d)*", "Haul in, the bell is gone"),
    ],
)
def test_by_words_a_line_counts_for_what_it_shares_and_the_first_of_equals_is_taken(query: str, expected: str) -> None:
    assert best_line(query, SEA) == expected


def test_accents_case_and_scripts_without_spaces_do_not_hide_a_word() -> None:
    assert best_line("etude", "la la\nUne ÉTUDE") == "Une ÉTUDE"
    assert best_line("失业", "天亮了\n他失业了") == "他失业了"


@pytest.mark.parametrize("lyrics", [None, "", " \n\n"])
def test_a_song_without_lyrics_has_no_line(lyrics: str | None) -> None:
    assert best_line("storm", lyrics) is None
    assert best_line("storm", lyrics, DemoEmbedder()) is None


def test_by_meaning_a_line_need_not_share_a_word_nor_a_language() -> None:
    lyrics = "Good morning, dear\nThe cup is on the table\nHe was fired from the factory at noon\nla la la"
    assert best_line("losing my job", lyrics, DemoEmbedder()) == "He was fired from the factory at noon"
    assert best_line("seine Arbeit verlieren", lyrics, DemoEmbedder()) == "He was fired from the factory at noon"


def test_only_the_nearest_songs_lines_are_embedded() -> None:
    embedded: list[str] = []

    class Recording(DemoEmbedder):
        def embed(self, texts):  # type: ignore[no-untyped-def]
            embedded.extend(texts)
            return super().embed(texts)

    hits = [Hit(n, "Sea", "Ann", f"number {n}\nla la\na job", 0.5) for n in range(N_BY_MEANING + 1)]
    vector = embed_queries(DemoEmbedder(), ["job"], None)[0]
    found = add_best_lines(
        hits,
        "job",
        vector,
        Recording(),
    )
    assert [hit.song_id for hit in found] == [*range(N_BY_MEANING + 1)]
    assert {hit.best_line for hit in found} == {"a job"}
    assert sorted(embedded) == sorted(["la la", "a job", *(f"number {n}" for n in range(N_BY_MEANING))])
