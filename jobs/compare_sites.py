"""Sites -> report: do a site's labels contradict those of the others, and what does leaving it out change?

    python -m jobs.compare_sites conf/corpus/compare_demo.yaml hub_uri=runs/demo
    python -m jobs.compare_sites conf/corpus/compare_gpu.yaml hub_uri=s3://BUCKET/hub encoder_id=encoder-...

Of each label a probe fitted on the other sites' photographs, real and drawn, is asked for a site's own. Parts that an
earlier run finished are kept. Records a Report and prints its id.
"""

from dataclasses import dataclass
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError, LineageError
from jobs import console, pool
from jobs.pool import PoolConfig

# What a report depends on; everything else only says where and how fast it is made.
RESULT_KEYS = ("label_keys", "num_images", "resolution_px", "encoder_id", "num_bootstraps", "seed", "images_per_part")


@dataclass(frozen=True)
class Config(PoolConfig):
    """What `compare_sites` reads."""

    label_keys: list[str] = setting([], "labels that are compared, as any_dr or glaucoma; empty: all with two classes")
    num_images: int = setting(500, "real photographs of each site, and drawn ones, that labels are compared on at most")
    resolution_px: int = setting(256, "what their field of view is brought to first")
    encoder_id: str = setting("", "encoder in whose features labels are compared; empty: wavelet scattering")
    num_bootstraps: int = setting(1000, "resamples of the patients, for 95% intervals")
    seed: int = setting(0, "decides folds, who is held out, and resamples")
    images_per_part: int = setting(64, "photographs a part, and lost at most when an actor dies")

    def __post_init__(self) -> None:
        """Checks what one key cannot."""
        if self.num_bootstraps < 100:
            raise ConfigError(f"num_bootstraps={self.num_bootstraps} must be at least 100")
        pool.require_counts(self, "num_images", "resolution_px", "images_per_part", "batch_size", "num_actors")


def main(argv: list[str]) -> str:
    """Runs the job; returns the report's id."""
    config = load(Config, argv)
    from gretfound import lineage, site_comparison, storage, withdrawal
    from gretfound.lineage import Encoder, Report, ShardSet

    hub_uri = storage.normalised(config.hub_uri)
    shard_sets = list(withdrawal.read_remaining(hub_uri, ShardSet))
    if not shard_sets:
        raise LineageError("the hub holds no photographs of a site; run jobs.intake or jobs.synthesize first")
    if config.encoder_id:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, config.encoder_id, Encoder))
    settings: dict[str, Any] = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    parents = [*(each.id for each in shard_sets), *filter(None, [config.encoder_id])]
    recipe = lineage.recipe_id("compare_sites", settings, parents)
    if finished := storage.finished_record(hub_uri, recipe, Report):
        return finished.id
    run_uri = storage.run_uri(hub_uri, recipe)
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
    pool.start(config)
    readings = site_comparison.plan_readings(
        hub_uri,
        shard_sets,
        run_uri=run_uri,
        num_images=config.num_images,
        resolution_px=config.resolution_px,
        images_per_part=config.images_per_part,
    )
    parts = [part for each in readings.values() for part in each]
    pool.examine(config, parts, doing="reading", encoder_id=config.encoder_id)
    return site_comparison.publish(
        hub_uri,
        readings,
        parents=parents,
        recipe_id=recipe,
        space="encoder" if config.encoder_id else "scattering",
        label_keys=config.label_keys,
        num_resamples=config.num_bootstraps,
        seed=config.seed,
        settings=settings,
    ).id


if __name__ == "__main__":
    console.run(Config, main)
