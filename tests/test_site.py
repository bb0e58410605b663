"""The site's command line: exit codes, what leaves in each form, and going on after an interruption."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gretfound import contribution, deidentify, metadata, phantom, site
from gretfound.generator import pipeline
from tests import tiny_generator

SIZE_PX = 72
NUM_IMAGES = 14
TRAINING = ["--images-seen", "64", "--batch-size", "8", "--num-images", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def site_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sites") / "aster"
    return phantom.write_site(phantom.SITES["aster"], path, num_images=NUM_IMAGES, seed=0, size_px=SIZE_PX)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator.write_base(tmp_path_factory.mktemp("bases") / "base")


def _arguments(site_path: Path, form: str, out_path: Path, *more: str) -> list[str]:
    place = ["--site-id", "aster", "--out", str(out_path), "--key", str(out_path.parent / "site.key")]
    return ["contribute", str(site_path), "--form", form, *place, "--policy", "demonstration", *TRAINING, *more]


def _package_in(out_path: Path) -> contribution.Package:
    (path,) = out_path.glob("*.tar")
    assert sorted(path.name for path in out_path.iterdir()) == [path.name], "work in progress was left behind"
    return contribution.read_package(path)


def _opened(out_path: Path, into_path: Path) -> tuple[contribution.Manifest, list[dict[str, Any]]]:
    manifest = contribution.open_package(_package_in(out_path).path, into_path)
    rows = [row for path in sorted(into_path.glob("shards/*")) for row in pq.read_table(path).to_pylist()]
    return manifest, rows


def test_main__check_says_fit_by_its_exit_code(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_path = tmp_path / "report.html"
    arguments = ["check", str(site_path), "--html", str(page_path)]
    assert site.main([*arguments, "--policy", "demonstration"]) == site.EXIT_FIT
    assert "FIT" in capsys.readouterr().out
    assert site.main([*arguments, "--form", "weights"]) == site.EXIT_NOT_FIT
    page = page_path.read_text()
    assert "not fit" in page and "http" not in page.replace("http-equiv", "")
    assert site.main(["check", str(tmp_path / "absent")]) == site.EXIT_USAGE
    with pytest.raises(SystemExit) as caught:
        site.main(["check"])
    assert caught.value.code == site.EXIT_USAGE


def test_main__contribute_refuses_an_unfit_folder(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_path = tmp_path / "out"
    arguments = ["contribute", str(site_path), "--form", "images", "--site-id", "aster", "--out", str(out_path)]
    assert site.main(arguments) == site.EXIT_NOT_FIT
    assert "needs 50" in capsys.readouterr().err
    assert not out_path.exists()


@pytest.mark.parametrize(("form", "more"), [("images", ["--site-id", "Aster Hospital"]), ("weights", [])])
def test_main__contribute_refuses_wrong_arguments(site_path: Path, tmp_path: Path, form: str, more: list[str]) -> None:
    assert site.main(_arguments(site_path, form, tmp_path / "out", *more)) == site.EXIT_USAGE
    assert not (tmp_path / "out").exists()


def test_main__contribute_images(site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _arguments(site_path, "images", tmp_path / "out")
    assert site.main(arguments) == site.EXIT_FIT
    package = _package_in(tmp_path / "out")
    assert package.sha256 in capsys.readouterr().out
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened")
    assert (manifest.site_id, manifest.num_images, manifest.policy) == ("aster", NUM_IMAGES, "demonstration/1")
    assert len(rows) == NUM_IMAGES
    assert {(row["site_id"], row["origin"], row["image"][1:4]) for row in rows} == {("aster", "real", b"PNG")}

    table = metadata.read_metadata(site_path / "metadata.csv")
    key = (tmp_path / "site.key").read_bytes()
    patients = {row.cells["patient"] for row in table.rows}
    assert {row["patient"] for row in rows} == {deidentify.pseudonym(key, patient) for patient in patients}
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    content = package.path.read_bytes()
    for word in [*patients, *(row.image for row in table.rows)]:
        assert word.encode() not in content, "an identifier left the site"


def test_main__contribute_images_again_finds_the_package(site_path: Path, tmp_path: Path) -> None:
    arguments = _arguments(site_path, "images", tmp_path / "out")
    site.main(arguments)
    first = _package_in(tmp_path / "out")
    changed_s = first.path.stat().st_mtime_ns
    assert site.main(arguments) == site.EXIT_FIT
    assert _package_in(tmp_path / "out").path.stat().st_mtime_ns == changed_s
    first.path.unlink()
    site.main(arguments)
    assert _package_in(tmp_path / "out").sha256 == first.sha256


def test_main__contribute_tells_no_value_of_a_single_patient(site_path: Path, tmp_path: Path) -> None:
    lines = (site_path / "metadata.csv").read_text().splitlines()
    header = lines[0].split(",")
    cells = lines[1].split(",")
    cells[header.index("Ethnicity")] = "Unique Word"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "traindata").symlink_to(site_path / "traindata")
    (tmp_path / "site" / "metadata.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    site.main(_arguments(tmp_path / "site", "images", tmp_path / "out"))
    assert b"Unique Word" not in _package_in(tmp_path / "out").path.read_bytes()


def test_main__contribute_weights(site_path: Path, base_path: Path, tmp_path: Path) -> None:
    assert site.main(_arguments(site_path, "weights", tmp_path / "out", "--base", str(base_path))) == site.EXIT_FIT
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened")
    assert rows == []
    assert manifest.base_sha256 == pipeline.unet_sha256(base_path)
    assert {file.path for file in manifest.files} == {
        "summary/metadata_summary.json",
        "training/config.json",
        "training/metrics.jsonl",
        "weights/adapter.safetensors",
        "weights/adapter_config.json",
    }
    assert pipeline.load_pipeline(base_path, adapter_path=tmp_path / "opened" / "weights") is not None


def test_main__contribute_synthetic(site_path: Path, base_path: Path, tmp_path: Path) -> None:
    assert site.main(_arguments(site_path, "synthetic", tmp_path / "out", "--base", str(base_path))) == site.EXIT_FIT
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened")
    assert (manifest.form, manifest.num_images, len(rows)) == ("synthetic", 5, 5)
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert (row["origin"], row["patient"], row["width_px"]) == ("synthetic", None, 32)
        assert row["prompt"].startswith("colour fundus photograph")
        assert row["generator_id"].startswith("site-")


def test_main__contribute_killed_goes_on_and_ends_the_same(site_path: Path, base_path: Path, tmp_path: Path) -> None:
    arguments = _arguments(site_path, "weights", tmp_path / "out", "--base", str(base_path), "--images-seen", "240")
    work_path = tmp_path / "work"
    command = [sys.executable, "-m", "gretfound.site", *arguments, "--work", str(work_path)]
    root = Path(__file__).parents[1]
    # Sums of floats depend on the number of threads, which other tests of this process may have changed.
    threads = {name: str(torch.get_num_threads()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with subprocess.Popen(
        command, cwd=root, env=os.environ | threads, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        deadline_s = time.monotonic() + 240
        while process.poll() is None and not list(work_path.glob("*/training/*/checkpoints/*")):
            assert time.monotonic() < deadline_s, "no checkpoint appeared"
            time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "out").glob("*"))
    assert site.main([*arguments, "--work", str(work_path)]) == site.EXIT_FIT
    resumed = _package_in(tmp_path / "out")
    assert not list(work_path.glob("*"))
    resumed.path.unlink()
    assert site.main(arguments) == site.EXIT_FIT
    undisturbed = _package_in(tmp_path / "out")
    for one, other in zip(resumed.manifest.files, undisturbed.manifest.files, strict=True):
        # How often the loss is noted depends on the clock; what was learned does not.
        assert one == other or one.path == "training/metrics.jsonl"


def test_main__inspect_says_what_is_in_a_package(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.main(_arguments(site_path, "images", tmp_path / "out"))
    package = _package_in(tmp_path / "out")
    capsys.readouterr()
    assert site.main(["inspect", str(package.path)]) == site.EXIT_FIT
    words = capsys.readouterr().out
    assert package.sha256 in words and "de-identified" in words and "shards/part-00000.parquet" in words
    assert site.main(["inspect", str(package.path), "--json"]) == site.EXIT_FIT
    content = json.loads(capsys.readouterr().out)
    assert content["manifest"]["site_id"] == "aster" and content["sha256"] == package.sha256
    package.path.write_bytes(package.path.read_bytes()[:-1])
    assert site.main(["inspect", str(package.path)]) == site.EXIT_USAGE
    assert "TRUNCATED" in capsys.readouterr().err


def test_main__columns_lists_the_dictionary(capsys: pytest.CaptureFixture[str]) -> None:
    assert site.main(["columns"]) == 0
    words = capsys.readouterr().out
    assert all(column.name in words for column in metadata.COLUMNS)


def test_parser__help_needs_no_torch() -> None:
    code = "import sys, gretfound.site; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
