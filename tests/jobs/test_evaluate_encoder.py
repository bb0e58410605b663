import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from gretfound import config, fundus, metadata, phantom, shard, storage
from gretfound.encoder import folder, mae
from gretfound.encoder.transform import Transform
from gretfound.errors import ConfigError, LineageError
from gretfound.lineage import Corpus, Encoder, Report, ShardSet
from jobs import evaluate_encoder, pretrain_encoder, recipe
from tests.hubs import assemble

SIZE_PX = 48


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a corpus of two sites and a tiny encoder, an evaluation folder and a second labelled folder."""
    root = tmp_path_factory.mktemp("evaluate")
    hub_uri = f"file://{root}/hub"
    shard_sets = []
    for site_id, origin in (("aster", "real"), ("aster", "synthetic"), ("birch", "synthetic")):
        rows = [
            shard.row_of(
                fundus.encode_jpeg(phantom.draw_eye(phantom.SITES[site_id], seed=seed, size_px=SIZE_PX).image),
                site_id=site_id,
                origin=origin,
                cells={"sex": "female"} if origin == "real" else {},
                prompt=None if origin == "real" else f"drawn for {site_id}",
            )
            for seed in range(4)
        ]
        record = ShardSet(
            site_id=site_id, origin=origin, num_images=4, shards=(shard.write_shard(hub_uri, rows),), rejected={}
        )
        storage.write_record(hub_uri, record)
        shard_sets.append(record)
    corpus_record = assemble(hub_uri, *shard_sets)
    settings = ["encoder.architecture=vit_tiny_patch16_224", f"encoder.image_size_px={SIZE_PX}", "encoder.depth=2"]
    settings += ["encoder.embed_dim=48", "mae.decoder_width=32", "mae.decoder_depth=1", "mae.decoder_num_heads=2"]
    pretraining = config.load(
        pretrain_encoder.Config, [f"hub_uri={hub_uri}", f"corpus_id={corpus_record.id}", *settings]
    )
    objective = recipe.build_objective(pretraining, seed=pretraining.seed)
    path = folder.write_encoder_folder(
        objective.encoder,
        root / "encoder",
        architecture="vit_tiny_patch16_224",
        transform=Transform(image_size_px=SIZE_PX),
    )
    save_file(objective.state_dict(), path / mae.AUTOENCODER_NAME)
    (path / "config.yaml").write_text(config.to_yaml(pretraining))
    encoder = storage.publish_folder(
        hub_uri,
        path,
        Encoder(
            parents=(corpus_record.id,),
            recipe_id="pretrain_encoder-0",
            architecture="vit_tiny_patch16_224",
            objective="mae",
            image_size_px=SIZE_PX,
            images_seen=96,
            final_loss=0.9,
        ),
    )
    metrics_uri = storage.join(storage.run_uri(hub_uri, "pretrain_encoder-0"), "metrics", "000000.jsonl")
    lines = [json.dumps({"images_seen": seen, "loss": 1.0 / seen}) for seen in (32, 64, 96)]
    storage.write_bytes(metrics_uri, "\n".join(lines).encode())
    for name, seed in (("dune", 5), ("cedar", 6)):
        phantom.write_site(phantom.SITES[name], root / name, num_images=40, seed=seed, size_px=64)
    first = sorted((root / "dune" / "traindata").iterdir())
    first[0].write_bytes(b"no photograph")
    first[1].unlink()
    return root, hub_uri, encoder


def arguments(hub, *more):
    _, hub_uri, encoder = hub
    return [f"hub_uri={hub_uri}", f"encoder_id={encoder.id}", "num_bootstraps=100", "num_pictures=2", *more]


def test_main__report_of_a_tiny_encoder(hub, ray_cluster, tmp_path):
    root, hub_uri, encoder = hub
    given = arguments(hub, f"evaluation_uris=[{root}/dune]", "num_folds=3", "min_patients_per_class=3")
    report_id = evaluate_encoder.main(given)
    record = storage.read_record(hub_uri, report_id, Report)
    assert record.parents == (encoder.id,) and record.num_images == 38
    path = storage.fetch_folder(hub_uri, record, tmp_path)
    content = json.loads((path / "report.json").read_text())
    # Columns that a phantom site fills and that hold both classes; a tiny site need not support every one.
    assert "any_dr" in content["encoders"]["pretrained"]
    faults = content["evaluation_sets"]["dune"]["unreadable"]
    assert len(faults) == 2 and all(set(fault) == {"row", "reason"} for fault in faults)
    assert any(fault["reason"].startswith("MISSING") for fault in faults)
    assert [entry["kind"] for entry in content["lineage"]["records"]] == ["encoder", "corpus", *["shards"] * 3]
    page = (path / "report.html").read_text()
    # 2 triples; aster: 2 real and 2 synthetic; birch: 2 synthetic and no real.
    assert page.count("data:image/jpeg;base64,") == 12
    assert "stay at the site" in page and "drawn for birch" in page and "images seen" in page
    assert evaluate_encoder.main(given) == report_id


def test_main__features_do_not_depend_on_workers_and_batches(hub, ray_cluster):
    root, hub_uri, _ = hub
    tables = []
    for number, more in enumerate((["batch_size=7", "num_workers=2"], ["batch_size=64"])):
        extra = ["num_folds=3", "min_patients_per_class=3", f"num_bootstraps={100 + number}"]
        report_id = evaluate_encoder.main(arguments(hub, f"evaluation_uris=[{root}/dune]", *extra, *more))
        uri = storage.join(hub_uri, "reports", report_id, "predictions.parquet")
        tables.append(pq.read_table(storage.local_path(uri)).to_pandas())
    assert tables[0].drop(columns="score").equals(tables[1].drop(columns="score"))
    assert np.stack(tables[0].score[tables[0].task == "any_dr"]) == pytest.approx(
        np.stack(tables[1].score[tables[1].task == "any_dr"]), abs=1e-3
    )


def test_main__external_set_and_two_sets(hub, ray_cluster):
    root, hub_uri, _ = hub
    given = arguments(hub, f"evaluation_uris=[{root}/dune]", f"fitted_on_uri={root}/cedar", "num_folds=3")
    given.append("pooling=mean_and_deviation")
    report_id = evaluate_encoder.main([*given, "min_patients_per_class=2"])
    content = storage.read_json(storage.join(hub_uri, "reports", report_id, "report.json"))
    assert {"dune/any_dr", "cedar->dune/any_dr"} <= set(content["tasks"])
    assert content["tasks"]["cedar->dune/any_dr"]["num_images_fitted_on"] == 40
    assert "standard deviation" in content["protocol"]["features"]
    assert content["evaluation_sets"]["cedar"]["role"] == "probes are fitted on it"


def test_main__photograph_of_the_corpus_is_refused(hub, ray_cluster, tmp_path):
    _, hub_uri, encoder = hub
    path = phantom.write_site(phantom.SITES["cedar"], tmp_path / "leaky", num_images=4, seed=1, size_px=SIZE_PX)
    corpus_record = storage.read_record(hub_uri, encoder.parents[0], Corpus)
    shard_set = storage.read_record(hub_uri, corpus_record.parents[0], ShardSet)
    held = next(shard.read_rows(storage.join(hub_uri, shard_set.shards[0].path)))
    table = metadata.read_metadata(path / "metadata.csv")
    (path / "traindata" / table.rows[2].image).write_bytes(held["image"])
    with pytest.raises(LineageError, match=rf"evaluation image {held['image_id']} is in shards/parts/.* of corpus-"):
        evaluate_encoder.main(arguments(hub, f"evaluation_uris=[{path}]"))
    names = storage.list_names(storage.join(hub_uri, "evaluation"))
    assert not any(name.startswith("leaky") for name in names), "what was refused is no evaluation set"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=tpu", "neither cpu nor cuda"),
        ("pooling=max", "neither mean nor mean_and_deviation"),
        ("num_folds=1", "at least 2"),
        ("num_bootstraps=10", "100 or more"),
        ("evaluation_uris=[]", "different names"),
        ("fitted_on_uri=other/dune", "different names"),
    ],
)
def test_config__combination_is_checked(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(evaluate_encoder.Config, ["hub_uri=h", "encoder_id=e", "evaluation_uris=[a/dune]", override])
