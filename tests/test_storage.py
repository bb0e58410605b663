"""Storage: whole objects or none, on disk and on S3, verified by digest; a ledger that shows every change."""

import concurrent.futures
from pathlib import Path

import boto3
import pytest

from gretfound import storage
from gretfound.errors import LineageError, StorageError
from gretfound.lineage import Encoder, Report


@pytest.fixture(params=["file", "s3"])
def hub_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return storage.normalised(str(tmp_path / "hub"))
    return str(request.getfixturevalue("s3_hub")) + f"-{tmp_path.name}"


def test_bytes__round_trip_and_listing(hub_uri: str) -> None:
    uri = storage.join(hub_uri, "a", "b.bin")
    assert not storage.exists(uri) and storage.list_uris(hub_uri) == [] and storage.list_names(hub_uri) == []
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    storage.write_json(storage.join(hub_uri, "c.json"), {"x": 1})
    assert storage.read_bytes(uri) == b"two" and storage.exists(uri)
    assert storage.list_uris(hub_uri) == [uri, storage.join(hub_uri, "c.json")]
    assert storage.list_names(hub_uri) == ["a", "c.json"]
    with pytest.raises(StorageError, match="does not exist"):
        storage.read_bytes(storage.join(hub_uri, "absent"))


def test_create_bytes__of_many_writers_one_wins(hub_uri: str) -> None:
    uri = storage.join(hub_uri, "lease")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda index: storage.create_bytes(uri, str(index).encode()), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == str(won.index(True)).encode()


def an_encoder(**changes: object) -> Encoder:
    values = {
        "architecture": "vit",
        "objective": "mae",
        "image_size_px": 32,
        "images_seen": 10,
        "final_loss": 0.5,
        "recipe_id": "pretrain-1",
    }
    return Encoder(**(values | changes))  # type: ignore[arg-type]


def test_publish_folder__fetched_again_and_found_by_recipe(hub_uri: str, tmp_path: Path) -> None:
    (tmp_path / "made" / "sub").mkdir(parents=True)
    (tmp_path / "made" / "sub" / "weights.bin").write_bytes(b"w" * 1000)
    assert storage.finished_record(hub_uri, "pretrain-1", Encoder) is None
    record = storage.publish_folder(hub_uri, tmp_path / "made", an_encoder())
    assert storage.read_record(hub_uri, record.id, Encoder) == record
    assert storage.finished_record(hub_uri, "pretrain-1", Encoder) == record
    assert [each.id for each in storage.read_records(hub_uri, Encoder)] == [record.id]
    fetched = storage.fetch_folder(hub_uri, record, tmp_path / "fetched")
    assert (fetched / "sub" / "weights.bin").read_bytes() == b"w" * 1000
    storage.write_bytes(storage.join(storage.record_uri(hub_uri, record), "sub/weights.bin"), b"w" * 999 + b"x")
    with pytest.raises(StorageError, match="not what its record says"):
        storage.fetch_folder(hub_uri, record, tmp_path / "again")
    assert not (tmp_path / "again" / "sub" / "weights.bin").exists(), "nothing half-written"


def test_read_record__changed_absent_or_of_another_kind(hub_uri: str) -> None:
    record = an_encoder()
    storage.write_record(hub_uri, record)
    with pytest.raises(LineageError, match="required the id of a report"):
        storage.read_record(hub_uri, record.id, Report)
    with pytest.raises(LineageError, match="no record"):
        storage.read_record(hub_uri, "encoder-00000000000000000000", Encoder)
    uri = storage.join(hub_uri, "encoders", record.id, "record.json")
    storage.write_json(uri, storage.read_json(uri) | {"images_seen": 11})
    with pytest.raises(LineageError, match="was changed"):
        storage.read_record(hub_uri, record.id, Encoder)


def test_read_parents__those_of_one_kind(hub_uri: str) -> None:
    first, second = an_encoder(), an_encoder(images_seen=20)
    report = Report(evaluation_sets=(), num_images=0)
    for record in (first, second, report):
        storage.write_record(hub_uri, record)
    child = an_encoder(images_seen=30, parents=(second.id, report.id, first.id))
    assert storage.read_parents(hub_uri, child, Encoder) == [second, first]
    assert storage.read_parents(hub_uri, child, Report) == [report]
    assert storage.read_parents(hub_uri, first, Report) == []


def test_list_names__a_folder_that_another_makes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    real, _ = storage.filesystem(str(tmp_path))

    class Late:
        looks = 0

        def get_file_info(self, selector: object) -> object:
            self.looks += 1
            if self.looks == 1:
                raise FileNotFoundError(2, "Cannot list directory")
            return real.get_file_info(selector)

    late = Late()
    monkeypatch.setattr(storage, "filesystem", lambda uri: (late, uri))
    assert storage.list_names(str(tmp_path)) == ["made"]
    assert late.looks == 2


def test_filesystem__unknown_scheme() -> None:
    with pytest.raises(StorageError, match="required one of file, s3, gs, abfs"):
        storage.filesystem("ftp://host/hub")


@pytest.mark.parametrize("uri", ["gs://bucket/hub/x", "abfs://container@account.dfs.core.windows.net/hub/x"])
def test_filesystem__clouds_are_opened_by_pyarrow(uri: str) -> None:
    opened, path = storage.filesystem(uri)
    assert opened.type_name in ("gcs", "abfs") and path.endswith("hub/x")


def test_is_as_stored__compares_the_size_everywhere_and_a_digest_where_s3_keeps_one(
    s3_hub: str, tmp_path: Path
) -> None:
    (tmp_path / "sent").write_bytes(b"as it was sent")
    (tmp_path / "changed").write_bytes(b"As it was sent")
    (tmp_path / "cut").write_bytes(b"as it was")
    copies = [tmp_path / name for name in ("sent", "changed", "cut")]
    bucket, _, folder = s3_hub.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    content = (tmp_path / "sent").read_bytes()
    client.put_object(Bucket=bucket, Key=f"{folder}/md5", Body=content)
    client.put_object(Bucket=bucket, Key=f"{folder}/sha256", Body=content, ChecksumAlgorithm="SHA256")
    begun = client.create_multipart_upload(Bucket=bucket, Key=f"{folder}/parts")
    part = {"Bucket": bucket, "Key": f"{folder}/parts", "UploadId": begun["UploadId"]}
    etag = client.upload_part(**part, PartNumber=1, Body=content)["ETag"]
    client.complete_multipart_upload(**part, MultipartUpload={"Parts": [{"ETag": etag, "PartNumber": 1}]})
    for name in ("md5", "sha256"):
        assert [storage.is_as_stored(f"{s3_hub}/{name}", copy) for copy in copies] == [True, False, False], name
    for uri in (f"{s3_hub}/parts", str(tmp_path / "sent")):
        assert [storage.is_as_stored(uri, copy) for copy in copies] == [True, True, False], uri
    with pytest.raises(StorageError, match="does not exist"):
        storage.is_as_stored(f"{s3_hub}/absent", tmp_path / "sent")
