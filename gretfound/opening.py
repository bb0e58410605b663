"""Opening: the part of intake that touches a stranger's bytes; it runs in a confined process (`confinement`) alone.

It answers with counts, digests and the manifest's fields, never with a contribution's content, and leaves the opened
members in its folder. What it leaves there it has written itself: shards are written anew, row by row.
"""

import json
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gretfound import contribution, disclosure, metadata, sealing, signing
from gretfound.confinement import Report
from gretfound.errors import ContributionRejected
from gretfound.generator import adapter
from gretfound.roster import Roster
from gretfound.sealing import Manifest

ORIGINS = {"images": "real", "synthetic": "synthetic"}


def answer(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Does one task of a package's admission.

    Args:
        request: ``task`` is ``open`` (with ``package_path``, ``into_path``, the hub's ``identities``, its ``roster`` as
            text, its ``policy`` and ``today``) or ``weigh`` (with ``adapter_path`` and ``base_weights_path``).
        report: Told each ``state`` that the package has passed, and the ``manifest`` once every byte is verified.

    Returns:
        For ``open``: ``rejected``, the rows of shards that were taken out, by reason. For ``weigh``: ``measured``.

    Raises:
        ContributionRejected: With the code of the check that did not hold.
    """
    match request["task"]:
        case "open":
            manifest = _unseal(request, report)
            return _screen(Path(request["into_path"]), manifest, request["policy"], report)
        case "weigh":
            _, measured = adapter.examine(Path(request["adapter_path"]), Path(request["base_weights_path"]))
            return {"measured": asdict(measured)}
        case task:
            raise ValueError(f"found the task {task!r}; required open or weigh")


def _unseal(request: dict[str, Any], report: Report) -> Manifest:
    """Decrypts a package, verifies its signatures and unpacks it: the one place that knows how packages are sealed."""
    manifest = sealing.open_sealed(
        Path(request["package_path"]),
        Path(request["into_path"]),
        identities=request["identities"],
        roster=signing.parse_document(request["roster"].encode(), Roster),
        today=date.fromisoformat(request["today"]),
        on_passed=lambda state: report({"state": state}),
    )
    report({"manifest": manifest.to_bytes().decode()})
    return manifest


def _screen(opened_path: Path, manifest: Manifest, policy: str, report: Report) -> dict[str, Any]:
    num_images, rejected = 0, Counter[str]()
    for path in sorted(opened_path.glob("shards/*.parquet")):
        rejected.update(contribution.screen_shard_file(path, site_id=manifest.site_id, origin=ORIGINS[manifest.form]))
        num_images += pq.read_metadata(path).num_rows
    if manifest.form in ORIGINS and not num_images:
        raise ContributionRejected("NO_READABLE_IMAGES", "no photograph of the package is readable; contribute again")
    report({"state": "STRUCTURE"})
    _require_summary(opened_path / "summary" / "metadata_summary.json", policy)
    return {"rejected": dict(sorted(rejected.items()))}


def _require_summary(path: Path, policy: str) -> None:
    try:
        summary = metadata.summary_from_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ContributionRejected(
            "BAD_SUMMARY", "the metadata summary is not of this version; update gretfound-site and contribute again"
        ) from error
    disclosure.check(summary, policies=[disclosure.read_policy(name) for name in sorted({"standard", policy})])
