"""A tiny release, a labelled folder of drawn discs, and an endpoint over them that needs no Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fastapi.testclient import TestClient

from gretfound import fine_tuning, storage
from gretfound.encoder.folder import read_encoder_folder, write_encoder_folder
from gretfound.encoder.transform import Transform
from gretfound.lineage import Release
from serve import interface, keys
from serve.fine_tuning import FineTuningDesk
from tests.serve.tiny_endpoint import InProcess, Keys, Opened, Place, photograph

IMAGE_SIZE_PX = 32


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A hub with a release of a two-block encoder."""
    folder_path = tmp_path_factory.mktemp("folder")
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
    hub_uri = storage.normalised(str(tmp_path_factory.mktemp("hub")))
    release = storage.publish_folder(hub_uri, folder_path, Release(name="tiny", licence="CC BY-NC 4.0"))
    return Place(hub_uri, storage.record_uri(hub_uri, release), release, folder_path)


@pytest.fixture(scope="session")
def training_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled folder: brightness gives the grade, one row has no grade, one photograph is unreadable."""
    folder_path = tmp_path_factory.mktemp("roots") / "clinic"
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


@pytest.fixture(scope="session")
def key_set(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Keys of four people."""
    uri = str(tmp_path_factory.mktemp("keys") / "keys.json")
    scopes: tuple[list[str], ...] = (["embed"], ["embed", "finetune"], ["finetune"], ["admin"])
    return Keys(uri, *(keys.create_key(keys_uri=uri, scopes=some) for some in scopes))


@pytest.fixture(scope="session")
def open_endpoint(
    place: Place, training_path: Path, key_set: Keys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Opened]]:
    """Opens an endpoint without Ray; keywords replace its limits."""
    encoder, transform = read_encoder_folder(place.release_path)

    async def embed(squares: np.ndarray) -> np.ndarray:
        return fine_tuning.embed_squares(encoder, transform, squares, precision="float32")

    async def is_ready() -> bool:
        return True

    engine = interface.Engine(
        release_id=place.release.id,
        encoder="vit_tiny_patch16_224",
        dimension=32,
        transform=transform,
        embed=embed,
        is_ready=is_ready,
    )

    def opened(**replaced: float) -> Opened:
        limits = {
            "max_images": 4,
            "max_image_bytes": 200_000,
            "max_request_bytes": 400_000,
            "max_requests_per_key": 4,
            "request_timeout_s": 60.0,
            "decode_threads": 2,
        }
        launcher = InProcess(tmp_path_factory.mktemp("cache"))
        desk = FineTuningDesk(
            hub_uri=storage.normalised(str(tmp_path_factory.mktemp("jobs"))),
            release_id=place.release.id,
            release_uri=place.release_uri,
            launcher=launcher,
            training_roots=(str(training_path.parent),),
            training_prefixes=("s3://open/clinics",),
            max_jobs_per_owner=2,
        )
        app = interface.build(
            engine, keys=keys.KeyRing(key_set.uri), limits=interface.Limits(**{**limits, **replaced}), desk=desk
        )
        return Opened(TestClient(app, raise_server_exceptions=False), desk, launcher)

    yield opened
