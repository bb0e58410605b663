"""Generator -> shard set: draws photographs whose captions follow each site's released summary.

    python -m jobs.synthesize conf/generator/synthesize_demo.yaml hub_uri=runs/demo/hub
    python -m jobs.synthesize hub_uri=s3://hub generator_ids=[generator-1f0c] num_images=100000 num_actors=8 \
        gpus_per_actor=1 precision=bfloat16
    python -m jobs.synthesize hub_uri=runs/demo/hub balance.dr=0.5

Without generator_ids every generator of a site draws. Parts that an earlier run finished are kept.
HUB/runs/RECIPE/target.json says how often each value is asked for, and how often the site has it. The last line is the
shard set's id; with several generators, their shard sets' ids joined by commas.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console, drawing, pool
from jobs.drawing import DrawingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(DrawingConfig):
    """What `synthesize` reads."""

    num_images: int = setting(10_000, "photographs to draw from each generator")
    seed: int = setting(0, "decides captions and first latents")
    balance: dict[str, float] = setting(
        {}, "by column, as balance.dr=0.5: 0 draws its values as at the site, 1 all alike"
    )
    is_few_step: bool = setting(
        False, "draw from the few-step students (jobs.finetune_generators tuning.objective=consistency)"
    )
    images_per_shard: int = setting(4096, "photographs a shard, and lost at most when an actor dies")
    jpeg_quality: int = setting(95, "1 to 100; 0: PNG, without loss")
    is_screened: bool = setting(
        True, "leave out what is no fundus photograph, of bad quality or there already; counted"
    )
    grader_keys: list[str] = setting(
        [], "columns, as dr_present: leave out what contradicts its row, by graders fitted on real photographs; counted"
    )
    grader_encoder_id: str = setting("", "encoder in whose features graders see; empty: wavelet scattering")
    grader_images: int = setting(500, "real photographs of each site that graders are fitted on at most")
    min_agreement: float = setting(0.1, "least probability, 0 to 1, that a grader must give the value of a row")

    def __post_init__(self) -> None:
        """Checks what one key cannot."""
        super().__post_init__()
        pool.require_counts(self, "num_images", "images_per_shard", "grader_images")
        if self.is_few_step and (self.guidance_scale != 1 or self.num_steps > 50):
            raise ConfigError(
                f"is_few_step=true needs guidance_scale=1, which its generators have learnt, and num_steps of at most "
                f"50; found {self.guidance_scale:g} and {self.num_steps}"
            )
        if not 0 <= self.jpeg_quality <= 100:
            raise ConfigError(f"jpeg_quality={self.jpeg_quality} is not within 0 to 100")
        from gretfound import matching, metadata

        if unknown := sorted(set(self.grader_keys) - set(metadata.GRADED_KEYS)):
            raise ConfigError(
                f"grader_keys: found {', '.join(unknown)}; required some of {', '.join(metadata.GRADED_KEYS)}"
            )
        if not 0 < self.min_agreement < 1:
            raise ConfigError(f"min_agreement={self.min_agreement:g} is not between 0 and 1")
        matching.check_balance(self.balance)


# What an image depends on; everything else only says where and how fast it is drawn.
RESULT_KEYS = (
    *drawing.RESULT_KEYS, "num_images", "seed", "balance", "images_per_shard", "jpeg_quality", "is_screened"
)  # fmt: skip
# What only a run with graders depends on: without them the id is that of the time before they came.
GRADER_KEYS = ("grader_keys", "grader_encoder_id", "grader_images", "min_agreement")


def result_settings(config: Config) -> dict[str, Any]:
    """Returns what names the recipe."""
    names = (*RESULT_KEYS, *(GRADER_KEYS if config.grader_keys else ()))
    return {name: value for name, value in canonical(config).items() if name in names}


def main(argv: list[str]) -> str:
    """Runs the job; returns the shard sets' ids, joined by commas."""
    config = load(Config, argv)
    from tqdm import tqdm

    from gretfound import grader_fitting, lineage, matching, probing, storage, synthesis
    from gretfound.lineage import ShardSet

    hub_uri = storage.normalised(config.hub_uri)
    generators = synthesis.generators_of(hub_uri, config.generator_ids, is_few_step=config.is_few_step)
    settings = result_settings(config)
    real = grader_fitting.read_real(hub_uri, config.grader_encoder_id) if config.grader_keys else []
    graded_by = [*(each.id for each in real), *filter(None, [config.grader_encoder_id if real else ""])]
    recipes = {each.id: lineage.recipe_id("synthesize", settings, [each.id, *graded_by]) for each in generators}
    shard_sets = {each.id: storage.finished_record(hub_uri, recipes[each.id], ShardSet) for each in generators}
    unfinished = [each for each in generators if shard_sets[each.id] is None]
    parts = {}
    for generator in unfinished:
        run_uri = storage.run_uri(hub_uri, recipes[generator.id])
        storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
        contribution_id = synthesis.contribution_of(hub_uri, generator).id
        target = matching.describe(synthesis.read_summary(hub_uri, contribution_id), balance=config.balance)
        storage.write_json(storage.join(run_uri, "target.json"), target)
        parts[generator.id] = synthesis.cut_into_parts(
            generator=generator,
            contribution_id=contribution_id,
            run_uri=run_uri,
            num_images=config.num_images,
            images_per_shard=config.images_per_shard,
        )
    if unprobed := probing.unprobed(hub_uri, unfinished):
        log.warning(
            "%d of %d generators were not probed for trigger words, the first is %s: run jobs.probe_generators",
            len(unprobed), len(unfinished), unprobed[0].id,
        )  # fmt: skip
    if unfinished:
        pool.start(config)
        if config.grader_keys:
            grader_fitting.decide(
                hub_uri,
                {recipes[each.id]: each for each in unfinished},
                real,
                keys=config.grader_keys,
                encoder_id=config.grader_encoder_id,
                num_images=config.grader_images,
                min_agreement=config.min_agreement,
                seed=config.seed,
                examine=partial(pool.examine, config, doing="reading", encoder_id=config.grader_encoder_id),
            )
        with tqdm(total=config.num_images * len(unfinished), desc="drawing", unit="image") as bar:
            synthesis.paint(
                [part for each in parts.values() for part in each],
                **pool.arguments_of(config),
                on_progress=bar.update,
                hub_uri=hub_uri,
                seed=config.seed,
                balance=config.balance,
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                jpeg_quality=config.jpeg_quality,
                is_screened=config.is_screened,
                is_graded=bool(config.grader_keys),
                precision=config.precision,
            )
    for generator in unfinished:
        shard_set = synthesis.gather(
            parts[generator.id], generator=generator, recipe_id=recipes[generator.id], graded_by=graded_by
        )
        storage.write_record(hub_uri, shard_set)
        shard_sets[generator.id] = shard_set
    return ",".join(record.id for record in shard_sets.values() if record is not None)


if __name__ == "__main__":
    console.run(Config, main)
