"""Screening: what the hub requires of an opened contribution's rows, counts and pages, beyond that they are readable.

A site's program keeps to all of this; the hub does not rely on it. Every value of a row is one that the summary tells,
every text follows from other values, and every page is the one text of known fields: so there is no room for a name, a
note or a date. Nothing here decodes a photograph.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from gretfound import deidentify, disclosure, lineage, metadata, signing
from gretfound.errors import ConfigError, ContributionRejected
from gretfound.metadata import MetadataSummary
from gretfound.signing import Document, UnreadableDocument

SUMMARY_PATH, REPORT_PATH = "summary/metadata_summary.json", "summary/disclosure_report.json"
SETTINGS_PATH, COURSE_PATH = "training/config.json", "training/metrics.jsonl"
_NAMES = tuple(each.name for each in metadata.ARROW_FIELDS)
_GENERATOR_ID = re.compile(r"site-[0-9a-f]{20}")
_FIRST_YEAR, _LAST_YEAR = 1900, 2100
_UPDATE = "update gretfound-site and contribute again"
_PageT = TypeVar("_PageT", bound=Document)


class _Settings(Document):
    """The settings of a training and drawing at a site: the fields of `gretfound.site.Recipe`."""

    method: Literal["lora", "full"]
    lora_rank: int = Field(ge=1, le=1024)
    images_seen: int = Field(ge=1, lt=10**12)
    batch_size: int = Field(ge=1, lt=10**6)
    learning_rate: float = Field(gt=0, le=1)
    num_drawn: int = Field(ge=0, lt=10**9)
    num_steps: int = Field(ge=1, lt=10**4)
    guidance_scale: float = Field(ge=0, le=100)
    jpeg_quality: int = Field(ge=0, le=100)
    seed: int = Field(ge=0, lt=2**53)
    device: Literal["cpu", "cuda"]


class _Loss(Document):
    """One line of the course of a training."""

    images_seen: int = Field(ge=0, lt=10**12)
    loss: float


def read_summary(folder_path: Path, *, policies: Sequence[str]) -> MetadataSummary:
    """Reads an opened contribution's summary and its disclosure report, and attacks the summary.

    Args:
        folder_path: The opened contribution.
        policies: The names of the disclosure policies that the hub admits.

    Raises:
        ContributionRejected: ``BAD_SUMMARY`` or ``BAD_REPORT`` if a page is not the one text of what it must hold;
            ``POLICY`` or ``DISCLOSURE`` as `disclosure.check`.
    """
    content = (folder_path / SUMMARY_PATH).read_bytes()
    try:
        summary = metadata.summary_from_json(signing.parse_json(content))
        is_right = metadata.to_bytes(summary) == content
    except ValueError:
        is_right = False
    if not is_right:
        raise ContributionRejected("BAD_SUMMARY", f"the metadata summary is not of this version; {_UPDATE}")
    admitted = [disclosure.read_policy(name) for name in policies]
    disclosure.check(summary, policies=admitted)
    (policy,) = [each for each in admitted if each.name == summary.variant]
    if (folder_path / REPORT_PATH).read_bytes() != _report(folder_path / REPORT_PATH, summary, policy):
        raise ContributionRejected("BAD_REPORT", f"the disclosure report is not that of the summary; {_UPDATE}")
    return summary


def _report(path: Path, summary: MetadataSummary, policy: disclosure.Policy) -> bytes | None:
    """Returns what the report must be; the one thing that it may say itself is that the site asks for more patients."""
    try:
        rules = policy.raised_to(int(signing.parse_json(path.read_bytes())["policy"]["min_patients_per_cell"]))
    except (ConfigError, ValueError, TypeError, KeyError):
        return None
    return lineage.canonical_json(disclosure.describe_for_hub(summary, policy=rules)) + b"\n"


def require_training(folder_path: Path) -> None:
    """Requires of the settings and the course of a training the known fields, each of its kind, and no other.

    Raises:
        ContributionRejected: ``BAD_TRAINING``.
    """
    try:
        _parse((folder_path / SETTINGS_PATH).read_bytes(), _Settings)
        lines = (folder_path / COURSE_PATH).read_bytes().splitlines()
        seen = [_parse(line, _Loss).images_seen for line in lines]
        is_right = seen == sorted(set(seen))
    except (UnreadableDocument, ValidationError):
        is_right = False
    if not is_right:
        raise ContributionRejected(
            "BAD_TRAINING", f"the training's settings or its course are not as this version writes them; {_UPDATE}"
        )


def _parse(content: bytes, expected: type[_PageT]) -> _PageT:
    signing.parse_json(content)  # a key twice, or a number that is not finite
    return expected.model_validate_json(content)


def require_counts(
    *, form: str, num_images: int, num_patients: int | None, num_rows: int, summary: MetadataSummary
) -> None:
    """Requires the manifest's counts to be those of the rows and of the summary.

    Args:
        form: The contribution's.
        num_images: The manifest's.
        num_patients: The manifest's.
        num_rows: Rows of all shards as they were packed.
        summary: The contribution's.

    Raises:
        ContributionRejected: ``COUNT_MISMATCH``.
    """
    required = summary.num_images if form == "weights" else num_rows
    if num_images != required or num_patients not in (None, summary.num_patients):
        raise ContributionRejected(
            "COUNT_MISMATCH", f"the manifest counts other photographs or patients than the package holds; {_UPDATE}"
        )


def require_real_row(row: Mapping[str, Any], summary: MetadataSummary) -> None:
    """Requires a row of a real photograph to be de-identified as the policy deid/1 has it.

    Raises:
        ContributionRejected: ``NOT_DEIDENTIFIED`` if patient or visit are no pseudonyms, the methods are not those of
            the row, or a column of drawn photographs is filled; ``CELL_NOT_TOLD`` for a value that may not leave.
    """
    cells = {name: row[name] for name in _NAMES if row[name] is not None}
    patient, visit, year = row["patient"], row["visit"], row["shifted_year"]
    is_right = (
        (patient is None or deidentify.is_pseudonym(patient))
        and (visit is None or deidentify.is_uid_pseudonym(visit))
        and (year is None or (patient is not None and _FIRST_YEAR <= year <= _LAST_YEAR))
        and row["deid_methods"] == deidentify.methods_of(cells, has_year=year is not None)
        and (row["generator_id"], row["seed"], row["prompt"]) == (None, None, None)
    )
    if not is_right:
        raise ContributionRejected("NOT_DEIDENTIFIED", f"a row is not de-identified; {_UPDATE}")
    told = {name: value for name, value in cells.items() if name not in ("patient", "visit", *metadata.MEASUREMENTS)}
    _require_told(told, summary)
    for name in set(cells) & set(metadata.MEASUREMENTS):
        column = metadata.BY_KEY[name]
        _require_cell(column.low <= cells[name] <= column.high)


def require_drawn_row(row: Mapping[str, Any], summary: MetadataSummary) -> None:
    """Requires a row of a drawn photograph to stand for no patient: its values are told, its caption says these.

    Raises:
        ContributionRejected: ``PATIENT_IN_SYNTHETIC`` if a column of patients is filled; ``CELL_NOT_TOLD`` for a
            value or words that do not follow from the summary.
    """
    if any(row[name] is not None for name in ("patient", "visit", "shifted_year", "deid_methods")):
        raise ContributionRejected("PATIENT_IN_SYNTHETIC", "a drawn photograph names a patient; seal it again")
    cells = {name: row[name] for name in _NAMES if row[name] is not None}
    _require_told(cells, summary)
    _require_cell(
        row["prompt"] == metadata.caption(cells)
        and bool(_GENERATOR_ID.fullmatch(row["generator_id"] or ""))
        and (row["seed"] is None or row["seed"] >= 0)
    )


def _require_told(cells: Mapping[str, Any], summary: MetadataSummary) -> None:
    """Requires each value to have a told count, an age to be the middle of its band, and no other column."""
    _require_cell(set(cells) <= {*metadata.SUMMARY_KEYS, "age"} and 0 <= cells.get("age", 0) <= 120)
    texts = metadata.summary_texts(cells)
    if "dr" in cells:  # the grade says it already
        _require_cell(texts.pop("dr_present", None) in (None, "yes" if cells["dr"] > 0 else "no"))
    _require_cell(all(summary.counts.get(key, {}).get(text) is not None for key, text in texts.items()))
    _require_cell("age" not in cells or metadata.cells_told(cells, {"age_band"})["age"] == cells["age"])


def _require_cell(is_right: bool) -> None:
    if not is_right:
        raise ContributionRejected("CELL_NOT_TOLD", f"a row holds a value that the summary does not tell; {_UPDATE}")
