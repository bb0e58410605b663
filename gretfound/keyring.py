"""A site's keyring: the container's key, the human data steward's, the hub's card, and what was sealed with them.

    FOLDER/container.pem  steward.pem       private, their owner's alone; the public ones beside them as .pub
    FOLDER/SITE.site.json                   the site's card, for the hub
    FOLDER/hub.json                         the hub's card: for whom to seal
    FOLDER/sealed/KEY-NUMBER.json           each package's manifest and digest: the site's own proof of what left
    FOLDER/sealed/SHA256.waiting            a package whose sealing was interrupted, until it has its name

The steward's key may be locked with a passphrase, or lie elsewhere until it is needed.
"""

import hashlib
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from gretfound import files, sealing, signing, storage
from gretfound.errors import ConfigError
from gretfound.roster import SITE_CARD_TYPE, Approval, HubCard, KeyRole, SiteCard, read_site_card
from gretfound.sealing import Label, Manifest, Package
from gretfound.signing import Document, UnreadableDocument

SEALED_FOLDER = "sealed"
ROLES: tuple[KeyRole, ...] = ("container", "steward")


class Waiting(Document):
    """A package that has a number and may not have its name yet: where it lies, and where it belongs."""

    schema_version: Literal["gretfound-waiting/1"] = "gretfound-waiting/1"
    package_sha256: str
    waiting_path: str
    package_path: str


class Sealed(Document):
    """A package that a site has sealed, as the site remembers it."""

    schema_version: Literal["gretfound-sealed/1"] = "gretfound-sealed/1"
    package_sha256: str
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Keyring:
    """The folder of one site's keys."""

    folder_path: Path
    site_id: str

    def private_path(self, role: KeyRole) -> Path:
        """Returns where the private key of a role lies."""
        return self.folder_path / f"{role}.pem"

    def public_path(self, role: KeyRole) -> Path:
        """Returns where the public key of a role lies."""
        return self.folder_path / f"{role}.pem.pub"

    @property
    def card_path(self) -> Path:
        """Where the site's card for the hub lies."""
        return self.folder_path / f"{self.site_id}.site.json"

    @property
    def hub_path(self) -> Path:
        """Where the hub's card lies."""
        return self.folder_path / "hub.json"


def default_folder(site_id: str) -> Path:
    """Returns where a site's keyring lies unless it is told otherwise."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "gretfound" / site_id


def make(folder_path: Path, site_id: str, *, passphrase: str = "") -> Keyring:
    """Makes what a keyring lacks: keys, and the site's card, which both of them sign.

    Args:
        folder_path: The keyring's folder.
        site_id: The site's pseudonym.
        passphrase: Locks a new steward's key, and opens one that is locked; empty for none.

    Raises:
        ConfigError: If the card has to be signed and the passphrase is wrong.
    """
    ring = Keyring(folder_path=folder_path, site_id=site_id)
    folder_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for role in ROLES:
        if not ring.public_path(role).exists():
            signing.make_private_key(ring.private_path(role), passphrase=passphrase if role == "steward" else "")
    approvals = tuple(approval_of(ring, role) for role in ROLES)
    if not ring.card_path.exists() or read_site_card(ring.card_path.read_bytes()).keys != approvals:
        keys = [signing.read_private_key(ring.private_path(role), passphrase=passphrase) for role in ROLES]
        card = SiteCard(site_id=site_id, keys=approvals)
        storage.write_bytes(str(ring.card_path), signing.sign(card.to_bytes(), SITE_CARD_TYPE, keys))
    return ring


def replace(ring: Keyring, role: KeyRole, *, passphrase: str = "") -> Keyring:
    """Puts a new key in the place of one; the old one stays beside it, under its id.

    Raises:
        ConfigError: As `make`.
    """
    key_id = approval_of(ring, role).key_id
    if role == "container":  # it signs the new card with the steward's, so that must open before anything changes
        signing.read_private_key(ring.private_path("steward"), passphrase=passphrase)
    for path in (ring.private_path(role), ring.public_path(role)):
        if path.exists():  # the private one may be kept elsewhere
            path.rename(path.with_name(path.name.replace(role, f"{role}-{key_id[:16]}", 1)))
    return make(ring.folder_path, ring.site_id, passphrase=passphrase)


def read(folder_path: Path, site_id: str) -> Keyring:
    """Returns the keyring of a site that can seal.

    Raises:
        ConfigError: If keys or the hub's card are missing; says how to make or get them.
    """
    ring = Keyring(folder_path=folder_path, site_id=site_id)
    needed = [ring.private_path("container"), ring.public_path("steward")]
    if not all(path.is_file() for path in needed):
        raise ConfigError(
            f"there are no keys in {folder_path}; make them with `gretfound-site keys --site-id {site_id} --hub "
            "hub.json`, with the card that the hub gave you"
        )
    if not ring.hub_path.is_file():
        raise ConfigError(
            f"it is not known yet for whom to seal; run `gretfound-site keys --site-id {site_id} --hub hub.json`, "
            "with the card that the hub gave you"
        )
    return ring


def approval_of(ring: Keyring, role: KeyRole) -> Approval:
    """Returns a role's public key.

    Raises:
        ConfigError: If it is absent or no Ed25519 key.
    """
    public_key = signing.read_public_key(ring.public_path(role))
    return Approval(role=role, public_key=signing.public_hex(public_key))


def read_hub_card(path: Path) -> tuple[HubCard, str]:
    """Reads a hub's card.

    Returns:
        The card and its fingerprint, in hex.

    Raises:
        ConfigError: If it is absent or no card.
    """
    try:
        content = path.read_bytes()
        return signing.parse_document(content, HubCard), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnreadableDocument as error:
        raise ConfigError(f"{path} is no hub's card: {error}; ask the hub for it again") from error


def is_steward_ready(ring: Keyring) -> bool:
    """Tells whether the steward's key is here and opens without a passphrase.

    Raises:
        ConfigError: If others can read it.
    """
    path = ring.private_path("steward")
    return path.is_file() and not signing.is_locked(path)


def label(ring: Keyring, *, today: date) -> Label:
    """Returns what is to be written on the next package."""
    last = _last(ring)
    return Label(
        sequence=last.manifest.sequence + 1 if last else 1,
        previous_sha256=last.package_sha256 if last else "",
        recipients=read_hub_card(ring.hub_path)[0].recipients,
        created=today,
    )


def seal(
    ring: Keyring,
    draft_path: Path,
    package_path: Path,
    *,
    today: date,
    passphrase: str = "",
    steward_path: Path | None = None,
) -> Package:
    """Seals a draft as the keyring's next package, and remembers it; a call that was interrupted is finished.

    That holds for an interrupted call with another draft, too: its package gets its name first, since its number is
    taken, and the hub waits for each number.

    Args:
        ring: The site's keyring.
        draft_path: The draft; it is removed once the package lies there.
        package_path: Where the package shall lie.
        today: The day in UTC.
        passphrase: The steward's.
        steward_path: The steward's private key, if it does not lie in the keyring.

    Raises:
        ConfigError: If a key cannot be read, another package was sealed at the same time, or the folder of one whose
            sealing was interrupted is not there.
        ContributionRejected: As `gretfound.sealing.seal`.
    """
    waiting_path = package_path.with_name(f".{package_path.name}.sealed")
    last = _last(ring)
    if last and waiting_path.is_file() and storage.sha256_of(waiting_path) == last.package_sha256:
        waiting_path.replace(package_path)
    else:
        _finish_others(ring)
        waiting_path.unlink(missing_ok=True)
        sealed = sealing.seal(
            draft_path,
            waiting_path,
            label=label(ring, today=today),
            container_key=signing.read_private_key(ring.private_path("container")),
            steward_key=signing.read_private_key(steward_path or ring.private_path("steward"), passphrase=passphrase),
        )
        last = Sealed(package_sha256=sealed.sha256, manifest=sealed.manifest)
        key_id = last.manifest.approvals[0].key_id
        path = ring.folder_path / SEALED_FOLDER / f"{key_id[:16]}-{last.manifest.sequence:08d}.json"
        note_path = path.with_name(f"{last.package_sha256}.waiting")
        note = Waiting(
            package_sha256=sealed.sha256,
            waiting_path=str(waiting_path.absolute()),
            package_path=str(package_path.absolute()),
        )
        files.write(note_path, note.to_bytes())
        if not files.create(path, last.to_bytes()):
            waiting_path.unlink()
            note_path.unlink()
            raise ConfigError("another package of this site was sealed at the same time; run the same command again")
        waiting_path.replace(package_path)
        note_path.unlink()
    draft_path.unlink()
    return Package(
        path=package_path,
        sha256=last.package_sha256,
        size_bytes=package_path.stat().st_size,
        manifest=last.manifest,
    )


def find(folder_path: Path, package_path: Path) -> Package | None:
    """Returns what a keyring remembers of a sealed package, None if it did not seal it."""
    sha256 = storage.sha256_of(package_path)
    for path in (folder_path / SEALED_FOLDER).glob("*.json"):
        sealed = _read_sealed(path)
        if sealed.package_sha256 == sha256:
            size_bytes = package_path.stat().st_size
            return Package(path=package_path, sha256=sha256, size_bytes=size_bytes, manifest=sealed.manifest)
    return None


def _finish_others(ring: Keyring) -> None:
    """Gives its name to each package that has a number and not its name."""
    folder_path = ring.folder_path / SEALED_FOLDER
    for note_path in folder_path.glob("*.waiting"):
        note = signing.parse_document(note_path.read_bytes(), Waiting)
        waiting_path, package_path = Path(note.waiting_path), Path(note.package_path)
        has_number = any(
            _read_sealed(path).package_sha256 == note.package_sha256 for path in folder_path.glob("*.json")
        )
        if has_number and not waiting_path.parent.is_dir():
            raise ConfigError(
                f"the sealing of {package_path} was interrupted, and its folder is not there now; make it reachable "
                f"and run the same command again, or, if it is lost, remove {note_path} and tell the hub"
            )
        if has_number and waiting_path.is_file():
            waiting_path.replace(package_path)
        if has_number or not waiting_path.exists():
            note_path.unlink()


def _last(ring: Keyring) -> Sealed | None:
    key_id = approval_of(ring, "container").key_id
    paths = sorted((ring.folder_path / SEALED_FOLDER).glob(f"{key_id[:16]}-*.json"))
    return _read_sealed(paths[-1]) if paths else None


def _read_sealed(path: Path) -> Sealed:
    try:
        return signing.parse_document(path.read_bytes(), Sealed)
    except UnreadableDocument as error:
        raise ConfigError(f"{path} was changed: {error}; restore it from a copy") from error
