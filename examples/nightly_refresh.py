"""A refresh for cron, without Dagster and within a budget: progress on stderr, exit code 1 if songs are missing."""

import sys

from songvec_assets import Pipeline, SongvecError


def main() -> int:
    """Run what changed since last night, and print what is missing afterwards."""
    with Pipeline.from_env(max_usd=5.0) as songs:
        try:
            report = songs.run(progress=lambda step: print(f"{step.step}: {step.done:,}", file=sys.stderr))
            print(f"{sum(each.n_embedded for each in report.embed):,} songs embedded; index: {report.index.reason}")
        except SongvecError as error:
            print(f"{error}: the same command goes on from here", file=sys.stderr)
        total = songs.status().total
    print(f"{total['n_loaded']:,} songs are loaded, {total['n_missing']:,} missing")
    return 1 if total["n_missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
