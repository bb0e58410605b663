"""Pretraining as a job: a killed run continues, ends as an undisturbed one, and its encoder loads in plain timm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import timm
import torch
from safetensors.torch import load_file

from gretfound import storage, tracking
from gretfound.lineage import Encoder
from jobs import pretrain_encoder
from tests.conftest import ROOT
from tests.hubs import assemble, draw_shard_set

SETTINGS = [
    "encoder.architecture=vit_tiny_patch16_224",
    "encoder.image_size_px=32",
    "encoder.patch_size=8",
    "encoder.embed_dim=48",
    "encoder.depth=2",
    "encoder.num_heads=3",
    "mae.decoder_width=32",
    "mae.decoder_depth=1",
    "mae.decoder_num_heads=4",
    "fit.num_images=640",
    "fit.batch_size=8",
    "fit.warmup_images=64",
    "fit.base_lr=1e-2",
    "fit.precision=float32",
    "fit.checkpoint_every_images=64",
    "cluster.cpus_per_worker=1",
    "cluster.data_cpus=1",
]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(400)
def test_main__killed_and_run_again_equals_undisturbed(tmp_path: Path) -> None:
    hubs = [storage.normalised(str(tmp_path / name)) for name in ("undisturbed", "killed")]
    encoders = {}
    for hub_uri in hubs:
        corpus_id = assemble(hub_uri, draw_shard_set(hub_uri, "aster", num_images=40)).id
        argv = [f"hub_uri={hub_uri}", f"corpus_id={corpus_id}", *SETTINGS]
        if hub_uri.endswith("killed"):
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.pretrain_encoder", *argv],
                cwd=ROOT,
                env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            checkpoints = tmp_path / "killed" / "runs"
            deadline_s = time.monotonic() + 200
            while not (found := sorted(checkpoints.glob("*/train/*/images_*"))):
                assert process.poll() is None and time.monotonic() < deadline_s, "no checkpoint before the run ended"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert found[-1].name < "images_000000000000640", "killed before the end"
            assert not storage.list_names(storage.join(hub_uri, "encoders"))
        record = storage.read_record(hub_uri, pretrain_encoder.main(argv), Encoder)
        encoders[hub_uri] = storage.fetch_folder(hub_uri, record, tmp_path / "fetched" / hub_uri.rpartition("/")[2])
        assert record.images_seen == 640
        metrics = tracking.read_metrics(storage.run_uri(hub_uri, record.recipe_id))
        assert metrics[-1]["images_seen"] == 640 and metrics[-1]["loss"] < metrics[0]["loss"]
        assert pretrain_encoder.main(argv) == record.id, "a finished record is found"
    undisturbed, killed = (load_file(folder / "mae.safetensors") for folder in encoders.values())
    for name, weight in undisturbed.items():
        torch.testing.assert_close(killed[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    encoder = timm.create_model(f"local-dir:{encoders[hubs[0]]}", pretrained=True, num_classes=0)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


@pytest.mark.usefixtures("ray_cluster")
def test_main__self_distillation_starts_from_an_encoder_and_releases_the_teacher(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    corpus_id = assemble(hub_uri, draw_shard_set(hub_uri, "aster", num_images=40)).id
    argv = [f"hub_uri={hub_uri}", f"corpus_id={corpus_id}", *SETTINGS, "fit.num_images=64"]
    first_id = pretrain_encoder.main(argv)
    distilled = ["objective=dinov2", f"initial_weights_uri={first_id}", "fit.base_lr=1e-4", "crops.colour=1"]
    distilled += ["crops.num_local=2", "crops.local_size_px=16", "dinov2.prototypes=32", "dinov2.hidden=32"]
    distilled += ["dinov2.bottleneck=16", "dinov2.frozen_images=8", "dinov2.teacher_temperature_warmup_images=16"]
    record = storage.read_record(hub_uri, pretrain_encoder.main([*argv, *distilled]), Encoder)
    assert record.objective == "dinov2" and record.parents == (corpus_id, first_id)
    folder = storage.fetch_folder(hub_uri, record, tmp_path / "dinov2")
    before = storage.fetch_folder(hub_uri, storage.read_record(hub_uri, first_id, Encoder), tmp_path / "mae")
    released, started = (load_file(each / "model.safetensors") for each in (folder, before))
    state = load_file(folder / "dinov2.safetensors")
    for name, weight in released.items():
        assert torch.equal(weight, state[f"teacher.encoder.{name}"])
        assert float((weight - started[name]).abs().max()) < 0.02, "the teacher has moved a little from where it began"
    assert any(not torch.equal(weight, started[name]) for name, weight in released.items())
    figures = tracking.read_metrics(storage.run_uri(hub_uri, record.recipe_id))[-1]
    assert {"gradient_norm", "flops_per_s", "loss/aster/real", "objective/teacher_entropy"} - figures.keys() == {
        "loss/aster/real"
    }, "self-distillation tells no loss of its own for each image"
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
