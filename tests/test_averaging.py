"""Averages of weights: by hand, through a whole run, and after a restart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gretfound import fit
from gretfound.averaging import Averaged, follow
from gretfound.checkpoints import LocalCheckpoints

BATCH_SIZE = 4


class Line(nn.Module):
    """Fits a line; its bias is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ self.weight + self.bias - y).square().mean()


def batches(start: int) -> Iterator[dict[str, Tensor]]:
    for first in range(start, 64, BATCH_SIZE):
        x = torch.randn(BATCH_SIZE, 3, generator=torch.Generator().manual_seed(first))
        yield {"x": x, "y": x @ torch.tensor([1.0, -2.0, 0.5]) + 1}


def run(decay: float, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    objective = Averaged(Line(), decay=decay, batch_size=BATCH_SIZE)
    summary = fit.train(objective, batches, num_images=64, batch_size=BATCH_SIZE, peak_lr=0.1, **settings)
    return summary.weights, objective.averaged(summary.weights)


def test_averaged__is_the_average_of_every_step() -> None:
    objective = Averaged(Line(), decay=0.4, batch_size=BATCH_SIZE)
    weights, expected = [], torch.zeros(3)
    for step in range(1, 9):
        objective.objective.weight.data.uniform_(generator=torch.Generator().manual_seed(step))
        objective.after_step(step * BATCH_SIZE)
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * objective.objective.weight.data
        weights.append(objective.objective.weight.data.clone())
    torch.testing.assert_close(objective.averages[0].data, expected)
    assert not torch.allclose(expected, weights[-1])


def test_averaged__takes_the_place_of_what_was_trained_only() -> None:
    weights, own = run(0.9)
    assert own.keys() == {"weight", "bias"}
    assert torch.equal(own["weight"], weights["averages.0"]) and torch.equal(own["bias"], torch.ones(1))
    assert not torch.equal(own["weight"], weights["objective.weight"])


def test_averaged__without_decay_is_the_last_weights() -> None:
    weights, own = run(0.0)
    assert torch.equal(own["weight"], weights["objective.weight"])


def test_averaged__goes_on_after_a_restart(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Dying(LocalCheckpoints):
        def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
            super().save(engine, images_seen=images_seen, losses=losses)
            raise Killed

    with pytest.raises(Killed):
        run(0.9, checkpoints=Dying(tmp_path), checkpoint_every_images=32)
    _, again = run(0.9, checkpoints=LocalCheckpoints(tmp_path), checkpoint_every_images=32)
    _, undisturbed = run(0.9)
    assert torch.equal(again["weight"], undisturbed["weight"])


def test_averaged__refuses_a_decay_of_one() -> None:
    with pytest.raises(ValueError, match="required 0 to below 1"):
        Averaged(Line(), decay=1.0, batch_size=1)


def test_follow__by_hand() -> None:
    average, weight = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 6.0]))
    follow([average], [weight], decay=0.75)
    torch.testing.assert_close(average.data, torch.tensor([1.5, 3.0]))
    with pytest.raises(ValueError, match="zip"):
        follow([average], [], decay=0.5)
