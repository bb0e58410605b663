"""Ingest: photographs in shards through Ray Data into a Train worker, against what others read with.

All read the same JPEGs of 1,068 x 712 px into random crops of 224 px, normalised, on all cores of this machine: this
ingest from disk and from an S3 server on loopback; torch's DataLoader with ImageFolder and RandomResizedCrop, as
RETFound reads; webdataset; mosaicml-streaming, in an environment of its own; and the bare decode loop as the limit. A
rate is what a longer run takes more than a shorter one, so that neither start-up nor what was read ahead counts. All
rates are taken in turn, some rounds of them, and a ratio is the median of the rounds' own: a shared machine's speed
changes by a quarter within minutes, and what is measured once may have met another machine than its peer (docs/log.md).
Nothing of Ray's lives while the others are measured. The same run measures the error of decoding at a reduced scale,
and the memory for one and for ten times the images. Ray's object store has the 2 GiB that it would take of 8 GiB of
memory by itself, on a larger machine, too.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pyarrow as pa
import ray
import torch
import torch.nn.functional as F
import webdataset
from moto.server import ThreadedMotoServer
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms
from tqdm import tqdm

from gretfound import corpus, duplicates, fit, ingest, phantom, shard, storage
from gretfound.encoder import crops
from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD, Transform
from gretfound.fundus import FieldOfView
from gretfound.lineage import Corpus, ShardSet
from jobs import console
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import assemble

NUM_IMAGES, SIZE_PX, BATCH_SIZE = 1024, 224, 64
SHORT, LONG = 4, 16  # epochs of the two runs that a rate is taken from
NUM_ROUNDS = 3
OURS, BARE = "gretfound.ingest, {}", "bare decode loop"
LOADER, TARS, MOSAIC = "torch DataLoader, ImageFolder, RandomResizedCrop", "webdataset", "mosaicml-streaming"
GOALS = {LOADER: ">= 2.5", TARS: "> 1", MOSAIC: "> 1", BARE: ">= 0.6"}
MEMORY_TIMES = (4, 40)  # epochs whose memory is compared: more than all windows in flight, and ten times as many
CORES = os.cpu_count() or 1
SCALE = (0.2, 1.0)
VIEWS = {"image": crops.View(size_px=SIZE_PX, scale=SCALE)}
RECIPE = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE_PX, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    ]
)


def main() -> None:
    """Measures and writes runs/bench/ingest.json."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # the S3 server tells every request
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = draw(root / "photographs" / "all")
        tar_paths = write_tars(paths, root / "tar")
        with s3_server() as s3_hub:
            corpora = {place: corpus_at(hub, paths) for place, hub in (("disk", str(root / "hub")), ("S3", s3_hub))}
            rounds = []
            for number in tqdm(range(NUM_ROUNDS), desc="rates", unit="round"):
                rates = {
                    BARE: bare_rate(paths),
                    LOADER: folder_rate(root / "photographs"),
                    TARS: webdataset_rate(tar_paths),
                    MOSAIC: mosaic_rate(root / "photographs" / "all", root / f"mosaic{number}"),
                }
                with ray_alone():
                    for place, (hub_uri, record) in corpora.items():
                        answer = root / f"{place}{number}.json"
                        stream(hub_uri, record, answer)
                        rates[OURS.format(place)] = float(json.loads(answer.read_text()))
                rounds.append(rates)
            with ray_alone():
                peaks = [memory(*corpora["disk"], times=times, folder=root) for times in MEMORY_TIMES]
        error, interpolation_error, found = fidelity(paths)
    ours, ours_s3 = ([each[OURS.format(place)] for each in rounds] for place in corpora)
    ratios = {peer: [rate / each[peer] for rate, each in zip(ours, rounds, strict=True)] for peer in GOALS}
    from_s3 = statistics.median(s3 / disk for s3, disk in zip(ours_s3, ours, strict=True))
    write(
        "ingest",
        [
            *(Row(name, statistics.median(each[name] for each in rounds), "images/s") for name in rounds[0]),
            *(
                Row(f"peak memory, {times * NUM_IMAGES:,} images", peak, "MiB")
                for times, peak in zip(MEMORY_TIMES, peaks, strict=True)
            ),
            Row("mean error of reduced decoding against a whole one", error, "grey levels of 255"),
            Row("the same of bilinear against bicubic, for scale", interpolation_error, "grey levels of 255"),
            *(Row(name, value, "on the scale of [0, 1]") for name, value in found.items()),
        ],
        [
            *(Ratio(f"ingest over {peer}", statistics.median(ratios[peer]), goal) for peer, goal in GOALS.items()),
            *(
                Ratio(f"ingest over {peer}, {end} of {NUM_ROUNDS}", of(ratios[peer]), "reported")
                for peer in GOALS
                for end, of in (("lowest", min), ("highest", max))
            ),
            Ratio("ingest from S3 over ingest from disk", from_s3, "reported"),
            Ratio("peak memory, ten times the images", peaks[1] / peaks[0], "0.9 to 1.1"),
        ],
    )


def draw(folder: Path) -> list[Path]:
    """Writes the photographs: shifted copies of 32 drawn ones, so that each file has pixels of its own."""
    folder.mkdir(parents=True)
    site, paths = phantom.SITES["public"], []
    eyes = phantom.list_eyes(site, num_images=32, seed=0)
    drawn = [phantom.draw_eye(site, seed=seed, size_px=712, eye=eye).image for seed, eye in eyes]
    for index in range(NUM_IMAGES):
        wide = np.zeros((712, 1068, 3), dtype=np.uint8)
        wide[:, 178:890] = np.roll(drawn[index % 32], index // 32, axis=1)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(wide).save(paths[-1], quality=90)
    return paths


def corpus_at(hub: str, paths: list[Path]) -> tuple[str, Corpus]:
    """Writes the photographs as shards of a hub, and a corpus over them."""
    hub_uri = storage.normalised(hub)
    field_of_view = FieldOfView(x_px=534.0, y_px=356.0, radius_px=356.0)
    rows = []
    for index, path in enumerate(paths):
        row = dict.fromkeys(shard.SCHEMA.names) | {"image": path.read_bytes(), "image_id": f"{index:064x}"}
        row |= {"site_id": f"bench{index % 2}", "origin": "real", "width_px": 1068, "height_px": 712}
        rows.append(row | {f"fov_{name}": value for name, value in vars(field_of_view).items()})
    shards = tuple(shard.write_shard(hub_uri, rows[first : first + 512]) for first in range(0, len(rows), 512))
    shard_set = ShardSet(site_id="bench", origin="real", num_images=len(rows), shards=shards, rejected={})
    storage.write_record(hub_uri, shard_set)
    return hub_uri, assemble(hub_uri, shard_set)


@contextlib.contextmanager
def ray_alone() -> Iterator[None]:
    """Starts a Ray of this machine for a while."""
    console.start_ray(num_cpus=CORES + 1, object_store_memory=2 * 2**30)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Starts an S3 server on loopback; gives the URI of a hub on it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "bench"}
    os.environ.update(settings | {"AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"})
    boto3.client("s3").create_bucket(Bucket="bench")
    yield "s3://bench/hub"
    server.stop()


def steady_rate(batches_of: Callable[[int], Iterable[Any]]) -> float:
    """Returns images a second: those of the longer run over the time that it takes more than the shorter one."""
    took_s = []
    for num_epochs in (SHORT, LONG):
        began_s = time.perf_counter()
        seen = sum(len(batch) for batch in batches_of(num_epochs))
        took_s.append(time.perf_counter() - began_s)
        assert seen >= num_epochs * NUM_IMAGES // CORES - BATCH_SIZE, seen
    return (LONG - SHORT) * NUM_IMAGES / (took_s[1] - took_s[0])


def consume(settings: dict[str, Any]) -> None:
    """Runs on the Train worker: takes the stream, normalises, and writes down the rate."""
    record = storage.read_record(settings["hub_uri"], settings["corpus_id"], Corpus)
    transform = Transform(image_size_px=SIZE_PX)

    def batches_of(num_epochs: int) -> Iterator[Tensor]:
        (iterator,) = ingest.stream(
            settings["hub_uri"],
            record,
            start=0,
            end=num_epochs * NUM_IMAGES,
            num_workers=1,
            batch_size=BATCH_SIZE,
            views=VIEWS,
            seed=0,
            data_cpus=float(CORES),
        )
        for batch in ingest.torch_batches(iterator, images_per_batch=BATCH_SIZE):
            yield transform.normalise(batch["image"])

    if settings["num_epochs"]:
        sum(len(batch) for batch in batches_of(settings["num_epochs"]))
    else:
        # What Ray's workers import, once, would slow the shorter run alone; so as many of them as ever read are warmed.
        sum(len(batch) for batch in batches_of(SHORT))
        Path(settings["answer"]).write_text(json.dumps(steady_rate(batches_of)))


def stream(hub_uri: str, record: Corpus, answer: Path, *, num_epochs: int = 0) -> None:
    """Streams the corpus into one Ray Train worker: so many epochs, or as many as a rate takes, into ``answer``."""
    fit.run(
        consume,
        {"hub_uri": hub_uri, "corpus_id": record.id, "answer": str(answer), "num_epochs": num_epochs},
        run_uri=str(answer.parent / "runs"),
        name=answer.stem,
        cpus_per_worker=1,  # the one that Ray is told of beyond the cores: those are Ray Data's
        max_failures=0,
    )


def memory(hub_uri: str, record: Corpus, *, times: int, folder: Path) -> float:
    """Returns the peak memory of all of this benchmark's processes, in MiB, over so many times the corpus's images."""
    manifest = pa.concat_tables([corpus.read_manifest(hub_uri, record)] * times)
    repeated = corpus.publish(
        hub_uri,
        replace(record, files=(), num_images=record.num_images * times),
        manifest=manifest,
        exclusions=corpus.EXCLUSIONS_SCHEMA.empty_table(),
        evaluation=duplicates.EVALUATION_SCHEMA.empty_table(),
    )
    stopped, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not stopped.wait(0.5):
            held = 0.0
            for process in psutil.Process().children(recursive=True):
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], held / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream(hub_uri, repeated, folder / f"memory{times}.json", num_epochs=times)
    stopped.set()
    watcher.join()
    return peak[0]


def bare_rate(paths: list[Path]) -> float:
    """Decodes and crops from memory in one process a core, with nothing around it."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        return sum(pool.map(bare_loop, [paths] * CORES, chunksize=1))


def bare_loop(paths: list[Path]) -> float:
    """Returns the images a second of one process, of its share of the images."""
    torch.set_num_threads(1)
    encoded = [path.read_bytes() for path in paths]
    field_of_view = FieldOfView(x_px=534.0, y_px=356.0, radius_px=356.0)
    transform = Transform(image_size_px=SIZE_PX)

    def batches_of(num_epochs: int) -> Iterator[Tensor]:
        for first in range(0, num_epochs * NUM_IMAGES // CORES, BATCH_SIZE):
            drawn = [
                crops.draw_views(
                    encoded[place % len(encoded)],
                    field_of_view=field_of_view,
                    views=VIEWS,
                    rng=np.random.default_rng([0, place]),
                )["image"]
                for place in range(first, first + BATCH_SIZE)
            ]
            yield transform.normalise(torch.from_numpy(np.stack(drawn)))

    return steady_rate(batches_of) / CORES


def folder_rate(folder: Path) -> float:
    """Reads as RETFound's script does."""
    photographs = datasets.ImageFolder(folder, RECIPE)

    def batches_of(num_epochs: int) -> Iterator[Tensor]:
        repeated = torch.utils.data.ConcatDataset([photographs] * num_epochs)
        loader = torch.utils.data.DataLoader(repeated, batch_size=BATCH_SIZE, shuffle=True, num_workers=CORES)
        return (image for image, _ in loader)

    return steady_rate(batches_of)


def write_tars(paths: list[Path], folder: Path) -> list[str]:
    """Writes the photographs as tar files, as webdataset reads them; returns their paths."""
    folder.mkdir()
    for part in range(4):
        with tarfile.open(folder / f"{part:04d}.tar", "w") as tar:
            for path in paths[part::4]:
                tar.add(path, arcname=path.name)
    return sorted(str(path) for path in folder.glob("*.tar"))


def webdataset_rate(tar_paths: list[str]) -> float:
    """Reads tar files with webdataset and the same crops as the DataLoader."""

    def batches_of(num_epochs: int) -> Iterator[Tensor]:
        stream = webdataset.WebDataset(tar_paths * num_epochs, shardshuffle=False, empty_check=False).shuffle(512)
        stream = stream.decode("pil").to_tuple("jpg").map_tuple(RECIPE).batched(BATCH_SIZE)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=CORES)
        return (image for (image,) in loader)

    return steady_rate(batches_of)


def mosaic_rate(photographs: Path, folder: Path) -> float:
    """Runs tests/bench/mosaic.py in an environment of its own: its pins exclude this project's."""
    program = Path(__file__).with_name("mosaic.py")
    python = subprocess.run([program.with_suffix(".sh")], check=True, capture_output=True, text=True).stdout.split()[-1]
    arguments = [photographs, folder, SIZE_PX, BATCH_SIZE, SHORT, LONG, CORES]
    answer = subprocess.run([python, program, *map(str, arguments)], check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def fidelity(paths: list[Path]) -> tuple[float, float, dict[str, float]]:
    """Compares our crops with torchvision's of the same boxes, decoded whole by Pillow.

    Returns:
        The mean absolute error of our crops, that of bilinear instead of bicubic interpolation (the size of an error
        that the field takes without a thought), and both crops' mean and deviation.
    """
    ours, theirs, bilinear = [], [], []
    for place, path in enumerate(paths[:256]):
        encoded, field_of_view = path.read_bytes(), FieldOfView(x_px=534.0, y_px=356.0, radius_px=356.0)
        ours.append(
            crops.draw_views(encoded, field_of_view=field_of_view, views=VIEWS, rng=np.random.default_rng([0, place]))[
                "image"
            ]
        )
        rng = np.random.default_rng([0, place])
        x0, y0, x1, y1 = crops.draw_crop(712, 712, scale=SCALE, ratio=crops.ASPECT_RATIO, rng=rng)
        is_flipped = rng.random() < 0.5
        with Image.open(io.BytesIO(encoded)) as opened:
            crop = opened.convert("RGB").crop((round(x0) + 178, round(y0), round(x1) + 178, round(y1)))
        for kept, filter_ in ((theirs, Image.Resampling.BICUBIC), (bilinear, Image.Resampling.BILINEAR)):
            pixels = np.asarray(crop.resize((SIZE_PX, SIZE_PX), filter_)).transpose(2, 0, 1)
            kept.append(pixels[:, :, ::-1] if is_flipped else pixels)
    a, b, c = (torch.from_numpy(np.stack(each)).float() for each in (ours, theirs, bilinear))
    statistics = {
        "mean, ours": float(a.mean()) / 255,
        "mean, torchvision's": float(b.mean()) / 255,
        "deviation, ours": float(a.std()) / 255,
        "deviation, torchvision's": float(b.std()) / 255,
    }
    return float(F.l1_loss(a, b)), float(F.l1_loss(c, b)), statistics
