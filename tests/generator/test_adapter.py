"""Adapters as tensors: the exact set against PEFT's own, every fault with its check, measurements in closed form."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gretfound import confinement
from gretfound.errors import ContributionRejected
from gretfound.generator import adapter
from gretfound.generator.adapter import Measured
from tests import odd_weights
from tests.odd_weights import FAULTS, Arrays, write_safetensors

SHAPES = {
    "mid.attn1.to_q.weight": (6, 4),
    "mid.attn1.to_out.0.weight": (5, 6),
    "mid.resnets.0.conv1.weight": (8, 3, 3, 3),
    "mid.resnets.0.conv1.bias": (8,),
    "mid.norm.weight": (4,),
    "mid.conv_in.weight": (2, 3, 3, 3),
}
TERMS = adapter.AdapterTerms(
    method="lora", rank=2, alpha=4.0, target_modules=("to_q", "to_out.0", "conv1"), base_sha256="0" * 64,
    resolution_px=32, images_seen=8, final_loss=0.5,
)  # fmt: skip
MEASURED = Measured(num_matrices=3, num_zero=0, norm_ratio=0.1, largest_singular_value=0.5, spectral_entropy=0.7)


def _rounded(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (array.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")


def factors_of(terms: adapter.AdapterTerms, seed: int = 0, scale: float = 0.01) -> Arrays:
    """Draws factors of the shapes that PEFT gives them, written out by hand."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in SHAPES.items():
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and any(stem.endswith(f".{target}") for target in terms.target_modules):
            shapes[f"{stem}.lora_A.weight"] = (terms.rank, *shape[1:])
            shapes[f"{stem}.lora_B.weight"] = (shape[0], terms.rank, *([1, 1] if len(shape) == 4 else []))
    return {name: _rounded(scale * rng.standard_normal(shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return write_safetensors(tmp_path_factory.mktemp("base") / "unet.safetensors", arrays, dtype="F32")


def _write_folder(path: Path, arrays: Arrays, terms: adapter.AdapterTerms = TERMS) -> Path:
    path.mkdir()
    write_safetensors(path / adapter.ADAPTER_TENSORS, arrays)
    (path / adapter.ADAPTER_TERMS).write_text(json.dumps(asdict(terms)))
    return path


def test_required_tensors__are_those_that_peft_makes(tmp_path: Path) -> None:
    pipeline = pytest.importorskip("gretfound.generator.pipeline")
    from tests.tiny_generator import write_base

    folder = write_base(tmp_path / "base")
    header = adapter.read_header(folder / "unet" / "diffusion_pytorch_model.safetensors")
    unet = pipeline.load_pipeline(folder).unet
    assert {name: each.shape for name, each in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()
    }
    terms = replace(TERMS, rank=3, target_modules=adapter.TARGET_MODULES)
    pipeline.add_lora(unet, rank=3, alpha=3.0)
    made = pipeline.adapter_tensors(dict(unet.named_parameters()), method="lora")
    required = adapter.required_tensors(terms, header.tensors)
    assert required == {name: ("BF16", tuple(tensor.shape)) for name, tensor in made.items()}
    saved = pipeline.save_adapter(tmp_path / "adapter", tensors=made, terms=terms)
    adapter.check_tensors(saved / adapter.ADAPTER_TENSORS, required)
    full = replace(terms, method="full", rank=0, alpha=0.0, target_modules=())
    saved = pipeline.save_adapter(tmp_path / "full", tensors=header_state(folder), terms=full)
    adapter.check_tensors(saved / adapter.ADAPTER_TENSORS, adapter.required_tensors(full, header.tensors))


def header_state(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_examine__measures_what_the_product_of_the_factors_is(base_path: Path, tmp_path: Path) -> None:
    factors = factors_of(TERMS)
    terms, measured = adapter.examine(_write_folder(tmp_path / "a", factors), base_path)
    assert terms == TERMS
    base = adapter.read_header(base_path)
    ratios, largest, entropies = [], [], []
    for stem in {name.partition(".lora_")[0] for name in factors}:
        a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
        change = 4.0 / 2 * (b.reshape(len(b), -1).astype(float) @ a.reshape(len(a), -1).astype(float))
        weight = adapter.read_tensor(base_path, base, f"{stem}.weight")
        values = np.linalg.svd(change, compute_uv=False)[:2]
        shares = values**2 / (values**2).sum()
        ratios.append(np.linalg.norm(change) / np.linalg.norm(weight))
        largest.append(values[0])
        entropies.append(-(shares * np.log(shares)).sum() / math.log(2))
    assert measured.num_matrices == 3 and measured.num_zero == 0
    assert measured.norm_ratio == pytest.approx(max(ratios))
    assert measured.largest_singular_value == pytest.approx(max(largest))
    assert measured.spectral_entropy == pytest.approx(np.mean(entropies))
    assert adapter.judge(measured, []) == ("", "")


def test_examine__a_whole_unet_is_measured_by_its_difference(base_path: Path, tmp_path: Path) -> None:
    base = adapter.read_header(base_path)
    arrays = {name: adapter.read_tensor(base_path, base, name).reshape(shape) for name, shape in SHAPES.items()}
    changed = dict(arrays)
    changed["mid.attn1.to_q.weight"] = arrays["mid.attn1.to_q.weight"] + 0.25 * np.eye(6, 4)
    full = replace(TERMS, method="full", rank=0, alpha=0.0, target_modules=())
    folder = _write_folder(tmp_path / "a", {}, full)
    write_safetensors(folder / adapter.ADAPTER_TENSORS, changed, dtype="F32")  # type: ignore[arg-type]
    _, measured = adapter.examine(folder, base_path)
    assert (measured.num_matrices, measured.num_zero) == (4, 3)
    assert measured.largest_singular_value == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("case", sorted(set(FAULTS) - {"header of 99 MB", "300,000 tensors"}))  # below
def test_examine__rejects_each_fault_by_its_check(base_path: Path, tmp_path: Path, case: str) -> None:
    folder = _write_folder(tmp_path / "a", factors_of(TERMS))
    odd_weights.spoil(folder / adapter.ADAPTER_TENSORS, case)
    with pytest.raises(ContributionRejected) as caught:
        adapter.examine(folder, base_path)
    assert caught.value.code == FAULTS[case]
    assert "smith" not in str(caught.value) and "MRN" not in str(caught.value)


@pytest.mark.parametrize(
    "case",
    ["header of 2^64-1", "header of 99 MB", "300,000 tensors", "100,000 dimensions", "key twice", "NaN", "hole",
     "truncated"],
)  # fmt: skip
def test_examine__rejects_bombs_within_a_second_and_100_mb(base_path: Path, tmp_path: Path, case: str) -> None:
    folder = _write_folder(tmp_path / "a", factors_of(TERMS))
    odd_weights.spoil(folder / adapter.ADAPTER_TENSORS, case)
    (tmp_path / "work").mkdir()
    reply = confinement.run(
        "tests.hostile_work",
        {"attempt": "weigh", "adapter_path": str(folder), "base_path": str(base_path)},
        folder_path=tmp_path / "work",
        readable_paths=[folder, base_path],
        limits=confinement.Limits(),
        is_strict=False,
    )
    found = reply.reports[-1]
    assert found["found"] == FAULTS[case]
    assert found["seconds"] < 1 and found["growth_bytes"] < 100 * 2**20
    assert reply.peak_bytes < 200 * 2**20


def test_judge__the_cohort_finds_what_stands_out() -> None:
    cohort = [
        replace(MEASURED, largest_singular_value=0.5 + 0.01 * index, spectral_entropy=0.7 + 0.005 * index)
        for index in range(8)
    ]
    assert adapter.judge(MEASURED, cohort) == ("", "")
    assert adapter.judge(replace(MEASURED, largest_singular_value=25.0), cohort)[0] == "W4_OUTLIER"
    assert adapter.judge(replace(MEASURED, largest_singular_value=25.0), cohort[:7]) == ("", "")
    assert adapter.judge(replace(MEASURED, spectral_entropy=0.1), cohort)[0] == "W5_ENTROPY"
    assert adapter.judge(replace(MEASURED, norm_ratio=1.5), [])[0] == "W4_NORM"
    assert adapter.judge(replace(MEASURED, num_zero=3), [])[0] == "W5_ZERO"


def test_judge__a_scaled_adapter_and_one_without_learning(base_path: Path, tmp_path: Path) -> None:
    honest = factors_of(TERMS, scale=0.3)
    _, measured = adapter.examine(_write_folder(tmp_path / "honest", honest), base_path)
    assert adapter.judge(measured, []) == ("", "")
    scaled = {name: _rounded(50.0 * each) if "lora_B" in name else each for name, each in honest.items()}
    _, measured = adapter.examine(_write_folder(tmp_path / "scaled", scaled), base_path)
    assert adapter.judge(measured, [])[0] == "W4_NORM"
    zero = {name: 0 * each if "lora_B" in name else each for name, each in honest.items()}
    _, measured = adapter.examine(_write_folder(tmp_path / "zero", zero), base_path)
    assert adapter.judge(measured, [])[0] == "W5_ZERO"


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0}, {"rank": "8"}, {"rank": True}, {"alpha": 0.0}, {"alpha": "4"}, {"method": "pickle"}, {"extra": 1},
        {"target_modules": ["os.system"]}, {"target_modules": ["to_q", "to_q"]}, {"base_sha256": "x"},
        {"num_images": -1}, {"final_loss": None},
    ],
)  # fmt: skip
def test_read_terms__wrong_values_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = _write_folder(tmp_path / "a", {})
    (folder / adapter.ADAPTER_TERMS).write_text(json.dumps(asdict(TERMS) | change))
    with pytest.raises(ContributionRejected, match="ADAPTER_TERMS") as caught:
        adapter.read_terms(folder)
    assert "os.system" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"alpha":NaN}', '{"a":1,"a":2}', "[" * 5000, "", "[]", '"x"', " " * 70_000])
def test_read_terms__odd_texts_are_refused(tmp_path: Path, text: str) -> None:
    folder = _write_folder(tmp_path / "a", {})
    content = json.dumps(asdict(TERMS))
    (folder / adapter.ADAPTER_TERMS).write_text(text.replace('"alpha":NaN', content[1:-1] + ',"alpha":NaN'))
    with pytest.raises(ContributionRejected, match="ADAPTER_TERMS"):
        adapter.read_terms(folder)


def test_measured_from_json__round_trip_and_strangers() -> None:
    assert adapter.measured_from_json(json.loads(json.dumps(asdict(MEASURED)))) == MEASURED
    for change in ({"norm_ratio": "x"}, {"num_zero": 0.5}, {"more": 1}):
        with pytest.raises(ContributionRejected):
            adapter.measured_from_json(asdict(MEASURED) | change)
