"""The Dagster face: assets, checks, resources, jobs, automation, reports. Keep out: what a step computes (the core)."""

import warnings

import dagster as dg

# backfill policies are beta in the pinned release; a test fails if they change
warnings.filterwarnings("ignore", category=dg.BetaWarning)
