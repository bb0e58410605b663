"""Opening: the part of intake that touches a stranger's bytes; it runs in confined processes (`confinement`) alone.

Two of them open a package. The first, ``unseal``, has the hub's age identity and decrypts; it looks at nothing that it
decrypts. The second, ``screen``, has no secret; it verifies signatures and digests, parses and decodes. They answer
with codes, counts and the manifest's fields, never with a contribution's content or words. What ``screen`` leaves in
its folder it has written itself: shards are written anew, row by row.
"""

from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gretfound import contribution, screening, sealing, signing
from gretfound.confinement import Report
from gretfound.errors import ContributionRejected
from gretfound.gate import statement
from gretfound.generator import adapter
from gretfound.roster import Roster
from gretfound.sealing import Manifest

ORIGINS = {"images": "real", "synthetic": "synthetic"}


def answer(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Does one task of a package's admission.

    Args:
        request: ``task`` is ``unseal`` (with ``package_path``, ``tar_path`` and the hub's ``identities``), ``screen``
            (with ``tar_path``, ``into_path``, the hub's ``own_recipients``, its ``roster`` as text, its ``policy`` and
            ``today``) or ``weigh`` (with ``adapter_path`` and ``base_weights_path``).
        report: Told, by ``screen``, each ``state`` that the package has passed, with SIGNED the ``signatures``, and the
            ``manifest`` once every byte is verified.

    Returns:
        For ``screen``: ``rejected``, the rows of shards that were taken out, by reason, and of a form with a generator
        what the package states of its privacy, ``statement``, or ``statement_code``, why it cannot be read: it is
        judged in its turn. For ``weigh``: ``terms`` and ``measured``.

    Raises:
        ContributionRejected: With the code of the check that did not hold.
    """
    match request["task"]:
        case "unseal":
            sealing.unseal(Path(request["package_path"]), Path(request["tar_path"]), identities=request["identities"])
            return {}
        case "screen":
            manifest = sealing.unpack(
                Path(request["tar_path"]),
                Path(request["into_path"]),
                own_recipients=request["own_recipients"],
                roster=signing.parse_document(request["roster"].encode(), Roster),
                today=date.fromisoformat(request["today"]),
                on_signed=lambda signatures: report({"state": "SIGNED", "signatures": signatures.decode()}),
            )
            report({"manifest": manifest.to_bytes().decode()})
            return _screen(Path(request["into_path"]), manifest, request["policy"], report)
        case "weigh":
            terms, measured = adapter.examine(Path(request["adapter_path"]), Path(request["base_weights_path"]))
            return {"terms": asdict(terms), "measured": asdict(measured)}
        case task:
            raise ValueError(f"found the task {task!r}; required unseal, screen or weigh")


def _screen(opened_path: Path, manifest: Manifest, policy: str, report: Report) -> dict[str, Any]:
    summary = screening.read_summary(opened_path, policies=sorted({"standard", policy}))
    num_images, rejected = 0, Counter[str]()
    for path in sorted(opened_path.glob("shards/*.parquet")):
        rejected.update(
            contribution.screen_shard_file(
                path, site_id=manifest.site_id, origin=ORIGINS[manifest.form], summary=summary
            )
        )
        num_images += pq.read_metadata(path).num_rows
    if manifest.form in ORIGINS and not num_images:
        raise ContributionRejected("NO_READABLE_IMAGES", "no photograph of the package is readable; contribute again")
    if (opened_path / "training").is_dir():
        screening.require_training(opened_path)
    screening.require_counts(
        form=manifest.form,
        num_images=manifest.num_images,
        num_patients=manifest.num_patients,
        num_rows=num_images + rejected.total(),
        summary=summary,
    )
    report({"state": "STRUCTURE"})
    counts = {"rejected": dict(sorted(rejected.items()))}
    if manifest.form == "images":
        return counts
    try:
        return counts | {
            "statement": statement.read(opened_path, num_patients=summary.num_patients).to_bytes().decode()
        }
    except ContributionRejected as error:
        return counts | {"statement_code": error.code}
