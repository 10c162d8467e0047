"""The assets as they are declared."""

from songvec_assets.definitions import defs


def test_the_graph_is_a_line_of_four_assets() -> None:
    graph = defs.resolve_asset_graph()
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "songs": set(),
        "songs_parquet": {"songs"},
        "embedding_cache": {"songs_parquet"},
        "song_embeddings_table": {"embedding_cache"},
        "ivfflat_index": {"song_embeddings_table"},
    }
