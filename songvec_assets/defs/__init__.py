"""The Dagster face: assets, checks, resources, reports."""

import warnings

import dagster as dg

# backfill policies are beta in the pinned release; a test fails if they change
warnings.filterwarnings("ignore", category=dg.BetaWarning)
