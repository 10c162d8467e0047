"""The partitions: ranges of song_ids; and the other settings that shape the graph, read once, when it loads."""

import os
from dataclasses import fields

import dagster as dg

from songvec_assets.settings import Settings, read_setting
from songvec_assets.songs.ranges import Tiling

_SHAPE = {each.name: read_setting(each, os.environ) for each in fields(Settings) if each.metadata["when"] == "graph"}

TILING = Tiling(width=_SHAPE["range_size"], stop=_SHAPE["song_id_stop"], start=_SHAPE["song_id_start"])
TILING.check_count()

song_id_ranges = dg.StaticPartitionsDefinition([song_range.key for song_range in TILING])

# one run takes any number of ranges; a deployment with many workers may want several runs
one_run = dg.BackfillPolicy.single_run()
ranges_policy = dg.BackfillPolicy.multi_run(_SHAPE["ranges_per_run"]) if _SHAPE["ranges_per_run"] else one_run
