"""The smallest pipeline of each family, untrained: larger relatives of that of `tests/tiny_generator.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gretfound import metadata
from gretfound.generator import pipeline
from tests import tiny_generator

SIDE = 16  # of the latents, of 32 px photographs


def _clip(kind: Any, tokenizer: Any, width: int) -> Any:
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(settings).eval()


def _tokenizer() -> Any:
    return pipeline.build_tokenizer(metadata.caption_words(), max_tokens=77)


def _autoencoder(channels: int, **more: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


def build_xl() -> StableDiffusionXLPipeline:
    """Two text encoders, of 16 and 24; the second one's pooled embedding and the picture's size are told as well."""
    tokenizer = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40, attention_head_dim=2, norm_num_groups=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
        transformer_layers_per_block=1,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4), text_encoder=_clip(CLIPTextModel, tokenizer, 16), tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, 24), tokenizer_2=tokenizer, unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def build_3() -> StableDiffusion3Pipeline:
    """A flow, by a transformer; without the third text encoder, which may be left out."""
    tokenizer = _tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=48, pooled_projection_dim=16 + 24,
        pos_embed_max_size=SIDE,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(4, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(CLIPTextModelWithProjection, tokenizer, 16), tokenizer=tokenizer,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, 24), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def build_pixart() -> PixArtSigmaPipeline:
    """A transformer that predicts a variance too, told of captions by T5."""
    letters = [(letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz,-0123456789"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    encoder = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
    ))  # fmt: skip
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder.eval(), vae=_autoencoder(4), transformer=transformer,
        scheduler=DDPMScheduler(),
    )  # fmt: skip


BUILT: dict[str, Callable[[], Any]] = {
    "StableDiffusionXLPipeline": build_xl, "StableDiffusion3Pipeline": build_3, "PixArtSigmaPipeline": build_pixart,
}  # fmt: skip


def write(family: str, path: Path) -> Path:
    """Writes the smallest pipeline of a family."""
    if family == "StableDiffusionPipeline":
        return tiny_generator.write_base(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = BUILT[family]()
        denoiser = built.transformer if hasattr(built, "transformer") else built.unet
        for weight in denoiser.parameters():  # some start at zero, and would answer to nothing
            torch.nn.init.normal_(weight, std=0.05)
    return pipeline.save_pipeline(built, path)
