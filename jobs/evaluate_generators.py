"""Generator -> report: measures each site's generator against photographs that it was not trained on.

    python -m jobs.evaluate_generators conf/generator/evaluate_demo.yaml hub_uri=runs/demo
    python -m jobs.evaluate_generators conf/generator/evaluate_sd15.yaml hub_uri=s3://BUCKET/hub encoder_id=encoder-...

Every generator draws some photographs, which are compared with held-out real ones of its site, beside those of the base
that it was fine-tuned from and real ones that it was trained on. Where the real photographs stay at the site, the
report says so and shows what was drawn. Parts that an earlier run finished are kept. Records a Report for each
generator; the last line is its id; with several generators, their reports' ids joined by commas.
"""

from dataclasses import dataclass
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import assemble_corpus, console, drawing, pool
from jobs.drawing import DrawingConfig

# What a report depends on; everything else only says where and how fast it is made.
RESULT_KEYS = (
    *drawing.RESULT_KEYS, "num_images", "max_real", "attributes", "compares_base", "encoder_id", "is_screened",
    "num_seeds", "num_pictures", "num_bootstraps", "seed", "images_per_part"
)  # fmt: skip


@dataclass(frozen=True)
class Config(DrawingConfig):
    """What `evaluate_generators` reads."""

    num_images: int = setting(1000, "photographs to draw from each generator")
    max_real: int = setting(2000, "held-out real photographs at most, and trained-on ones to read the figures against")
    attributes: list[str] = setting(
        ["dr", "glaucoma", "amd"], "columns whose values are compared apart and swept, where a site has them"
    )
    compares_base: bool = setting(True, "whether the base draws as many photographs, to be compared with")
    encoder_id: str = setting("", "encoder whose features are the second space; empty: thumbnails")
    is_screened: bool = setting(True, "leave out of the figures what inspection rejects, as synthesis does; counted")
    num_seeds: int = setting(2, "seeds of each sweep over an attribute")
    num_pictures: int = setting(4, "photographs shown of each condition, drawn and real; four stand in a row")
    num_bootstraps: int = setting(200, "resamples of the patients, for 95% intervals")
    seed: int = setting(0, "decides captions, first latents and resamples")
    images_per_part: int = setting(64, "photographs a part, and lost at most when an actor dies")
    project: str = setting("gretfound", "the W&B project")

    def __post_init__(self) -> None:
        """Checks what one key cannot."""
        super().__post_init__()
        pool.require_counts(self, "num_images", "max_real", "num_pictures", "images_per_part")
        from gretfound.metadata import SUMMARY_KEYS

        if odd := sorted(set(self.attributes) - set(SUMMARY_KEYS)):
            raise ConfigError(f"attributes names {odd}; required columns of a summary: {', '.join(SUMMARY_KEYS)}")
        if self.num_seeds < 0 or self.num_bootstraps < 100:
            raise ConfigError(
                f"num_seeds={self.num_seeds} must not be negative, num_bootstraps={self.num_bootstraps} at least 100"
            )


def main(argv: list[str]) -> str:
    """Runs the job; returns the reports' ids, joined by commas."""
    config = load(Config, argv)
    from gretfound import generator_evaluation, lineage, storage, synthesis, withdrawal
    from gretfound.lineage import Encoder, Generator, Report

    hub_uri = storage.normalised(config.hub_uri)
    generators = synthesis.generators_of(hub_uri, config.generator_ids, includes_aside=True)
    if config.encoder_id:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, config.encoder_id, Encoder))
    settings: dict[str, Any] = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    recipes = {lineage.recipe_id("evaluate_generator", settings, [each.id]): each for each in generators}
    finished = {recipe: storage.finished_record(hub_uri, recipe, Report) for recipe in recipes}
    reports = {recipe: record for recipe, record in finished.items() if record is not None}
    unfinished: dict[str, Generator] = {recipe: each for recipe, each in recipes.items() if recipe not in reports}
    if unfinished:
        for recipe in unfinished:
            config_uri = storage.join(storage.run_uri(hub_uri, recipe), "config.yaml")
            storage.write_bytes(config_uri, to_yaml(config).encode())
        pool.start(config)
        real = generator_evaluation.real_shards(hub_uri, list(unfinished.values()))
        shards = [part for shard_set in real.values() for part in shard_set.shards]
        assemble_corpus.sign_shards(hub_uri, shards, hash_cpus=config.num_actors * config.cpus_per_actor)
        plans = generator_evaluation.plan_all(hub_uri, unfinished, real, max_real=config.max_real)
        asked = {"num_images": config.num_images, "attributes": config.attributes, "num_seeds": config.num_seeds,
                 "seed": config.seed}  # fmt: skip
        parts = {
            recipe: generator_evaluation.cut_into_parts(
                hub_uri, each, images_per_part=config.images_per_part, compares_base=config.compares_base, **asked
            )
            for recipe, each in plans.items()
        }
        everything = [part for each in parts.values() for part in each]
        pool.examine(
            config,
            everything,
            doing="measuring",
            encoder_id=config.encoder_id,
            precision=config.precision,
            wishing=asked,
            drawing={"num_steps": config.num_steps, "guidance_scale": config.guidance_scale},
        )
        reports |= generator_evaluation.publish_all(
            hub_uri,
            plans,
            parts,
            encoder_id=config.encoder_id,
            attributes=config.attributes,
            is_screened=config.is_screened,
            num_pictures=config.num_pictures,
            num_resamples=config.num_bootstraps,
            seed=config.seed,
            project=config.project,
            group=lineage.recipe_id("evaluate_generators", settings, [each.id for each in generators]),
            settings=settings,
        )
    return ",".join(reports[recipe].id for recipe in recipes)


if __name__ == "__main__":
    console.run(Config, main)
