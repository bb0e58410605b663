"""The objective of a small variational autoencoder, and the scaling of its latents.

Shapes: B photographs, C channels, H and W pixels; N cached latents of c channels, h rows and w columns.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gretfound.generator.denoising import draw_noise


class AutoencodingObjective(nn.Module):
    """Absolute error of pixels and of their differences, with a small Kullback-Leibler term.

    The differences keep vessels, which the plain error would smooth away.

    Source: Rombach et al. 2022, appendix G (without its adversary, which a small budget does not afford).

    Args:
        vae: The autoencoder.
        edge_weight: Weight of the differences between neighbouring pixels.
        kl_weight: Weight of the divergence from a standard normal, per pixel value.
        seed: Seeds the noise on the latents.
    """

    def __init__(self, *, vae: AutoencoderKL, edge_weight: float = 0.5, kl_weight: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        self.vae = vae
        self._edge_weight, self._kl_weight, self._seed = edge_weight, kl_weight, seed

    def forward(self, photograph_BCHW: Tensor, position_B: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            photograph_BCHW: RGB in [-1, 1].
            position_B: Each photograph's position in the run, from 0.
        """
        posterior = self.vae.encode(photograph_BCHW).latent_dist
        _, _, noise_BCHW = draw_noise(self._seed, position_B, posterior.mean.shape[1:])
        drawn_BCHW = self.vae.decode(posterior.mean + posterior.std * noise_BCHW.to(posterior.mean)).sample
        error_BCHW = drawn_BCHW.float() - photograph_BCHW
        edges = error_BCHW.diff(dim=-1).abs().mean() + error_BCHW.diff(dim=-2).abs().mean()
        divergence: Tensor = posterior.kl().mean() / photograph_BCHW[0].numel()
        loss: Tensor = error_BCHW.abs().mean() + self._edge_weight * edges + self._kl_weight * divergence
        return loss


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents_Nchw: Tensor) -> None:
    """Changes an autoencoder so that each channel of its latents has mean 0 and standard deviation 1.

    The affine map goes into the 1x1 convolutions on both sides of the latents, so photographs are decoded as before and
    the folder's one ``scaling_factor`` is 1.

    Args:
        vae: The autoencoder, changed in place.
        latents_Nchw: Its unscaled latents of many photographs.
    """
    mean_c, std_c = latents_Nchw.mean(dim=(0, 2, 3)), latents_Nchw.std(dim=(0, 2, 3)).clamp(min=1e-6)
    num_channels = len(mean_c)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    # Moments are (mean, log variance): mean' = (mean - m) / s, log variance' = log variance - 2 log s.
    encode.weight[:num_channels] /= std_c.view(-1, 1, 1, 1)
    encode.bias[:num_channels] = (encode.bias[:num_channels] - mean_c) / std_c
    encode.bias[num_channels:] -= 2 * std_c.log()
    decode.bias += torch.einsum("oi,i->o", decode.weight[:, :, 0, 0], mean_c)
    decode.weight *= std_c.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.inference_mode()
def encode_photographs(vae: AutoencoderKL, photographs_BCHW: Tensor) -> Tensor:
    """Returns the scaled latents (their mean, without noise) of RGB photographs in [-1, 1]."""
    latents: Tensor = vae.encode(photographs_BCHW.to(vae.device, vae.dtype)).latent_dist.mode()
    return latents.float().cpu() * float(vae.config.scaling_factor)
