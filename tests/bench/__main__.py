"""Runs every benchmark, or those named: `python -m tests.bench [corpus] [ingest] [plan] [pretrain]`."""

import sys

from tests.bench import corpus, ingest, plan, pretrain

BENCHMARKS = {"corpus": corpus.main, "ingest": ingest.main, "plan": plan.main, "pretrain": pretrain.main}

if __name__ == "__main__":  # workers of a pool import this module again
    for name in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[name]()
