"""Small real summaries for tests, made by disclosure control with numbers of the test's choice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gretfound import disclosure, lineage, metadata
from gretfound.disclosure import Policy
from gretfound.metadata import Cells, MetadataSummary


def policy_of(min_patients_per_cell: int) -> Policy:
    """The demonstration policy with another number; 1 tells every exact count but zeros."""
    return replace(disclosure.read_policy("demonstration"), min_patients_per_cell=min_patients_per_cell, min_patients=1)


def summary_of(rows: Sequence[Cells], *, min_patients: int = 1) -> MetadataSummary:
    """Summarises photographs; those without a patient are a patient each."""
    return disclosure.release(rows, policy=policy_of(min_patients)).summary


def told_counts(summary: MetadataSummary) -> dict[str, dict[Any, int]]:
    """The counts that a summary tells: by value of each column, and by two values of each pair."""
    told: dict[str, dict[Any, int]] = {
        key: {value: count for value, count in table.items() if count is not None}
        for key, table in summary.counts.items()
    }
    for name, rows in summary.pair_counts.items():
        told[name] = {(value, other): count for value, other, count in rows if count is not None}
    return told


def write_summary(staging_path: Path, rows: Sequence[Cells], *, policy: Policy | None = None) -> MetadataSummary:
    """Writes the members of a package; without a policy those that a hub of the demonstration policy takes."""
    policy = policy or disclosure.read_policy("demonstration")
    summary = disclosure.release(rows, policy=policy).summary
    folder_path = staging_path / "summary"
    folder_path.mkdir(parents=True, exist_ok=True)
    (folder_path / "metadata_summary.json").write_bytes(metadata.to_bytes(summary))
    report = disclosure.describe_for_hub(summary, policy=policy)
    (folder_path / "disclosure_report.json").write_bytes(lineage.canonical_json(report) + b"\n")
    return summary
