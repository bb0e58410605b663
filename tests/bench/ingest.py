"""Ingest: photographs in shards through Ray Data, against torch's DataLoader as RETFound reads a folder.

Both read the same JPEGs of 1,068 x 712 px from disk into random crops of 224 px on two cores.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, transforms

from gretfound import corpus, fundus, phantom, shard, storage
from gretfound.lineage import Corpus, ShardSet
from jobs import console
from tests.bench.outcome import Ratio, Row, rate, repeated, write
from tests.hubs import assemble

NUM_IMAGES, SIZE_PX, BATCH_SIZE = 1024, 224, 64


def main() -> None:
    """Measures and writes runs/bench/ingest.json."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = _draw(Path(folder) / "photographs" / "all")
        hub_uri = storage.normalised(str(Path(folder) / "hub"))
        rows = [shard.row_of(path.read_bytes(), site_id="bench", origin="real", cells={}) for path in photographs]
        shards = tuple(shard.write_shard(hub_uri, rows[first : first + 512]) for first in range(0, len(rows), 512))
        shard_set = ShardSet(site_id="bench", origin="real", num_images=len(rows), shards=shards, rejected={})
        record = assemble(hub_uri, shard_set)
        console.start_ray()
        ours = repeated(lambda: rate(lambda: _stream(hub_uri, record), num_images=len(rows)))
        theirs = repeated(lambda: rate(lambda: _load(photographs[0].parents[1]), num_images=len(rows)))
    write(
        "ingest",
        [
            Row("gretfound.corpus.stream through Ray Data", ours, "images/s"),
            Row("torch DataLoader, ImageFolder, RandomResizedCrop", theirs, "images/s"),
        ],
        [Ratio("ingest over DataLoader", ours / theirs, ">= 2.5 (issue 3); first measurement")],
    )


def _draw(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    site, paths = phantom.SITES["public"], []
    eyes = phantom.list_eyes(site, num_images=32, seed=0)
    drawn = [phantom.draw_eye(site, seed=seed, size_px=712, eye=eye).image for seed, eye in eyes]
    for index in range(NUM_IMAGES):  # shifted copies: each file has its own pixels, and drawing takes seconds
        wide = np.zeros((712, 1068, 3), dtype=np.uint8)
        wide[:, 178:890] = np.roll(drawn[index % 32], index // 32, axis=1)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(wide).save(paths[-1], quality=87)
        if index == 0:
            assert fundus.find_field_of_view(wide) is not None
    return paths


def _stream(hub_uri: str, record: Corpus) -> None:
    (iterator,) = corpus.stream(
        hub_uri,
        record,
        start=0,
        end=record.num_images,
        num_workers=1,
        images_per_worker_step=BATCH_SIZE,
        size_px=SIZE_PX,
        crop_scale=(0.2, 1.0),
        seed=0,
        data_cpus=2.0,
    )
    seen = sum(len(batch["image"]) for batch in corpus.torch_batches(iterator, images_per_batch=BATCH_SIZE))
    assert seen == record.num_images


def _load(folder: Path) -> None:
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE_PX, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(folder, recipe), batch_size=BATCH_SIZE, shuffle=True, num_workers=2
    )
    assert sum(len(image) for image, _ in loader) == NUM_IMAGES
