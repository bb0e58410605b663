"""Runs every benchmark, or those named: `python -m tests.bench [corpus] [ingest] [pretraining]`."""

import sys

from tests.bench import corpus, ingest, pretraining

BENCHMARKS = {"corpus": corpus.main, "ingest": ingest.main, "pretraining": pretraining.main}

for name in sys.argv[1:] or BENCHMARKS:
    BENCHMARKS[name]()
