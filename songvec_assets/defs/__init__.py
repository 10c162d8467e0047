"""The Dagster face: assets, checks, resources, reports."""

import warnings

import dagster as dg

# backfill policies are beta in the release that pyproject pins; the tests say so if they change
warnings.filterwarnings("ignore", category=dg.BetaWarning)
