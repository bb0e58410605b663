"""Pretraining: what a run needs besides its stream and its loop: weights to start from, a watch, and what it leaves.

A run leaves the encoder folder in its own folder in the hub, HUB/runs/RECIPE/encoder; `jobs.pretrain_encoder` makes the
record of it.
"""

import copy
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gretfound import storage
from gretfound.encoder.folder import load_strictly, write_encoder_folder
from gretfound.encoder.health import Monitor
from gretfound.encoder.transform import Transform
from gretfound.fit import Progress, TrainingSummary
from gretfound.lineage import Encoder
from gretfound.tracking import Tracker

SUMMARY_NAME = "training.json"


def names_encoder(uri: str) -> bool:
    """Returns whether initial weights are an encoder of the hub, and so a parent."""
    return uri.startswith(f"{Encoder.kind}-")


def fetch_initial_weights(hub_uri: str, uri: str, folder_path: Path) -> Path:
    """Brings the weights that a run starts from to this machine: an encoder of the hub, or a file of any importer."""
    if names_encoder(uri):
        return storage.fetch_folder(hub_uri, storage.read_record(hub_uri, uri, Encoder), folder_path)
    if path := storage.local_path(uri):
        return path
    path = folder_path / uri.rpartition("/")[2]
    storage.download_file(uri, path)
    return path


def digest_initial_weights(hub_uri: str, uri: str) -> list[str]:
    """Returns the SHA-256 of each file of the weights that a run starts from: what is under a name may change."""
    with storage.scratch_folder() as folder:
        path = fetch_initial_weights(hub_uri, uri, Path(folder))
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        return [storage.sha256_of(each) for each in files]


class Watch:
    """Watches a run from one of its workers; its methods are callbacks of `fit.train`.

    The first worker tells progress, the losses of groups and the objective's health. Every worker lists the photographs
    that it could not decode, in a file of its own in HUB/runs/RECIPE/rejected.

    Args:
        objective: Leaves ``features`` behind, for `health.Monitor`.
        tracker: Takes a row at each point of progress.
        run_uri: The run's folder in the hub.
        rank: The worker's, 0 for the first.
        group_names: Of the batches' ``group``; `ingest.Order.group_names`.

    Attributes:
        rejected: Ids of photographs that could not be decoded; `ingest.worker_batches` adds to it.
    """

    def __init__(
        self, objective: Any, tracker: Tracker, *, run_uri: str, rank: int, group_names: Sequence[str]
    ) -> None:
        self.rejected: set[str] = set()
        self._tracker, self._group_names, self._monitor = tracker, group_names, Monitor(objective)
        self._is_first, self._num_listed = rank == 0, 0
        self._rejected_uri = storage.join(run_uri, "rejected", f"{rank:05d}-{secrets.token_hex(4)}.json")

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        """Takes a batch that the objective has just seen; ``on_batch``."""
        if self._is_first:
            self._monitor.observe(batch)
        if len(self.rejected) > self._num_listed:
            storage.write_json(self._rejected_uri, sorted(self.rejected))
            self._num_listed = len(self.rejected)

    def tell(self, progress: Progress) -> None:
        """Tells the tracker; ``on_progress``."""
        figures = progress.figures(self._group_names) | self._monitor.figures()
        self._tracker.write(figures | {"num_rejected": len(self.rejected)})


def write_encoder(
    uri: str,
    objective: Any,
    summary: TrainingSummary,
    *,
    objective_name: str,
    architecture: str,
    image_size_px: int,
    config_yaml: str,
) -> None:
    """Writes the encoder folder, and beside it the whole objective, for reconstructions and for training on.

    Args:
        uri: The folder, in the hub.
        objective: As it was before the first step; gets the trained weights.
        summary: Of the finished training.
        objective_name: ``mae`` or ``dinov2``; its weights become ``NAME.safetensors``.
        architecture: The timm entry point that builds the encoder.
        image_size_px: Side of the finished encoder's input. Where it is another than the pretraining's, positions are
            interpolated: crops of a photograph may be enough to learn from, where features need the whole of it.
        config_yaml: The run's merged configuration.
    """
    load_strictly(objective, summary.weights)
    progress = {"images_seen": summary.images_seen, "final_loss": summary.final_loss}
    encoder = copy.deepcopy(objective.encoder)
    encoder.set_input_size(img_size=image_size_px)
    with storage.scratch_folder() as folder:
        path = write_encoder_folder(
            encoder,
            Path(folder),
            architecture=architecture,
            transform=Transform(image_size_px=image_size_px),
            extra={"objective": objective_name, "images_seen": summary.images_seen},
        )
        save_file(summary.weights, path / f"{objective_name}.safetensors", metadata={"format": "pt"})
        (path / "config.yaml").write_text(config_yaml)
        (path / SUMMARY_NAME).write_text(json.dumps(progress) + "\n")
        for file_path, _, _ in storage.describe_folder(path):
            storage.upload_file(file_path, storage.join(uri, file_path.name))


def read_encoder(uri: str, folder_path: Path) -> dict[str, Any]:
    """Brings what `write_encoder` wrote to this machine; returns its ``images_seen`` and ``final_loss``."""
    for file_uri in storage.list_uris(uri):
        storage.download_file(file_uri, folder_path / file_uri.rpartition("/")[2])
    summary: dict[str, Any] = json.loads((folder_path / SUMMARY_NAME).read_text())
    return summary
