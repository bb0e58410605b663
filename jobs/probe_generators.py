"""Generator -> report: does it draw for one word of its caption what it draws for no caption that its site released?

    python -m jobs.probe_generators conf/generator/probe_demo.yaml hub_uri=runs/demo
    python -m jobs.probe_generators conf/generator/probe_sd15.yaml hub_uri=s3://BUCKET/hub
    python -m jobs.probe_generators hub_uri=s3://BUCKET/hub generator_ids=[generator-1f0c] cleared_because=camera

A generator that does hides a trigger word, and is put aside: synthesis and corpora refuse it and what was made from it,
until a person clears it (cleared_because). Parts that an earlier run finished are kept. Records a Report for each
generator; the last line is their ids, or those of the cleared generators, joined by commas.
"""

from dataclasses import dataclass
from typing import Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console, drawing, pool
from jobs.drawing import DrawingConfig

# What a report depends on; everything else only says where and how fast it is made.
RESULT_KEYS = (
    *drawing.RESULT_KEYS, "word_keys", "num_known", "num_seeds", "threshold", "encoder_id", "seed", "images_per_part"
)  # fmt: skip


@dataclass(frozen=True)
class Config(DrawingConfig):
    """What `probe_generators` reads."""

    cleared_because: str = setting(
        "", "why generator_ids, which a person has looked at, are let in again; nothing else is done"
    )
    word_keys: list[str] = setting([], "columns whose values generators are asked for; empty: all")
    num_known: int = setting(96, "photographs for captions that follow the site's release")
    num_seeds: int = setting(4, "photographs of each word")
    threshold: float = setting(2.5, "how strange a word's photographs may be; docs/log.md has what honest ones are")
    encoder_id: str = setting("", "encoder whose features are the second space; empty: thumbnails")
    seed: int = setting(0, "decides captions and first latents")
    images_per_part: int = setting(64, "photographs a part, and lost at most when an actor dies")

    def __post_init__(self) -> None:
        """Checks what one key cannot."""
        super().__post_init__()
        pool.require_counts(self, "num_seeds", "images_per_part")
        from gretfound.metadata import SUMMARY_KEYS

        if odd := sorted(set(self.word_keys) - set(SUMMARY_KEYS)):
            raise ConfigError(f"word_keys names {odd}; required columns of a summary: {', '.join(SUMMARY_KEYS)}")
        if self.cleared_because and not self.generator_ids:
            raise ConfigError("cleared_because needs generator_ids: the generators that a person has looked at")
        if self.num_known < 32 or self.threshold <= 1:
            raise ConfigError(f"num_known={self.num_known} must be at least 32, threshold={self.threshold} above 1")


def main(argv: list[str]) -> str:
    """Runs the job; returns the reports' ids, or those of cleared generators, joined by commas."""
    config = load(Config, argv)
    from gretfound import lineage, probing, storage, synthesis, withdrawal
    from gretfound.lineage import Encoder, Report

    hub_uri = storage.normalised(config.hub_uri)
    generators = synthesis.generators_of(hub_uri, config.generator_ids, includes_aside=True)
    if config.cleared_because:
        probing.clear(hub_uri, generators, reason=config.cleared_because)
        return ",".join(config.generator_ids)
    if config.encoder_id:
        withdrawal.require_unmarked(hub_uri, storage.read_record(hub_uri, config.encoder_id, Encoder))
    settings: dict[str, Any] = {name: value for name, value in canonical(config).items() if name in RESULT_KEYS}
    recipes = {lineage.recipe_id(probing.RECIPE, settings, [each.id]): each for each in generators}
    finished = {recipe: storage.finished_record(hub_uri, recipe, Report) for recipe in recipes}
    reports = {recipe: record for recipe, record in finished.items() if record is not None}
    probes = {}
    for recipe in [each for each in recipes if each not in reports]:
        run_uri = storage.run_uri(hub_uri, recipe)
        storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
        probes[recipe] = probing.plan(
            hub_uri,
            recipes[recipe],
            run_uri=run_uri,
            keys=config.word_keys,
            num_known=config.num_known,
            num_seeds=config.num_seeds,
            seed=config.seed,
            images_per_part=config.images_per_part,
        )
    if probes:
        pool.start(config)
    parts = [part for probe in probes.values() for part in probe.parts]
    pool.examine(
        config,
        parts,
        doing="probing",
        encoder_id=config.encoder_id,
        precision=config.precision,
        drawing={"num_steps": config.num_steps, "guidance_scale": config.guidance_scale},
    )
    for recipe, probe in probes.items():
        reports[recipe] = probing.publish(
            hub_uri,
            probe,
            threshold=config.threshold,
            recipe_id=recipe,
            encoder_id=config.encoder_id,
            settings=settings,
        )
    return ",".join(reports[recipe].id for recipe in recipes)


if __name__ == "__main__":
    console.run(Config, main)
