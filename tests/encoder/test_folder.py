import json
import logging
import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError

ARCHITECTURE = "vit_tiny_patch16_224"
TRANSFORM = Transform(image_size_px=32, mean=(0.4, 0.3, 0.2))


def tiny(**arguments):
    torch.manual_seed(7)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "global_pool": "avg"}
    return timm.create_model(ARCHITECTURE, num_classes=0, **sizes | arguments).eval()


def write(encoder, path, **arguments):
    return folder.write_encoder_folder(encoder, path, architecture=ARCHITECTURE, transform=TRANSFORM, **arguments)


@pytest.fixture(scope="module")
def written_path(tmp_path_factory):
    return write(tiny(), tmp_path_factory.mktemp("written"))


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"fc_norm": False, "mlp_ratio": 2.0}, {"class_token": False}, {"global_pool": "token", "reg_tokens": 2}],
    ids=str,
)
def test_write_encoder_folder__plain_timm_gives_bit_equal_features(tmp_path, images, arguments):
    encoder = tiny(**arguments)
    write(encoder, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert torch.equal(plain(images), encoder(images))
    settings = timm.data.resolve_model_data_config(plain)
    assert settings["input_size"] == (3, 32, 32) and tuple(settings["mean"]) == (0.4, 0.3, 0.2)
    assert settings["interpolation"] == "bicubic" and settings["crop_pct"] == 1.0


def test_write_encoder_folder__plain_timm_gives_a_new_head(tmp_path):
    write(tiny(), tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert plain.head.weight.shape == (5, 48)
    assert torch.equal(plain.blocks[1].mlp.fc1.weight, tiny().blocks[1].mlp.fc1.weight)


def test_write_encoder_folder__checkpoint_is_in_the_layout_of_retfound(tmp_path):
    encoder = tiny()
    write(encoder, tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert set(checkpoint) == {"model"}
    weights = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint["model"]) == set(weights) == set(encoder.state_dict())
    assert all(torch.equal(checkpoint["model"][name], weights[name]) for name in weights)


def test_write_encoder_folder__keeps_extra_and_leaves_the_encoder_as_it_was(tmp_path):
    encoder = tiny().train()
    write(encoder, tmp_path, extra={"images_seen": 12})
    assert json.loads((tmp_path / "config.json").read_text())["gretfound"] == {"images_seen": 12}
    assert encoder.training


@pytest.mark.parametrize("arguments", [{"qkv_bias": False}, {"init_values": 0.5}, {"act_layer": "relu"}], ids=str)
def test_write_encoder_folder__network_that_the_name_does_not_build_is_an_error(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"architecture|other features"):
        write(tiny(**arguments), tmp_path)


def test_write_encoder_folder__other_image_size_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the same size"):
        write(tiny(img_size=40), tmp_path)


def test_read_encoder_folder__gives_the_encoder_and_its_transform(tmp_path, images):
    encoder = tiny()
    write(encoder, tmp_path)
    restored, transform = folder.read_encoder_folder(tmp_path)
    assert transform == TRANSFORM and not restored.training
    assert np.array_equal(folder.embed(restored, images), folder.embed(encoder, images))


def test_read_encoder_folder__names_missing_unexpected_and_misshapen_weights(tmp_path):
    write(tiny(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["blocks.0.extra"] = weights.pop("blocks.0.norm1.weight")
    weights["cls_token"] = torch.zeros(1, 1, 7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StorageError) as raised:
        folder.read_encoder_folder(tmp_path)
    message = str(raised.value)
    assert "missing blocks.0.norm1.weight" in message and "unexpected blocks.0.extra" in message
    assert "cls_token has the shape (1, 1, 7), required (1, 1, 48)" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "transform.json"])
@pytest.mark.parametrize("content", [None, b"", b"not what it was"])
def test_read_encoder_folder__absent_or_damaged_file_is_an_error(written_path, tmp_path, name, content):
    path = shutil.copytree(written_path, tmp_path / "encoder")
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(StorageError):
        folder.read_encoder_folder(path)


def test_embed__is_the_mean_of_the_normalised_patch_tokens(images):
    encoder = tiny(fc_norm=False)
    features = folder.embed(encoder, images, batch=2)
    with torch.inference_mode():
        tokens_BLD = encoder.forward_features(images)
    assert features.shape == (5, 48) and features.dtype == np.float32
    assert features == pytest.approx(tokens_BLD[:, 1:].mean(dim=1).numpy(), abs=1e-6)
    assert folder.embed(encoder, images[:0]).shape == (0, 48)
    both = folder.embed(encoder, images, pooling="mean_and_deviation")
    assert np.array_equal(both[:, :48], folder.embed(encoder, images))
    assert both[:, 48:] == pytest.approx(tokens_BLD[:, 1:].numpy().std(axis=1), abs=1e-6)
    assert folder.embed(encoder, images[:0], pooling="mean_and_deviation").shape == (0, 96)
    with pytest.raises(ValueError, match="required one of mean, mean_and_deviation"):
        folder.embed(encoder, images, pooling="max")


def test_untrained_like__same_architecture_seeded_and_other_weights(tmp_path):
    write(tiny(), tmp_path)
    state = torch.random.get_rng_state()
    first, again, other = (folder.untrained_like(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "blocks.0.attn.qkv.weight"
    weights = [network.state_dict()[name] for network in (first, again, other, tiny())]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_export_onnx__agrees_with_pytorch_for_any_batch(tmp_path, images):
    encoder = tiny(fc_norm=False)
    level = logging.getLogger("torch.onnx").level
    path = folder.export_onnx(encoder, tmp_path / "model.onnx", image_size_px=32)
    assert logging.getLogger("torch.onnx").level == level
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num_images in (1, 2, 5):
        (features,) = session.run(None, {"images": images[:num_images].numpy()})
        assert features == pytest.approx(folder.embed(encoder, images[:num_images]), abs=1e-4)
    assert folder.onnx_error(path, encoder, images) < 1e-4
    assert folder.onnx_error(path, tiny(depth=1), images) > 1e-2
