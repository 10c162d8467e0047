"""The name of `Pipeline` until its callers are renamed."""

from songvec_assets.pipeline import Pipeline


class Deployment(Pipeline):
    """See `Pipeline`."""

    publish = Pipeline.load
    index = Pipeline.build_index
