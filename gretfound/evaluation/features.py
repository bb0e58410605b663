"""Spaces of features in which photographs are compared: a fixed one without learning, and those of networks in folders.

`scattering_space` and `thumbnail_space` need no file and no random number, so any reader can repeat them.
`encoder_space` is one of our own encoders; `timm_space` any network that timm reads from a local folder, such as an
Inception v3 with ImageNet weights. Nothing is downloaded.

Legend of tensor suffixes: B photographs, C channels, H rows, W columns, L orientations, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
from safetensors import SafetensorError

from gretfound import fundus, storage
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError
from gretfound.evaluation.distances import Features
from gretfound.evaluation.fidelity import Space
from gretfound.evaluation.scattering import NUM_SCATTERING_FEATURES as NUM_SCATTERING_FEATURES
from gretfound.evaluation.scattering import scattering_space as scattering_space
from gretfound.fundus import Photograph
from gretfound.lineage import Encoder

THUMBNAIL_PX = 6


def thumbnail_space(photographs: Sequence[Photograph]) -> Features:
    """Returns each photograph's field of view at 6 x 6 px in RGB on -1 to 1, (B, 108): colour and light by place alone.

    A second opinion that shares nothing with `scattering_space`, for where there is no encoder.
    """
    cells = [fundus.to_square(image, fundus.find_field_of_view(image), THUMBNAIL_PX) for image in photographs]
    return np.stack(cells).reshape(len(cells), -1).astype(np.float32) / 127.5 - 1.0


def encoder_space(path: Path, *, device: str = "cpu") -> Space:
    """Returns the space of an encoder folder: the features that probes and releases see, preprocessed the same way.

    Args:
        path: As `gretfound.encoder.folder` writes it.
        device: Where it runs.

    Raises:
        StorageError: If the folder is not whole.
    """
    encoder, transform = folder.read_encoder_folder(path)
    encoder.to(device)
    return lambda photographs: folder.embed(encoder, transform.apply_batch(photographs))


def space_of(hub_uri: str, encoder_id: str, *, device: str) -> Space:
    """Returns the space of an encoder of the hub, or wavelet scattering where its id is empty.

    Args:
        hub_uri: The hub.
        encoder_id: The encoder's record id, or nothing.
        device: Where an encoder runs.

    Raises:
        LineageError: If the hub holds no such encoder.
        StorageError: If its folder is not whole.
    """
    if not encoder_id:
        return scattering_space
    record = storage.read_record(hub_uri, encoder_id, Encoder)
    with storage.scratch_folder() as scratch:
        return encoder_space(storage.fetch_folder(hub_uri, record, Path(scratch)), device=device)


def timm_space(path: Path, *, device: str = "cpu") -> Space:
    """Returns the space of a network in a folder that ``timm.create_model("local-dir:PATH")`` reads.

    A folder of timm's ``inception_v3`` with ImageNet weights gives 2,048 features. They are not those of the network
    that published FIDs use (a port of TensorFlow's, resized another way): compare figures within this space only.

    Args:
        path: Holds ``config.json`` and ``model.safetensors``.
        device: Where it runs.

    Raises:
        StorageError: If a file is absent or they do not fit each other.
    """
    for name in (folder.CONFIG_NAME, folder.WEIGHTS_NAME):
        if not (path / name).is_file():
            raise StorageError(f"found no {name} in the folder of a network; required timm's config and safetensors")
    try:
        network = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval().to(device)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(f"timm could not read the folder of a network: {error}") from error
    settings = timm.data.resolve_model_data_config(network)
    transform = Transform(
        image_size_px=settings["input_size"][-1], mean=tuple(settings["mean"]), std=tuple(settings["std"])
    )

    @torch.inference_mode()
    def embedded(photographs: Sequence[Photograph]) -> Features:
        return cast(Features, network(transform.apply_batch(photographs).to(device)).float().cpu().numpy())

    return embedded
