"""A pretraining recipe: the groups of keys of conf/pretrain/, and what they make for `pretrain_encoder` and `plan`.

A job's configuration holds the groups as keys of its own; the functions take that configuration and hand the groups on
to the rooms, key by key.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gretfound import capacity
from gretfound.capacity import Training
from gretfound.config import setting
from gretfound.errors import ConfigError

if TYPE_CHECKING:
    from gretfound.encoder.crops import View


@dataclass(frozen=True)
class EncoderConfig:
    """The vision transformer; sizes of 0 are those of ``architecture``."""

    architecture: str = setting("vit_large_patch16_224", "a timm vision transformer")
    image_size_px: int = setting(224, "side of the square input, pixels")
    patch_size: int = setting(0, "side of a patch, pixels")
    embed_dim: int = setting(0, "width")
    depth: int = setting(0, "blocks")
    num_heads: int = setting(0, "attention heads")


@dataclass(frozen=True)
class MAEConfig:
    """The masked autoencoder (He et al., CVPR 2022)."""

    mask_ratio: float = setting(0.75, "share of patches hidden from the encoder")
    predicted_share: float = setting(
        1.0, "share of the hidden patches that the decoder predicts; less is faster, and may teach less"
    )
    decoder_width: int = setting(512, "width of the decoder")
    decoder_depth: int = setting(8, "blocks of the decoder")
    decoder_num_heads: int = setting(16, "attention heads of the decoder")
    normalise_patches: bool = setting(True, "normalise each target patch by its own mean and variance")
    target: str = setting("pixels", "pixels; or details: pixels less the average colour around them, not normalised")

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if self.target not in ("pixels", "details") or (self.target == "details" and self.normalise_patches):
            raise ConfigError(
                f"found mae.target={self.target!r} with mae.normalise_patches={self.normalise_patches}; required "
                "pixels, or details with mae.normalise_patches=false"
            )


@dataclass(frozen=True)
class DINOv2Config:
    """Self-distillation (Oquab et al., 2023)."""

    prototypes: int = setting(65_536, "prototypes of each head")
    hidden: int = setting(2048, "width of the heads' hidden layers")
    bottleneck: int = setting(256, "width in which features meet the prototypes")
    shared_head: bool = setting(True, "whether patch tokens share the class token's head")
    momentum: float = setting(0.992, "the teacher's momentum at the first image; it rises to 1 on a cosine")
    teacher_temperature: float = setting(0.04, "temperature of the targets at the first image")
    final_teacher_temperature: float = setting(0.07, "temperature of the targets after the warm-up")
    teacher_temperature_warmup_images: int = setting(38_400_000, "images over which the temperature rises")
    sinkhorn_iterations: int = setting(3, "rounds of Sinkhorn-Knopp centring; 0 invites collapse")
    frozen_images: int = setting(1_280_000, "images before the prototypes begin to learn")
    koleo_weight: float = setting(0.1, "weight of the regulariser that spreads features")
    patch_weight: float = setting(1.0, "weight of the loss on masked patches (iBOT)")
    mask_probability: float = setting(0.5, "chance of each global crop to be masked")
    layer_decay: float = setting(0.9, "factor of the learning rate from each block to the one before it")


@dataclass(frozen=True)
class CropConfig:
    """The crops of a photograph; a masked autoencoder takes one global crop, self-distillation takes them all."""

    global_scale_min: float = setting(0.2, "smallest share of the field of view that a global crop covers; 0 to 1")
    global_scale_max: float = setting(1.0, "largest share that a global crop covers")
    num_local: int = setting(8, "local crops a photograph")
    local_size_px: int = setting(96, "side of a local crop, pixels")
    local_scale_min: float = setting(0.05, "smallest share that a local crop covers")
    local_scale_max: float = setting(0.32, "largest share that a local crop covers")
    colour: float = setting(0.0, "strength of colour jitter, greying and blur, 0 to 1; DINOv2 takes 1")


@dataclass(frozen=True)
class FitConfig:
    """The optimisation; progress and schedule are counted in images."""

    num_images: int = setting(904_170 * 800, "images to see in all")
    batch_size: int = setting(1792, "images a step, over all workers")
    accumulation: int = setting(1, "micro-batches a step")
    base_lr: float = setting(1.5e-4, "peak learning rate, before it is scaled to the batch")
    lr_scaling: str = setting("linear", "linear: base_lr is for 256 images a step; sqrt: for 1,024, by the square root")
    warmup_images: int = setting(904_170 * 15, "images over which the rate rises")
    weight_decay: float = setting(0.05, "AdamW's, on matrices only")
    final_weight_decay: float | None = setting(None, "where the decay goes to on a cosine; null: it stays")
    second_beta: float = setting(0.95, "AdamW's second beta; DINOv2 takes 0.999")
    clip_norm: float = setting(0.0, "largest gradient norm; 0: no clipping")
    precision: str = setting("bfloat16", "float32 or bfloat16")
    zero_stage: int = setting(1, "DeepSpeed ZeRO stage, 0 to 3")
    recomputes_activations: bool = setting(
        False, "recompute each block in the backward pass: less memory, a third slower"
    )
    checkpoint_every_images: int = setting(904_170, "images between checkpoints; 0: at the end only")

    @property
    def num_images_seen(self) -> int:
        """The images of the whole run, rounded up to whole steps."""
        return -(-self.num_images // self.batch_size) * self.batch_size

    def __post_init__(self) -> None:
        """Checks names and stages."""
        if self.lr_scaling not in ("linear", "sqrt"):
            raise ConfigError(f"fit.lr_scaling={self.lr_scaling!r} is neither linear nor sqrt")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"fit.precision={self.precision!r} is neither float32 nor bfloat16")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"fit.zero_stage={self.zero_stage} is none of 0, 1, 2, 3")


class Recipe(Protocol):
    """The keys of a recipe in a job's configuration.

    It is no base class: whose keys would come first in every config.yaml, and so in an encoder's files and id.
    """

    @property
    def objective(self) -> str: ...
    @property
    def encoder(self) -> EncoderConfig: ...
    @property
    def mae(self) -> MAEConfig: ...
    @property
    def dinov2(self) -> DINOv2Config: ...
    @property
    def crops(self) -> CropConfig: ...
    @property
    def fit(self) -> FitConfig: ...


def build_objective(recipe: Recipe, *, seed: int, initial_weights_path: Path | None = None) -> Any:
    """Builds the objective of a recipe before its first step; a finished run's weights fit it."""
    import torch

    from gretfound.encoder.architecture import build_encoder
    from gretfound.encoder.dinov2 import SelfDistillation
    from gretfound.encoder.importers import import_weights
    from gretfound.encoder.mae import MaskedAutoencoder

    torch.manual_seed(seed)
    encoder = build_encoder(**asdict(recipe.encoder))
    match recipe.objective:
        case "mae":
            objective: Any = MaskedAutoencoder(encoder, mask_seed=seed, **asdict(recipe.mae))
            if initial_weights_path:  # after the autoencoder has set its own
                import_weights(encoder, initial_weights_path)
        case "dinov2":
            if initial_weights_path:  # before the teacher copies them
                import_weights(encoder, initial_weights_path)
            num_images = recipe.fit.num_images_seen
            objective = SelfDistillation(encoder, num_images=num_images, mask_seed=seed, **asdict(recipe.dinov2))
    return objective


def build_views(recipe: Recipe) -> "dict[str, View]":
    """Returns the crops that a recipe's objective takes."""
    from gretfound.encoder.crops import View

    crops = recipe.crops
    scale = (crops.global_scale_min, crops.global_scale_max)
    whole = View(size_px=recipe.encoder.image_size_px, scale=scale, colour=crops.colour)
    if recipe.objective == "mae":
        return {"image": whole}
    local_scale = (crops.local_scale_min, crops.local_scale_max)
    local = View(size_px=crops.local_size_px, scale=local_scale, number=crops.num_local, colour=crops.colour)
    return {"global_crop": replace(whole, number=2), "local_crop": local}


def training_of(recipe: Recipe) -> Training:
    """Counts the operations and weights of a recipe's objective."""
    from gretfound.encoder.architecture import measure_encoder

    encoder = measure_encoder(**asdict(recipe.encoder))
    shared: dict[str, Any] = {
        "image_size_px": recipe.encoder.image_size_px,
        "recomputes_activations": recipe.fit.recomputes_activations,
    }
    if recipe.objective == "mae":
        mae = recipe.mae
        return capacity.masked_autoencoder(
            encoder,
            mask_ratio=mae.mask_ratio,
            predicted_share=mae.predicted_share,
            decoder_width=mae.decoder_width,
            decoder_depth=mae.decoder_depth,
            **shared,
        )
    dinov2 = recipe.dinov2
    return capacity.self_distillation(
        encoder,
        num_local=recipe.crops.num_local,
        local_size_px=recipe.crops.local_size_px,
        prototypes=dinov2.prototypes,
        hidden=dinov2.hidden,
        bottleneck=dinov2.bottleneck,
        shared_head=dinov2.shared_head,
        mask_probability=dinov2.mask_probability,
        **shared,
    )
