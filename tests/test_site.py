"""The site's command line: exit codes, what leaves in each form, and going on after an interruption."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pyrage
import pytest
import torch

from gretfound import (
    contribution,
    deidentify,
    disclosure,
    dispatch,
    examination,
    fundus,
    gatehouse,
    metadata,
    phantom,
    sealing,
    shard,
    site,
)
from gretfound.errors import ConfigError
from gretfound.gate import canaries
from gretfound.gate import policy as gate_policy
from gretfound.gate import report as gate_report
from gretfound.generator import pipeline, private, spending
from tests import dicoms, parties, tiny_generator
from tests.parties import Hub

SIZE_PX = 72
NUM_IMAGES = 14
NUM_LARGER = 84
TRAINING = ["--images-seen", "64", "--batch-size", "8", "--num-images", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def site_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sites") / "aster"
    return phantom.write_site(phantom.SITES["aster"], path, num_images=NUM_IMAGES, seed=0, size_px=SIZE_PX)


@pytest.fixture(scope="module")
def larger_site_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough photographs for the privacy gate of the demonstration to hold some out."""
    path = tmp_path_factory.mktemp("sites") / "aster"
    return phantom.write_site(phantom.SITES["aster"], path, num_images=NUM_LARGER, seed=0, size_px=SIZE_PX)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator.write_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return parties.hub_at(tmp_path_factory.mktemp("hubs"))


@pytest.fixture
def keys_path(hub: Hub, tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    arguments = [
        "keys",
        "--site-id",
        "aster",
        "--keys",
        str(path),
        "--hub",
        str(hub.keys_path / "hub.json"),
        "--no-passphrase",
    ]
    assert site.main(arguments) == site.EXIT_FIT
    hub.change_roster("admit", f"card_path={path / 'aster.site.json'}")
    return path


def _arguments(site_path: Path, form: str, out_path: Path, *more: str) -> list[str]:
    place = ["--site-id", "aster", "--out", str(out_path), "--key", str(out_path.parent / "site.key")]
    place += ["--keys", str(out_path.parent / "keys")]
    return ["contribute", str(site_path), "--form", form, *place, "--policy", "demonstration", *TRAINING, *more]


def _package_in(out_path: Path, hub: Hub) -> sealing.Package:
    (path,) = out_path.glob("*.age")
    assert [each.name for each in out_path.iterdir()] == [path.name], "something else lies beside the package"
    return sealing.read_sealed(path, identities=hub.identities)


def _plain(package: sealing.Package, hub: Hub) -> bytes:
    return pyrage.decrypt(package.path.read_bytes(), [pyrage.x25519.Identity.from_str(hub.identities[0])])


def _opened(out_path: Path, into_path: Path, hub: Hub) -> tuple[sealing.Manifest, list[dict[str, Any]]]:
    manifest = hub.open(_package_in(out_path, hub).path, into_path)
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
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys_path: Path
) -> None:
    out_path = tmp_path / "out"
    arguments = ["contribute", str(site_path), "--form", "images", "--site-id", "aster", "--out", str(out_path)]
    arguments += ["--keys", str(keys_path)]
    assert site.main(arguments) == site.EXIT_NOT_FIT
    assert "needs 50" in capsys.readouterr().err
    assert not out_path.exists()


@pytest.mark.parametrize(("form", "more"), [("images", ["--site-id", "Aster Hospital"]), ("weights", [])])
def test_main__contribute_refuses_wrong_arguments(
    site_path: Path, tmp_path: Path, form: str, more: list[str], keys_path: Path
) -> None:
    assert site.main(_arguments(site_path, form, tmp_path / "out", *more)) == site.EXIT_USAGE
    assert not (tmp_path / "out").exists()


def test_main__contribute_images(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: Hub, keys_path: Path
) -> None:
    arguments = _arguments(site_path, "images", tmp_path / "out")
    assert site.main(arguments) == site.EXIT_FIT
    package = _package_in(tmp_path / "out", hub)
    assert package.sha256 in capsys.readouterr().out
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened", hub)
    assert (manifest.site_id, manifest.num_images, manifest.policy) == ("aster", NUM_IMAGES, "demonstration/1")
    assert len(rows) == NUM_IMAGES
    assert {(row["site_id"], row["origin"], row["image"][1:4]) for row in rows} == {("aster", "real", b"PNG")}

    table = metadata.read_metadata(site_path / "metadata.csv")
    key = (tmp_path / "site.key").read_bytes()
    patients = {row.cells["patient"] for row in table.rows}
    assert {row["patient"] for row in rows} == {deidentify.pseudonym(key, patient) for patient in patients}
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    content = _plain(package, hub)
    for word in [*patients, *(row.image for row in table.rows)]:
        assert word.encode() not in content, "an identifier left the site"


def test_main__contribute_images_of_dicom(
    tmp_path: Path, hub: Hub, keys_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_path = tmp_path / "archive"
    kinds = ["", "", "", "", "1.2.840.10008.5.1.4.1.1.7"]  # the last is a screenshot
    for place, sop_class in enumerate(kinds):
        pixels = dicoms.photograph()
        pixels[80, 60 : 70 + place] = 255
        dataset = dicoms.ophthalmic(pixels, **({"SOPClassUID": sop_class} if sop_class else {}))
        name = f"IM{place:06}"  # archives give no ending
        (folder_path / "traindata").mkdir(parents=True, exist_ok=True)
        (folder_path / "traindata" / name).write_bytes(dicoms.encoded(dataset))
    assert site.main(_arguments(folder_path, "images", tmp_path / "out")) == site.EXIT_FIT
    _, rows = _opened(tmp_path / "out", tmp_path / "opened", hub)
    assert len(rows) == 4
    key = (tmp_path / "site.key").read_bytes()
    for row in rows:
        assert (row["eye"], row["visit"]) == (None, deidentify.uid_pseudonym(key, "1.2.826.0.1.3680043.8.498.31337"))
        assert row["patient"] == deidentify.pseudonym(key, dicoms.PLACES["id"])
        assert row["shifted_year"] in (2018, 2019, 2020) and row["field_of_view"] == 45.0
        assert row["deid_methods"] == "deid/1 113100 113101 113107"
    ledger = next(tmp_path.glob("*.photographs.csv")).read_bytes()
    content = _plain(_package_in(tmp_path / "out", hub), hub) + ledger
    said = capsys.readouterr()
    for word in dicoms.PLACES.values():
        assert word.encode() not in content, "an identifier left the site"
        assert word not in said.out + said.err, "a message named a patient"


def test_main__contribute_images_again_finds_the_package(
    site_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    arguments = _arguments(site_path, "images", tmp_path / "out")
    site.main(arguments)
    first = _package_in(tmp_path / "out", hub)
    changed_s = first.path.stat().st_mtime_ns
    assert site.main(arguments) == site.EXIT_FIT
    assert _package_in(tmp_path / "out", hub).path.stat().st_mtime_ns == changed_s
    first.path.unlink()
    site.main(arguments)
    again = _package_in(tmp_path / "out", hub).manifest
    assert again.files == first.manifest.files, "what it holds depends on the photographs alone"
    assert (again.sequence, again.previous_sha256) == (2, first.sha256)


def test_main__contribute_hands_out_no_package_of_a_replaced_key(
    site_path: Path, tmp_path: Path, hub: Hub, keys_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(site_path, "images", tmp_path / "out")
    site.main(arguments)
    keys = ["keys", "--site-id", "aster", "--keys", str(keys_path), "--no-passphrase"]
    assert site.main([*keys, "--replace", "container"]) == site.EXIT_FIT
    assert site.main(arguments) == site.EXIT_USAGE
    assert "can no longer be taken in" in capsys.readouterr().err
    _package_in(tmp_path / "out", hub).path.unlink()
    assert site.main(arguments) == site.EXIT_FIT


def test_main__contribute_tells_no_value_of_a_single_patient(
    site_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    lines = (site_path / "metadata.csv").read_text().splitlines()
    header = lines[0].split(",")
    cells = lines[1].split(",")
    cells[header.index("Ethnicity")] = "Unique Word"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "traindata").symlink_to(site_path / "traindata")
    (tmp_path / "site" / "metadata.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    site.main(_arguments(tmp_path / "site", "images", tmp_path / "out"))
    assert b"Unique Word" not in _plain(_package_in(tmp_path / "out", hub), hub)


def test_main__contribute_tells_by_disclosure_control_and_keeps_the_account(
    site_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "traindata").symlink_to(site_path / "traindata")
    lines = (site_path / "metadata.csv").read_text().splitlines(keepends=True)
    (tmp_path / "site" / "metadata.csv").write_text("".join(lines))
    arguments = _arguments(tmp_path / "site", "images", tmp_path / "out")
    assert site.main(arguments) == site.EXIT_FIT
    first = _package_in(tmp_path / "out", hub)
    hub.open(first.path, tmp_path / "opened")
    content = (tmp_path / "opened" / "summary" / "metadata_summary.json").read_bytes()
    summary = metadata.summary_from_json(json.loads(content))
    disclosure.check(summary, policies=[disclosure.read_policy("demonstration")])
    assert first.manifest.num_patients == summary.num_patients
    (entered,) = disclosure.read_ledger(tmp_path / "site.releases.json")
    assert entered.summary == summary
    (account_path,) = tmp_path.glob("aster-images-*.disclosure.txt")
    assert "stays at the site" in account_path.read_text()
    assert {path.name for path in tmp_path.glob("*.json")} == {"site.releases.json", f"{account_path.stem}.json"}
    assert b"stays_at_the_site" not in _plain(first, hub)

    first.path.unlink()
    (tmp_path / "site" / "metadata.csv").write_text("".join(lines[:-1]))  # one patient fewer, or a photograph
    assert site.main(arguments) == site.EXIT_FIT
    shutil.rmtree(tmp_path / "opened")
    second = _package_in(tmp_path / "out", hub)
    hub.open(second.path, tmp_path / "opened")
    assert second.sha256 != first.sha256
    assert (tmp_path / "opened" / "summary" / "metadata_summary.json").read_bytes() == content
    assert site.main([*arguments, "--min-patients-per-cell", "1"]) == site.EXIT_USAGE


def test_main__contribute_weights(
    larger_site_path: Path, gate_eye_path: Path, base_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    shutil.copytree(gate_eye_path, tmp_path, dirs_exist_ok=True)
    assert (
        site.main(_arguments(larger_site_path, "weights", tmp_path / "out", "--base", str(base_path))) == site.EXIT_FIT
    )
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened", hub)
    assert rows == []
    assert manifest.base_sha256 == pipeline.denoiser_sha256(base_path)
    assert {file.path for file in manifest.files} == {
        "privacy/canary_commitment.json",
        "privacy/canary_reveal.json",
        "privacy/gate_report.json",
        "summary/disclosure_report.json",
        "summary/metadata_summary.json",
        "training/config.json",
        "training/metrics.jsonl",
        "weights/adapter.safetensors",
        "weights/adapter_config.json",
    }
    assert pipeline.load_pipeline(base_path, adapter_path=tmp_path / "opened" / "weights") is not None
    content = (tmp_path / "opened" / "privacy" / "gate_report.json").read_bytes()
    report = gate_report.Report.model_validate_json(content)
    assert (report.policy, report.verdict in gate_report.LEAVES) == ("demonstration/1", True)
    assert report.checks[0].measured["held_out_images"] == 21 and b"aster-" not in content
    (g5,) = [check for check in report.checks if check.name == "G5"]
    assert g5.measured["num_canaries"] == 20, "the site scores canaries before the hub does"
    (page_path,) = tmp_path.glob("aster-weights-*.gate.html")
    assert stat.S_IMODE(page_path.stat().st_mode) == 0o600
    assert "stays at the site" in page_path.read_text() and "data:image/jpeg" in page_path.read_text()
    _require_canaries(tmp_path / "opened", hub)


def _require_canaries(opened_path: Path, hub: Hub) -> None:
    reveal, commitment = (
        (opened_path / "privacy" / name).read_bytes() for name in (canaries.REVEAL_NAME, canaries.COMMITMENT_NAME)
    )
    canary_seed = hub.roster.hub_card.canary_seed
    found = canaries.read_reveal(reveal, commitment)
    canaries.require_reveal(*found, canary_seed=canary_seed, policy="demonstration")


@pytest.mark.slow
def test_main__contribute_weights_with_differential_privacy(
    larger_site_path: Path, gate_eye_path: Path, base_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    shutil.copytree(gate_eye_path, tmp_path, dirs_exist_ok=True)
    arguments = _arguments(larger_site_path, "weights", tmp_path / "out", "--base", str(base_path), "--dp-epsilon", "6")
    assert site.main([*arguments, "--images-seen", "16"]) == site.EXIT_FIT
    _opened(tmp_path / "out", tmp_path / "opened", hub)
    _require_canaries(tmp_path / "opened", hub)
    ledger = spending.read_ledger((tmp_path / "opened" / "privacy" / spending.LEDGER_NAME).read_bytes())
    private.require_ledger_adds_up(ledger)
    assert (ledger.claimed_epsilon, ledger.tier) == (6.0, "standard") and 5.8 < ledger.epsilon <= 6.0
    course = (tmp_path / "opened" / "training" / "metrics.jsonl").read_text()
    assert course == '{"images_seen":16,"loss":0.0}\n', "a loss of patients left outside of the account"


@pytest.mark.parametrize(("epsilon", "required"), [(None, 1334), (8.0, 267), (8.1, 1334)])
def test_gated__takes_fewer_patients_where_each_is_protected(epsilon: float | None, required: int) -> None:
    found = dispatch._gated(examination.STANDARD, gate_policy.read_policy("standard"), epsilon)
    assert (found.min_patients_to_train, found.min_images_to_train, found.stamp) == (required, required, "standard/1")
    assert epsilon or found == examination.STANDARD, "check says the same as contribute"


@pytest.mark.parametrize(("num_told", "epsilon", "is_enough"), [(1320, None, True), (1300, None, False),
    (1300, 8.0, True), (1300, 8.1, False), (None, 8.0, False)])  # fmt: skip
def test_require_told_patients__says_before_the_training_what_the_hub_would_say(
    num_told: int | None, epsilon: float | None, is_enough: bool
) -> None:
    rules = disclosure.read_policy("standard")
    summary = replace(disclosure.release([{}], policy=rules).summary, num_patients=num_told)
    terms = (summary, rules, gate_policy.read_policy("standard"), epsilon)
    if is_enough:
        dispatch._require_told_patients(*terms)
        return
    with pytest.raises(ConfigError, match="column Patient"):
        dispatch._require_told_patients(*terms)


@pytest.mark.parametrize(
    "more", [["--dp-epsilon", "11"], ["--dp-epsilon", "0"], ["--dp-epsilon", "3", "--method", "full"]]
)
def test_main__contribute_refuses_what_is_no_differential_privacy(
    site_path: Path, base_path: Path, tmp_path: Path, keys_path: Path, more: list[str]
) -> None:
    arguments = _arguments(site_path, "weights", tmp_path / "out", "--base", str(base_path), *more)
    assert site.main(arguments) == site.EXIT_USAGE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["weights", "synthetic"])
def test_main__contribute_writes_nothing_where_too_few_are_held_out(
    site_path: Path, base_path: Path, tmp_path: Path, keys_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    arguments = _arguments(site_path, form, tmp_path / "out", "--base", str(base_path))
    for _ in range(2):
        assert site.main(arguments) == site.EXIT_NOT_FIT
        said = capsys.readouterr().err
        assert "G0 FAIL" in said and "nothing leaves" in said and "aster-" not in said
    assert not [path for path in (tmp_path / "out").glob("*") if path.is_file()], "a package or a draft was written"
    assert not list(tmp_path.glob("*.releases.json")), "nothing was released"


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["G7", "G5"])
def test_main__contribute_writes_nothing_where_the_gate_says_fail(
    larger_site_path: Path,
    gate_eye_path: Path,
    base_path: Path,
    tmp_path: Path,
    keys_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
) -> None:
    shutil.copytree(gate_eye_path, tmp_path, dirs_exist_ok=True)
    if failing == "G7":  # what an untrained generator draws is noise
        strict = replace(gate_policy.read_policy("demonstration"), max_kid=0.0)
        monkeypatch.setattr(gate_policy, "read_policy", lambda name: strict)
    else:  # every training remembers more than nothing
        monkeypatch.setattr(canaries, "MAX_EPSILON_WITHOUT_NOISE", -1.0)
    arguments = _arguments(larger_site_path, "weights", tmp_path / "out", "--base", str(base_path))
    assert site.main(arguments) == site.EXIT_NOT_FIT
    said = capsys.readouterr().err
    advice = {"G7": "train longer", "G5": "train for fewer steps"}[failing]
    assert f"{failing} FAIL" in said and advice in said and "nothing leaves" in said
    assert not [path for path in (tmp_path / "out").glob("*") if path.is_file()], "a package or a draft was written"
    assert not list((tmp_path / "out").rglob("*/package/weights")), "weights were staged"
    assert not list(tmp_path.glob("*.releases.json")), "nothing was released"
    (page_path,) = tmp_path.glob("*.gate.html")
    assert stat.S_IMODE(page_path.stat().st_mode) == 0o600
    (outcome_path,) = (tmp_path / "out").rglob("outcome.json")
    judged_ns = outcome_path.stat().st_mtime_ns
    assert site.main(arguments) == site.EXIT_NOT_FIT
    assert outcome_path.stat().st_mtime_ns == judged_ns, "it was judged again"


def test_main__contribute_synthetic_leaves_out_what_the_gate_flagged(
    larger_site_path: Path,
    gate_eye_path: Path,
    base_path: Path,
    tmp_path: Path,
    hub: Hub,
    keys_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(gate_eye_path, tmp_path, dirs_exist_ok=True)
    judge = gatehouse.judge

    def flagging(*arguments: Any, **terms: Any) -> gatehouse.Outcome:
        return replace(judge(*arguments, **terms), flagged=frozenset({1, 3}))

    monkeypatch.setattr(gatehouse, "judge", flagging)
    assert (
        site.main(_arguments(larger_site_path, "synthetic", tmp_path / "out", "--base", str(base_path)))
        == site.EXIT_FIT
    )
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened", hub)
    assert (manifest.form, manifest.num_images, len(rows)) == ("synthetic", 3, 3)
    assert [row["seed"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert (row["origin"], row["patient"], row["width_px"]) == ("synthetic", None, 32)
        assert row["prompt"].startswith("colour fundus photograph")
        assert row["generator_id"].startswith("site-")


def test_main__contribute_killed_goes_on_and_ends_the_same(
    larger_site_path: Path, gate_eye_path: Path, base_path: Path, tmp_path: Path, hub: Hub, keys_path: Path
) -> None:
    shutil.copytree(gate_eye_path, tmp_path, dirs_exist_ok=True)
    arguments = _arguments(
        larger_site_path, "weights", tmp_path / "out", "--base", str(base_path), "--images-seen", "240"
    )
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
    resumed = _package_in(tmp_path / "out", hub)
    assert not list(work_path.glob("*"))
    resumed.path.unlink()
    assert site.main(arguments) == site.EXIT_FIT
    undisturbed = _package_in(tmp_path / "out", hub)
    for one, other in zip(resumed.manifest.files, undisturbed.manifest.files, strict=True):
        # How often the loss is noted depends on the clock; what was learned does not.
        assert one == other or one.path == "training/metrics.jsonl"


def test_main__inspect_says_what_is_in_a_package(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: Hub, keys_path: Path
) -> None:
    site.main(_arguments(site_path, "images", tmp_path / "out"))
    package = _package_in(tmp_path / "out", hub)
    identity_path = hub.keys_path / "identity.txt"
    for reader in (["--keys", str(keys_path)], ["--identity", str(identity_path)]):
        capsys.readouterr()
        assert site.main(["inspect", str(package.path), *reader]) == site.EXIT_FIT
        words = capsys.readouterr().out
        assert package.sha256 in words and "de-identified" in words and "shards/part-00000.parquet" in words
        assert "Draft" not in words
        assert site.main(["inspect", str(package.path), "--json", *reader]) == site.EXIT_FIT
        content = json.loads(capsys.readouterr().out)
        assert content["manifest"]["site_id"] == "aster" and content["sha256"] == package.sha256
    assert site.main(["inspect", str(package.path), "--keys", str(tmp_path)]) == site.EXIT_USAGE
    assert "only the hub can open it" in capsys.readouterr().err
    package.path.write_bytes(package.path.read_bytes()[:-1])
    assert site.main(["inspect", str(package.path), "--identity", str(identity_path)]) == site.EXIT_USAGE
    assert "DAMAGED" in capsys.readouterr().err
    assert site.main(["inspect", str(package.path), "--keys", str(keys_path)]) == site.EXIT_USAGE


def test_main__contribute_needs_keys_before_it_works(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.main(_arguments(site_path, "images", tmp_path / "out")) == site.EXIT_USAGE
    assert "gretfound-site keys --site-id aster" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main__a_steward_with_a_passphrase_signs_after_reading(
    site_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    secret_path, wrong_path = tmp_path / "secret.txt", tmp_path / "wrong.txt"
    for path, text in ((secret_path, "open sesame\n"), (wrong_path, "open says me\n")):
        path.write_text(text)
        path.chmod(0o600)
    keys = ["--keys", str(tmp_path / "keys"), "--passphrase-file", str(secret_path)]
    assert site.main(["keys", "--site-id", "aster", "--hub", str(hub.keys_path / "hub.json"), *keys]) == site.EXIT_FIT
    words = capsys.readouterr().out
    assert "steward" in words and "locked" in words and "open sesame" not in words
    hub.change_roster("admit", f"card_path={tmp_path / 'keys' / 'aster.site.json'}")

    arguments = _arguments(site_path, "images", tmp_path / "out")
    for _ in range(2):  # run again, it finds the draft
        assert site.main(arguments) == site.EXIT_FIT
        assert "gretfound-site sign" in capsys.readouterr().out
    (draft_path,) = (tmp_path / "out").iterdir()
    assert draft_path.suffix == ".tar"
    assert site.main(["inspect", str(draft_path)]) == site.EXIT_FIT
    assert "Not sealed" in capsys.readouterr().out
    sign = ["sign", str(draft_path), "--keys", str(tmp_path / "keys")]
    assert site.main([*sign, "--passphrase-file", str(secret_path)]) == site.EXIT_USAGE, "nobody said yes"
    assert site.main([*sign, "--yes", "--passphrase-file", str(wrong_path)]) == site.EXIT_USAGE
    assert [path.name for path in (tmp_path / "out").iterdir()] == [draft_path.name]
    assert site.main([*sign, "--yes", "--passphrase-file", str(secret_path)]) == site.EXIT_FIT
    manifest, rows = _opened(tmp_path / "out", tmp_path / "opened", hub)
    assert (manifest.site_id, len(rows)) == ("aster", NUM_IMAGES)
    assert site.main(arguments) == site.EXIT_FIT, "it finds the sealed package"


@pytest.mark.parametrize("size_mib", [0.01, 2, 120])
@pytest.mark.parametrize("num_images", [1, 300, 2000, 60_000])
def test_parts__are_few_enough_and_none_is_too_large(size_mib: float, num_images: int) -> None:
    rng = random.Random(0)
    sizes = [int(size_mib * 2**20 * rng.choice((0.1, 1, 1, 1.5))) for _ in range(num_images)]
    total_bytes = sum(sizes)
    parts = dispatch._parts(sizes)
    assert [index for part in parts for index in part] == list(range(num_images))
    if total_bytes > sealing.MAX_TOTAL_BYTES:
        with pytest.raises(ConfigError, match="a package may hold 64"):
            dispatch._require_room(sizes)
    else:
        dispatch._require_room(sizes)
        assert len(parts) <= contribution.MAX_SHARDS
    assert max(sum(sizes[index] for index in part) for part in parts) <= contribution.MAX_SHARD_BYTES
    if num_images <= shard.IMAGES_PER_ROW_GROUP and total_bytes < 2**28:
        assert len(parts) == 1


def test_write_parts__keeps_what_was_made_of_the_same_content_alone(tmp_path: Path) -> None:
    image = phantom.draw_eye(phantom.SITES["aster"], seed=0, size_px=SIZE_PX).image
    asked: list[str] = []

    def write(word: str) -> str:
        def rows_of(part: range) -> Iterator[dict[str, Any]]:
            asked.append(word)
            yield shard.row_of(fundus.encode_png(image), site_id="aster", origin="real", cells={"camera": word})

        dispatch._write_parts([1], tmp_path / "package" / "shards", tmp_path, rows_of, content=[word])
        (row,) = pq.read_table(tmp_path / "package" / "shards" / "part-00000.parquet").to_pylist()
        return str(row["camera"])

    assert [write("one"), write("one"), write("two")] == ["one", "one", "two"]
    assert asked == ["one", "two"]


def test_main__columns_lists_the_dictionary(capsys: pytest.CaptureFixture[str]) -> None:
    assert site.main(["columns"]) == 0
    words = capsys.readouterr().out
    assert all(column.name in words for column in metadata.COLUMNS)


def test_parser__help_needs_no_torch() -> None:
    code = "import sys, gretfound.site; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
