"""Self-distillation: a student network predicts what its own moving average, the teacher, says of other crops.

Image-level self-distillation on class tokens (DINO), the same on masked patch tokens (iBOT), a regulariser that spreads
the features (KoLeo), and Sinkhorn-Knopp centring of the teacher's targets. Drawing the crops is not done here.

Source: DINOv2 (Oquab et al., arXiv:2304.07193, section 4 and its `ssl_default_config`); DINO (Caron et al.,
arXiv:2104.14294); iBOT (Zhou et al., arXiv:2111.07832); KoLeo (Sablayrolles et al., ICLR 2019); Sinkhorn-Knopp as in
SwAV (Caron et al., arXiv:2006.09882).

Shapes: B images, N local crops an image, G = 2B global crops (all first crops, then all second ones), C channels,
H and W pixels, L patches, T tokens (class and register tokens, then patches), M masked patches, D encoder width,
K prototypes, R rows of any kind.
"""

import copy
import math
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gretfound import averaging
from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD

ENCODER_PREFIX = "teacher.encoder."
NUM_GLOBAL_CROPS = 2
STUDENT_TEMPERATURE = 0.1
KOLEO_EPSILON = 1e-8
MIN_BLOCK_PATCHES = 4
MAX_BLOCK_ASPECT = 1 / 0.3
BLOCK_ATTEMPTS = 10


class SelfDistillation(nn.Module):
    """The objective of DINOv2 on a timm vision transformer with a class token.

    `encoder` is the teacher's backbone: an average over the weights of many steps, which gives better features than the
    student at every point of training (DINO, section 5.1) and is what DINOv2 and RETFound-DINOv2 release. Its weights
    are named ``teacher.encoder...`` (`ENCODER_PREFIX`); the optimizer never sees them, `after_step` moves them. The
    student and the teacher start equal, from the weights that ``encoder`` has now: import pretrained ones before.

    Args:
        encoder: A timm vision transformer; it becomes the student's backbone, a copy becomes the teacher's.
        num_images: Images of the whole run, over which the teacher's momentum rises.
        prototypes: Prototypes of each head, K.
        hidden: Width of the heads' hidden layers.
        bottleneck: Width in which features meet the prototypes.
        shared_head: Whether patch tokens share the class token's head; DINOv2's larger recipes separate them.
        momentum: The teacher's at the first image.
        final_momentum: The teacher's at the last image.
        teacher_temperature: At the first image.
        final_teacher_temperature: After the warm-up.
        teacher_temperature_warmup_images: Length of that linear warm-up; 30 epochs of 1,250 steps of 1,024 images.
        sinkhorn_iterations: Rounds of centring; 0 leaves the teacher uncentred, which invites collapse.
        frozen_images: Images before the prototypes begin to learn; one epoch of 1,250 steps of 1,024 images. Until then
            their gradient is 0, not absent, so that AdamW's second moment is small in their first steps.
        class_weight: Weight of the loss on class tokens.
        patch_weight: Weight of the loss on masked patches.
        koleo_weight: Weight of the spreading regulariser, summed over the two global crops.
        mask_probability: Chance of each global crop to be masked.
        min_mask_ratio: Smallest share of patches hidden in a masked crop.
        max_mask_ratio: Largest share of patches hidden in a masked crop.
        layer_decay: Factor of the learning rate from each block to the one before it.
        patch_embed_lr_scale: Further factor of the learning rate of the patch embedding.
        mask_seed: With an image's position in the run it decides that image's masks, whatever the batch or the worker.

    Attributes:
        last_figures: Detached scalars of the latest forward pass, for health charts. ``dino_global``, ``dino_local``,
            ``ibot`` and ``koleo`` are mean losses without weights; ``target_entropy`` is that of the centred targets;
            ``teacher_entropy`` and ``student_entropy`` are the mean entropies, in nats, of an image's distribution over
            prototypes without centring, ``teacher_usage_entropy`` and ``student_usage_entropy`` the entropy of the mean
            distribution. Over this worker's images only.
        features: The teacher's class tokens of the latest first global crops, for `health.rank_me`.

    Raises:
        ValueError: If the encoder has no class token, position embedding or final norm, or a setting is out of range.
    """

    images_seen: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Any,
        *,
        num_images: int,
        prototypes: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        shared_head: bool = True,
        momentum: float = 0.992,
        final_momentum: float = 1.0,
        teacher_temperature: float = 0.04,
        final_teacher_temperature: float = 0.07,
        teacher_temperature_warmup_images: int = 38_400_000,
        sinkhorn_iterations: int = 3,
        frozen_images: int = 1_280_000,
        class_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        mask_probability: float = 0.5,
        min_mask_ratio: float = 0.1,
        max_mask_ratio: float = 0.5,
        layer_decay: float = 0.9,
        patch_embed_lr_scale: float = 0.2,
        mask_seed: int = 0,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        if not 0 <= min_mask_ratio <= max_mask_ratio < 1:
            raise ValueError(
                f"found min_mask_ratio={min_mask_ratio} and max_mask_ratio={max_mask_ratio}; "
                "required 0 <= min <= max < 1"
            )
        if num_images < 1 or min(teacher_temperature, final_teacher_temperature) <= 0:
            raise ValueError(
                f"found num_images={num_images} and teacher temperatures {teacher_temperature} and "
                f"{final_teacher_temperature}; required positive ones"
            )
        self.num_images, self.prototypes = num_images, prototypes
        self.momentum, self.final_momentum = momentum, final_momentum
        self.teacher_temperature, self.final_teacher_temperature = teacher_temperature, final_teacher_temperature
        self.teacher_temperature_warmup_images = teacher_temperature_warmup_images
        self.sinkhorn_iterations, self.frozen_images = sinkhorn_iterations, frozen_images
        self.class_weight, self.patch_weight, self.koleo_weight = class_weight, patch_weight, koleo_weight
        self.mask_probability, self.mask_seed = mask_probability, mask_seed
        self.min_mask_ratio, self.max_mask_ratio = min_mask_ratio, max_mask_ratio
        self.layer_decay, self.patch_embed_lr_scale = layer_decay, patch_embed_lr_scale
        width = int(encoder.embed_dim)
        sizes = {"hidden": hidden, "bottleneck": bottleneck, "prototypes": prototypes}
        self.student = Branch(
            encoder, class_head=Head(width, **sizes), patch_head=None if shared_head else Head(width, **sizes)
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.last_figures: dict[str, Tensor] = {}
        self.features: Tensor | None = None

    @property
    def encoder(self) -> Any:
        """The teacher's backbone, a timm vision transformer: what is evaluated and released."""
        return self.teacher.encoder

    def train(self, mode: bool = True) -> "SelfDistillation":
        """Sets the student's mode; the teacher stays in evaluation mode, so that it drops no path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, global_crop: Tensor, local_crop: Tensor, position: Tensor) -> Tensor:
        """Returns the weighted sum of the losses, a mean over this worker's images.

        Sinkhorn-Knopp sees the images of all workers, KoLeo those of this one, as in the reference.

        Args:
            global_crop: uint8 (B, 2, 3, H, W), or float already normalised.
            local_crop: uint8 (B, N, 3, h, w), or float already normalised; N may be 0.
            position: int64 (B,), each image's place in the run's order.
        """
        images_seen = int(self.images_seen)
        temperature = self.teacher_temperature_at(images_seen)
        num_images, num_locals = local_crop.shape[:2]
        global_GCHW = self._normalised(global_crop.transpose(0, 1).flatten(0, 1))
        grid = tuple(side // self.student.patch_size for side in global_crop.shape[-2:])
        mask_BGL = self.masks(position, grid_size=cast(tuple[int, int], grid))
        mask_GL = mask_BGL.transpose(0, 1).flatten(0, 1)
        masked_M = mask_GL.flatten().nonzero().flatten().to(global_GCHW.device)
        weight_M = (1 / mask_GL.sum(1).clamp(min=1))[:, None].expand_as(mask_GL)[mask_GL].to(global_GCHW.device)

        with torch.no_grad():
            teacher_GTD = self.teacher(global_GCHW)
            teacher_GK, teacher_MK = self.teacher.scored(teacher_GTD[:, 0], self.teacher.patches(teacher_GTD, masked_M))
            target_GK = sinkhorn_knopp(teacher_GK, temperature=temperature, iterations=self.sinkhorn_iterations)
            target_MK = sinkhorn_knopp(teacher_MK, temperature=temperature, iterations=self.sinkhorn_iterations)

        student_GTD = self.student(global_GCHW, mask_GL.to(global_GCHW.device), self.mask_token)
        class_RD = student_GTD[:, 0]
        if num_locals:
            local_RCHW = self._normalised(local_crop.transpose(0, 1).flatten(0, 1))
            class_RD = torch.cat([class_RD, self.student(local_RCHW)[:, 0]])
        student_RK, student_MK = self.student.scored(
            class_RD, self.student.patches(student_GTD, masked_M), is_frozen=images_seen < self.frozen_images
        )

        # Of the reference's 2 + 2N pairs of a student's and a teacher's crop each counts the same.
        num_globals = NUM_GLOBAL_CROPS * num_images
        other_GK = target_GK.roll(num_images, 0)
        dino_global = cross_entropy(student_RK[:num_globals], other_GK).mean()
        dino_local = torch.zeros_like(dino_global)
        if num_locals:
            both_BK = target_GK.view(NUM_GLOBAL_CROPS, num_images, -1).mean(0)
            dino_local = cross_entropy(student_RK[num_globals:], both_BK.repeat(num_locals, 1)).mean()
        dino = (dino_global + num_locals * dino_local) / (1 + num_locals)
        # Each masked crop's patches are averaged first; an unmasked crop counts as nought (iBOT, equation 2).
        ibot = (cross_entropy(student_MK, target_MK) * weight_M).sum() / num_globals
        with torch.autocast(global_GCHW.device.type, enabled=False):
            koleo = torch.stack([koleo_loss(each_BD) for each_BD in student_GTD[:, 0].split(num_images)]).sum()

        with torch.no_grad():
            self.features = teacher_GTD[:num_images, 0].detach()
            self.last_figures = {
                "dino_global": dino_global.detach(),
                "dino_local": dino_local.detach(),
                "ibot": ibot.detach(),
                "koleo": koleo.detach() / NUM_GLOBAL_CROPS,
                "target_entropy": _entropy(target_GK).mean(),
                **_entropies("teacher", teacher_GK, temperature),
                **_entropies("student", student_RK[:num_globals], STUDENT_TEMPERATURE),
            }
        return self.class_weight * dino + self.patch_weight * ibot + self.koleo_weight * koleo

    def after_step(self, images_seen: int) -> None:
        """Moves the teacher towards the student, after each optimizer step, on every worker.

        Args:
            images_seen: Images of the run so far, over all workers, this step's included.
        """
        self.images_seen.fill_(images_seen)
        students = dict(self.student.named_parameters())
        names, teachers = zip(*self.teacher.named_parameters(), strict=True)
        averaging.follow(teachers, [students[name] for name in names], decay=self.momentum_at(images_seen))

    def momentum_at(self, images_seen: int) -> float:
        """Returns the teacher's momentum: a half cosine from ``momentum`` to ``final_momentum``."""
        progress = min(1.0, images_seen / self.num_images)
        return self.final_momentum - (self.final_momentum - self.momentum) * 0.5 * (1 + math.cos(math.pi * progress))

    def teacher_temperature_at(self, images_seen: int) -> float:
        """Returns the temperature of the teacher's targets: a linear warm-up, then constant."""
        if images_seen >= self.teacher_temperature_warmup_images:
            return self.final_teacher_temperature
        share = images_seen / self.teacher_temperature_warmup_images
        return self.teacher_temperature + (self.final_teacher_temperature - self.teacher_temperature) * share

    def learning_rate_scale(self, name: str) -> float:
        """Returns the factor on a parameter's learning rate: less for earlier blocks, least for the patch embedding.

        Source: DINOv2, `dinov2/utils/param_groups.py`: ``layer_decay ** (depth - block)`` for blocks counted from 0,
        one more power for what comes before them, 1 for the final norm and the heads.

        Args:
            name: As in ``named_parameters()`` of this objective.
        """
        depth = len(self.student.encoder.blocks)
        part = name.removeprefix("student.encoder.")
        if part.startswith("blocks."):
            return float(self.layer_decay ** (depth - int(part.split(".")[1])))
        if part.startswith("patch_embed."):
            return float(self.layer_decay ** (depth + 1) * self.patch_embed_lr_scale)
        if part in ("cls_token", "pos_embed", "reg_token", "mask_token"):
            return float(self.layer_decay ** (depth + 1))
        return 1.0

    def masks(self, position: Tensor, *, grid_size: tuple[int, int]) -> Tensor:
        """Draws which patches of the global crops the student must guess, from the seed and the positions alone.

        The reference masks exactly half of a batch's crops, at ratios spread evenly over the batch. Here each crop is
        masked with that chance at a ratio drawn uniformly, which has the same expectation and needs no batch.

        Returns:
            Boolean masks of shape (B, 2, L) on the CPU.
        """
        masks = np.zeros((len(position), NUM_GLOBAL_CROPS, *grid_size), dtype=bool)
        for image, place in enumerate(position.tolist()):
            rng = np.random.default_rng([self.mask_seed, int(place)])
            for crop in range(NUM_GLOBAL_CROPS):
                is_masked = rng.random() < self.mask_probability
                ratio = rng.uniform(self.min_mask_ratio, self.max_mask_ratio)
                if is_masked:
                    masks[image, crop] = block_mask(grid_size, int(ratio * math.prod(grid_size)), rng=rng)
        return torch.from_numpy(masks).flatten(2)

    def _normalised(self, crop: Tensor) -> Tensor:
        if crop.dtype != torch.uint8:
            return crop
        value: Tensor = (crop.float() / 255 - self.mean) / self.std
        return value.to(self.student.encoder.patch_embed.proj.weight.dtype)


class Branch(nn.Module):
    """A backbone with its heads: the student or the teacher.

    Args:
        encoder: The backbone.
        class_head: For class tokens.
        patch_head: For patch tokens; None sends them through ``class_head``.
    """

    def __init__(self, encoder: Any, *, class_head: "Head", patch_head: "Head | None") -> None:
        super().__init__()
        self.encoder = encoder
        self.class_head = class_head
        self.patch_head = patch_head
        self.patch_size = int(encoder.patch_embed.patch_size[0])

    def forward(self, crop: Tensor, mask_RL: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Encodes crops of one size, of any number of whole patches.

        Args:
            crop: Normalised (R, 3, H, W).
            mask_RL: Where the mask token replaces a patch's embedding.
            mask_token: (1, 1, D).

        Returns:
            Normalised tokens (R, T, D): class token, register tokens, patches.
        """
        encoder = self.encoder
        patch_RDHW = encoder.patch_embed.proj(crop)
        token_RTD = encoder.patch_embed.norm(patch_RDHW.flatten(2).transpose(1, 2))
        if mask_RL is not None and mask_token is not None:
            token_RTD = torch.where(mask_RL[..., None], mask_token.to(token_RTD.dtype), token_RTD)
        prefix = [encoder.cls_token] + ([] if encoder.reg_token is None else [encoder.reg_token])
        prefix_RTD = torch.cat(prefix, dim=1).expand(len(crop), -1, -1).to(token_RTD.dtype)
        position_1TD = resample_abs_pos_embed(
            encoder.pos_embed,
            new_size=list(patch_RDHW.shape[-2:]),
            old_size=list(encoder.patch_embed.grid_size),
            num_prefix_tokens=0 if encoder.no_embed_class else encoder.num_prefix_tokens,
        )
        if encoder.no_embed_class:
            token_RTD = torch.cat([prefix_RTD, token_RTD + position_1TD], dim=1)
        else:
            token_RTD = torch.cat([prefix_RTD, token_RTD], dim=1) + position_1TD
        token_RTD = encoder.norm_pre(encoder.pos_drop(token_RTD))
        for block in encoder.blocks:
            token_RTD = block(token_RTD)
        encoded: Tensor = encoder.norm(token_RTD)
        return encoded

    def patches(self, token_RTD: Tensor, index_M: Tensor) -> Tensor:
        """Picks patch tokens by their index among all patches of all crops, (M, D)."""
        return token_RTD[:, int(self.encoder.num_prefix_tokens) :].flatten(0, 1).index_select(0, index_M)

    def scored(self, class_RD: Tensor, patch_MD: Tensor, *, is_frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Compares tokens with the prototypes; a shared head is called once."""
        if self.patch_head is not None:
            return self.class_head(class_RD, is_frozen), self.patch_head(patch_MD, is_frozen)
        score_RK: Tensor = self.class_head(torch.cat([class_RD, patch_MD]), is_frozen)
        return score_RK[: len(class_RD)], score_RK[len(class_RD) :]


class Head(nn.Module):
    """A projection to the unit sphere and its cosine with each prototype.

    Source: DINO, appendix C: three layers with GELU, a bottleneck normalised to length 1, weight-normalised prototypes
    of fixed length 1.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.project:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, token_RD: Tensor, is_frozen: bool = False) -> Tensor:
        """Returns cosines (R, K); ``is_frozen`` keeps the gradient from the prototypes."""
        prototype: Tensor = self.prototypes
        if is_frozen:
            # A gradient of nought rather than none: ZeRO reduces every parameter of every worker.
            prototype = prototype.detach() + 0 * prototype
        return F.linear(F.normalize(self.project(token_RD), dim=-1), F.normalize(prototype, dim=-1))


@torch.no_grad()
def sinkhorn_knopp(score_RK: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """Turns the teacher's scores into targets that use every prototype equally, over the images of all workers.

    Every worker takes part, also one without rows.

    Source: SwAV, section 3.1 and appendix A.1; DINOv2, section 4.

    Args:
        score_RK: Cosines of this worker's rows.
        temperature: Sharpness of the softmax.
        iterations: Alternations between equal prototypes and rows that sum to 1; with 0 this is a plain softmax.

    Returns:
        Targets (R, K) in at least float32; each row sums to 1.
    """
    logit_RK = score_RK.to(torch.promote_types(score_RK.dtype, torch.float32)) / temperature
    if iterations == 0:
        return logit_RK.softmax(-1)
    # One shift for all rows keeps the exponential in range and cancels in the first normalisation.
    largest = logit_RK.max() if logit_RK.numel() else logit_RK.new_full((), -torch.inf)
    if _is_distributed():
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    target_RK = (logit_RK - largest).exp()
    num_rows = _summed_over_workers(target_RK.new_tensor(float(len(target_RK))))
    target_RK = target_RK / _summed_over_workers(target_RK.sum())
    for _ in range(iterations):
        target_RK = target_RK / _summed_over_workers(target_RK.sum(0, keepdim=True)) / target_RK.shape[1]
        target_RK = target_RK / target_RK.sum(1, keepdim=True) / num_rows
    return target_RK * num_rows


def cross_entropy(score_RK: Tensor, target_RK: Tensor) -> Tensor:
    """Returns -sum(target * log softmax(score / 0.1)) of each row, (R,), for targets whose rows sum to 1."""
    logit_RK = score_RK.float() / STUDENT_TEMPERATURE
    return logit_RK.logsumexp(-1) - (target_RK * logit_RK).sum(-1)


def koleo_loss(feature_BD: Tensor) -> Tensor:
    """Returns minus the mean logarithm of the distance to the nearest neighbour on the unit sphere; 0 for one image.

    Source: Sablayrolles et al., ICLR 2019, equation 2; the small constants are DINOv2's.
    """
    if len(feature_BD) < 2:
        return feature_BD.float().sum() * 0
    unit_BD = F.normalize(feature_BD.float(), eps=KOLEO_EPSILON, dim=-1)
    with torch.no_grad():
        cosine_BB = unit_BD @ unit_BD.T
        nearest_B = cosine_BB.fill_diagonal_(-2).argmax(1)
    distance_B = F.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=KOLEO_EPSILON)
    return -(distance_B + KOLEO_EPSILON).log().mean()


def block_mask(grid_size: tuple[int, int], num_masked: int, *, rng: np.random.Generator) -> np.ndarray:
    """Hides about ``num_masked`` patches in rectangles, never more.

    Source: BEiT (Bao et al., arXiv:2106.08254, algorithm 1) as DINOv2's `MaskingGenerator` draws it.

    Returns:
        A boolean mask of shape ``grid_size``.
    """
    height, width = grid_size
    mask = np.zeros(grid_size, dtype=bool)
    log_aspect = math.log(MAX_BLOCK_ASPECT)
    while (num_left := num_masked - int(mask.sum())) > 0:
        for _ in range(BLOCK_ATTEMPTS):
            largest = min(num_left, height * width // 2)
            area = MIN_BLOCK_PATCHES + (largest - MIN_BLOCK_PATCHES) * rng.random()
            aspect = math.exp(rng.uniform(-log_aspect, log_aspect))
            block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if block_height >= height or block_width >= width:
                continue
            top = int(rng.integers(0, height - block_height + 1))
            left = int(rng.integers(0, width - block_width + 1))
            block = mask[top : top + block_height, left : left + block_width]
            if 0 < block.size - int(block.sum()) <= num_left:
                block[:] = True
                break
        else:
            break
    return mask


def _check_encoder(encoder: Any) -> None:
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"found a {type(encoder).__name__}; required a timm VisionTransformer")
    faults = [
        name
        for name, is_absent in (
            ("class token", encoder.cls_token is None),
            ("position embedding", encoder.pos_embed is None),
            ("final norm before the pooling", isinstance(encoder.norm, nn.Identity)),
        )
        if is_absent
    ]
    if faults:
        raise ValueError(f"found an encoder without {', '.join(faults)}; required all of them")


def _entropies(name: str, score_RK: Tensor, temperature: float) -> dict[str, Tensor]:
    share_RK = (score_RK.detach().float() / temperature).softmax(-1)
    return {f"{name}_entropy": _entropy(share_RK).mean(), f"{name}_usage_entropy": _entropy(share_RK.mean(0))}


def _entropy(share: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _summed_over_workers(value: Tensor) -> Tensor:
    if _is_distributed():
        torch.distributed.all_reduce(value)
    return value
