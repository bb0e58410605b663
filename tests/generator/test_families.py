"""Families of pipelines: what each denoiser is told and draws, against the pipeline's own call; and training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gretfound import shard
from gretfound.errors import ConfigError
from gretfound.generator import adapter, denoising, families, finetune, pipeline, private, sampling
from tests import families as smallest
from tests.tiny_generator import RESOLUTION_PX, rows_of

CAPTIONS = ["colour fundus photograph, moderate diabetic retinopathy", "colour fundus photograph, 62-year-old woman"]
SETTINGS: dict[str, Any] = {"num_images_seen": 16, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 2, "seed": 3}


@pytest.fixture(scope="module", params=families.DENOISERS)
def base_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smallest.write(request.param, tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture(scope="module")
def shard_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site") / "shard.parquet"
    shard.write_shard_file(path, rows_of(4))
    return path


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_draw_photographs__as_the_pipeline_itself_draws(base_path: Path, guidance_scale: float) -> None:
    generator = pipeline.load_pipeline(base_path)
    settings: dict[str, Any] = {"num_steps": 3, "guidance_scale": guidance_scale}
    found = list(sampling.draw_photographs(pipeline=generator, captions=CAPTIONS, seeds=[5, 6], **settings))
    itself = families.with_scheduler(generator, sampling.solver_of(generator.scheduler))
    more = {"use_resolution_binning": False} if "PixArt" in type(generator).__name__ else {}
    required = itself(
        prompt=CAPTIONS, negative_prompt=[""] * 2 if not more else "", latents=sampling.first_latents(itself, [5, 6]),
        num_inference_steps=3, guidance_scale=guidance_scale, output_type="np", **more,
    ).images  # fmt: skip
    assert found[0].shape == (RESOLUTION_PX, RESOLUTION_PX, 3) == (families.native_px(generator),) * 2 + (3,)
    for photograph, expected in zip(found, required, strict=True):
        assert np.abs(photograph / 255 - expected).max() < 1 / 255
    other = next(sampling.draw_photographs(pipeline=generator, captions=CAPTIONS[1:], seeds=[5], **settings))
    assert not np.array_equal(other, found[0]), "the caption is listened to"


def test_predict__tells_a_denoiser_what_the_pipeline_tells_it(base_path: Path) -> None:
    generator = pipeline.load_pipeline(base_path)
    denoiser = families.denoiser_of(generator)
    asked: list[tuple[Any, ...]] = []

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any], answer: tuple[torch.Tensor, ...]) -> None:
        noised = given[0] if given else named["hidden_states"]
        asked.append((noised, given[1] if len(given) > 1 else named["timestep"], answer[0]))

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    list(sampling.draw_photographs(pipeline=generator, captions=CAPTIONS, seeds=[5, 6], num_steps=3))
    hook.remove()
    text = families.embed(generator, ["", "", *CAPTIONS])  # guidance asks for both at once, the empty one first
    assert len(asked) == 3
    for noised, time, answer in asked:
        with torch.inference_mode():
            found = families.predict(denoiser, noised, time.expand(4), text)
        torch.testing.assert_close(found, answer[:, : noised.shape[1]])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_finetune_locally__trains_every_family(base_path: Path, shard_path: Path, tmp_path: Path, method: str) -> None:
    losses: list[float] = []
    adapter_path = finetune.finetune_locally(
        base_path=base_path, shard_path=shard_path, work_path=tmp_path / "work", method=method,  # type: ignore[arg-type]
        on_progress=lambda progress: losses.append(progress.loss), **SETTINGS,
    )  # fmt: skip
    terms, measured = adapter.examine(adapter_path, adapter.denoiser_weights(base_path))
    assert terms.method == method and terms.base_sha256 == pipeline.denoiser_sha256(base_path)
    assert measured.num_matrices > measured.num_zero == 0 if method == "lora" else measured.norm_ratio > 0
    merged_path = pipeline.install_adapter(base_path, adapter_path, tmp_path / "merged")
    before, after = (load_file(adapter.denoiser_weights(path)) for path in (base_path, merged_path))
    assert set(before) == set(after) and any(not torch.equal(before[name], after[name]) for name in before)
    drawn = next(
        sampling.draw_photographs(
            pipeline=pipeline.load_pipeline(merged_path), captions=CAPTIONS, seeds=[1, 2], num_steps=2
        )
    )
    assert drawn.std() > 0


def test_finetune_locally__less_memory_makes_the_same_step(base_path: Path, shard_path: Path, tmp_path: Path) -> None:
    inputs = {"base_path": base_path, "shard_path": shard_path, **SETTINGS, "num_images_seen": 8}
    whole, parts, again = (
        load_file(finetune.finetune_locally(work_path=tmp_path / name, **inputs, **more) / adapter.ADAPTER_TENSORS)
        for name, more in (("a", {}), ("b", {"accumulation": 2}), ("c", {"recomputes_activations": True}))
    )
    for name, tensor in whole.items():
        for other in (parts, again):  # adapters leave as bfloat16
            torch.testing.assert_close(other[name], tensor, rtol=0.02, atol=2e-4)


def test_finetune_locally__a_flow_makes_no_student(shard_path: Path, tmp_path: Path) -> None:
    base_path = smallest.write("StableDiffusion3Pipeline", tmp_path / "base")
    with pytest.raises(ConfigError, match="follows a flow; required one that predicts noise or velocity"):
        finetune.finetune_locally(
            base_path=base_path, shard_path=shard_path, work_path=tmp_path, objective="consistency", **SETTINGS
        )


def test_finetune_privately__moves_every_factor(base_path: Path, shard_path: Path, tmp_path: Path) -> None:
    done = private.finetune_privately(
        base_path=base_path, shard_path=shard_path.parent, work_path=tmp_path, epsilon=8.0, num_images_seen=8,
        batch_size=4, learning_rate=1e-2, lora_rank=2,
    )  # fmt: skip
    adapter.examine(done.adapter_path, adapter.denoiser_weights(base_path))


def test_denoising__noises_and_aims_as_a_flow_does() -> None:
    scheduler = smallest.build_3().scheduler
    scheduler.set_timesteps(7)  # as a drawing before may have

    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noised: torch.Tensor, time: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            self.noised, self.time = noised, time
            return (self.scale * noised,)

    denoiser, positions = Recorder(), torch.arange(4000)
    objective = denoising.DenoisingObjective(
        denoiser=denoiser, scheduler=scheduler, captions=denoising.EncodedCaptions(torch.zeros(2, 4)), seed=7
    )
    latents = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    loss = objective(latents, torch.zeros(4000, 2, 4), positions)
    _, _, noise = denoising.draw_noise(7, positions, (1, 2, 2))
    trained = type(scheduler).from_config(scheduler.config)
    torch.testing.assert_close(denoiser.noised, trained.scale_noise(latents, denoiser.time, noise))
    torch.testing.assert_close(loss, (noise - latents).square().mean())
    # Times before the scheduler's shift of 3 are logit-normal: a half lies below 1/2, 16% below the logistic of -1.
    sigma = denoiser.time / 1000
    unshifted = sigma / (3 - 2 * sigma)
    assert (unshifted < 0.5).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (unshifted < torch.tensor(-1.0).sigmoid()).float().mean().item() == pytest.approx(0.159, abs=0.01)
