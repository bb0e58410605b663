"""Mixture: real photographs alone, drawn ones alone, and both, at equal compute: what a frozen probe reads from each.

And both once more with a decoder that predicts three quarters of the hidden patches, at equal images: that is faster,
and has to cost the probe nothing; with half or a third of them it seemed to (docs/log.md).

The real ones are those of ../shared/cfp but for IDRiD's test part; the drawn ones, as many, are `gretfound.phantom`'s
and enter the corpus as synthetic ones, since a generator that two cores can train draws 64 px, where no lesion is left.
Each encoder sees as many images, by conf/pretrain/small_mae_512.yaml, and is probed on referable retinopathy of IDRiD's
test part, fitted on its training part. All by the jobs, as an operator would call them. Each seed's interval is over
photographs (IDRiD names no patients); where there are several, Student's over seeds is told, too. `make bench-mixture`
takes an hour a seed on two cores; `python -m tests.bench.mixture 1` stops after the first. The hub is kept, so
that a broken-off run goes on where it was; delete runs/bench/mixture to begin anew. `make bench` alone leaves it out.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from gretfound import fundus, shard, storage
from gretfound.lineage import Report, ShardSet
from tests.bench.learning import run_job, t_interval
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import draw_shard_set

FOLDER = Path("runs/bench/mixture")
PHOTOGRAPHS = Path("../shared/cfp")
REAL, DRAWN = ("chasedb1", "hrf", "idrid"), ("aster", "birch", "public")
FITTED, TESTED, TASK = "idrid", "idrid_test", "idrid->idrid_test/referable_dr"
HALF, SUBSET, COST = "half of each", "half of each, three quarters decoded", "three quarters decoded less all"
SIZE_PX = 512
NUM_IMAGES, NUM_SEEDS = 200_000, 3
BASELINES = {"untrained": "untrained", "raw_pixels": "raw pixels"}
RECIPE = ["conf/pretrain/small_mae_512.yaml", "conf/scale/laptop.yaml", "fit.precision=bfloat16"]


def main(num_seeds: int = NUM_SEEDS) -> None:
    """Trains, evaluates and writes runs/bench/mixture.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    hub_uri = storage.normalised(str(FOLDER / "hub"))
    real = [real_shard_set(hub_uri, site) for site in REAL]
    share = sum(each.num_images for each in real) // len(DRAWN)
    drawn = [draw_shard_set(hub_uri, site, num_images=share, size_px=SIZE_PX, origin="synthetic") for site in DRAWN]
    arms: dict[str, tuple[list[ShardSet], list[str], list[str]]] = {
        "real alone": (real, [], []),
        "drawn alone": (drawn, [], []),
        HALF: (real + drawn, ["real_share=0.5"], []),
        SUBSET: (real + drawn, ["real_share=0.5"], ["mae.predicted_share=0.75"]),
    }
    shared = [f"hub_uri={hub_uri}"]
    tested = [f"evaluation_uris=[{PHOTOGRAPHS / TESTED}]"]
    rows = []
    scores: dict[str, list[float]] = {name: [] for name in [*arms, *BASELINES.values()]}
    for seed in range(num_seeds):
        for name, (shard_sets, shares, options) in arms.items():
            ids = [f"shard_set_ids=[{','.join(each.id for each in shard_sets)}]"]
            corpus_id = run_job("assemble_corpus", [*shared, *ids, *shares, *tested], folder=FOLDER)
            terms = [f"corpus_id={corpus_id}", f"fit.num_images={NUM_IMAGES}", f"seed={seed}"]
            encoder_id = run_job("pretrain_encoder", [*RECIPE, *options, *shared, *terms], folder=FOLDER)
            probe = [f"encoder_id={encoder_id}", f"fitted_on_uri={PHOTOGRAPHS / FITTED}", "pooling=mean_and_deviation"]
            report_id = run_job("evaluate_encoder", [*shared, *probe, *tested, f"seed={seed}"], folder=FOLDER)
            content = json.loads(storage.read_bytes(storage.join(hub_uri, Report.folder, report_id, "report.json")))
            found = {encoder: tasks[TASK]["auroc"] for encoder, tasks in content["encoders"].items()}
            gains = {encoder: tasks[TASK]["auroc"] for encoder, tasks in content["differences"].items()}
            told = {name: found["pretrained"]} | {f"{name} less {BASELINES[each]}": gains[each] for each in BASELINES}
            scores[name].append(found["pretrained"]["value"])
            if len(scores[BASELINES["untrained"]]) == seed:  # they are the same for each arm
                told |= {label: found[each] for each, label in BASELINES.items()}
                for each, label in BASELINES.items():
                    scores[label].append(found[each]["value"])
            rows += [
                Row(f"{label}, seed {seed}: {end}", interval[end], "AUROC")
                for label, interval in told.items()
                for end in ("value", "low", "high")
            ]
    scores[COST] = [subset - whole for subset, whole in zip(scores[SUBSET], scores[HALF], strict=True)]
    rows += [Row(f"{COST}, seed {seed}", cost, "AUROC") for seed, cost in enumerate(scores[COST])]
    if num_seeds > 1:
        rows += [
            Row(f"{name}, over seeds: {end}", value, "AUROC")
            for name, each in scores.items()
            for end, value in zip(("low", "high"), t_interval(each), strict=True)
        ]
    means = {name: sum(each) / num_seeds for name, each in scores.items()}
    ratios = [Ratio(f"{name} over {label}", means[name] / means[label], "reported")
              for name in arms for label in BASELINES.values()]  # fmt: skip
    write("mixture", rows, ratios)


def real_shard_set(hub_uri: str, site: str) -> ShardSet:
    """Writes a site's photographs, cut to the field of view and made smaller, as a shard set."""
    paths = sorted((PHOTOGRAPHS / site / "traindata").iterdir())
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = [shard.row_of(encoded, site_id=site, origin="real", cells={}) for encoded in pool.map(_smaller, paths)]
    shards = (shard.write_shard(hub_uri, rows),)
    record = ShardSet(site_id=site, origin="real", num_images=len(rows), shards=shards, rejected={})
    storage.write_record(hub_uri, record)
    return record


def _smaller(path: Path) -> bytes:
    image = fundus.decode_photograph(path.read_bytes())
    return fundus.encode_jpeg(fundus.to_square(image, fundus.find_field_of_view(image), SIZE_PX))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
