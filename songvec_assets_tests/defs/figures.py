"""Made-up figures of an index, and how a chart is opened."""

import io

from PIL import Image

from songvec_assets.vectors.index.catalog import IndexInfo
from songvec_assets.vectors.index.recall import RecallReport
from songvec_assets.vectors.index.recall_searches import RecallPoint
from songvec_assets.vectors.index.sizing import estimate_build
from songvec_assets.vectors.index.upkeep import IndexReport

POINTS = tuple(
    RecallPoint(probes, min(rows, made_up), 0.0, 1.0, 200, rows, made_up, ms, 3 * ms)
    for probes, rows, made_up, ms in ((1, 0.6, 0.5, 1.1), (2, 0.8, 0.7, 1.5), (3, 0.97, 0.96, 2.0), (4, 1, 0.99, 2.9))
)


RECALL = RecallReport(20_000, 20_000, 0.95, POINTS, 3, 0, 12.0, False)


REPORT = IndexReport(
    "there is none", True, IndexInfo(20_000, 141, 3, 10_000_000), 12.3456, RECALL, estimate_build(20_000, 141, 2000)
)


def open_picture(png: bytes) -> Image.Image:
    """The picture, decoded."""
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return picture.convert("RGB")
