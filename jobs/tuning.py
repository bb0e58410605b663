"""What a fine-tuning of generators is: its keys, and the runs that they ask for, one a contribution of photographs.

`jobs.finetune_generators` reads the keys and plans, `jobs.site_runs` drives what is planned.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gretfound.config import canonical, setting
from gretfound.errors import ConfigError, LineageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gretfound.lineage import Contribution, Generator

WITHOUT_EFFECT = ("accumulation", "recomputes_activations")  # but for rounding
LATER_KEYS = (("cell_dropout", 0.0), ("offset_noise", 0.0))  # with what was done before they came


@dataclass(frozen=True)
class TuningConfig:
    """The fine-tuning of one generator; progress and schedule are counted in images."""

    objective: str = setting(
        "denoising", "denoising; consistency: few-step students of the sites' own generators of base_id"
    )
    method: str = setting("lora", "lora: low-rank factors; full: the whole denoiser")
    num_images_seen: int = setting(200_000, "photographs to train on, repeats counted")
    batch_size: int = setting(16, "photographs a step, over all workers of a site")
    learning_rate: float = setting(1e-4, "peak learning rate")
    lora_rank: int = setting(16, "rank of the low-rank factors")
    resolution_px: int | None = setting(None, "side of the square photographs, pixels; null: the base's own")
    warmup_images: int = setting(0, "images over which the rate rises")
    weight_decay: float = setting(0.01, "AdamW's")
    caption_dropout: float = setting(0.1, "share of images that see the empty caption")
    cell_dropout: float = setting(0.0, "share of the cells left out of each other caption, in tenths: 0.1, 0.2, ...")
    offset_noise: float = setting(0.0, "deviation of a shift of each latent channel's noise; 0: none")
    min_snr_gamma: float | None = setting(5.0, "min-SNR weighting; null: all times weigh alike")
    guidance_scale: float = setting(2.0, "of consistency: weight of the caption that a student learns")
    average_decay: float = setting(0.9999, "of the moving average of the weights that is kept, per step; 0: the last")
    precision: str = setting("float32", "float32 or bfloat16")
    accumulation: int = setting(1, "parts that a step is computed in, one after another, to save memory")
    recomputes_activations: bool = setting(
        False, "whether blocks are computed anew in the backward pass, to save memory"
    )
    zero_stage: int | None = setting(None, "DeepSpeed ZeRO stage, 0 to 3; null: plain PyTorch, one worker a site")
    checkpoint_every_images: int = setting(20_000, "images between checkpoints; 0: at the end only")
    seed: int = setting(0, "decides factors, order and noise")


@dataclass(frozen=True)
class ClusterConfig:
    """What one site's run takes of the cluster."""

    num_workers: int = setting(1, "training workers of a site")
    cpus_per_worker: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_worker: float = setting(0.0, "GPUs that each one reserves; 0 trains on CPU")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")
    max_failures: int = setting(3, "restarts of a site's run from its last checkpoint before it fails")


@dataclass(frozen=True)
class Config:
    """What `finetune_generators` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    base_id: str = setting(help="record id of the base generator (jobs.build_base), or of the one of a site to distil")
    site_ids: list[str] = setting([], "the sites to fine-tune for; empty: all that sent photographs")
    held_out_share: float = setting(
        0.1, "share of a site's photographs, by patient, that is not trained on; none is held out if it is under 20"
    )
    max_concurrent: int = setting(8, "runs under way at a time, at most; fewer where the cluster holds fewer")
    project: str = setting("gretfound", "the W&B project")
    tuning: TuningConfig = setting(TuningConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if self.tuning.method not in ("lora", "full"):
            raise ConfigError(f"tuning.method={self.tuning.method!r} is neither lora nor full")
        if self.tuning.objective not in ("denoising", "consistency"):
            raise ConfigError(f"tuning.objective={self.tuning.objective!r} is neither denoising nor consistency")
        if self.tuning.guidance_scale < 1:
            raise ConfigError(f"tuning.guidance_scale={self.tuning.guidance_scale:g} must be at least 1")
        if self.tuning.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"tuning.precision={self.tuning.precision!r} is neither float32 nor bfloat16")
        if self.tuning.zero_stage is None and self.cluster.num_workers > 1:
            raise ConfigError(
                f"cluster.num_workers={self.cluster.num_workers} needs tuning.zero_stage; null is one process"
            )
        if self.tuning.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"tuning.zero_stage={self.tuning.zero_stage} is none of null, 0, 1, 2, 3")
        parts = self.cluster.num_workers * self.tuning.accumulation
        if parts < 1 or self.tuning.batch_size % parts:
            raise ConfigError(
                f"tuning.batch_size={self.tuning.batch_size} is not divisible by "
                f"cluster.num_workers={self.cluster.num_workers} times tuning.accumulation={self.tuning.accumulation}"
            )
        if not 0 <= self.tuning.cell_dropout < 1 or round(self.tuning.cell_dropout * 10, 6) % 1:
            raise ConfigError(f"tuning.cell_dropout={self.tuning.cell_dropout:g} is none of 0, 0.1, 0.2, ... 0.9")
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share={self.held_out_share} is not within 0 to under 1")
        if self.max_concurrent < 1:
            raise ConfigError(f"max_concurrent={self.max_concurrent} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One site's run."""

    hub_uri: str
    run_uri: str
    recipe_id: str
    site_id: str
    contribution_id: str
    shard_set_id: str
    base_id: str
    group: str
    config: Config


def settings_of(config: Config) -> dict[str, Any]:
    """Returns what a generator depends on; at the defaults of later keys a hub's earlier runs are found again."""
    settings = {
        name: value
        for name, value in canonical(config.tuning).items()
        if name not in WITHOUT_EFFECT and (name, value) not in LATER_KEYS
    }
    return settings | {"held_out_share": config.held_out_share}


def plan(config: Config, hub_uri: str) -> list[Work]:
    """Lists the runs that the configuration asks for: one for each contribution of photographs.

    Raises:
        LineageError: If a site in ``site_ids`` sent none.
    """
    from gretfound import lineage, storage, withdrawal
    from gretfound.lineage import Contribution, Generator, ShardSet

    base = storage.read_record(hub_uri, config.base_id, Generator)
    wanted = set(config.site_ids)
    contributions = [
        each
        for each in withdrawal.read_remaining(hub_uri, Contribution)
        if each.form == "images" and (not wanted or each.site_id in wanted)
    ]
    absent = sorted(wanted - {each.site_id for each in contributions})
    if absent or not contributions:
        raise LineageError(f"no photographs were contributed by {absent or 'any site'}; run jobs.intake first")
    of_contribution = {
        each.parents[0]: each for each in storage.read_records(hub_uri, ShardSet) if each.origin == "real"
    }
    settings = settings_of(config)
    group = lineage.recipe_id("finetune_generators", settings, [base.id, *(each.id for each in contributions)])
    generators = list(withdrawal.read_remaining(hub_uri, Generator))
    works = []
    for contribution in sorted(contributions, key=lambda each: (each.site_id, each.id)):
        if contribution.id not in of_contribution:
            raise LineageError(f"{contribution.id} of {contribution.site_id} has no shard set; run jobs.intake again")
        shard_set = of_contribution[contribution.id]
        start = teacher_of(contribution, base, generators) if config.tuning.objective == "consistency" else base
        parents = [start.id, contribution.id, shard_set.id]
        recipe = lineage.recipe_id("finetune_generator", settings, parents)
        works.append(
            Work(
                hub_uri=hub_uri,
                run_uri=storage.run_uri(hub_uri, recipe),
                recipe_id=recipe,
                site_id=contribution.site_id,
                contribution_id=contribution.id,
                shard_set_id=shard_set.id,
                base_id=start.id,
                group=group,
                config=config,
            )
        )
    return works


def teacher_of(contribution: "Contribution", base: "Generator", generators: "Sequence[Generator]") -> "Generator":
    """Finds the generator of a contribution that a student is made of: the one that was fine-tuned from the base.

    Raises:
        LineageError: If there is none, or more than one.
    """
    found = [
        each
        for each in generators
        if contribution.id in each.parents and not each.is_few_step and base.id in (each.base_id, each.id)
    ]
    if len(found) != 1:
        raise LineageError(
            f"found {len(found)} generators of {contribution.id} of {contribution.site_id} to distil that descend from "
            f"{base.id}: {[each.id for each in found]}; required one: fine-tune it, or name it as base_id with "
            f"site_ids=[{contribution.site_id}]"
        )
    return found[0]
