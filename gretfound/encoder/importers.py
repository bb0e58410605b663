"""Weights from elsewhere into an encoder, strictly: MAE, RETFound, DINOv2, timm, safetensors, our own folder.

Every tensor of a checkpoint is either loaded, or on the short list of what its format carries besides an encoder; every
weight of the encoder is loaded. Pickled code never runs. RETFound's own script loads with ``strict=False`` and so
accepts a checkpoint of which nothing fits (field notes, 3.4).
"""

import argparse
import logging
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from gretfound.encoder.folder import WEIGHTS_NAME, load_strictly, read_config
from gretfound.errors import StorageError

log = logging.getLogger(__name__)

# What a format carries besides an encoder, by the beginning of the key. Nothing else is dropped.
DROPPED = {
    "MAE": ("decoder_embed.", "decoder_blocks.", "decoder_norm.", "decoder_pred.", "decoder_pos_embed", "mask_token"),
    "MAE encoder": (),
    "DINOv2 training": ("dino_head.", "ibot_head.", "backbone.mask_token"),
    "DINOv2 backbone": ("mask_token",),
    "timm": ("head.",),
    "gretfound encoder folder": (),
}
WIDTH_NAMES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}


def import_weights(encoder: nn.Module, path: Path) -> str:
    """Loads a checkpoint into an encoder.

    Import before the encoder goes into `SelfDistillation`, which copies it, and after it goes into
    `MaskedAutoencoder`, which initialises it.

    Args:
        encoder: A timm vision transformer, changed in place.
        path: A ``.pth`` of MAE, RETFound, DINOv2 or timm, a ``.safetensors``, or an encoder folder.

    Returns:
        The format that was recognised, for the log and the record.

    Raises:
        StorageError: If the file can't be read, contains code, or any weight is missing, unexpected or of another
            shape; names every one, and the timm architecture that would fit. The encoder is then unchanged.
    """
    state: Mapping[str, Any]
    if path.is_dir():
        read_config(path)
        state, is_folder = _read_safetensors(path / WEIGHTS_NAME), True
    else:
        is_folder = False
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    weights, form = encoder_weights(state, encoder, is_folder=is_folder)
    try:
        load_strictly(encoder, weights)
    except StorageError as error:
        raise StorageError(
            f"a checkpoint of the format {form!r} does not fit the encoder. It holds {fitting_architecture(weights)}. "
            f"{error}"
        ) from error
    log.info("imported %s weights of the format %r", len(weights), form)
    return form


def encoder_weights(
    state: Mapping[str, Any], encoder: nn.Module, *, is_folder: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Returns a checkpoint's encoder under timm's names, at the position grid of ``encoder``, and its format's name.

    Other differences from ``encoder`` stay, for `load_strictly` to name.

    Args:
        state: What the file holds.
        encoder: Whose position grid is required; not changed.
        is_folder: Whether the weights come from an encoder folder, which holds an encoder and nothing besides.

    Raises:
        StorageError: If the layout is none that is known, or a value among the weights is no tensor.
    """
    form, found = ("gretfound encoder folder", dict(state)) if is_folder else _recognised(state)
    if faults := [str(name) for name, value in found.items() if not isinstance(value, Tensor)]:
        raise StorageError(f"a checkpoint of the format {form!r} holds values that are no tensors: {', '.join(faults)}")
    kept = {name: value for name, value in found.items() if not name.startswith(DROPPED[form])}
    if form.startswith("DINOv2"):
        kept = _under_timm_names(kept)
    positions = kept.get("pos_embed")
    if positions is not None:
        kept["pos_embed"] = _at_grid(positions, encoder)
    return kept, form


def fitting_architecture(weights: Mapping[str, Tensor]) -> str:
    """Describes the timm model that weights under timm's names belong to, by its name where timm has one."""
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    projection = weights.get("patch_embed.proj.weight")
    if not blocks or projection is None or projection.ndim != 4:
        return "no vision transformer that timm's names describe"
    width, patch_size = int(projection.shape[0]), int(projection.shape[-1])
    registers = weights.get("reg_token")
    num_registers = 0 if registers is None else int(registers.shape[1])
    has_layer_scale = "blocks.0.ls1.gamma" in weights
    up, down = (weights.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    is_gated = up is not None and down is not None and up.shape[0] == 2 * down.shape[1]
    size = WIDTH_NAMES.get(width, "")
    name = (
        f"vit_{size}_patch{patch_size}" + (f"_reg{num_registers}" if num_registers else "") + "_dinov2"
        if has_layer_scale
        else f"vit_{size}_patch{patch_size}_224"
    )
    sizes = f"width {width}, {len(blocks)} blocks, patches of {patch_size} px, {num_registers} register tokens"
    sizes += ", layer scale" if has_layer_scale else ", no layer scale"
    if is_gated and up is not None and size != "giant":
        sizes += (
            f", SwiGLU (timm: mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio={up.shape[0] / width:g}, which no "
            "named architecture of this width has)"
        )
    elif is_gated:
        sizes += ", SwiGLU"
    return (
        f"the timm architecture {name!r} ({sizes})" if timm.is_model(name) else f"no named timm architecture: {sizes}"
    )


def _recognised(state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(state.get("teacher"), Mapping):
        return "DINOv2 training", dict(state["teacher"])
    if isinstance(state.get("model"), Mapping):
        return "MAE" if "mask_token" in state["model"] else "MAE encoder", dict(state["model"])
    if "patch_embed.proj.weight" in state:
        is_dinov2 = "mask_token" in state or "register_tokens" in state
        return "DINOv2 backbone" if is_dinov2 else "timm", dict(state)
    raise StorageError(
        f"found a checkpoint with the keys {', '.join(sorted(map(str, state))[:20]) or 'none'}; required 'model' (MAE, "
        "RETFound), 'teacher' (DINOv2, RETFound-DINOv2), or a vision transformer's weights under timm's names"
    )


def _under_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = name.removeprefix("backbone.")
        short = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", short)  # blocks in chunks, as FSDP training saves them
        short = short.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if short in renamed:
            raise StorageError(f"a DINOv2 checkpoint holds two weights for {short}; required one")
        renamed[short] = value
    if {"register_tokens", "cls_token", "pos_embed"} <= renamed.keys():
        # timm's models with registers give no position to the class token: it is added once and for all.
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _at_grid(positions_1TD: Tensor, encoder: Any) -> Tensor:
    num_prefix = 0 if encoder.no_embed_class else int(encoder.num_prefix_tokens)
    required = tuple(int(side) for side in encoder.patch_embed.grid_size)
    num_found = int(positions_1TD.shape[1]) - num_prefix if positions_1TD.ndim == 3 else 0
    side = math.isqrt(max(num_found, 0))
    if num_found == math.prod(required) or side == 0 or side**2 != num_found:
        return positions_1TD
    log.info("position embeddings interpolated from a grid of %dx%d to %dx%d", side, side, *required)
    resampled: Tensor = resample_abs_pos_embed(
        positions_1TD, new_size=list(required), old_size=[side, side], num_prefix_tokens=num_prefix
    )
    return resampled


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"a safetensors file could not be read: {error}") from error
    return weights


def _read_pickled(path: Path) -> Mapping[str, Any]:
    try:
        # MAE and RETFound store their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise StorageError(
            "a checkpoint holds more than tensors, plain values and an argparse.Namespace, and is not unpickled: "
            f"{error}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StorageError(f"a checkpoint could not be read: {error}") from error
    if not isinstance(state, Mapping):
        raise StorageError(f"found a {type(state).__name__} in a checkpoint; required a mapping of names to tensors")
    return state
