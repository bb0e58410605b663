"""The whole chain at its smallest, with the hub on an S3 server over real HTTP."""

import json
from pathlib import Path

import pytest
import timm
import torch

from gretfound import ledger as hub_ledger
from gretfound import phantom, site, storage
from gretfound.lineage import Corpus, Encoder, Generator, Release, Report, ShardSet
from gretfound.release import verify_release
from gretfound.signing import read_public_key
from jobs import (
    assemble_corpus,
    build_base,
    evaluate_encoder,
    finetune_generators,
    intake,
    ledger,
    pretrain_encoder,
    publish_release,
    roster,
    synthesize,
    withdraw_site,
)

BASE = [
    "num_photographs=24",
    "networks.resolution_px=32",
    "networks.latent_channels=4",
    "networks.encoder_width=16",
    "networks.decoder_width=8",
    "networks.unet_channels=[16,32]",
    "networks.text_width=16",
    "training.num_images=32",
    "training.batch_size=8",
]
ENCODER = [
    "encoder.architecture=vit_tiny_patch16_224",
    "encoder.image_size_px=32",
    "encoder.patch_size=8",
    "encoder.embed_dim=48",
    "encoder.depth=1",
    "encoder.num_heads=3",
    "mae.decoder_width=32",
    "mae.decoder_depth=1",
    "mae.decoder_num_heads=4",
    "fit.num_images=64",
    "fit.batch_size=16",
    "fit.warmup_images=16",
    "fit.precision=float32",
    "fit.checkpoint_every_images=0",
]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(900)
def test_chain__three_forms_become_a_release_on_s3(s3_hub: str, tmp_path: Path) -> None:
    hub_uri = f"{s3_hub}-chain"
    hub = f"hub_uri={hub_uri}"
    forms = {"aster": "weights", "birch": "images", "cedar": "synthetic"}
    num_images = {"aster": 84, "birch": 40, "cedar": 84, "dune": 40}  # the gate holds out 20 of each that is trained on
    for name, num in num_images.items():
        phantom.write_site(phantom.SITES[name], tmp_path / name, num_images=num, seed=2, size_px=64)

    base_id = build_base.main([hub, *BASE])
    base = storage.read_record(hub_uri, base_id, Generator)
    base_path = storage.fetch_folder(hub_uri, base, tmp_path / "base")
    keys = f"keys_path={tmp_path / 'hub.keys'}"
    roster.main(["init", hub, keys])
    for name, form in forms.items():
        out_path = tmp_path / "packages"
        site_keys = ["--site-id", name, "--keys", str(tmp_path / f"{name}.keys")]
        assert site.main(["keys", *site_keys, "--no-passphrase", "--hub", str(tmp_path / "hub.keys" / "hub.json")]) == 0
        roster.main(["admit", hub, keys, f"card_path={tmp_path / f'{name}.keys' / f'{name}.site.json'}"])
        code = site.main(
            [
                *("contribute", str(tmp_path / name), "--form", form, *site_keys, "--out", str(out_path)),
                *("--policy", "demonstration", "--key", str(tmp_path / f"{name}.key"), "--base", str(base_path)),
                *("--images-seen", "16", "--batch-size", "8", "--num-images", "8", "--steps", "3", "--lora-rank", "4"),
            ]
        )
        assert code == 0
    for package in (tmp_path / "packages").glob("*.age"):
        storage.upload_file(package, storage.join(hub_uri, "inbox", package.name))
    broken = storage.join(hub_uri, "inbox", "broken.age")
    storage.write_bytes(broken, b"not a package")

    intake.main([hub, keys, "policy=demonstration"])
    assert len(storage.list_names(storage.join(hub_uri, "quarantine"))) == 1
    generator_id = finetune_generators.main(
        [hub, f"base_id={base_id}", "tuning.num_images_seen=16", "tuning.batch_size=8", "tuning.lora_rank=4"]
    )
    assert storage.read_record(hub_uri, generator_id, Generator).site_id == "birch"
    synthesize.main([hub, "num_images=8", "num_steps=3", "images_per_shard=4", "batch_size=4", "is_screened=false"])
    shard_sets = list(storage.read_records(hub_uri, ShardSet))
    assert sorted((each.site_id, each.origin) for each in shard_sets) == [
        ("aster", "synthetic"),
        ("birch", "real"),
        ("birch", "synthetic"),
        ("cedar", "synthetic"),
    ]
    corpus_id = assemble_corpus.main([hub, f"evaluation_uris=[{tmp_path / 'dune'}]"])
    corpus = storage.read_record(hub_uri, corpus_id, Corpus)
    assert corpus.site_ids == ("aster", "birch", "cedar") and corpus.num_images_by_origin["real"] == 40
    encoder_id = pretrain_encoder.main([hub, f"corpus_id={corpus_id}", *ENCODER])
    assert storage.read_record(hub_uri, encoder_id, Encoder).parents == (corpus_id,)
    report_id = evaluate_encoder.main(
        [hub, f"encoder_id={encoder_id}", f"evaluation_uris=[{tmp_path / 'dune'}]", "num_bootstraps=100", "num_folds=3"]
    )
    report = storage.read_record(hub_uri, report_id, Report)
    found = json.loads(storage.read_bytes(storage.join(storage.record_uri(hub_uri, report), "report.json")))
    assert set(found["encoders"]) == {"pretrained", "untrained", "raw_pixels"}
    for tasks in found["encoders"].values():
        assert tasks
        for metrics in tasks.values():
            assert metrics["auroc"]["low"] <= metrics["auroc"]["value"] <= metrics["auroc"]["high"]
    key_path = tmp_path / "release.pem"
    release_id = publish_release.main(
        [hub, f"encoder_id={encoder_id}", f"report_id={report_id}", "name=chain", f"signing_key_path={key_path}"]
    )
    release = storage.read_record(hub_uri, release_id, Release)
    release_path = storage.fetch_folder(hub_uri, release, tmp_path / "release")
    verify_release(release_path, read_public_key(tmp_path / "release.pem.pub"))
    encoder = timm.create_model(f"local-dir:{release_path}", pretrained=True, num_classes=0).eval()
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 48)

    assert (
        finetune_generators.main(
            [hub, f"base_id={base_id}", "tuning.num_images_seen=16", "tuning.batch_size=8", "tuning.lora_rank=4"]
        )
        == generator_id
    ), "a finished record is found"
    withdraw_site.main([hub, "site_id=birch"])
    events = [entry.event for entry in hub_ledger.read(hub_uri)]
    assert events.count("accepted") == 3 and events.count("rejected") == 1 and events.count("released") == 1
    ledger.main(["verify", hub])
