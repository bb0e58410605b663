"""The documentation: README's commands run in an empty directory, links lead somewhere, named commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from gretfound import metadata
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.usefixtures("ray_cluster")
def test_readme__its_commands_run_in_an_empty_directory(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    answer = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    corpora = list((tmp_path / "runs" / "readme" / "hub" / "corpora").glob("corpus-*/record.json"))
    assert len(corpora) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages__links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages__named_modules_and_layers_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:jobs|serve|gretfound)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        is_there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert module == "jobs.NAME" or is_there, f"{page.name}: {module}"
    for layer in re.findall(r"\bconf/[\w/]+\.yaml", text):
        assert (ROOT / layer).exists(), f"{page.name}: {layer}"


def test_privacy__each_attack_has_its_tests() -> None:
    rows = re.findall(r"^\| (?:([\d, ]+): )?[^|]+\|[^|]+\| (`test[^|]*|`jobs[^|]*|`generator[^|]*|`gate[^|]*)\|$",
                      (ROOT / "docs" / "privacy.md").read_text(), re.MULTILINE)  # fmt: skip
    numbers = {int(each) for number, _ in rows if number for each in number.split(", ")}
    assert numbers == {*range(1, 20), 24}, "cases 1 to 19, and 24 for intake"
    for number, names in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", names)
        assert tests, number
        for path, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / path).read_text(), f"{path} has no {name}"


def test_privacy__names_test_files_that_are_there() -> None:
    text = (ROOT / "docs" / "privacy.md").read_text()
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)[`:]", text))
    assert len(named) > 20 and "anonymous" in text
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []


def test_tree__no_photograph_and_nothing_large_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        assert not name.lower().endswith((".jpg", ".jpeg", ".png", ".tif", ".tiff", ".dcm", ".ppm")), name
        path = ROOT / name
        assert not path.is_file() or path.stat().st_size < 500_000, name


def dictionary_rows() -> list[str]:
    """Returns the rows of docs/metadata.md's two tables, as the dictionary of the code has them."""
    columns = []
    words = []
    for column in metadata.COLUMNS:
        unit = f"{column.unit}, {column.low:g} to {column.high:g}" if column.kind == "number" else ""
        columns.append(f"| `{column.name}` | {column.kind} | {unit} | {column.help} |")
        for value, ways in column.words.items():
            name = {True: "yes", False: "no"}[value] if column.kind == "yes/no" else value
            words.append(f"| `{column.name}` | {name} | {', '.join(way for way in ways if way != str(name))} |")
    return columns + words


def test_metadata_page__is_the_whole_dictionary_and_nothing_else() -> None:
    page = (ROOT / "docs" / "metadata.md").read_text()
    found = [line for line in page.splitlines() if line.startswith("| `") and not line.startswith("| `Image`")]
    assert found == dictionary_rows(), "docs/metadata.md: put these rows in:\n" + "\n".join(dictionary_rows())


def test_metadata_page__its_example_is_understood(tmp_path: Path) -> None:
    (example,) = re.findall(r"```text\n(Image,.*?)```", (ROOT / "docs" / "metadata.md").read_text(), re.DOTALL)
    (tmp_path / "metadata.csv").write_text(example)
    table = metadata.read_metadata(tmp_path / "metadata.csv")
    assert (table.unknown_columns, table.problems) == ([], [])
    assert [row.cells.get("dr") for row in table.rows] == [2, 1, None, 0]
    assert [row.cells.get("eye") for row in table.rows] == ["right", "left", "right", "left"]
    assert table.rows[0].cells["hba1c"] == pytest.approx(7.0, abs=0.01)
