"""The encoder folder: weights, architecture and preprocessing that plain timm, RETFound's script and ONNX can load.

``model.safetensors`` holds the weights, ``config.json`` is timm's (`timm.create_model("local-dir:PATH",
pretrained=True)`), ``transform.json`` the exact preprocessing, ``checkpoint.pth`` the same weights as RETFound's own
fine-tuning script reads them. Weights are read from safetensors only, strictly.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gretfound.encoder.transform import INTERPOLATION, Transform
from gretfound.errors import StorageError

# Legend of tensor suffixes: B images, C colour channels, H rows, W columns, T tokens, L patches, D features.
WEIGHTS_NAME, CONFIG_NAME, TRANSFORM_NAME = "model.safetensors", "config.json", "transform.json"
CHECKPOINT_NAME, ONNX_NAME = "checkpoint.pth", "model.onnx"
POOLINGS = {
    "mean": "the mean of an encoder's patch tokens, as it is served",
    "mean_and_deviation": "the mean of an encoder's patch tokens and their standard deviation, side by side",
}


def write_encoder_folder(
    encoder: VisionTransformer,
    path: Path,
    *,
    architecture: str,
    transform: Transform,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the encoder folder and reads it back, so that no folder is left that does not give the same features.

    Args:
        encoder: A timm vision transformer with one square patch embedding.
        path: The folder, made if absent.
        architecture: The timm entry point that builds it, for example ``vit_large_patch16_224``; sizes that differ
            from that entry point's own are stored in ``config.json``.
        transform: The preprocessing.
        extra: Further plain JSON-able values, kept under ``gretfound`` in ``config.json``, for example images seen.

    Returns:
        ``path``.

    Raises:
        ValueError: If ``architecture`` with the encoder's sizes is another network than ``encoder``.
    """
    if encoder.patch_embed.img_size != (transform.image_size_px, transform.image_size_px):
        raise ValueError(
            f"found an encoder for {encoder.patch_embed.img_size} px and a transform to {transform.image_size_px} px; "
            "required the same size"
        )
    weights = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("head.")
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / WEIGHTS_NAME, metadata={"format": "pt"})
    torch.save({"model": weights}, path / CHECKPOINT_NAME)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": encoder.global_pool,
        "model_args": _model_args(encoder),
        "pretrained_cfg": {
            "architecture": architecture,
            "tag": "gretfound",
            "custom_load": False,
            "input_size": [3, transform.image_size_px, transform.image_size_px],
            "fixed_input_size": True,
            "interpolation": INTERPOLATION,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "gretfound": dict(extra or {}),
    }
    for name, content in ((CONFIG_NAME, config), (TRANSFORM_NAME, transform.to_json())):
        (path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    try:
        restored, _ = read_encoder_folder(path)
    except StorageError as error:
        raise ValueError(f"the architecture {architecture!r} does not describe this encoder: {error}") from error
    probe_BCHW = torch.rand(1, 3, transform.image_size_px, transform.image_size_px, generator=_seeded(0))
    with _evaluating(encoder):
        reference = encoder.to("cpu", torch.float32)
        if not np.array_equal(embed(reference, probe_BCHW, batch=1), embed(restored, probe_BCHW, batch=1)):
            raise ValueError(
                f"an encoder read back as {architecture!r} gives other features: an argument is not stored"
            )
    return path


def read_encoder_folder(path: Path) -> tuple[VisionTransformer, Transform]:
    """Reads an encoder and its preprocessing.

    Returns:
        The encoder in evaluation mode on the CPU, and its transform.

    Raises:
        StorageError: If a file is absent or damaged, or a weight is missing, unexpected or of another shape.
    """
    config = read_config(path)
    encoder = _built(config)
    try:
        weights = load_file(path / WEIGHTS_NAME)
        transform = Transform.from_json(json.loads((path / TRANSFORM_NAME).read_text()))
    except (OSError, SafetensorError, ValueError) as error:
        raise StorageError(f"an encoder folder's weights or transform could not be read: {error}") from error
    load_strictly(encoder, weights)
    return encoder.eval(), transform


def read_config(path: Path) -> dict[str, Any]:
    """Reads ``config.json``.

    Raises:
        StorageError: If it is absent, not JSON, or has no architecture.
    """
    try:
        config = json.loads((path / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"an encoder folder's {CONFIG_NAME} could not be read: {error}") from error
    if not isinstance(config, dict) or not timm.is_model(config.get("architecture", "")):
        raise StorageError(f"an encoder folder's {CONFIG_NAME} names no timm architecture; write the folder again")
    return config


def load_strictly(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads weights by name into ``module``.

    Raises:
        StorageError: Naming every missing or unexpected key and every key of another shape.
    """
    required = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = [f"missing {name}" for name in required if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in required]
    faults += [
        f"{name} has the shape {found[name]}, required {shape}"
        for name, shape in required.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise StorageError(f"{len(faults)} weight(s) do not fit the architecture: {'; '.join(faults)}")
    module.load_state_dict(dict(weights), strict=True)


def untrained_like(path: Path, *, seed: int) -> VisionTransformer:
    """Returns a freshly initialised encoder of the folder's architecture: the baseline that pretraining must beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(read_config(path)).eval()


@torch.inference_mode()
def embed(
    encoder: VisionTransformer, tensor_BCHW: torch.Tensor, *, pooling: str = "mean", batch: int = 64
) -> npt.NDArray[np.float32]:
    """Returns features: of an encoder with average pooling what all patch tokens say, in one of `POOLINGS`.

    The mean comes from timm's own `forward_head`, which applies the final norm once (RETFound's script applies it
    twice). A lesion fills few patches, so it moves the deviation of the patch tokens more than their mean.

    Args:
        encoder: In evaluation mode.
        tensor_BCHW: Preprocessed photographs; moved to the encoder's device batch by batch.
        pooling: One of `POOLINGS`.
        batch: Photographs at a time.

    Returns:
        BxD, or Bx2D with the deviation.

    Raises:
        ValueError: If the pooling has another name.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"found pooling={pooling!r}; required one of {', '.join(POOLINGS)}")
    device = next(encoder.parameters()).device
    parts = []
    for part_BCHW in torch.split(tensor_BCHW, batch):
        token_BTD = encoder.forward_features(part_BCHW.to(device))
        feature_BD = encoder.forward_head(token_BTD, pre_logits=True)
        if pooling == "mean_and_deviation":
            patch_BLD = token_BTD[:, encoder.num_prefix_tokens :]
            deviation_BD = (patch_BLD - patch_BLD.mean(1, keepdim=True)).square().mean(1).sqrt()
            feature_BD = torch.cat([feature_BD, deviation_BD], dim=1)
        parts.append(feature_BD.float().cpu())
    num_features = encoder.num_features * (2 if pooling == "mean_and_deviation" else 1)
    features = torch.cat(parts) if parts else torch.zeros(0, num_features)
    return cast(npt.NDArray[np.float32], features.numpy())


def export_onnx(encoder: VisionTransformer, path: Path, *, image_size_px: int) -> Path:
    """Writes the encoder as one self-contained ONNX file: ``images`` (batch, 3, H, W) to ``features`` (batch, D)."""
    with _evaluating(encoder):
        features = _Features(encoder).cpu()
        batch = torch.export.Dim("batch")
        example_BCHW = torch.zeros(2, 3, image_size_px, image_size_px)
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "torch.export"):
            warnings.simplefilter("ignore")  # the exporter of torch 2.9 to 2.14 warns of its own internals
            program = torch.onnx.export(
                features,
                (example_BCHW,),
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": {0: batch}},
                verbose=False,
            )
        if program is None:
            raise AssertionError("torch.onnx.export with dynamo=True returns a program")
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path, external_data=False)
    return path


def onnx_error(path: Path, encoder: VisionTransformer, images_BCHW: torch.Tensor) -> float:
    """Returns the largest absolute difference between an ONNX export's features and PyTorch's.

    ONNX's own reference implementation runs the export: slow, and independent of PyTorch and of any runtime.
    """
    reference = onnx.reference.ReferenceEvaluator(onnx.load(path))
    (features,) = cast(list[npt.NDArray[np.float32]], reference.run(None, {"images": images_BCHW.numpy()}))
    return float(np.abs(features - embed(encoder, images_BCHW)).max())


class _Features(nn.Module):
    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)
        return cast(torch.Tensor, features)


def _built(config: dict[str, Any]) -> VisionTransformer:
    model_args = config.get("model_args", {}) | {"num_classes": 0}
    try:
        return timm.create_model(config["architecture"], pretrained=False, **model_args)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise StorageError(f"an encoder folder's {CONFIG_NAME} builds no encoder: {error}") from error


def _model_args(encoder: VisionTransformer) -> dict[str, Any]:
    block = encoder.blocks[0]
    patch_height, patch_width = encoder.patch_embed.patch_size
    if patch_height != patch_width:
        raise ValueError(f"found patches of {patch_height}x{patch_width} px; required square ones")
    return {
        "img_size": encoder.patch_embed.img_size[0],
        "patch_size": patch_height,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "global_pool": encoder.global_pool,
        "class_token": encoder.cls_token is not None,
        "reg_tokens": encoder.num_reg_tokens,
        "fc_norm": not isinstance(encoder.fc_norm, nn.Identity),
        "final_norm": not (isinstance(encoder.norm, nn.Identity) and isinstance(encoder.fc_norm, nn.Identity)),
        "num_classes": 0,
    }


@contextlib.contextmanager
def _evaluating(encoder: VisionTransformer) -> Iterator[None]:
    was_training, parameter = encoder.training, next(encoder.parameters())
    device, dtype = parameter.device, parameter.dtype
    encoder.eval()
    try:
        yield
    finally:
        encoder.to(device, dtype).train(was_training)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = {name: logging.getLogger(name) for name in names}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
