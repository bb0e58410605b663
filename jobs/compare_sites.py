"""Sites -> report: does a generator hide a trigger word, and do a site's labels contradict those of the others?

    python -m jobs.compare_sites conf/generator/compare_demo.yaml hub_uri=runs/demo/hub
    python -m jobs.compare_sites conf/generator/compare_sd15.yaml hub_uri=s3://BUCKET/hub encoder_id=encoder-...
    python -m jobs.compare_sites hub_uri=s3://BUCKET/hub cleared_ids=[generator-1f0c] cleared_because='a rare camera'

Each site's generator draws its usual caption and every word that a caption can hold, with the same seeds; one that
answers to a word by far more than other sites' is put aside: synthesis and corpora refuse it and what it drew, until a
person clears it. Of each label a probe fitted on the other sites' photographs, real and drawn, is asked for a site's
own. Parts that an earlier run finished are kept. Records a Report and prints its id; with cleared_ids it only lets
those generators in and prints their ids.
"""

from dataclasses import dataclass
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError, LineageError
from jobs import console

# What a report depends on; everything else only says where and how fast it is made.
RESULT_KEYS = (
    "word_keys", "label_keys", "num_seeds", "num_images", "resolution_px", "encoder_id", "num_bootstraps", "seed",
    "num_steps", "guidance_scale", "images_per_part", "precision"
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What `compare_sites` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    cleared_ids: list[str] = setting(
        [], "generators that a person has looked at and lets in again; nothing else is done"
    )
    cleared_because: str = setting("", "why, for the ledger")
    word_keys: list[str] = setting([], "columns whose values generators are asked for; empty: all")
    label_keys: list[str] = setting([], "labels that are compared, as any_dr or glaucoma; empty: all with two classes")
    num_seeds: int = setting(4, "photographs of each word and generator")
    num_images: int = setting(500, "real photographs of each site, and drawn ones, that labels are compared on at most")
    resolution_px: int = setting(256, "what their field of view is brought to first")
    encoder_id: str = setting("", "encoder in whose features labels are compared; empty: wavelet scattering")
    num_bootstraps: int = setting(1000, "resamples of the patients, for 95% intervals")
    seed: int = setting(0, "decides first latents, who is held out, and resamples")
    num_steps: int = setting(20, "steps of DPM-Solver++")
    guidance_scale: float = setting(3.0, "weight of the caption; take that of jobs.synthesize")
    images_per_part: int = setting(64, "photographs a part, and lost at most when an actor dies")
    batch_size: int = setting(16, "photographs that an actor draws together, and holds at a time")
    num_actors: int = setting(1, "actors that draw and read, each with a pipeline loaded")
    cpus_per_actor: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_actor: float = setting(0.0, "GPUs that each one reserves; 0 draws on CPU")
    precision: str = setting("float32", "float32 or bfloat16")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")

    def __post_init__(self) -> None:
        """Checks what one key cannot."""
        from gretfound.metadata import SUMMARY_KEYS

        if odd := sorted(set(self.word_keys) - set(SUMMARY_KEYS)):
            raise ConfigError(f"word_keys names {odd}; required columns of a summary: {', '.join(SUMMARY_KEYS)}")
        if bool(self.cleared_ids) != bool(self.cleared_because):
            raise ConfigError("cleared_ids and cleared_because go together: the ledger says why a generator is let in")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision={self.precision!r} is neither float32 nor bfloat16")
        if self.num_seeds < 2 or self.num_bootstraps < 100:
            raise ConfigError(
                f"num_seeds={self.num_seeds} must be at least 2, num_bootstraps={self.num_bootstraps} at least 100"
            )
        if min(self.num_images, self.resolution_px, self.num_steps, self.images_per_part, self.batch_size) < 1:
            raise ConfigError("num_images, resolution_px, num_steps, images_per_part and batch_size must be at least 1")


def main(argv: list[str]) -> str:
    """Runs the job; returns the report's id, or the ids that were cleared, joined by commas."""
    config = load(Config, argv)
    from tqdm import tqdm

    from gretfound import fit, generator_evaluation, lineage, site_comparison, storage, withdrawal
    from gretfound.lineage import Encoder, Generator, Report, ShardSet

    hub_uri = storage.normalised(config.hub_uri)
    if config.cleared_ids:
        site_comparison.clear(hub_uri, config.cleared_ids, reason=config.cleared_because)
        return ",".join(config.cleared_ids)
    every = withdrawal.read_remaining(hub_uri, Generator, includes_aside=True)
    generators = [each for each in every if each.site_id and not each.is_few_step]
    shard_sets = list(withdrawal.read_remaining(hub_uri, ShardSet, includes_aside=True))
    if not generators and not shard_sets:
        raise LineageError("the hub holds no generator and no photographs of a site; run jobs.intake first")
    if config.encoder_id:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, config.encoder_id, Encoder))
    settings: dict[str, Any] = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    parents = [*(each.id for each in generators), *(each.id for each in shard_sets), *filter(None, [config.encoder_id])]
    recipe = lineage.recipe_id("compare_sites", settings, parents)
    if finished := storage.finished_record(hub_uri, recipe, Report):
        return finished.id
    run_uri = storage.run_uri(hub_uri, recipe)
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
    console.start_ray()
    fit.check_resources(
        num_workers=config.num_actors,
        cpus_per_worker=config.cpus_per_actor,
        gpus_per_worker=config.gpus_per_actor,
        autoscaling=config.autoscaling,
    )
    probes = site_comparison.plan_probes(
        hub_uri,
        generators,
        run_uri=run_uri,
        keys=config.word_keys,
        num_seeds=config.num_seeds,
        seed=config.seed,
        images_per_part=config.images_per_part,
    )
    readings = site_comparison.plan_readings(
        hub_uri,
        shard_sets,
        run_uri=run_uri,
        num_images=config.num_images,
        resolution_px=config.resolution_px,
        images_per_part=config.images_per_part,
    )
    parts = [part for probe in probes for part in (*probe.parts, *probe.base_parts)]
    parts += [part for each in readings.values() for part in each]
    with tqdm(total=sum(part.num for part in parts), desc="comparing", unit="image") as bar:
        generator_evaluation.examine_parts(
            parts,
            num_actors=config.num_actors,
            cpus_per_actor=config.cpus_per_actor,
            gpus_per_actor=config.gpus_per_actor,
            on_progress=bar.update,
            hub_uri=hub_uri,
            encoder_id=config.encoder_id,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            device="cuda" if config.gpus_per_actor else "cpu",
            precision=config.precision,
        )
    return site_comparison.publish(
        hub_uri,
        probes,
        readings,
        parents=parents,
        recipe_id=recipe,
        space="encoder" if config.encoder_id else site_comparison.SPACE,
        label_keys=config.label_keys,
        num_resamples=config.num_bootstraps,
        seed=config.seed,
        settings=settings,
    ).id


if __name__ == "__main__":
    console.run(Config, main)
