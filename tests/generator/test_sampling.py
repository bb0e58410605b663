"""Drawing: a photograph depends on its generator, caption and seed alone."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from gretfound.generator import pipeline
from gretfound.generator.sampling import draw_photographs
from tests.tiny_generator import RESOLUTION_PX, write_base

CAPTIONS = ["colour fundus photograph, right eye", "colour fundus photograph, glaucoma", "colour fundus photograph"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return pipeline.load_pipeline(write_base(Path(tmp_path_factory.mktemp("generator")) / "base"))


def test_draw_photographs__does_not_depend_on_the_batch_size(generator: StableDiffusionPipeline) -> None:
    captions, seeds = CAPTIONS * 3, list(range(9))
    drawn = {
        batch_size: np.stack(
            list(
                draw_photographs(pipeline=generator, captions=captions, seeds=seeds, num_steps=4, batch_size=batch_size)
            )
        )
        for batch_size in (1, 8)
    }
    assert drawn[1].shape == (9, RESOLUTION_PX, RESOLUTION_PX, 3)
    assert drawn[1].dtype == np.uint8
    assert np.abs(drawn[1].astype(int) - drawn[8].astype(int)).max() <= 1


def test_draw_photographs__follows_seed_and_caption(generator: StableDiffusionPipeline) -> None:
    a, same, other_seed, other_caption = draw_photographs(
        pipeline=generator,
        captions=[CAPTIONS[0], CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]],
        seeds=[5, 5, 6, 5],
        num_steps=4,
        guidance_scale=5.0,
    )
    assert np.array_equal(a, same)
    assert not np.array_equal(a, other_seed)
    assert not np.array_equal(a, other_caption)


def test_draw_photographs__leaves_the_pipeline_alone(generator: StableDiffusionPipeline) -> None:
    before = generator.scheduler
    list(draw_photographs(pipeline=generator, captions=CAPTIONS, seeds=[1, 2, 3], num_steps=2, guidance_scale=1.0))
    assert generator.scheduler is before
    with pytest.raises(ValueError, match="one seed for each"):
        list(draw_photographs(pipeline=generator, captions=CAPTIONS, seeds=[1]))
