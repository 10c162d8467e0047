"""Short forms of the benchmarks: no figures, only what must hold."""
