"""Drawing photographs: one iterator for synthesis, reports and metrics.

A photograph depends on the generator, its caption and its seed, and on nothing else: not on the batch that it is drawn
in. (Floating-point sums may differ in the last bit between batch sizes, at most a grey level or two in the picture.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor

from gretfound.generator import denoising, families

Pixels = npt.NDArray[np.uint8]
_SEED_STRIDE = 1_000_003  # the noise between few steps is not that of the first latents


def draw_photographs(
    *,
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    num_steps: int = 15,
    guidance_scale: float = 2.0,
    batch_size: int = 16,
) -> Iterator[Pixels]:
    """Draws one photograph for each caption and seed, in order.

    A few-step generator (`gretfound.generator.consistency`) is told by its scheduler: it jumps to the end and back to a
    smaller noise ``num_steps`` times. Of 50 steps of its teacher's path it visits some, so at most 50 can be asked for.

    The solver is DPM-Solver++(2M), for a flow Euler's.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2; classifier-free guidance (Ho and Salimans
    2022, eq. 6); few steps: Luo et al. 2023 (arXiv:2310.04378), algorithm 3.

    Args:
        pipeline: The generator; it is not changed.
        captions: What to draw.
        seeds: The seed of each one's first latents.
        num_steps: Steps of the solver.
        guidance_scale: Weight of the caption; 1 is no guidance and half the work. A few-step generator has learnt its
            own: for it, 1 is required.
        batch_size: Photographs drawn together.

    Yields:
        RGB photographs of shape (H, W, 3), uint8.

    Raises:
        ValueError: If there are not as many seeds as captions, or a few-step generator is given a guidance.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"found {len(captions)} captions and {len(seeds)} seeds; required one seed for each caption")
    is_few_step = isinstance(pipeline.scheduler, LCMScheduler)
    if is_few_step and guidance_scale != 1:
        raise ValueError(f"found guidance_scale={guidance_scale} for a few-step generator; required 1: it has its own")
    sampler = families.with_scheduler(pipeline, solver_of(pipeline.scheduler))
    for first in range(0, len(captions), batch_size):
        chunk = slice(first, first + batch_size)
        yield from _draw_batch(
            sampler, list(captions[chunk]), list(seeds[chunk]), num_steps=num_steps, guidance_scale=guidance_scale
        )


def solver_of(trained: Any) -> Any:
    """Returns the scheduler that draws with a generator whose training had this one."""
    if isinstance(trained, LCMScheduler) or denoising.is_flow(trained):
        return type(trained).from_config(trained.config)
    return DPMSolverMultistepScheduler.from_config(
        trained.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing", steps_offset=0
    )


@torch.inference_mode()
def _draw_batch(
    sampler: DiffusionPipeline, captions: list[str], seeds: list[int], *, num_steps: int, guidance_scale: float
) -> Iterator[Pixels]:
    text_BLD = families.embed(sampler, [*captions, ""])
    empty_BLD = text_BLD[-1:].expand(len(captions), -1, -1)
    drawn = sampler(
        **families.told_to_draw(sampler, text_BLD[:-1], empty_BLD),
        latents=first_latents(sampler, seeds),
        generator=[torch.Generator().manual_seed((seed * _SEED_STRIDE + 1) % 2**63) for seed in seeds],
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    return iter((np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8))


def first_latents(pipeline: DiffusionPipeline, seeds: Sequence[int]) -> Tensor:
    """Returns the noise that each seed starts from, drawn on the CPU so that every device draws the same picture."""
    denoiser = families.denoiser_of(pipeline)
    shape = (denoiser.config.in_channels, denoiser.config.sample_size, denoiser.config.sample_size)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(denoiser.device, denoiser.dtype)
