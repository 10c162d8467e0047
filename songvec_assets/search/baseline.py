"""A baseline for searches: BM25 over the songs' texts, by the package bm25s (extra `evaluate`), in this process.

When to add here: another ranking to compare searches with. Keep out: what searches find (`nearest`), and how good it is
(`measures`).
"""

from collections.abc import Sequence

from songvec_assets.errors import SearchError
from songvec_assets.search.measures import N_FIRST
from songvec_assets.songs.snapshots import Snapshots
from songvec_assets.songs.text import TextSpec

NAME = "bm25s"
MOST_SONGS = 200_000
"""All texts and their index are held in memory: about 2 GB."""


def search_bm25(snapshots: Snapshots, spec: TextSpec, queries: Sequence[str]) -> list[list[int]]:
    """The song_ids with the best scores for each query, best first; songs without a word of it are left out.

    The package's own defaults: words of two letters or more, without case, stemming or English stop words.

    Raises:
        SearchError: the package is not installed, or there are too many songs, or none.
    """
    try:
        import bm25s
    except ImportError:
        raise SearchError(f"{NAME} is not installed: pip install 'songvec-assets[evaluate]'") from None
    n_songs = sum(snapshots.count().values())
    if not 0 < n_songs <= MOST_SONGS:
        raise SearchError(f"{NAME} takes 1 to {MOST_SONGS:,} songs, the snapshots hold {n_songs:,}")
    song_ids: list[int] = []
    texts: list[str] = []
    for each in snapshots.ranges():
        rendered = snapshots.render(each, spec, snapshots.read_embeddable(each))
        song_ids.extend(rendered["song_id"])
        texts.extend(rendered["text"])
    ranking = bm25s.BM25()
    ranking.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    words = bm25s.tokenize([*queries], show_progress=False, return_ids=False)
    found, scores = ranking.retrieve(words, corpus=song_ids, k=min(N_FIRST, len(texts)), show_progress=False)
    return [
        [int(song_id) for song_id, score in zip(*each, strict=True) if score > 0]
        for each in zip(found, scores, strict=True)
    ]
