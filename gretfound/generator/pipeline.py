"""Diffusers pipeline folders: building a small one, loading a trusted one, and adapters that a site may contribute.

An adapter is tensors and a few numbers, never code (`gretfound.generator.adapter`). It is held against what the trusted
pipeline implies, key by key, and merged into a copy of that pipeline. Contributed folders are never given to
`from_pretrained`.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gretfound import storage
from gretfound.errors import ConfigError, ContributionRejected, LineageError, StorageError
from gretfound.generator import autoencoding, consistency, families
from gretfound.generator.adapter import (
    ADAPTER_TENSORS,
    DENOISER_WEIGHTS,
    TARGET_MODULES,
    AdapterTerms,
    denoiser_weights,
    read_terms,
    write_terms,
)
from gretfound.lineage import Generator

_COMPONENT_LIBRARIES = ("diffusers", "transformers")
_REQUIRED = ("scheduler", "text_encoder", "tokenizer", "vae")
_DESCRIPTIONS = ("config.json", "model_index.json", "tokenizer_config.json")
ONE_FILE = "1TB"  # an adapter is bound to the digest of one file of weights
_WHENCE = ("_name_or_path", "is_local", "local_files_only")
_TOKEN_START, _TOKEN_END = "<|startoftext|>", "<|endoftext|>"

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def build_pipeline(
    *,
    resolution_px: int,
    latent_channels: int,
    encoder_width: int,
    decoder_width: int,
    num_halvings: int,
    unet_channels: Sequence[int],
    unet_layers: int,
    text_width: int,
    text_layers: int,
    max_tokens: int,
    vocabulary: Sequence[str],
    seed: int,
) -> StableDiffusionPipeline:
    """Builds an untrained text-to-image pipeline of the Stable Diffusion kind.

    Args:
        resolution_px: Side of the square photographs.
        latent_channels: Channels of the latents.
        encoder_width: Channels within the autoencoder's encoder.
        decoder_width: Channels within its decoder.
        num_halvings: How often the autoencoder halves the side.
        unet_channels: Channels of the UNet from fine to coarse; captions are attended to at all levels but the finest.
        unet_layers: Residual blocks at each resolution of the UNet.
        text_width: Width of the text encoder and of the cross-attention.
        text_layers: Transformer layers of the text encoder.
        max_tokens: Length that captions are padded or cut to.
        vocabulary: Words that become one token each; anything else is spelled out in shorter pieces.
        seed: Seeds the initial weights.

    Raises:
        ConfigError: If the sizes do not fit together.
    """
    shrink = 2**num_halvings
    deepest = shrink * 2 ** (len(unet_channels) - 1)
    if resolution_px % deepest:
        raise ConfigError(
            f"resolution_px={resolution_px} must be a multiple of {deepest}: num_halvings={num_halvings}, and "
            f"unet_channels halve the side {len(unet_channels) - 1} times more"
        )
    odd = [width for width in [*unet_channels, text_width] if width % 8]
    if odd:
        raise ConfigError(f"unet_channels and text_width must be multiples of 8; found {odd}")
    tokenizer = build_tokenizer(vocabulary, max_tokens=max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = autoencoding.build_autoencoder(
            latent_channels=latent_channels,
            encoder_width=encoder_width,
            decoder_width=decoder_width,
            num_halvings=num_halvings,
        )
        unet = UNet2DConditionModel(
            sample_size=resolution_px // shrink,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(unet_channels),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (len(unet_channels) - 1)),
            up_block_types=(*("CrossAttnUpBlock2D",) * (len(unet_channels) - 1), "UpBlock2D"),
            layers_per_block=unet_layers,
            cross_attention_dim=text_width,
            attention_head_dim=max(width // 32 for width in unet_channels) or 1,
            norm_num_groups=8,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                projection_dim=text_width,
                num_hidden_layers=text_layers,
                num_attention_heads=max(1, text_width // 32),
                max_position_embeddings=max_tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    # The linear schedule ends in noise alone, and a predicted velocity stays finite there: Stable Diffusion's own
    # schedule lets colour through, which a generator of few weights then draws as its mean (Lin et al. 2023).
    scheduler = DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tokenizer(vocabulary: Sequence[str], *, max_tokens: int) -> CLIPTokenizer:
    """Builds CLIP's byte-pair tokenizer whose merges make each word of ``vocabulary`` one token.

    Source: Sennrich et al. 2016, algorithm 1, run until no word is in more than one piece.

    Args:
        vocabulary: Words; case is ignored, and what is no letter is left out, as CLIP splits there.
        max_tokens: Length that captions are padded or cut to, with the start and end marks.
    """
    words = sorted({part.lower() for word in vocabulary for part in _letters(word)})
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words if word.isascii()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in pieces.values() for pair in itertools.pairwise(parts))
        if not pairs:
            break
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        pieces = {word: _merged(parts, merge) for word, parts in pieces.items()}
    alphabet = _byte_alphabet()
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys([*symbols, _TOKEN_START, _TOKEN_END]))
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        bos_token=_TOKEN_START,
        eos_token=_TOKEN_END,
        unk_token=_TOKEN_END,
        pad_token=_TOKEN_END,
        model_max_length=max_tokens,
    )


def _letters(word: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in word).split()


def _merged(parts: list[str], merge: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == merge:
            result[-1] += part
        else:
            result.append(part)
    return result


def _byte_alphabet() -> list[str]:
    # GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, src/encoder.py, bytes_to_unicode).
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def caption_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Returns the token ids of captions, padded and cut to the tokenizer's length; cut captions are logged.

    Returns:
        Integers of shape (len(captions), max tokens).
    """
    families.warn_of_cut(tokenizer, captions)
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids_BL: Tensor = encoded.input_ids
    return ids_BL


def save_pipeline(pipeline: DiffusionPipeline, path: Path) -> Path:
    """Writes a diffusers folder; one that is cut short is never seen under ``path``.

    Equal pipelines give equal bytes: where a pipeline was loaded from, which the libraries note, is left out.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True, max_shard_size=ONE_FILE)
    for described in (each for each in partial.rglob("*.json") if each.name in _DESCRIPTIONS):
        content = json.loads(described.read_text())
        kept = {name: value for name, value in content.items() if name not in _WHENCE}
        described.write_text(json.dumps(kept, indent=2) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    return path


def load_pipeline(
    path: Path,
    *,
    adapter_path: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """Loads a trusted diffusers folder of one of the `families` from a local disk, without network or code from it.

    Args:
        path: The folder; `fetch_base` brings one here.
        adapter_path: An adapter's folder to merge into the denoiser.
        device: Torch device.
        dtype: Floating-point type of all networks.

    Raises:
        StorageError: If the folder is no pipeline that this room supports; names the component.
        ContributionRejected: If the adapter does not fit.
    """
    family, components = _check_components(path)
    unused: dict[str, Any] = {}
    match family:
        case "StableDiffusionPipeline":
            unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        case "StableDiffusionXLPipeline":
            unused = {"add_watermarker": False}
        case "StableDiffusion3Pipeline":
            unused = dict.fromkeys({"text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"} - components)
    try:
        loaded = getattr(diffusers, family).from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=dtype, **unused
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"the pipeline folder {path} could not be loaded: {error}") from error
    if adapter_path is not None:
        _merge_adapter(families.denoiser_of(loaded), adapter_path, base_sha256=denoiser_sha256(path))
    loaded.set_progress_bar_config(disable=True)
    for network in families.networks_of(loaded):
        network.eval()
    return loaded.to(device)


def _check_components(path: Path) -> tuple[str, set[str]]:
    """Returns a folder's family and components, if every one of them can be loaded."""
    try:
        index = json.loads((path / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is no diffusers pipeline folder: model_index.json: {error}") from error
    family = str(index.get("_class_name"))
    components = {name: kind for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}
    if family not in families.DENOISERS:
        raise StorageError(
            f"found a {family!r} in {path}, of {', '.join(sorted(components))}; supported: "
            f"{', '.join(families.DENOISERS)}. How another one tells its denoiser of a caption is not known here"
        )
    if missing := sorted({*_REQUIRED, families.DENOISERS[family]} - set(components)):
        raise StorageError(
            f"the {family!r} in {path} has no {', '.join(missing)}; required for fine-tuning and drawing"
        )
    for component, (library, *_) in components.items():
        # Stable Diffusion 1.x names its safety checker so; it is not loaded.
        if library not in _COMPONENT_LIBRARIES and component != "safety_checker":
            raise StorageError(f"the component {component!r} in {path} comes from {library!r}, which is not loaded")
    return family, set(components)


def fetch_base(base: str, *, hub_uri: str | None, folder_path: Path) -> Path:
    """Brings a trusted base pipeline to the local disk.

    Args:
        base: A generator's record id in the hub; ``hf://ORG/NAME``, which is downloaded from the Hugging Face hub; an
            object-store URI of a pipeline folder; or a local folder, which is used where it is.
        hub_uri: The hub, for a record id.
        folder_path: Where downloads go.

    Raises:
        ConfigError: If a record id is given without a hub.
        StorageError: If the folder is absent or empty.
    """
    scheme, separator, rest = base.partition("://")
    if separator and scheme == "hf":
        return Path(diffusers.DiffusionPipeline.download(rest, use_safetensors=True, safety_checker=None))
    if base.startswith(f"{Generator.kind}-"):
        if hub_uri is None:
            raise ConfigError(f"the base {base!r} is a record id, which needs the hub's URI")
        return storage.fetch_folder(hub_uri, storage.read_record(hub_uri, base, Generator), folder_path / base)
    local_path = storage.local_path(base)
    if local_path is not None:
        if not (local_path / "model_index.json").is_file():
            raise StorageError(f"{local_path} is no diffusers pipeline folder: it holds no model_index.json")
        return local_path
    uris = storage.list_uris(base)
    if not uris:
        raise StorageError(f"{base} holds no objects; required a diffusers pipeline folder")
    for uri in uris:
        relative = uri.removeprefix(base.rstrip("/")).lstrip("/")
        storage.download_file(uri, folder_path / relative)
    return folder_path


def denoiser_sha256(path: Path) -> str:
    """Returns the digest of the denoiser's weights in a pipeline folder: what an adapter is bound to."""
    weights_path = denoiser_weights(path)
    if not weights_path.is_file():
        raise StorageError(
            f"{path} holds neither {' nor '.join(DENOISER_WEIGHTS)}; save the pipeline as safetensors, in one file"
        )
    return storage.sha256_of(weights_path)


def add_lora(
    denoiser: nn.Module, *, rank: int, alpha: float, target_modules: Sequence[str] = TARGET_MODULES
) -> list[nn.Parameter]:
    """Freezes a denoiser and puts trainable low-rank factors beside its matrices.

    Source: Hu et al. 2021, LoRA, section 4.1; the second factor starts at zero, so the output does not change.

    Returns:
        The trainable parameters.
    """
    denoiser.requires_grad_(False)
    targets = [name for name in target_modules if _has_module(denoiser, name)]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True), denoiser
    )
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def _has_module(denoiser: nn.Module, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in denoiser.named_modules())


def adapter_tensors(weights: Mapping[str, Tensor], *, method: str) -> dict[str, Tensor]:
    """Picks what leaves a training run: the low-rank factors, or the whole denoiser.

    Args:
        weights: A denoiser's weights by name, as they are while `add_lora` is in force.
        method: ``lora`` or ``full``.
    """
    if method == "full":
        return dict(weights)
    named = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in named.items() if ".lora_A." in name or ".lora_B." in name}


def save_adapter(path: Path, *, tensors: Mapping[str, Tensor], terms: AdapterTerms) -> Path:
    """Writes an adapter folder: tensors and terms, nothing else; one that is cut short is never seen under ``path``.

    Low-rank factors are rounded to bfloat16, here and nowhere else: the low bits of wider numbers hold nothing that the
    training means and room for what somebody else does. A whole denoiser keeps its numbers: rounding them would lose
    more than a fine-tuning changes.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = torch.bfloat16 if terms.method == "lora" else None
    leaving = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(leaving, partial / ADAPTER_TENSORS)
    write_terms(partial, terms)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    return path


def install_adapter(base_path: Path, adapter_path: Path, out_path: Path, *, is_few_step: bool = False) -> Path:
    """Merges an adapter into a copy of its base; the result is a plain diffusers folder.

    Args:
        base_path: The base.
        adapter_path: The adapter.
        out_path: The result.
        is_few_step: Whether the adapter makes a few-step student of the base, which draws with another scheduler.

    Raises:
        ContributionRejected: If a tensor is missing, unexpected, of another shape, or not finite; names it.
        LineageError: If the adapter was trained from another base.
    """
    merged = load_pipeline(base_path, adapter_path=adapter_path)
    if is_few_step:
        merged.register_modules(scheduler=consistency.few_step_scheduler(merged.scheduler))
    return save_pipeline(merged, out_path)


def _merge_adapter(denoiser: nn.Module, adapter_path: Path, *, base_sha256: str) -> None:
    terms = read_terms(adapter_path)
    if terms.base_sha256 != base_sha256:
        raise LineageError(
            f"the adapter was trained from the denoiser {terms.base_sha256[:12]}, the base given is "
            f"{base_sha256[:12]}; give the base that the site received"
        )
    tensors = _read_tensors(adapter_path / ADAPTER_TENSORS)
    if terms.method == "full":
        _check_tensors(tensors, denoiser.state_dict())
        denoiser.load_state_dict(tensors)
        return
    add_lora(denoiser, rank=terms.rank, alpha=terms.alpha, target_modules=terms.target_modules)
    factors = adapter_tensors(dict(denoiser.named_parameters()), method="lora")
    _check_tensors(tensors, factors)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(tensors[name])
    merge_lora(denoiser)


def merge_lora(denoiser: nn.Module) -> None:
    """Adds the low-rank products to the matrices and removes the factors, leaving a plain denoiser."""
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent = denoiser.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(denoiser, "peft_config"):
        del denoiser.peft_config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ContributionRejected("ADAPTER_TENSORS", f"{path.name} is no readable safetensors file") from error
    return tensors


def _check_tensors(found: Mapping[str, Tensor], required: Mapping[str, Tensor]) -> None:
    faults = [f"missing {name}" for name in sorted(set(required) - set(found))]
    if num_odd := len(set(found) - set(required)):
        faults += [f"unexpected {num_odd}"]  # their names are a stranger's words
    for name in sorted(set(found) & set(required)):
        if found[name].shape != required[name].shape:
            faults.append(f"{name} has shape {tuple(found[name].shape)}, required {tuple(required[name].shape)}")
        elif not found[name].dtype.is_floating_point or not torch.isfinite(found[name]).all():
            faults.append(f"{name} holds values that are no finite floating-point numbers")
    if faults:
        listed = "; ".join(faults[:8]) + ("; ..." if len(faults) > 8 else "")
        raise ContributionRejected("ADAPTER_TENSORS", f"{len(faults)} tensor(s) do not fit the base: {listed}")
