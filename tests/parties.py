"""A real hub and its sites, with keys of their own, as tests of packages need them."""

import functools
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from gretfound import keyring, roster, sealing, signing, storage, strongbox
from gretfound.gate import policy as gate_policy
from gretfound.gate import report as gate_report
from gretfound.gate.verdict import Check
from gretfound.keyring import Keyring
from gretfound.roster import Roster
from gretfound.sealing import Manifest, Package
from jobs import roster as roster_job


def today() -> date:
    """Returns the date (UTC); within a minute of midnight it waits, so that what a test makes is of one day."""
    if (datetime.now(UTC) + timedelta(minutes=1)).date() != datetime.now(UTC).date():
        time.sleep(61)
    return datetime.now(UTC).date()


class Hub:
    """A hub with keys and a roster.

    Args:
        hub_uri: Where it lies.
        keys_path: Where its keys lie, outside of it.
    """

    def __init__(self, hub_uri: str, keys_path: Path) -> None:
        self.uri = hub_uri
        self.keys_path = keys_path
        self._arguments = [f"hub_uri={hub_uri}", f"keys_path={keys_path}"]
        roster_job.main(["init", *self._arguments])

    @functools.cached_property
    def identities(self) -> tuple[str, ...]:
        """Its online age identity."""
        return strongbox.read_identities(self.keys_path / strongbox.IDENTITY_NAME)

    @property
    def roster(self) -> Roster:
        """Its roster as it is now."""
        return roster.read_current(self.uri, anchor=strongbox.read_anchor(self.keys_path))[0]

    def change_roster(self, verb: str, *arguments: str) -> str:
        """Makes the roster's next version."""
        return roster_job.main([verb, *self._arguments, *arguments])

    def join(self, folder_path: Path, site_id: str, *, passphrase: str = "") -> Keyring:
        """Makes a site's keys, gives it the hub's card and enters its own into the roster."""
        ring = keyring.make(folder_path, site_id, passphrase=passphrase)
        ring.hub_path.write_bytes((self.keys_path / strongbox.CARD_NAME).read_bytes())
        self.change_roster("admit", f"card_path={ring.card_path}")
        return ring

    def open(self, package_path: Path, into_path: Path | None, **changes: Any) -> Manifest:
        """Opens a package with this hub's identity and roster, today, unless ``changes`` say otherwise."""
        identities = changes.pop("identities", self.identities)
        known: dict[str, Any] = {
            "own_recipients": strongbox.recipients_of(identities),
            "today": today(),
        }
        if "roster" not in changes:
            known["roster"] = self.roster
        with storage.scratch_folder() as folder:
            tar_path = Path(folder) / "package.tar"
            sealing.unseal(package_path, tar_path, identities=identities)
            return sealing.unpack(tar_path, into_path, **(known | changes))


def draft(ring: Keyring, staging_path: Path, draft_path: Path, **changes: Any) -> Package:
    """Writes a folder as a draft of photographs, unless ``changes`` say otherwise."""
    terms: dict[str, Any] = {
        "site_id": ring.site_id,
        "form": "images",
        "country": "India",
        "policy": "demonstration/1",
        "base_sha256": "",
        "num_images": 3,
        "num_patients": None,
        "label": keyring.label(ring, today=today()),
        "container_key": signing.read_private_key(ring.private_path("container")),
        "steward_public_key": keyring.approval_of(ring, "steward").public_key,
    }
    return sealing.draft(staging_path, draft_path, **(terms | changes))


def seal(ring: Keyring, staging_path: Path, package_path: Path, **changes: Any) -> Package:
    """Writes a folder as a sealed package, the next of its keyring."""
    draft_path = package_path.with_suffix(".draft")
    draft(ring, staging_path, draft_path, **changes)
    return keyring.seal(ring, draft_path, package_path, today=today())


def write_gate_report(staging_path: Path, *, policy_name: str = "standard", **changes: Any) -> None:
    """Writes a report of the privacy gate that a hub takes, unless ``changes`` of its content say otherwise."""
    names = [*gate_report.REQUIRED_CHECKS]
    passed = [Check(name=name, verdict="PASS", measured={}, required="a test", reason="a test") for name in names]
    weights_path = staging_path / "weights" / "adapter.safetensors"
    report = gate_report.make(
        passed,
        policy_stamp=gate_policy.read_policy(policy_name).stamp,
        weights_sha256=storage.sha256_of(weights_path) if weights_path.exists() else "0" * 64,
    )
    content = signing.canonical_json(report.model_dump(mode="json") | changes)
    storage.write_bytes(str(staging_path / gate_report.PATH), content)


def take_number(hub: Hub, manifest: Manifest, package_sha256: str, **changes: Any) -> None:
    """Takes a package's number at a hub."""
    sealing.take_number(
        hub.uri,
        site_id=manifest.site_id,
        container_key_id=manifest.approvals[0].key_id,
        sequence=manifest.sequence,
        previous_sha256=manifest.previous_sha256,
        package_sha256=package_sha256,
        **changes,
    )


def hub_at(folder_path: Path) -> Hub:
    """Makes a hub in a folder, its keys beside it."""
    return Hub(storage.normalised(str(folder_path / "hub")), folder_path / "hub.keys")
