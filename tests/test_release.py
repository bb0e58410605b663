import json
import shutil

import pytest
import timm
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file

from gretfound import ledger, release, signing, storage
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import ConfigError, LineageError, ReleaseBlocked, StorageError
from gretfound.evaluation.protocol import ENCODERS
from gretfound.lineage import Corpus, Encoder, Release, Report, ShardSet
from jobs import publish_release

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def figures(value):
    return {name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name in ("auroc", "knn_auroc")}


def content_of(encoder_id, gain=0.1):
    classes = {name: {"num_images": 20, "num_patients": 20} for name in ("no glaucoma", "glaucoma")}
    group = {"auroc": {"value": 0.7, "low": 0.6, "high": 0.8}, "num_images": 20, "num_patients": 20}
    return {
        "encoders": {name: {"glaucoma": figures(0.6 + gain * (name == "pretrained"))} for name in ENCODERS},
        "tasks": {"glaucoma": {"title": "glaucoma", "classes": classes, "num_images": 40}},
        "groups": {
            "glaucoma": {
                "sex": {
                    "groups": {"female": group, "male": group},
                    "worst_group": "male",
                    "gap": 0.05,
                    "equity_scaled_auroc": 0.65,
                }
            }
        },
        "verdict": {"sentence": "It is better.", "against": {"untrained": {"mean_gain": gain}}},
        "skipped_tasks": [{"set": "dune", "task": "amd", "title": "AMD", "reason": "too few patients in a class"}],
        "evaluation_sets": {"dune": {"role": "tested on", "num_readable": 40}},
        "lineage": {"encoder_id": encoder_id},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A hub with the records from shard set to report, and the folders behind them."""
    root = tmp_path_factory.mktemp("release")
    hub_uri = f"file://{root}/hub"
    shard_set = ShardSet(site_id="aster", origin="synthetic", num_images=1200, shards=(), rejected={})
    storage.write_record(hub_uri, shard_set)
    corpus = Corpus(
        parents=(shard_set.id,), num_images=1200, num_excluded=0, site_ids=("aster",), num_images_by_origin={}
    )
    storage.write_record(hub_uri, corpus)
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, depth=1, num_classes=0, global_pool="avg"
    )
    encoder_path = folder.write_encoder_folder(
        network, root / "encoder", architecture="vit_tiny_patch16_224", transform=Transform(image_size_px=32)
    )
    (encoder_path / "config.yaml").write_text("hub_uri: not for the public\n")
    encoder = storage.publish_folder(
        hub_uri,
        encoder_path,
        Encoder(
            parents=(corpus.id,),
            architecture="vit_tiny_patch16_224",
            objective="mae",
            image_size_px=32,
            images_seen=96,
            final_loss=0.9,
        ),
    )
    (root / "report").mkdir()
    (root / "report" / "report.json").write_text(json.dumps(content_of(encoder.id)))
    report = storage.publish_folder(
        hub_uri, root / "report", Report(parents=(encoder.id,), evaluation_sets=("dune:0",), num_images=40)
    )
    return root, hub_uri, encoder, report


def write(made, path, **changes):
    _, hub_uri, encoder, report = made
    arguments = {
        "name": "tiny-1",
        "encoder_path": made[0] / "encoder",
        "encoder": encoder,
        "report": report,
        "report_content": content_of(encoder.id),
        "records": release.read_lineage(hub_uri, encoder),
        "signing_key": KEY,
        "max_onnx_error": 1e-4,
        "min_mean_auroc_gain": -1.0,
    }
    return release.write_release_folder(path, **arguments | changes)


@pytest.fixture(scope="module")
def released_path(made, tmp_path_factory):
    return write(made, tmp_path_factory.mktemp("released"))


def test_write_release_folder__holds_what_the_design_lists(released_path):
    assert {path.name for path in released_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "transform.json",
        "checkpoint.pth",
        "model.onnx",
        "label_maps.json",
        "report.json",
        "README.md",
        "LICENSE",
        "lineage.json",
        "digests.json",
        "signature.json",
    }
    encoder, _ = folder.read_encoder_folder(released_path)
    plain = timm.create_model(f"local-dir:{released_path}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(plain(images), encoder(images))
    assert json.loads((released_path / "label_maps.json").read_text()) == {
        "glaucoma": {"0": "no glaucoma", "1": "glaucoma"}
    }
    assert release.LICENCE_URL in (released_path / "LICENSE").read_text()


def test_model_card__tells_results_groups_data_and_limits(released_path, made):
    card = (released_path / "README.md").read_text()
    for expected in (
        "license: cc-by-nc-4.0",
        "0.700 (0.600 to 0.800)",
        "male: 0.700",
        "| aster | 0 | 1,200 |",
        "Skipped: AMD on dune",
        "Not intended for diagnosis",
        made[2].id,
        made[3].id,
    ):
        assert expected in card


def test_read_lineage__nearest_first(made):
    _, hub_uri, encoder, report = made
    found = release.read_lineage(hub_uri, report)
    assert [entry["kind"] for entry in found] == ["report", "encoder", "corpus", "shards"]
    assert found[-1]["num_images"] == 1200 and found[1]["parents"] == list(encoder.parents)


def test_verify_release__accepts_what_was_signed(released_path):
    release.verify_release(released_path, KEY.public_key())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("append", StorageError, "README.md was changed"),
        ("remove", StorageError, "LICENSE is missing"),
        ("add", StorageError, "extra.pkl was not signed"),
        ("digests", StorageError, "digests.json was changed"),
        ("payload", LineageError, "changed after signing"),
        ("unsigned", LineageError, "no readable signature.json"),
        ("other key", LineageError, "required a signature of the key"),
    ],
)
def test_verify_release__finds_every_change(released_path, tmp_path, change, error, message):
    path = shutil.copytree(released_path, tmp_path / "copy")
    public_key = KEY.public_key()
    match change:
        case "append":
            (path / "README.md").write_text((path / "README.md").read_text() + " ")
        case "remove":
            (path / "LICENSE").unlink()
        case "add":
            (path / "extra.pkl").write_bytes(b"")
        case "digests":
            (path / "digests.json").write_text("{}")
        case "payload":
            envelope = json.loads((path / "signature.json").read_text())
            envelope["payload"] = "e30="
            (path / "signature.json").write_text(json.dumps(envelope))
        case "unsigned":
            (path / "signature.json").unlink()
        case "other key":
            public_key = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(error, match=message):
        release.verify_release(path, public_key)


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        ("onnx", {"max_onnx_error": 0.0}),
        ("mean_auroc_gain", {"min_mean_auroc_gain": 0.2}),
        ("report_of_encoder", {"report_content": content_of("encoder-00")}),
    ],
)
def test_write_release_folder__gate_blocks(made, tmp_path, gate, changes):
    with pytest.raises(ReleaseBlocked) as raised:
        write(made, tmp_path / "blocked", **changes)
    assert raised.value.gate == gate
    assert not (tmp_path / "blocked" / "signature.json").exists()


def test_write_release_folder__nothing_measured_is_blocked(made, tmp_path):
    with pytest.raises(ReleaseBlocked, match="measured"):
        write(made, tmp_path, report_content=content_of(made[2].id) | {"tasks": {}})


def test_write_release_folder__other_checkpoint_is_blocked(made, tmp_path):
    path = shutil.copytree(made[0] / "encoder", tmp_path / "encoder")
    weights = load_file(path / "model.safetensors")
    torch.save({"model": {name: tensor + 1 for name, tensor in weights.items()}}, path / "checkpoint.pth")
    with pytest.raises(ReleaseBlocked, match=r"checkpoint\.pth"):
        write(made, tmp_path / "release", encoder_path=path)


def test_write_release_folder__loss_against_untrained_is_warned_of(made, tmp_path, caplog):
    write(made, tmp_path, report_content=content_of(made[2].id, gain=-0.05))
    assert "no better than untrained" in caplog.text


def test_read_signing_key__is_made_once_for_the_owner_alone(tmp_path):
    path = tmp_path / "keys" / "release.pem"
    first = release.read_signing_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = release.read_signing_key(path)
    published = signing.read_public_key(path.with_name("release.pem.pub"))
    assert signing.key_id(first.public_key()) == signing.key_id(again.public_key()) == signing.key_id(published)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read"):
        release.read_signing_key(path)


def test_read_signing_key__other_content_is_an_error(tmp_path):
    path = tmp_path / "release.pem"
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="no private key"):
        release.read_signing_key(path)


def test_publish_release__record_ledger_and_resume(made, tmp_path):
    _, hub_uri, encoder, report = made
    given = [f"hub_uri={hub_uri}", f"encoder_id={encoder.id}", f"report_id={report.id}", "name=tiny-1"]
    given += [f"signing_key_path={tmp_path}/release.pem"]
    release_id = publish_release.main(given)
    record = storage.read_record(hub_uri, release_id, Release)
    assert record.parents == (encoder.id, report.id) and record.licence == "CC-BY-NC-4.0"
    assert "config.yaml" not in {file.path for file in record.files}
    public_key = signing.read_public_key(tmp_path / "release.pem.pub")
    release.verify_release(storage.local_path(storage.record_uri(hub_uri, record)), public_key)
    assert publish_release.main(given) == release_id
    entries = [entry for entry in ledger.read(hub_uri) if entry.subject == release_id]
    assert [(entry.event, entry.details["key_id"]) for entry in entries] == [("released", signing.key_id(public_key))]
    assert b"PRIVATE KEY" not in b"".join(storage.read_bytes(uri) for uri in storage.list_uris(hub_uri))


def test_publish_release__key_in_the_hub_and_bad_name_are_refused(made):
    _, hub_uri, encoder, report = made
    given = [f"hub_uri={hub_uri}", f"encoder_id={encoder.id}", f"report_id={report.id}"]
    with pytest.raises(ConfigError, match="lies in the hub"):
        publish_release.main([*given, "name=a", f"signing_key_path={storage.local_path(hub_uri)}/key.pem"])
    with pytest.raises(ConfigError, match="letters, digits, dots and dashes"):
        publish_release.main([*given, "name=../a", "signing_key_path=k"])
