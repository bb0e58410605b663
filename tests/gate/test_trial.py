"""The whole trial with small diffusion models: one that repeats its patients, one that does not, and a biased split."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gretfound import metadata
from gretfound.evaluation.scattering import scattering_space
from gretfound.fundus import Photograph
from gretfound.gate import eyes, policy, trial
from gretfound.gate.verdict import Check, overall
from gretfound.generator import pipeline, pretraining, sampling
from gretfound.generator.squares import Square
from tests.gate.test_eyes import draw, side_of

SIZE_PX = 32
RULES = replace(
    policy.read_policy("demonstration"), num_samples=60, num_planted=20, num_exposed=2, seeds_per_exposed=6,
    min_group=6, max_auc_upper=0.75, fail_auc=0.75, min_visits_found=0.5,
)  # fmt: skip
FIRST = Check(name="G0", verdict="PASS", measured={}, required="", reason="")


def _generator(squares: Sequence[Photograph], work_path: Path, *, num_images: int) -> Any:
    """Trains a small generator from nothing."""
    untrained = pipeline.build_pipeline(
        resolution_px=SIZE_PX, latent_channels=8, encoder_width=24, decoder_width=16, num_halvings=1,
        unet_channels=[32, 64], unet_layers=1, text_width=16, text_layers=1, max_tokens=64,
        vocabulary=metadata.caption_words(), seed=0,
    )  # fmt: skip
    blank = metadata.caption({})
    pretraining.train_from_nothing(
        untrained,
        [Square(pixels=square, caption=blank, mirrored_caption=blank) for square in squares],
        work_path=work_path,
        num_images=num_images,
        batch_size=20,
        learning_rate=2e-3,
        caption_dropout=0.0,
        min_snr_gamma=None,
        average_decay=0.0,
        seed=0,
    )
    return untrained


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> eyes.EmbeddingEye:
    return eyes.trained_eye(num_drawings=160, num_steps=300, cache_path=tmp_path_factory.mktemp("eye"))


def _held(generator: Any, eye: eyes.EmbeddingEye, trained: list[Photograph], held_out: list[Photograph]) -> trial.Trial:
    def drawn(captions: Sequence[str], seeds: Sequence[int]) -> Iterable[Photograph]:
        return sampling.draw_photographs(
            pipeline=generator, captions=captions, seeds=seeds, num_steps=12, guidance_scale=1.0
        )

    return trial.hold(
        trained=side_of(trained, "t"),
        held_out=side_of(held_out, "h"),
        samples=list(drawn([metadata.caption({})] * RULES.num_samples, range(RULES.num_samples))),
        eyes=[eye],
        generator=generator,
        draw=drawn,
        policy=RULES,
        first=FIRST,
    )


@pytest.mark.long
def test_hold__an_over_trained_generator_fails_on_copies_and_membership(eye: eyes.EmbeddingEye, tmp_path: Path) -> None:
    trained, held_out = draw(0, 40, SIZE_PX), draw(1000, 40, SIZE_PX)
    held = _held(_generator(trained, tmp_path, num_images=24_000), eye, trained, held_out)
    verdicts = {check.name: check for check in held.checks}
    assert verdicts["G1"].verdict == "PASS", verdicts["G1"]
    assert verdicts["G2"].verdict == "FAIL" and held.flagged, verdicts["G2"]
    assert verdicts["G4"].verdict == "FAIL" and float(verdicts["G4"].measured["auc"]) > 0.95, verdicts["G4"]
    assert overall(held.checks) == "FAIL"
    assert held.pairs[0].is_flagged


@pytest.mark.slow
def test_hold__a_healthy_generator_passes(eye: eyes.EmbeddingEye, tmp_path: Path) -> None:
    trained, held_out = draw(0, 320, SIZE_PX), draw(1000, 64, SIZE_PX)
    held = _held(_generator(trained, tmp_path, num_images=4_000), eye, trained, held_out)
    verdicts = {check.name: check for check in held.checks}
    assert overall(held.checks) in ("PASS", "WARN"), held.checks
    assert float(verdicts["G4"].measured["auc_low"]) < 0.5 < float(verdicts["G4"].measured["auc_high"])
    assert [check.name for check in held.checks] == ["G0", "G1", "G2", "G3", "G4", "G6", "G7"]


def test_hold__looks_no_further_where_there_is_too_little() -> None:
    failed = replace(FIRST, verdict="FAIL")
    extra = Check(name="G5", verdict="PASS", measured={}, required="", reason="")
    side = side_of([], "t")
    held = trial.hold(
        trained=side, held_out=side, samples=[], eyes=[], generator=None, draw=lambda captions, seeds: [],
        policy=RULES, first=failed, extra=[extra],
    )  # fmt: skip
    assert held.checks == (failed, extra) and overall(held.checks) == "FAIL"


def test_told_without_generator__another_camera_is_told_and_chance_is_not() -> None:
    mine, other = draw(0, 60, 64), draw(0, 30, 64, site="cedar")
    features = scattering_space([*mine, *other])
    same = trial.told_without_generator(features[:40], features[40:60], np.arange(40), np.arange(20))
    camera = trial.told_without_generator(features[:60], features[60:], np.arange(60), np.arange(30))
    assert same < 0.75 < 0.95 < camera
