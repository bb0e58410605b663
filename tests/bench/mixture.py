"""Mixture: real photographs alone, drawn ones alone, and both, at equal compute: what a frozen probe reads from each.

The real ones are those of ../shared/cfp but for IDRiD's test part; the drawn ones, as many, are `gretfound.phantom`'s
and enter the corpus as synthetic ones, since a generator that two cores can train draws 64 px, where no lesion is left.
Each encoder sees as many images, by conf/pretrain/small_mae_512.yaml, and is probed on referable retinopathy of IDRiD's
test part, fitted on its training part. All by the jobs, as an operator would call them. Intervals are over patients, of
one seed each. `make bench-mixture` should take an hour and more, and was not run to its end yet. The hub is kept, so
that a broken-off run goes on where it was; delete runs/bench/mixture to begin anew. `make bench` alone leaves it out.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from gretfound import fundus, shard, storage
from gretfound.lineage import Report, ShardSet
from tests.bench.learning import run_job
from tests.bench.outcome import Ratio, Row, write
from tests.hubs import draw_shard_set

FOLDER = Path("runs/bench/mixture")
PHOTOGRAPHS = Path("../shared/cfp")
REAL, DRAWN = ("chasedb1", "hrf", "idrid"), ("aster", "birch", "public")
FITTED, TESTED, TASK = "idrid", "idrid_test", "idrid_test/referable_dr"
SIZE_PX = 512
NUM_IMAGES, SEED = 200_000, 0
RECIPE = ["conf/pretrain/small_mae_512.yaml", "conf/scale/laptop.yaml", "fit.precision=bfloat16"]


def main() -> None:
    """Trains, evaluates and writes runs/bench/mixture.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    hub_uri = storage.normalised(str(FOLDER / "hub"))
    real = [real_shard_set(hub_uri, site) for site in REAL]
    share = sum(each.num_images for each in real) // len(DRAWN)
    drawn = [draw_shard_set(hub_uri, site, num_images=share, size_px=SIZE_PX, origin="synthetic") for site in DRAWN]
    corpora = {"real alone": (real, []), "drawn alone": (drawn, []), "half of each": (real + drawn, ["real_share=0.5"])}
    shared = [f"hub_uri={hub_uri}"]
    tested = [f"evaluation_uris=[{PHOTOGRAPHS / TESTED}]"]
    rows, ratios = [], []
    for name, (shard_sets, shares) in corpora.items():
        ids = [f"shard_set_ids=[{','.join(each.id for each in shard_sets)}]"]
        corpus_id = run_job("assemble_corpus", [*shared, *ids, *shares, *tested], folder=FOLDER)
        terms = [f"corpus_id={corpus_id}", f"fit.num_images={NUM_IMAGES}", f"seed={SEED}"]
        encoder_id = run_job("pretrain_encoder", [*RECIPE, *shared, *terms], folder=FOLDER)
        probe = [f"encoder_id={encoder_id}", f"fitted_on_uri={PHOTOGRAPHS / FITTED}", "pooling=mean_and_deviation"]
        report_id = run_job("evaluate_encoder", [*shared, *probe, *tested, f"seed={SEED}"], folder=FOLDER)
        content = json.loads(storage.read_bytes(storage.join(hub_uri, Report.folder, report_id, "report.json")))
        # The untrained network and raw pixels are the same three times.
        labels = {"pretrained": name} | ({} if rows else {"untrained": "untrained", "raw_pixels": "raw pixels"})
        aurocs = {encoder: found[TASK]["auroc"] for encoder, found in content["encoders"].items()}
        rows += [
            Row(f"{label}: {end}", aurocs[encoder][end], "AUROC")
            for encoder, label in labels.items()
            for end in ("value", "low", "high")
        ]
        gain = content["differences"]["untrained"][TASK]["auroc"]
        rows += [Row(f"{name} less untrained: {end}", gain[end], "AUROC") for end in ("value", "low", "high")]
        over = aurocs["pretrained"]["value"] / aurocs["untrained"]["value"]
        ratios.append(Ratio(f"{name} over untrained", over, "reported"))
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
