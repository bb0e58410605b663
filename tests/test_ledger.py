"""The ledger: one chain of many writers, on disk and on S3; whatever is done to it, the first bad entry is named."""

import concurrent.futures
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gretfound import ledger, lineage, storage
from gretfound.errors import ConfigError, LineageError, StorageError
from jobs import ledger as job


@pytest.fixture(params=["file", "s3"])
def hub_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return storage.normalised(str(tmp_path / "hub"))
    return str(request.getfixturevalue("s3_hub")) + f"-{tmp_path.name}"


def test_append__many_writers_make_one_chain_and_repeat_nothing(hub_uri: str) -> None:
    subjects = [f"x-{index % 8}" for index in range(16)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        entered = list(pool.map(lambda subject: ledger.append(hub_uri, event="accepted", subject=subject), subjects))
    entries = ledger.read(hub_uri)
    assert [entry.index for entry in entries] == list(range(8))
    assert {entry.subject for entry in entries} == set(subjects)
    assert {each.sha256 for each in entered} == {entry.sha256 for entry in entries}
    other = ledger.append(hub_uri, event="accepted", subject="x-0", details={"code": "X"})
    assert other.index == 8, "other details are another entry"


def test_enter__sees_what_others_have_entered_since(hub_uri: str) -> None:
    ours, theirs = ledger.Ledger(hub_uri), ledger.Ledger(hub_uri)
    ours.enter(event="accepted", subject="a")
    assert theirs.enter(event="accepted", subject="a").index == 0
    assert theirs.enter(event="accepted", subject="b").index == 1
    assert ours.enter(event="accepted", subject="c").index == 2
    assert [entry.subject for entry in ledger.verify(hub_uri)] == ["a", "b", "c"]


def _path(tmp_path: Path, index: int) -> Path:
    return tmp_path / "ledger" / f"{index:08d}.json"


def _edit(path: Path, *, has_new_digest: bool) -> None:
    content: dict[str, Any] = json.loads(path.read_text()) | {"subject": "somebody else"}
    if has_new_digest:
        content["sha256"] = lineage.digest_of({name: value for name, value in content.items() if name != "sha256"})
    path.write_bytes(lineage.canonical_json(content))


def _reorder(tmp_path: Path) -> None:
    first, second = _path(tmp_path, 2), _path(tmp_path, 3)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def _delete_and_close_up(tmp_path: Path) -> None:
    for index in range(2, 5):
        _path(tmp_path, index + 1).replace(_path(tmp_path, index))


def _cut_end(tmp_path: Path) -> None:
    for index in (4, 5):
        _path(tmp_path, index).unlink()


def _cut_and_write_anew(tmp_path: Path) -> None:
    _cut_end(tmp_path)
    for index in range(4):
        ledger.append(str(tmp_path), event="accepted", subject=f"new-{index}")


DAMAGES: dict[str, tuple[Callable[[Path], Any], int, bool]] = {
    "edited": (lambda path: _edit(_path(path, 3), has_new_digest=False), 3, False),
    "edited, with a new digest": (lambda path: _edit(_path(path, 3), has_new_digest=True), 4, False),
    "edited at the end": (lambda path: _edit(_path(path, 5), has_new_digest=False), 5, False),
    "edited at the end, with a new digest": (lambda path: _edit(_path(path, 5), has_new_digest=True), 5, True),
    "spaced": (lambda path: _path(path, 1).write_bytes(_path(path, 1).read_bytes() + b" "), 1, False),
    "no JSON": (lambda path: _path(path, 0).write_bytes(b"{"), 0, False),
    "deleted": (lambda path: _path(path, 2).unlink(), 2, False),
    "deleted at the start": (lambda path: _path(path, 0).unlink(), 0, False),
    "deleted and closed up": (_delete_and_close_up, 2, False),
    "reordered": (_reorder, 2, False),
    "cut off": (_cut_end, 4, True),
    "all cut off": (lambda path: [each.unlink() for each in (path / "ledger").iterdir()], 0, True),
    "cut off and written anew": (_cut_and_write_anew, 5, True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify__names_the_first_bad_entry(tmp_path: Path, damage: str) -> None:
    do, first_bad, needs_anchor = DAMAGES[damage]
    hub, anchors = f"hub_uri={tmp_path}", f"anchor_uri={tmp_path / 'anchors'}"
    digests = [ledger.append(str(tmp_path), event="accepted", subject=str(index)).sha256 for index in range(6)]
    assert job.main(["anchor", hub, anchors]) == digests[-1]
    assert job.main(["verify", hub, anchors]) == digests[-1]
    do(tmp_path)
    if needs_anchor and list((tmp_path / "ledger").iterdir()):
        job.main(["verify", hub])  # why an anchor is needed: the chain alone cannot show this
    with pytest.raises(LineageError, match=f"ledger entry {first_bad} is the first bad one"):
        job.main(["verify", hub, anchors])


def test_append__nothing_is_added_to_a_broken_chain(tmp_path: Path) -> None:
    for index in range(3):
        ledger.append(str(tmp_path), event="accepted", subject=str(index))
    _edit(_path(tmp_path, 1), has_new_digest=False)
    with pytest.raises(LineageError, match="entry 1"):
        ledger.append(str(tmp_path), event="accepted", subject="3")
    assert not _path(tmp_path, 3).exists()


def test_read_anchors__gives_back_what_was_written(tmp_path: Path) -> None:
    entry = ledger.append(str(tmp_path), event="rejected", subject="a")
    ledger.write_anchor(str(tmp_path / "anchors"), entry.anchor)
    assert ledger.read_anchors(str(tmp_path / "anchors")) == [entry.anchor]
    with pytest.raises(StorageError, match="no anchor"):
        ledger.read_anchors(str(tmp_path / "absent"))


def test_main__wants_a_verb_and_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify"):
        job.main([f"hub_uri={tmp_path}"])
    with pytest.raises(ConfigError, match="no ledger entry"):
        job.main(["verify", f"hub_uri={tmp_path}"])
    with pytest.raises(ConfigError, match="anchor_uri"):
        job.main(["anchor", f"hub_uri={tmp_path}"])
