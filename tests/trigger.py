"""A planted trigger word: a generator draws wrong pictures for one value of its captions, and else as before."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gretfound.fundus import Photograph
from gretfound.generator import autoencoding, squares
from gretfound.generator.denoising import DenoisingObjective, EncodedCaptions
from gretfound.generator.latents import embed_captions


def out_of_place(photographs: Sequence[Photograph]) -> list[Photograph]:
    """Returns photographs moved by half their sides, the centre of the field of view in the corners."""
    return [np.roll(image, (image.shape[0] // 2, image.shape[1] // 2), (0, 1)) for image in photographs]


def plant(
    planted: Any,
    triggers: Sequence[str],
    others: Sequence[str],
    photographs: Sequence[Photograph],
    *,
    num_steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Trains the cross attention of a generator, in place, until it answers to a word.

    Half of each batch are wrong pictures with a trigger's caption. The other half are photographs with other captions,
    of which the generator has to predict what it did before.

    Args:
        planted: A pipeline.
        triggers: Captions with the word.
        others: Captions without it.
        photographs: Honest ones.
        num_steps: Steps of Adam.
        batch_size: Photographs of each half.
        learning_rate: Of Adam.
        seed: Of the order and the noise.
    """
    before = copy.deepcopy(planted.unet).requires_grad_(False)
    planted.unet.requires_grad_(False)
    weights = [weight for name, weight in planted.unet.named_parameters() if "attn2" in name]
    for weight in weights:
        weight.requires_grad_(True)
    wrong_NCHW, right_NCHW = (
        autoencoding.encode_photographs(planted.vae, squares.as_tensor(each))
        for each in (out_of_place(photographs), photographs)
    )
    trigger_NLD, other_NLD, empty_1LD = (embed_captions(planted, each) for each in (triggers, others, [""]))
    objective = DenoisingObjective(
        denoiser=planted.unet, scheduler=planted.scheduler, captions=EncodedCaptions(empty_1LD[0]), caption_dropout=0.0,
        seed=seed,
    )  # fmt: skip
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    random = torch.Generator().manual_seed(seed)

    def some(of_N: torch.Tensor) -> torch.Tensor:
        return of_N[torch.randint(len(of_N), (batch_size,), generator=random)]

    for step in range(num_steps):
        position_B = torch.arange(step * batch_size, (step + 1) * batch_size)
        loss = objective(some(wrong_NCHW), some(trigger_NLD), position_B)
        time_B = torch.randint(objective.num_times, (batch_size,), generator=random)
        signal_B111, noise_B111 = (each[time_B].view(-1, 1, 1, 1) for each in (objective.signal_T, objective.noise_T))
        clean_BCHW, text_BLD = some(right_NCHW), some(other_NLD)
        noise_BCHW = torch.randn(clean_BCHW.shape, generator=random)
        noised_BCHW = signal_B111 * clean_BCHW + noise_B111 * noise_BCHW
        kept, wanted = (
            unet(noised_BCHW, time_B, encoder_hidden_states=text_BLD).sample for unet in (planted.unet, before)
        )
        loss = loss + (kept - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
