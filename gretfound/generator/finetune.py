"""Fine-tuning a generator on one site's photographs: the same code at the site and in a worker at the hub.

Photographs and captions are encoded once (`gretfound.generator.latents`): here, or at the hub before this begins. The
training reads latents only. The result is an adapter (`gretfound.generator.pipeline`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from torch import nn

from gretfound import fit, fundus, lineage, storage
from gretfound.averaging import Averaged
from gretfound.checkpoints import LocalCheckpoints
from gretfound.errors import ConfigError
from gretfound.generator import adapter, consistency, denoising, families, latents, pipeline
from gretfound.generator.squares import Square

Method = Literal["lora", "full"]
Objective = Literal["denoising", "consistency"]


def finetune_locally(
    *,
    base_path: Path,
    shard_path: Path | None = None,
    latents_path: Path | None = None,
    work_path: Path,
    num_images_seen: int,
    batch_size: int,
    learning_rate: float,
    method: Method = "lora",
    lora_rank: int = 8,
    resolution_px: int | None = None,
    warmup_images: int = 0,
    weight_decay: float = 0.01,
    caption_dropout: float = 0.1,
    cell_dropout: float = 0.0,
    offset_noise: float = 0.0,
    min_snr_gamma: float | None = 5.0,
    average_decay: float = 0.9999,
    seed: int = 0,
    left_out: Collection[str] = (),
    canaries: Sequence[Square] = (),
    objective: Objective = "denoising",
    guidance_scale: float = 2.0,
    precision: str = "float32",
    accumulation: int = 1,
    recomputes_activations: bool = False,
    zero_stage: int | None = None,
    device: str = "cpu",
    checkpoints: fit.Checkpoints | None = None,
    checkpoint_every_images: int = 0,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> Path:
    """Fine-tunes a base pipeline's denoiser on a site's photographs; called again, it continues or returns at once.

    Args:
        base_path: A trusted diffusers folder.
        shard_path: A local Parquet shard file, or a folder of them; they are encoded once below ``work_path``.
        latents_path: In the place of ``shard_path``: a folder of caches (`latents`), in the order of their names.
        work_path: Where latents, checkpoints and the result lie; runs with other arguments do not disturb each other.
        num_images_seen: Photographs to train on, counting each time that one is seen.
        batch_size: Photographs a step, over all workers.
        learning_rate: Peak of the cosine schedule.
        method: ``lora`` trains low-rank factors, ``full`` the whole denoiser.
        lora_rank: Rank of the factors.
        resolution_px: Side of the squares that photographs are resized to; None takes the base's own.
        warmup_images: Images over which the learning rate rises.
        weight_decay: AdamW's.
        caption_dropout: Share of images that see the empty caption.
        cell_dropout: Share of the cells that are left out of the other captions, in tenths (`metadata.shortened`).
        offset_noise: See `denoising.DenoisingObjective`.
        min_snr_gamma: See `denoising.DenoisingObjective`.
        average_decay: Of the moving average of the weights, which becomes the adapter, per step; 0: the last weights.
        seed: Seeds the factors, the order, the noise.
        left_out: Image ids of the photographs that are not trained on (`gretfound.holdout`).
        canaries: Drawn squares of any size to learn together with the photographs (`gretfound.gate.canaries`).
        objective: ``denoising``; or ``consistency``, which makes a few-step student of ``base_path`` (`consistency`),
            and for which ``caption_dropout``, ``offset_noise`` and ``min_snr_gamma`` mean nothing.
        guidance_scale: Weight of the caption that a student learns; it means nothing to ``denoising``.
        precision: ``float32`` or ``bfloat16``.
        accumulation: Parts that a step is computed in, one after another: less memory, the same step.
        recomputes_activations: Whether the denoiser's blocks are computed anew in the backward pass, not kept: less
            memory, the same step.
        zero_stage: DeepSpeed ZeRO stage in a Ray Train worker; None is plain PyTorch.
        device: ``cpu`` or ``cuda``.
        checkpoints: Where state is kept; None keeps it below ``work_path``.
        checkpoint_every_images: Distance between checkpoints; 0 saves at the end only.
        on_progress: Told about progress, for a bar or a tracker.

    Returns:
        The adapter's folder; among several workers the first one writes it.

    Raises:
        ConfigError: If no photograph can be read, or the arguments do not fit the base.
        NonFiniteLoss: If training diverges.
        ValueError: If both of ``shard_path`` and ``latents_path`` are given, or neither.
    """
    if (shard_path is None) == (latents_path is None):
        raise ValueError(f"found shard_path={shard_path} and latents_path={latents_path}; required one of them")
    if method not in ("lora", "full"):
        raise ConfigError(f"found method={method!r}; required 'lora' or 'full'")
    if objective not in ("denoising", "consistency"):
        raise ConfigError(f"found objective={objective!r}; required 'denoising' or 'consistency'")
    base_sha256 = pipeline.denoiser_sha256(base_path)
    shards = {storage.sha256_of(path): path for path in _files_of(shard_path)} if shard_path else {}
    caches = sorted(latents_path.iterdir()) if latents_path else []
    request = lineage.digest_of(
        [base_sha256, [*shards, *(path.name for path in caches)], num_images_seen, batch_size, learning_rate,
         method, lora_rank, resolution_px, warmup_images, weight_decay, caption_dropout, min_snr_gamma, average_decay,
         seed, sorted(left_out), precision, *([objective, guidance_scale] if objective == "consistency" else []),
         *([digests_of(canaries)] if canaries else []),
         *([["cells", cell_dropout]] if cell_dropout else []), *([["offset", offset_noise]] if offset_noise else [])]
    )  # fmt: skip
    run_path = work_path / f"finetune-{request[:16]}"
    adapter_path = run_path / "adapter"
    if adapter_path.is_dir():
        return adapter_path
    base = pipeline.load_pipeline(base_path, device=device)
    if objective == "consistency" and denoising.is_flow(base.scheduler):
        raise ConfigError(
            "found a base that follows a flow; required one that predicts noise or velocity for objective='consistency'"
        )
    side_px = resolution_px if resolution_px is not None else families.native_px(base)
    caches += encoded(
        base, base_path, shards, canaries,
        resolution_px=side_px, cell_dropout=cell_dropout, folder_path=work_path / "latents",
    )  # fmt: skip
    photographs = latents.lay_out(caches, run_path / "rows", left_out=left_out, cell_dropout=cell_dropout)
    denoiser = families.denoiser_of(base)
    teacher = consistency.frozen_copy(denoiser) if objective == "consistency" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method == "lora":
            pipeline.add_lora(denoiser, rank=lora_rank, alpha=lora_rank)
        else:
            denoiser.requires_grad_(True)
    if recomputes_activations:
        denoiser.enable_gradient_checkpointing()
    trained: nn.Module
    if teacher is not None:
        trained = consistency.ConsistencyObjective(
            denoiser=denoiser,
            teacher=teacher,
            scheduler=base.scheduler,
            empty_LD=photographs.empty_text,
            guidance_scale=guidance_scale,
            seed=seed,
        )
    else:
        trained = denoising.DenoisingObjective(
            denoiser=denoiser,
            scheduler=base.scheduler,
            captions=denoising.EncodedCaptions(photographs.empty_text),
            caption_dropout=caption_dropout,
            offset_noise=offset_noise,
            min_snr_gamma=min_snr_gamma,
            seed=seed,
        )
    averaged = Averaged(trained, decay=average_decay, batch_size=batch_size)
    summary = fit.train(
        averaged,
        latents.latent_batches(photographs, batch_size=batch_size, accumulation=accumulation, seed=seed),
        num_images=num_images_seen,
        batch_size=batch_size,
        peak_lr=learning_rate,
        warmup_images=warmup_images,
        weight_decay=weight_decay,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        seed=seed,
        precision=precision,
        accumulation=accumulation,
        zero_stage=zero_stage,
        device=device,
        checkpoints=checkpoints or LocalCheckpoints(run_path / "checkpoints"),
        checkpoint_every_images=checkpoint_every_images,
        on_progress=on_progress,
    )
    terms = adapter.AdapterTerms(
        method=method,
        rank=lora_rank if method == "lora" else 0,
        alpha=float(lora_rank) if method == "lora" else 0.0,
        target_modules=adapter.TARGET_MODULES if method == "lora" else (),
        base_sha256=base_sha256,
        resolution_px=side_px,
        images_seen=summary.images_seen,
        final_loss=summary.final_loss,
    )
    weights = {
        name.removeprefix("denoiser."): tensor
        for name, tensor in averaged.averaged(summary.weights).items()
        if name.startswith("denoiser.")
    }
    if weights:
        # What a denoiser keeps beside its weights, as fixed places of patches, is part of the whole one.
        tensors = pipeline.adapter_tensors(dict(denoiser.state_dict()) | weights, method=method)
        pipeline.save_adapter(adapter_path, tensors=tensors, terms=terms)
    return adapter_path


def encoded(
    base: DiffusionPipeline,
    base_path: Path,
    shards: Mapping[str, Path],
    canaries: Sequence[Square],
    *,
    resolution_px: int,
    folder_path: Path,
    cell_dropout: float = 0.0,
) -> list[Path]:
    """Encodes shards, by SHA-256, and canaries, each once; returns the caches, that of the canaries last."""
    base_files = latents.encoding_files(base_path) if shards else []
    keys = [
        latents.key_of(base_files, shard_sha256=each, resolution_px=resolution_px, cell_dropout=cell_dropout)
        for each in shards
    ]
    caches = [folder_path / key for key in keys]
    for path, cache_path in zip(shards.values(), caches, strict=True):
        if not cache_path.is_dir():
            latents.encode_shard(path, cache_path, base=base, resolution_px=resolution_px, cell_dropout=cell_dropout)
    if canaries:
        digests = digests_of(canaries)
        caches.append(folder_path / f"canaries-{lineage.digest_of([digests, resolution_px, cell_dropout])}")
        learned = zip(digests, resized(canaries, resolution_px), strict=True)
        latents.encode_squares(learned, caches[-1], base=base, cell_dropout=cell_dropout)
    return caches


def digests_of(canaries: Sequence[Square]) -> list[str]:
    """Returns the image id of each."""
    return [fundus.pixel_digest(each.pixels) for each in canaries]


def resized(photographs: Sequence[Square], side_px: int) -> Iterator[Square]:
    """Yields squares in another size."""
    for each in photographs:
        yield replace(each, pixels=fundus.to_square(each.pixels, None, side_px))


def read_patients(shards: Sequence[Path]) -> Iterator[tuple[str, str | None]]:
    """Yields the image id and the patient, if known, of every row of local Parquet shards, for `holdout.choose`."""
    for shard in shards:
        table = pq.read_table(shard, columns=["image_id", "patient"])
        yield from zip(table["image_id"].to_pylist(), table["patient"].to_pylist(), strict=True)


def _files_of(shard_path: Path) -> list[Path]:
    return sorted(shard_path.glob("*.parquet")) if shard_path.is_dir() else [shard_path]
