"""Small real parts that the tests of the endpoint share: drawn photographs, a launcher without a cluster, names."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from gretfound.fine_tuning import FineTuningJob
from gretfound.lineage import Release
from jobs import fine_tune_head
from serve.fine_tuning import FineTuningDesk


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
    """A hub with one release in it."""

    hub_uri: str
    release_uri: str
    release: Release
    release_path: Path


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

    def start(self, job: FineTuningJob, uri: str) -> None:  # noqa: ARG002
        self.num_started += 1
        if self.is_up:
            fine_tune_head.main([f"job_uri={uri}", f"cache_path={self.cache_path}", "num_resamples=50"])

    def is_running(self, job: FineTuningJob) -> bool:  # noqa: ARG002
        return False


@dataclass(frozen=True)
class Opened:
    """An endpoint in this process and what starts its jobs."""

    client: TestClient
    desk: FineTuningDesk
    launcher: InProcess
