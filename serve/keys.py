"""API keys of the endpoint: made, listed and revoked here; the file holds SHA-256 digests of secrets, never a secret.

python -m serve.keys create --keys-uri HUB/keys.json --scope embed --scope finetune --days 90 --note "group X"
python -m serve.keys list --keys-uri HUB/keys.json
python -m serve.keys revoke --keys-uri HUB/keys.json --key-id 0123456789ab

A key reads `gf_<id>_<secret>`. Rotate with overlap: create a second key with `--owner` of the first, then revoke that.
"""

import argparse
import dataclasses
import datetime
import hashlib
import hmac
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gretfound import storage
from gretfound.errors import ConfigError, GretfoundError, StorageError

log = logging.getLogger(__name__)
SCOPES = ("embed", "finetune", "admin")
KEY_PATTERN = re.compile(r"gf_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
OWNER_PATTERN = re.compile(r"[a-z0-9]{1,32}")
SECRET_BYTES = 32  # 256 random bits: a fast digest is enough, no one can search them
REFRESH_EVERY_S = 20.0
STALE_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Key:
    """One API key without its secret; times are ISO 8601 in UTC.

    `owner` is what fine-tuning jobs belong to: the id of the first key of somebody, kept when that key is rotated.
    """

    id: str
    secret_sha256: str
    scopes: tuple[str, ...]
    owner: str
    expires_at: str
    created_at: str
    revoked_at: str = ""
    note: str = ""

    def allows(self, scope: str) -> bool:
        """Tells whether the key may do what needs ``scope``; ``admin`` may do everything."""
        return scope in self.scopes or "admin" in self.scopes


class KeyRing:
    """The keys of one endpoint, re-read as they change; a revoked key is refused within a minute.

    Args:
        keys_uri: The key file.
        clock_s: A monotonic clock in seconds.

    Raises:
        ConfigError: If there is no readable key file.
    """

    def __init__(self, keys_uri: str, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._keys_uri = keys_uri
        self._clock_s = clock_s
        self._keys = {key.id: key for key in read_keys(keys_uri)}
        self._read_at_s = self._tried_at_s = clock_s()

    def is_due(self) -> bool:
        """Tells whether it is time for another `refresh`."""
        return self._clock_s() - self._tried_at_s >= REFRESH_EVERY_S

    def is_stale(self) -> bool:
        """Tells whether the file could not be read for so long that a revocation may have been missed."""
        return self._clock_s() - self._read_at_s >= STALE_AFTER_S

    def refresh(self) -> None:
        """Reads the file again; if that fails the earlier keys stay until they are stale. Blocks: call in a thread."""
        self._tried_at_s = self._clock_s()
        try:
            self._keys = {key.id: key for key in read_keys(self._keys_uri)}
        except (GretfoundError, OSError) as error:
            log.error("the key file could not be read again: %s", error)
            return
        self._read_at_s = self._tried_at_s

    def find(self, presented: str) -> Key | None:
        """Returns the valid key that ``presented`` is; None if it is malformed, unknown, revoked or expired."""
        match = KEY_PATTERN.fullmatch(presented)
        if match is None:
            return None
        key = self._keys.get(match[1])
        expected = key.secret_sha256 if key is not None else _digest("")  # the same work for an unknown id
        is_secret = hmac.compare_digest(_digest(match[2]), expected)
        if key is None or not is_secret or key.revoked_at or key.expires_at <= _now():
            return None
        return key


def create_key(*, keys_uri: str, scopes: Sequence[str], days: float = 90.0, owner: str = "", note: str = "") -> str:
    """Adds a key to the file, which is made if there is none.

    Args:
        keys_uri: The key file; one person changes it at a time.
        scopes: Some of `SCOPES`.
        days: Days until it expires.
        owner: The owner of an earlier key that this one follows; by default the key's own id.
        note: Whom it was given to.

    Returns:
        The key: shown once, stored nowhere.

    Raises:
        ConfigError: If a scope, the owner or the lifetime is wrong.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ConfigError(f"scopes: found {unknown or 'none'}; required some of {', '.join(SCOPES)}")
    if owner and not OWNER_PATTERN.fullmatch(owner):
        raise ConfigError("owner: required 1 to 32 lower-case letters and digits, usually an earlier key's id")
    if not 0 < days <= 3660:
        raise ConfigError(f"days: found {days}; required more than 0 and at most 3660")
    keys = read_keys(keys_uri) if storage.exists(keys_uri) else []
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(SECRET_BYTES)
    key = Key(
        id=key_id,
        secret_sha256=_digest(secret),
        scopes=tuple(sorted(set(scopes))),
        owner=owner or key_id,
        created_at=_now(),
        expires_at=_now(datetime.timedelta(days=days)),
        note=note,
    )
    _write_keys(keys_uri, [*keys, key])
    return f"gf_{key_id}_{secret}"


def revoke_key(*, keys_uri: str, key_id: str) -> None:
    """Marks a key as revoked; running endpoints refuse it within a minute.

    Raises:
        ConfigError: If there is no such key.
    """
    keys = read_keys(keys_uri)
    if key_id not in {key.id for key in keys}:
        raise ConfigError(f"key_id: there is no key {key_id!r} in this file; `python -m serve.keys list` shows them")
    _write_keys(
        keys_uri,
        [dataclasses.replace(key, revoked_at=key.revoked_at or _now()) if key.id == key_id else key for key in keys],
    )


def read_keys(keys_uri: str) -> list[Key]:
    """Reads the key file.

    Raises:
        ConfigError: If it is absent or not a key file; an endpoint without keys must not start.
    """
    try:
        content = storage.read_json(keys_uri)
    except StorageError as error:
        raise ConfigError(
            f"keys_uri: {error}; the endpoint needs API keys: "
            f"`python -m serve.keys create --keys-uri {keys_uri} --scope embed`"
        ) from error
    try:
        return [_key(entry) for entry in content["keys"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"keys_uri: {keys_uri} is not a key file of `python -m serve.keys`") from error


def _key(entry: dict[str, Any]) -> Key:
    return Key(**{**entry, "scopes": tuple(entry["scopes"])})


def _write_keys(keys_uri: str, keys: list[Key]) -> None:
    storage.write_json(keys_uri, {"keys": [dataclasses.asdict(key) for key in keys]})


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now(later: datetime.timedelta = datetime.timedelta()) -> str:
    return (datetime.datetime.now(datetime.UTC) + later).isoformat(timespec="microseconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it once")
    create.add_argument("--scope", action="append", required=True, choices=SCOPES, help="repeat for several")
    create.add_argument("--days", type=float, default=90.0, help="days until it expires (default: 90)")
    create.add_argument("--owner", default="", help="the owner of the key that this one follows (rotation)")
    create.add_argument("--note", default="", help="whom it is for")
    listing = commands.add_parser("list", help="show every key, without secrets")
    revoke = commands.add_parser("revoke", help="refuse a key from now on (running endpoints: within a minute)")
    revoke.add_argument("--key-id", required=True, help="the 12 hex digits after gf_")
    for command in (create, listing, revoke):
        command.add_argument("--keys-uri", required=True, help="the key file: a path or an object-store URI")
    options = parser.parse_args(argv)
    try:
        match options.command:
            case "create":
                print(
                    create_key(
                        keys_uri=options.keys_uri,
                        scopes=options.scope,
                        days=options.days,
                        owner=options.owner,
                        note=options.note,
                    )
                )
            case "list":
                for key in read_keys(options.keys_uri):
                    state = "revoked" if key.revoked_at else "expired" if key.expires_at <= _now() else "valid"
                    print(f"{key.id}  {state:<8}{','.join(key.scopes):<24}until {key.expires_at[:10]}  {key.note}")
            case "revoke":
                revoke_key(keys_uri=options.keys_uri, key_id=options.key_id)
    except GretfoundError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
