"""Training a small generator from nothing: first its autoencoder, then its UNet together with its text encoder.

For demonstrations and tests, where no trained base can be had; on one process, within minutes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from gretfound import fit
from gretfound.generator import autoencoding, denoising, finetune
from gretfound.generator.pipeline import caption_ids

LATENT_STATISTICS_IMAGES = 512


def train_autoencoder(
    untrained: StableDiffusionPipeline,
    squares: Sequence[finetune.Square],
    *,
    num_images: int,
    batch_size: int,
    learning_rate: float,
    edge_weight: float,
    kl_weight: float,
    seed: int,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> fit.TrainingSummary:
    """Trains a pipeline's autoencoder in place and normalises its latents.

    Args:
        untrained: The pipeline.
        squares: Photographs of one size.
        num_images: Photographs to train on, repeats counted.
        batch_size: Photographs a step.
        learning_rate: Peak of the cosine schedule.
        edge_weight: See `autoencoding.AutoencodingObjective`.
        kl_weight: See there.
        seed: Seeds order and noise.
        on_progress: Told about progress.
    """
    pixels_NCHW = finetune.as_tensor([square.pixels for square in squares])

    def batches(images_seen: int) -> Iterator[dict[str, Tensor]]:
        for first in itertools.count(images_seen, batch_size):
            position_B = torch.arange(first, first + batch_size)
            photograph_B, view_B = finetune.order_at(position_B, num_images=len(pixels_NCHW), seed=seed)
            shown_BCHW = pixels_NCHW[photograph_B]
            shown_BCHW = torch.where(view_B.view(-1, 1, 1, 1) == 1, shown_BCHW.flip(-1), shown_BCHW)
            yield {"photograph_BCHW": shown_BCHW, "position_B": position_B}

    untrained.vae.train()
    summary = fit.train(
        autoencoding.AutoencodingObjective(vae=untrained.vae, edge_weight=edge_weight, kl_weight=kl_weight, seed=seed),
        batches,
        num_images=num_images,
        batch_size=batch_size,
        peak_lr=learning_rate,
        warmup_images=num_images // 20,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        seed=seed,
        on_progress=on_progress,
    )
    untrained.vae.eval()
    blocks = torch.split(pixels_NCHW[:LATENT_STATISTICS_IMAGES], finetune.ENCODE_BATCH)
    untrained.vae.register_to_config(scaling_factor=1.0)
    latents = [autoencoding.encode_photographs(untrained.vae, block_BCHW) for block_BCHW in blocks]
    autoencoding.normalise_latents(untrained.vae, torch.cat(latents))
    return summary


def train_denoiser(
    untrained: StableDiffusionPipeline,
    squares: Sequence[finetune.Square],
    *,
    num_images: int,
    batch_size: int,
    learning_rate: float,
    caption_dropout: float,
    min_snr_gamma: float | None,
    seed: int,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> fit.TrainingSummary:
    """Trains a pipeline's UNet and text encoder in place, on latents of its trained autoencoder.

    Args:
        untrained: The pipeline.
        squares: Photographs of one size, captioned.
        num_images: Photographs to train on, repeats counted.
        batch_size: Photographs a step.
        learning_rate: Peak of the cosine schedule.
        caption_dropout: See `denoising.DenoisingObjective`.
        min_snr_gamma: See there.
        seed: Seeds order, times and noise.
        on_progress: Told about progress.
    """
    photographs = finetune.encode_photographs(untrained, squares)
    ids_NL = caption_ids(untrained.tokenizer, [*photographs.captions, ""])
    untrained.unet.train()
    summary = fit.train(
        denoising.DenoisingObjective(
            unet=untrained.unet,
            scheduler=untrained.scheduler,
            captions=denoising.TrainableCaptions(untrained.text_encoder, ids_NL),
            caption_dropout=caption_dropout,
            min_snr_gamma=min_snr_gamma,
            seed=seed,
        ),
        finetune.latent_batches(photographs, batch_size=batch_size, seed=seed),
        num_images=num_images,
        batch_size=batch_size,
        peak_lr=learning_rate,
        warmup_images=num_images // 20,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        seed=seed,
        on_progress=on_progress,
    )
    untrained.unet.eval()
    return summary
