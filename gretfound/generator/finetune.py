"""Fine-tuning a generator on one site's photographs: the same code at the site and in a worker at the hub.

Photographs are cropped to their field of view and encoded once, as they are and mirrored, together with their captions;
the training then reads latents only. The result is an adapter (`gretfound.generator.pipeline`).
"""

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from gretfound import fit, fundus, lineage, metadata, storage
from gretfound.averaging import Averaged
from gretfound.checkpoints import LocalCheckpoints
from gretfound.errors import ConfigError
from gretfound.generator import adapter, autoencoding, denoising, pipeline

log = logging.getLogger(__name__)
Method = Literal["lora", "full"]
Pixels = npt.NDArray[np.uint8]
ENCODE_BATCH = 16
CAPTION_BATCH = 64
_OTHER_EYE = {"left": "right", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class EncodedPhotographs:
    """Photographs as the training reads them: view 0 as they are, view 1 mirrored.

    ``latents`` (view, photograph, channel, row, column) are scaled; ``caption_numbers`` (view, photograph) count in
    ``captions``, which lists each caption once.
    """

    latents: Tensor
    caption_numbers: Tensor
    captions: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Photographs, not counting views."""
        return self.latents.shape[1]


def finetune_locally(
    *,
    base_path: Path,
    shard_path: Path,
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
    min_snr_gamma: float | None = 5.0,
    average_decay: float = 0.9999,
    seed: int = 0,
    left_out: Collection[str] = (),
    precision: str = "float32",
    zero_stage: int | None = None,
    device: str = "cpu",
    checkpoints: fit.Checkpoints | None = None,
    checkpoint_every_images: int = 0,
    on_progress: Callable[[fit.Progress], None] | None = None,
) -> Path:
    """Fine-tunes a base pipeline's UNet on a site's photographs; called again, it continues or returns at once.

    Args:
        base_path: A trusted diffusers folder.
        shard_path: A local Parquet shard file, or a folder of them.
        work_path: Where checkpoints and the result lie; runs with other arguments do not disturb each other.
        num_images_seen: Photographs to train on, counting each time that one is seen.
        batch_size: Photographs a step, over all workers.
        learning_rate: Peak of the cosine schedule.
        method: ``lora`` trains low-rank factors, ``full`` the whole UNet.
        lora_rank: Rank of the factors.
        resolution_px: Side of the squares that photographs are resized to; None takes the base's own.
        warmup_images: Images over which the learning rate rises.
        weight_decay: AdamW's.
        caption_dropout: Share of images that see the empty caption.
        min_snr_gamma: See `denoising.DenoisingObjective`.
        average_decay: Of the moving average of the weights, which becomes the adapter, per step; 0: the last weights.
        seed: Seeds the factors, the order, the noise.
        left_out: Image ids of the photographs that are not trained on (`gretfound.holdout`).
        precision: ``float32`` or ``bfloat16``.
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
    """
    if method not in ("lora", "full"):
        raise ConfigError(f"found method={method!r}; required 'lora' or 'full'")
    base_sha256 = pipeline.unet_sha256(base_path)
    shards = sorted(shard_path.glob("*.parquet")) if shard_path.is_dir() else [shard_path]
    request = lineage.digest_of(
        [base_sha256, [storage.sha256_of(shard) for shard in shards], num_images_seen, batch_size, learning_rate,
         method, lora_rank, resolution_px, warmup_images, weight_decay, caption_dropout, min_snr_gamma, average_decay,
         seed, sorted(left_out), precision]
    )  # fmt: skip
    run_path = work_path / f"finetune-{request[:16]}"
    adapter_path = run_path / "adapter"
    if adapter_path.is_dir():
        return adapter_path
    base = pipeline.load_pipeline(base_path, device=device)
    side_px = resolution_px if resolution_px is not None else native_px(base)
    photographs = encode_photographs(
        base, squares_of(read_photographs(shards, left_out=left_out), resolution_px=side_px)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method == "lora":
            pipeline.add_lora(base.unet, rank=lora_rank, alpha=lora_rank)
        else:
            base.unet.requires_grad_(True)
    denoiser = denoising.DenoisingObjective(
        unet=base.unet,
        scheduler=base.scheduler,
        captions=denoising.EncodedCaptions(encode_captions(base, photographs.captions)),
        caption_dropout=caption_dropout,
        min_snr_gamma=min_snr_gamma,
        seed=seed,
    )
    objective = Averaged(denoiser, decay=average_decay, batch_size=batch_size)
    summary = fit.train(
        objective,
        latent_batches(photographs, batch_size=batch_size, seed=seed),
        num_images=num_images_seen,
        batch_size=batch_size,
        peak_lr=learning_rate,
        warmup_images=warmup_images,
        weight_decay=weight_decay,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        seed=seed,
        precision=precision,
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
    unet_weights = {
        name.removeprefix("unet."): tensor
        for name, tensor in objective.averaged(summary.weights).items()
        if name.startswith("unet.")
    }
    if unet_weights:
        tensors = pipeline.adapter_tensors(unet_weights, method=method)
        pipeline.save_adapter(adapter_path, tensors=tensors, terms=terms)
    return adapter_path


def native_px(base: StableDiffusionPipeline) -> int:
    """Returns the side of the photographs that a pipeline was trained on."""
    return int(base.unet.config.sample_size * base.vae_scale_factor)


def read_photographs(
    shards: Sequence[Path], *, left_out: Collection[str] = ()
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the image bytes and known metadata cells of the rows of local Parquet shards, but of those left out."""
    names = [field.name for field in metadata.ARROW_FIELDS]
    unwanted = frozenset(left_out)
    for shard in shards:
        with pq.ParquetFile(shard) as parquet:
            for block in parquet.iter_batches(batch_size=ENCODE_BATCH, columns=["image", "image_id", *names]):
                for row in block.to_pylist():
                    if row["image_id"] in unwanted:
                        continue
                    cells = {name: row[name] for name in names if row[name] is not None}
                    yield row["image"], cells


def read_patients(shards: Sequence[Path]) -> Iterator[tuple[str, str | None]]:
    """Yields the image id and the patient, if known, of every row of local Parquet shards, for `holdout.choose`."""
    for shard in shards:
        table = pq.read_table(shard, columns=["image_id", "patient"])
        yield from zip(table["image_id"].to_pylist(), table["patient"].to_pylist(), strict=True)


def as_tensor(photographs: Sequence[Pixels]) -> Tensor:
    """Returns photographs of one size as RGB in [-1, 1], shape (B, 3, H, W)."""
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class Square:
    """A photograph as a square, with its caption and that of its mirror image, where a right eye is a left one."""

    pixels: Pixels
    caption: str
    mirrored_caption: str


def squares_of(photographs: Iterable[tuple[bytes, Mapping[str, Any]]], *, resolution_px: int) -> Iterator[Square]:
    """Decodes photographs, crops them to their field of view and resizes them; the unreadable ones are counted.

    Args:
        photographs: Encoded image and metadata cells of each.
        resolution_px: Side of the squares.

    Raises:
        ConfigError: If none is readable.
    """
    num_readable = num_unreadable = 0
    for encoded, cells in photographs:
        try:
            image = fundus.decode_photograph(encoded)
        except fundus.UnreadablePhotograph:
            num_unreadable += 1
            continue
        num_readable += 1
        mirrored = {**cells, "eye": _OTHER_EYE[cells["eye"]]} if cells.get("eye") in _OTHER_EYE else cells
        yield Square(
            pixels=fundus.to_square(image, fundus.find_field_of_view(image), resolution_px),
            caption=metadata.caption(cells),
            mirrored_caption=metadata.caption(mirrored),
        )
    if num_unreadable:
        log.warning("%d photograph(s) could not be read and are left out", num_unreadable)
    if not num_readable:
        raise ConfigError(f"found no readable photograph ({num_unreadable} unreadable); required at least one")


def encode_photographs(base: StableDiffusionPipeline, squares: Iterable[Square]) -> EncodedPhotographs:
    """Encodes photographs and their mirror images once, a few at a time.

    Raises:
        ConfigError: If their side does not fit the networks.
    """
    deepest = base.vae_scale_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    numbers: dict[str, int] = {}
    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    captions: tuple[list[int], list[int]] = ([], [])
    remaining = iter(squares)
    while block := list(itertools.islice(remaining, ENCODE_BATCH)):
        pixels_BCHW = as_tensor([each.pixels for each in block])
        if pixels_BCHW.shape[-1] % deepest:
            raise ConfigError(f"resolution_px={pixels_BCHW.shape[-1]} must be a multiple of {deepest} for this base")
        for view, views_BCHW in enumerate((pixels_BCHW, pixels_BCHW.flip(-1))):
            latents[view].append(autoencoding.encode_photographs(base.vae, views_BCHW))
        for each in block:
            for view, caption in enumerate((each.caption, each.mirrored_caption)):
                captions[view].append(numbers.setdefault(caption, len(numbers)))
    return EncodedPhotographs(
        latents=torch.stack([torch.cat(view) for view in latents]).clone(),
        caption_numbers=torch.tensor(captions),
        captions=tuple(numbers),
    )


@torch.inference_mode()
def encode_captions(base: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Returns the embeddings of captions and, last, of the empty caption, on the CPU."""
    ids_NL = pipeline.caption_ids(base.tokenizer, [*captions, ""])
    encoder = base.text_encoder
    blocks = [encoder(block.to(encoder.device)).last_hidden_state.cpu() for block in torch.split(ids_NL, CAPTION_BATCH)]
    return torch.cat(blocks).clone()


def latent_batches(
    photographs: EncodedPhotographs, *, batch_size: int, seed: int
) -> Callable[[int], Iterator[dict[str, Tensor]]]:
    """Returns a stream of batches that is a pure function of the position in the run.

    Every epoch is a permutation, each image is mirrored or not by a fair coin of its position; with several workers
    each takes every n-th image of a step.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    worker, num_workers = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed else (0, 1)
    )

    def stream(images_seen: int) -> Iterator[dict[str, Tensor]]:
        for first in itertools.count(images_seen, batch_size):
            position_B = torch.arange(first + worker, first + batch_size, num_workers)
            photograph_B, view_B = order_at(position_B, num_images=photographs.num_images, seed=seed)
            yield {
                "latents_BCHW": photographs.latents[view_B, photograph_B],
                "caption_B": photographs.caption_numbers[view_B, photograph_B],
                "position_B": position_B,
            }

    return stream


def order_at(position_B: Tensor, *, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns which photograph, and which view of it, stands at each position of a run."""
    photographs, views = [], []
    epoch_order: dict[int, npt.NDArray[np.int64]] = {}
    for position in position_B.tolist():
        epoch, index = divmod(position, num_images)
        if epoch not in epoch_order:
            epoch_order[epoch] = np.random.default_rng([seed, 1, epoch]).permutation(num_images)
        photographs.append(int(epoch_order[epoch][index]))
        views.append(int(np.random.default_rng([seed, 2, position]).integers(2)))
    return torch.tensor(photographs), torch.tensor(views)
