"""Pictures for a report: what sites brought to the encoder's corpus, and what pretraining's decoder reconstructs."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from gretfound import fundus, metadata, shard, storage
from gretfound.encoder import folder, mae
from gretfound.evaluation.protocol import EvaluationSet, Photographs
from gretfound.evaluation.report import Reconstruction, Sample, SiteSamples
from gretfound.fundus import Photograph
from gretfound.lineage import Corpus, Encoder, ShardSet


def sample_sites(hub_uri: str, corpora: Sequence[Corpus], *, num_pictures: int) -> list[SiteSamples]:
    """Returns the first photographs of each site in the corpora, at most ``num_pictures`` of each origin."""
    shard_sets = [storage.read_record(hub_uri, parent, ShardSet) for each in corpora for parent in each.parents]
    return [
        SiteSamples(
            site_id=site_id,
            **{
                origin: tuple(itertools.islice(_samples(hub_uri, shard_sets, site_id, origin), num_pictures))
                for origin in ("real", "synthetic")
            },
        )
        for site_id in sorted({each.site_id for each in shard_sets})
    ]


def _samples(hub_uri: str, shard_sets: Sequence[ShardSet], site_id: str, origin: str) -> Iterator[Sample]:
    keys = [field.name for field in metadata.ARROW_FIELDS]
    for shard_set in shard_sets:
        for part in shard_set.shards if (shard_set.site_id, shard_set.origin) == (site_id, origin) else ():
            for row in shard.read_rows(storage.join(hub_uri, part.path), columns=["image", "prompt", *keys]):
                cells = {key: row[key] for key in keys if row[key] is not None}
                yield Sample(
                    image=fundus.decode_photograph(row["image"]), caption=row["prompt"] or metadata.caption(cells)
                )


def reconstruct_photographs(
    hub_uri: str,
    encoder: Encoder,
    evaluation_set: EvaluationSet,
    photographs: Photographs,
    *,
    num_pictures: int,
    build_objective: Callable[[Path], mae.MaskedAutoencoder],
) -> list[Reconstruction]:
    """Masks an evaluation set's first readable photographs and reconstructs them with the encoder's autoencoder.

    Where it was pretrained on crops of another size than the finished encoder takes, their middle is shown.

    Args:
        hub_uri: The hub.
        encoder: The pretrained one.
        evaluation_set: Where the photographs lie.
        photographs: The readable ones of that set.
        num_pictures: How many of them.
        build_objective: Given the encoder's folder on this machine, builds the autoencoder as its pretraining did.

    Returns:
        Nothing for an encoder that was pretrained otherwise.

    Raises:
        StorageError: If the autoencoder's weights don't fit the objective.
    """
    if mae.AUTOENCODER_NAME not in {file.path for file in encoder.files}:
        return []
    with storage.scratch_folder() as scratch:
        path = storage.fetch_folder(hub_uri, encoder, Path(scratch))
        objective = build_objective(path)
        folder.load_strictly(objective, load_file(path / mae.AUTOENCODER_NAME))
        _, transform = folder.read_encoder_folder(path)
    numbers = set(photographs.row_numbers[:num_pictures])
    originals = [
        _middle(transform.square(fundus.decode_photograph(storage.read_bytes(row.uri))), objective.image_size_px)
        for row in evaluation_set.rows
        if row.number in numbers
    ]
    pixels_BCHW = torch.from_numpy(np.stack(originals).transpose(0, 3, 1, 2).copy())
    masked, reconstructed = mae.reconstruct(objective.eval(), pixels_BCHW)
    return [
        Reconstruction(original=original, masked=masked[index], reconstruction=reconstructed[index])
        for index, original in enumerate(originals)
    ]


def _middle(square: Photograph, size_px: int) -> Photograph:
    first = (len(square) - size_px) // 2
    return square[first : first + size_px, first : first + size_px]
