"""Packages: what `seal` writes, `open_package` opens; everything else it rejects and leaves nothing behind."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gretfound import contribution, fundus, phantom, shard
from gretfound.contribution import Package
from gretfound.errors import ContributionRejected

SIZE_PX = 64


def _rows(num_images: int, *, origin: str = "real") -> list[dict[str, Any]]:
    site = phantom.SITES["aster"]
    images = [phantom.draw_eye(site, seed=seed, size_px=SIZE_PX).image for seed in range(num_images)]
    return [shard.row_of(fundus.encode_png(image), site_id="aster", origin=origin, cells={}) for image in images]


@pytest.fixture(scope="module")
def staging_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staging")
    (path / "shards").mkdir()
    (path / "summary").mkdir()
    shard.write_shard_file(path / "shards" / "part-00000.parquet", _rows(3))
    (path / "summary" / "metadata_summary.json").write_text('{"num_images":3}')
    return path


def _seal(staging_path: Path, package_path: Path, **changes: Any) -> Package:
    terms: dict[str, Any] = {
        "site_id": "aster",
        "form": "images",
        "country": "India",
        "policy": "demonstration/1",
        "base_sha256": "",
        "num_images": 3,
        "num_patients": None,
    }
    return contribution.seal(staging_path, package_path, **(terms | changes))


@pytest.fixture(scope="module")
def package(staging_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return _seal(staging_path, tmp_path_factory.mktemp("sealed") / "aster.tar")


def _code_of(package_path: Path, into_path: Path) -> str:
    before = set(into_path.parent.iterdir())
    with pytest.raises(ContributionRejected) as caught:
        contribution.open_package(package_path, into_path)
    assert set(into_path.parent.iterdir()) == before, "a rejected package left something behind"
    return caught.value.code


def test_open_package__gives_back_what_was_sealed(package: Package, staging_path: Path, tmp_path: Path) -> None:
    manifest = contribution.open_package(package.path, tmp_path / "opened")
    assert manifest == package.manifest
    for member in manifest.files:
        assert (tmp_path / "opened" / member.path).read_bytes() == (staging_path / member.path).read_bytes()
    found = {path.relative_to(tmp_path / "opened").as_posix() for path in (tmp_path / "opened").rglob("*.*")}
    assert found == {"shards/part-00000.parquet", "summary/metadata_summary.json"}


def test_seal__is_deterministic_and_any_tar_tool_reads_it(package: Package, staging_path: Path, tmp_path: Path) -> None:
    again = _seal(staging_path, tmp_path / "again.tar")
    assert again.path.read_bytes() == package.path.read_bytes()
    assert again.sha256 == hashlib.sha256(package.path.read_bytes()).hexdigest() == package.sha256
    with tarfile.open(package.path) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert all((m.isreg(), m.mode, m.mtime, m.uid, m.gid) == (True, 0o644, 0, 0, 0) for m in members)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"site_id": "../aster"}, "BAD_MANIFEST"),
        ({"site_id": "Aster Hospital"}, "BAD_MANIFEST"),
        ({"form": "pictures"}, "BAD_MANIFEST"),
        ({"form": "weights", "base_sha256": "0" * 64}, "NOT_ALLOWED"),
        ({"base_sha256": "0" * 64}, "BAD_MANIFEST"),
        ({"num_images": -1}, "BAD_MANIFEST"),
        ({"policy": "own"}, "BAD_MANIFEST"),
    ],
)
def test_seal__refuses_what_the_hub_would_reject(
    staging_path: Path, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(ContributionRejected) as caught:
        _seal(staging_path, tmp_path / "package.tar", **changes)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_open_package__accepts_no_flipped_byte(package: Package, tmp_path: Path) -> None:
    content = package.path.read_bytes()
    rng = random.Random(0)
    headers = range(2048)  # the manifest and the headers get their share; most bytes are photographs
    places = [rng.choice(headers) for _ in range(100)] + [rng.randrange(len(content)) for _ in range(100)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.tar").write_bytes(damaged)
        assert _code_of(tmp_path / "damaged.tar", tmp_path / "opened")


@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 700, -1, -512, -1024])
def test_open_package__rejects_a_cut_package(package: Package, tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "cut.tar").write_bytes(package.path.read_bytes()[:num_bytes])
    assert _code_of(tmp_path / "cut.tar", tmp_path / "opened") == "TRUNCATED"


def test_open_package__rejects_bytes_after_the_end(package: Package, tmp_path: Path) -> None:
    (tmp_path / "long.tar").write_bytes(package.path.read_bytes() + bytes(512))
    assert _code_of(tmp_path / "long.tar", tmp_path / "opened") == "TRAILING_BYTES"


def _member(name: str, content: bytes = b"x", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    described = tarfile.TarInfo(name)
    described.size = len(content)
    for key, value in changes.items():
        setattr(described, key, value)
    return described, content


def _repacked(package: Package, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], path: Path) -> Path:
    with tarfile.open(package.path) as archive:
        members = [(each, archive.extractfile(each).read()) for each in archive.getmembers()]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for described, content in members:
            archive.addfile(described, io.BytesIO(content))
    return path


HOSTILE: dict[str, tuple[tuple[tarfile.TarInfo, bytes], str]] = {
    "parent": (_member("../x"), "UNSAFE_NAME"),
    "absolute": (_member("/tmp/x"), "UNSAFE_NAME"),
    "dotted": (_member("shards/./x"), "UNSAFE_NAME"),
    "symlink": (_member("z", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "NOT_A_REGULAR_FILE"),
    "hardlink": (_member("z", b"", type=tarfile.LNKTYPE, linkname="manifest.json"), "NOT_A_REGULAR_FILE"),
    "device": (_member("z", b"", type=tarfile.CHRTYPE), "NOT_A_REGULAR_FILE"),
    "folder": (_member("z", b"", type=tarfile.DIRTYPE), "NOT_A_REGULAR_FILE"),
    "sparse": (_member("z", b"", type=tarfile.GNUTYPE_SPARSE), "NOT_A_REGULAR_FILE"),
    "undeclared": (_member("zzz.json"), "NOT_ALLOWED"),
    "executable": (_member("zzz.json", mode=0o755), "NOT_CANONICAL"),
    "owned": (_member("zzz.json", uid=1000), "NOT_CANONICAL"),
    "second manifest": (_member("manifest.json"), "OUT_OF_ORDER"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_open_package__rejects_hostile_members(package: Package, tmp_path: Path, case: str) -> None:
    member, code = HOSTILE[case]
    path = _repacked(package, lambda members: members.append(member), tmp_path / "hostile.tar")
    assert _code_of(path, tmp_path / "opened") == code


def test_open_package__rejects_an_archive_without_a_manifest_at_once(package: Package, tmp_path: Path) -> None:
    many = [_member(f"shards/part-{index:05d}.parquet") for index in range(2_000)]
    with tarfile.open(tmp_path / "many.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for described, content in many:
            archive.addfile(described, io.BytesIO(content))
    assert _code_of(tmp_path / "many.tar", tmp_path / "opened") == "NOT_ALLOWED"


def _with_manifest(package: Package, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    def rewrite(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        manifest = json.loads(members[0][1])
        change(manifest)
        content = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        members[0] = _member("manifest.json", content)
        members[1] = _member("manifest.sha256", hashlib.sha256(content).hexdigest().encode() + b"\n")

    _repacked(package, rewrite, path)
    content = path.read_bytes().rstrip(b"\0")  # tarfile pads further than `seal`
    path.write_bytes(content + bytes(-len(content) % 512 + 1024))
    return path


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda manifest: manifest.update(schema_version="gretfound-contribution/2"), "UNKNOWN_VERSION"),
        (lambda manifest: manifest.update(extra=1), "BAD_MANIFEST"),
        (lambda manifest: manifest.pop("site_id"), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(num_images=True), "BAD_MANIFEST"),
        (lambda manifest: manifest.update(num_images=float("nan")), "BAD_MANIFEST"),
        (lambda manifest: manifest["files"][0].update(sha256="0" * 64), "DIGEST_MISMATCH"),
        (lambda manifest: manifest["files"][0].update(size_bytes=7), "SIZE_MISMATCH"),
        (lambda manifest: manifest["files"][0].update(size_bytes=2**60), "TOO_LARGE"),
        (lambda manifest: manifest["files"][0].update(path="shards/../x"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"][0].update(path="shards/code.py"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"][0].update(path="shards/part-00000.bin"), "NOT_ALLOWED"),
        (lambda manifest: manifest["files"].pop(), "MISSING_MEMBER"),
        (lambda manifest: manifest["files"].reverse(), "OUT_OF_ORDER"),
        (lambda manifest: manifest["files"].insert(0, manifest["files"][0]), "OUT_OF_ORDER"),
    ],
)
def test_open_package__rejects_a_dishonest_manifest(
    package: Package, tmp_path: Path, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    path = _with_manifest(package, tmp_path / "dishonest.tar", change)
    assert _code_of(path, tmp_path / "opened") == code


def test_open_package__rejects_a_manifest_of_too_many_members(package: Package, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        shard_file = manifest["files"][0]
        more = [shard_file | {"path": f"shards/part-{index:05d}.parquet"} for index in range(100)]
        manifest["files"] = [*more, manifest["files"][1]]

    path = _with_manifest(package, tmp_path / "many.tar", change)
    assert _code_of(path, tmp_path / "opened") == "TOO_MANY_MEMBERS"


def test_open_package__rejects_a_duplicate_key(package: Package, tmp_path: Path) -> None:
    def rewrite(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        content = members[0][1].replace(b'{"base_sha256":""', b'{"base_sha256":"","base_sha256":""')
        members[0] = _member("manifest.json", content)

    path = _repacked(package, rewrite, tmp_path / "twice.tar")
    assert _code_of(path, tmp_path / "opened") == "BAD_MANIFEST"


def test_open_package__rejects_a_pickle_named_safetensors(tmp_path: Path) -> None:
    staging_path = tmp_path / "staging"
    for name, content in {
        "weights/adapter.safetensors": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os",
        "weights/adapter_config.json": b"{}",
        "summary/metadata_summary.json": b"{}",
        "training/config.json": b"{}",
        "training/metrics.jsonl": b"{}",
    }.items():
        (staging_path / name).parent.mkdir(parents=True, exist_ok=True)
        (staging_path / name).write_bytes(content)
    with pytest.raises(ContributionRejected) as caught:
        _seal(staging_path, tmp_path / "package.tar", form="weights", base_sha256="0" * 64)
    assert caught.value.code == "WRONG_KIND"


def test_screen_shard_file__takes_out_a_damaged_row_and_keeps_its_neighbours(tmp_path: Path) -> None:
    rows = _rows(5)
    rows[1]["image"] = rows[1]["image"][: len(rows[1]["image"]) // 2]
    rows[3]["image"] = rows[4]["image"]
    shard.write_shard_file(tmp_path / "part.parquet", rows)
    rejected = contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin="real")
    assert rejected == {"not_the_named_photograph": 1, "unreadable": 1}
    kept = pq.read_table(tmp_path / "part.parquet")["image_id"].to_pylist()
    assert kept == [rows[index]["image_id"] for index in (0, 2, 4)]


def test_screen_shard_file__leaves_a_sound_shard_untouched(tmp_path: Path) -> None:
    shard.write_shard_file(tmp_path / "part.parquet", _rows(2))
    before = (tmp_path / "part.parquet").read_bytes()
    assert contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin="real") == {}
    assert (tmp_path / "part.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "origin", "code"),
    [
        ({"site_id": "birch"}, "real", "SITE_MISMATCH"),
        ({"origin": "synthetic"}, "real", "SITE_MISMATCH"),
        ({"origin": "synthetic", "patient": "p1"}, "synthetic", "PATIENT_IN_SYNTHETIC"),
    ],
)
def test_screen_shard_file__rejects_rows_of_others(
    tmp_path: Path, changes: dict[str, str], origin: str, code: str
) -> None:
    shard.write_shard_file(tmp_path / "part.parquet", [row | changes for row in _rows(1)])
    with pytest.raises(ContributionRejected) as caught:
        contribution.screen_shard_file(tmp_path / "part.parquet", site_id="aster", origin=origin)
    assert caught.value.code == code
