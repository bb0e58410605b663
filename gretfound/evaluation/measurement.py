"""Measurement: what Ray does for an evaluation: photographs to features, and features to outcomes, side by side.

A photograph is decoded once for every encoder. Neither the number of workers nor their batches change a result.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from gretfound import duplicates, fundus, storage
from gretfound.encoder import folder
from gretfound.evaluation import protocol
from gretfound.evaluation.protocol import (
    ENCODERS,
    RAW_PIXELS_SIZE_PX,
    Assessment,
    EvaluationSet,
    Outcome,
    Photographs,
)
from gretfound.lineage import Encoder


class Embedder:
    """Runs on workers: decodes photographs once and returns every encoder's features of them."""

    def __init__(
        self, hub_uri: str, encoder: Encoder, *, seed: int, pooling: str, device: str, batch_size: int
    ) -> None:
        with storage.scratch_folder() as scratch:
            path = storage.fetch_folder(hub_uri, encoder, Path(scratch))
            pretrained, self._transform = folder.read_encoder_folder(path)
            untrained = folder.untrained_like(path, seed=seed)
        self._networks = {"pretrained": pretrained.to(device), "untrained": untrained.to(device)}
        self._pooling, self._batch_size = pooling, batch_size

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Adds image ids, hashes, features and, for what cannot be read, the reason to a batch of places and URIs."""
        images, reasons, image_ids, hashes = [], [], [], []
        for uri in batch["uri"].tolist():
            image, reason = np.zeros((1, 1, 3), np.uint8), "" if uri else "MISSING: the file is not in traindata/"
            try:
                image = fundus.decode_photograph(storage.read_bytes(uri)) if uri else image
            except fundus.UnreadablePhotograph as error:
                reason = str(error)
            images.append(image)
            reasons.append(reason)
            image_ids.append("" if reason else fundus.pixel_digest(image))
            hashes.append(duplicates.hash_photograph(image, fundus.find_field_of_view(image)).view(np.uint8))
        squares = [self._transform.square(image) for image in images]
        tensor_BCHW = self._transform.normalise(torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()))
        features = {
            name: folder.embed(network, tensor_BCHW, pooling=self._pooling, batch=self._batch_size)
            for name, network in self._networks.items()
        }
        pixels = [fundus.to_square(square, None, RAW_PIXELS_SIZE_PX).reshape(-1) for square in squares]
        features["raw_pixels"] = np.stack(pixels).astype(np.float32) / np.float32(255.0)
        return {
            "place": batch["place"],
            "reason": np.array(reasons),
            "image_id": np.array(image_ids),
            "hash": np.stack(hashes),
            **features,
        }


def embed_sets(
    hub_uri: str,
    encoder: Encoder,
    sets: Sequence[EvaluationSet],
    *,
    seed: int,
    pooling: str,
    device: str,
    batch_size: int,
    num_workers: int,
) -> tuple[dict[str, Photographs], dict[str, list[dict[str, Any]]], dict[str, pa.Table]]:
    """Decodes every photograph of the sets and takes the features of all of `protocol.ENCODERS`.

    Args:
        hub_uri: The hub.
        encoder: The pretrained one; the untrained one is of its architecture.
        sets: Evaluation sets with different names.
        seed: Of the untrained encoder's weights.
        pooling: One of `folder.POOLINGS`, for both encoders.
        device: ``cpu`` or ``cuda``; one GPU a worker.
        batch_size: Photographs that a worker embeds at a time.
        num_workers: Workers, one CPU each.

    Returns:
        By set: its readable photographs, the rows that could not be read with reasons, and the readable photographs'
        ids and hashes (`duplicates.EVALUATION_SCHEMA`).

    Raises:
        StorageError: If a set has no readable photograph.
    """
    rows = [(each.name, row) for each in sets for row in each.rows]
    ray.data.DataContext.get_current().enable_progress_bars = False
    embedded = ray.data.from_items(
        [{"place": place, "uri": row.uri} for place, (_, row) in enumerate(rows)]
    ).map_batches(
        Embedder,
        fn_constructor_args=(hub_uri, encoder),
        fn_constructor_kwargs={"seed": seed, "pooling": pooling, "device": device, "batch_size": batch_size},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
    )
    batches = list(embedded.iter_batches(batch_size=None))
    photographs, faults = protocol.collect(rows, batches)
    return photographs, faults, sign_embedded(photographs, batches)


def sign_embedded(photographs: Mapping[str, Photographs], batches: Iterable[Mapping[str, Any]]) -> dict[str, pa.Table]:
    """Returns by set what `protocol.sign` does, from the ids and hashes that an `Embedder` has found already."""
    hash_of = {
        image_id: words.astype(np.uint8).tobytes()
        for batch in batches
        for image_id, words in zip(batch["image_id"].tolist(), batch["hash"], strict=True)
    }
    return {
        name: pa.table(
            {"image_id": list(each.image_ids), "hash": [hash_of[image_id] for image_id in each.image_ids]},
            schema=duplicates.EVALUATION_SCHEMA,
        )
        for name, each in photographs.items()
    }


def assess_all(
    assessments: Sequence[Assessment], photographs: Mapping[str, Photographs], *, num_resamples: int, seed: int
) -> dict[tuple[str, str], Outcome]:
    """Assesses every encoder in every assessment, each pair in a Ray task of one CPU.

    Args:
        assessments: What was planned.
        photographs: The evaluation sets by name, the ones that probes are fitted on too.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the inner splits and of the bootstrap.

    Returns:
        Outcomes by the assessment's name and the encoder's.
    """
    features = {
        (name, encoder): ray.put(each.features[encoder]) for name, each in photographs.items() for encoder in ENCODERS
    }
    assess = ray.remote(protocol.assess).options(num_cpus=1)
    pending = {
        (assessment.name, encoder): assess.remote(
            assessment,
            features[assessment.set_name, encoder],
            features[assessment.fitted_on, encoder] if assessment.fitted_on else None,
            num_resamples=num_resamples,
            seed=seed,
        )
        for assessment in assessments
        for encoder in ENCODERS
    }
    return dict(zip(pending, ray.get(list(pending.values())), strict=True))
