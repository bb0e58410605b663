"""Pretraining: weights are fetched and told apart by content, a watch lists, and what is left is read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from gretfound import pretraining, storage, tracking
from gretfound.errors import StorageError
from gretfound.fit import Progress, TrainingSummary
from gretfound.lineage import Encoder
from tests.test_fit import autoencoder

PROGRESS = Progress(
    images_seen=8, num_images=16, loss=0.5, learning_rate=1e-3, gradient_norm=None, images_per_s=4.0,
    data_wait_share=0.1, flops_per_s=1e9, loss_by_group={1: 0.25},
)  # fmt: skip


def summary_of(objective: torch.nn.Module) -> TrainingSummary:
    return TrainingSummary(images_seen=16, final_loss=0.25, weights=objective.state_dict())


def write(uri: str, summary: TrainingSummary) -> None:
    pretraining.write_encoder(
        uri, autoencoder(), summary, objective_name="mae", architecture="vit_tiny_patch16_224", image_size_px=32,
        config_yaml="seed: 3\n",
    )  # fmt: skip


def test_write_encoder__read_again_it_is_the_trained_one(tmp_path: Path) -> None:
    trained = autoencoder()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    uri = storage.normalised(str(tmp_path / "run" / "encoder"))
    write(uri, summary_of(trained))
    (tmp_path / "fetched").mkdir()
    summary = pretraining.read_encoder(uri, tmp_path / "fetched")
    assert summary == {"images_seen": 16, "final_loss": 0.25}
    assert (tmp_path / "fetched" / "config.yaml").read_text() == "seed: 3\n"
    for name, weight in load_file(tmp_path / "fetched" / "mae.safetensors").items():
        assert torch.equal(weight, trained.state_dict()[name])
    encoder = timm.create_model(f"local-dir:{tmp_path / 'fetched'}", pretrained=True, num_classes=0)
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, trained.encoder.blocks[1].mlp.fc1.weight)


def test_write_encoder__of_another_size_it_takes_whole_photographs(tmp_path: Path) -> None:
    trained = autoencoder()
    uri = storage.normalised(str(tmp_path / "run" / "encoder"))
    pretraining.write_encoder(
        uri, autoencoder(), summary_of(trained), objective_name="mae", architecture="vit_tiny_patch16_224",
        image_size_px=64, config_yaml="seed: 3\n",
    )  # fmt: skip
    (tmp_path / "fetched").mkdir()
    pretraining.read_encoder(uri, tmp_path / "fetched")
    encoder = timm.create_model(f"local-dir:{tmp_path / 'fetched'}", pretrained=True, num_classes=0)
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 64, 64)).isfinite().all()
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, trained.state_dict()["encoder.blocks.1.mlp.fc1.weight"])
    assert trained.encoder.pos_embed.shape[1] < encoder.pos_embed.shape[1]


def test_write_encoder__weights_of_another_objective_are_refused(tmp_path: Path) -> None:
    whole = summary_of(autoencoder())
    partial = replace(whole, weights={name: each for name, each in whole.weights.items() if "mask_token" not in name})
    with pytest.raises(StorageError, match="missing mask_token"):
        write(storage.normalised(str(tmp_path)), partial)


def test_digest_initial_weights__follows_the_content_not_the_name(tmp_path: Path) -> None:
    hub_uri, path = storage.normalised(str(tmp_path / "hub")), tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    first = pretraining.digest_initial_weights(hub_uri, str(path))
    assert first == [storage.sha256_of(path)]
    save_file({"a": torch.ones(2)}, path)
    assert pretraining.digest_initial_weights(hub_uri, str(path)) != first


def test_fetch_initial_weights__an_encoder_of_the_hub(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    (tmp_path / "made").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "made" / "model.safetensors")
    record = storage.publish_folder(
        hub_uri,
        tmp_path / "made",
        Encoder(architecture="vit", objective="mae", image_size_px=32, images_seen=1, final_loss=1.0),
    )
    assert pretraining.names_encoder(record.id) and not pretraining.names_encoder("s3://bucket/encoder-1.pth")
    path = pretraining.fetch_initial_weights(hub_uri, record.id, tmp_path / "fetched")
    assert (path / "model.safetensors").is_file()


def test_watch__lists_what_was_rejected_and_only_the_first_worker_tells(tmp_path: Path) -> None:
    run_uri = storage.normalised(str(tmp_path))
    objective = autoencoder()
    batch = {
        "image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "position": torch.arange(2),
        "label": torch.tensor([0, -1]), "photograph_key": torch.arange(2),
    }  # fmt: skip
    objective(batch["image"], batch["position"])
    for rank, rejected in enumerate((["b", "a"], ["c"])):
        with tracking.Tracker(run_uri, run_id="r", project="p", is_active=rank == 0) as tracker:
            watch = pretraining.Watch(objective, tracker, run_uri=run_uri, rank=rank, group_names=["x/real", "y/real"])
            watch.observe(batch)
            assert len(list((tmp_path / "rejected").glob("*"))) == rank, "nothing was rejected yet"
            watch.rejected.update(rejected)
            watch.observe(batch)
            watch.tell(PROGRESS)
    listed = [json.loads(path.read_text()) for path in sorted((tmp_path / "rejected").glob("*.json"))]
    assert listed == [["a", "b"], ["c"]]
    (line,) = tracking.read_metrics(run_uri)
    assert (line["num_rejected"], line["loss/y/real"], line["images_seen"]) == (2, 0.25, 8)
