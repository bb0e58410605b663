"""Planning: predicted seconds of whole pretraining jobs against measured ones, after calibrating on a smaller job.

The calibration is one run of `jobs.pretrain_encoder` with the demo's recipe: its pace in operations a second, and its
start and end. With these `jobs.plan` predicts the same job with a larger image and with a wider encoder, and the same
recipe again on twice the images; then all three run. Each is a process of its own with a Ray of its own, one CPU
training and one decoding, as conf/scale/laptop.yaml says. The load of the machine is written down: two cores that are
shared make seconds differ from run to run, and the repeated recipe shows by how much. What one process does of a
CPU's other work in the chain is measured beside it.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from gretfound import fundus, phantom, storage, synthesis, tracking
from gretfound.capacity import StagePrediction
from gretfound.config import load
from gretfound.encoder import crops
from gretfound.lineage import ShardSet
from gretfound.shard import open_shard
from jobs import plan, pretrain_encoder
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import assemble, draw_shard_set

SIZE_PX, NUM_DRAWN = 256, 128
RECIPE = ["conf/pretrain/demo.yaml", "fit.warmup_images=64", "fit.checkpoint_every_images=0"]
CALIBRATION = ["fit.num_images=2560"]
SCALES = {
    "twice the images": ["fit.num_images=5120"],
    "four times the patches": ["fit.num_images=2560", "encoder.image_size_px=128"],
    "twice the width": ["fit.num_images=2560", "encoder.embed_dim=384", "encoder.num_heads=6"],
}


@dataclass(frozen=True)
class Measured:
    """One whole job."""

    wall_s: float
    images_per_s: float
    data_wait_share: float
    run_uri: str


def main() -> None:
    """Measures and writes runs/bench/plan.json."""
    with tempfile.TemporaryDirectory() as folder:
        hub_uri = storage.normalised(folder)
        shard_set = draw_shard_set(hub_uri, "aster", num_images=NUM_DRAWN, size_px=SIZE_PX)
        corpus_id = assemble(hub_uri, shard_set).id
        loads = [os.getloadavg()[0]]
        decoded = decode_rate(hub_uri, shard_set)
        calibration = run_job(hub_uri, corpus_id, CALIBRATION)
        num_images = int(CALIBRATION[0].partition("=")[2])
        rates = [
            f"run_uri={calibration.run_uri}",
            f"rates.mae_images_per_cpu_s={decoded}",
            f"rates.start_up_s={calibration.wall_s - num_images / calibration.images_per_s}",
        ]
        predicted = {name: predict(scale, rates) for name, scale in SCALES.items()}
        measured = {}
        for name, scale in SCALES.items():
            measured[name] = run_job(hub_uri, corpus_id, scale)
            loads.append(os.getloadavg()[0])
        cpu_gflops = plan.rates_of(load(plan.Config, settings(CALIBRATION, rates)))[0].cpu_gflops
        one_cpu = cpu_rates()
    rows = [
        *(Row(f"rates.{name}", rate, "images/s") for name, rate in one_cpu.items()),
        Row("calibration: images a second", calibration.images_per_s, "images/s"),
        Row("calibration: share of its time waiting for data", calibration.data_wait_share, "1"),
        Row("calibration: start and end", calibration.wall_s - num_images / calibration.images_per_s, "s"),
        Row("rates.cpu_gflops", cpu_gflops, "GFLOP/s"),
        Row("decoded and cropped on one CPU", decoded, "images/s"),
        Row("load of the machine, mean of its last minutes' averages", float(np.mean(loads)), "processes"),
    ]
    ratios = []
    for name, stage in predicted.items():
        steady_s = stage.num_images / measured[name].images_per_s
        rows += [
            Row(f"{name}: predicted", stage.total_s, "s"),
            Row(f"{name}: measured", measured[name].wall_s, "s"),
            Row(f"{name}: predicted, start and end aside", max(stage.seconds.values()), "s"),
            Row(f"{name}: measured, start and end aside", steady_s, "s"),
        ]
        ratios += [
            Ratio(f"{name}: measured over predicted", measured[name].wall_s / stage.total_s, "0.8 to 1.25"),
            Ratio(f"{name}: the same, start and end aside", steady_s / max(stage.seconds.values()), "0.8 to 1.25"),
        ]
    write("plan", rows, ratios)


def settings(scale: list[str], rates: list[str]) -> list[str]:
    """Returns the arguments of `jobs.plan` for a scale."""
    return [RECIPE[0], "conf/plan/laptop.yaml", *RECIPE[1:], *scale, *rates]


def predict(scale: list[str], rates: list[str]) -> StagePrediction:
    """Returns what `jobs.plan` says of the pretraining."""
    prediction, *_ = plan.predict(load(plan.Config, settings(scale, rates)))
    return next(stage for stage in prediction.stages if stage.name == "pretrain encoder")


def run_job(hub_uri: str, corpus_id: str, scale: list[str]) -> Measured:
    """Runs the job as an operator would, from its command to its end."""
    runs_uri = storage.join(hub_uri, "runs")
    before = set(storage.list_names(runs_uri))
    command = [sys.executable, "-m", "jobs.pretrain_encoder", RECIPE[0], "conf/scale/laptop.yaml", *RECIPE[1:], *scale]
    began_s = time.perf_counter()
    answer = subprocess.run(
        [*command, f"hub_uri={hub_uri}", f"corpus_id={corpus_id}"],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.perf_counter() - began_s
    if answer.returncode:
        raise RuntimeError(answer.stderr[-3000:])
    (name,) = set(storage.list_names(runs_uri)) - before
    last = tracking.read_metrics(storage.join(runs_uri, name))[-1]
    return Measured(wall_s, last["images_per_s"], last["data_wait_share"], storage.join(runs_uri, name))


def decode_rate(hub_uri: str, shard_set: ShardSet) -> float:
    """Returns the photographs a second that one process decodes and crops for the calibration's recipe."""
    with open_shard(storage.join(hub_uri, shard_set.shards[0].path)) as parquet:
        encoded = parquet.read(columns=["image"])["image"].to_pylist()
    return crop_rate(encoded, {"image": crops.View(size_px=64, scale=(0.2, 1.0))}, number=1024)


def crop_rate(encoded: list[bytes], views: dict[str, crops.View], *, number: int) -> float:
    """Returns the photographs a second of which one process takes the crops."""
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    for place in range(number):
        crops.draw_views(
            encoded[place % len(encoded)], field_of_view=None, views=views, rng=np.random.default_rng([0, place])
        )
    return number / (time.perf_counter() - began_s)


def cpu_rates() -> dict[str, float]:
    """Returns what one process does a second of each kind of work on a photograph, on drawn ones.

    Crops and signatures are of photographs of 712 px; screening and encoding is of 512 px, as Stable Diffusion draws.
    """
    site = phantom.SITES["public"]
    eyes = phantom.list_eyes(site, num_images=8, seed=0)
    large, small = (
        [phantom.draw_eye(site, seed=seed, size_px=size_px, eye=eye).image for seed, eye in eyes]
        for size_px in (712, 512)
    )
    encoded = [fundus.encode_jpeg(image) for image in large]
    argv = ["conf/pretrain/dinov2_vitl14.yaml", "hub_uri=x", "corpus_id=x"]
    distillation = pretrain_encoder.build_views(load(pretrain_encoder.Config, argv))
    whole = crops.View(size_px=224, scale=(0.2, 1.0))
    began_s, number = time.perf_counter(), 64
    for place in range(number):
        synthesis.judge(small[place % len(small)])
        fundus.encode_jpeg(small[place % len(small)])
    drawn = number / (time.perf_counter() - began_s)
    return {
        "mae_images_per_cpu_s": crop_rate(encoded, {"image": whole}, number=512),
        "dinov2_images_per_cpu_s": crop_rate(encoded, distillation, number=64),
        "drawn_images_per_cpu_s": drawn,
    }


if __name__ == "__main__":
    main()
