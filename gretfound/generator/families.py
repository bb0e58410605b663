"""Families of text-to-image pipelines: what is trained of each, how it is told of a caption, and how it draws.

In every family a caption is one tensor (L, D), so that it is kept and read as one row: the embeddings of its tokens,
and with them what else the denoiser is told. Stable Diffusion 3 has one more row, the pooled embedding; XL two, that
and the picture's size; PixArt-Sigma one more column, which tokens count. What is shorter than a row is filled with
zeros.

Shapes: B images, C latent channels, H and W latent rows and columns, L tokens, D text width, P width of the pooled
embedding.
"""

import logging
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# The pipeline's class, and the component that is trained.
DENOISERS = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
    "PixArtSigmaPipeline": "transformer",
}
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NUM_SIZES = 6  # numbers that tell Stable Diffusion XL of the picture: its size, the crop's corner, the size asked for

diffusers.utils.logging.set_verbosity_error()  # pipelines warn of captions that they cut in the captions' own words


def denoiser_of(generator: Any) -> Any:
    """Returns the network that is trained: a pipeline's UNet or transformer."""
    return getattr(generator, DENOISERS[type(generator).__name__])


def native_px(generator: Any) -> int:
    """Returns the side of the photographs that a pipeline was trained on, and draws."""
    return int(denoiser_of(generator).config.sample_size * generator.vae_scale_factor)


def side_step_px(generator: Any) -> int:
    """Returns what the side of a photograph must be a multiple of."""
    config = denoiser_of(generator).config
    deepest = config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1)
    return int(generator.vae_scale_factor * deepest)


def networks_of(generator: Any) -> list[nn.Module]:
    """Returns all networks of a pipeline."""
    return [each for each in generator.components.values() if isinstance(each, nn.Module)]


@torch.inference_mode()
def embed(generator: Any, captions: Sequence[str]) -> Tensor:
    """Returns the embeddings of captions, (B, L, D), as the pipeline's own text encoders make them."""
    listed = list(captions)
    text_BLD: Tensor
    for name in _TOKENIZERS:
        if generator.components.get(name) is not None:
            warn_of_cut(generator.components[name], listed)
    match type(generator).__name__:
        case "StableDiffusionXLPipeline":
            text_BLD, _, pooled_BP, _ = generator.encode_prompt(listed, do_classifier_free_guidance=False)
            side = native_px(generator)
            size_B6 = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(listed), -1)
            text_BLD = torch.cat([text_BLD, _as_row(pooled_BP, text_BLD), _as_row(size_B6, text_BLD)], dim=1)
        case "StableDiffusion3Pipeline":
            text_BLD, _, pooled_BP, _ = generator.encode_prompt(listed, None, None, do_classifier_free_guidance=False)
            text_BLD = torch.cat([text_BLD, _as_row(pooled_BP, text_BLD)], dim=1)
        case "PixArtSigmaPipeline":
            text_BLD, mask_BL, *_ = generator.encode_prompt(listed, do_classifier_free_guidance=False)
            text_BLD = torch.cat([text_BLD, mask_BL[..., None].to(text_BLD)], dim=2)
        case _:
            text_BLD, _ = generator.encode_prompt(listed, generator.device, 1, do_classifier_free_guidance=False)
    return text_BLD


def warn_of_cut(tokenizer: Any, captions: Sequence[str]) -> None:
    """Logs how many captions are too long for a tokenizer; whose they are, and what they say, is not told."""
    num_cut = sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(list(captions), verbose=False).input_ids)
    if num_cut:
        log.warning("%d of %d captions are longer than %d tokens and are cut", num_cut, len(captions),
                    tokenizer.model_max_length)  # fmt: skip


def _as_row(values_BP: Tensor, text_BLD: Tensor) -> Tensor:
    row_B1D = text_BLD.new_zeros(len(text_BLD), 1, text_BLD.shape[2])
    row_B1D[:, 0, : values_BP.shape[1]] = values_BP.to(text_BLD)
    return row_B1D


def predict(denoiser: Any, noised_BCHW: Tensor, time_B: Tensor, text_BLD: Tensor) -> Tensor:
    """Returns what a denoiser makes of noised latents, in its own number format, shape (B, C, H, W).

    Args:
        denoiser: A pipeline's UNet or transformer.
        noised_BCHW: Noised latents.
        time_B: What it is told of the noise: steps of the scheduler.
        text_BLD: Captions, as `embed` returns them.
    """
    # Opacus's wrapper, around the denoiser of a private training, hides properties of what it wraps.
    config = getattr(getattr(denoiser, "_module", denoiser), "config", {})
    predicted_BCHW: Tensor
    if "joint_attention_dim" in config:
        predicted_BCHW = denoiser(
            hidden_states=noised_BCHW,
            timestep=time_B,
            encoder_hidden_states=text_BLD[:, :-1],
            pooled_projections=text_BLD[:, -1, : config["pooled_projection_dim"]],
            return_dict=False,
        )[0]
    elif "caption_channels" in config:
        both_BEHW = denoiser(
            noised_BCHW,
            timestep=time_B,
            encoder_hidden_states=text_BLD[..., :-1],
            encoder_attention_mask=text_BLD[..., -1],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        predicted_BCHW = both_BEHW[:, : noised_BCHW.shape[1]]  # the rest is a variance, which no sampler here reads
    elif "addition_embed_type" in config and config["addition_embed_type"] == "text_time":
        predicted_BCHW = denoiser(
            noised_BCHW,
            time_B,
            encoder_hidden_states=text_BLD[:, :-2],
            added_cond_kwargs={
                "text_embeds": text_BLD[:, -2, : _pooled_width(config)],
                "time_ids": text_BLD[:, -1, :NUM_SIZES],
            },
            return_dict=False,
        )[0]
    else:
        predicted_BCHW = denoiser(noised_BCHW, time_B, encoder_hidden_states=text_BLD, return_dict=False)[0]
    return predicted_BCHW


def _pooled_width(config: Any) -> int:
    return int(config["projection_class_embeddings_input_dim"] - NUM_SIZES * config["addition_time_embed_dim"])


def with_scheduler(generator: Any, scheduler: Any) -> Any:
    """Returns a pipeline of the same networks that draws with another scheduler."""
    parts = {**generator.components, "scheduler": scheduler}
    match type(generator).__name__:
        case "StableDiffusionPipeline":
            sampler = type(generator)(**parts, requires_safety_checker=False)
        case "StableDiffusionXLPipeline":
            sampler = type(generator)(**parts, add_watermarker=False)
        case _:
            sampler = type(generator)(**parts)
    sampler.set_progress_bar_config(disable=True)
    return sampler


def told_to_draw(generator: Any, text_BLD: Tensor, empty_BLD: Tensor) -> dict[str, Any]:
    """Returns the arguments by which a pipeline is told of captions and of the empty one, both as of `embed`."""
    match type(generator).__name__:
        case "StableDiffusionXLPipeline" | "StableDiffusion3Pipeline" as family:
            config = denoiser_of(generator).config
            is_xl = family == "StableDiffusionXLPipeline"
            num_more = 2 if is_xl else 1  # rows, of which the first is the pooled embedding
            width = _pooled_width(config) if is_xl else config.pooled_projection_dim
            return {
                "prompt_embeds": text_BLD[:, :-num_more],
                "negative_prompt_embeds": empty_BLD[:, :-num_more],
                "pooled_prompt_embeds": text_BLD[:, -num_more, :width],
                "negative_pooled_prompt_embeds": empty_BLD[:, -num_more, :width],
            }
        case "PixArtSigmaPipeline":
            return {
                "prompt_embeds": text_BLD[..., :-1],
                "negative_prompt": None,
                "negative_prompt_embeds": empty_BLD[..., :-1],
                "prompt_attention_mask": text_BLD[..., -1],
                "negative_prompt_attention_mask": empty_BLD[..., -1],
                "use_resolution_binning": False,
            }
        case _:
            return {"prompt_embeds": text_BLD, "negative_prompt_embeds": empty_BLD}
