"""Fine-tuning: resumable, deterministic, and the mirror image of a right eye is a left one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file

from gretfound import shard, storage
from gretfound.checkpoints import LocalCheckpoints
from gretfound.generator import adapter, finetune, latents, pipeline, sampling
from tests.tiny_generator import rows_of, write_base

SETTINGS: dict[str, Any] = {"num_images_seen": 24, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 2, "seed": 3}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("site")
    shard.write_shard_file(folder / "shard.parquet", rows_of(6))
    return write_base(folder / "base"), folder / "shard.parquet"


class _Killed(Exception):
    pass


class _Dying(LocalCheckpoints):
    """Keeps state as at a site, until the process is killed after the second checkpoint."""

    def save(self, engine: Any, *, images_seen: int, losses: list[float]) -> str:
        name = super().save(engine, images_seen=images_seen, losses=losses)
        if images_seen >= 16:
            raise _Killed
        return name


def test_finetune_locally__goes_on_where_it_was_killed(site: tuple[Path, Path], tmp_path: Path) -> None:
    base_path, shard_path = site
    inputs = {"base_path": base_path, "shard_path": shard_path, **SETTINGS}
    undisturbed = finetune.finetune_locally(work_path=tmp_path / "a", **inputs)
    again = {"work_path": tmp_path / "b", "checkpoint_every_images": 8, **inputs}
    with pytest.raises(_Killed):
        finetune.finetune_locally(checkpoints=_Dying(tmp_path / "c"), **again)
    seen: list[int] = []
    adapter_path = finetune.finetune_locally(
        checkpoints=LocalCheckpoints(tmp_path / "c"),
        on_progress=lambda progress: seen.append(progress.images_seen),
        **again,
    )
    assert seen[0] > 16 and seen[-1] == 24, "it goes on after the second checkpoint"
    found, required = (load_file(path / adapter.ADAPTER_TENSORS) for path in (adapter_path, undisturbed))
    assert set(found) == set(required)
    for name, tensor in required.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert any(tensor.abs().sum() > 0 for name, tensor in found.items() if "lora_B" in name)
    modified = adapter_path.stat().st_mtime_ns
    assert finetune.finetune_locally(**again) == adapter_path
    assert adapter_path.stat().st_mtime_ns == modified


def test_finetune_locally__a_held_out_photograph_leaves_no_trace(site: tuple[Path, Path], tmp_path: Path) -> None:
    base_path, shard_path = site
    rows = rows_of(6)
    shard.write_shard_file(tmp_path / "without.parquet", [rows[0], *rows[2:]])
    left_out = {"shard_path": shard_path, "left_out": (rows[1]["image_id"],)}
    found, required, other = (
        finetune.finetune_locally(base_path=base_path, work_path=tmp_path, **inputs, **SETTINGS)
        for inputs in (left_out, {"shard_path": tmp_path / "without.parquet"}, {"shard_path": shard_path})
    )
    weights, expected, others = (load_file(path / adapter.ADAPTER_TENSORS) for path in (found, required, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in others.items())
    assert len(list((tmp_path / "latents").iterdir())) == 2  # one a shard, whatever is left out
    assert list(finetune.read_patients([shard_path])) == [(row["image_id"], row["patient"]) for row in rows]


def test_finetune_locally__full_method_lowers_the_loss(site: tuple[Path, Path], tmp_path: Path) -> None:
    base_path, shard_path = site
    losses: list[float] = []
    adapter_path = finetune.finetune_locally(
        base_path=base_path, shard_path=shard_path, work_path=tmp_path, num_images_seen=240, batch_size=8,
        learning_rate=3e-3, method="full", min_snr_gamma=None, on_progress=lambda p: losses.append(p.loss),
    )  # fmt: skip
    terms = adapter.read_terms(adapter_path)
    assert (terms.method, terms.images_seen) == ("full", 240)
    assert terms.final_loss < 0.9  # an untrained UNet predicts nothing: its loss is the noise's variance, 1
    installed = pipeline.install_adapter(base_path, adapter_path, tmp_path / "generator")
    trained = load_file(adapter_path / adapter.ADAPTER_TENSORS)
    merged = load_file(installed / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in trained.items())


def test_finetune_locally__reads_latents_that_were_encoded_before(site: tuple[Path, Path], tmp_path: Path) -> None:
    base_path, shard_path = site
    expected = finetune.finetune_locally(
        base_path=base_path, shard_path=shard_path, work_path=tmp_path / "a", **SETTINGS
    )
    found = finetune.finetune_locally(
        base_path=base_path, latents_path=tmp_path / "a" / "latents", work_path=tmp_path / "b", **SETTINGS
    )
    assert storage.sha256_of(found / adapter.ADAPTER_TENSORS) == storage.sha256_of(expected / adapter.ADAPTER_TENSORS)
    with pytest.raises(ValueError, match="required one of them"):
        finetune.finetune_locally(base_path=base_path, work_path=tmp_path, **SETTINGS)


def test_finetune_locally__makes_a_few_step_student(site: tuple[Path, Path], tmp_path: Path) -> None:
    base_path, shard_path = site
    adapter_path = finetune.finetune_locally(
        base_path=base_path, shard_path=shard_path, work_path=tmp_path, objective="consistency", method="full",
        num_images_seen=160, batch_size=8, learning_rate=1e-2, average_decay=0.9,
    )  # fmt: skip
    student_path = pipeline.install_adapter(base_path, adapter_path, tmp_path / "student", is_few_step=True)
    student = pipeline.load_pipeline(student_path)
    assert isinstance(student.scheduler, LCMScheduler)
    captions = ["colour fundus photograph", "colour fundus photograph, right eye"] * 3
    drawn = {
        size: np.stack(
            list(sampling.draw_photographs(
                pipeline=student, captions=captions, seeds=range(6), num_steps=3, guidance_scale=1.0, batch_size=size
            ))
        )
        for size in (1, 4)
    }  # fmt: skip
    assert np.abs(drawn[1].astype(int) - drawn[4].astype(int)).max() <= 1
    assert np.abs(drawn[1][0].astype(int) - drawn[1][2].astype(int)).max() > 1
    with pytest.raises(ValueError, match="few-step"):
        list(sampling.draw_photographs(pipeline=student, captions=captions, seeds=range(6)))
    # Its encoders are its teacher's, so that latents that are encoded already are found.
    assert latents.encoding_files(student_path) == latents.encoding_files(base_path)
