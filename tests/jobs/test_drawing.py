"""The keys of jobs that draw: a recipe keeps the id that it had before the keys were shared, and faults are named."""

import pytest

from gretfound import lineage
from gretfound.config import canonical, load
from gretfound.errors import ConfigError
from jobs import evaluate_generators, synthesize

SCHEMAS = {"synthesize": synthesize, "evaluate_generator": evaluate_generators}


# Ids of 2026-11-22: a hub's finished runs are found by them.
@pytest.mark.parametrize(
    ("name", "layer", "recipe_id"),
    [
        ("synthesize", "", "synthesize-803829e2c330214a30dc"),
        ("synthesize", "conf/generator/synthesize_demo.yaml", "synthesize-548ade52bfad34682c5a"),
        ("synthesize", "conf/generator/synthesize_sd15.yaml", "synthesize-bfe4e682e4f6b41392a4"),
        ("evaluate_generator", "", "evaluate_generator-25ee93ef75ab20066ae6"),
        ("evaluate_generator", "conf/generator/evaluate_demo.yaml", "evaluate_generator-d4fc54acb150c77de4ff"),
        ("evaluate_generator", "conf/generator/evaluate_sd15.yaml", "evaluate_generator-db8363b4939bbb00b711"),
    ],
)
def test_recipe_id__is_what_it_was(name: str, layer: str, recipe_id: str) -> None:
    job = SCHEMAS[name]
    config = load(job.Config, [*([layer] if layer else []), "hub_uri=x"])
    settings = {key: value for key, value in canonical(config).items() if key in job.RESULT_KEYS}
    assert lineage.recipe_id(name, settings, ["generator-0"]) == recipe_id


@pytest.mark.parametrize("job", SCHEMAS.values(), ids=SCHEMAS)
def test_load__names_the_key_that_is_wrong(job: object) -> None:
    with pytest.raises(ConfigError, match="precision='float16'"):
        load(job.Config, ["hub_uri=x", "precision=float16"])  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="batch_size, num_steps must be at least 1"):
        load(job.Config, ["hub_uri=x", "num_steps=0", "batch_size=0"])  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="num_images must be at least 1"):
        load(job.Config, ["hub_uri=x", "num_images=0"])  # type: ignore[attr-defined]
