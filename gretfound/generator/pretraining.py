"""Training a small generator from nothing: its autoencoder is fitted, its UNet and text encoder are trained.

For demonstrations and tests, where no trained base can be had; in one process, within minutes.
"""

from collections.abc import Callable, Sequence

from diffusers import StableDiffusionPipeline

from gretfound import fit
from gretfound.averaging import Averaged
from gretfound.generator import autoencoding, denoising, finetune
from gretfound.generator.pipeline import caption_ids

FITTED_PHOTOGRAPHS = 256


def train_from_nothing(
    untrained: StableDiffusionPipeline,
    squares: Sequence[finetune.Square],
    *,
    num_images: int,
    batch_size: int,
    learning_rate: float,
    caption_dropout: float,
    min_snr_gamma: float | None,
    average_decay: float,
    seed: int,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> fit.TrainingSummary:
    """Fits a pipeline's autoencoder and trains its UNet and text encoder on the latents, all in place.

    Args:
        untrained: The pipeline.
        squares: Photographs of one size, captioned.
        num_images: Photographs to train on, repeats counted.
        batch_size: Photographs a step.
        learning_rate: Peak of the cosine schedule.
        caption_dropout: See `denoising.DenoisingObjective`.
        min_snr_gamma: See there.
        average_decay: See `averaging.Averaged`.
        seed: Seeds order, times and noise.
        on_progress: Told about progress.
    """
    fitted_to = [square.pixels for square in squares[:FITTED_PHOTOGRAPHS]]
    autoencoding.fit_autoencoder(untrained.vae, finetune.as_tensor(fitted_to))
    photographs = finetune.encode_photographs(untrained, squares)
    ids_NL = caption_ids(untrained.tokenizer, [*photographs.captions, ""])
    untrained.unet.train()
    denoiser = denoising.DenoisingObjective(
        unet=untrained.unet,
        scheduler=untrained.scheduler,
        captions=denoising.TrainableCaptions(untrained.text_encoder, ids_NL),
        caption_dropout=caption_dropout,
        min_snr_gamma=min_snr_gamma,
        seed=seed,
    )
    objective = Averaged(denoiser, decay=average_decay, batch_size=batch_size)
    summary = fit.train(
        objective,
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
    denoiser.load_state_dict(objective.averaged(summary.weights))
    untrained.unet.eval()
    return summary
