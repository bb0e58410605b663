"""The whole trial with small diffusion models: one that repeats its patients, one that does not, and a biased split."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gretfound import metadata
from gretfound.evaluation.scattering import scattering_space
from gretfound.fundus import Photograph
from gretfound.gate import eyes, policy, trial
from gretfound.gate.verdict import Check, overall
from gretfound.generator import autoencoding, pipeline, pretraining, sampling
from gretfound.generator.squares import Square, as_tensor
from tests.gate.test_eyes import draw, side_of

SIZE_PX = 32
RULES = replace(
    policy.read_policy("demonstration"), num_samples=60, num_planted=20, num_exposed=2, seeds_per_exposed=6,
    min_group=6, max_auc_upper=0.75, fail_auc=0.75, min_visits_found=0.5,
)  # fmt: skip
FIRST = Check(name="G0", verdict="PASS", measured={}, required="", reason="")


class _ByHeart(nn.Module):
    """The denoiser that training without end comes to: of all functions it has the least loss on these latents.

    What is expected of the noise, given a noised latent, if every latent is one of these: a weighted mean over them.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix B.3.
    """

    def __init__(self, like: Any, latents_NCHW: Tensor, kept_T: Tensor) -> None:
        super().__init__()
        self.config, self.dtype, self.device = like.config, like.dtype, like.device
        self.latents_NCHW = nn.Parameter(latents_NCHW.clone())
        self._kept_T = kept_T

    def forward(self, noised_BCHW: Tensor, step: Tensor, **_: Any) -> tuple[Tensor]:
        kept_B = self._kept_T[step.long().expand(len(noised_BCHW))].view(-1, 1, 1, 1)
        distance_BN = (noised_BCHW[:, None] - kept_B.sqrt()[:, None] * self.latents_NCHW).square().sum(dim=(2, 3, 4))
        weight_BN = torch.softmax(-distance_BN / (2 * (1 - kept_B.view(-1, 1))), dim=1)
        mean_BCHW = torch.einsum("bn,nchw->bchw", weight_BN, self.latents_NCHW)
        return ((noised_BCHW - kept_B.sqrt() * mean_BCHW) / (1 - kept_B).sqrt(),)


def _untrained(size_px: int) -> Any:
    return pipeline.build_pipeline(
        resolution_px=size_px, latent_channels=8, encoder_width=24, decoder_width=16, num_halvings=1,
        unet_channels=[32, 64], unet_layers=1, text_width=16, text_layers=1, max_tokens=64,
        vocabulary=metadata.caption_words(), seed=0,
    )  # fmt: skip


def _knows_by_heart(squares: Sequence[Photograph]) -> Any:
    """Makes the generator that small ones come to which are trained on few photographs for too long."""
    generator = _untrained(squares[0].shape[0])
    images = as_tensor(squares)
    autoencoding.fit_autoencoder(generator.vae, images)
    latents = autoencoding.encode_photographs(generator.vae, images)
    generator.unet = _ByHeart(generator.unet, latents, generator.scheduler.alphas_cumprod)
    return generator


def _generator(squares: Sequence[Photograph], work_path: Path, *, num_images: int) -> Any:
    """Trains a small generator from nothing."""
    untrained = _untrained(SIZE_PX)
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


def _held(
    generator: Any, trained: list[Photograph], held_out: list[Photograph], *, looking: Sequence[eyes.Eye]
) -> trial.Trial:
    def drawn(captions: Sequence[str], seeds: Sequence[int]) -> Iterable[Photograph]:
        return sampling.draw_photographs(
            pipeline=generator, captions=captions, seeds=seeds, num_steps=12, guidance_scale=1.0
        )

    return trial.hold(
        trained=side_of(trained, "t"),
        held_out=side_of(held_out, "h"),
        samples=list(drawn([metadata.caption({})] * RULES.num_samples, range(RULES.num_samples))),
        eyes=looking,
        generator=generator,
        draw=drawn,
        policy=RULES,
        first=FIRST,
    )


def test_hold__a_generator_that_knows_its_photographs_by_heart_fails() -> None:
    trained, held_out = draw(0, 40, SIZE_PX), draw(1000, 40, SIZE_PX)
    held = _held(_knows_by_heart(trained), trained, held_out, looking=[eyes.DetailEye()])
    verdicts = {check.name: check for check in held.checks}
    assert verdicts["G1"].verdict == "PASS", verdicts["G1"]
    for name in ("G2", "G3", "G4"):
        assert verdicts[name].verdict == "FAIL", verdicts[name]
    assert float(verdicts["G2"].measured["excess"]) > 0.9 and len(held.flagged) > 0.9 * RULES.num_samples
    assert float(verdicts["G4"].measured["auc"]) > 0.95
    assert overall(held.checks) == "FAIL"
    assert held.pairs[0].is_flagged


@pytest.mark.slow
def test_hold__a_healthy_generator_passes(tmp_path: Path) -> None:
    trained, held_out = draw(0, 320, SIZE_PX), draw(1000, 64, SIZE_PX)
    learned = eyes.trained_eye(num_drawings=160, num_steps=300, cache_path=tmp_path)
    generator = _generator(trained, tmp_path, num_images=4_000)
    held = _held(generator, trained, held_out, looking=[learned, eyes.DetailEye()])
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
