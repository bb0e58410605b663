"""Vision transformers from timm, by name, with the sizes that a recipe overrides."""

import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gretfound.capacity import Transformer


def build_encoder(architecture: str, *, image_size_px: int, **sizes: Any) -> nn.Module:
    """Builds an untrained timm vision transformer whose features are the mean of its normalised patch tokens.

    Args:
        architecture: A timm name, for example ``vit_large_patch16_224``.
        image_size_px: Side of the square input.
        sizes: Overrides of timm's arguments: ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``.
    """
    encoder: nn.Module = timm.create_model(architecture, **timm_arguments(image_size_px=image_size_px, **sizes))
    return encoder


def timm_arguments(*, image_size_px: int, **sizes: Any) -> dict[str, Any]:
    """Returns the arguments with which plain timm rebuilds the encoder of `build_encoder`."""
    return {
        "img_size": image_size_px,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,  # the final norm stays before the pooling, where pretraining trained it
        **{name: value for name, value in sizes.items() if value},
    }


def measure_encoder(architecture: str, *, image_size_px: int, **sizes: Any) -> Transformer:
    """Returns the sizes of the encoder that `build_encoder` would build, without giving it memory."""
    with torch.device("meta"):
        encoder: Any = build_encoder(architecture, image_size_px=image_size_px, **sizes)
    return Transformer(
        width=int(encoder.embed_dim),
        depth=len(encoder.blocks),
        patch_px=int(encoder.patch_embed.patch_size[0]),
        num_prefix_tokens=int(encoder.num_prefix_tokens),
        block_weights=sum(each.weight.numel() for each in encoder.blocks[0].modules() if isinstance(each, nn.Linear)),
    )


def sine_cosine_positions(width: int, grid_size: int) -> Tensor:
    """Returns fixed two-dimensional sine-cosine position embeddings.

    Source: He et al., CVPR 2022, appendix A.1, after Vaswani et al., 2017.

    Returns:
        Embeddings of shape (grid_size ** 2, width), row by row.
    """
    quarter = width // 4
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    x_angle, y_angle = (axis.reshape(-1, 1).double() * frequency for axis in (x, y))
    return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1).float()
