"""What every benchmark leaves: runs/bench/NAME.json with rows and ratios, and the same as a table."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path("runs/bench")


@dataclass(frozen=True)
class Row:
    """One measured value."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Ratio:
    """One value over its peer's from the same run, and what it should reach."""

    name: str
    value: float
    goal: str


def repeated(measure: Callable[[], float], *, times: int = 3) -> float:
    """Returns the median of several measurements, after one that is thrown away."""
    measure()
    return median(measure() for _ in range(times))


def rate(work: Callable[[], Any], *, num_images: int) -> float:
    """Runs ``work`` once and returns its images a second."""
    began_s = time.perf_counter()
    work()
    return num_images / (time.perf_counter() - began_s)


def write(name: str, rows: list[Row], ratios: list[Ratio]) -> Path:
    """Writes the outcome and prints it as a table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{name}")
    for row in rows:
        print(f"  {row.name:<58}{row.value:>10.1f}  {row.unit}")
    for ratio in ratios:
        print(f"  {ratio.name:<58}{ratio.value:>10.2f}  goal {ratio.goal}")
    print(f"  -> {path}")
    return path
