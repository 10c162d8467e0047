"""How well searches answer labelled queries: those of a table, and of a staging table before it is swapped in.

When to add here: another measurement by labelled queries. Keep out: how an answer is measured (`search.evaluate`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from songvec_assets.errors import SearchError, SongvecError, StoppedError, TableMismatchError, describe
from songvec_assets.search import baseline, evaluate, labels, queries
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery
from songvec_assets.searches import Searches
from songvec_assets.vectors.index.audit import QualityChange, find_nearest_songs
from songvec_assets.vectors.spec import STAGING, TableSpec
from songvec_assets.vectors.table import VectorTable
from songvec_assets.wiring import Wiring

_JUDGE_PATIENCE_S = 60.0


class Evaluations(Searches, Wiring):
    """The evaluations of `Pipeline`."""

    def evaluate(
        self,
        labelled_queries: str | Path | Sequence[LabelledQuery] | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> Evaluation:
        """How well searches by text, by vector and by both answer labelled queries, compared with BM25.

        A query costs its tokens once; all are embedded with few requests.

        Args:
            labelled_queries: their file, or themselves; None: SONGVEC_EVALUATION_QUERIES, or those of the samples.
            on_trouble: notified if the provider fails and is tried again.

        Raises:
            SearchError: there are no labelled queries, a line of the file cannot be read, or no song in it is known;
                nothing was paid.
            TableMismatchError, ProviderError: see `embed_query`.
        """
        labelled, notes = self.label_queries(labelled_queries)
        words = [query.words for query in labelled]
        vectors = self._embed(words, self.serving, on_trouble)
        found, left_out = evaluate.find_songs(self.source, labelled, vectors, self.serving.settings.model)
        try:
            found[baseline.NAME] = baseline.search_bm25(self.store.songs, self.text_spec, words)
        except SongvecError as error:  # only a comparison is missing
            left_out.append(f"left out: {error}")
        return evaluate.evaluate(labelled, found, [*notes, *left_out])

    def label_queries(
        self, given: str | Path | Sequence[LabelledQuery] | None = None
    ) -> tuple[list[LabelledQuery], list[str]]:
        """See `evaluate`: the labelled queries without unknown songs, and a note that names the unknown ones."""
        path = self.settings.evaluation_queries if given is None else given
        if isinstance(path, str | Path):
            labelled: Sequence[LabelledQuery] | None = labels.read_labels(path)
        else:
            labelled = labels.label_samples(self.database, self.source) if path is None else path
        if not labelled:
            raise SearchError(
                "expected labelled queries: name a file of them, or set SONGVEC_EVALUATION_QUERIES", "search.labels"
            )
        return labels.drop_unknown(self.database, self.source, labelled)

    def judge_staging(self) -> QualityChange:
        """How well the serving and the staging table answer the labelled queries of the settings.

        Pays for the queries' vectors by both models. An error is part of the answer: a swap is not refused for it.
        """
        try:
            labelled, _ = self.label_queries()
            tables = (self.table, self.as_loaded()), (VectorTable(self.database, STAGING), self)
            vectors: dict[TableSpec, NDArray[np.float32]] = {}
            scores = []
            for table, wiring in tables:
                spec = wiring.table_spec
                if table.spec != spec:
                    raise TableMismatchError(
                        f"{table.name} holds {table.spec}, and queries would be embedded for {spec}"
                    )
                if spec not in vectors:
                    words = [query.words for query in labelled]
                    # a complete table does not wait long for a figure
                    embedder = wiring.embedder(patience_s=_JUDGE_PATIENCE_S)
                    vectors[spec] = queries.embed_queries(embedder, words, wiring.prompts.query, self.search_budget())
                found = find_nearest_songs(table, vectors[spec])
                scores.append([evaluate.measure_ndcg(*each) for each in zip(labelled, found, strict=True)])
        except StoppedError:
            raise
        except SongvecError as error:
            return QualityChange(trouble=describe(error))
        serving, staged = map(np.mean, scores)
        difference = evaluate.compare(scores[1], scores[0])
        return QualityChange(len(labelled), float(serving), float(staged), difference.low, difference.high)
