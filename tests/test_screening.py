"""Screening: what a site's own program makes passes; a name, a note or another number anywhere does not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from gretfound import deidentify, disclosure, dispatch, matching, metadata, screening, shard
from gretfound.errors import ContributionRejected
from gretfound.metadata import MetadataSummary
from tests import summaries

KEY = b"k" * 32
KNOWN = [
    {
        "patient": f"P{n}",
        "sex": ("female", "male")[n % 2],
        "dr": n % 5,
        "dr_present": n % 5 > 0,
        "age": 42.0 + 5 * (n % 6),
        "camera": ("Topcon", "Canon")[n // 20],
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def pages_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages")
    summaries.write_summary(path, KNOWN)
    return path


@pytest.fixture(scope="module")
def summary(pages_path: Path) -> MetadataSummary:
    return screening.read_summary(pages_path, policies=["demonstration"])


def _real_row(**changes: Any) -> dict[str, Any]:
    """A row as the site makes it, without its image."""
    cells = {"sex": "female", "dr": 2, "age": 52.0, "camera": "Topcon", "hba1c": 7.5}
    row = dict.fromkeys(shard.SCHEMA.names) | cells | {"patient": deidentify.pseudonym(KEY, "P1")}
    row |= {"visit": deidentify.uid_pseudonym(KEY, "1.2.3"), "shifted_year": 2019}
    return row | {"deid_methods": deidentify.methods_of(cells, has_year=True)} | changes


def _code_of(check: Callable[[], object]) -> str:
    try:
        check()
    except ContributionRejected as error:
        return error.code
    return ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ""),
        ({"patient": "P1"}, "NOT_DEIDENTIFIED"),
        ({"patient": deidentify.pseudonym(KEY, "P1").upper()}, "NOT_DEIDENTIFIED"),
        ({"visit": "2024-03-09"}, "NOT_DEIDENTIFIED"),
        ({"visit": "1.2.840.10008.1"}, "NOT_DEIDENTIFIED"),
        ({"visit": "2.25.01"}, "NOT_DEIDENTIFIED"),
        ({"visit": f"2.25.{2**128}"}, "NOT_DEIDENTIFIED"),
        ({"deid_methods": None}, "NOT_DEIDENTIFIED"),
        ({"deid_methods": "deid/1 113100 113101"}, "NOT_DEIDENTIFIED"),
        ({"deid_methods": "deid/1 113100 113101 113107 113108 Smith"}, "NOT_DEIDENTIFIED"),
        ({"shifted_year": None}, "NOT_DEIDENTIFIED"),
        ({"shifted_year": 1066}, "NOT_DEIDENTIFIED"),
        ({"patient": None}, "NOT_DEIDENTIFIED"),
        ({"prompt": "Jane Doe"}, "NOT_DEIDENTIFIED"),
        ({"generator_id": "Jane Doe"}, "NOT_DEIDENTIFIED"),
        ({"seed": 19560412}, "NOT_DEIDENTIFIED"),
        ({"camera": "Dr Smith's camera"}, "CELL_NOT_TOLD"),
        ({"ethnicity": "Jane Doe"}, "CELL_NOT_TOLD"),
        ({"sex": "Jane Doe"}, "CELL_NOT_TOLD"),
        ({"dr": 7}, "CELL_NOT_TOLD"),
        ({"age": 53.0}, "CELL_NOT_TOLD"),
        ({"age": 22.0}, "CELL_NOT_TOLD"),
        ({"age": float("nan")}, "CELL_NOT_TOLD"),
        ({"hba1c": 12_345.0}, "CELL_NOT_TOLD"),
        ({"dr_present": False}, "CELL_NOT_TOLD"),
    ],
)
def test_require_real_row__is_deidentified_and_says_what_is_told(
    summary: MetadataSummary, changes: dict[str, Any], code: str
) -> None:
    assert _code_of(lambda: screening.require_real_row(_real_row(**changes), summary)) == code


def _drawn_rows(summary: MetadataSummary, num: int = 40) -> list[dict[str, Any]]:
    """Rows as the site draws them, without their images."""
    rows = []
    for seed, cells in enumerate(matching.draw_cells(matching.fit_groups(summary, balance={}), num=num, seed=0)):
        row = dict.fromkeys(shard.SCHEMA.names) | metadata.arrow_values(cells)
        rows.append(row | {"prompt": metadata.caption(cells), "seed": seed, "generator_id": f"site-{seed:020x}"})
    return rows


def test_require_drawn_row__takes_what_follows_from_the_summary(summary: MetadataSummary) -> None:
    rows = _drawn_rows(summary)
    assert any(row["dr"] == 2 for row in rows)
    for row in rows:
        screening.require_drawn_row(row, summary)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"patient": "0" * 32}, "PATIENT_IN_SYNTHETIC"),
        ({"visit": "2.25.1"}, "PATIENT_IN_SYNTHETIC"),
        ({"shifted_year": 2019}, "PATIENT_IN_SYNTHETIC"),
        ({"deid_methods": "deid/1 113100 113101"}, "PATIENT_IN_SYNTHETIC"),
        ({"prompt": "colour fundus photograph of Jane Doe"}, "CELL_NOT_TOLD"),
        ({"generator_id": "Jane Doe"}, "CELL_NOT_TOLD"),
        ({"seed": -1}, "CELL_NOT_TOLD"),
        ({"hba1c": 7.5}, "CELL_NOT_TOLD"),
        ({"camera": "Dr Smith's camera"}, "CELL_NOT_TOLD"),
    ],
)
def test_require_drawn_row__stands_for_no_patient(summary: MetadataSummary, changes: dict[str, Any], code: str) -> None:
    row = _drawn_rows(summary)[0] | changes
    assert _code_of(lambda: screening.require_drawn_row(row, summary)) == code


def test_require_counts__those_of_the_rows_and_of_the_summary(summary: MetadataSummary) -> None:
    def code_of(form: str, num_images: int, num_patients: int | None) -> str:
        terms: dict[str, Any] = {"form": form, "num_images": num_images, "num_patients": num_patients}
        return _code_of(lambda: screening.require_counts(**terms, num_rows=7, summary=summary))

    assert summary.num_images == summary.num_patients == 40
    assert code_of("images", 7, 40) == code_of("synthetic", 7, None) == code_of("weights", 40, 40) == ""
    for terms in (("images", 40, 40), ("synthetic", 6, 40), ("weights", 7, 40), ("images", 7, 39)):
        assert code_of(*terms) == "COUNT_MISMATCH"


def _change(path: Path, found: bytes, instead: bytes) -> None:
    content = path.read_bytes()
    assert found in content
    path.write_bytes(content.replace(found, instead, 1))


@pytest.mark.parametrize(
    ("page", "found", "instead", "code"),
    [
        ("metadata_summary", b'"num_images": 40', b'"num_images": 40, "num_images": 40', "BAD_SUMMARY"),
        ("metadata_summary", b'"num_images": 40', b'"num_images": NaN', "BAD_SUMMARY"),
        ("metadata_summary", b'"num_images": 40', b'"num_images": 40, "note": "Jane Doe"', "BAD_SUMMARY"),
        ("metadata_summary", b'"num_images": 40', b'"num_images": 40.0', "BAD_SUMMARY"),
        ("metadata_summary", b'"num_images": 40', b'"num_images":  40', "BAD_SUMMARY"),
        ("disclosure_report", b'"num_counts_told":', b'"num_counts_told":1,"num_counts_told":', "BAD_REPORT"),
        ("disclosure_report", b'"why":"', b'"note":"Jane Doe","why":"', "BAD_REPORT"),
        ("disclosure_report", b'"why":"', b'"why":"Jane Doe: ', "BAD_REPORT"),
        ("disclosure_report", b'"min_patients_per_cell":2', b'"min_patients_per_cell":1', "BAD_REPORT"),
        ("disclosure_report", b'"min_patients_per_cell":2', b'"min_patients_per_cell":NaN', "BAD_REPORT"),
        ("disclosure_report", b"{", b"[", "BAD_REPORT"),
    ],
)
def test_read_summary__the_one_text_of_each_page(
    pages_path: Path, tmp_path: Path, page: str, found: bytes, instead: bytes, code: str
) -> None:
    shutil.copytree(pages_path, tmp_path, dirs_exist_ok=True)
    _change(tmp_path / "summary" / f"{page}.json", found, instead)
    assert _code_of(lambda: screening.read_summary(tmp_path, policies=["demonstration"])) == code


def test_read_summary__takes_the_report_of_a_site_that_asks_for_more_patients(tmp_path: Path) -> None:
    stricter = disclosure.read_policy("demonstration").raised_to(6)
    made = summaries.write_summary(tmp_path, KNOWN, policy=stricter)
    assert screening.read_summary(tmp_path, policies=["demonstration", "standard"]) == made


def _training(folder_path: Path) -> Path:
    (folder_path / "training").mkdir()
    settings = json.dumps(asdict(dispatch.Recipe())).encode()
    (folder_path / "training" / "config.json").write_bytes(settings)
    (folder_path / "training" / "metrics.jsonl").write_bytes(
        b'{"images_seen":8,"loss":0.5}\n{"images_seen":16,"loss":0}\n'
    )
    return folder_path / "training"


@pytest.mark.parametrize(
    ("page", "found", "instead"),
    [
        ("config.json", b'"seed": 0', b'"seed": 0, "seed": 0'),
        ("config.json", b'"seed": 0', b'"seed": "Jane Doe"'),
        ("config.json", b'"seed": 0', b'"seed": 0, "note": "Jane Doe"'),
        ("config.json", b'"seed": 0', b'"seed": true'),
        ("config.json", b'"guidance_scale": 3.0', b'"guidance_scale": NaN'),
        ("config.json", b'"cpu"', b'"Jane Doe"'),
        ("config.json", b'"seed": 0', b'"sead": 0'),
        ("metrics.jsonl", b'"loss":0.5', b'"loss":NaN'),
        ("metrics.jsonl", b'"loss":0.5', b'"loss":0.5,"loss":0.5'),
        ("metrics.jsonl", b'"loss":0.5', b'"loss":0.5,"note":"Jane Doe"'),
        ("metrics.jsonl", b'"images_seen":16', b'"images_seen":4'),
        ("metrics.jsonl", b"\n", b"\n\n"),
    ],
)
def test_require_training__known_fields_of_their_kind(tmp_path: Path, page: str, found: bytes, instead: bytes) -> None:
    folder_path = _training(tmp_path)
    screening.require_training(tmp_path)
    _change(folder_path / page, found, instead)
    assert _code_of(lambda: screening.require_training(tmp_path)) == "BAD_TRAINING"


def test_require_training__knows_the_settings_of_the_sites_program() -> None:
    assert set(screening._Settings.model_fields) == {each.name for each in fields(dispatch.Recipe)}
