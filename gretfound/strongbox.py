"""The hub's private keys, in one folder that is no part of the hub.

    FOLDER/identity.txt     opens packages; on each machine that takes packages in
    FOLDER/recovery.txt     opens packages too; belongs offline, in a safe
    FOLDER/receipt.pem      signs receipts; on the machine that takes packages in
    FOLDER/root-1.pem ...   sign the roster of sites; each belongs with another person
    FOLDER/hub.json         the hub's card, for sites
    FOLDER/anchor.txt       the fingerprint of the first roster's root

The two identities are in the form of ``age-keygen``, so that `age --decrypt` reads them as well.
"""

from collections.abc import Sequence
from pathlib import Path

import pyrage
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import signing, storage
from gretfound.errors import ConfigError
from gretfound.roster import HubCard, Root

IDENTITY_NAME, RECOVERY_NAME = "identity.txt", "recovery.txt"
RECEIPT_NAME = "receipt.pem"
CARD_NAME, ANCHOR_NAME = "hub.json", "anchor.txt"
SECRET_PREFIX = "AGE-SECRET-KEY-"


def default_folder(hub_uri: str) -> Path:
    """Returns where the keys of a hub on this machine lie: beside it, never in it.

    Raises:
        ConfigError: If the hub lies in a bucket.
    """
    hub_path = storage.local_path(hub_uri)
    if hub_path is None:
        raise ConfigError("keys_path is required where the hub lies in a bucket: a local folder for the hub's keys")
    return hub_path.with_name(f"{hub_path.name}.keys")


def make(folder_path: Path, *, num_root_keys: int, threshold: int) -> tuple[Root, HubCard]:
    """Makes the hub's keys and its card.

    Raises:
        ConfigError: If there are keys already.
    """
    folder_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
    root_keys = [signing.make_private_key(folder_path / f"root-{n}.pem") for n in range(1, num_root_keys + 1)]
    for name, identity in zip((IDENTITY_NAME, RECOVERY_NAME), identities, strict=True):
        text = f"# public key: {identity.to_public()}\n{identity}\n"
        signing.write_secret(folder_path / name, text.encode())
    root = Root(threshold=threshold, public_keys=tuple(signing.public_hex(key.public_key()) for key in root_keys))
    online, recovery = (str(identity.to_public()) for identity in identities)
    receipt_key = signing.make_private_key(folder_path / RECEIPT_NAME)
    card = HubCard(recipients=(online, recovery), receipt_key=signing.public_hex(receipt_key.public_key()))
    write_card(folder_path, card)
    storage.write_bytes(str(folder_path / ANCHOR_NAME), f"{root.fingerprint}\n".encode())
    return root, card


def write_card(folder_path: Path, card: HubCard) -> None:
    """Writes the hub's card."""
    storage.write_bytes(str(folder_path / CARD_NAME), card.to_bytes())


def root_paths(folder_path: Path) -> list[Path]:
    """Lists the root keys that still lie in the folder."""
    return sorted(folder_path.glob("root-*.pem"))


def read_identities(path: Path) -> tuple[str, ...]:
    """Reads the age identities of one file: the present one, and older ones while packages for them may still come.

    Raises:
        ConfigError: If it is absent, others can read it, or it holds no identity.
    """
    lines = signing.read_secret(path).decode(errors="replace").splitlines()
    found = tuple(line.strip() for line in lines if line.startswith(SECRET_PREFIX))
    try:
        for text in found:
            pyrage.x25519.Identity.from_str(text)
    except pyrage.IdentityError:
        found = ()
    if not found:
        raise ConfigError(f"{path} holds no readable age identity ({SECRET_PREFIX}1...); restore it from its copy")
    return found


def recipients_of(identities: Sequence[str]) -> tuple[str, ...]:
    """Returns the age recipients that identities open for."""
    return tuple(str(pyrage.x25519.Identity.from_str(each).to_public()) for each in identities)


def read_receipt_key(folder_path: Path) -> Ed25519PrivateKey:
    """Reads the key that receipts are signed with.

    Raises:
        ConfigError: As `signing.read_private_key`.
    """
    return signing.read_private_key(folder_path / RECEIPT_NAME)


def read_anchor(folder_path: Path) -> str:
    """Reads the fingerprint that the hub's first roster must have.

    Raises:
        ConfigError: If it is absent.
    """
    path = folder_path / ANCHOR_NAME
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; make the hub's keys with `python -m jobs.roster init`, or give "
            "keys_path"
        ) from error
