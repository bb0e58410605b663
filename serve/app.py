"""The served release: an endpoint that speaks HTTP before an encoder that computes, each scaled for itself.

serve run serve.app:app release_uri=HUB/releases/ID hub_uri=HUB
serve deploy conf/serve/laptop.yaml

`GET /docs` shows the interface; docs/serving.md has the commands to paste. Arguments: `serve.protocol.Arguments`.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from gretfound import fine_tuning
from gretfound.encoder.transform import Transform
from serve import interface
from serve.fine_tuning import FineTuningDesk, RayLauncher
from serve.gate import RETRY_AFTER_S
from serve.keys import KeyRing
from serve.protocol import Arguments

HEALTH_TIMEOUT_S = 2.0
Squares = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


def _num_images(requests: list[Squares]) -> int:
    return sum(len(squares) for squares in requests)


class Encoder:
    """Computes embeddings; photographs of several requests share one pass.

    It reads the release once, verifying every file against its digest, and serves nothing if one differs.
    """

    def __init__(self, arguments: Arguments) -> None:
        import torch

        from gretfound import release, signing
        from gretfound.encoder.folder import read_config, read_encoder_folder

        torch.set_num_threads(arguments.encoder_threads)
        cache_path = Path(arguments.cache_path) if arguments.cache_path else fine_tuning.default_cache_path()
        record, release_path = fine_tuning.fetch_release(arguments.release_uri, cache_path)
        if arguments.public_key_path:
            release.verify_release(release_path, signing.read_public_key(Path(arguments.public_key_path)))
        encoder, self._transform = read_encoder_folder(release_path)
        self._encoder = encoder.to(arguments.device)
        self._precision = arguments.precision
        self._release_id = record.id
        self._architecture = read_config(release_path)["architecture"]
        self.embed.set_max_batch_size(arguments.batch_images)
        self.embed.set_batch_wait_timeout_s(arguments.batch_wait_s)

    def describe(self) -> dict[str, Any]:
        """Returns what the endpoint must know of the encoder."""
        return {
            "release_id": self._release_id,
            "encoder": self._architecture,
            "dimension": self._encoder.num_features,
            "transform": self._transform.to_json(),
        }

    @serve.batch(batch_size_fn=_num_images)
    async def embed(self, requests: list[Squares]) -> list[Features]:
        """Embeds the squares (NxSxSx3 uint8) of each request."""
        together = np.concatenate(requests)
        features = await asyncio.to_thread(
            fine_tuning.embed_squares, self._encoder, self._transform, together, precision=self._precision
        )
        ends = np.cumsum([len(squares) for squares in requests])[:-1]
        return np.split(features, ends)


class Endpoint:
    """Speaks HTTP: keys, limits, decoding, heads. It computes no embedding itself."""

    def __init__(self, encoder: DeploymentHandle, arguments: Arguments) -> None:
        self._encoder = encoder
        self._arguments = arguments
        self._keys = KeyRing(arguments.keys_uri)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        described = await self._encoder.describe.remote()
        engine = interface.Engine(
            release_id=described["release_id"],
            encoder=described["encoder"],
            dimension=described["dimension"],
            transform=Transform.from_json(described["transform"]),
            embed=self._embed,
            is_ready=self._is_ready,
        )
        limits = interface.Limits(
            **{name: getattr(self._arguments, name) for name in interface.Limits.__dataclass_fields__}
        )
        desk = _desk(self._arguments, engine.release_id) if self._arguments.hub_uri else None
        return interface.build(engine, keys=self._keys, limits=limits, desk=desk)

    async def _embed(self, squares: Squares) -> Features:
        features: Features = await self._encoder.embed.remote(squares)
        return features

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._encoder.describe.remote()
        except TimeoutError:
            return False
        return True


def _desk(arguments: Arguments, release_id: str) -> FineTuningDesk:
    launcher = RayLauncher(
        cpus=arguments.job_cpus,
        gpus=arguments.job_gpus,
        device=arguments.job_device,
        precision=arguments.precision,
        cache_path=arguments.cache_path,
    )
    return FineTuningDesk(
        hub_uri=arguments.hub_uri,
        release_id=release_id,
        release_uri=arguments.release_uri,
        launcher=launcher,
        training_roots=arguments.training_roots,
        training_prefixes=arguments.training_prefixes,
        max_jobs_per_owner=arguments.max_jobs_per_owner,
    )


def app(arguments: Arguments) -> Application:
    """Builds the application; `serve run` and `serve deploy` call it with their arguments.

    Raises:
        ConfigError: If there is no key file: an endpoint without keys doesn't start.
    """
    resolved = arguments.resolved()
    KeyRing(resolved.keys_uri)
    encoder = serve.deployment(
        max_ongoing_requests=2 * resolved.batch_images,
        max_queued_requests=resolved.max_queued_requests,
        ray_actor_options={"num_cpus": resolved.encoder_cpus, "num_gpus": resolved.encoder_gpus},
    )(Encoder).bind(resolved)
    endpoint = serve.deployment(
        max_ongoing_requests=resolved.max_ongoing_requests,
        max_queued_requests=resolved.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": resolved.endpoint_cpus},
    )(serve.ingress()(Endpoint))
    return endpoint.bind(encoder, resolved)
