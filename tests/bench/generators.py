"""Generators on CPU: a step of fine-tuning, sampling, many sites on few slots, memory over ten times the photographs.

The peer of a step is a loop as diffusers' examples/text_to_image/train_text_to_image.py writes it: every step encodes
its photographs and captions again, in float32. The peer of sampling is what that folder's pipeline does with 50 steps
of DDIM in float32. Both see the same weights, photographs, captions, seeds and batch sizes as ours, and both cores.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

from gretfound import fit, fundus, metadata, phantom, shard, storage
from gretfound.config import load
from gretfound.evaluation import distances, features
from gretfound.generator import denoising, finetune, latents, pipeline, pretraining, sampling, squares
from gretfound.lineage import Contribution, Generator, ShardSet
from jobs import console, finetune_generators
from tests.bench.outcome import Ratio, Row, write

NUM_THREADS = 2
STEP_PX, STEP_BATCH, NUM_STEPS = 256, 8, 12
DRAWN_PX, NUM_DRAWN, DRAWN_BATCH, GUIDANCE = 64, 160, 40, 2.0
BASE_IMAGES, STUDENT_IMAGES = 4800, 3200
NUM_SITES, NUM_SLOTS, SITE_IMAGES_SEEN = 4, 2, 1600
SMALL_SITE, LARGE_SITE, SIZED_PX = 1000, 10_000, 64
SMALL: dict[str, Any] = {
    "resolution_px": DRAWN_PX, "latent_channels": 8, "encoder_width": 48, "decoder_width": 16, "num_halvings": 2,
    "unet_channels": [48, 96, 96], "unet_layers": 1, "text_width": 64, "text_layers": 1, "max_tokens": 64,
}  # fmt: skip


def main() -> None:
    """Measures and writes runs/bench/generators.json."""
    torch.set_num_threads(NUM_THREADS)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        steps, step_ratios = compare_steps(root / "steps")
        drawn, drawn_ratios = compare_sampling(root / "sampling")
        sites, site_ratios = measure_sites(root / "sites", root / "sampling" / "base")
        peaks = [measured_alone(str(root / "sampling" / "base"), str(root / f"{num}"), num)
                 for num in (SMALL_SITE, LARGE_SITE)]  # fmt: skip
    write(
        "generators",
        [
            *steps,
            *drawn,
            *sites,
            Row(f"peak memory, encoding and training on {SMALL_SITE:,} photographs", peaks[0], "MiB"),
            Row(f"peak memory, encoding and training on {LARGE_SITE:,} photographs", peaks[1], "MiB"),
        ],
        [
            *step_ratios,
            *drawn_ratios,
            *site_ratios,
            Ratio("peak memory, ten times the photographs", peaks[1] / peaks[0], "0.9 to 1.1"),
        ],
        cpus=NUM_THREADS,
    )


def eyes(num_images: int, size_px: int, *, site: str = "public", seed: int = 0) -> list[squares.Square]:
    """Draws photographs and writes their captions."""
    drawn = (
        phantom.draw_eye(phantom.SITES[site], seed=patient, size_px=size_px, eye=eye)
        for patient, eye in phantom.list_eyes(phantom.SITES[site], num_images=num_images, seed=seed)
    )
    encoded = ((fundus.encode_png(each.image), cells_of(each.truth)) for each in drawn)
    return list(squares.squares_of(encoded, resolution_px=size_px))


def cells_of(truth: phantom.PhantomTruth) -> dict[str, Any]:
    """Returns a drawn eye's metadata."""
    return {"eye": truth.eye, "age": float(truth.age), "sex": truth.sex, "dr": truth.dr, "glaucoma": truth.glaucoma}


# (a) a step


def build_larger() -> StableDiffusionPipeline:
    """Builds a pipeline for 256 px with 12.6 million weights in its UNet and an autoencoder as Stable Diffusion has.

    The autoencoder is as wide as makes encoding cost, in multiplications, 0.6 of the UNet's training step (3.4 to 5.5
    billion). In Stable Diffusion 1.5 at 512 px it is 0.55 (560 to 1,020 billion): a wider one would flatter us.
    """
    built = pipeline.build_pipeline(
        resolution_px=STEP_PX, latent_channels=4, encoder_width=16, decoder_width=16, num_halvings=3,
        unet_channels=[64, 128, 216], unet_layers=1, text_width=64, text_layers=2, max_tokens=64,
        vocabulary=metadata.caption_words(), seed=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(24, 48, 48, 48), layers_per_block=2, latent_channels=4, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    built.register_modules(vae=vae.eval())
    return built


def compare_steps(folder: Path) -> tuple[list[Row], list[Ratio]]:
    """Trains the same UNet on the same photographs both ways; the loss is measured on noise that neither saw."""
    folder.mkdir(parents=True)
    photographs = eyes(4 * STEP_BATCH, STEP_PX)
    rates, losses = {}, {}
    for name, train in (("plain", plain_steps), ("float32", our_steps), ("bfloat16", our_steps)):
        built = build_larger()
        latents.encode_squares(
            ((str(place), each) for place, each in enumerate(photographs)), folder / "cache", base=built
        )
        encoded = latents.lay_out([folder / "cache"], folder / "rows")
        rates[name] = train(built, photographs, encoded, name)
        losses[name] = fixed_noise_loss(built, encoded)
    num_weights = sum(weight.numel() for weight in build_larger().unet.parameters())
    return [
        Row("weights of the UNet whose step is timed", num_weights / 1e6, "million"),
        Row("fine-tuning step, plain loop, float32", rates["plain"], "images/s"),
        Row("fine-tuning step, cached latents, float32", rates["float32"], "images/s"),
        Row("fine-tuning step, cached latents, bfloat16", rates["bfloat16"], "images/s"),
        *(Row(f"loss on fixed noise after {NUM_STEPS} steps, {name}", loss, "1") for name, loss in losses.items()),
    ], [
        Ratio("a step over the plain loop's, float32", rates["float32"] / rates["plain"], "reported"),
        Ratio("a step over the plain loop's, bfloat16", rates["bfloat16"] / rates["plain"], ">= 2"),
        Ratio("loss on fixed noise, bfloat16 over plain", losses["bfloat16"] / losses["plain"], "0.98 to 1.02"),
    ]  # fmt: skip


def denoiser_of(built: StableDiffusionPipeline, encoded: latents.EncodedPhotographs, seed: int) -> Any:
    """Returns the objective of both ways."""
    captions = denoising.EncodedCaptions(encoded.empty_text)
    return denoising.DenoisingObjective(
        denoiser=built.unet, scheduler=built.scheduler, captions=captions, caption_dropout=0.0, seed=seed
    )


def our_steps(
    built: StableDiffusionPipeline, _: Sequence[squares.Square], encoded: latents.EncodedPhotographs, precision: str
) -> float:
    """Returns the images a second of `gretfound.fit.train` on cached latents, after its first step."""
    ends_s: list[float] = []
    fit.train(
        denoiser_of(built, encoded, seed=0), latents.latent_batches(encoded, batch_size=STEP_BATCH, seed=0),
        num_images=STEP_BATCH * (NUM_STEPS + 1), batch_size=STEP_BATCH, peak_lr=1e-4, betas=(0.9, 0.99),
        weight_decay=0.01, clip_norm=1.0, precision=precision, progress_every_s=-1.0,
        on_progress=lambda _: ends_s.append(time.perf_counter()),
    )  # fmt: skip
    return STEP_BATCH * NUM_STEPS / (ends_s[-1] - ends_s[0])


def plain_steps(
    built: StableDiffusionPipeline, photographs: Sequence[squares.Square], encoded: latents.EncodedPhotographs, _: str
) -> float:
    """Returns the images a second of the plain loop after its first step; it sees what ours sees, in the same order."""
    denoiser = denoiser_of(built, encoded, seed=0)
    optimizer = torch.optim.AdamW(built.unet.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01)
    began_s = 0.0
    for step in range(NUM_STEPS + 1):
        began_s = time.perf_counter() if step == 1 else began_s
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate_at(
                step * STEP_BATCH, num_images=STEP_BATCH * (NUM_STEPS + 1), peak_lr=1e-4, warmup_images=0
            )
        position = torch.arange(step * STEP_BATCH, (step + 1) * STEP_BATCH)
        chosen, view = latents.order_at(position, num_images=len(photographs), seed=0)
        each = [photographs[place] for place in chosen.tolist()]
        pixels = squares.as_tensor([square.pixels for square in each])
        pixels = torch.where(view.view(-1, 1, 1, 1) == 1, pixels.flip(-1), pixels)
        captions = [
            square.mirrored_caption if flag else square.caption for square, flag in zip(each, view, strict=True)
        ]
        with torch.no_grad():
            encoded_BCHW = built.vae.encode(pixels).latent_dist.mode() * built.vae.config.scaling_factor
            text = built.text_encoder(pipeline.caption_ids(built.tokenizer, captions)).last_hidden_state
        denoiser(encoded_BCHW, text, position).backward()
        torch.nn.utils.clip_grad_norm_(built.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return STEP_BATCH * NUM_STEPS / (time.perf_counter() - began_s)


@torch.no_grad()
def fixed_noise_loss(built: StableDiffusionPipeline, encoded: latents.EncodedPhotographs) -> float:
    """Returns the mean loss in float32 on noise and times of another seed."""
    built.unet.eval()
    objective = denoiser_of(built, encoded, seed=99)
    stream = latents.latent_batches(encoded, batch_size=STEP_BATCH, seed=99)(0)
    return float(np.mean([float(objective(**batch)) for batch in itertools.islice(stream, 4)]))


# (b) sampling


def compare_sampling(folder: Path) -> tuple[list[Row], list[Ratio]]:
    """Trains a small generator and a few-step student of it, and draws the same captions in every way."""
    folder.mkdir(parents=True)
    teacher, student = train_teacher_and_student(folder)
    held_out = eyes(2 * NUM_DRAWN, DRAWN_PX, seed=1)
    real = features.scattering_space([square.pixels for square in held_out[NUM_DRAWN:]])
    captions = [square.caption for square in held_out[:NUM_DRAWN]]
    rates, kids = {}, {}
    floor = distances.kid(real, features.scattering_space([square.pixels for square in held_out[:NUM_DRAWN]]))

    def note(name: str, draw: Callable[[], Iterator[Any]]) -> None:
        list(itertools.islice(draw(), 1))  # start-up apart
        began_s = time.perf_counter()
        pictures = list(draw())
        rates[name] = NUM_DRAWN / (time.perf_counter() - began_s)
        kids[name] = distances.kid(real, features.scattering_space(pictures))

    def ours(generator: StableDiffusionPipeline, **settings: Any) -> Callable[[], Iterator[Any]]:
        return lambda: sampling.draw_photographs(
            pipeline=generator, captions=captions, seeds=range(NUM_DRAWN), batch_size=DRAWN_BATCH, **settings
        )

    note("DDIM, 50 steps, float32", lambda: draw_plainly(teacher, captions))
    for num_steps in (15, 10, 8):
        note(f"DPM-Solver++, {num_steps} steps, float32", ours(teacher, num_steps=num_steps, guidance_scale=GUIDANCE))
    note("student, 4 steps, float32", ours(student, num_steps=4, guidance_scale=1.0))
    for generator in (teacher, student):
        generator.to(dtype=torch.bfloat16)
    note("DPM-Solver++, 10 steps, bfloat16", ours(teacher, num_steps=10, guidance_scale=GUIDANCE))
    note("student, 4 steps, bfloat16", ours(student, num_steps=4, guidance_scale=1.0))
    plain = "DDIM, 50 steps, float32"
    rows = [Row("KID of as many real photographs, for scale", floor.value, "1")]
    for name, rate in rates.items():
        kid = kids[name]
        rows += [Row(f"sampling, {name}", rate, "images/s")]
        rows += [Row(f"KID, {name} ({kid.low:.4f} to {kid.high:.4f})", kid.value, "1")]
    ratios = [
        Ratio(f"{name} over {plain}; KID {kids[name].value - kids[plain].value:+.4f}", rates[name] / rates[plain],
              "reported")
        for name in rates if name != plain
    ]  # fmt: skip
    equal = {name: rates[name] for name in rates if kids[name].value <= kids[plain].high and name != plain}
    fastest = max(equal, key=lambda name: equal[name], default="")
    return rows, [
        *ratios,
        Ratio(f"fastest at a KID within DDIM's interval ({fastest or 'none'})", equal.get(fastest, 0.0) / rates[plain],
              ">= 5"),
    ]  # fmt: skip


def train_teacher_and_student(folder: Path) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """Trains a generator from nothing into ``folder/base`` and distils it."""
    photographs = eyes(480, DRAWN_PX)
    built = pipeline.build_pipeline(**SMALL, vocabulary=metadata.caption_words(), seed=0)
    pretraining.train_from_nothing(
        built, photographs, work_path=folder / "work", num_images=BASE_IMAGES, batch_size=16, learning_rate=1e-3,
        caption_dropout=0.1, min_snr_gamma=None, average_decay=0.99, seed=0,
    )  # fmt: skip
    base_path = pipeline.save_pipeline(built, folder / "base")
    caches = folder / "caches"
    latents.encode_squares(((str(place), each) for place, each in enumerate(photographs)), caches / "0", base=built)
    adapter_path = finetune.finetune_locally(
        base_path=base_path, latents_path=caches, work_path=folder / "distilling", objective="consistency",
        guidance_scale=GUIDANCE, method="full", num_images_seen=STUDENT_IMAGES, batch_size=16, learning_rate=5e-4,
        average_decay=0.95,
    )  # fmt: skip
    student_path = pipeline.install_adapter(base_path, adapter_path, folder / "student", is_few_step=True)
    return pipeline.load_pipeline(base_path), pipeline.load_pipeline(student_path)


def draw_plainly(teacher: StableDiffusionPipeline, captions: Sequence[str]) -> Iterator[Any]:
    """Draws as diffusers' pipeline does with DDIM, from the same noise as ours."""
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing", steps_offset=0)
    drawing = StableDiffusionPipeline(**{**teacher.components, "scheduler": scheduler}, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    for first in range(0, len(captions), DRAWN_BATCH):
        seeds = range(first, min(first + DRAWN_BATCH, len(captions)))
        yield from (
            np.clip(drawing(
                prompt=[captions[seed] for seed in seeds], latents=sampling.first_latents(teacher, seeds),
                num_inference_steps=50, guidance_scale=GUIDANCE, output_type="np",
            ).images, 0, 1) * 255 + 0.5
        ).astype(np.uint8)  # fmt: skip


# (c) many sites on few slots


def measure_sites(folder: Path, base_path: Path) -> tuple[list[Row], list[Ratio]]:
    """Fine-tunes the generators of several sites, some at a time, through the job."""
    hub_uri = storage.normalised(str(folder / "hub"))
    record = Generator(site_id="", resolution_px=DRAWN_PX, num_images=480, images_seen=BASE_IMAGES, final_loss=0.0)
    base = storage.publish_folder(hub_uri, base_path, record)
    for place in range(NUM_SITES):
        publish_site(hub_uri, folder / f"{place}", f"site-{place}")
    keys = ["conf/generator/finetune_demo.yaml", f"hub_uri={hub_uri}", f"base_id={base.id}"]
    keys += [f"tuning.num_images_seen={SITE_IMAGES_SEEN}"]
    works = finetune_generators.plan(load(finetune_generators.Config, keys), hub_uri)
    console.start_ray(num_cpus=NUM_SLOTS)
    began_s = time.perf_counter()
    faults = finetune_generators.encode(works, window=NUM_SLOTS, hub_uri=hub_uri)
    encoded_s = time.perf_counter()
    states = finetune_generators.drive(works, {}, faults, window=NUM_SLOTS, hub_uri=hub_uri, run_id=works[0].group)
    drive_s = time.perf_counter() - encoded_s
    assert {state.state for state in states.values()} == {"finished"}, states
    walls_s = sum(state.wall_s for state in states.values())
    trained_s = sum(SITE_IMAGES_SEEN / rate for rate in final_rates(folder / "hub" / "runs"))
    return [
        Row(f"{NUM_SITES} sites: encoding all photographs, with the start of Ray's actors", encoded_s - began_s, "s"),
        Row(f"{NUM_SITES} sites on {NUM_SLOTS} slots: all runs", drive_s, "s"),
        Row("the same: runs of sites, added up", walls_s, "s"),
        Row("the same: of these, start-up and end of each site", (walls_s - trained_s) / NUM_SITES, "s a site"),
    ], [Ratio("time of all runs over their sum by slots", drive_s / (walls_s / NUM_SLOTS), "<= 1.2")]


def final_rates(runs_path: Path) -> list[float]:
    """Returns each site's images a second of its training."""
    return [
        json.loads(path.read_text())["images_per_s"] for path in runs_path.glob("finetune_generator-*/progress.json")
    ]


def publish_site(hub_uri: str, folder_path: Path, site_id: str, num_images: int = 96) -> None:
    """Puts a site's photographs into a hub, as jobs.intake does."""
    (folder_path / "summary").mkdir(parents=True)
    (folder_path / "summary" / "note.txt").write_text(site_id)
    contribution = storage.publish_folder(
        hub_uri,
        folder_path,
        Contribution(site_id=site_id, form="images", package_sha256="0" * 64, num_images=num_images),
    )
    made = shard.write_shard(hub_uri, rows_of(num_images, site_id))
    shard_set = ShardSet(
        parents=(contribution.id,), site_id=site_id, origin="real", num_images=num_images, shards=(made,), rejected={}
    )
    storage.write_record(hub_uri, shard_set)


# (d) memory


def rows_of(num_images: int, site_id: str) -> Iterator[dict[str, Any]]:
    """Yields shard rows: shifted copies of 32 drawn photographs, so that each has pixels and a caption of its own."""
    seed = sum(site_id.encode())
    site = phantom.SITES["aster"]
    drawn = [phantom.draw_eye(site, seed=seed + each, size_px=SIZED_PX).image for each in range(32)]
    for index in range(num_images):
        image = drawn[index % 32].copy()
        image[:, :, 2] = np.roll(image[:, :, 2], index // 32, axis=1)
        row = dict.fromkeys(shard.SCHEMA.names) | {"image": fundus.encode_png(image), "image_id": f"{index:064x}"}
        row |= {"site_id": site_id, "origin": "real", "width_px": SIZED_PX, "height_px": SIZED_PX}
        yield row | {"age": 20.0 + index % 800 / 10, "sex": ("female", "male")[index % 2], "dr": index % 5}


def measured_alone(base_path: str, folder_path: str, num_images: int) -> float:
    """Returns the peak memory in MiB of a process that encodes a site's photographs and trains on them."""
    Path(folder_path).mkdir()
    shard.write_shard_file(Path(folder_path) / "shard.parquet", rows_of(num_images, "memory"))
    command = [sys.executable, "-m", "tests.bench.generators", base_path, folder_path]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout.splitlines()[-1])


def train_alone(base_path: str, folder_path: str) -> float:
    """Encodes and trains as a site does; returns this process's peak memory in MiB."""
    torch.set_num_threads(NUM_THREADS)
    finetune.finetune_locally(
        base_path=Path(base_path), shard_path=Path(folder_path) / "shard.parquet", work_path=Path(folder_path) / "work",
        num_images_seen=640, batch_size=16, learning_rate=1e-3,
    )  # fmt: skip
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(train_alone(*sys.argv[1:]))
