"""A trial: a few steps of fine-tuning and drawing with a base generator, timed, so that memory and hours are known.

It trains on drawn photographs, never on a site's, and keeps nothing. All photographs become squares of the base's own
size, so the rate is that of the site's; reading them once is not in it.
"""

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gretfound import fundus, phantom, shard
from gretfound.errors import ConfigError

NUM_TRAINED_STEPS = 6
NUM_DRAWN_STEPS = 2
DRAWN_PX = 256


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few steps took on this machine with one base.

    Args:
        device: ``cpu`` or ``cuda``.
        batch_size: Photographs a step.
        trained_per_s: Photographs trained on a second, the first step not counted; 0 where memory ran out.
        drawn_per_s: Photographs drawn a second, of as many denoising steps as were asked for; 0 where memory ran out.
        peak_bytes: The most memory held: of the GPU what torch reserved, else this process's resident memory.
        total_bytes: What the GPU, or the machine, has.
    """

    device: str
    batch_size: int
    trained_per_s: float
    drawn_per_s: float
    peak_bytes: int
    total_bytes: int

    @property
    def has_enough_memory(self) -> bool:
        """Whether the steps ended."""
        return self.trained_per_s > 0

    def duration_s(self, *, images_seen: int, num_drawn: int = 0) -> float:
        """Returns the seconds that a contribution takes.

        Args:
            images_seen: Photographs that the training looks at, repeats counted.
            num_drawn: Photographs that it draws afterwards.

        Raises:
            ValueError: If memory ran out, so that nothing was measured.
        """
        if not self.has_enough_memory:
            raise ValueError("found a trial that ran out of memory; required one that ended")
        return images_seen / self.trained_per_s + (num_drawn / self.drawn_per_s if num_drawn else 0.0)


def run(base_path: Path, *, device: str, batch_size: int, lora_rank: int, num_steps: int) -> Trial:
    """Fine-tunes a base and draws with it, as `contribute` does with the same arguments, for a few steps.

    Args:
        base_path: A trusted diffusers folder.
        device: ``cpu`` or ``cuda``.
        batch_size: Photographs a step.
        lora_rank: Rank of the factors that are trained.
        num_steps: Denoising steps of a drawn photograph; a few are timed.

    Raises:
        ConfigError: If there is no such device, or the base does not fit the arguments.
        StorageError: If it is no generator.
    """
    import torch

    from gretfound.generator import finetune, pipeline, sampling

    if device == "cuda":
        if not torch.cuda.is_available():
            build = f"torch {torch.__version__} for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
            raise ConfigError(
                f"found no GPU that this torch ({build}) can use; required one with a driver that is new enough "
                "(docs/container.md, section 3; nvidia-smi shows it), or --device cpu"
            )
        torch.cuda.reset_peak_memory_stats()
    rates = [0.0]
    drawn_per_s = 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            shard.write_shard_file(Path(folder, "part.parquet"), map(_row, range(batch_size)))
            adapter_path = finetune.finetune_locally(
                base_path=base_path,
                shard_path=Path(folder, "part.parquet"),
                work_path=Path(folder, "work"),
                num_images_seen=NUM_TRAINED_STEPS * batch_size,
                batch_size=batch_size,
                learning_rate=1e-5,
                lora_rank=lora_rank,
                device=device,
                on_progress=lambda progress: rates.append(progress.images_per_s),
            )
            draw = partial(
                sampling.draw_photographs,
                pipeline=pipeline.load_pipeline(base_path, adapter_path=adapter_path, device=device),
                num_steps=NUM_DRAWN_STEPS,
                guidance_scale=3.0,
                batch_size=batch_size,
            )
            for seeds in ([0], list(range(batch_size))):  # the first draw warms up
                began_s = time.monotonic()
                num_drawn = len(list(draw(captions=[""] * len(seeds), seeds=seeds)))
                duration_s = time.monotonic() - began_s
            drawn_per_s = num_drawn / duration_s * NUM_DRAWN_STEPS / num_steps
    except torch.OutOfMemoryError:
        rates, drawn_per_s = [0.0], 0.0
    if device == "cuda":
        peak_bytes, total_bytes = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Trial(
        device=device,
        batch_size=batch_size,
        trained_per_s=rates[-1],
        drawn_per_s=drawn_per_s,
        peak_bytes=peak_bytes,
        total_bytes=total_bytes,
    )


def _row(seed: int) -> dict[str, object]:
    eye = phantom.draw_eye(phantom.SITES["public"], seed=seed, size_px=DRAWN_PX)
    return shard.row_of(fundus.encode_png(eye.image), site_id="trial", origin="real", cells={})
