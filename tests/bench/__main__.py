"""Runs every benchmark, or those named: `python -m tests.bench [ingest] [pretraining]`."""

import sys

from tests.bench import ingest, pretraining

BENCHMARKS = {"ingest": ingest.main, "pretraining": pretraining.main}

for name in sys.argv[1:] or BENCHMARKS:
    BENCHMARKS[name]()
