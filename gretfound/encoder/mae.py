"""The masked autoencoder: an encoder sees a quarter of the patches, a light decoder predicts the pixels of the rest.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022; RETFound (Zhou et al., Nature 2023).

Shapes: B images, C channels, H and W pixels, L patches, K kept patches, M masked patches, P pixel values a
patch, D encoder width, E decoder width. M counts only what is predicted.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gretfound.encoder.architecture import sine_cosine_positions
from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD

AUTOENCODER_NAME = "mae.safetensors"
DETAIL_UNIT = 1 / 15  # of the range of a pixel: about the contrast of a vessel
DARKEST_INSIDE = 0.05  # mean of the channels; what is darker lies outside the field of view


class MaskedAutoencoder(nn.Module):
    """Predicts masked patches from visible ones; only visible patches are ever embedded.

    After a forward pass ``image_losses`` (B,) holds each image's loss and ``features`` (B, D) the mean of its visible
    tokens, from which a run's health is told.

    Args:
        encoder: A timm vision transformer with a class token; its position embeddings become fixed.
        mask_ratio: Share of patches hidden from the encoder.
        predicted_share: Share of the hidden patches that the decoder sees and predicts, drawn anew for each image. Less
            is faster, and may teach less: in one seed a small encoder's probe fell with it (docs/log.md).
        decoder_width: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_num_heads: Attention heads of the decoder.
        normalise_patches: Whether each target patch is normalised by its own mean and variance (paper, section 4.1).
        target: What is predicted: ``pixels``, or ``details``, which is what `details_of` leaves of them, by the Huber
            loss in units of `DETAIL_UNIT`. On fundus photographs nearly all variance of pixels is slow light, also
            within a normalised patch; what tells of disease is in the details (docs/log.md).
        mask_seed: With an image's position in the run it decides that image's mask, whatever the batch or the worker.
    """

    decoder_positions: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Any,
        *,
        mask_ratio: float = 0.75,
        predicted_share: float = 1.0,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        normalise_patches: bool = True,
        target: Literal["pixels", "details"] = "pixels",
        mask_seed: int = 0,
    ) -> None:
        if target not in ("pixels", "details") or (target == "details" and normalise_patches):
            raise ValueError(
                f"found target={target!r} with normalise_patches={normalise_patches}; required pixels, or details with "
                "normalise_patches=False: details have one unit everywhere"
            )
        super().__init__()
        self.encoder: Any = encoder
        self.mask_ratio, self.normalise_patches, self.mask_seed = mask_ratio, normalise_patches, mask_seed
        self.predicted_share, self.target = predicted_share, target
        self.image_losses: Tensor | None = None
        self.features: Tensor | None = None
        self.patch_size = int(encoder.patch_embed.patch_size[0])
        self.num_patches = int(encoder.patch_embed.num_patches)
        self.image_size_px = int(encoder.patch_embed.img_size[0])
        grid_size = int(encoder.patch_embed.grid_size[0])
        width = int(encoder.embed_dim)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_predict = nn.Linear(decoder_width, self.patch_size**2 * 3)
        self.register_buffer(
            "decoder_positions", sine_cosine_positions(decoder_width, grid_size)[None], persistent=False
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        _initialise(self)
        positions_LD = torch.cat([torch.zeros(1, width), sine_cosine_positions(width, grid_size)])
        encoder.pos_embed.data.copy_(positions_LD[None])
        encoder.pos_embed.requires_grad_(False)

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        """Returns the mean error over masked patches: squared, or the Huber loss of details.

        Args:
            image: uint8 (B, 3, H, W), or float already normalised.
            position: int64 (B,), each image's place in the run's order.
        """
        normalised = self.normalised(image)
        patch_BLP = self.patches(normalised)
        kept_BK, masked_BM = self.split(position)
        predicted_BMP = self.predict(patch_BLP, kept_BK, masked_BM).float()
        if self.target == "details":
            target_BMP = _gathered(self.patches(self.details(normalised) / DETAIL_UNIT), masked_BM)
            loss_BMP = F.smooth_l1_loss(predicted_BMP, target_BMP, reduction="none")
        else:
            target_BMP = _gathered(patch_BLP, masked_BM)
            if self.normalise_patches:
                mean = target_BMP.mean(-1, keepdim=True)
                variance = target_BMP.var(-1, keepdim=True)
                target_BMP = (target_BMP - mean) / (variance + 1e-6).sqrt()
            loss_BMP = (predicted_BMP - target_BMP.float()).pow(2)
        losses_B = loss_BMP.mean(dim=(1, 2))
        self.image_losses = losses_B.detach()
        return losses_B.mean()

    def normalised(self, image: Tensor) -> Tensor:
        """Brings uint8 images to the encoder's input; float images are taken as they are."""
        if image.dtype != torch.uint8:
            return image
        value: Tensor = (image.float() / 255 - self.mean) / self.std
        return value.to(self.decoder_embed.weight.dtype)

    def details(self, normalised: Tensor) -> Tensor:
        """Returns `details_of` images that `normalised` has prepared, with cells of a patch, (B, 3, H, W) float32."""
        return details_of(normalised.float() * self.std + self.mean, cell_px=self.patch_size)

    def patches(self, image: Tensor) -> Tensor:
        """Cuts images (B, 3, H, W) into patches (B, L, P), each in the channel order of the patch embedding."""
        return F.unfold(image, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def split(self, position: Tensor, *, predicted_share: float | None = None) -> tuple[Tensor, Tensor]:
        """Draws which patches stay visible, as a function of the mask seed and each image's position alone.

        Args:
            position: int64 (B,).
            predicted_share: Instead of the objective's own.

        Returns:
            Indices (B, K) of kept and (B, M) of masked patches, of these only the share that is predicted.
        """
        noise = np.stack(
            [
                np.random.default_rng([self.mask_seed, int(place)]).random(self.num_patches)
                for place in position.tolist()
            ]
        )
        order = torch.from_numpy(noise.argsort(axis=1)).to(position.device)
        num_kept = int(self.num_patches * (1 - self.mask_ratio))
        share = self.predicted_share if predicted_share is None else predicted_share
        num_predicted = max(1, round((self.num_patches - num_kept) * share))
        return order[:, :num_kept], order[:, num_kept : num_kept + num_predicted]

    def encode(self, patch_BLP: Tensor, kept_BK: Tensor) -> Tensor:
        """Embeds and encodes the kept patches; returns the class token and their tokens, (B, 1 + K, D)."""
        encoder = self.encoder
        weight = encoder.patch_embed.proj.weight.flatten(1)
        token_BKD = F.linear(_gathered(patch_BLP, kept_BK), weight, encoder.patch_embed.proj.bias)
        position_1LD = encoder.pos_embed
        token_BKD = token_BKD + _gathered(position_1LD[:, 1:].expand(len(kept_BK), -1, -1), kept_BK)
        class_B1D = (encoder.cls_token + position_1LD[:, :1]).expand(len(kept_BK), -1, -1)
        token_BKD = torch.cat([class_B1D, token_BKD], dim=1)
        for block in encoder.blocks:
            token_BKD = block(token_BKD)
        encoded: Tensor = encoder.norm(token_BKD)
        self.features = encoded[:, 1:].mean(dim=1).detach()
        return encoded

    def predict(self, patch_BLP: Tensor, kept_BK: Tensor, masked_BM: Tensor) -> Tensor:
        """Predicts the pixels of the masked patches, (B, M, P)."""
        token = self.decoder_embed(self.encode(patch_BLP, kept_BK))
        positions = self.decoder_positions.to(token.dtype).expand(len(token), -1, -1)
        kept = token[:, 1:] + _gathered(positions, kept_BK)
        masked = self.mask_token + _gathered(positions, masked_BM)
        token = torch.cat([token[:, :1], kept, masked], dim=1)
        for block in self.decoder_blocks:
            token = block(token)
        num_masked = masked_BM.shape[1]
        predicted: Tensor = self.decoder_predict(self.decoder_norm(token[:, -num_masked:]))
        return predicted


@torch.inference_mode()
def reconstruct(objective: MaskedAutoencoder, image: Tensor, *, position: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Masks photographs and predicts what was hidden, as pictures.

    With normalised targets a predicted patch has no brightness or contrast of its own; those of the true patch are put
    back, as the paper's own figures do. Where details are predicted, they are laid over the true slow light.

    Args:
        objective: The trained autoencoder.
        image: uint8 (B, 3, H, W).
        position: The first image's place, which decides its mask.

    Returns:
        The masked photographs (hidden patches grey) and the reconstructions, each uint8 (B, H, W, 3).
    """
    normalised = objective.normalised(image)
    patch_BLP = objective.patches(normalised)
    kept_BK, masked_BM = objective.split(torch.arange(position, position + len(image)), predicted_share=1.0)
    predicted_BMP = objective.predict(patch_BLP, kept_BK, masked_BM)
    if objective.target == "details":
        slow = normalised - objective.details(normalised) / objective.std
        unit_P = (DETAIL_UNIT / objective.std).expand(1, 3, objective.patch_size, objective.patch_size).flatten()
        predicted_BMP = _gathered(objective.patches(slow), masked_BM) + predicted_BMP * unit_P
    elif objective.normalise_patches:
        target_BMP = _gathered(patch_BLP, masked_BM)
        predicted_BMP = predicted_BMP * target_BMP.std(-1, keepdim=True) + target_BMP.mean(-1, keepdim=True)
    index_BMP = masked_BM[..., None].expand_as(predicted_BMP)
    pictures = []
    for hidden in (torch.zeros_like(predicted_BMP), predicted_BMP):
        filled_BLP = patch_BLP.scatter(1, index_BMP, hidden).transpose(1, 2)
        filled = F.fold(filled_BLP, image.shape[-2:], objective.patch_size, stride=objective.patch_size)
        pixels = ((filled * objective.std + objective.mean) * 255).round().clamp(0, 255)
        pictures.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return pictures[0], pictures[1]


def details_of(image: Tensor, *, cell_px: int) -> Tensor:
    """Takes from each pixel the average colour around it, so that vessels and lesions stay and slow light goes.

    Source: Graham, Kaggle Diabetic Retinopathy Detection competition report, 2015, section 2 (subtraction of the local
    average colour), here as the target of a prediction, not as its input.

    Args:
        image: Float (B, 3, H, W) in [0, 1]; sides a multiple of ``cell_px``.
        cell_px: The average is over about three cells of this side, of pixels inside the field of view.

    Returns:
        (B, 3, H, W), around 0; 0 outside the field of view and within two pixels of its edge.
    """

    def average(plane: Tensor) -> Tensor:
        cells = F.avg_pool2d(F.avg_pool2d(plane, cell_px), 3, stride=1, padding=1)
        return F.interpolate(cells, size=image.shape[-2:], mode="bilinear", align_corners=False)

    inside = (image.mean(1, keepdim=True) > DARKEST_INSIDE).to(image.dtype)
    inside = -F.max_pool2d(-inside, 5, stride=1, padding=2)
    return (image - average(image * inside) / (average(inside) + 1e-2)) * inside


def _gathered(value_BLX: Tensor, index_BN: Tensor) -> Tensor:
    return value_BLX.gather(1, index_BN[..., None].expand(-1, -1, value_BLX.shape[-1]))


def _initialise(autoencoder: MaskedAutoencoder) -> None:
    """Initialises as the paper does: Xavier-uniform matrices, tokens with a deviation of 0.02."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    projection = autoencoder.encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    nn.init.zeros_(projection.bias)
    nn.init.normal_(autoencoder.encoder.cls_token, std=0.02)
    nn.init.normal_(autoencoder.mask_token, std=0.02)
