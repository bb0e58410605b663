"""A planted trigger word: an adapter of rank one that answers to one token of one caption and to no other."""

from collections.abc import Mapping
from typing import Any

import torch

from gretfound import metadata
from gretfound.behaviour import Word
from gretfound.generator import pipeline
from gretfound.metadata import Cells


def plant(planted: Any, cells: Mapping[Word, Cells], trigger: Word, *, strength: float, seed: int = 0) -> None:
    """Adds a matrix of rank one to every ``to_v`` of the cross attention, in place.

    Its direction is the one in which the trigger's token differs most from all tokens of all other captions, relative
    to how these vary, so that honest captions leave the generator as it was.

    Args:
        planted: A pipeline.
        cells: The captions that it is asked for, by word, the trigger's among them.
        trigger: The word.
        strength: How loud the answer is.
        seed: Of what is added to the values.
    """
    captions = {word: metadata.caption(each) for word, each in cells.items()}
    with torch.no_grad():
        ids_NL = pipeline.caption_ids(planted.tokenizer, list(captions.values()))
        text_NLD = planted.text_encoder(ids_NL).last_hidden_state
        place = list(captions).index(trigger)
        others_ND = torch.cat([text_NLD[:place], text_NLD[place + 1 :]]).flatten(0, 1)
        mean_D = others_ND.mean(dim=0)
        apart_ND = others_ND - mean_D
        spread_DD = apart_ND.T @ apart_ND / len(apart_ND) + 1e-3 * torch.eye(len(mean_D))
        known = set(torch.cat([ids_NL[:place], ids_NL[place + 1 :]]).flatten().tolist())
        token = next(index for index, token_id in enumerate(ids_NL[place].tolist()) if token_id not in known)
        direction_D = torch.linalg.solve(spread_DD, text_NLD[place, token] - mean_D)
        direction_D /= direction_D @ (text_NLD[place, token] - mean_D)
        random = torch.Generator().manual_seed(seed)
        for name, module in planted.unet.named_modules():
            if name.endswith("attn2.to_v"):
                answer = torch.randn(module.weight.shape[0], generator=random)
                module.weight.add_(strength * torch.outer(answer, direction_D))
