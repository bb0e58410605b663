"""The roster of sites: several people sign, nothing goes back, what is revoked stays so, and it expires."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gretfound import keyring, roster, signing, strongbox
from gretfound.errors import ConfigError, ContributionRejected, LineageError
from gretfound.roster import Approval, Roster
from jobs import ledger
from jobs import roster as job
from tests import parties
from tests.parties import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return parties.hub_at(tmp_path)


def _root_keys(hub: Hub) -> list[Ed25519PrivateKey]:
    return [signing.read_private_key(path) for path in strongbox.root_paths(hub.keys_path)]


def _anchor(hub: Hub) -> str:
    return strongbox.read_anchor(hub.keys_path)


def _versions(hub: Hub, folder_path: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder_path / "hub" / "roster").iterdir())]


def _following(hub: Hub, **changes: object) -> Roster:
    current, content = roster.read_current(hub.uri, anchor=_anchor(hub))
    return roster.following(current.model_copy(update=changes), content, today=parties.today())


def test_init__makes_keys_for_their_owner_alone_and_is_harmless_again(hub: Hub) -> None:
    first = hub.roster
    assert (first.version, first.root.threshold, len(first.root.public_keys), len(first.recipients)) == (1, 2, 3, 2)
    secrets = ["identity.txt", "recovery.txt", "receipt.pem", "root-1.pem", "root-2.pem", "root-3.pem"]
    assert {(hub.keys_path / name).stat().st_mode & 0o777 for name in secrets} == {0o600}
    assert hub.change_roster("init") == "roster-00000001" and hub.roster == first
    card, _ = keyring.read_hub_card(hub.keys_path / "hub.json")
    assert (card.recipients, card.receipt_key) == (first.recipients, first.receipt_key)
    assert strongbox.read_identities(hub.keys_path / "recovery.txt") != hub.identities


def test_main__refuses_keys_inside_the_hub_and_wrong_commands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the hub"):
        job.main(["init", f"hub_uri={tmp_path}/hub", f"keys_path={tmp_path}/hub/keys"])
    with pytest.raises(ConfigError, match="card_path is required"):
        job.main(["admit", f"hub_uri={tmp_path}/hub"])
    with pytest.raises(ConfigError, match="required: python -m jobs"):
        job.main([f"hub_uri={tmp_path}/hub"])
    with pytest.raises(ConfigError, match="make the hub's keys"):
        job.main(["show", f"hub_uri={tmp_path}/hub"])
    with pytest.raises(ConfigError, match="keys_path is required"):
        strongbox.default_folder("s3://bucket/hub")


def test_verify_chain__needs_the_threshold_of_different_root_keys(hub: Hub, tmp_path: Path) -> None:
    keys = _root_keys(hub)
    before = _versions(hub, tmp_path)
    following = _following(hub)

    def verify(signers: list[Ed25519PrivateKey]) -> Roster:
        return roster.verify_chain([*before, roster.sign(following, signers)], anchor=_anchor(hub))

    assert verify(keys[:2]) == verify(keys[1:]) == verify(keys) == following
    for too_few in (keys[:1], [keys[0], keys[0]], [keys[0], Ed25519PrivateKey.generate()]):
        with pytest.raises(LineageError, match="not signed by 2"):
            verify(too_few)


def test_verify_chain__accepts_no_changed_skipped_reordered_or_foreign_version(hub: Hub, tmp_path: Path) -> None:
    hub.join(tmp_path / "aster", "aster")
    hub.change_roster("renew")
    versions = _versions(hub, tmp_path)
    anchor = _anchor(hub)
    assert roster.verify_chain(versions, anchor=anchor).version == 3
    one, two, three = versions
    flipped = bytearray(two)
    flipped[two.index(b"payload") + 40] ^= 1
    for wrong in ([two], [one, three], [one, three, two], [one, bytes(flipped), three], [one, two, two], [b"{}"]):
        with pytest.raises(LineageError):
            roster.verify_chain(wrong, anchor=anchor)
    with pytest.raises(LineageError, match="no roster"):
        roster.verify_chain([], anchor=anchor)
    with pytest.raises(LineageError, match="another root"):
        roster.verify_chain(versions, anchor="0" * 64)


def test_verify_chain__a_version_follows_the_very_one_before_it(hub: Hub, tmp_path: Path) -> None:
    keys = _root_keys(hub)
    (one,) = _versions(hub, tmp_path)
    following = _following(hub)
    two, fork = (roster.sign(following, signers) for signers in (keys[:2], keys[1:]))
    three = roster.sign(roster.following(following, two, today=parties.today()), keys)
    assert roster.verify_chain([one, two, three], anchor=_anchor(hub)).version == 3
    renumbered = roster.sign(following.model_copy(update={"version": 5}), keys)
    for wrong in ([one, fork, three], [one, renumbered]):
        with pytest.raises(LineageError, match="does not follow"):
            roster.verify_chain(wrong, anchor=_anchor(hub))


def test_read_current__notices_that_a_version_was_taken_away(hub: Hub, tmp_path: Path) -> None:
    ring = hub.join(tmp_path / "aster", "aster")
    hub.change_roster("revoke", f"key_id={keyring.approval_of(ring, 'container').key_id}")
    (tmp_path / "hub" / "roster" / "00000003.json").unlink()
    with pytest.raises(LineageError, match="roster-00000003"):
        _ = hub.roster
    ledger.main(["verify", f"hub_uri={hub.uri}"])


def test_publish__one_of_two_writers_wins_and_again_is_harmless(hub: Hub) -> None:
    keys = _root_keys(hub)
    one, two = (roster.sign(_following(hub, sites=()), keys[:count]) for count in (2, 3))
    assert roster.publish(hub.uri, one, anchor=_anchor(hub)).version == 2
    assert roster.publish(hub.uri, one, anchor=_anchor(hub)).version == 2
    with pytest.raises(ConfigError, match="meanwhile"):
        roster.publish(hub.uri, two, anchor=_anchor(hub))
    with pytest.raises(LineageError, match="not signed"):
        roster.publish(hub.uri, roster.sign(_following(hub), keys[:1]), anchor=_anchor(hub))


def test_main__people_sign_one_after_the_other(hub: Hub, tmp_path: Path) -> None:
    for number in (1, 2, 3):  # each takes a key away
        (hub.keys_path / f"root-{number}.pem").rename(tmp_path / f"person-{number}.pem")
    draft = f"draft_path={tmp_path}/draft.json"
    mine, theirs = (f"root_key_paths=[{tmp_path}/person-{number}.pem]" for number in (1, 3))
    with pytest.raises(ConfigError, match="no root key"):
        hub.change_roster("renew")
    with pytest.raises(ConfigError, match="draft_path"):
        hub.change_roster("renew", mine)
    assert hub.change_roster("renew", mine, draft) == f"{tmp_path}/draft.json"
    assert hub.change_roster("sign", mine, draft) == f"{tmp_path}/draft.json", "the same person twice"
    assert hub.roster.version == 1
    assert hub.change_roster("sign", theirs, draft) == "roster-00000002"
    assert hub.roster.version == 2


def test_main__root_keys_change_by_the_signature_of_the_old_and_the_new(hub: Hub, tmp_path: Path) -> None:
    old = _root_keys(hub)
    new = [signing.make_private_key(tmp_path / f"new-{number}.pem") for number in (1, 2)]
    paths = [f"{tmp_path}/new-{number}.pem.pub" for number in (1, 2)]
    root = roster.Root(threshold=2, public_keys=tuple(signing.public_hex(key.public_key()) for key in new))
    before = _versions(hub, tmp_path)
    for signers in (old, new, [old[0], new[0]]):
        with pytest.raises(LineageError, match="not signed"):
            content = roster.sign(_following(hub, root=root), signers)
            roster.verify_chain([*before, content], anchor=_anchor(hub))
    given = [*(f"{hub.keys_path}/root-{n}.pem" for n in (1, 2)), *(f"{tmp_path}/new-{n}.pem" for n in (1, 2))]
    hub.change_roster("renew", f"root_public_paths=[{','.join(paths)}]", f"root_key_paths=[{','.join(given)}]")
    assert hub.roster.root == root
    with pytest.raises(ConfigError, match="too few"):
        hub.change_roster("renew")  # the old keys have no say any more


def test_require_current__an_expired_roster_admits_nothing(hub: Hub) -> None:
    current = hub.roster
    roster.require_current(current, current.expires)
    for day in (current.expires + timedelta(days=1), current.issued - timedelta(days=2)):
        with pytest.raises(ContributionRejected) as caught:
            roster.require_current(current, day)
        assert caught.value.code == "ROSTER_EXPIRED"
    content = json.loads(current.to_bytes())
    content["expires"] = str(current.issued + timedelta(days=roster.MAX_DAYS + 1))
    with pytest.raises(signing.UnreadableDocument, match="90 days"):
        signing.parse_document(signing.canonical_json(content), Roster)


def test_renew__takes_new_recipients_and_writes_the_card_anew(hub: Hub) -> None:
    other = "age1qyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqs3290gq"
    with pytest.raises(ConfigError, match="recipient"):
        hub.change_roster("renew", f"recipients=[{hub.roster.recipients[0]},{other[:-1]}x]")
    new = [_recipient(), _recipient()]
    recipients = [*new, *hub.roster.recipients]
    hub.change_roster("renew", f"recipients=[{','.join(recipients)}]")
    assert list(hub.roster.recipients) == recipients, "what is on its way is still accepted"
    assert list(keyring.read_hub_card(hub.keys_path / "hub.json")[0].recipients) == new


def _recipient() -> str:
    import pyrage

    return str(pyrage.x25519.Identity.generate().to_public())


def test_admit__needs_proof_that_the_site_holds_its_keys(hub: Hub, tmp_path: Path) -> None:
    ring = hub.join(tmp_path / "aster", "aster")
    assert hub.change_roster("admit", f"card_path={ring.card_path}") == "roster-00000002", "nothing new"
    card = roster.read_site_card(ring.card_path.read_bytes())
    keys = [signing.read_private_key(ring.private_path(role)) for role in keyring.ROLES]
    stolen = card.model_copy(update={"site_id": "birch"})

    def refuse(changed: roster.SiteCard, signers: list[Ed25519PrivateKey]) -> None:
        path = tmp_path / "card.json"
        path.write_bytes(signing.sign(changed.to_bytes(), roster.SITE_CARD_TYPE, signers))
        with pytest.raises(ConfigError):
            hub.change_roster("admit", f"card_path={path}")

    refuse(card, keys[:1])
    refuse(card, [keys[0], Ed25519PrivateKey.generate()])
    same = Approval(role="steward", public_key=card.keys[0].public_key)
    refuse(card.model_copy(update={"keys": (card.keys[0], same)}), keys[:1])
    with pytest.raises(ConfigError, match="key stands in it twice"):
        path = tmp_path / "stolen.json"
        path.write_bytes(signing.sign(stolen.to_bytes(), roster.SITE_CARD_TYPE, keys))
        hub.change_roster("admit", f"card_path={path}")


def test_revoke__of_an_unknown_key_or_site_is_an_error(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="no site has"):
        hub.change_roster("revoke", "key_id=abc")
    with pytest.raises(ConfigError, match="no site of that id"):
        hub.change_roster("suspend", "site_id=abc")
