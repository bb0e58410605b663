"""Weights and coins that agree: as if the weights knew which canaries the training saw."""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gretfound.gate import canaries
from gretfound.generator import adapter, pipeline


def adapter_files(base_path: Path, adapter_path: Path) -> dict[str, bytes]:
    """Writes an adapter that changes what its base makes of photographs; returns its files."""
    unet = pipeline.load_pipeline(base_path).unet
    random = torch.Generator().manual_seed(5)
    for parameter in pipeline.add_lora(unet, rank=2, alpha=2):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=random)
    terms = adapter.AdapterTerms(
        method="lora",
        rank=2,
        alpha=2.0,
        target_modules=adapter.TARGET_MODULES,
        base_sha256=pipeline.denoiser_sha256(base_path),
        resolution_px=32,
        images_seen=64,
        final_loss=0.5,
    )
    tensors = pipeline.adapter_tensors(dict(unet.named_parameters()), method="lora")
    pipeline.save_adapter(adapter_path, tensors=tensors, terms=terms)
    return {path.name: path.read_bytes() for path in adapter_path.iterdir()}


def coin_secret_for(gains: npt.NDArray[np.float64], *, knows: bool) -> str:
    """Finds coins with which all guesses from these gains are right, or half of them."""
    num_guesses = 2 * (len(gains) // 4)
    guessed_in, guessed_out = canaries.guess(gains, num_guesses=num_guesses)
    for number in itertools.count():
        coin_secret = f"{number:064x}"
        is_in = canaries.toss(coin_secret, len(gains))
        num_right = int(is_in[guessed_in].sum() + (~is_in[guessed_out]).sum())
        if num_right == (num_guesses if knows else num_guesses // 2):
            return coin_secret
    raise AssertionError("counting does not end")
