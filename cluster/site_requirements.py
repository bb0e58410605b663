"""Prints cluster/site-requirements.txt: what of requirements.lock the site's command needs, and nothing else.

    python cluster/site_requirements.py > cluster/site-requirements.txt

The imports are followed from gretfound.site through this tree, and from the packages they name through the requirements
that these packages state. torch and CUDA's libraries are left out: which build of torch is a choice of the image.
"""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
START = "gretfound.site"
# Imported inside functions that no site calls: DeepSpeed's optimiser states, the encoder's blocks.
NOT_AT_A_SITE = {"deepspeed", "timm"}
# Packages that no import statement names.
ALSO = {"ray": "ray[train]"}
FILES_ONLY = {
    "rapidocr"
}  # two ONNX files of its wheel are read; it is never imported, so what it requires is not needed
WITH_TORCH = ("torch", "triton", "nvidia-", "cuda-", "setuptools")
HEAD = """\
# What gretfound-site needs of requirements.lock, with the same pins; cluster/site.Dockerfile adds torch.
# Made with: python cluster/site_requirements.py > cluster/site-requirements.txt (tests/test_cluster.py compares)
"""


def main() -> None:
    """Prints the file."""
    sys.stdout.write(HEAD + "".join(f"{line}\n" for line in requirements()))


def requirements() -> list[str]:
    """Returns the lines of the lock that a site needs, in its order.

    Raises:
        ValueError: If a package that is needed is not in the lock.
    """
    distributions = metadata.packages_distributions()
    imported = {name for name in third_party_imports(START) if name not in NOT_AT_A_SITE}
    direct = {normalised(distributions[name][0]) for name in imported}
    needed = _closure({ALSO.get(name, name) for name in direct}) | FILES_ONLY
    locked = {normalised(line.partition("==")[0]): line for line in _lines(ROOT / "requirements.lock")}
    wanted = {name for name in needed if not name.startswith(WITH_TORCH)}
    if missing := sorted(wanted - set(locked)):
        raise ValueError(f"not in requirements.lock: {', '.join(missing)}")
    return [line for name, line in locked.items() if name in wanted]


def third_party_imports(start: str) -> set[str]:
    """Returns the top-level names outside the standard library that a module imports, itself or through this tree."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        path = _path_of(module)
        if path is None or module in seen:
            continue
        seen.add(module)
        for name in _imports(path):
            top = name.partition(".")[0]
            if top == "gretfound":
                parts = name.split(".")
                waiting += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found


def normalised(name: str) -> str:
    """Returns a distribution's name as PEP 503 compares it, without extras."""
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def _path_of(module: str) -> Path | None:
    stem = ROOT.joinpath(*module.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _closure(names: set[str]) -> set[str]:
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = normalised(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or name.startswith(WITH_TORCH[1:]):
                continue
            seen.add((name, extra))
            stated = map(Requirement, metadata.requires(name) or [])
            waiting += [each for each in stated if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


if __name__ == "__main__":
    main()
