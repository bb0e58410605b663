"""Learning: what pretraining is worth on drawn sites that it never saw, over seeds.

Three drawn sites are pretrained on; two others, with other cameras and other people, are held out and probed. Every run
is `jobs.pretrain_encoder` with a recipe of conf/pretrain/ and `jobs.evaluate_encoder`, as an operator would call them.
A seed decides order, crops, masks, initial weights, the untrained network and the probe's folds, not the photographs.
Self-distillation goes on from the masked autoencoder of its seed, as its recipe asks, so its gain over the untrained
network holds that one's; what it adds by itself is told apart, seed by seed. And so is what a decoder that predicts
three quarters of the hidden patches costs after equal images: a tenth of what pretraining gained at first (docs/log.md)
may be lost.
The seeds run one after another, each with the whole machine. The hub is kept, so that a broken-off run goes on where it
was; delete runs/bench/learning to begin anew. It takes long, so `make bench` alone leaves it out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from gretfound import phantom, storage
from gretfound.lineage import Report
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import assemble, draw_shard_set

FOLDER = Path("runs/bench/learning")
SIZE_PX, NUM_TRAINED, NUM_TESTED = 256, 700, 600
TRAINED, TESTED = ("aster", "birch", "public"), ("dune", "cedar")
TASKS = ("referable_dr", "glaucoma", "amd")
ENCODERS = ("pretrained", "untrained", "raw_pixels")


class Arm(NamedTuple):
    """One way to pretrain, and what its encoders are compared with, seed by seed."""

    recipe: str
    num_seeds: int
    options: Sequence[str] = ()
    starts_from: str | None = None  # the arm whose weights of the same seed it goes on from
    compared_with: str | None = None  # the arm over which its gain is told
    least_gain: float = 0.0  # what the lower end of that gain's interval has to exceed


ARMS = {
    "mae": Arm("small_mae", 5),
    "mae, three quarters decoded": Arm(
        "small_mae", 5, ("mae.predicted_share=0.75",), compared_with="mae", least_gain=-0.03
    ),
    "dinov2": Arm("small_dinov2", 3, starts_from="mae", compared_with="mae"),
}


def main() -> None:
    """Trains, evaluates and writes runs/bench/learning.json."""
    hub_uri = storage.normalised(str(FOLDER / "hub"))
    tested = [
        phantom.write_site(phantom.SITES[name], FOLDER / name, num_images=NUM_TESTED, seed=1, size_px=SIZE_PX)
        for name in TESTED
    ]
    drawn = [draw_shard_set(hub_uri, name, num_images=NUM_TRAINED, size_px=SIZE_PX) for name in TRAINED]
    corpus_id = assemble(hub_uri, *drawn).id
    uris = f"evaluation_uris=[{','.join(str(path) for path in tested)}]"
    rows, ratios = [], []
    encoder_ids: dict[tuple[str, int], str] = {}
    reached: dict[str, list[float]] = {}
    for name, arm in ARMS.items():
        layers = [f"conf/pretrain/{arm.recipe}.yaml", "conf/scale/laptop.yaml", "fit.precision=bfloat16", *arm.options]
        scores = []
        for seed in range(arm.num_seeds):
            shared = [f"hub_uri={hub_uri}", f"seed={seed}"]
            begins = [f"initial_weights_uri={encoder_ids[arm.starts_from, seed]}"] if arm.starts_from else []
            began_s = time.perf_counter()
            encoder_id = run_job("pretrain_encoder", [*layers, *begins, f"corpus_id={corpus_id}", *shared])
            minutes = kept_minutes(encoder_id, (time.perf_counter() - began_s) / 60)
            rows.append(Row(f"{name}: pretraining with seed {seed}, its job from start to end", minutes, "min"))
            report_id = run_job("evaluate_encoder", [f"encoder_id={encoder_id}", uris, *shared])
            scores.append(read_scores(hub_uri, report_id))
            encoder_ids[name, seed] = encoder_id
        for each in scores[0]:
            low, high = t_interval([score[each] for score in scores])
            rows += [
                Row(f"{name}: {each}, lower end of the 95% interval", low, "AUROC"),
                Row(f"{name}: {each}, upper end", high, "AUROC"),
            ]
        means = {encoder: t_interval([score[encoder] for score in scores]) for encoder in ENCODERS}
        ratios += [
            Ratio(f"{name}: lower end over the upper end of {each}", means["pretrained"][0] / means[each][1], "> 1")
            for each in ENCODERS[1:]
        ]
        reached[name] = [score["pretrained"] for score in scores]
        if arm.compared_with:
            others = reached[arm.compared_with][: arm.num_seeds]
            low, high = t_interval([ours - theirs for ours, theirs in zip(reached[name], others, strict=True)])
            rows.append(Row(f"{name}: gain over {arm.compared_with}, by pairs, upper end", high, "AUROC"))
            ratios.append(
                Ratio(f"{name}: gain over {arm.compared_with}, by pairs, lower end", low, f"> {arm.least_gain:g}")
            )
    write("learning", rows, ratios)


def run_job(name: str, arguments: Sequence[str], *, folder: Path = FOLDER) -> str:
    """Runs a job as an operator would; returns its record's id. What it says goes to NAME.log in ``folder``.

    Raises:
        RuntimeError: If it fails; it ends with what the job said last.
    """
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"WANDB_MODE": "disabled"}
    log = folder / f"{name}.log"
    with log.open("a") as said:
        command = [sys.executable, "-m", f"jobs.{name}", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed; {log} ends with:\n{log.read_text()[-3000:]}")
    return done.stdout.splitlines()[-1]


def kept_minutes(encoder_id: str, minutes: float) -> float:
    """Returns the minutes in which an encoder was made: these, unless an earlier run of this bench made it.

    Of a job that was broken off and called again it is the last part alone.
    """
    path = FOLDER / "minutes.json"
    kept: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    kept.setdefault(encoder_id, minutes)
    path.write_text(json.dumps(kept, indent=1))
    return kept[encoder_id]


def read_scores(hub_uri: str, report_id: str) -> dict[str, float]:
    """Returns the AUROC of each encoder: the mean over tasks and held-out sites, and for the pretrained one each."""
    content = json.loads(storage.read_bytes(storage.join(hub_uri, Report.folder, report_id, "report.json")))
    names = [f"{site}/{task}" for site in TESTED for task in TASKS]
    auroc = {
        encoder: {name: content["encoders"][encoder][name]["auroc"]["value"] for name in names} for encoder in ENCODERS
    }
    return {encoder: float(np.mean(list(each.values()))) for encoder, each in auroc.items()} | auroc["pretrained"]


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% interval of the mean over few runs, after Student."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)
