"""A run with `min_workers` on a cluster that loses a node: it goes on with the workers that are left."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
from torch import Tensor

from gretfound import fit, storage
from gretfound.checkpoints import RayCheckpoints
from tests.conftest import ROOT
from tests.test_fit import SETTINGS, autoencoder, batches_of, plain_losses

LOST_AT = 32  # images seen, when one of the two nodes goes


def train_slowly(settings: dict[str, Any]) -> None:
    """Runs on each worker: notes each step's loss and the number of workers, a step in half a second."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        for batch in batches_of(rank, num_workers, 8 // num_workers)(start):
            time.sleep(0.5)
            yield batch

    fit.train(
        autoencoder(),
        batches,
        zero_stage=1,
        checkpoints=RayCheckpoints(fit.train_uri(settings["run_uri"], "elastic")),
        checkpoint_every_images=8,
        on_progress=lambda progress: storage.write_json(
            f"{settings['notes']}/{progress.images_seen:04d}.json", [progress.loss, num_workers]
        ),
        **SETTINGS,
    )


def main(folder: Path) -> None:
    """Starts a cluster of two nodes and a run of two workers, and takes a node away; in a process of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    notes = folder / "notes"

    def lose_a_node() -> None:
        while not (notes / f"{LOST_AT:04d}.json").exists():
            time.sleep(0.1)
        cluster.remove_node(lost, allow_graceful=False)

    threading.Thread(target=lose_a_node, daemon=True).start()
    fit.run(
        train_slowly,
        {"run_uri": str(folder / "run"), "notes": str(notes)},
        run_uri=str(folder / "run"),
        name="elastic",
        num_workers=2,
        min_workers=1,
        max_failures=3,
    )
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.long
@pytest.mark.timeout(1200)  # six minutes were seen, most of them spent waiting for Ray
def test_run__goes_on_with_the_workers_that_are_left(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tests.test_elastic", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100)
    assert finished.returncode == 0, finished.stderr[-3000:]
    noted = [json.loads(path.read_text()) for path in sorted((tmp_path / "notes").iterdir())]
    assert [num_workers for _, num_workers in noted] == sorted([n for _, n in noted], reverse=True)
    assert {num_workers for _, num_workers in noted} == {1, 2}
    np.testing.assert_allclose([loss for loss, _ in noted], plain_losses(), rtol=2e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
