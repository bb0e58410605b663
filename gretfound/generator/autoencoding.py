"""Photographs to latents and back; and a small autoencoder that is fitted in closed form, without training.

Its encoder is a pyramid of principal components of 2x2 blocks, its decoder a pyramid of linear regressions: what a
convolutional autoencoder of the same size reaches only after many minutes of training, in seconds.

Shapes: N photographs, C channels, H and W pixels; c latent channels, h rows and w columns; K components, P places.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional

# DecoderTiny squashes its input to 3 tanh(z / 3); small latents pass it straight, and its first ReLU with this offset.
LATENT_SPREAD = 0.3
OFFSET = 4.0
RIDGE = 1e-4
CHUNK_IMAGES = 16


def build_autoencoder(
    *, latent_channels: int, encoder_width: int, decoder_width: int, num_halvings: int
) -> AutoencoderTiny:
    """Builds an autoencoder that `fit_autoencoder` can fit: convolutions, and nothing between them.

    Args:
        latent_channels: Channels of the latents.
        encoder_width: Channels within the encoder, at least 3 and at least ``latent_channels``.
        decoder_width: Channels within the decoder, above ``latent_channels``.
        num_halvings: How often the encoder halves the side.

    Raises:
        ValueError: If a width is too small.
    """
    if encoder_width < max(3, latent_channels) or decoder_width <= max(3, latent_channels):
        raise ValueError(
            f"found encoder_width={encoder_width}, decoder_width={decoder_width}; required at least "
            f"{max(3, latent_channels)} and at least {max(3, latent_channels) + 1}"
        )
    num_stages = num_halvings + 1
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(encoder_width,) * num_stages,
        decoder_block_out_channels=(decoder_width,) * num_stages,
        num_encoder_blocks=(0,) * num_stages,
        num_decoder_blocks=(0,) * num_stages,
        scaling_factor=1 / LATENT_SPREAD,
    )


@torch.no_grad()
def fit_autoencoder(autoencoder: AutoencoderTiny, photographs_NCHW: Tensor) -> None:
    """Sets every weight of an autoencoder from the statistics of photographs; scaled latents have unit variance.

    Source: the Karhunen-Loeve transform (Jolliffe 2002, Principal component analysis, chapter 2) for the encoder; ridge
    regression (Hoerl and Kennard 1970) of each finer level on 3x3 places of the coarser one for the decoder.

    Args:
        autoencoder: Of `build_autoencoder`; changed in place.
        photographs_NCHW: RGB in [-1, 1].
    """
    levels = _fit_encoder(_convolutions(autoencoder.encoder), (photographs_NCHW + 1) / 2)
    _fit_decoder(_convolutions(autoencoder.decoder), autoencoder.encode(photographs_NCHW).latents, levels)


def _convolutions(half: Any) -> list[nn.Conv2d]:
    return [module for module in half.layers if isinstance(module, nn.Conv2d)]


def _fit_encoder(convolutions: Sequence[nn.Conv2d], photographs_NCHW: Tensor) -> list[Tensor]:
    """Sets the encoder's weights; returns the features of each level, finest first."""
    first, *halvings, last = convolutions
    for convolution in convolutions:
        convolution.weight.zero_()
    _bias(first).zero_()
    first.weight[:3, :, 1, 1] = torch.eye(3)
    levels = [photographs_NCHW]
    for convolution in halvings:
        blocks_NCHW = functional.pixel_unshuffle(levels[-1], 2)
        axes_KC, _, _ = _principal_axes(blocks_NCHW, convolution.out_channels)
        num_inputs = levels[-1].shape[1]
        # A kernel of 3 with a stride of 2 and a border of 1: its last two taps lie on the block.
        convolution.weight[: len(axes_KC), :num_inputs, 1:, 1:] = axes_KC.view(-1, num_inputs, 2, 2)
        levels.append(_project(axes_KC, blocks_NCHW))
    axes_KC, spread_K, mean_C = _principal_axes(levels[-1], last.out_channels)
    axes_KC = LATENT_SPREAD * axes_KC / spread_K.unsqueeze(1)
    last.weight[: len(axes_KC), : axes_KC.shape[1], 1, 1] = axes_KC
    _bias(last).zero_()
    _bias(last)[: len(axes_KC)] = -axes_KC @ mean_C
    return levels


def _fit_decoder(convolutions: Sequence[nn.Conv2d], latents_Nchw: Tensor, levels: Sequence[Tensor]) -> None:
    """Sets the decoder's weights level by level; one channel is constant, since its convolutions have no bias."""
    first, *doublings, last = convolutions
    num_latents = latents_Nchw.shape[1]
    first.weight.zero_()
    _bias(first).zero_()
    first.weight[:num_latents, :, 1, 1] = torch.eye(num_latents)
    _bias(first)[: num_latents + 1] = OFFSET
    drawn_NCHW = torch.relu(first(3 * torch.tanh(latents_Nchw / 3)))
    for convolution, level_NCHW in zip(doublings, reversed(levels[:-1]), strict=True):
        axes_KC, spread_K, mean_C = _principal_axes(level_NCHW, convolution.out_channels - 1)
        features_NKHW = _project(axes_KC / spread_K.unsqueeze(1), level_NCHW - mean_C.view(-1, 1, 1))
        target_NKHW = torch.cat([features_NKHW, torch.ones_like(features_NKHW[:, :1])], dim=1)
        drawn_NCHW = functional.interpolate(drawn_NCHW, scale_factor=2, mode="nearest")
        weight = _regress(drawn_NCHW, target_NKHW)
        convolution.weight.zero_()
        convolution.weight[: len(weight)] = weight
        drawn_NCHW = convolution(drawn_NCHW)
    # The constant channel of the last level stands in for the bias here as well.
    last.weight.copy_(_regress(drawn_NCHW, levels[0]))
    _bias(last).zero_()


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _principal_axes(features_NCHW: Tensor, max_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the strongest axes (K, C), the standard deviation (K) along each, and the mean (C)."""
    features_PC = features_NCHW.permute(0, 2, 3, 1).flatten(0, 2)
    mean_C = features_PC.mean(dim=0)
    variance, axes = torch.linalg.eigh(torch.cov((features_PC - mean_C).double().T))
    order = torch.argsort(variance, descending=True)[:max_components]
    # Signs are arbitrary to the solver; they are fixed so that equal photographs give equal weights everywhere.
    axes_KC = axes[:, order].T
    axes_KC = axes_KC * axes_KC.gather(1, axes_KC.abs().argmax(dim=1, keepdim=True)).sign()
    return axes_KC.float(), variance[order].clamp(min=1e-12).sqrt().float(), mean_C


def _project(axes_KC: Tensor, features_NCHW: Tensor) -> Tensor:
    return torch.einsum("kc,nchw->nkhw", axes_KC, features_NCHW)


def _regress(input_NCHW: Tensor, target_NKHW: Tensor) -> Tensor:
    """Solves for the weight (K, C, 3, 3) of the 3x3 convolution without bias that maps input to target best."""
    num_inputs = 9 * input_NCHW.shape[1]
    moments = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
    products = torch.zeros(num_inputs, target_NKHW.shape[1], dtype=torch.float64)
    for block_NCHW, target in zip(
        torch.split(input_NCHW, CHUNK_IMAGES), torch.split(target_NKHW, CHUNK_IMAGES), strict=True
    ):
        patches_PD = functional.unfold(block_NCHW, 3, padding=1).transpose(1, 2).flatten(0, 1)
        moments += (patches_PD.T @ patches_PD).double()
        products += (patches_PD.T @ target.permute(0, 2, 3, 1).flatten(0, 2)).double()
    moments += RIDGE * moments.diagonal().mean() * torch.eye(num_inputs, dtype=torch.float64)
    weight: Tensor = torch.linalg.solve(moments, products).T.float().reshape(-1, input_NCHW.shape[1], 3, 3)
    return weight


@torch.inference_mode()
def encode_photographs(autoencoder: Any, photographs_BCHW: Tensor) -> Tensor:
    """Returns the scaled latents of RGB photographs in [-1, 1], on the CPU: their mean where it is a choice."""
    encoded = autoencoder.encode(photographs_BCHW.to(autoencoder.device, autoencoder.dtype))
    latents_Bchw: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = autoencoder.config.get("shift_factor") or 0.0
    return (latents_Bchw.float().cpu() - float(shift)) * float(autoencoder.config.scaling_factor)
