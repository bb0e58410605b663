"""A recipe: its groups make the objective and the crops, and what is wrong in it is named wherever it is read."""

import pytest

from gretfound.config import load
from gretfound.encoder.crops import View
from gretfound.errors import ConfigError
from jobs import plan, pretrain_encoder, recipe

REQUIRED = {plan.Config: [], pretrain_encoder.Config: ["hub_uri=h", "corpus_id=c"]}


@pytest.mark.parametrize("schema", list(REQUIRED), ids=lambda schema: schema.__module__)
@pytest.mark.parametrize(
    "override",
    ["objective=simclr", "mae.target='details'", "fit.lr_scaling=cubic", "fit.precision=float16", "fit.zero_stage=4"],
)
def test_load__names_the_key_that_is_wrong(schema: type, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{key}='?{value}"):
        load(schema, [*REQUIRED[schema], override])


def test_num_images_seen__whole_steps() -> None:
    seen = [recipe.FitConfig(num_images=number, batch_size=64).num_images_seen for number in (1, 64, 65, 128)]
    assert seen == [64, 64, 128, 128]


def test_build_views__are_those_of_the_objective() -> None:
    argv = ["encoder.image_size_px=32", "crops.num_local=3", "crops.local_size_px=16", "crops.global_scale_min=0.4"]
    distilled = load(plan.Config, [*argv, "objective=dinov2"])
    assert recipe.build_views(distilled) == {
        "global_crop": View(size_px=32, scale=(0.4, 1.0), number=2),
        "local_crop": View(size_px=16, scale=(0.05, 0.32), number=3),
    }
    assert recipe.build_views(load(plan.Config, argv)) == {"image": View(size_px=32, scale=(0.4, 1.0))}
