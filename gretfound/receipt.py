"""Receipts: the hub's signed word on a package, which a site can show to anybody who has the hub's card.

A receipt is DSSE over the package's digest, the verdict, the reason codes and the place of the verdict in the hub's
ledger. It is signed with a key of its own (`gretfound.strongbox`), which the hub's roster and card name: the root keys
lie with people, and are not at hand where packages are taken in.
"""

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, StringConstraints

from gretfound import signing
from gretfound.errors import ConfigError
from gretfound.ledger import RECEIPT_TYPE
from gretfound.roster import PublicKeyHex, Sha256
from gretfound.signing import Document, UnreadableDocument


class Place(Document):
    """The ledger's entry about the verdict: what shows later that it was there."""

    index: int = Field(ge=0)
    sha256: Sha256


class Receipt(Document):
    """What a site is told of its package; ``codes`` and ``message`` are empty where it was admitted."""

    schema_version: Literal["gretfound-receipt/2"] = "gretfound-receipt/2"
    package_sha256: Sha256
    verdict: Literal["ADMITTED", "QUARANTINED", "REJECTED"]
    codes: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{1,39}$")], ...]
    message: str
    contribution_id: str
    ledger: Place


def sign(receipt: Receipt, key: Ed25519PrivateKey) -> bytes:
    """Returns the signed receipt; done again, the same bytes."""
    return signing.sign(receipt.to_bytes(), RECEIPT_TYPE, [key])


def read(content: bytes, *, receipt_key: PublicKeyHex) -> Receipt:
    """Reads a receipt and verifies that the hub signed it.

    Args:
        content: The file's bytes.
        receipt_key: The key that the hub's card names, in hex.

    Raises:
        ConfigError: If it is no receipt, or that key did not sign it.
    """
    public_key = signing.public_from_hex(receipt_key)
    try:
        envelope = signing.read_envelope(content, RECEIPT_TYPE)
        if signing.verified_key_ids(envelope, [public_key]) != set(envelope.signatures):
            raise ConfigError(
                "this receipt is not signed by the key on the hub's card: it was changed, is of another hub, or of an "
                "earlier key of it; compare the card with the hub over the telephone"
            )
        return signing.parse_document(envelope.payload, Receipt)
    except UnreadableDocument as error:
        raise ConfigError(f"this is no receipt ({error}); ask the hub for it again") from error
