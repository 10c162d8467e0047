"""How well searches answer labelled queries: those of a table, and of a staging table before it is swapped in.

When to add here: another measurement by labelled queries. Keep out: how an answer is measured (`search.evaluate`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import SearchError, SongvecError, StoppedError, TableMismatchError, describe
from songvec_assets.search import baseline, evaluate, labels, queries
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.vectors.index.audit import QualityChange, find_nearest_songs
from songvec_assets.vectors.spec import STAGING, TableSpec
from songvec_assets.vectors.table import VectorTable
from songvec_assets.wiring import Wiring

_JUDGE_PATIENCE_S = 60.0


def label_queries(
    songs: Wiring, given: str | Path | Sequence[LabelledQuery] | None = None
) -> tuple[list[LabelledQuery], list[str]]:
    """The labelled queries without unknown songs, and a note that names those; see `Pipeline.evaluate`."""
    path = songs.settings.evaluation_queries if given is None else given
    if isinstance(path, str | Path):
        labelled: Sequence[LabelledQuery] | None = labels.read_labels(path)
    else:
        labelled = labels.label_samples(songs.database, songs.source) if path is None else path
    if not labelled:
        raise SearchError(
            "expected labelled queries: name a file of them, or set SONGVEC_EVALUATION_QUERIES", "search.labels"
        )
    return labels.drop_unknown(songs.database, songs.source, labelled)


def evaluate_searches(
    songs: Wiring, labelled: Sequence[LabelledQuery], vectors: Float32Matrix, model: str, notes: Sequence[str]
) -> Evaluation:
    """How well searches by text, by vector and by both answer labelled queries, compared with BM25.

    Args:
        vectors: of the queries, (n queries, dimensions).
        model: that made them.
        notes: what was left out before.
    """
    found, left_out = evaluate.find_songs(songs.source, labelled, vectors, model)
    words = [query.words for query in labelled]
    try:
        found[baseline.NAME] = baseline.search_bm25(songs.store.songs, songs.text_spec, words)
    except SongvecError as error:  # only a comparison is missing
        left_out.append(f"left out: {error}")
    return evaluate.evaluate(labelled, found, [*notes, *left_out])


def judge_staging(songs: Wiring) -> QualityChange:
    """How well the serving and the staging table answer the labelled queries of the settings.

    Pays for the queries' vectors by both models. An error is part of the answer: a swap is not refused for it.
    """
    try:
        labelled, _ = label_queries(songs)
        tables = (songs.table, songs.as_loaded()), (VectorTable(songs.database, STAGING), songs)
        vectors: dict[TableSpec, Float32Matrix] = {}
        scores = []
        for table, wiring in tables:
            spec = wiring.table_spec
            if table.spec != spec:
                raise TableMismatchError(f"{table.name} holds {table.spec}, and queries would be embedded for {spec}")
            if spec not in vectors:
                words = [query.words for query in labelled]
                # a complete table does not wait long for a figure
                embedder = wiring.embedder(patience_s=_JUDGE_PATIENCE_S)
                vectors[spec] = queries.embed_queries(embedder, words, wiring.prompts.query, songs.search_budget())
            found = find_nearest_songs(table, vectors[spec])
            scores.append([evaluate.measure_ndcg(*each) for each in zip(labelled, found, strict=True)])
    except StoppedError:
        raise
    except SongvecError as error:
        return QualityChange(trouble=describe(error))
    serving, staged = map(np.mean, scores)
    difference = evaluate.compare(scores[1], scores[0])
    return QualityChange(len(labelled), float(serving), float(staged), difference.low, difference.high)
