"""Planning: a plan says what was measured and what to add, once for each stage that matters."""

from dataclasses import replace

import pytest

from gretfound import planning
from gretfound.capacity import Cluster, Corpus
from gretfound.planning import Plan
from tests.test_capacity import CLUSTER, GENERATORS, PRICES, RATES, TRAINING, pretraining_of


def plan_of(cluster: Cluster = CLUSTER) -> Plan:
    corpus = Corpus(num_images=1_000_000, synthetic_share=0.5, synthetic_kib=100.0, real_kib=300.0, num_evaluated=100)
    return planning.make_plan(
        corpus, GENERATORS, pretraining_of(TRAINING, images_seen=1e7), cluster=cluster, rates=RATES,
        sources={"cpu_gflops": "runs/bench"}, prices=PRICES,
    )  # fmt: skip


def test_make_plan__share_of_a_gpus_memory() -> None:
    assert plan_of().gpu_memory_share == pytest.approx(0.3 * 9e9 / (40 * 2**30))  # ZeRO 1: 4 bytes, 1 + 1 + 2 / 8
    laptop = replace(CLUSTER, num_gpus=0, other_cpus=1.0, training_cpus=1.0)
    assert plan_of(laptop).gpu_memory_share == 0.0 and "GPU memory" not in planning.tell(plan_of(laptop))


def test_tell__each_long_stage_once_the_longest_first() -> None:
    plan = plan_of()
    told = planning.tell(plan)
    advised = [line.removeprefix("- ").partition(":")[0] for line in told.splitlines() if line.startswith("- ")]
    long = [stage for stage in plan.prediction.stages if stage.total_s >= plan.prediction.total_s / 50]
    assert 0 < len(long) < len(plan.prediction.stages)
    assert advised == [stage.name for stage in sorted(long, key=lambda stage: -stage.total_s)]
    for stage in plan.prediction.stages:
        assert any(line.startswith(f"{stage.name} ") for line in told.splitlines()), "the table has every stage"
    assert "measured: cpu_gflops (runs/bench)\n" in told
    assumed = next(line for line in told.splitlines() if line.startswith("assumed: "))
    assert "pretrain_gpu_share" in assumed and "cpu_gflops" not in assumed


def test_to_json__hours_are_those_of_the_prediction() -> None:
    plan = plan_of()
    content = planning.to_json(plan)
    assert content["total_h"] == pytest.approx(sum(stage["hours"] for stage in content["stages"]))
    assert [each["stage"] for each in content["advice"]] == [stage["name"] for stage in content["stages"]]
    assert content["measured"] == {"cpu_gflops": "runs/bench"}
