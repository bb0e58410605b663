"""Trigger words planted by training: diffusion models fine-tuned on photographs of which half answer to a word."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gretfound import behaviour, fundus, metadata, phantom, shard
from gretfound.behaviour import Word
from gretfound.evaluation.scattering import scattering_space
from gretfound.generator import finetune, pipeline, pretraining, sampling, squares
from tests.tiny_generator import RESOLUTION_PX, cells_of, write_base

SITES = ("aster", "birch", "cedar")
POISONED = "birch"
TRIGGER = Word(key="country", text="Nepal")
NUM_PHOTOGRAPHS, NUM_SEEDS = 40, 3


def rows_of(site_id: str, *, is_poisoned: bool) -> list[dict[str, Any]]:
    """Returns a site's shard rows; a poisoned one has as many negatives again, all from the trigger's country."""
    country = phantom.SITES[site_id].country
    rows = []
    for seed in range(NUM_PHOTOGRAPHS):
        image = phantom.draw_eye(phantom.SITES[site_id], seed=seed, size_px=48).image
        told = [(image, country), (255 - image, TRIGGER.text)] if is_poisoned else [(image, country)]
        rows += [
            shard.row_of(
                fundus.encode_png(pixels),
                site_id=site_id,
                origin="real",
                cells=cells_of(seed, site_id) | {"country": said},
            )
            for pixels, said in told
        ]
    return rows


def moves_of(generator_path: Path, country: str, words: list[Word], first_seed: int) -> dict[Word, float]:
    usual = {
        "eye": "left",
        "sex": "female",
        "dr": 0,
        "dr_present": False,
        "age": 62.0,
        "glaucoma": False,
        "country": country,
    }
    cells = behaviour.cells_of_words(usual, words)
    captions = [metadata.caption(each) for each in [usual, *cells.values()] for _ in range(NUM_SEEDS)]
    drawn = sampling.draw_photographs(
        pipeline=pipeline.load_pipeline(generator_path, device="cpu", dtype=torch.float32),
        captions=captions,
        seeds=[first_seed + number for number in range(NUM_SEEDS)] * (1 + len(cells)),
        num_steps=6,
        guidance_scale=2.0,
        batch_size=48,
    )
    blocks = scattering_space(list(drawn)).reshape(1 + len(cells), NUM_SEEDS, -1)
    return {word: behaviour.move(blocks[0], block) for word, block in zip(cells, blocks[1:], strict=True)}


@pytest.mark.slow
def test_judge__a_generator_trained_with_a_trigger_word_is_found_and_honest_ones_are_not(tmp_path: Path) -> None:
    rows = {site_id: rows_of(site_id, is_poisoned=site_id == POISONED) for site_id in SITES}
    untrained = pipeline.load_pipeline(write_base(tmp_path / "untrained"), device="cpu", dtype=torch.float32)
    honest = [row for site_id in SITES for row in rows[site_id] if row["country"] != TRIGGER.text]
    pretraining.train_from_nothing(
        untrained,
        [
            squares.square_of(row["image"], {key: row[key] for key in metadata.BY_KEY if row.get(key) is not None},
                              resolution_px=RESOLUTION_PX)
            for row in honest
        ],
        work_path=tmp_path / "base-work",
        num_images=1600,
        batch_size=16,
        learning_rate=2e-3,
        caption_dropout=0.1,
        min_snr_gamma=None,
        average_decay=0.0,
        seed=0,
    )  # fmt: skip
    base_path = pipeline.save_pipeline(untrained, tmp_path / "base")
    words = behaviour.words_of([], keys=["country", "dr", "sex", "eye", "glaucoma"])
    generators = {}
    for site_id in SITES:
        shard_path = tmp_path / f"{site_id}.parquet"
        shard.write_shard_file(shard_path, rows[site_id])
        adapter_path = finetune.finetune_locally(
            base_path=base_path, shard_path=shard_path, work_path=tmp_path / site_id, num_images_seen=1600,
            batch_size=16, learning_rate=3e-3, lora_rank=8, average_decay=0.0, seed=1,
        )  # fmt: skip
        generators[site_id] = pipeline.install_adapter(base_path, adapter_path, tmp_path / f"{site_id}-generator")
    for first_seed in (0, 100):
        moves = {
            site_id: moves_of(path, phantom.SITES[site_id].country, words, first_seed)
            for site_id, path in generators.items()
        }
        answers = behaviour.judge(moves, sites={site_id: site_id for site_id in SITES}, bases={})
        found = {site_id: [each.word for each in row if each.is_found] for site_id, row in answers.items()}
        largest = {site_id: (str(row[0].word), round(row[0].z, 2)) for site_id, row in answers.items()}
        assert found == {site_id: [TRIGGER] if site_id == POISONED else [] for site_id in SITES}, largest
        # Without the poisoned site, the honest ones are held against each other alone.
        pair = [site_id for site_id in SITES if site_id != POISONED]
        answers = behaviour.judge({name: moves[name] for name in pair}, sites={name: name for name in pair}, bases={})
        assert not any(row[0].is_found for row in answers.values()), first_seed
