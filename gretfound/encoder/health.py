"""A run's health while it runs: whether the network still tells images apart, and in how many directions.

A falling loss does not show it: a network that says the same of every image predicts itself perfectly.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Legend of tensor suffixes: B images, D features.
MIN_INFORMATION_NATS = 0.01
MIN_RANK = 1.5


def rank_me(features_BD: Tensor) -> float:
    """Returns the effective rank of features: the exponential of the entropy of their normalised singular values.

    Source: RankMe (Garrido et al., ICML 2023), equation 1.

    Args:
        features_BD: Features of different images; neither B nor D can be exceeded by the result.

    Returns:
        Between 1 (every image on one line) and min(B, D).

    Raises:
        ValueError: If the features are not a matrix of finite numbers with at least one row.
    """
    if features_BD.ndim != 2 or not features_BD.numel() or not bool(torch.isfinite(features_BD).all()):
        raise ValueError(f"found features of shape {tuple(features_BD.shape)}; required finite ones of shape (B, D)")
    singular = torch.linalg.svdvals(features_BD.detach().double())
    if not bool(singular.sum() > 0):
        return 1.0
    return math.exp(float(torch.special.entr(singular / singular.sum()).sum()))


def collapse(
    figures: Mapping[str, Tensor | float], *, num_prototypes: int, embedding_rank: float | None = None
) -> str | None:
    """Says in plain words which collapse the figures show, or None.

    What an output tells of its image is the entropy of the mean distribution over prototypes less the mean entropy of
    each image's own (the mutual information): close to 0 every image gets the same answer. The entropy's distance from
    0 and from ``log(num_prototypes)``, the two ends that DINO's sharpening and centring hold apart (arXiv:2104.14294,
    section 5.3), names the kind. At the very start a network is uniform too: judge after the warm-up, over batches of
    at least eight images.

    Args:
        figures: `SelfDistillation.last_figures`, or means of them over steps.
        num_prototypes: Prototypes of the head.
        embedding_rank: `rank_me` of the teacher's embeddings of different images.
    """
    for name in ("student", "teacher"):
        entropy, usage = float(figures[f"{name}_entropy"]), float(figures[f"{name}_usage_entropy"])
        if usage - entropy >= MIN_INFORMATION_NATS:
            continue
        said = f"the {name} says the same of every image"
        found = f"entropy {entropy:.3g} of at most {math.log(num_prototypes):.3g} nats"
        if entropy < 0.1 * math.log(num_prototypes):
            return f"collapse to one prototype: {said} and is sure of it ({found}); centre harder or lower peak_lr"
        if entropy > 0.9 * math.log(num_prototypes):
            return f"collapse to uniform: {said} and prefers no prototype ({found}); sharpen or lower peak_lr"
        return f"collapse to a constant: {said} ({found}); lower peak_lr or raise the momentum"
    if embedding_rank is not None and embedding_rank < MIN_RANK:
        return (
            "collapse of dimensions: the embeddings of all images lie on one line (effective rank "
            f"{embedding_rank:.2f}); raise koleo_weight or lower peak_lr"
        )
    return None


class Monitor:
    """Watches the features that an objective leaves behind: their rank, a nearest-neighbour probe, signs of collapse.

    Nothing is computed for it but the figures themselves: it keeps the latest ``capacity`` features of training's own
    forward passes. They come from augmented crops, so its figures show a trend, not what an evaluation would find.

    Args:
        objective: With ``features`` (B, D) after each forward pass; ``last_figures`` and ``prototypes`` where it
            distils itself.
        capacity: Features kept.
        every_s: Least seconds between two computations.
        num_neighbours: Of the probe.
    """

    def __init__(
        self, objective: Any, *, capacity: int = 2048, every_s: float = 60.0, num_neighbours: int = 20
    ) -> None:
        self._objective, self._capacity, self._every_s = objective, capacity, every_s
        self._num_neighbours, self._told_at_s = num_neighbours, time.monotonic()
        self._kept: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        """Takes the features of the batch that the objective has just seen, with its labels and photographs' keys."""
        features = self._objective.features
        self._kept.append((features.float().cpu(), batch["label"].cpu(), batch["photograph_key"].cpu()))
        while sum(len(labels) for _, labels, _ in self._kept) > self._capacity + len(features):
            self._kept.popleft()

    def figures(self) -> dict[str, float | str]:
        """Returns what there is to tell; nothing before ``every_s`` has passed since the last time."""
        figures: dict[str, float | str] = {
            f"objective/{name}": float(value) for name, value in getattr(self._objective, "last_figures", {}).items()
        }
        if not self._kept or time.monotonic() - self._told_at_s < self._every_s:
            return figures
        self._told_at_s = time.monotonic()
        features_BD, label, photograph_key = (torch.cat(each) for each in zip(*self._kept, strict=True))
        figures["health/rank_me"] = rank = rank_me(features_BD)
        if (
            probe := referable_probe(features_BD, label, photograph_key, num_neighbours=self._num_neighbours)
        ) is not None:
            figures["health/knn_referable_dr_auroc"] = probe
        if last_figures := getattr(self._objective, "last_figures", None):
            diagnosis = collapse(last_figures, num_prototypes=self._objective.prototypes, embedding_rank=rank)
            if diagnosis:
                log.warning("%s", diagnosis)
                figures["health/collapse"] = diagnosis
        return figures


def referable_probe(
    features_BD: Tensor, label: Tensor, photograph_key: Tensor, *, num_neighbours: int = 20
) -> float | None:
    """Returns the AUROC of a nearest-neighbour probe for referable retinopathy (ICDR 2 and above), leaving one out.

    Source: the weighted k-NN probe of DINO (arXiv:2104.14294, section 4.1), temperature 0.07; with 20 neighbours.

    Args:
        features_BD: Features.
        label: ICDR grades (B,), -1 where unknown.
        photograph_key: Which draws are of the same photograph (B,): none of them is a neighbour of another.

    Returns:
        None where fewer than 50 are labelled or one class is absent.
    """
    from sklearn.metrics import roc_auc_score  # seconds to import, while a run's first step waits

    is_labelled = label >= 0
    positive = (label[is_labelled] >= 2).double()
    if len(positive) < 50 or positive.min() == positive.max():
        return None
    unit_BD = torch.nn.functional.normalize(features_BD[is_labelled].double() - features_BD.double().mean(0), dim=1)
    keys = photograph_key[is_labelled]
    similarity_BB = (unit_BD @ unit_BD.T).masked_fill(keys[:, None] == keys[None], -torch.inf)
    nearest, place = similarity_BB.topk(min(num_neighbours, len(positive) - 1), dim=1)
    weight = (nearest / 0.07).softmax(dim=1)
    score = (weight * positive[place]).sum(1)
    return float(roc_auc_score(positive, score))
