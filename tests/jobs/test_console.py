"""What every job does at its start."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import ray
from jobs import console
console.start_ray(num_cpus=1)
print(ray.cluster_resources()["CPU"])
"""


@pytest.mark.slow
def test_start_ray__does_not_join_a_stranger_on_the_machine() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as folder:  # its path must be short: Ray makes sockets below it
        note = Path(folder) / "ray" / "ray_current_cluster"  # where `ray start` leaves its address
        note.parent.mkdir()
        note.write_text("127.0.0.1:9")
        finished = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=environment | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert finished.stdout.strip() == "1.0", finished.stderr[-2000:]
