"""A tiny release, a labelled folder of drawn discs, and an endpoint over them that needs no Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from gretfound import fine_tuning, storage
from gretfound.encoder.folder import read_encoder_folder
from serve import interface, keys
from serve.fine_tuning import FineTuningDesk
from tests.serve.tiny_endpoint import InProcess, Keys, Opened, Place, make_place, make_training_folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A hub with a signed release of a two-block encoder."""
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def training_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled folder."""
    return make_training_folder(tmp_path_factory.mktemp("roots"))


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
