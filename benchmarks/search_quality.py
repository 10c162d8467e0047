"""How well searches by words, by vectors and by both answer the sample catalogue's labelled queries.

The queries are divided by a hash of their words: how the two lists are fused was chosen on one half, and is judged on
the other. Words are also matched by spelling if the server has pg_trgm, which the embedded one lacks.

    python -m benchmarks.search_quality               # the embedded server
    python -m benchmarks.search_quality --url URL     # an empty database of a server with pgvector, and maybe pg_trgm

When to add here: another half, slice or server. Keep out: the measures (`songvec_assets.search`).
"""

import argparse
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from songvec_assets.pipeline import Pipeline
from songvec_assets.postgres.embedded import create_songs_table, start_embedded_server
from songvec_assets.postgres.engine import Database
from songvec_assets.search.evaluate import Evaluation
from songvec_assets.search.labels import LabelledQuery, label_samples
from songvec_assets.settings import DEMO_MODEL, Settings


def divide(queries: Sequence[LabelledQuery]) -> dict[str, list[LabelledQuery]]:
    """The half on which the fusion was chosen, and the half that judges it."""
    halves: dict[str, list[LabelledQuery]] = {"chosen on": [], "judged on": []}
    for query in queries:
        is_judge = blake2b(query.words.encode()).digest()[0] & 1
        halves["judged on" if is_judge else "chosen on"].append(query)
    return halves


def render(half: str, found: Evaluation) -> str:
    """A half's figures as a Markdown table."""
    lines = [f"| {half} | mode | queries | recall@10 | MRR@10 | nDCG@10 |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for score in found.scores:
        figures = " | ".join(
            f"{of.mean:.3f} ({of.low:.3f}–{of.high:.3f})" for of in (score.recall, score.mrr, score.ndcg)
        )
        lines.append(f"| {score.slice} | {score.mode} | {score.n_queries} | {figures} |")
    return "\n".join([*lines, "", *(verdict.describe() for verdict in found.verdicts), *found.notes])


def main() -> None:
    """Load the sample catalogue, and print both halves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="of an empty database; default: the embedded server, in a temporary folder")
    given = parser.parse_args().url
    with tempfile.TemporaryDirectory(prefix="songvec-", ignore_cleanup_errors=True) as folder:
        database = Database(given) if given else start_embedded_server(Path(folder) / "pg")
        create_songs_table(database)
        settings = Settings(postgres_url=database.url, embedding_model=DEMO_MODEL, storage=str(Path(folder) / "store"))
        with Pipeline(settings) as songs:
            songs.run()
            queries = label_samples(songs.database, songs.source)
            assert queries, "expected an empty database, this one has other songs"
            for half, asked in divide(queries).items():
                print(render(half, songs.evaluate(asked)), end="\n\n")


if __name__ == "__main__":
    main()
