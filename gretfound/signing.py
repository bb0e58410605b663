"""Keys and signed documents: Ed25519 key files, the one JSON text of a content (RFC 8785), DSSE envelopes over it.

Whose signature counts is for the rooms that read a document: `gretfound.roster` and `gretfound.sealing`.
"""

import base64
import binascii
import hashlib
import json
import logging
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey

from gretfound import canonical, files
from gretfound.errors import ConfigError

log = logging.getLogger(__name__)
LOCKED_MARK = b"ENCRYPTED PRIVATE KEY"
HEX_256_BITS = r"^[0-9a-f]{64}$"
DocumentT = TypeVar("DocumentT", bound="Document")


class UnreadableDocument(ValueError):
    """Bytes are not the one text of a content of the required kind; ``code`` says at what point they ceased to be."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Document(BaseModel):
    """What all signed contents share: the known fields and no other, types as written, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Returns the content's canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


class _Signature(Document):
    keyid: str
    sig: str


class _Envelope(Document):
    payload: str
    payloadType: str  # noqa: N815
    signatures: tuple[_Signature, ...]


def canonical_json(content: Any) -> bytes:
    """Returns the one JSON text of a content that is signed. Source: RFC 8785."""
    return canonical.to_bytes(content, spelling="standard")


def parse_json(content: bytes) -> Any:
    """Reads JSON strictly.

    Raises:
        UnreadableDocument: ``BAD_JSON`` if it is not JSON in UTF-8 or a number is not finite, ``KEY_TWICE``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise UnreadableDocument("KEY_TWICE", "a key stands twice in one object")
        return found

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise UnreadableDocument("BAD_JSON", "a number is not finite")
        return number

    try:
        return json.loads(content.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except UnreadableDocument:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableDocument("BAD_JSON", "the bytes are not JSON in UTF-8") from error


def parse_document(content: bytes, expected: type[DocumentT]) -> DocumentT:
    """Reads a content that must be the one text of a document of this version.

    Args:
        content: The bytes, of any origin.
        expected: The kind. Its field ``schema_version``, if it has one, is a literal of the one version that is read.

    Raises:
        UnreadableDocument: As `parse_json`; ``UNKNOWN_VERSION``, ``BAD_FIELD`` naming each known field
            that is wrong, or ``NOT_CANONICAL``.
    """
    found = parse_json(content)
    version = expected.model_fields.get("schema_version")
    if version is not None and (not isinstance(found, dict) or found.get("schema_version") != version.default):
        raise UnreadableDocument("UNKNOWN_VERSION", f"it is of another version; required {version.default}")
    try:
        document = expected.model_validate_json(content)
    except ValidationError as error:
        raise UnreadableDocument("BAD_FIELD", "; ".join(sorted(_faults(error)))) from None
    try:
        text = document.to_bytes()
    except ValueError as error:  # RFC 8785 has no integer beyond 2**53
        raise UnreadableDocument("BAD_FIELD", "a number is larger than JSON can say exactly") from error
    if text != content:
        raise UnreadableDocument("NOT_CANONICAL", "the bytes are not the canonical JSON of their content")
    return document


def _faults(error: ValidationError) -> set[str]:
    """Says what is wrong where, without a value or the name of an unknown field."""
    return {
        "a field is unknown"
        if fault["type"] == "extra_forbidden"
        else f"{'.'.join(str(part) for part in fault['loc']) or 'the whole'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    }


def sign(payload: bytes, payload_type: str, private_keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """Signs bytes with each of the keys.

    Returns:
        A DSSE envelope as canonical JSON, its signatures sorted by key id. Source: DSSE v1,
        https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    """
    envelope = Envelope(payload, payload_type, {})
    for private_key in private_keys:
        envelope.sign(CryptoSigner(private_key, _verifier(private_key.public_key())))
    return envelope_to_bytes(envelope)


def envelope_to_bytes(envelope: Envelope) -> bytes:
    """Returns an envelope's canonical JSON, its signatures sorted by key id."""
    content = envelope.to_dict()
    content["signatures"].sort(key=lambda signature: signature["keyid"])
    return canonical_json(content)


def read_envelope(content: bytes, payload_type: str) -> Envelope:
    """Reads a DSSE envelope strictly; verifies no signature.

    Raises:
        UnreadableDocument: As `parse_document`; ``SAME_KEY_TWICE`` if two signatures name one key, ``BAD_FIELD`` if it
            is of another type, has no signature, or its Base64 is not the one text of its bytes.
    """
    found = parse_document(content, _Envelope)
    if found.payloadType != payload_type or not found.signatures:
        raise UnreadableDocument("BAD_FIELD", f"it is not a signed document of the type {payload_type}")
    key_ids = [signature.keyid for signature in found.signatures]
    if len(set(key_ids)) != len(key_ids):
        raise UnreadableDocument("SAME_KEY_TWICE", "two signatures name the same key")
    try:
        envelope = Envelope(
            base64.b64decode(found.payload, validate=True),
            payload_type,
            {
                each.keyid: Signature(each.keyid, base64.b64decode(each.sig, validate=True).hex())
                for each in found.signatures
            },
        )
    except binascii.Error:
        raise UnreadableDocument("BAD_FIELD", "its Base64 is damaged") from None
    if envelope_to_bytes(envelope) != content:
        raise UnreadableDocument("NOT_CANONICAL", "the bytes are not the canonical JSON of their content")
    return envelope


def verified_key_ids(envelope: Envelope, public_keys: Iterable[Ed25519PublicKey]) -> frozenset[str]:
    """Returns the ids of those keys, each counted once, whose signature on the envelope is right."""
    verified = set()
    for public_key in public_keys:
        try:
            verified |= set(envelope.verify([_verifier(public_key)], threshold=1))
        except VerificationError:
            continue
    return frozenset(verified)


def _verifier(public_key: Ed25519PublicKey) -> SSlibKey:
    return SSlibKey.from_crypto(public_key, keyid=key_id(public_key))


def make_private_key(path: Path, *, passphrase: str = "") -> Ed25519PrivateKey:
    """Makes a key, readable by its owner alone, with ``PATH.pub`` beside it.

    Raises:
        ConfigError: If there is a file already.
    """
    key = Ed25519PrivateKey.generate()
    locked = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    write_secret(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_name(f"{path.name}.pub").write_bytes(public)
    return key


def write_secret(path: Path, content: bytes) -> None:
    """Writes a new file that its owner alone can read, whole.

    Raises:
        ConfigError: If there is a file already: a secret is never replaced.
    """
    if not files.create(path, content, mode=0o600):
        raise ConfigError(f"there is a file {path} already; move it away first, nothing was changed")


def read_secret(path: Path) -> bytes:
    """Reads a file that must be its owner's alone.

    Raises:
        ConfigError: If it is absent, or others can read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"others can read {path}; run `chmod 600 {path}`, or make a new key if others had access")
    return content


def is_locked(path: Path) -> bool:
    """Tells whether a private key file asks for a passphrase.

    Raises:
        ConfigError: As `read_secret`.
    """
    return LOCKED_MARK in read_secret(path)


def read_private_key(path: Path, *, passphrase: str = "") -> Ed25519PrivateKey:
    """Reads a private key file in PEM.

    Raises:
        ConfigError: If it is absent, others can read it, the passphrase is wrong, or it is no Ed25519 key.
    """
    content = read_secret(path)
    if LOCKED_MARK in content and not passphrase:
        raise ConfigError(f"{path} is locked: its passphrase is required")
    try:
        password = passphrase.encode() if LOCKED_MARK in content else None
        key = serialization.load_pem_private_key(content, password=password)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no private key in PEM, or the passphrase is another one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a key of another kind; required Ed25519")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Reads a public key in PEM.

    Raises:
        ConfigError: If it is no Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no PEM public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds a key of another kind; required Ed25519")
    return key


def public_hex(key: Ed25519PublicKey) -> str:
    """Returns a public key's 32 bytes in hex."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def public_from_hex(text: str) -> Ed25519PublicKey:
    """Returns the public key of 64 hex digits; any 32 bytes are one, though of few anybody has the private key."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def key_id(key: Ed25519PublicKey) -> str:
    """Names a public key by the SHA-256 of its raw bytes, in hex."""
    return hashlib.sha256(bytes.fromhex(public_hex(key))).hexdigest()


def spoken(digest: str) -> str:
    """Returns the first 32 digits of a hex digest in groups of four, to be read over the telephone."""
    return " ".join(digest[at : at + 4] for at in range(0, 32, 4))
