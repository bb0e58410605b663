"""The roster: which keys sign for which site, and for whom packages are sealed; signed by several people at the hub.

One document, in versions that follow one another; it gives what The Update Framework gives a repository, without its
four roles, because there is one reader (the hub's intake) that fetches one file from its own store:

- threshold: each version is signed by at least `Root.threshold` (two or more) of the root keys, which lie with
  different people. The root keys change by a version that the old *and* the new ones sign, each to its threshold.
- trust anchor: the digest of version 1's root, kept beside the hub's private keys and not in the store.
- rollback and gaps: version n names the digest of version n - 1, none may be missing, and the hub's hash-chained ledger
  remembers the newest version; an older roster than that is refused.
- freeze: every version expires after `MAX_DAYS` at the latest, and an expired roster admits nothing.
- revocation: by key, by site, effective on every package that arrives from that day on, whatever date it bears.

TUF's snapshot and timestamp roles protect readers of many files behind mirrors; with one file they would repeat its
version and its expiry. Source: https://theupdateframework.github.io/specification/v1.0.33/
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from typing import Annotated, Literal

import pyrage
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from securesystemslib.dsse import Envelope

from gretfound import ledger, signing, storage
from gretfound.errors import ConfigError, ContributionRejected, LineageError
from gretfound.signing import HEX_256_BITS, Document, UnreadableDocument

FOLDER = "roster"
EVENT = "roster"
ROSTER_TYPE = "application/vnd.gretfound.roster+json"
SITE_CARD_TYPE = "application/vnd.gretfound.site-card+json"
MAX_DAYS = 90
SITE_ID = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"


def _require_recipient(text: str) -> str:
    try:
        pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError:
        raise ValueError("it is no age recipient") from None
    return text


PublicKeyHex = Annotated[str, StringConstraints(pattern=HEX_256_BITS)]
Sha256 = Annotated[str, StringConstraints(pattern=HEX_256_BITS)]
SiteId = Annotated[str, StringConstraints(pattern=SITE_ID)]
Recipient = Annotated[str, AfterValidator(_require_recipient)]
KeyRole = Literal["container", "steward"]


class Approval(Document):
    """A key that signs for a site, and as what."""

    role: KeyRole
    public_key: PublicKeyHex

    @property
    def key_id(self) -> str:
        """The id of the key."""
        return signing.key_id(signing.public_from_hex(self.public_key))


class SiteCard(Document):
    """What a site tells the hub about itself: its pseudonym and its keys, signed by all of them."""

    schema_version: Literal["gretfound-site-card/1"] = "gretfound-site-card/1"
    site_id: SiteId
    keys: tuple[Approval, ...] = Field(min_length=2, max_length=2)


class HubCard(Document):
    """What the hub tells its sites: for whom to seal, and with which key it signs receipts.

    Its digest is compared over the telephone.
    """

    schema_version: Literal["gretfound-hub-card/2"] = "gretfound-hub-card/2"
    recipients: tuple[Recipient, Recipient]
    receipt_key: PublicKeyHex

    @property
    def canary_seed(self) -> int:
        """What this hub's canaries (`gretfound.gate.canaries`) are drawn from: a digest of its recipients."""
        return int.from_bytes(hashlib.sha256("\n".join(sorted(self.recipients)).encode()).digest()[:5], "big")


class SiteKey(Approval):
    """A site's key as the hub knows it; the days are the first and the last on which a package may arrive with it."""

    valid_from: date
    valid_until: date
    revoked: date | None


class RosterSite(Document):
    """A site and its keys, old ones included."""

    site_id: SiteId
    suspended: date | None
    keys: tuple[SiteKey, ...]


class Root(Document):
    """The keys that sign the roster, and how many of them must."""

    threshold: int = Field(ge=2, le=16)
    public_keys: tuple[PublicKeyHex, ...] = Field(max_length=16)

    @model_validator(mode="after")
    def _has_enough_keys(self) -> "Root":
        if len(set(self.public_keys)) != len(self.public_keys) or self.threshold > len(self.public_keys):
            raise ValueError("a root needs at least as many different keys as its threshold")
        return self

    @property
    def fingerprint(self) -> str:
        """The digest that a hub keeps as its trust anchor."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def is_met_by(self, key_ids: frozenset[str]) -> bool:
        """Tells whether these keys are enough of its own."""
        own = {signing.key_id(signing.public_from_hex(key)) for key in self.public_keys}
        return len(own & key_ids) >= self.threshold


class Roster(Document):
    """One version of the roster.

    ``recipients`` are those that packages may be sealed for: first the two on the hub's card, then older ones.
    ``receipt_key`` is the key that the hub signs receipts with, which is on the card, too.
    """

    schema_version: Literal["gretfound-roster/2"] = "gretfound-roster/2"
    version: int = Field(ge=1, lt=10**8)
    previous_sha256: Sha256 | Literal[""]
    issued: date
    expires: date
    root: Root
    recipients: tuple[Recipient, ...] = Field(min_length=2, max_length=8)
    receipt_key: PublicKeyHex
    sites: tuple[RosterSite, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Roster":
        if not timedelta(0) <= self.expires - self.issued <= timedelta(days=MAX_DAYS):
            raise ValueError(f"it must expire within {MAX_DAYS} days of its issue")
        if len({site.site_id for site in self.sites}) != len(self.sites):
            raise ValueError("a site stands in it twice")
        keys = [key.public_key for site in self.sites for key in site.keys]
        if len(set(keys)) != len(keys):
            raise ValueError("a key stands in it twice: each belongs to one site and one role")
        return self

    @property
    def hub_card(self) -> HubCard:
        """The hub's card for its sites."""
        return HubCard(recipients=(self.recipients[0], self.recipients[1]), receipt_key=self.receipt_key)

    @property
    def id(self) -> str:
        """The version's name, for example ``roster-00000003``."""
        return f"roster-{self.version:08d}"


def require_current(roster: Roster, today: date) -> None:
    """Requires that a roster is in force.

    Raises:
        ContributionRejected: ``ROSTER_EXPIRED``.
    """
    if not roster.issued - timedelta(days=1) <= today <= roster.expires:
        raise ContributionRejected(
            "ROSTER_EXPIRED",
            f"the hub's roster of sites is in force from {roster.issued} to {roster.expires}; the hub has to renew it, "
            "the package need not be sent again",
        )


def require_approvals(roster: Roster, site_id: str, approvals: Iterable[Approval], today: date) -> None:
    """Requires that each key may sign for the site, in its role, on this day.

    Raises:
        ContributionRejected: ``UNKNOWN_SITE``, ``SITE_SUSPENDED``, ``UNKNOWN_KEY``, ``KEY_REVOKED`` or ``KEY_EXPIRED``.
    """
    site = next((each for each in roster.sites if each.site_id == site_id), None)
    if site is None:
        raise ContributionRejected("UNKNOWN_SITE", "the hub does not know this site; send it the site's card first")
    if site.suspended is not None and site.suspended <= today:
        raise ContributionRejected("SITE_SUSPENDED", "the hub takes nothing of this site at present; ask the hub")
    known = {(key.role, key.public_key): key for key in site.keys}
    for approval in approvals:
        key = known.get((approval.role, approval.public_key))
        if key is None:
            raise ContributionRejected(
                "UNKNOWN_KEY",
                f"the {approval.role}'s key is not one that the hub has of this site; send it the site's card",
            )
        if key.revoked is not None and key.revoked <= today:
            raise ContributionRejected(
                "KEY_REVOKED", f"the {approval.role}'s key was revoked; seal it with the new one"
            )
        if not key.valid_from <= today <= key.valid_until:
            raise ContributionRejected(
                "KEY_EXPIRED", f"the {approval.role}'s key is not valid today; make a new one and send the site's card"
            )


def read_site_card(content: bytes) -> SiteCard:
    """Reads a site's card and verifies that the site holds each of its private keys.

    Raises:
        ConfigError: If it is no card, or one of its keys did not sign it.
    """
    try:
        envelope = signing.read_envelope(content, SITE_CARD_TYPE)
        card = signing.parse_document(envelope.payload, SiteCard)
    except UnreadableDocument as error:
        raise ConfigError(f"this is no site's card ({error}); `gretfound-site keys` writes one") from error
    key_ids = {key.key_id for key in card.keys}
    if {key.role for key in card.keys} != {"container", "steward"} or len(key_ids) != 2:
        raise ConfigError("a site's card needs one container key and another steward key")
    if signing.verified_key_ids(envelope, [signing.public_from_hex(key.public_key) for key in card.keys]) != key_ids:
        raise ConfigError("a site's card must be signed by each of its keys; make it again with `gretfound-site keys`")
    return card


def with_card(roster: Roster, card: SiteCard, *, today: date, valid_days: int) -> Roster:
    """Returns the roster with a site's keys, old ones kept; a suspended site is taken up again."""
    last_day = today + timedelta(days=valid_days)
    sites = {site.site_id: site for site in roster.sites}
    before = sites[card.site_id].keys if card.site_id in sites else ()
    known = {key.public_key for key in before}
    new = tuple(
        SiteKey(role=key.role, public_key=key.public_key, valid_from=today, valid_until=last_day, revoked=None)
        for key in card.keys
        if key.public_key not in known
    )
    sites[card.site_id] = RosterSite(site_id=card.site_id, suspended=None, keys=before + new)
    return roster.model_copy(update={"sites": tuple(sites[site_id] for site_id in sorted(sites))})


def without_key(roster: Roster, key_id: str, *, today: date) -> Roster:
    """Returns the roster with one site's key revoked from today on.

    Raises:
        ConfigError: If no site has that key.
    """
    if not any(key.key_id == key_id for site in roster.sites for key in site.keys):
        raise ConfigError("no site has a key of that id; `python -m jobs.roster show` lists them")
    sites = tuple(
        site.model_copy(
            update={
                "keys": tuple(
                    key.model_copy(update={"revoked": today}) if key.key_id == key_id and not key.revoked else key
                    for key in site.keys
                )
            }
        )
        for site in roster.sites
    )
    return roster.model_copy(update={"sites": sites})


def without_site(roster: Roster, site_id: str, *, today: date) -> Roster:
    """Returns the roster with one site suspended from today on.

    Raises:
        ConfigError: If there is no such site.
    """
    if all(site.site_id != site_id for site in roster.sites):
        raise ConfigError("there is no site of that id; `python -m jobs.roster show` lists them")
    sites = tuple(
        site.model_copy(update={"suspended": today}) if site.site_id == site_id else site for site in roster.sites
    )
    return roster.model_copy(update={"sites": sites})


def following(changed: Roster, previous_content: bytes, *, today: date) -> Roster:
    """Returns the next version, for `MAX_DAYS` from today.

    Args:
        changed: The content of the next version, still with the number of the one before.
        previous_content: The bytes of the version before.
        today: Its day of issue.

    Raises:
        ConfigError: If it is no roster: a key or a site would stand in it twice, or a recipient is none.
    """
    content = {
        **changed.model_dump(mode="json"),
        "version": changed.version + 1,
        "previous_sha256": hashlib.sha256(previous_content).hexdigest(),
        "issued": today.isoformat(),
        "expires": (today + timedelta(days=MAX_DAYS)).isoformat(),
    }
    try:
        return signing.parse_document(signing.canonical_json(content), Roster)
    except UnreadableDocument as error:
        raise ConfigError(f"this change makes no roster: {error}") from error


def sign(roster: Roster, keys: Sequence[Ed25519PrivateKey], signed: bytes = b"") -> bytes:
    """Signs one version, and keeps the signatures that it has in ``signed``.

    Raises:
        ConfigError: If ``signed`` is of another version or content.
    """
    content = signing.sign(roster.to_bytes(), ROSTER_TYPE, keys)
    if not signed:
        return content
    earlier, now = (_envelope(each) for each in (signed, content))
    if earlier.payload != now.payload:
        raise ConfigError("the draft holds another roster than the one to sign; begin again from the hub's roster")
    now.signatures = {**earlier.signatures, **now.signatures}
    return signing.envelope_to_bytes(now)


def read_draft(content: bytes) -> Roster:
    """Reads a roster that not everybody has signed yet; verifies no signature.

    Raises:
        LineageError: If it is no roster.
    """
    return _parse(_envelope(content).payload)


def is_signed(content: bytes, roots: Iterable[Root]) -> bool:
    """Tells whether each of the roots has signed a roster to its threshold."""
    envelope = _envelope(content)
    return all(
        root.is_met_by(signing.verified_key_ids(envelope, [signing.public_from_hex(key) for key in root.public_keys]))
        for root in roots
    )


def verify_chain(contents: Iterable[bytes], *, anchor: str) -> Roster:
    """Verifies every version of a roster from the first on.

    Args:
        contents: The signed versions, in order.
        anchor: The fingerprint of the first version's root.

    Returns:
        The newest version; whether it is in force today is for `require_current`.

    Raises:
        LineageError: Naming the first version that is not signed by enough root keys, does not follow the one before,
            or, of the first, has another root than the anchor.
    """
    newest: Roster | None = None
    previous = b""
    for number, content in enumerate(contents, start=1):
        roster = read_draft(content)
        required = hashlib.sha256(previous).hexdigest() if previous else ""
        if roster.version != number or roster.previous_sha256 != required:
            raise LineageError(f"version {number} of the roster does not follow the one before; restore the right one")
        if newest is None and roster.root.fingerprint != anchor:
            raise LineageError("the roster has another root than this hub's anchor; is it this hub's?")
        if not is_signed(content, [roster.root, *([newest.root] if newest else [])]):
            raise LineageError(
                f"version {number} of the roster is not signed by {roster.root.threshold} root keys; sign it again"
            )
        newest, previous = roster, content
    if newest is None:
        raise LineageError("the hub has no roster of sites yet; make one with `python -m jobs.roster init`")
    return newest


def read_current(hub_uri: str, *, anchor: str) -> tuple[Roster, bytes]:
    """Reads the hub's roster.

    Returns:
        The newest version and its signed bytes.

    Raises:
        LineageError: As `verify_chain`, or if the ledger knows a newer version than the hub still has.
    """
    folder_uri = storage.join(hub_uri, FOLDER)
    contents = [storage.read_bytes(storage.join(folder_uri, name)) for name in storage.list_names(folder_uri)]
    roster = verify_chain(contents, anchor=anchor)
    published = [entry.subject for entry in ledger.read(hub_uri) if entry.event == EVENT]
    if published and max(published) > roster.id:
        raise LineageError(
            f"the hub's newest roster is {roster.id}, but its ledger names {max(published)}; restore that"
        )
    return roster, contents[-1]


def publish(hub_uri: str, content: bytes, *, anchor: str) -> Roster:
    """Makes a signed version the hub's newest, and enters it into the ledger; doing it again is harmless.

    Raises:
        LineageError: If it does not follow the hub's newest version, or too few have signed it.
        ConfigError: If another roster of that version was published meanwhile.
    """
    roster = read_draft(content)
    folder_uri = storage.join(hub_uri, FOLDER)
    before = [storage.join(folder_uri, f"{number:08d}.json") for number in range(1, roster.version)]
    verify_chain([*(storage.read_bytes(uri) for uri in before), content], anchor=anchor)
    uri = storage.join(folder_uri, f"{roster.version:08d}.json")
    if not storage.create_bytes(uri, content) and storage.read_bytes(uri) != content:
        raise ConfigError(f"another {roster.id} was published meanwhile; make the change again on top of it")
    ledger.append(hub_uri, event=EVENT, subject=roster.id, details={"sha256": hashlib.sha256(content).hexdigest()})
    return roster


def _envelope(content: bytes) -> Envelope:
    try:
        return signing.read_envelope(content, ROSTER_TYPE)
    except UnreadableDocument as error:
        raise LineageError(f"a roster cannot be read: {error}; restore it or sign it again") from error


def _parse(content: bytes) -> Roster:
    try:
        return signing.parse_document(content, Roster)
    except UnreadableDocument as error:
        raise LineageError(f"a roster cannot be read: {error}; restore it or sign it again") from error
