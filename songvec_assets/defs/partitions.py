"""The partitions, one per range of song_ids, and how backfills divide them.

When to add here: another setting that shapes the graph; it is read once, when the graph loads. Keep out: settings of a
run (`resources`).
"""

import os

import dagster as dg

from songvec_assets.settings import GraphSettings, variables
from songvec_assets.settings_group import check_names
from songvec_assets.songs.ranges import Tiling

check_names(os.environ, variables())
_GRAPH = GraphSettings()

TILING = Tiling(width=_GRAPH.range_size, stop=_GRAPH.song_id_stop, start=_GRAPH.song_id_start)
TILING.check_count()

song_id_ranges = dg.StaticPartitionsDefinition([song_range.key for song_range in TILING])

# by default one run takes all ranges of a backfill; with many workers several runs may be faster
one_run = dg.BackfillPolicy.single_run()
ranges_policy = dg.BackfillPolicy.multi_run(_GRAPH.ranges_per_run) if _GRAPH.ranges_per_run else one_run
