"""Signs of collapse in self-distillation: whether the network still tells images apart, and in how many directions.

A falling loss does not show it: a network that says the same of every image predicts itself perfectly.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

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
