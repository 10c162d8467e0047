"""The partitions: ranges of song_ids; and the other settings that shape the graph, read once, when it loads."""

import dagster as dg

from songvec_assets.settings import GraphSettings
from songvec_assets.songs.ranges import Tiling

_GRAPH = GraphSettings()

TILING = Tiling(width=_GRAPH.range_size, stop=_GRAPH.song_id_stop, start=_GRAPH.song_id_start)
TILING.check_count()

song_id_ranges = dg.StaticPartitionsDefinition([song_range.key for song_range in TILING])

# one run takes any number of ranges; a deployment with many workers may want several runs
one_run = dg.BackfillPolicy.single_run()
ranges_policy = dg.BackfillPolicy.multi_run(_GRAPH.ranges_per_run) if _GRAPH.ranges_per_run else one_run
