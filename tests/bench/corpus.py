"""Planning a corpus of 100 million images from generated records, and near-duplicates among generated hashes.

Shard sets' records are read as a hub holds them; they and the hashes are generated, since no such hub exists yet. The
peer of the search is comparing everything with everything, on as many rows as that allows.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from gretfound import corpus, duplicates, storage
from gretfound.corpus import Phase
from gretfound.lineage import Shard, ShardSet
from tests.bench.outcome import Ratio, Row, write

NUM_SHARDS, SHARDS_PER_SET, ROW_GROUPS = 10_000, 100, 39
NUM_HASHES, NUM_PLANTED, NUM_COMPARED = 10_000_000, 1000, 20_000


def main() -> None:
    """Measures, each in a process of its own, and writes runs/bench/corpus.json."""
    planned = _measured_alone("plan", NUM_SHARDS)
    searched = _measured_alone("search", NUM_HASHES)
    compared = _measured_alone("compare", NUM_COMPARED)
    pairs_per_s = {
        "search": NUM_HASHES * (NUM_HASHES - 1) / 2 / searched["search_s"],
        "compare": NUM_COMPARED * (NUM_COMPARED - 1) / 2 / compared["compare_s"],
    }
    write(
        "corpus",
        [
            Row("records of 10,000 shards, 99.8 million images: read", planned["read_s"], "s"),
            Row("the same: planned, three phases", planned["plan_s"], "s"),
            Row("the same: peak memory", planned["peak_gib"], "GiB"),
            Row("near-duplicates among 10 million hashes", searched["search_s"], "s"),
            Row("the same: peak memory", searched["peak_gib"], "GiB"),
            Row("the same: planted pairs found, of 1,000 that differ in 13 bits", searched["num_found"], "pairs"),
        ],
        [
            Ratio(
                "pairs decided a second, bands over everything with everything",
                pairs_per_s["search"] / pairs_per_s["compare"],
                ">= 100",
            )
        ],
    )


def _measured_alone(task: str, number: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.corpus", task, str(number)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def plan(num_shards: int) -> dict[str, float]:
    """Reads generated records of shard sets and plans a curriculum of three phases over all of them."""
    with tempfile.TemporaryDirectory() as folder:
        hub_uri = storage.normalised(folder)
        for first in range(0, num_shards, SHARDS_PER_SET):
            shards = tuple(
                Shard(
                    path=f"shards/parts/{place:064x}.parquet",
                    sha256=f"{place:064x}",
                    size_bytes=2**28,
                    row_group_images=(256,) * ROW_GROUPS,
                )
                for place in range(first, min(first + SHARDS_PER_SET, num_shards))
            )
            index = first // SHARDS_PER_SET
            storage.write_record(
                hub_uri,
                ShardSet(
                    site_id=f"site-{index // 2}",
                    origin=("real", "synthetic")[index % 2],
                    num_images=sum(each.num_images for each in shards),
                    shards=shards,
                    rejected={},
                ),
            )
        began_s = time.perf_counter()
        shard_sets = list(storage.read_records(hub_uri, ShardSet))
        read_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        layout = corpus.lay_out(shard_sets)
        reasons = (np.random.default_rng(0).random(int(layout.num_images.sum()), np.float32) < 0.01).astype(np.uint8)
        reasons = corpus.cap_sites(layout, reasons, 900_000)
        phases = (Phase(num_images=10**8, real_share=0.0), Phase(num_images=10**8, real_share=0.5), Phase(real_share=1))
        countries = {f"site-{place}": f"country-{place % 9}" for place in range(num_shards)}
        manifest = corpus.plan(layout, reasons=reasons, phases=phases, countries=countries)
        corpus.list_exclusions(layout, reasons)
        counted = corpus.count(layout, manifest)
        return {
            "read_s": read_s,
            "plan_s": time.perf_counter() - began_s,
            "num_images": counted["num_images"] + counted["num_excluded"],
            "num_rows": len(layout.num_images),
        }


def search(num_hashes: int) -> dict[str, float]:
    """Looks for near-duplicates among random hashes with planted pairs."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, size=(num_hashes, 8), dtype=np.uint64)
    for row in range(NUM_PLANTED):
        bits = np.unpackbits(hashes[row].view(np.uint8))
        bits[rng.choice(512, 13, replace=False)] ^= 1
        hashes[num_hashes - 1 - row] = np.packbits(bits).view(np.uint64)
    began_s = time.perf_counter()
    pairs = duplicates.find_pairs(hashes)
    seconds = time.perf_counter() - began_s
    assert (pairs.sum(axis=1) == num_hashes - 1).all()
    return {"search_s": seconds, "num_found": len(pairs)}


def compare(num_hashes: int) -> dict[str, float]:
    """Compares every hash with every other."""
    hashes = np.random.default_rng(0).integers(0, 2**64, size=(num_hashes, 8), dtype=np.uint64)
    began_s = time.perf_counter()
    for row in range(num_hashes - 1):
        duplicates.distance(hashes[row + 1 :], hashes[row : row + 1]).min()
    return {"compare_s": time.perf_counter() - began_s}


if __name__ == "__main__":
    outcome = {"plan": plan, "search": search, "compare": compare}[sys.argv[1]](int(sys.argv[2]))
    outcome["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(outcome))
