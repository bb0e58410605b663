"""Drivers, training workers and sampling actors are killed ten times; the generator and its shards stay the same."""

import os
import random
import shutil
import signal
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import ray
import ray.exceptions

from gretfound import shard, storage
from gretfound.lineage import ShardSet
from jobs import finetune_generators, synthesize
from tests.tiny_generator import publish_base, publish_site, write_base

DRIVER, WORKER, ACTOR = "ray::killable_driver", "ray::RayTrainWorker", "ray::MapWorker(MapBatches(Painter))"


@ray.remote(num_cpus=0, max_retries=0)
def killable_driver(job: str, keys: list[str]) -> str:
    """Runs a job in a process of its own."""
    answer: str = import_module(f"jobs.{job}").main(keys)
    return answer


def process_of(title: str) -> psutil.Process | None:
    """Finds one of Ray's processes below this one by what Ray calls it."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(title):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def survive(job: str, keys: list[str], victims: list[str], chance: random.Random) -> str:
    """Runs a job, kills one process of each title in turn, and runs it again if that was its driver."""
    waiting, killed = list(victims), []
    reference = killable_driver.remote(job, keys)
    while True:
        if waiting and (victim := process_of(waiting[0])):
            time.sleep(chance.uniform(0.0, 1.5))
            if victim.is_running() and victim.cmdline() and victim.cmdline()[0].startswith(waiting[0]):
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(waiting.pop(0))
                victim.wait(30)
        if ray.wait([reference], timeout=0.1)[0]:
            try:
                answer: str = ray.get(reference)
            except ray.exceptions.WorkerCrashedError:
                assert killed[-1] == DRIVER
                reference = killable_driver.remote(job, keys)
                continue
            assert killed == victims, "the job was over before all were killed"
            return answer


@pytest.mark.long
def test_jobs__ten_kills_change_neither_the_weights_nor_the_rows(ray_cluster: None, tmp_path: Path) -> None:
    chance = random.Random(4)
    base_path = write_base(tmp_path / "base")
    calm_uri = storage.normalised(str(tmp_path / "calm"))
    base = publish_base(calm_uri, base_path)
    publish_site(calm_uri, tmp_path / "site", num_images=4)
    shutil.copytree(tmp_path / "calm", tmp_path / "wild")
    wild_uri = storage.normalised(str(tmp_path / "wild"))
    training = [f"base_id={base.id}", "tuning.num_images_seen=96", "tuning.batch_size=4", "tuning.lora_rank=2"]
    training += ["tuning.learning_rate=0.01", "tuning.checkpoint_every_images=8", "cluster.max_failures=9"]
    training += ["cluster.cpus_per_worker=0.5"]
    drawing = ["num_images=96", "images_per_shard=4", "num_steps=10", "is_screened=false", "cpus_per_actor=0.5"]
    generator_id = finetune_generators.main([f"hub_uri={calm_uri}", *training])
    expected = storage.read_record(calm_uri, synthesize.main([f"hub_uri={calm_uri}", *drawing]), ShardSet)
    victims = [WORKER, DRIVER, WORKER, WORKER, DRIVER]
    # An id follows from the digests of all files: equal ids are equal weights.
    assert survive("finetune_generators", [f"hub_uri={wild_uri}", *training], victims, chance) == generator_id
    victims = [ACTOR, ACTOR, DRIVER, ACTOR, DRIVER]
    found_id = survive("synthesize", [f"hub_uri={wild_uri}", *drawing], victims, chance)
    found = storage.read_record(wild_uri, found_id, ShardSet)
    assert found == expected
    rows = [
        [row for each in made.shards for row in shard.read_rows(storage.join(hub_uri, each.path))]
        for hub_uri, made in ((calm_uri, expected), (wild_uri, found))
    ]
    assert rows[0] == rows[1]
    assert len({row["seed"] for row in rows[1]}) == 96
