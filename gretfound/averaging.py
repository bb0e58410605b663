"""Weights that follow others as an exponential moving average, also where DeepSpeed has cut them into parts."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_OBJECTIVE_PREFIX = "objective."
_AVERAGES_PREFIX = "averages."


@torch.no_grad()
def follow(averages: Iterable[nn.Parameter], weights: Iterable[nn.Parameter], *, decay: float) -> None:
    """Moves averages towards weights, in place: ``average = decay * average + (1 - decay) * weight``.

    Under ZeRO stage 3 each worker moves its own partition; those of an average and its weight are cut alike. Averages
    should be float32: with a decay near 1 the step is smaller than bfloat16 can add.

    Args:
        averages: Parameters that no optimizer owns.
        weights: Those that they follow, in the same order and of the same shapes.
        decay: What is kept of an average, 0 to 1.
    """
    for average, weight in zip(averages, weights, strict=True):
        is_partitioned = hasattr(average, "ds_tensor")
        target, value = ((cast(Any, each).ds_tensor if is_partitioned else each).data for each in (average, weight))
        target.lerp_(value, 1 - decay)
        if is_partitioned and cast(Any, average).ds_status.name == "AVAILABLE":
            # DeepSpeed 0.19 keeps small parameters gathered between steps; this copy is now out of date.
            cast(Any, average).partition()


class Averaged(nn.Module):
    """An objective, and the exponential moving average of the weights that it trains.

    The average is what samples should be drawn with: a diffusion model's last weights still carry the noise of their
    last steps. At first it follows faster, since there is little to average. Of what `gretfound.fit` lets an objective
    have, only ``forward`` is passed on.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; the warm-up ``(1 + n) / (10 + n)`` after n steps is that of
    diffusers' `EMAModel` and TensorFlow's `ExponentialMovingAverage`.

    Args:
        objective: What is trained.
        decay: The average's after the warm-up, per step.
        batch_size: Images a step, over all workers.

    Raises:
        ValueError: If the decay is not within 0 to 1.
    """

    def __init__(self, objective: nn.Module, *, decay: float, batch_size: int) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"found decay={decay}; required 0 to below 1")
        self.objective, self._decay, self._batch_size = objective, decay, batch_size
        self.averages = nn.ParameterList(
            nn.Parameter(weight.detach().clone(), requires_grad=False) for _, weight in self._trained()
        )

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.objective.named_parameters() if weight.requires_grad]

    def forward(self, **batch: Tensor) -> Tensor:
        """Returns the objective's loss."""
        loss: Tensor = self.objective(**batch)
        return loss

    def after_step(self, images_seen: int) -> None:
        """Moves the average towards the weights, after each optimizer step, on every worker."""
        num_steps = images_seen // self._batch_size
        decay = min(self._decay, (1 + num_steps) / (10 + num_steps))
        follow(self.averages, [weight for _, weight in self._trained()], decay=decay)

    def averaged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the objective's own weights by name, the averages in the place of what was trained.

        Args:
            weights: Those of a finished run, `fit.TrainingSummary.weights`; empty ones stay empty.
        """
        own = {
            name.removeprefix(_OBJECTIVE_PREFIX): weight
            for name, weight in weights.items()
            if name.startswith(_OBJECTIVE_PREFIX)
        }
        if own:
            own |= {name: weights[f"{_AVERAGES_PREFIX}{place}"] for place, (name, _) in enumerate(self._trained())}
        return own
