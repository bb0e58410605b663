"""Few-step generators: a student learns to jump to the end of its teacher's guided path in one step.

The student of a fine-tuned generator is that generator with new low-rank factors (or all of its denoiser) trained by
`ConsistencyObjective`; diffusers' `LCMScheduler` then draws with it in 2 to 8 steps. The teacher's weight of the
caption is part of what it learns, so that a step needs one pass of the denoiser, not two.

Shapes: B images, C latent channels, H and W latent rows and columns, L tokens, D text width.
"""

import copy
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn

from gretfound.generator import families
from gretfound.generator.denoising import draw_noise

NUM_SOLVER_STEPS = 50  # of the teacher's path; `LCMScheduler` visits some of these
SIGMA_DATA, TIME_SCALING = 0.5, 10.0  # as `LCMScheduler` has them
HUBER_WIDTH = 1e-3


class ConsistencyObjective(nn.Module):
    """The distance between where the student lands from one point of a path and from the next one.

    Both points lie on a path of the teacher under guidance; the second is one step of DDIM after the first. The student
    lands from the second without gradient.

    Source: Luo et al. 2023, latent consistency models (arXiv:2310.04378), algorithm 1 and equations 10 to 13, with one
    weight of the caption; low-rank students: Luo et al. 2023, LCM-LoRA (arXiv:2311.05556). The target is the student
    itself, as in the latter; the loss is the pseudo-Huber distance of diffusers' `train_lcm_distill_lora_sd`.

    Args:
        denoiser: The student, with the teacher's weights. Make the teacher's copy before factors are added.
        teacher: What is distilled; never trained, and no part of this module's state.
        scheduler: Of the teacher: `alphas_cumprod`, and ``epsilon`` or ``v_prediction``.
        empty_LD: The empty caption's embedding.
        guidance_scale: The teacher's weight of the caption, 1 or more.
        seed: Seeds times and noise.

    Raises:
        ValueError: If the scheduler has fewer times than the path has steps, or the weight is below 1.
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        teacher: nn.Module,
        scheduler: Any,
        empty_LD: Tensor,
        guidance_scale: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if guidance_scale < 1:
            raise ValueError(f"found guidance_scale={guidance_scale}; required 1 (none) or more")
        if len(scheduler.alphas_cumprod) < NUM_SOLVER_STEPS:
            raise ValueError(f"found {len(scheduler.alphas_cumprod)} times; required {NUM_SOLVER_STEPS} or more")
        self.denoiser, self._guidance_scale, self._seed = denoiser, guidance_scale, seed
        self._teacher = (teacher,)  # in a tuple, so that nobody trains, shards or saves it
        self._is_velocity = str(scheduler.config.prediction_type) == "v_prediction"
        self.alphas_T: Tensor
        self.empty_LD: Tensor
        self.register_buffer("alphas_T", scheduler.alphas_cumprod.clone().float(), persistent=False)
        self.register_buffer("empty_LD", empty_LD, persistent=False)

    def forward(self, latents_BCHW: Tensor, caption: Tensor, position_B: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            latents_BCHW: Scaled clean latents.
            caption: Embeddings of captions (B, L, D).
            position_B: Each image's position in the run, from 0.
        """
        share_B, _, noise_BCHW = draw_noise(self._seed, position_B, latents_BCHW.shape[1:])
        stride = len(self.alphas_T) // NUM_SOLVER_STEPS
        step_B = (share_B * NUM_SOLVER_STEPS).long().clamp(max=NUM_SOLVER_STEPS - 1).to(latents_BCHW.device)
        start_B = (step_B + 1) * stride - 1
        end_B = (start_B - stride).clamp(min=0)
        alpha_B111 = self._alpha(start_B)
        start_BCHW = alpha_B111.sqrt() * latents_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW.to(latents_BCHW)
        with torch.no_grad():
            end_BCHW = self._step_of_teacher(start_BCHW, start_B, end_B, caption)
            target_BCHW = self._land(end_BCHW, end_B, caption)
        error_BCHW = self._land(start_BCHW, start_B, caption) - target_BCHW
        loss: Tensor = ((error_BCHW.square() + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH).mean()
        return loss

    def _alpha(self, time_B: Tensor) -> Tensor:
        return self.alphas_T[time_B].view(-1, 1, 1, 1)

    def _clean_and_noise(self, predicted_BCHW: Tensor, noised_BCHW: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the clean latents and the noise that a prediction stands for."""
        signal, noise = self._alpha(time_B).sqrt(), (1 - self._alpha(time_B)).sqrt()
        if self._is_velocity:
            return signal * noised_BCHW - noise * predicted_BCHW, signal * predicted_BCHW + noise * noised_BCHW
        return (noised_BCHW - noise * predicted_BCHW) / signal, predicted_BCHW

    def _step_of_teacher(self, start_BCHW: Tensor, start_B: Tensor, end_B: Tensor, caption: Tensor) -> Tensor:
        teacher = self._teacher[0]
        guided_BCHW = families.predict(teacher, start_BCHW, start_B, caption).float()
        if self._guidance_scale > 1:
            empty_BLD = self.empty_LD.to(caption).expand_as(caption)
            free_BCHW = families.predict(teacher, start_BCHW, start_B, empty_BLD).float()
            guided_BCHW = free_BCHW + self._guidance_scale * (guided_BCHW - free_BCHW)
        clean_BCHW, noise_BCHW = self._clean_and_noise(guided_BCHW, start_BCHW, start_B)
        return self._alpha(end_B).sqrt() * clean_BCHW + (1 - self._alpha(end_B)).sqrt() * noise_BCHW

    def _land(self, noised_BCHW: Tensor, time_B: Tensor, caption: Tensor) -> Tensor:
        """Returns where the student lands; at time 0 that is where it is (equation 9)."""
        predicted_BCHW = families.predict(self.denoiser, noised_BCHW, time_B, caption).float()
        clean_BCHW, _ = self._clean_and_noise(predicted_BCHW, noised_BCHW, time_B)
        time_B111 = TIME_SCALING * time_B.view(-1, 1, 1, 1).float()
        kept_B111 = SIGMA_DATA**2 / (time_B111**2 + SIGMA_DATA**2)
        landed_B111 = time_B111 / (time_B111**2 + SIGMA_DATA**2).sqrt()
        return kept_B111 * noised_BCHW + landed_B111 * clean_BCHW


def frozen_copy(denoiser: nn.Module) -> nn.Module:
    """Returns a copy of a denoiser that is never trained: the teacher."""
    return copy.deepcopy(denoiser).requires_grad_(False).eval()


def few_step_scheduler(teacher: Any) -> LCMScheduler:
    """Returns the scheduler that draws with a student of a generator with this scheduler.

    It is made anew: diffusers' ``from_config`` takes `LCMScheduler`'s own default in the place of every value that is a
    default of the teacher's, which is another noise.
    """
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return LCMScheduler(
        **{name: teacher.config[name] for name in kept},
        original_inference_steps=NUM_SOLVER_STEPS,
        timestep_scaling=TIME_SCALING,
        clip_sample=False,
    )
