"""Planning as a job: layers load, faults are named, measured rates replace assumed ones, the last line is stable."""

import json
from pathlib import Path
from typing import Any

import pytest

from gretfound import storage
from gretfound.config import load, to_yaml
from gretfound.errors import ConfigError
from jobs import plan, pretrain_encoder
from jobs.recipe import training_of

SMALL = ["conf/pretrain/demo.yaml", "conf/plan/laptop.yaml"]


def predicted(argv: list[str], folder: Path) -> dict[str, Any]:
    uri = plan.main([*argv, f"out_uri={folder}/plan.json"])
    assert uri == storage.normalised(f"{folder}/plan.json")
    answer: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return answer


def hours_of(answer: dict[str, Any], name: str = "pretrain encoder") -> float:
    return float(next(stage["hours"] for stage in answer["stages"] if stage["name"] == name))


def test_main__hub_of_8_gpus_at_100_million_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["conf/pretrain/retfound_mae.yaml", "conf/plan/hub_8_gpus.yaml"]
    answer = predicted([*layers, "num_images=100_000_000"], tmp_path)
    told = capsys.readouterr().out
    assert [stage["name"] for stage in answer["stages"]] == [
        "intake", "fine-tune generators", "synthesize", "assemble corpus", "pretrain encoder", "evaluate encoder",
        "publish release",
    ]  # fmt: skip
    assert answer["settings"]["num_images"] == 100_000_000
    assert answer["total_h"] == pytest.approx(sum(stage["hours"] for stage in answer["stages"]))
    for word in ("synthesize", "bucket", "GPU network", "storage:", "cost:", "limited by", "Add ", "assumed:"):
        assert word in told, word
    assert hours_of(predicted([*layers, "num_images=1_000_000"], tmp_path)) == pytest.approx(hours_of(answer)), (
        "the recipe says how many images are seen"
    )
    seven = predicted([*layers, "num_images=100_000_000", "num_epochs=7.23336"], tmp_path)
    assert hours_of(seven) == pytest.approx(hours_of(answer))


def test_main__many_gpus_wait_for_their_network(tmp_path: Path) -> None:
    answer = predicted(["conf/pretrain/retfound_mae.yaml", "conf/plan/hub_256_gpus.yaml"], tmp_path)
    limits = {stage["name"]: stage["bottleneck"] for stage in answer["stages"]}
    assert limits["pretrain encoder"] == "GPU network"


def test_main__self_distillation(tmp_path: Path) -> None:
    answer = predicted(["conf/pretrain/dinov2_vitl14.yaml", "conf/plan/hub_8_gpus.yaml"], tmp_path)
    assert hours_of(answer) > 0 and answer["rates"]["dinov2_images_per_cpu_s"] == 25


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("cluster.bucket_gbit_per_s=0", "cluster.bucket_gbit_per_s"),
        ("cluster.gpu_network_gbit_per_s=0", "cluster.gpu_network_gbit_per_s"),
        ("cluster.gpu_tflops=0", "cluster.gpu_tflops"),
        ("cluster.cpus_per_gpu=0", "cluster.other_cpus"),
        ("cluster.num_gpus=0", "cluster.training_cpus"),
        ("cluster.training_cpus=4", "cluster.num_gpus"),
        ("rates.signed_images_per_cpu_s=0", "rates.signed_images_per_cpu_s"),
        ("rates.pretrain_gpu_share=1.2", "rates.pretrain_gpu_share"),
        ("prices.gpu_hour=-1", "prices.gpu_hour"),
        ("num_images=0", "num_images"),
        ("synthetic_share=2", "synthetic_share"),
        ("objective=simclr", "objective"),
    ],
)
def test_load__names_the_key_that_is_wrong(setting: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(plan.Config, ["conf/plan/hub_8_gpus.yaml", setting])


def test_load__a_machine_without_gpus_needs_a_rate() -> None:
    with pytest.raises(ConfigError, match=r"rates\.cpu_gflops"):
        load(plan.Config, ["conf/plan/laptop.yaml", "rates.cpu_gflops=0"])


def test_main__benchmarks_replace_assumed_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = tmp_path / "bench"
    bench.mkdir()
    outcome = {
        "name": "ingest",
        "machine": {"cpus": 4},
        "rows": [{"name": "gretfound.ingest, disk", "value": 1000.0, "unit": "images/s"}],
        "ratios": [],
    }
    (bench / "ingest.json").write_text(json.dumps(outcome))
    answer = predicted([*SMALL, f"rates_uri={bench}"], tmp_path)
    assert answer["rates"]["mae_images_per_cpu_s"] == 250.0
    assert list(answer["measured"]) == ["mae_images_per_cpu_s"]
    assert f"measured: mae_images_per_cpu_s ({bench})" in capsys.readouterr().out
    del outcome["machine"]
    (bench / "ingest.json").write_text(json.dumps(outcome))
    with pytest.raises(ConfigError, match="how many CPUs"):
        plan.main([*SMALL, f"rates_uri={bench}", f"out_uri={tmp_path}/plan.json"])
    with pytest.raises(ConfigError, match="make bench"):
        plan.main([*SMALL, f"rates_uri={tmp_path}/nothing", f"out_uri={tmp_path}/plan.json"])


def test_main__a_run_replaces_the_assumed_pace(tmp_path: Path) -> None:
    """A run that reached 100 images a second and waited for data half of the time could do 200."""
    run_uri = storage.normalised(str(tmp_path / "run"))
    run = load(
        pretrain_encoder.Config, ["conf/pretrain/demo.yaml", "conf/scale/laptop.yaml", "hub_uri=x", "corpus_id=x"]
    )
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(run).encode())
    with pytest.raises(ConfigError, match="no metrics"):
        predicted([*SMALL, f"run_uri={run_uri}"], tmp_path)
    line = {"images_seen": 64, "images_per_s": 100.0, "data_wait_share": 0.5}
    storage.write_bytes(storage.join(run_uri, "metrics", "000000.jsonl"), json.dumps(line).encode() + b"\n")
    answer = predicted([*SMALL, f"run_uri={run_uri}"], tmp_path)
    training = training_of(run)
    assert answer["rates"]["cpu_gflops"] == pytest.approx(200 * training.flops / 1e9)
    seconds = next(stage["seconds"] for stage in answer["stages"] if stage["name"] == "pretrain encoder")
    assert seconds["training CPUs"] == pytest.approx(9600 / 200)
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        predicted(["conf/plan/hub_8_gpus.yaml", f"run_uri={run_uri}"], tmp_path)
