"""The corridor of rooms: imports point down, and the jobs' command lines are light."""

import ast
import importlib
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from gretfound import disclosure
from gretfound.config import load
from gretfound.gate import policy as gate_policy
from tests.conftest import ROOT

ROWS = [
    {"jobs", "serve", "gretfound.site"},
    {"gretfound.dispatch", "gretfound.grader_fitting"},
    {"gretfound.gatehouse", "gretfound.outgoing", "gretfound.probing", "gretfound.site_comparison"},
    {
        "gretfound.admission",
        "gretfound.encoding",
        "gretfound.generator_evaluation",
        "gretfound.keyring",
        "gretfound.planning",
        "gretfound.pretraining",
        "gretfound.site_states",
    },
    {"gretfound.opening", "gretfound.synthesis"},
    {"gretfound.grading", "gretfound.sealing"},
    {
        "gretfound.agreement",
        "gretfound.behaviour",
        "gretfound.contribution",
        "gretfound.examination",
        "gretfound.fine_tuning",
        "gretfound.ingest",
        "gretfound.release",
        "gretfound.tracking",
    },
    {"gretfound.gate", "gretfound.trial"},
    {
        "gretfound.corpus",
        "gretfound.evaluation",
        "gretfound.generator",
        "gretfound.inspection",
        "gretfound.screening",
    },
    {"gretfound.duplicates", "gretfound.receipt", "gretfound.strongbox", "gretfound.veto"},
    {"gretfound.shard", "gretfound.fit", "gretfound.checkpoints", "gretfound.encoder", "gretfound.roster"},
    {"gretfound.ledger", "gretfound.withdrawal"},
    {"gretfound.quarantine"},
    {"gretfound.storage"},
    {"gretfound.disclosure"},
    {
        "gretfound.attacker",
        "gretfound.confinement",
        "gretfound.deidentify",
        "gretfound.holdout",
        "gretfound.matching",
        "gretfound.phantom",
    },
    {"gretfound.dicom", "gretfound.lettering"},
    {
        "gretfound.archive",
        "gretfound.averaging",
        "gretfound.capacity",
        "gretfound.fundus",
        "gretfound.identifiers",
        "gretfound.isolation",
        "gretfound.lineage",
        "gretfound.metadata",
        "gretfound.reasons",
        "gretfound.signing",
    },
    {"gretfound.canonical", "gretfound.enclosure", "gretfound.files"},
    {"gretfound.config", "gretfound.errors"},
]
JOBS = sorted(
    path.stem for path in (ROOT / "jobs").glob("*.py") if "console.run(" in path.read_text() and path.stem != "console"
)


def row_of(module: str) -> int | None:
    for index, rooms in enumerate(ROWS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return index
    return None


def room_of(module: str) -> str:
    return next(room for rooms in ROWS for room in rooms if module == room or module.startswith(room + "."))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if row_of(name) is not None}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gretfound").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports__point_down(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module in ("gretfound", "gretfound.config"):
        return
    row = row_of(module)
    assert row is not None, f"{module} has no row: give it one here and in docs/dataflow.md"
    for name in imported_modules(path):
        other = row_of(name)
        if other is None or room_of(name) == room_of(module):
            continue
        assert other > row, f"{module} imports {name}, which is not in a lower row"
        if name.startswith("gretfound.config"):
            assert row == 0, f"{module} knows about configuration; only jobs, serve and the command line may"


@pytest.mark.parametrize("job", JOBS)
def test_help__explains_every_key_without_torch(job: str) -> None:
    began_s = time.monotonic()
    program = (
        "import runpy, sys; sys.argv = ['job', '--help']\n"
        "try:\n"
        f"    runpy.run_module('jobs.{job}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    print('heavy:', sorted({'torch', 'ray', 'diffusers', 'deepspeed'} & set(sys.modules)))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    schema = importlib.import_module(f"jobs.{job}").Config
    assert answer.rstrip().endswith("heavy: []")
    for key, help_text in keys_of(schema):
        assert key in answer, key
        assert help_text and help_text in answer, f"{key} is not explained"
    assert time.monotonic() - began_s < 20, "a slow machine is excused, a torch import is not"


def keys_of(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    module = sys.modules[schema.__module__]
    for each in fields(schema):  # type: ignore[arg-type]
        kind = getattr(module, each.type, None) if isinstance(each.type, str) else each.type
        if isinstance(kind, type) and is_dataclass(kind):
            found.extend(keys_of(kind, f"{prefix}{each.name}."))
        else:
            found.append((prefix + each.name, each.metadata.get("help", "")))
    return found


@pytest.mark.parametrize("layer", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_conf__every_layer_loads_and_opens_with_its_command(layer: Path) -> None:
    text = layer.read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for word in ("Source", "Hardware", "Expected"):
        assert word.lower() in head.lower() or layer.parent.name == "scale", f"{layer.name} does not say its {word}"
    jobs_named = re.findall(r"jobs\.(\w+)", head) or (["demo"] if "make demo" in head else [])
    if layer.parent.name == "serve":
        return
    if layer.parent.name == "gate":
        assert gate_policy.read_policy(layer.stem).name == layer.stem
        return
    if layer.parent.name == "disclosure":
        assert disclosure.read_policy(layer.stem).name == layer.stem
        return
    assert jobs_named, f"{layer.name} does not open with the command that reads it"
    schema = importlib.import_module(f"jobs.{jobs_named[0]}").Config
    required = [
        f"{name}=x"
        for name in ("hub_uri", "corpus_id", "base_id", "encoder_id", "report_id")
        if name in {f.name for f in fields(schema)}
    ]
    load(schema, [str(layer), *required])


def test_pyproject__packages_every_room() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "gretfound").rglob("__init__.py")}
    assert rooms - set(packaged) == set()
