"""One pretraining step on CPU: ours against a straightforward loop, and against itself under Ray Train and DeepSpeed.

ViT-B/16, 224 px, mask ratio 0.75, two cores. The peer is written as the first public implementations are: float32,
attention unfused, every patch embedded before three quarters are dropped, every patch predicted, the visible ones too.
All steps see the same photographs with the same weights. What Ray and DeepSpeed add is told twice: with both cores in
the step, and as conf/scale/laptop.yaml divides this machine, one core for the step and one for Ray Data, with a larger
batch. Each rate is of a process of its own, beside which nothing lives: what a process did before it makes its next
step slower, and a worker beside it too (docs/log.md). Ray's are taken in turn with the bare ones, the median told. A
rate is of warm steps, of which a run has thousands.
"""

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from torch import Tensor

from gretfound import fit
from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.mae import MaskedAutoencoder
from jobs import console
from tests.bench.outcome import Ratio, Row, write

BATCH_SIZE, NUM_STEPS, NUM_THREADS, NUM_ROUNDS = 32, 3, 2, 3
WARM_UP_STEPS = 3  # in which a process takes its memory from the system; with DeepSpeed three times as much
LAPTOP = {"batch_size": 64, "num_threads": 1}
SHARES = (3 / 4, 1 / 2, 1 / 3)  # of the masked patches, that the decoder predicts; what they cost a probe: mixture.py


class PlainAutoencoder(MaskedAutoencoder):
    """The same weights and loss, computed the long way round."""

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        """Embeds all patches, encodes the kept ones, decodes and predicts all, scores the masked ones."""
        normalised = self.normalised(image)
        kept_BK, masked_BM = self.split(position)
        rows = torch.arange(len(image))[:, None]
        token = self.encoder.patch_embed(normalised) + self.encoder.pos_embed[:, 1:]
        class_token = (self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(image), -1, -1)
        token = torch.cat([class_token, token[rows, kept_BK]], dim=1)
        for block in self.encoder.blocks:
            token = block(token)
        token = self.decoder_embed(self.encoder.norm(token))
        full = self.mask_token.repeat(len(image), self.num_patches, 1)
        full[rows, kept_BK] = token[:, 1:]
        full = torch.cat([token[:, :1], full + self.decoder_positions], dim=1)
        for block in self.decoder_blocks:
            full = block(full)
        predicted = self.decoder_predict(self.decoder_norm(full))[:, 1:]
        target = self.patches(normalised)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        is_masked = torch.zeros(len(image), self.num_patches).scatter(1, masked_BM, 1.0)
        return ((predicted - target).pow(2).mean(-1) * is_masked).sum() / is_masked.sum()


def objective(kind: type[MaskedAutoencoder] = MaskedAutoencoder, **settings: Any) -> MaskedAutoencoder:
    """Builds an autoencoder; two of the same seed have the same weights."""
    torch.manual_seed(0)
    return kind(build_encoder("vit_base_patch16_224", image_size_px=224), **settings)


def batch(batch_size: int = BATCH_SIZE) -> dict[str, Tensor]:
    """Returns the photographs of every step: noise, whose arithmetic is that of any picture."""
    image = torch.randint(
        0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return {"image": image, "position": torch.arange(batch_size)}


def our_rate(
    *,
    precision: str = "bfloat16",
    predicted_share: float = 1.0,
    batch_size: int = BATCH_SIZE,
    num_threads: int = NUM_THREADS,
    zero_stage: int | None = None,
) -> float:
    """Returns the images a second of `gretfound.fit.train` once it is warm."""
    torch.set_num_threads(num_threads)
    ends_s: list[float] = []
    fit.train(
        objective(predicted_share=predicted_share),
        lambda _: repeat(batch(batch_size)),
        num_images=batch_size * (WARM_UP_STEPS + NUM_STEPS),
        batch_size=batch_size,
        peak_lr=1e-4,
        precision=precision,
        zero_stage=zero_stage,
        on_progress=lambda _: ends_s.append(time.perf_counter()),
        progress_every_s=-1.0,
    )
    return batch_size * NUM_STEPS / (ends_s[-1] - ends_s[WARM_UP_STEPS - 1])


def plain_rate() -> float:
    """Returns the images a second of the peer's loop once it is warm."""
    torch.set_num_threads(NUM_THREADS)
    plain = objective(PlainAutoencoder)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    held, began_s = batch(), 0.0
    for step in range(WARM_UP_STEPS + NUM_STEPS):
        if step == WARM_UP_STEPS:
            began_s = time.perf_counter()
        optimizer.zero_grad()
        plain(**held).backward()
        optimizer.step()
    return BATCH_SIZE * NUM_STEPS / (time.perf_counter() - began_s)


def alone(rate: Callable[..., float], **settings: Any) -> float:
    """Returns a rate that is measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(rate, **settings).result()


def ray_rate(**layout: int) -> float:
    """Returns the rate of the same training in a Ray Train worker under DeepSpeed ZeRO 1; call it `alone`."""
    with TemporaryDirectory() as folder:
        console.start_ray()
        answer = Path(folder) / "rate.json"
        settings = {"answer": str(answer), "layout": layout}
        terms = {"run_uri": folder, "name": "overhead", "cpus_per_worker": NUM_THREADS, "max_failures": 0}
        try:
            fit.run(train_on_worker, settings, **terms)
        finally:
            ray.shutdown()  # a process of a pool ends without
        return float(json.loads(answer.read_text()))


def rates_in_turn(**layout: int) -> tuple[list[float], list[float]]:
    """Returns the rates of the bare step and of that under Ray and DeepSpeed, of each round."""
    rounds = [(alone(our_rate, **layout), alone(ray_rate, **layout)) for _ in range(NUM_ROUNDS)]
    return [bare for bare, _ in rounds], [on_ray for _, on_ray in rounds]


def train_on_worker(settings: dict[str, Any]) -> None:
    """Is what the worker does."""
    rate = our_rate(zero_stage=1, **settings["layout"])
    Path(settings["answer"]).write_text(json.dumps(rate))


def main() -> None:
    """Measures and writes runs/bench/pretrain.json."""
    plain = alone(plain_rate)
    float32 = alone(our_rate, precision="float32")
    subsets = {share: alone(our_rate, predicted_share=share) for share in SHARES}
    both, both_on_ray = rates_in_turn()
    one, one_on_ray = rates_in_turn(**LAPTOP)
    bfloat16 = statistics.median(both)
    overheads = {
        cores: sorted(bare / on_ray for bare, on_ray in zip(*rates, strict=True))
        for cores, rates in {"both cores": (both, both_on_ray), "one core": (one, one_on_ray)}.items()
    }
    with torch.no_grad():
        expected = float(objective(PlainAutoencoder)(**batch()))
        difference = abs(float(objective()(**batch())) - expected) / expected
        with torch.autocast("cpu", torch.bfloat16):
            bfloat16_difference = abs(float(objective()(**batch())) - expected) / expected
    write(
        "pretrain",
        [
            Row("straightforward loop, float32", plain, "images/s"),
            Row("gretfound.fit.train, float32", float32, "images/s"),
            Row("gretfound.fit.train, bfloat16", bfloat16, "images/s"),
            *(
                Row(f"gretfound.fit.train, bfloat16, {share:.0%} of the masked patches predicted", rate, "images/s")
                for share, rate in subsets.items()
            ),
            Row("bfloat16 in a Ray Train worker under DeepSpeed ZeRO 1", statistics.median(both_on_ray), "images/s"),
            Row("gretfound.fit.train, bfloat16, one core, 64 images a step", statistics.median(one), "images/s"),
            Row("the same in a Ray Train worker under DeepSpeed ZeRO 1", statistics.median(one_on_ray), "images/s"),
            Row("relative difference of the losses on equal weights, float32", difference, "1"),
            Row("relative difference of the losses on equal weights, bfloat16", bfloat16_difference, "1"),
        ],
        [
            Ratio("float32 over the straightforward loop", float32 / plain, ">= 1.0"),
            Ratio("bfloat16 over the straightforward loop", bfloat16 / plain, ">= 1.6"),
            *(
                Ratio(f"{share:.0%} of the masked patches, over the straightforward loop", rate / plain, ">= 2.5")
                for share, rate in subsets.items()
            ),
            *(
                Ratio(f"time under Ray and DeepSpeed over the bare step's, {cores}", statistics.median(found), "<= 1.1")
                for cores, found in overheads.items()
            ),
            *(
                Ratio(f"time under Ray and DeepSpeed, {cores}, {end} of {NUM_ROUNDS}", found[place], "reported")
                for cores, found in overheads.items()
                for end, place in (("lowest", 0), ("highest", -1))
            ),
        ],
        cpus=NUM_THREADS,
    )
