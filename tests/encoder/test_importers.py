"""Importers on made-up checkpoints of each layout: loaded exactly, or refused with every fault named."""

import argparse
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from gretfound.encoder.folder import write_encoder_folder
from gretfound.encoder.importers import encoder_weights, fitting_architecture, import_weights
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError

PLAIN, DINOV2 = "vit_tiny_patch16_224", "vit_small_patch14_dinov2"
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def encoder_of(seed: int, architecture: str = PLAIN, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = SIZES | {"num_classes": 0, "global_pool": "avg", "fc_norm": False} | changes
    encoder = timm.create_model(architecture, **sizes).eval()
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.1)
    return encoder


def weights_of(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def mae_checkpoint(encoder: nn.Module) -> dict[str, Any]:
    """The layout of MAE's and RETFound's pretraining: `main_pretrain.py` with `args` as argparse made them."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 48),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(48, 16),
        "decoder_norm.weight": torch.zeros(16),
        "decoder_pred.bias": torch.zeros(192),
    }
    return {
        "model": weights_of(encoder) | decoder,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "args": argparse.Namespace(model="mae_vit_large_patch16", mask_ratio=0.75),
    }


def dinov2_checkpoint(encoder: nn.Module, *, in_chunks: bool = False) -> dict[str, Any]:
    """The layout of DINOv2's and RETFound-DINOv2's training."""
    teacher = {"backbone.mask_token": torch.zeros(1, 48)}
    for name, value in weights_of(encoder).items():
        theirs = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if is_gated(encoder) else name
        theirs = theirs.replace("blocks.", "blocks.0.") if in_chunks else theirs
        teacher[f"backbone.{theirs}"] = value
    return {
        "teacher": teacher | {"dino_head.last_layer.weight_g": torch.ones(9, 1), "ibot_head.mlp.0.bias": torch.ones(4)}
    }


def is_gated(encoder: Any) -> bool:
    return "GluMlp" in type(encoder.blocks[0].mlp).__name__


def saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def assert_equal(encoder: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


GATED = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 4.0, "act_layer": nn.SiLU}


@pytest.mark.parametrize("changes", [{}, GATED], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_import_weights__dinov2_training(tmp_path: Path, changes: dict[str, Any], in_chunks: bool) -> None:
    source, target = encoder_of(1, DINOV2, **changes), encoder_of(2, DINOV2, **changes)
    assert is_gated(source) == bool(changes)
    assert import_weights(target, saved(dinov2_checkpoint(source, in_chunks=in_chunks), tmp_path)) == "DINOv2 training"
    assert_equal(target, source)


def test_import_weights__retfound_mae_with_its_arguments(tmp_path: Path) -> None:
    source, target = encoder_of(1), encoder_of(2)
    assert import_weights(target, saved(mae_checkpoint(source), tmp_path)) == "MAE"
    assert_equal(target, source)


def test_import_weights__mae_encoder_alone(tmp_path: Path) -> None:
    source, target = encoder_of(1), encoder_of(2)
    assert import_weights(target, saved({"model": weights_of(source)}, tmp_path)) == "MAE encoder"
    assert_equal(target, source)


def test_import_weights__timm_pickled_and_safetensors(tmp_path: Path) -> None:
    source = encoder_of(1)
    with_head = weights_of(source) | {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}
    save_file(with_head, tmp_path / "model.safetensors")
    for path in (saved(with_head, tmp_path), tmp_path / "model.safetensors"):
        target = encoder_of(2)
        assert import_weights(target, path) == "timm"
        assert_equal(target, source)


def test_import_weights__our_own_folder(tmp_path: Path) -> None:
    source, target = encoder_of(1), encoder_of(2)
    write_encoder_folder(source, tmp_path, architecture=PLAIN, transform=Transform(image_size_px=32))
    assert import_weights(target, tmp_path) == "gretfound encoder folder"
    assert_equal(target, source)
    assert import_weights(encoder_of(3), tmp_path / "checkpoint.pth") == "MAE encoder"


def test_import_weights__dinov2_backbone_with_registers_gives_its_own_features(tmp_path: Path) -> None:
    target = encoder_of(2, "vit_small_patch14_reg4_dinov2")
    theirs = weights_of(target)
    position = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(0))
    theirs |= {"register_tokens": theirs.pop("reg_token") + 1, "pos_embed": position, "mask_token": torch.zeros(1, 48)}
    assert import_weights(target, saved(theirs, tmp_path)) == "DINOv2 backbone"
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # DINOv2's own order: class token, positions, and only then registers between the two.
        patch = target.patch_embed(image)
        token = torch.cat([theirs["cls_token"], patch], 1) + position
        token = torch.cat([token[:, :1], theirs["register_tokens"], token[:, 1:]], 1)
        for block in target.blocks:
            token = block(token)
        torch.testing.assert_close(target.forward_features(image), target.norm(token))


def test_import_weights__positions_of_another_grid_are_interpolated_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = encoder_of(1, DINOV2, img_size=72), encoder_of(2, DINOV2)
    with caplog.at_level(logging.INFO, logger="gretfound.encoder.importers"):
        import_weights(target, saved(dinov2_checkpoint(source), tmp_path))
    assert "from a grid of 9x9 to 4x4" in caplog.text
    expected = resample_abs_pos_embed(source.pos_embed, new_size=[4, 4], num_prefix_tokens=1)
    assert torch.equal(target.pos_embed, expected)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0]), "the class token has no place in the grid"
    assert torch.equal(target.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("form", ["MAE", "DINOv2 training", "timm"])
def test_import_weights__every_fault_is_named_and_nothing_is_loaded(tmp_path: Path, form: str) -> None:
    architecture = DINOV2 if form.startswith("DINOv2") else PLAIN
    source, target = encoder_of(1, architecture), encoder_of(2, architecture)
    prefix = "backbone." if form.startswith("DINOv2") else ""
    state = {
        "MAE": mae_checkpoint(source),
        "DINOv2 training": dinov2_checkpoint(source),
        "timm": weights_of(source),
    }[form]
    weights = {"MAE": lambda: state["model"], "DINOv2 training": lambda: state["teacher"], "timm": lambda: state}[
        form
    ]()
    del weights[f"{prefix}blocks.1.attn.proj.bias"]
    del weights[f"{prefix}norm.weight"]
    weights[f"{prefix}blocks.7.attn.proj.bias"] = torch.zeros(48)
    weights[f"{prefix}blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    before = weights_of(target)
    with pytest.raises(StorageError) as caught:
        import_weights(target, saved(state, tmp_path))
    for fault in (
        "4 weight(s)",
        "missing blocks.1.attn.proj.bias",
        "missing norm.weight",
        "unexpected blocks.7.attn.proj.bias",
        "blocks.0.mlp.fc1.bias has the shape (3,), required (192,)",
        repr(form),
    ):
        assert fault in str(caught.value)
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize(
    "state",
    [{"student": {}}, {"model": {"a.weight": torch.zeros(1)}}, {"teacher": {"b.weight": torch.zeros(1)}}, {}, [1]],
    ids=["other layout", "model", "teacher", "empty", "list"],
)
def test_import_weights__no_matching_key_at_all_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(StorageError, match=r"required|missing patch_embed\.proj\.weight"):
        import_weights(encoder_of(2), saved(state, tmp_path))


def test_import_weights__a_value_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no tensors: norm\.weight"):
        import_weights(encoder_of(2), saved({"model": weights_of(encoder_of(1)) | {"norm.weight": 3}}, tmp_path))


def test_import_weights__another_formats_extras_are_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"unexpected decoder_pred\.bias"):
        import_weights(
            encoder_of(2), saved(weights_of(encoder_of(1)) | {"decoder_pred.bias": torch.zeros(3)}, tmp_path)
        )


class Ran(Exception):
    """Raised by code in a pickle."""


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("from tests.encoder.test_importers import Ran; raise Ran",)


def test_import_weights__pickled_code_is_refused(tmp_path: Path) -> None:
    state = {"model": weights_of(encoder_of(1)), "args": Code()}
    with pytest.raises(Ran):
        torch.load(saved(state, tmp_path), weights_only=False)
    with pytest.raises(StorageError, match="is not unpickled"):
        import_weights(encoder_of(2), tmp_path / "checkpoint.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(StorageError, match=r"is not unpickled|could not be read"):
        import_weights(encoder_of(2), tmp_path / "plain.pth")


def test_import_weights__a_namespace_is_allowed_only_while_reading(tmp_path: Path) -> None:
    path = saved(mae_checkpoint(encoder_of(1)), tmp_path)
    import_weights(encoder_of(2), path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"], ids=["absent", "empty", "text"])
@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
def test_import_weights__unreadable_files(tmp_path: Path, content: bytes | None, name: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match=r"could not be read|is not unpickled"):
        import_weights(encoder_of(2), tmp_path / name)


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_large_patch14_dinov2",
        "vit_base_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_large_patch16_224",
    ],
)
def test_fitting_architecture__names_timms_own(architecture: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(architecture, num_classes=0).state_dict()
    assert f"the timm architecture {architecture!r}" in fitting_architecture(weights)


def test_import_weights__says_which_architecture_would_fit(tmp_path: Path) -> None:
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 384, "num_heads": 6}
    source, target = encoder_of(1, DINOV2, **sizes, **GATED), encoder_of(2, PLAIN, **sizes)
    with pytest.raises(
        StorageError, match=r"'vit_small_patch14_dinov2' .*layer scale, SwiGLU \(timm: mlp_layer=SwiGLU"
    ):
        import_weights(target, saved(dinov2_checkpoint(source), tmp_path))


def test_encoder_weights__leaves_its_input_alone() -> None:
    state = dinov2_checkpoint(encoder_of(1, DINOV2, img_size=72))
    before = {name: value.clone() for name, value in state["teacher"].items()}
    weights, form = encoder_weights(state, encoder_of(2, DINOV2))
    assert form == "DINOv2 training" and weights["pos_embed"].shape == (1, 17, 48)
    assert state["teacher"].keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state["teacher"].items())
