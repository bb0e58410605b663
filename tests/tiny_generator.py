"""The smallest real generator and site: a pipeline of a few thousand weights, and drawn photographs at the hub."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gretfound import fundus, metadata, phantom, shard, storage
from gretfound.generator import pipeline
from gretfound.lineage import Contribution, Generator, ShardSet
from tests import summaries

RESOLUTION_PX = 32


def write_base(path: Path, seed: int = 0) -> Path:
    """Writes an untrained pipeline for 32 px photographs."""
    untrained = pipeline.build_pipeline(
        resolution_px=RESOLUTION_PX,
        latent_channels=4,
        encoder_width=12,
        decoder_width=8,
        num_halvings=1,
        unet_channels=[16, 32],
        unet_layers=1,
        text_width=32,
        text_layers=1,
        max_tokens=64,
        vocabulary=metadata.caption_words(),
        seed=seed,
    )
    # diffusers starts the last convolution at random, so even an untrained pipeline reacts to its caption.
    return pipeline.save_pipeline(untrained, path)


def publish_base(hub_uri: str, path: Path) -> Generator:
    """Puts the pipeline at ``path`` into a hub."""
    record = Generator(site_id="", resolution_px=RESOLUTION_PX, num_images=0, images_seen=0, final_loss=0.0)
    return storage.publish_folder(hub_uri, path, record)


def cells_of(seed: int, site_id: str = "aster") -> dict[str, Any]:
    """Returns the metadata of a drawn eye."""
    truth = phantom.draw_eye(phantom.SITES[site_id], seed=seed, size_px=64).truth
    return {
        "patient": f"p{seed}", "eye": truth.eye, "age": float(truth.age), "sex": truth.sex, "dr": truth.dr,
        "dr_present": truth.dr > 0, "glaucoma": truth.glaucoma,
    }  # fmt: skip


def rows_of(num_images: int, site_id: str = "aster") -> list[dict[str, Any]]:
    """Returns shard rows of drawn photographs."""
    draw = partial(phantom.draw_eye, phantom.SITES[site_id], size_px=64)
    return [
        shard.row_of(
            fundus.encode_png(draw(seed=seed).image), site_id=site_id, origin="real", cells=cells_of(seed, site_id)
        )
        for seed in range(num_images)
    ]


def publish_site(
    hub_uri: str, folder_path: Path, *, num_images: int, site_id: str = "aster"
) -> tuple[Contribution, ShardSet]:
    """Puts a site's contribution of photographs into a hub, as jobs.intake does."""
    rows = rows_of(num_images, site_id)
    cells = [cells_of(seed, site_id) for seed in range(num_images)]
    summary_path = folder_path / "summary" / "metadata_summary.json"
    summary_path.parent.mkdir(parents=True)
    summary_path.write_bytes(metadata.to_bytes(summaries.summary_of(cells)))
    contribution = storage.publish_folder(
        hub_uri,
        folder_path,
        Contribution(site_id=site_id, form="images", package_sha256="0" * 64, num_images=num_images),
    )
    shard_set = ShardSet(
        parents=(contribution.id,),
        site_id=site_id,
        origin="real",
        num_images=num_images,
        shards=(shard.write_shard(hub_uri, rows),),
        rejected={},
    )
    storage.write_record(hub_uri, shard_set)
    return contribution, shard_set


def unet_output(loaded: Any, text_width: int = 32) -> torch.Tensor:
    """Returns what a UNet makes of fixed noise: equal outputs mean equal weights."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 5, text_width, generator=generator)
    with torch.inference_mode():
        output: torch.Tensor = loaded(noise, torch.tensor([10, 600]), text).sample
    return output
