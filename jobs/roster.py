"""Roster -> its next version: which sites may send, with which keys; signed by several people.

    python -m jobs.roster init hub_uri=file:///hub
    python -m jobs.roster admit hub_uri=file:///hub card_path=aster.site.json
    python -m jobs.roster revoke hub_uri=file:///hub key_id=3F0C...
    python -m jobs.roster suspend hub_uri=file:///hub site_id=aster
    python -m jobs.roster renew hub_uri=file:///hub
    python -m jobs.roster sign hub_uri=file:///hub draft_path=roster.draft.json root_key_paths=[/media/usb/root-2.pem]
    python -m jobs.roster show hub_uri=file:///hub

``init`` makes the hub's keys, its card for sites and the first version. Every change is a new version, for 90 days. It
is published once enough root keys have signed it; until then it lies in draft_path, for others to `sign`. ``renew``
also takes new recipients, root keys and a new key for receipts. The last line is the id of the newest version, or the
path of the draft.
"""

import hashlib
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound import config
from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import console

if TYPE_CHECKING:
    from gretfound.roster import Roster, SiteCard

VERBS = ("init", "admit", "revoke", "suspend", "renew", "sign", "show")
NEEDS = {"admit": "card_path", "revoke": "key_id", "suspend": "site_id", "sign": "draft_path"}


@dataclass(frozen=True)
class Config:
    """The keys of this job."""

    hub_uri: str = setting(help="the hub: a folder, s3://, gs:// or abfs://")
    keys_path: str = setting("", "folder of the hub's keys; empty: HUB.keys beside a local hub")
    card_path: str = setting("", "admit, show: the card that `gretfound-site keys` wrote")
    key_id: str = setting("", "revoke: the whole id of a site's key, as `show` lists it")
    site_id: str = setting("", "suspend: the site")
    valid_days: int = setting(365, "admit: days that the site's keys are valid")
    root_key_paths: list[str] = setting([], "root keys to sign with; empty: those in keys_path")
    draft_path: str = setting("", "where a version waits until enough people have signed it; show: shows that one")
    num_root_keys: int = setting(3, "init: people who hold a root key")
    threshold: int = setting(0, "init and renew: how many of them must sign; 0: two at first, then as it is")
    recipients: list[str] = setting([], "renew: age recipients; the first two are on the card, more are still accepted")
    receipt_public_path: str = setting("", "renew: the public key that verifies receipts from now on")
    root_public_paths: list[str] = setting(
        [], "renew: public root keys that sign from now on; the old ones sign this once"
    )

    def __post_init__(self) -> None:
        """Checks what the types cannot say."""
        if self.threshold and self.threshold < 2:
            raise ConfigError(f"threshold={self.threshold} must be 2 or more: one person alone must not admit a site")
        if not 1 <= self.valid_days <= 1100:
            raise ConfigError(f"valid_days={self.valid_days} must be from 1 to 1100")


def main(argv: list[str]) -> str:
    """Makes or shows a version of the roster.

    Returns:
        The id of the newest version, or the path of a draft that others have to sign.

    Raises:
        ConfigError: If the verb or a key is missing, or a key file cannot be read.
        LineageError: If the hub's roster is not what its root keys signed.
    """
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        raise ConfigError(f"found {argv[:1]}; required: python -m jobs.roster {'|'.join(VERBS)} hub_uri=...")
    loaded = config.load(Config, argv[1:])
    if verb in NEEDS and not getattr(loaded, NEEDS[verb]):
        raise ConfigError(f"{NEEDS[verb]} is required for {verb}")

    from gretfound import roster, signing, storage, strongbox

    hub_uri = storage.normalised(loaded.hub_uri)
    keys_path = Path(loaded.keys_path) if loaded.keys_path else strongbox.default_folder(hub_uri)
    hub_path = storage.local_path(hub_uri)
    if hub_path is not None and keys_path.resolve().is_relative_to(hub_path.resolve()):
        raise ConfigError(f"keys_path={keys_path} lies in the hub; keep the hub's keys elsewhere")
    if verb == "init" and not storage.list_names(storage.join(hub_uri, roster.FOLDER)):
        return _init(loaded, hub_uri, keys_path)
    anchor = strongbox.read_anchor(keys_path)
    current, content = roster.read_current(hub_uri, anchor=anchor)
    if verb in ("init", "show"):
        if loaded.card_path:
            print(_card_in_words(roster.read_site_card(_read(Path(loaded.card_path)))), file=sys.stderr)
        if loaded.draft_path:
            waiting = roster.read_draft(_read(Path(loaded.draft_path)))
            print(f"The draft, which is not in force:\n{_in_words(waiting)}\n\nIn force:", file=sys.stderr)
        return _shown(current, keys_path)
    if verb == "sign":
        signed = _read(Path(loaded.draft_path))
        drafted = roster.read_draft(signed)
    else:
        changed = _changed(verb, loaded, current)
        if verb != "renew" and changed == current:
            return current.id
        today = datetime.now(UTC).date()
        signed, drafted = b"", roster.following(changed, content, today=today)
    paths = [Path(path) for path in loaded.root_key_paths] or strongbox.root_paths(keys_path)
    if not paths:
        raise ConfigError(f"no root key lies in {keys_path}; give root_key_paths")
    signed = roster.sign(drafted, [signing.read_private_key(path) for path in paths], signed)
    if not roster.is_signed(signed, [current.root, drafted.root]):
        if not loaded.draft_path:
            raise ConfigError("too few root keys are here to sign; give draft_path, and let others `sign` that file")
        Path(loaded.draft_path).write_bytes(signed)
        print(f"Not everybody has signed yet:\n{_in_words(drafted)}", file=sys.stderr)
        return loaded.draft_path
    return _shown(roster.publish(hub_uri, signed, anchor=anchor), keys_path)


def _init(loaded: Config, hub_uri: str, keys_path: Path) -> str:
    from gretfound import roster, signing, strongbox

    threshold = _threshold(loaded.threshold or 2, loaded.num_root_keys)
    root, card = strongbox.make(keys_path, num_root_keys=loaded.num_root_keys, threshold=threshold)
    today = datetime.now(UTC).date()
    first = roster.Roster(
        version=1,
        previous_sha256="",
        issued=today,
        expires=today + timedelta(days=roster.MAX_DAYS),
        root=root,
        recipients=card.recipients,
        receipt_key=card.receipt_key,
        sites=(),
    )
    keys = [signing.read_private_key(path) for path in strongbox.root_paths(keys_path)]
    published = roster.publish(hub_uri, roster.sign(first, keys), anchor=root.fingerprint)
    print(
        f"The hub's keys are in {keys_path}. Give {strongbox.CARD_NAME} to the sites. Take away from this machine:\n"
        f"  {strongbox.RECOVERY_NAME}  into a safe\n"
        f"  root-1.pem to root-{loaded.num_root_keys}.pem  to {loaded.num_root_keys} people",
        file=sys.stderr,
    )
    return published.id


def _changed(verb: str, loaded: Config, current: "Roster") -> "Roster":
    from gretfound import roster, signing

    today = datetime.now(UTC).date()
    match verb:
        case "admit":
            card = roster.read_site_card(_read(Path(loaded.card_path)))
            return roster.with_card(current, card, today=today, valid_days=loaded.valid_days)
        case "revoke":
            return roster.without_key(current, loaded.key_id, today=today)
        case "suspend":
            return roster.without_site(current, loaded.site_id, today=today)
        case _:
            update: dict[str, object] = {}
            if loaded.recipients:
                update["recipients"] = tuple(loaded.recipients)
            if loaded.receipt_public_path:
                key = signing.read_public_key(Path(loaded.receipt_public_path))
                update["receipt_key"] = signing.public_hex(key)
            if loaded.root_public_paths:
                keys = [signing.read_public_key(Path(path)) for path in loaded.root_public_paths]
                public = tuple(signing.public_hex(key) for key in keys)
                threshold = _threshold(loaded.threshold or current.root.threshold, len(public))
                update["root"] = roster.Root(threshold=threshold, public_keys=public)
            return current.model_copy(update=update)


def _threshold(threshold: int, num_keys: int) -> int:
    if threshold > num_keys:
        raise ConfigError(f"found threshold={threshold} and {num_keys} root keys; required at least as many keys")
    return threshold


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _shown(roster: "Roster", keys_path: Path) -> str:
    """Prints a roster, and writes the hub's card anew, which is the same on each machine that does."""
    from gretfound import strongbox

    strongbox.write_card(keys_path, roster.hub_card)
    print(_in_words(roster), file=sys.stderr)
    return roster.id


def _card_in_words(card: "SiteCard") -> str:
    from gretfound import signing

    keys = [f"  {key.role:<10}{signing.spoken(key.key_id)}" for key in card.keys]
    return "\n".join([f"The card of {card.site_id}: compare over the telephone before you admit it", *keys])


def _in_words(shown: "Roster") -> str:
    from gretfound import signing

    root = shown.root
    card_sha256 = hashlib.sha256(shown.hub_card.to_bytes()).hexdigest()
    lines = [f"{shown.id}: in force to {shown.expires}, {root.threshold} of {len(root.public_keys)} root keys"]
    lines.append(f"  hub       {signing.spoken(card_sha256)}  sealed for {', '.join(shown.recipients)}")
    for site in shown.sites:
        lines.append(f"  {site.site_id}{f', suspended since {site.suspended}' if site.suspended else ''}")
        for key in site.keys:
            state = f"revoked on {key.revoked}" if key.revoked else f"valid {key.valid_from} to {key.valid_until}"
            lines.append(f"  {key.role:<10}{signing.spoken(key.key_id)}  {state}, key_id={key.key_id}")
    return "\n".join(lines)


if __name__ == "__main__":
    console.run(Config, main)
