"""Planning: predicted seconds of whole pretraining jobs against measured ones, after calibrating on smaller jobs.

Two runs of `jobs.pretrain_encoder` with the demo's recipe calibrate: from the first one's metrics `jobs.plan` takes the
pace, and its start and end; both together give the training worker's CPU seconds an image. With these it predicts the
second run's wall time, and the same job with a larger image and with a wider encoder. Each job is a process of its own
with a Ray of its own, one CPU training and one decoding, as conf/scale/laptop.yaml says. Where others share the cores,
wall seconds tell their load as much as ours, so the CPU seconds of the training worker are predicted and measured too,
and the load is written down. What one process does of a CPU's other work is measured as well.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from gretfound import fundus, inspection, phantom, storage
from gretfound.capacity import StagePrediction
from gretfound.config import load
from gretfound.encoder import crops
from gretfound.lineage import ShardSet
from gretfound.shard import open_shard
from jobs import plan, pretrain_encoder, recipe
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import assemble, draw_shard_set

SIZE_PX, NUM_DRAWN = 256, 128
RECIPE = ["conf/pretrain/demo.yaml", "fit.warmup_images=64", "fit.checkpoint_every_images=0"]
CALIBRATION, REPEATED, OTHERS = 1280, 3840, 1280
SCALES = {
    "three times the images": [f"fit.num_images={REPEATED}"],
    "four times the patches": [f"fit.num_images={OTHERS}", "encoder.image_size_px=128"],
    "twice the width": [f"fit.num_images={OTHERS}", "encoder.embed_dim=384", "encoder.num_heads=6"],
}


@dataclass(frozen=True)
class Measured:
    """One whole job: wall seconds, the training worker's CPU seconds, and the machine's load at the end."""

    wall_s: float
    cpu_s: float
    load: float
    run_uri: str


def main() -> None:
    """Measures and writes runs/bench/plan.json."""
    one_cpu = cpu_rates()
    with tempfile.TemporaryDirectory() as folder:
        hub_uri = storage.normalised(folder)
        shard_set = draw_shard_set(hub_uri, "aster", num_images=NUM_DRAWN, size_px=SIZE_PX)
        corpus_id = assemble(hub_uri, shard_set).id
        small = [f"fit.num_images={CALIBRATION}"]
        calibration = run_job(hub_uri, corpus_id, small)
        rates = [f"run_uri={calibration.run_uri}", f"rates.mae_images_per_cpu_s={decode_rate(hub_uri, shard_set)}"]
        steady_s = max(predict(small, rates).seconds.values())
        rates.append(f"rates.start_up_s={calibration.wall_s - steady_s}")
        predicted = {name: predict(scale, rates) for name, scale in SCALES.items()}
        measured = {name: run_job(hub_uri, corpus_id, scale) for name, scale in SCALES.items()}
        planned = plan.rates_of(load(plan.Config, settings(small, rates)))[0]
    repeated, *_ = measured.values()
    cpu_s_per_image = (repeated.cpu_s - calibration.cpu_s) / (REPEATED - CALIBRATION)
    start_cpu_s = calibration.cpu_s - CALIBRATION * cpu_s_per_image
    # The plan's CPU seconds are those of its own pace; with the pace in CPU seconds, load drops out.
    correction = cpu_s_per_image / (steady_s / CALIBRATION)
    rows = [
        *(Row(f"rates.{name}", rate, "images/s") for name, rate in one_cpu.items()),
        Row("rates.cpu_gflops", planned.cpu_gflops, "GFLOP/s"),
        Row("calibration: start and end", planned.start_up_s, "s"),
        Row("calibration: wall", calibration.wall_s, "s"),
        Row("calibration: decoded and cropped on one CPU", planned.mae_images_per_cpu_s, "images/s"),
        Row("calibration: the training worker's CPU", cpu_s_per_image * 1000, "ms an image"),
        Row("load of the machine after the calibration", calibration.load, "processes"),
    ]
    ratios = []
    for name, stage in predicted.items():
        found = measured[name]
        cpu_s = stage.seconds["training CPUs"] * correction
        rows += [
            Row(f"{name}: predicted", stage.total_s, "s"),
            Row(f"{name}: measured", found.wall_s, "s"),
            Row(f"{name}: predicted, the training worker's CPU, start aside", cpu_s, "s"),
            Row(f"{name}: measured, the training worker's CPU, start aside", found.cpu_s - start_cpu_s, "s"),
            Row(f"{name}: load of the machine at its end", found.load, "processes"),
        ]
        ratios.append(Ratio(f"{name}: measured over predicted, wall", found.wall_s / stage.total_s, "0.8 to 1.25"))
        if found is not repeated:
            ratio = (found.cpu_s - start_cpu_s) / cpu_s
            ratios.append(Ratio(f"{name}: the same, CPU of the training worker", ratio, "0.8 to 1.25"))
    write("plan", rows, ratios)


def settings(scale: list[str], rates: list[str]) -> list[str]:
    """Returns the arguments of `jobs.plan` for a scale."""
    return [RECIPE[0], "conf/plan/laptop.yaml", *RECIPE[1:], *scale, *rates]


def predict(scale: list[str], rates: list[str]) -> StagePrediction:
    """Returns what `jobs.plan` says of the pretraining."""
    prediction = plan.predict(load(plan.Config, settings(scale, rates))).prediction
    return next(stage for stage in prediction.stages if stage.name == "pretrain encoder")


def run_job(hub_uri: str, corpus_id: str, scale: list[str]) -> Measured:
    """Runs the job as an operator would, from its command to its end."""
    runs_uri = storage.join(hub_uri, "runs")
    before = set(storage.list_names(runs_uri))
    command = [sys.executable, "-m", "jobs.pretrain_encoder", RECIPE[0], "conf/scale/laptop.yaml", *RECIPE[1:], *scale]
    arguments = [*command, f"hub_uri={hub_uri}", f"corpus_id={corpus_id}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began_s, cpu_s = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            arguments, env=environment | {"WANDB_MODE": "disabled"}, stdout=subprocess.DEVNULL, stderr=told
        )
        while process.poll() is None:
            cpu_s = max(cpu_s, worker_cpu_s(process.pid))
            time.sleep(0.25)
        wall_s = time.perf_counter() - began_s
        told.seek(0)
        if process.returncode:
            raise RuntimeError(told.read()[-3000:])
    (name,) = set(storage.list_names(runs_uri)) - before
    return Measured(wall_s, cpu_s, os.getloadavg()[0], storage.join(runs_uri, name))


def worker_cpu_s(pid: int) -> float:
    """Returns the CPU seconds so far of the training worker below a job's process; 0 before it is there."""
    spent_s = 0.0
    try:
        for process in psutil.Process(pid).children(recursive=True):
            if "RayTrainWorker" in "".join(process.cmdline()):
                spent_s = max(spent_s, sum(process.cpu_times()[:2]))
    except psutil.Error:  # a process that has just ended
        return spent_s
    return spent_s


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
    distillation = recipe.build_views(load(pretrain_encoder.Config, argv))
    number, inspector = 64, inspection.Inspector(num_images=64)
    began_s = time.perf_counter()
    for place in range(number):
        inspector.judge(small[place % len(small)])
        fundus.encode_jpeg(small[place % len(small)])
    drawn = number / (time.perf_counter() - began_s)
    return {
        "dinov2_images_per_cpu_s": crop_rate(encoded, distillation, number=64),
        "drawn_images_per_cpu_s": drawn,
    }


if __name__ == "__main__":
    main()
