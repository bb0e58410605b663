"""Sealing and opening packages against raw age: pyrage alone, on the same bytes, file to file, in the same run.

What a package costs beyond encryption: digests of every member, a deterministic tar that is checked block by block, two
signatures, and the roster. Ours and the peer take turns, so that a busy machine slows both.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyrage

from gretfound import keyring
from tests import parties
from tests.bench.outcome import Ratio, Row, write

ROUNDS = 5
# Sealing reads a package twice more (is the draft whole, what is the digest) and waits twice for the disk.
GOALS = {"seal": (">= 0.3", ">= 0.1"), "open": (">= 0.5", ">= 0.5")}


def main(*, large_mib: int = 512, num_small: int = 200, small_kib: int = 64) -> None:
    """Measures and writes runs/bench/seal.json.

    Args:
        large_mib: Size of the one large package, MiB.
        num_small: How many small packages are sealed and opened one after the other.
        small_kib: Size of each of them, KiB.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        large = bench.measured(large_mib * 2**20, rounds=ROUNDS)
        small = bench.measured(small_kib * 2**10, rounds=num_small)
    rows, ratios = [], []
    for name, peer in (("seal", "encrypt"), ("open", "decrypt")):
        for each in (name, peer):
            rows.append(Row(f"{each}: one package of {large_mib} MiB", large_mib / large[each], "MiB/s"))
            rows.append(Row(f"{each}: packages of {small_kib} KiB", 1 / small[each], "1/s"))
        goals = GOALS[name]
        ratios.append(Ratio(f"{name} over raw age {peer}, MiB/s", large[peer] / large[name], goals[0]))
        ratios.append(Ratio(f"{name} over raw age {peer}, packages/s", small[peer] / small[name], goals[1]))
    write("seal", rows, ratios, cpus=1)


class Bench:
    """A hub and a site in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hub = parties.hub_at(folder)
        self._ring = self._hub.join(folder / "aster", "aster")
        self._roster = self._hub.roster
        self._recipients = [pyrage.x25519.Recipient.from_str(each) for each in self._roster.recipients]
        self._identities = [pyrage.x25519.Identity.from_str(each) for each in self._hub.identities]

    def measured(self, size_bytes: int, *, rounds: int) -> dict[str, float]:
        """Returns the median seconds of sealing, opening, encrypting and decrypting a package of a size."""
        staging = self._folder / f"staging-{size_bytes}"
        (staging / "shards").mkdir(parents=True)
        (staging / "summary").mkdir()
        (staging / "summary" / "metadata_summary.json").write_text("{}")
        (staging / "summary" / "disclosure_report.json").write_text("{}")
        content = b"PAR1" + np.random.default_rng(0).bytes(size_bytes - 4)
        (staging / "shards" / "part-00000.parquet").write_bytes(content)
        draft, plain = self._folder / "x.tar", self._folder / "x.plain"
        package, raw = self._folder / "x.age", self._folder / "x.raw"
        taken: dict[str, list[float]] = {}

        def take(name: str, work: Callable[[], object]) -> None:
            began_s = time.perf_counter()
            work()
            taken.setdefault(name, []).append(time.perf_counter() - began_s)

        def open_package() -> None:
            into = self._folder / f"opened-{size_bytes}-{len(taken['decrypt'])}"
            self._hub.open(package, into, roster=self._roster)

        for _ in range(rounds):
            parties.draft(self._ring, staging, draft)
            take("encrypt", lambda: pyrage.encrypt_file(str(draft), str(raw), self._recipients))
            take("seal", lambda: keyring.seal(self._ring, draft, package, today=self._roster.issued))
            take("decrypt", lambda: pyrage.decrypt_file(str(raw), str(plain), self._identities))
            take("open", open_package)
        return {name: statistics.median(seconds) for name, seconds in taken.items()}
