"""What every benchmark leaves: runs/bench/NAME.json with rows and ratios, and the same as a table."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

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


def write(name: str, rows: list[Row], ratios: list[Ratio], *, cpus: float | None = None) -> Path:
    """Writes the outcome and prints it as a table; ``cpus`` is how many it worked on, None is all of the machine."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "cpus": cpus or os.cpu_count(),
        },
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{name}")
    for row in rows:
        print(f"  {row.name:<72}{row.value:>10.4g}  {row.unit}")
    for ratio in ratios:
        print(f"  {ratio.name:<72}{ratio.value:>10.3f}  goal {ratio.goal}")
    print(f"  -> {path}")
    return path
