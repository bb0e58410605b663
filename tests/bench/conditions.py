"""Conditions: whether a generator draws what its captions ask for, at a drawn site with two attributes that show.

It has two cameras, one of which cuts the field of view at top and bottom and tints it, and patients of two groups,
whose pigment darkens the background. A small base is trained on other drawn people and fine-tuned on the site's
photographs, with captions of what the site releases; the matching room asks for photographs. A grader of each
attribute, the house probe on scattering features and thumbnails, is fitted on the photographs that were trained on, its
accuracy measured on those of other patients; what it says of a drawn photograph is held against what was asked for. The
grader sees all of them as the generator's autoencoder gives them back, since every drawn photograph comes through it.
Leaves runs/bench/conditions.png: drawn photographs by what was asked for, and real ones beside them. A run that was
broken off goes on where it was; delete runs/bench/conditions to begin anew. `make bench` alone leaves it out;
`tests/generator/test_conditions.py` asserts what it measures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from scipy import stats

from gretfound import disclosure, fundus, matching, metadata, phantom, shard
from gretfound.evaluation import features, probe
from gretfound.fundus import Photograph
from gretfound.generator import autoencoding, finetune, pipeline, pretraining, sampling, squares
from gretfound.metadata import Cells, MetadataSummary
from tests.bench.outcome import FOLDER, Ratio, Row, write

NUM_THREADS = 2
SIDE_PX, DRAWN_PX = 32, 64
ROUND = replace(
    phantom.SITES["aster"], name="conditions", ethnicities=(("White", 0.55, 0.1), ("Black", 0.45, 0.9)), colour_sd=0.05,
    both_eyes_share=0.0,  # so that photographs are as many as patients
)  # fmt: skip
CUT = replace(ROUND, camera="Kowa VX-10alpha", colour=(0.66, 0.36, 0.10), frame_height=0.8, fov_fill=0.95)
CUT_SHARE = 0.4
NUM_BASE, NUM_TRAINED, NUM_HELD_OUT, NUM_DRAWN, NUM_CAPTIONS = 160, 320, 120, 160, 4000
NETWORKS: dict[str, Any] = {
    "resolution_px": SIDE_PX, "latent_channels": 16, "encoder_width": 48, "decoder_width": 24, "num_halvings": 2,
    "unet_channels": [32, 64], "unet_layers": 1, "text_width": 64, "text_layers": 1, "max_tokens": 48,
}  # fmt: skip
BASE_IMAGES, TUNED_IMAGES, BATCH = 1600, 8000, 32
NUM_STEPS, GUIDANCE = 12, 2.0
INVERSE_PENALTIES = (1e-2,)
ATTRIBUTES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "camera that cuts": lambda cells: cells["camera"] == CUT.camera,
    "dark background": lambda cells: cells["ethnicity"] == "Black",
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often a grader says of drawn photographs what was asked for.

    ``low`` and ``high`` are Wilson's 95% interval; ``chance`` is what a grader would reach that says each answer as
    often and does not look; ``shuffled`` is the agreement with what was asked for in another order, with its interval.
    """

    attribute: str
    accuracy: float
    agreement: float
    low: float
    high: float
    chance: float
    shuffled: float
    shuffled_low: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured; ``p_values`` are of chi-square tests of the drawn cells against each released table."""

    agreements: Sequence[Agreement]
    p_values: Mapping[str, float]
    picture_path: Path


def main() -> None:
    """Measures and writes runs/bench/conditions.json and the picture."""
    torch.set_num_threads(NUM_THREADS)
    found = measure(FOLDER / "conditions", FOLDER / "conditions.png")
    rows, ratios = [], []
    for each in found.agreements:
        rows += [
            Row(f"{each.attribute}: grader's accuracy on {NUM_HELD_OUT} other patients", each.accuracy, "share"),
            Row(f"{each.attribute}: agreement of {NUM_DRAWN} drawn photographs", each.agreement, "share"),
            Row(f"{each.attribute}: 95% interval, lower end", each.low, "share"),
            Row(f"{each.attribute}: 95% interval, upper end", each.high, "share"),
            Row(f"{each.attribute}: chance", each.chance, "share"),
            Row(f"{each.attribute}: agreement with shuffled captions", each.shuffled, "share"),
        ]
        ratios += [
            Ratio(f"{each.attribute}: lower end over chance", each.low / each.chance, "> 1"),
            Ratio(f"{each.attribute}: shuffled, lower end over chance", each.shuffled_low / each.chance, "<= 1"),
        ]
    rows += [Row(f"drawn {name} against the released table", value, "p") for name, value in found.p_values.items()]
    ratios += [Ratio("least p of a table over 0.001", min(found.p_values.values()) / 1e-3, ">= 1")]
    write("conditions", rows, ratios, cpus=NUM_THREADS)
    print(f"  -> {found.picture_path}")


def measure(folder_path: Path, picture_path: Path) -> Findings:
    """Trains the generator, asks, draws and grades; writes the picture."""
    site = eyes(ROUND, NUM_TRAINED + NUM_HELD_OUT, seed=1, other=CUT)
    trained, held_out = site[:NUM_TRAINED], site[NUM_TRAINED:]
    policy = disclosure.read_policy("demonstration")
    rows = [cells for _, cells in trained]
    summary = disclosure.release(rows, policy=policy).summary
    captioned = disclosure.caption_rows(rows, summary, policy=policy)
    generator = train([image for image, _ in trained], captioned, folder_path)
    asked = [each for each in draw_cells(summary) if "camera" in each and "ethnicity" in each][:NUM_DRAWN]
    drawn = list(
        sampling.draw_photographs(
            pipeline=generator,
            captions=[metadata.caption(cells) for cells in asked],
            seeds=range(len(asked)),
            num_steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
            batch_size=40,
        )
    )
    real = [given_back(generator, [image for image, _ in each]) for each in (trained, held_out)]
    paint(picture_path, asked, drawn, rows, real[0])
    feature_ND, feature_HD, feature_DD = (space(each) for each in (*real, drawn))
    agreements = []
    for name, holds in ATTRIBUTES.items():
        said = probe.linear_scores(
            feature_ND,
            np.array([holds(cells) for cells in rows], np.int64),
            np.arange(len(rows)),
            np.concatenate([feature_HD, feature_DD]),
            num_classes=2,
            seed=0,
            inverse_penalties=INVERSE_PENALTIES,
        ).argmax(axis=1)
        truth_H = np.array([holds(cells) for _, cells in held_out])
        asked_D = np.array([holds(cells) for cells in asked])
        agreements.append(agreement(name, truth_H == said[: len(truth_H)], asked_D, said[len(truth_H) :] == 1))
    return Findings(agreements=agreements, p_values=compare_tables(summary), picture_path=picture_path)


def eyes(
    site: phantom.PhantomSite, num_images: int, *, seed: int, other: phantom.PhantomSite | None = None
) -> list[tuple[Photograph, Cells]]:
    """Draws photographs, cut to squares, and their metadata; some with the camera of ``other``."""
    found = []
    for patient, eye in phantom.list_eyes(site, num_images=num_images, seed=seed):
        taken = other if other and np.random.default_rng(patient).random() < CUT_SHARE else site
        drawn = phantom.draw_eye(taken, seed=patient, size_px=DRAWN_PX, eye=eye)
        truth = drawn.truth
        cells: Cells = {"patient": f"p{patient}", "sex": truth.sex, "dr": truth.dr, "dr_present": truth.dr > 0}
        cells |= {"ethnicity": truth.ethnicity, "camera": taken.camera}
        found.append((fundus.to_square(drawn.image, fundus.find_field_of_view(drawn.image), SIDE_PX), cells))
    return found


def train(photographs: Sequence[Photograph], captioned: Sequence[Cells], folder_path: Path) -> StableDiffusionPipeline:
    """Trains a base on other people and fine-tunes it on the site's photographs."""
    shared: dict[str, Any] = {"batch_size": BATCH, "caption_dropout": 0.1, "min_snr_gamma": None, "seed": 0}
    base_path = folder_path / "base"
    if not base_path.is_dir():
        others = [
            squares.square_of(fundus.encode_png(image), cells, resolution_px=SIDE_PX)
            for image, cells in eyes(phantom.SITES["public"], NUM_BASE, seed=0)
        ]
        words = [*metadata.caption_words(), *ROUND.camera.split(), *CUT.camera.split(), "White", "Black"]
        base = pipeline.build_pipeline(**NETWORKS, vocabulary=words, seed=0)
        pretraining.train_from_nothing(
            base,
            others,
            work_path=folder_path / "base_work",
            num_images=BASE_IMAGES,
            learning_rate=2e-3,
            average_decay=0.99,
            **shared,
        )
        pipeline.save_pipeline(base, base_path)
    shard.write_shard_file(
        folder_path / "site.parquet",
        [
            shard.row_of(fundus.encode_png(image), site_id=ROUND.name, origin="real", cells=cells)
            for image, cells in zip(photographs, captioned, strict=True)
        ],
    )
    adapter_path = finetune.finetune_locally(
        base_path=base_path,
        shard_path=folder_path / "site.parquet",
        work_path=folder_path / "work",
        num_images_seen=TUNED_IMAGES,
        learning_rate=1.5e-3,
        method="full",
        warmup_images=TUNED_IMAGES // 20,
        average_decay=0.995,
        checkpoint_every_images=TUNED_IMAGES // 8,
        **shared,
    )
    return pipeline.load_pipeline(base_path, adapter_path=adapter_path)


def draw_cells(summary: MetadataSummary) -> list[Cells]:
    """Draws what photographs are asked for."""
    return matching.draw_cells(matching.fit_groups(summary, balance={}), num=NUM_CAPTIONS, seed=3)


def given_back(generator: StableDiffusionPipeline, photographs: Sequence[Photograph]) -> list[Photograph]:
    """Returns photographs after the generator's autoencoder."""
    latents_BCHW = autoencoding.encode_photographs(generator.vae, squares.as_tensor(photographs))
    with torch.inference_mode():
        decoded_BCHW = generator.vae.decode(latents_BCHW / generator.vae.config.scaling_factor).sample
    pixels = ((decoded_BCHW.clamp(-1, 1) + 1) * 127.5 + 0.5).byte()
    return list(pixels.permute(0, 2, 3, 1).numpy())


def space(photographs: Sequence[Photograph]) -> npt.NDArray[np.float32]:
    """Returns what graders see: detail by size from the one space, colour and light by place from the other."""
    blocks = [photographs[first : first + 64] for first in range(0, len(photographs), 64)]
    return np.concatenate(
        [np.concatenate([features.scattering_space(each), features.thumbnail_space(each)], axis=1) for each in blocks]
    )


def agreement(
    attribute: str, is_right_H: npt.NDArray[np.bool_], asked_D: npt.NDArray[np.bool_], said_D: npt.NDArray[np.bool_]
) -> Agreement:
    """Counts how often what is said is what was asked for."""
    num = len(asked_D)
    chance = asked_D.mean() * said_D.mean() + (1 - asked_D.mean()) * (1 - said_D.mean())
    shuffled_D = np.random.default_rng(0).permutation(asked_D)
    of_asked, of_shuffled = (
        stats.binomtest(int((each == said_D).sum()), num).proportion_ci(method="wilson")
        for each in (asked_D, shuffled_D)
    )
    return Agreement(
        attribute=attribute,
        accuracy=float(is_right_H.mean()),
        agreement=float((asked_D == said_D).mean()),
        low=float(of_asked.low),
        high=float(of_asked.high),
        chance=float(chance),
        shuffled=float((shuffled_D == said_D).mean()),
        shuffled_low=float(of_shuffled.low),
    )


def compare_tables(summary: MetadataSummary) -> dict[str, float]:
    """Tests the drawn cells against each released one-way and two-way table; what is not told is one more value."""
    texts = [metadata.summary_texts(cells) for cells in draw_cells(summary)]
    tables: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {
        (key,): {(value,): count for value, count in table.items() if count} for key, table in summary.counts.items()
    }
    for name, listed in summary.pair_counts.items():
        tables[tuple(name.split("*"))] = {(first, second): count for first, second, count in listed if count}
    assert summary.num_patients is not None
    found = {}
    for keys, released in tables.items():
        drawn = [tuple(each.get(key, "") for key in keys) for each in texts]
        observed = np.array([drawn.count(value) for value in released])
        expected = np.array(list(released.values())) * len(drawn) / summary.num_patients
        if (rest := len(drawn) - expected.sum()) > 0.5:
            observed, expected = np.append(observed, len(drawn) - observed.sum()), np.append(expected, rest)
        found["*".join(keys)] = float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
    return found


def paint(
    path: Path,
    asked: Sequence[Cells],
    drawn: Sequence[Photograph],
    rows: Sequence[Cells],
    real: Sequence[Photograph],
    *,
    num_drawn: int = 12,
    num_real: int = 6,
) -> None:
    """Writes a grid: a row for each pair of answers, drawn photographs first, then real ones."""
    lines = []
    blank = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
    for values in np.ndindex(*(2,) * len(ATTRIBUTES)):
        line: list[Photograph] = []
        for cells, photographs, num in ((asked, drawn, num_drawn), (rows, real, num_real)):
            fitting = [
                photograph
                for photograph, each in zip(photographs, cells, strict=True)
                if tuple(int(holds(each)) for holds in ATTRIBUTES.values()) == values
            ]
            line += [*fitting[:num], *[blank] * (num - len(fitting)), blank]
        lines.append(np.concatenate(line, axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = Image.fromarray(np.concatenate(lines))
    grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST).save(path)
