"""Training a small generator from nothing: its autoencoder is fitted, its UNet and text encoder are trained.

For demonstrations and tests, where no trained base can be had; in one process, within minutes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

from gretfound import fit
from gretfound.averaging import Averaged
from gretfound.generator import autoencoding, denoising, latents, squares
from gretfound.generator.pipeline import caption_ids

FITTED_PHOTOGRAPHS = 256


def train_from_nothing(
    untrained: StableDiffusionPipeline,
    photographs: Sequence[squares.Square],
    *,
    work_path: Path,
    num_images: int,
    batch_size: int,
    learning_rate: float,
    caption_dropout: float,
    min_snr_gamma: float | None,
    average_decay: float,
    seed: int,
    checkpoints: fit.Checkpoints | None = None,
    checkpoint_every_images: int = 0,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> fit.TrainingSummary:
    """Fits a pipeline's autoencoder and trains its UNet and text encoder on the latents, all in place.

    Args:
        untrained: The pipeline.
        photographs: Of one size, captioned.
        work_path: A folder for latents.
        num_images: Photographs to train on, repeats counted.
        batch_size: Photographs a step.
        learning_rate: Peak of the cosine schedule.
        caption_dropout: See `denoising.DenoisingObjective`.
        min_snr_gamma: See there.
        average_decay: See `averaging.Averaged`.
        seed: Seeds order, times and noise.
        checkpoints: Where the training's state is kept; what comes before it takes seconds and is done again.
        checkpoint_every_images: Distance between checkpoints; 0 saves at the end only.
        on_progress: Told about progress.
    """
    fitted_to = [square.pixels for square in photographs[:FITTED_PHOTOGRAPHS]]
    autoencoding.fit_autoencoder(untrained.vae, squares.as_tensor(fitted_to))
    latents.encode_squares((("", square) for square in photographs), work_path / "latents", base=untrained)
    encoded = latents.lay_out([work_path / "latents"], work_path / "rows")
    ids_NL = caption_ids(untrained.tokenizer, encoded.captions)
    untrained.unet.train()
    denoiser = denoising.DenoisingObjective(
        denoiser=untrained.unet,
        scheduler=untrained.scheduler,
        captions=denoising.TrainableCaptions(untrained.text_encoder, ids_NL, empty=encoded.captions.index("")),
        caption_dropout=caption_dropout,
        min_snr_gamma=min_snr_gamma,
        seed=seed,
    )
    objective = Averaged(denoiser, decay=average_decay, batch_size=batch_size)
    summary = fit.train(
        objective,
        latents.latent_batches(encoded, batch_size=batch_size, seed=seed, has_text=False),
        num_images=num_images,
        batch_size=batch_size,
        peak_lr=learning_rate,
        warmup_images=num_images // 20,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        seed=seed,
        checkpoints=checkpoints,
        checkpoint_every_images=checkpoint_every_images,
        on_progress=on_progress,
    )
    denoiser.load_state_dict(objective.averaged(summary.weights))
    untrained.unet.eval()
    return summary
