"""A site's veto: its signed list of drawn photographs that look like its own, and what the hub does with it.

The list holds image ids, digests of *drawn* pixels that the hub has already, and nothing of a real photograph. Taken
in, it is `HUB/vetoes/SITE/SHA256.json`, as the site signed it; nothing removes it. No corpus that is assembled from
then on holds these photographs (`gretfound.corpus`).
"""

import hashlib
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, StringConstraints

from gretfound import ledger, roster, shard, signing, storage
from gretfound.errors import ContributionRejected, LineageError
from gretfound.lineage import ShardSet
from gretfound.roster import Approval, Roster, Sha256, SiteId
from gretfound.signing import Document, UnreadableDocument

FOLDER = "vetoes"
EVENT = "vetoed"
VETO_TYPE = "application/vnd.gretfound.veto+json"
MAX_DAYS = 90  # that a list may be on its way
MAX_BYTES = 128 * 2**20  # ids of a million photographs


class Veto(Document):
    """Photographs of one shard that a site wants in no corpus; both of its keys sign it."""

    schema_version: Literal["gretfound-veto/1"] = "gretfound-veto/1"
    site_id: SiteId
    shard_sha256: Sha256
    image_ids: tuple[Sha256, ...]
    num_compared: int = Field(ge=1)
    policy: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,32}/[0-9]{1,6}$")]
    created: date
    approvals: tuple[Approval, Approval]


def sign(veto: Veto, keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """Returns a list signed by the site's two keys."""
    return signing.sign(veto.to_bytes(), VETO_TYPE, keys)


def read(content: bytes) -> Veto:
    """Reads a list strictly; verifies that the keys which it names signed it, not whose they are.

    Raises:
        ContributionRejected: ``TOO_LARGE``, the code of `signing.parse_document`, ``BAD_FIELD`` or ``BAD_SIGNATURE``.
    """
    if len(content) > MAX_BYTES:
        raise ContributionRejected("TOO_LARGE", f"found {len(content):,} bytes; required at most {MAX_BYTES:,}")
    try:
        envelope = signing.read_envelope(content, VETO_TYPE)
        veto = signing.parse_document(envelope.payload, Veto)
    except UnreadableDocument as error:
        raise ContributionRejected(
            error.code, f"this is no site's drop list ({error}); `gretfound-site veto` writes one"
        ) from error
    if list(veto.image_ids) != sorted(set(veto.image_ids)):
        raise ContributionRejected(
            "BAD_FIELD", "the image ids are not sorted, or one stands twice; make the list again"
        )
    keys = {each.key_id: signing.public_from_hex(each.public_key) for each in veto.approvals}
    is_signed = signing.verified_key_ids(envelope, keys.values()) == keys.keys() == envelope.signatures.keys()
    if [each.role for each in veto.approvals] != ["container", "steward"] or len(keys) != 2 or not is_signed:
        raise ContributionRejected(
            "BAD_SIGNATURE", "required the signatures of a container's and of a steward's key; make the list again"
        )
    return veto


def take(hub_uri: str, content: bytes, *, known_sites: Roster, today: date) -> Veto:
    """Verifies a list, keeps it and enters it into the ledger; doing it again is harmless.

    Args:
        hub_uri: The hub.
        content: The list as it arrived.
        known_sites: The hub's roster, verified.
        today: The day in UTC.

    Raises:
        ContributionRejected: As `read` and `roster.require_approvals`; ``ROSTER_EXPIRED``, ``VETO_EXPIRED``,
            ``UNKNOWN_SHARD``, ``FOREIGN_SHARD`` or ``UNKNOWN_IMAGE``. Nothing was changed then.
    """
    veto = read(content)
    roster.require_current(known_sites, today)
    roster.require_approvals(known_sites, veto.site_id, veto.approvals, today)
    if not veto.created - timedelta(days=1) <= today <= veto.created + timedelta(days=MAX_DAYS):
        raise ContributionRejected(
            "VETO_EXPIRED", f"it is of {veto.created}; required {MAX_DAYS} days old at most: make the list again"
        )
    _require_own_images(hub_uri, veto)
    digest = hashlib.sha256(content).hexdigest()
    storage.create_bytes(storage.join(hub_uri, FOLDER, veto.site_id, f"{digest}.json"), content)
    details = {"site_id": veto.site_id, "shard_sha256": veto.shard_sha256, "num_images": len(veto.image_ids)}
    ledger.append(hub_uri, event=EVENT, subject=f"veto-{digest}", details=details)
    return veto


def _require_own_images(hub_uri: str, veto: Veto) -> None:
    """Requires that the site's generator drew the shard, and that each id is a row of it."""
    found = {
        (each.site_id, each.origin, part.path)
        for each in storage.read_records(hub_uri, ShardSet)
        for part in each.shards
        if part.sha256 == veto.shard_sha256
    }
    if not found:
        raise ContributionRejected(
            "UNKNOWN_SHARD", f"this hub has no shard {veto.shard_sha256}; compare with the file that the hub gave out"
        )
    paths = [path for site_id, origin, path in found if (site_id, origin) == (veto.site_id, "synthetic")]
    if not paths:
        raise ContributionRejected(
            "FOREIGN_SHARD", f"the generator of {veto.site_id} did not draw the shard; a site vetoes its own's only"
        )
    rows = shard.read_rows(storage.join(hub_uri, paths[0]), columns=["image_id"])
    unknown = set(veto.image_ids) - {row["image_id"] for row in rows}
    if unknown:
        raise ContributionRejected(
            "UNKNOWN_IMAGE",
            f"{len(unknown)} of {len(veto.image_ids)} ids are no rows of the shard; make the list again",
        )


def vetoed_image_ids(hub_uri: str) -> list[str]:
    """Returns the ids of all drawn photographs that a site vetoed, sorted.

    Raises:
        LineageError: If a list was changed at the hub.
    """
    image_ids: set[str] = set()
    for uri in storage.list_uris(storage.join(hub_uri, FOLDER)):
        content = storage.read_bytes(uri)
        if uri.rpartition("/")[2] != f"{hashlib.sha256(content).hexdigest()}.json":
            raise LineageError(f"{uri} is not what a site signed; restore it from a copy")
        image_ids |= set(read(content).image_ids)
    return sorted(image_ids)
