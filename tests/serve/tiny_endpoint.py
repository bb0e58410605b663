"""Small real parts that the tests of the endpoint share: drawn photographs, a launcher without a cluster, names."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from gretfound import storage
from gretfound.encoder.folder import write_encoder_folder
from gretfound.encoder.transform import Transform
from gretfound.fine_tuning import FineTuningJob
from gretfound.lineage import Release
from gretfound.release import read_signing_key, sign_folder
from jobs import fine_tune_head
from serve.fine_tuning import FineTuningDesk

IMAGE_SIZE_PX = 32


def photograph(*, seed: int, brightness: int = 120, size_px: int = 96) -> bytes:
    """Draws a noisy reddish disc of radius 0.44 sides on black: a field of view with nothing in it."""
    image = Image.new("RGB", (size_px, size_px))
    edge_px = 0.06 * size_px
    colour = (brightness, brightness // 2, brightness // 4)
    ImageDraw.Draw(image).ellipse((edge_px, edge_px, size_px - edge_px, size_px - edge_px), fill=colour)
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(seed).normal(0, 8, pixels.shape) * (pixels > 0)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


@dataclass(frozen=True)
class Place:
    """A hub with one release in it; ``release_path`` is the folder that it was published from."""

    hub_uri: str
    release_uri: str
    release: Release
    release_path: Path
    public_key_path: Path


def make_place(parent_path: Path) -> Place:
    """Makes a hub with a signed release of a two-block encoder."""
    folder_path = parent_path / "folder"
    torch.manual_seed(7)
    architecture = "vit_tiny_patch16_224"
    encoder = timm.create_model(
        architecture,
        img_size=IMAGE_SIZE_PX,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        global_pool="avg",
        num_classes=0,
    )
    transform = Transform(image_size_px=IMAGE_SIZE_PX)
    write_encoder_folder(encoder, folder_path, architecture=architecture, transform=transform)
    key_path = parent_path / "signing_key.pem"
    sign_folder(folder_path, read_signing_key(key_path))
    hub_uri = storage.normalised(str(parent_path / "hub"))
    release = storage.publish_folder(hub_uri, folder_path, Release(name="tiny", licence="CC BY-NC 4.0"))
    return Place(
        hub_uri, storage.record_uri(hub_uri, release), release, folder_path, key_path.with_name("signing_key.pem.pub")
    )


def make_training_folder(parent_path: Path) -> Path:
    """Makes a labelled folder: brightness gives the grade, one row has no grade, one photograph is unreadable."""
    folder_path = parent_path / "clinic"
    (folder_path / "traindata").mkdir(parents=True)
    lines = ["Image,DR,Colour,Age"]
    for index in range(36):
        grade = index % 3
        (folder_path / "traindata" / f"{index}.png").write_bytes(photograph(seed=index, brightness=70 + 60 * grade))
        lines.append(f"{index}.png,{grade},{('dim', 'plain', 'bright')[grade]},{40 + index}")
    (folder_path / "traindata" / "blank.png").write_bytes(photograph(seed=90))
    (folder_path / "traindata" / "broken.png").write_bytes(b"not a photograph")
    lines += ["blank.png,,,", "broken.png,2,bright,50"]
    (folder_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder_path


@dataclass(frozen=True)
class Keys:
    """The keys of a test endpoint."""

    uri: str
    embed: str
    finetune: str
    other: str
    admin: str


def bearer(key: str) -> dict[str, str]:
    """Returns the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


class InProcess:
    """A launcher that runs the job at once in this process: a real job, without a cluster."""

    def __init__(self, cache_path: Path) -> None:
        self.cache_path = cache_path
        self.num_started = 0
        self.is_up = True

    def start(self, job: FineTuningJob, uri: str) -> None:
        self.num_started += 1
        if self.is_up:
            fine_tune_head.main([f"job_uri={uri}", f"cache_path={self.cache_path}", "num_resamples=50"])

    def is_running(self, job: FineTuningJob) -> bool:
        return False


@dataclass(frozen=True)
class Opened:
    """An endpoint in this process and what starts its jobs."""

    client: TestClient
    desk: FineTuningDesk
    launcher: InProcess
