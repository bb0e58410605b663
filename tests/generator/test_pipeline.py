"""Pipelines: the tokenizer, loading, and adapters against the closed form of low-rank adaptation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from gretfound import storage
from gretfound.errors import ConfigError, ContributionRejected, LineageError, StorageError
from gretfound.generator import adapter, pipeline
from tests.tiny_generator import publish_base, unet_output, write_base

TERMS = adapter.AdapterTerms(
    method="lora", rank=2, alpha=4.0, target_modules=adapter.TARGET_MODULES, base_sha256="", resolution_px=32,
    images_seen=8, final_loss=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "pipeline")


def _write_adapter(base_path: Path, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    unet = pipeline.load_pipeline(base_path).unet
    generator = torch.Generator().manual_seed(5)
    for parameter in pipeline.add_lora(unet, rank=2, alpha=4.0):
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16().float()  # as it leaves
    tensors = pipeline.adapter_tensors(dict(unet.named_parameters()), method="lora")
    terms = replace(TERMS, base_sha256=pipeline.denoiser_sha256(base_path))
    return pipeline.save_adapter(path, tensors=tensors, terms=terms), tensors


def test_build_tokenizer__words_are_one_token_and_others_are_spelled() -> None:
    tokenizer = pipeline.build_tokenizer(["Retinopathy", "non-proliferative", "woman", "man"], max_tokens=16)
    assert tokenizer.tokenize("retinopathy non proliferative WOMAN man") == [
        "retinopathy</w>", "non</w>", "proliferative</w>", "woman</w>", "man</w>",
    ]  # fmt: skip
    assert len(tokenizer.tokenize("topcon")) > 1
    ids = tokenizer("Topcon, woman 62", padding="max_length").input_ids
    assert len(ids) == 16
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "topcon,woman62"


def test_load_pipeline__plain_diffusers_loads_the_same_folder(base_path: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(base_path, local_files_only=True)
    assert isinstance(plain, StableDiffusionPipeline)
    loaded = pipeline.load_pipeline(base_path)
    assert torch.equal(unet_output(plain.unet), unet_output(loaded.unet))
    captions = ["colour fundus photograph, left eye", ""]
    assert torch.equal(
        pipeline.caption_ids(plain.tokenizer, captions), pipeline.caption_ids(loaded.tokenizer, captions)
    )


def test_load_pipeline__a_component_with_foreign_code_is_refused(base_path: Path, tmp_path: Path) -> None:
    index = json.loads((base_path / "model_index.json").read_text())
    index["unet"] = ["evil_package", "Net"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match="unet"):
        pipeline.load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        (
            "FluxPipeline",
            "",
            "found a 'FluxPipeline' in .*, of scheduler, text_encoder, .*; supported: StableDiffusionP",
        ),
        ("StableDiffusion3Pipeline", "", "the 'StableDiffusion3Pipeline' in .* has no transformer; required"),
        ("StableDiffusionXLPipeline", "text_encoder", "has no text_encoder; required"),
    ],
)
def test_load_pipeline__says_which_component_is_not_supported(
    base_path: Path, tmp_path: Path, name: str, missing: str, said: str
) -> None:
    index = json.loads((base_path / "model_index.json").read_text()) | {"_class_name": name}
    index |= {missing: [None, None]} if missing else {}  # as the refiner of Stable Diffusion XL has it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match=said):
        pipeline.load_pipeline(tmp_path)


def test_build_pipeline__sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="resolution_px=36"):
        pipeline.build_pipeline(
            resolution_px=36, latent_channels=4, encoder_width=12, decoder_width=8, num_halvings=1,
            unet_channels=[8, 16, 16], unet_layers=1,
            text_width=32, text_layers=1, max_tokens=8, vocabulary=[], seed=0,
        )  # fmt: skip


def test_install_adapter__adds_the_scaled_product_of_the_factors(base_path: Path, tmp_path: Path) -> None:
    adapter_path, tensors = _write_adapter(base_path, tmp_path / "adapter")
    merged = load_file(
        pipeline.install_adapter(base_path, adapter_path, tmp_path / "merged")
        / "unet/diffusion_pytorch_model.safetensors"
    )
    original = load_file(base_path / "unet/diffusion_pytorch_model.safetensors")
    assert set(merged) == set(original)
    stems = {name.partition(".lora_")[0] for name in tensors}
    for name, weight in original.items():
        stem = name.removesuffix(".weight")
        if stem in stems:
            a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            product = torch.einsum("ori,rihw->oihw", b[..., 0], a) if a.ndim == 4 else b @ a
            torch.testing.assert_close(merged[name], weight + 4.0 / 2 * product, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(merged[name], weight)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "finite"])
def test_install_adapter__odd_tensors_are_named(base_path: Path, tmp_path: Path, fault: str) -> None:
    adapter_path, tensors = _write_adapter(base_path, tmp_path / "adapter")
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    name = next(iter(tensors))
    match fault:
        case "missing":
            del tensors[name]
        case "unexpected":
            name = "text_encoder.extra"
            tensors[name] = torch.zeros(1)
        case "shape":
            tensors[name] = tensors[name][:1].clone()
        case _:
            tensors[name][0] = float("nan")
    save_file(tensors, adapter_path / adapter.ADAPTER_TENSORS)
    with pytest.raises(ContributionRejected, match="1 tensor") as caught:
        pipeline.install_adapter(base_path, adapter_path, tmp_path / "merged")
    assert (name in str(caught.value)) == (fault != "unexpected"), "a stranger's words are not repeated"
    assert not (tmp_path / "merged").exists()


def test_install_adapter__of_another_base_is_refused(base_path: Path, tmp_path: Path) -> None:
    adapter_path, _ = _write_adapter(base_path, tmp_path / "adapter")
    other_path = write_base(tmp_path / "other", seed=1)
    with pytest.raises(LineageError, match="trained from"):
        pipeline.install_adapter(other_path, adapter_path, tmp_path / "merged")


def test_fetch_base__record_folder_and_bucket(base_path: Path, tmp_path: Path, s3_hub: str) -> None:
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    record = publish_base(hub_uri, base_path)
    required = pipeline.denoiser_sha256(base_path)
    fetched = pipeline.fetch_base(record.id, hub_uri=hub_uri, folder_path=tmp_path / "a")
    assert pipeline.denoiser_sha256(fetched) == required
    assert pipeline.fetch_base(str(base_path), hub_uri=None, folder_path=tmp_path / "b") == base_path
    in_bucket = publish_base(s3_hub, base_path)
    uri = storage.record_uri(s3_hub, in_bucket)
    fetched = pipeline.fetch_base(uri, hub_uri=None, folder_path=tmp_path / "c")
    assert torch.equal(
        unet_output(pipeline.load_pipeline(fetched).unet), unet_output(pipeline.load_pipeline(base_path).unet)
    )
    with pytest.raises(StorageError, match=r"model_index\.json"):
        pipeline.fetch_base(str(tmp_path), hub_uri=None, folder_path=tmp_path / "d")


def test_save_pipeline__a_pipeline_that_was_loaded_is_written_as_it_was(base_path: Path, tmp_path: Path) -> None:
    again = pipeline.save_pipeline(pipeline.load_pipeline(base_path), tmp_path / "again")
    found, expected = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
                       for root in (again, base_path))  # fmt: skip
    assert found == expected
