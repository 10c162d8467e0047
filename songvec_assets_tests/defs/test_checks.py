"""The checks as they are declared."""

from songvec_assets.definitions import defs


def test_wrong_vectors_and_mixed_models_block_what_is_downstream() -> None:
    checks = {
        spec.key.to_user_string(): spec.blocking
        for check in defs.asset_checks or []
        for spec in check.check_specs  # type: ignore[union-attr]
    }
    assert checks == {
        "song_embeddings_table:coverage": False,
        "song_embeddings_table:few_rejected": False,
        "song_embeddings_table:texts_are_lyrics": False,
        "song_embeddings_table:no_orphans": False,
        "song_embeddings_table:vectors_are_sound": True,
        "song_embeddings_table:one_model": True,
        "song_embeddings_table:billed_as_estimated": False,
        "song_embeddings_table:price_is_sane": False,
        "ivfflat_index:index_is_used": False,
        "ivfflat_index:index_is_fresh": False,
        "ivfflat_index:recall_reaches_target": False,
        "ivfflat_index:samples_are_found": False,
    }
