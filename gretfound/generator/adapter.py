"""Adapters as tensors: what a contributed safetensors file must be, number by number, before any library loads it.

The file's header is read by this room's own parser, held against the exact set of tensors that follows from the base,
the rank and the targets, and measured. Nothing here imports torch, so that it runs in a small confined process.

Checks of a contribution (trust.md, section 4; the codes begin with their names)::

    W0  header at most as long as the required tensors need, and within the file
    W1  no key twice, as many tensors as required
    W2  exactly the required names and shapes; the numbers follow each other without holes or overlap to the file's end
    W3  every number finite
    W4  no change larger than the matrix it changes; not far from what other sites' adapters of this base do
    W5  something was learned; the singular values are spread like other sites'
    W6  no words beside the tensors
    W7  the one number format: bfloat16 for low-rank factors, the base's own for a whole denoiser

W4 and W5 are judgements: what fails them is put aside for a person to look at. All others reject.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gretfound import signing
from gretfound.errors import ContributionRejected

ADAPTER_TENSORS = "adapter.safetensors"
ADAPTER_TERMS = "adapter_config.json"
DENOISER_WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut")
MAX_RANK, MAX_ALPHA = 1024, 1e6
MAX_HEADER_BYTES = 4 * 2**20
MAX_TERMS_BYTES = 64 * 2**10
LORA_DTYPE = "BF16"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
MAX_NORM_RATIO = 1.0
MAX_ROBUST_Z = 6.0
MIN_COHORT = 8
# The least spread that a cohort is taken to have: few alike sites would make every other one an outlier.
MIN_SPREAD_LOG10, MIN_SPREAD_ENTROPY = 0.05, 0.02
_BLOCK_ITEMS = 4 * 2**20
_POWER_STEPS = 30
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AdapterTerms:
    """What an adapter says about itself; everything else follows from the base.

    ``method`` is ``lora`` (low-rank factors) or ``full`` (every tensor of the denoiser); ``base_sha256`` is the digest
    of the denoiser's weights that it was trained from.
    """

    method: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_sha256: str
    resolution_px: int
    images_seen: int
    final_loss: float


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a safetensors file: its number format, shape and place in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_items(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """A safetensors header; ``num_bytes`` counts its length field too, so the numbers begin there."""

    tensors: dict[str, Tensor]
    num_bytes: int
    has_metadata: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an adapter changes: dW is alpha / rank times the product of the factors, or new less old for a whole one.

    Attributes:
        num_matrices: Matrices that it may change.
        num_zero: Of them, those that it leaves as they are.
        norm_ratio: Largest Frobenius norm of dW over that of W.
        largest_singular_value: Of all dW.
        spectral_entropy: Mean over the changed matrices of the entropy of the squared singular values over its maximum,
            0 (one direction) to 1 (all alike); -1 where it is not measured (a whole denoiser, or rank 1).
    """

    num_matrices: int
    num_zero: int
    norm_ratio: float
    largest_singular_value: float
    spectral_entropy: float


def denoiser_weights(base_path: Path) -> Path:
    """Returns the place of the UNet's or transformer's weights in a pipeline's folder; a UNet's if it has neither."""
    found = [base_path / name for name in DENOISER_WEIGHTS if (base_path / name).is_file()]
    return (found or [base_path / DENOISER_WEIGHTS[0]])[0]


def read_terms(path: Path) -> AdapterTerms:
    """Reads what an adapter's folder says about it, strictly.

    Raises:
        ContributionRejected: ``ADAPTER_TERMS`` if it is not what `gretfound.generator.pipeline.save_adapter` writes.
    """
    try:
        with (path / ADAPTER_TERMS).open("rb") as stream:
            text = stream.read(MAX_TERMS_BYTES + 1)
        if len(text) > MAX_TERMS_BYTES:
            raise ValueError("too long")
        content = signing.parse_json(text)
    except (OSError, ValueError) as error:
        raise ContributionRejected(
            "ADAPTER_TERMS", f"{ADAPTER_TERMS} is not readable: {type(error).__name__}"
        ) from error
    return terms_from_json(content)


def write_terms(path: Path, terms: AdapterTerms) -> None:
    """Writes into an adapter's folder what it says about itself; the same terms are always the same bytes."""
    (path / ADAPTER_TERMS).write_text(json.dumps(asdict(terms), indent=2, sort_keys=True) + "\n")


def terms_from_json(content: Any) -> AdapterTerms:
    """Rebuilds an adapter's terms from their fields, of any origin.

    Raises:
        ContributionRejected: ``ADAPTER_TERMS`` if they are of the wrong kind, or not possible.
    """
    try:
        terms = AdapterTerms(**{**content, "target_modules": tuple(content["target_modules"])})
    except (TypeError, KeyError) as error:
        raise ContributionRejected(
            "ADAPTER_TERMS", f"{ADAPTER_TERMS} has other fields than this version: {type(error).__name__}"
        ) from error
    counts = (terms.rank, terms.resolution_px, terms.images_seen)
    measures = (terms.alpha, terms.final_loss)
    if (
        terms.method not in ("lora", "full")
        or any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
        or any(type(measure) not in (int, float) or not abs(measure) < 2**53 for measure in measures)  # nor NaN
        or not (isinstance(terms.base_sha256, str) and _SHA256_PATTERN.fullmatch(terms.base_sha256))
        or not all(isinstance(name, str) for name in terms.target_modules)
    ):
        raise ContributionRejected("ADAPTER_TERMS", f"{ADAPTER_TERMS} holds values of the wrong kind; train again")
    is_lora = terms.method == "lora"
    if is_lora and not (1 <= terms.rank <= MAX_RANK and 0 < terms.alpha <= MAX_ALPHA and terms.target_modules):
        raise ContributionRejected(
            "ADAPTER_TERMS",
            f"found rank {terms.rank} and alpha {terms.alpha}; at most {MAX_RANK} and {MAX_ALPHA:g} may be",
        )
    num_unknown = len(set(terms.target_modules) - set(TARGET_MODULES))
    if num_unknown or len(set(terms.target_modules)) != len(terms.target_modules):
        raise ContributionRejected(
            "ADAPTER_TERMS", f"{num_unknown} target module(s) are unknown or named twice; known: {list(TARGET_MODULES)}"
        )
    return terms


def required_tensors(terms: AdapterTerms, base: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Derives the exact set of tensors of an adapter: number format and shape by name.

    Source: Hu et al. 2021, LoRA, section 4.1, as PEFT lays it out: a matrix (out, in) gets A (rank, in) and B (out,
    rank); a convolution (out, in, height, width) gets A (rank, in, height, width) and B (out, rank, 1, 1).

    Args:
        terms: Rank and targets.
        base: The tensors of the base's denoiser.
    """
    if terms.method == "full":
        return {name: (tensor.dtype, tensor.shape) for name, tensor in base.items()}
    required = {}
    for stem, (num_out, *others) in _targets(terms, base).items():
        ones = (1,) * (len(others) - 1)
        required[f"{stem}.lora_A.weight"] = (LORA_DTYPE, (terms.rank, *others))
        required[f"{stem}.lora_B.weight"] = (LORA_DTYPE, (num_out, terms.rank, *ones))
    return required


def _targets(terms: AdapterTerms, base: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    stems = {name.removesuffix(".weight"): tensor.shape for name, tensor in base.items() if name.endswith(".weight")}
    return {
        stem: shape
        for stem, shape in stems.items()
        if len(shape) in (2, 4) and any(stem == each or stem.endswith(f".{each}") for each in terms.target_modules)
    }


def read_header(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Reads the header of a safetensors file; no more of it than ``max_bytes`` is ever in memory.

    Raises:
        ContributionRejected: ``W0_HEADER``, ``W1_DUPLICATE_KEY``, ``W2_TENSORS``, ``W2_OFFSETS`` or ``W6_METADATA``.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        num_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or num_bytes > min(max_bytes, MAX_HEADER_BYTES, size_bytes - 8):
            raise _rejected("W0_HEADER", f"the weights' header is cut or longer than the {max_bytes} bytes that may be")
        text = stream.read(num_bytes)
    try:
        content = signing.parse_json(text)
    except signing.UnreadableDocument as error:
        if error.code == "KEY_TWICE":
            raise _rejected("W1_DUPLICATE_KEY", "the weights' header has a key twice") from error
        raise _rejected("W0_HEADER", "the weights' header is not JSON") from error
    if not isinstance(content, dict):
        raise _rejected("W0_HEADER", "the weights' header is not a JSON object")
    has_metadata = "__metadata__" in content
    if has_metadata and content.pop("__metadata__") not in ({}, {"format": "pt"}):
        raise _rejected("W6_METADATA", 'found words beside the weights; required none but {"format": "pt"}')
    tensors = {name: _tensor_of(entry) for name, entry in content.items()}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.end)):
        if tensor.start != end or tensor.end - tensor.start != tensor.num_items * ITEM_BYTES[tensor.dtype]:
            raise _rejected("W2_OFFSETS", "the weights have holes, overlap, or are not as long as their shapes say")
        end = tensor.end
    if 8 + num_bytes + end != size_bytes:
        raise _rejected("W2_OFFSETS", "the weights are cut, or bytes follow them")
    return Header(tensors=tensors, num_bytes=8 + num_bytes, has_metadata=has_metadata)


def _rejected(code: str, found: str) -> ContributionRejected:
    return ContributionRejected(code, f"{found}; make the package again with gretfound-site")


def _tensor_of(entry: Any) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _rejected("W2_TENSORS", "an entry of the weights' header is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _rejected("W7_DTYPE", f"found weights in a number format that is none of {', '.join(ITEM_BYTES)}")
    are_counts = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 4
    if not are_counts or any(type(each) is not int or not 0 <= each < 2**48 for each in [*shape, *offsets]):
        raise _rejected("W2_SHAPE", "a tensor's shape or place is not of at most four counts")
    return Tensor(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def check_tensors(path: Path, required: Mapping[str, tuple[str, tuple[int, ...]]]) -> Header:
    """Makes the checks W0 to W3, W6 and W7 of a file against the exact set of tensors that it must hold.

    Raises:
        ContributionRejected: With a code of the check that did not hold. A name that does not belong is never repeated.
    """
    # An entry is its name, its format, its shape and two places; safetensors pads the whole to a multiple of eight.
    max_bytes = 256 + sum(len(name) + 160 for name in required)
    header = read_header(path, max_bytes=max_bytes)
    found = header.tensors
    if len(found) != len(required):
        raise _rejected("W1_COUNT", f"found {len(found)} tensors; required {len(required)}")
    if missing := sorted(set(required) - set(found)):
        raise _rejected("W2_TENSORS", f"{len(missing)} tensor(s) are missing, the first is {missing[0]}")
    for name, (dtype, shape) in required.items():
        if found[name].shape != shape:
            raise _rejected("W2_SHAPE", f"{name} has another shape than the required {shape}")
        if found[name].dtype != dtype:
            raise _rejected("W7_DTYPE", f"{name} holds {found[name].dtype} numbers; required {dtype}")
    with path.open("rb") as stream:
        for name, tensor in found.items():
            stream.seek(header.num_bytes + tensor.start)
            for block in _blocks(stream, tensor):
                if not np.isfinite(block).all():
                    raise _rejected("W3_NOT_FINITE", f"{name} holds numbers that are not finite")
    return header


def _blocks(stream: BinaryIO, tensor: Tensor) -> Any:
    """Yields a tensor's numbers as float32, some millions at a time."""
    remaining = tensor.num_items
    while remaining:
        count = min(remaining, _BLOCK_ITEMS)
        raw = stream.read(count * ITEM_BYTES[tensor.dtype])
        remaining -= count
        match tensor.dtype:
            case "BF16":  # the upper half of a float32
                yield (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
            case "F16":
                yield np.frombuffer(raw, "<f2").astype("<f4")
            case _:
                yield np.frombuffer(raw, "<f4")


def read_tensor(path: Path, header: Header, name: str) -> Matrix:
    """Reads one tensor as float64 of shape (first dimension, all others)."""
    tensor = header.tensors[name]
    with path.open("rb") as stream:
        stream.seek(header.num_bytes + tensor.start)
        items = np.concatenate([*_blocks(stream, tensor), np.zeros(0, np.float32)])
    return items.astype(np.float64).reshape(tensor.shape[0] if tensor.shape else 1, -1)


def measure(path: Path, header: Header, terms: AdapterTerms, base_path: Path, base: Header) -> Measured:
    """Measures what a checked adapter would change; dW itself is never formed from factors.

    The singular values of B A are those of R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A.
    """
    ratios, largest, entropies = [0.0], [0.0], []
    num_zero = num_matrices = 0
    for name, tensor in base.tensors.items():
        stem = name.removesuffix(".weight")
        is_whole = terms.method == "full" and len(tensor.shape) >= 2
        if not is_whole and f"{stem}.lora_A.weight" not in header.tensors:
            continue
        base_OI = read_tensor(base_path, base, name)
        if is_whole:
            change_OI = read_tensor(path, header, name) - base_OI
            values = np.array([_spectral_norm(change_OI)])
            norm = float(np.linalg.norm(change_OI))
        else:
            a_RI = read_tensor(path, header, f"{stem}.lora_A.weight")
            b_OR = read_tensor(path, header, f"{stem}.lora_B.weight")
            triangles = _triangle(b_OR) @ _triangle(a_RI.T).T
            values = terms.alpha / terms.rank * np.linalg.svd(triangles, compute_uv=False)
            norm = float(np.linalg.norm(values))
        num_matrices += 1
        num_zero += norm == 0
        base_norm = float(np.linalg.norm(base_OI))
        ratios.append(norm / base_norm if base_norm else (math.inf if norm else 0.0))
        largest.append(float(values[0]))
        if len(values) > 1 and norm > 0:
            shares = np.square(values / norm)
            shares = shares[shares > 0]
            entropies.append(float(-(shares * np.log(shares)).sum() / math.log(len(values))))
    return Measured(
        num_matrices=num_matrices,
        num_zero=num_zero,
        norm_ratio=min(max(ratios), 1e300),
        largest_singular_value=max(largest),
        spectral_entropy=float(np.mean(entropies)) if entropies else -1.0,
    )


def _triangle(matrix: Matrix) -> Matrix:
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _spectral_norm(change_OI: Matrix) -> float:
    direction_I = np.random.default_rng(0).standard_normal((change_OI.shape[1],))
    for _ in range(_POWER_STEPS):
        direction_I = np.asarray(change_OI.T @ (change_OI @ direction_I))
        length = float(np.linalg.norm(direction_I))
        if length == 0:
            return 0.0
        direction_I /= length
    return float(np.linalg.norm(change_OI @ direction_I))


def examine(adapter_path: Path, base_weights_path: Path) -> tuple[AdapterTerms, Measured]:
    """Makes every check of an adapter's folder that needs no other site, and measures it.

    Args:
        adapter_path: A contributed folder with `ADAPTER_TENSORS` and `ADAPTER_TERMS`.
        base_weights_path: The trusted base's denoiser as safetensors.

    Raises:
        ContributionRejected: With a code of W0 to W3, W6, W7, or ``ADAPTER_TERMS``.
    """
    terms = read_terms(adapter_path)
    base = read_header(base_weights_path)
    path = adapter_path / ADAPTER_TENSORS
    header = check_tensors(path, required_tensors(terms, base.tensors))
    return terms, measure(path, header, terms, base_weights_path, base)


def judge(measured: Measured, cohort: Sequence[Measured]) -> tuple[str, str]:
    """Makes the checks W4 and W5: returns a code and the words for it, or two empty texts.

    Args:
        measured: The adapter.
        cohort: One admitted adapter of the same base for each other site; fewer than `MIN_COHORT` are no measure.
    """
    if measured.num_zero == measured.num_matrices:
        return "W5_ZERO", f"all {measured.num_matrices} changes are zero: the adapter has learned nothing"
    if measured.norm_ratio > MAX_NORM_RATIO:
        return "W4_NORM", (
            f"found a change {measured.norm_ratio:.3g} times as large as what it changes; at most {MAX_NORM_RATIO} is "
            "plausible for a fine-tuning"
        )
    if len(cohort) < MIN_COHORT:
        return "", ""
    sizes = [math.log10(max(each.largest_singular_value, 1e-300)) for each in cohort]
    size = math.log10(max(measured.largest_singular_value, 1e-300))
    if (z := _robust_z(size, sizes, MIN_SPREAD_LOG10)) > MAX_ROBUST_Z:
        return "W4_OUTLIER", f"the largest singular value is {z:.1f} robust deviations from {len(cohort)} other sites'"
    entropies = [each.spectral_entropy for each in cohort if each.spectral_entropy >= 0]
    if measured.spectral_entropy < 0 or len(entropies) < MIN_COHORT:
        return "", ""
    if (z := _robust_z(measured.spectral_entropy, entropies, MIN_SPREAD_ENTROPY)) > MAX_ROBUST_Z:
        return "W5_ENTROPY", f"the spectral entropy is {z:.1f} robust deviations from {len(entropies)} other sites'"
    return "", ""


def _robust_z(value: float, others: Sequence[float], min_spread: float) -> float:
    # 1.4826 makes the median absolute deviation of normal numbers their standard deviation.
    centre = float(np.median(others))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(others) - centre)))
    return abs(value - centre) / max(spread, min_spread)


def measured_from_json(content: Mapping[str, Any]) -> Measured:
    """Rebuilds what was measured from its fields.

    Raises:
        ContributionRejected: If it is of another kind.
    """
    counts, measures = ("num_matrices", "num_zero"), ("norm_ratio", "largest_singular_value", "spectral_entropy")
    is_right = set(content) == {*counts, *measures}
    is_right = is_right and all(type(content[name]) is int and content[name] >= 0 for name in counts)
    is_right = is_right and all(type(content[name]) is float and math.isfinite(content[name]) for name in measures)
    if not is_right:
        raise ContributionRejected("CRASHED", "the weights were not measured; an operator has to look at the package")
    return Measured(**content)
