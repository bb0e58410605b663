"""Runs every benchmark, or those named, each in a process of its own: `python -m tests.bench [corpus] [ingest] ...`."""

import os
import subprocess
import sys

from jobs.console import KEEPS_PAGES

BENCHMARKS = ("corpus", "deidentify", "generators", "ingest", "plan", "pretrain", "seal")

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        program = f"from tests.bench import {name}; {name}.main()"
        # As jobs' workers do, ours and the peers' keep their pages: whoever measures must not win by that.
        subprocess.run([sys.executable, "-c", program], env=os.environ | KEEPS_PAGES, check=True)
