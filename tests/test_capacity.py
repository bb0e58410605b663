"""Capacity: closed forms against PyTorch's own counter, and what must hold for every cluster."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gretfound import capacity
from gretfound.capacity import Cluster, Corpus, Generators, Pretraining, Prices, Rates, Stage, Training
from gretfound.encoder.architecture import build_encoder, measure_encoder
from gretfound.encoder.mae import MaskedAutoencoder
from jobs import plan

CLUSTER = Cluster(
    num_gpus=8,
    gpu_tflops=100.0,
    gpu_memory_gib=40.0,
    gpu_network_gbit_per_s=80.0,
    cpus_per_gpu=4.0,
    other_cpus=0.0,
    training_cpus=0.0,
    bucket_gbit_per_s=8.0,
)
RATES = Rates(
    pretrain_gpu_share=0.5,
    generator_gpu_share=0.5,
    cpu_gflops=20.0,
    mae_images_per_cpu_s=100.0,
    dinov2_images_per_cpu_s=20.0,
    intake_images_per_cpu_s=10.0,
    drawn_images_per_cpu_s=100.0,
    signed_images_per_cpu_s=50.0,
    search_s_per_million=60.0,
    probe_s=100.0,
    start_up_s=30.0,
)
PRICES = Prices(gpu_hour=2.0, cpu_hour=0.1, gib_month=0.02, read_gib=0.0, months_kept=2.0)
GENERATORS = Generators(
    num_sites=8, gpus_per_site=1, images_seen=1000, passes=2.0, unet_tflop=0.8, decode_tflop=2.5, encode_tflop=1.1,
    photographs_per_site=100, num_steps=20, guidance_scale=3.0, adapter_mib=1.0,
)  # fmt: skip
TRAINING = Training(forward_flops=40e9, frozen_flops=0.0, recomputed_flops=0.0, num_weights=3e8, num_frozen_weights=0.0)
# By one second of: all 8 GPUs at half their peak, all 32 CPUs, the bucket, each GPU's network.
ONE_SECOND = {"flops": 8 * 50e12, "cpu_s": 32.0, "read_bytes": 1e9, "exchanged_bytes": 1e10}
OF_RESOURCE = {"GPUs": "flops", "CPUs": "cpu_s", "bucket": "read_bytes", "GPU network": "exchanged_bytes"}


def stage_of(serial_s: float = 0.0, **seconds: float) -> Stage:
    """Returns a stage that needs so many seconds of each resource of `CLUSTER`, alone."""
    demand: dict[str, Any] = {name: ONE_SECOND[name] * value for name, value in seconds.items()}
    return Stage(name="stage", num_images=1.0, gpu_share=0.5, serial_s=serial_s, **demand)


def total_s(stage: Stage, cluster: Cluster = CLUSTER) -> float:
    return capacity.predict_stage(stage, cluster, RATES, PRICES).total_s


def counted_flops(objective: torch.nn.Module, **batch: torch.Tensor) -> float:
    """Returns what PyTorch counts in a forward and a backward pass, an image; it knows no fused attention on CPUs."""
    for module in objective.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        objective(**batch).backward()
    return float(counter.get_total_flops()) / len(batch["position"])


@pytest.mark.parametrize(
    ("sizes", "mae"),
    [
        ({"image_size_px": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}, {}),
        ({"image_size_px": 96, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3}, {"mask_ratio": 0.5}),
        ({"image_size_px": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}, {"predicted_share": 0.4}),
    ],
)
def test_masked_autoencoder__agrees_with_pytorchs_counter(sizes: dict[str, int], mae: dict[str, float]) -> None:
    mae = {"mask_ratio": 0.75, "predicted_share": 1.0} | mae
    decoder = {"decoder_width": 64, "decoder_depth": 2}
    objective = MaskedAutoencoder(build_encoder("vit_tiny_patch16_224", **sizes), **mae, **decoder, decoder_num_heads=4)
    image = torch.zeros(2, 3, sizes["image_size_px"], sizes["image_size_px"], dtype=torch.uint8)
    training = capacity.masked_autoencoder(
        measure_encoder("vit_tiny_patch16_224", **sizes), image_size_px=sizes["image_size_px"], **mae, **decoder
    )
    assert training.flops == pytest.approx(counted_flops(objective, image=image, position=torch.arange(2)), rel=0.03)
    trained = sum(each.numel() for each in objective.parameters() if each.requires_grad)
    assert training.num_weights == pytest.approx(trained, rel=0.03)


@pytest.mark.parametrize("shared_head", [True, False])
def test_self_distillation__agrees_with_pytorchs_counter(shared_head: bool) -> None:
    from gretfound.encoder.dinov2 import SelfDistillation

    sizes = {"image_size_px": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    head = {"prototypes": 512, "hidden": 128, "bottleneck": 32, "shared_head": shared_head, "mask_probability": 0.5}
    objective = SelfDistillation(
        build_encoder("vit_tiny_patch16_224", **sizes), num_images=100, frozen_images=0, **head
    )
    crops = {
        "global_crop": torch.zeros(16, 2, 3, 64, 64, dtype=torch.uint8),
        "local_crop": torch.zeros(16, 4, 3, 32, 32, dtype=torch.uint8),
    }
    training = capacity.self_distillation(
        measure_encoder("vit_tiny_patch16_224", **sizes), image_size_px=64, num_local=4, local_size_px=32, **head
    )
    counted = counted_flops(objective, **crops, position=torch.arange(16))
    assert training.flops == pytest.approx(counted, rel=0.05)
    trained = sum(each.numel() for each in objective.parameters() if each.requires_grad)
    assert training.num_weights == pytest.approx(trained, rel=0.03)


def test_masked_autoencoder__vit_large_by_hand() -> None:
    """24 blocks of 12 x 1024^2 weights on 50 tokens, 8 of 12 x 512^2 on 197: 124 GFLOP an image and step."""
    encoder = capacity.Transformer(width=1024, depth=24, patch_px=16, num_prefix_tokens=1, block_weights=12 * 1024**2)
    training = capacity.masked_autoencoder(
        encoder, image_size_px=224, mask_ratio=0.75, predicted_share=1.0, decoder_width=512, decoder_depth=8
    )
    assert encoder.num_weights == pytest.approx(303e6, rel=0.01)
    assert training.flops == pytest.approx(124e9, rel=0.02)


def test_training__recomputing_adds_one_forward_pass_of_the_blocks() -> None:
    encoder = measure_encoder("vit_tiny_patch16_224", image_size_px=224)
    settings: dict[str, Any] = {
        "image_size_px": 224, "mask_ratio": 0.75, "predicted_share": 1.0, "decoder_width": 512, "decoder_depth": 8
    }  # fmt: skip
    kept, recomputed = (
        capacity.masked_autoencoder(encoder, recomputes_activations=is_on, **settings) for is_on in (False, True)
    )
    assert 1.2 < recomputed.flops / kept.flops < 4 / 3


def test_predict_stage__lasts_as_long_as_its_slowest_resource() -> None:
    predicted = capacity.predict_stage(
        stage_of(flops=10.0, cpu_s=30.0, read_bytes=20.0, exchanged_bytes=5.0, serial_s=7.0), CLUSTER, RATES, PRICES
    )
    assert {name: round(value, 6) for name, value in predicted.seconds.items()} == {
        "GPUs": 10, "training CPUs": 0, "CPUs": 30, "bucket": 20, "GPU network": 5
    }  # fmt: skip
    assert (predicted.total_s, predicted.bottleneck) == (37.0, "CPUs")
    assert predicted.cost == pytest.approx(37 / 3600 * 8 * 2.0)


def test_predict_stage__what_blocks_comes_on_top() -> None:
    assert total_s(replace(stage_of(flops=10.0), blocking_bytes=3e9)) == pytest.approx(13.0)


@pytest.mark.parametrize("resource", list(OF_RESOURCE))
def test_predict_stage__more_of_the_bottleneck_never_slows(resource: str) -> None:
    stage = stage_of(serial_s=3.0, **(dict.fromkeys(ONE_SECOND, 40.0) | {OF_RESOURCE[resource]: 100.0}))
    assert capacity.predict_stage(stage, CLUSTER, RATES, PRICES).bottleneck == resource
    taken = [total_s(stage, capacity.grown(CLUSTER, resource, amount)) for amount in (0, 1, 2, 5, 20, 100, 1000)]
    assert taken == sorted(taken, reverse=True) and taken[-1] < taken[0]


def test_predict_stage__twice_of_everything_halves_all_but_the_start() -> None:
    twice = replace(
        CLUSTER,
        num_gpus=2 * CLUSTER.num_gpus,
        bucket_gbit_per_s=2 * CLUSTER.bucket_gbit_per_s,
        gpu_network_gbit_per_s=2 * CLUSTER.gpu_network_gbit_per_s,
    )
    for slowest in ONE_SECOND:
        stage = stage_of(serial_s=3.0, **(dict.fromkeys(ONE_SECOND, 40.0) | {slowest: 100.0}))
        stage = replace(stage, blocking_bytes=5e9)
        assert total_s(stage, twice) - 3 == pytest.approx((total_s(stage) - 3) / 2)


def test_predict_stage__sites_take_turns_on_the_gpus() -> None:
    def of(num_sites: int) -> Stage:
        return replace(stage_of(flops=num_sites / 8), num_runs=num_sites)  # a GPU second for each site

    assert [total_s(of(number)) for number in (1, 8, 9, 16, 17)] == pytest.approx([1, 1, 2, 2, 3])
    assert capacity.advise(of(3), CLUSTER, RATES, PRICES).amount == 0, "five GPUs are idle already"


def test_predict_stage__without_gpus_networks_run_on_cpus_of_their_own() -> None:
    laptop = replace(CLUSTER, num_gpus=0, training_cpus=1.0, other_cpus=1.0)
    stage = Stage(name="stage", num_images=1.0, flops=20e9 * 50, cpu_s=30.0)
    predicted = capacity.predict_stage(stage, laptop, RATES, PRICES)
    assert predicted.bottleneck == "training CPUs" and predicted.total_s == pytest.approx(50.0)
    assert total_s(Stage(name="stage", num_images=1.0, cpu_s=30.0), laptop) == pytest.approx(15.0), "nothing trains"


@pytest.mark.parametrize(
    ("missing", "key"),
    [
        ({"gpu_tflops": 0.0}, "gpu_tflops"),
        ({"cpus_per_gpu": 0.0}, "other_cpus"),
        ({"bucket_gbit_per_s": 0.0}, "bucket_gbit_per_s"),
        ({"gpu_network_gbit_per_s": 0.0}, "gpu_network_gbit_per_s"),
        ({"num_gpus": 0, "other_cpus": 1.0}, "training_cpus"),
    ],
)
def test_predict_stage__needs_what_it_works_on(missing: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        total_s(stage_of(**dict.fromkeys(ONE_SECOND, 1.0)), replace(CLUSTER, **missing))


@pytest.mark.parametrize("resource", list(OF_RESOURCE))
def test_advise__names_the_least_amount_that_moves_the_limit(resource: str) -> None:
    stage = stage_of(**(dict.fromkeys(ONE_SECOND, 40.0) | {OF_RESOURCE[resource]: 100.0}))
    if resource == "GPUs":
        stage = replace(stage, cpu_s=0.0)
    advice = capacity.advise(stage, CLUSTER, RATES, PRICES)
    moved = capacity.predict_stage(stage, capacity.grown(CLUSTER, resource, advice.amount), RATES, PRICES)
    less = capacity.predict_stage(stage, capacity.grown(CLUSTER, resource, advice.amount - 1), RATES, PRICES)
    assert advice.resource == resource == less.bottleneck != moved.bottleneck == advice.next_bottleneck
    assert moved.total_s == advice.total_s and advice.amount == {"GPUs": 13, "CPUs": 48, "bucket": 12}.get(
        resource, 120
    )


def test_advise__nothing_shortens_the_start() -> None:
    advice = capacity.advise(stage_of(flops=1.0, serial_s=10.0), CLUSTER, RATES, PRICES)
    assert (advice.resource, advice.amount) == ("start and end", 0)


def pretraining_of(training: Training, **changed: Any) -> Pretraining:
    settings: dict[str, Any] = {
        "training": training, "encoder_flops": 1e9, "encoder_weights": 1e6, "images_seen": 1000.0, "batch_size": 10,
        "images_per_cpu_s": 100.0, "num_checkpoints": 1, "zero_stage": 1,
    }  # fmt: skip
    return Pretraining(**settings | changed)


def test_pretraining__memory_and_traffic_follow_zeros_stages() -> None:
    training = Training(
        forward_flops=1.0, frozen_flops=0.0, recomputed_flops=0.0, num_weights=1e9, num_frozen_weights=0.0
    )
    held = [pretraining_of(training, zero_stage=stage).gpu_state_bytes(8) for stage in range(4)]
    assert held == pytest.approx([16e9, 9e9, 5.5e9, 2e9])  # 4 bytes: 1 + 1 + 2, then sharded from the right
    sent = [pretraining_of(training, zero_stage=stage).exchanged_bytes for stage in (1, 3)]
    assert sent == pytest.approx([100 * 8e9, 100 * 12e9])


def chain(num_images: int = 1_000_000, synthetic_share: float = 0.5) -> capacity.Prediction:
    corpus = Corpus(
        num_images=num_images, synthetic_share=synthetic_share, synthetic_kib=100.0, real_kib=300.0, num_evaluated=100
    )
    pretraining = pretraining_of(TRAINING, images_seen=float(10 * num_images))
    stages = capacity.stages_of(corpus, GENERATORS, pretraining, RATES)
    return capacity.predict(stages, corpus, GENERATORS, pretraining, cluster=CLUSTER, rates=RATES, prices=PRICES)


def test_predict__units() -> None:
    predicted = chain()
    by_name = {stage.name: stage for stage in predicted.stages}
    assert by_name["synthesize"].seconds["GPUs"] == pytest.approx(500_000 * (20 * 2 * 0.8 + 2.5) / (8 * 50))
    assert by_name["pretrain encoder"].seconds["GPUs"] == pytest.approx(1e7 * 0.12 / (8 * 50))
    assert by_name["pretrain encoder"].seconds["bucket"] == pytest.approx(1e7 * 200 * 1024 / 1e9)
    assert by_name["intake"].seconds["CPUs"] == pytest.approx(500_000 / 10 / 32)
    assert predicted.storage_bytes["photographs"] == pytest.approx(1e6 * 200 * 1024)
    assert predicted.cost["storage"] == pytest.approx(sum(predicted.storage_bytes.values()) / 2**30 * 0.02 * 2)
    assert predicted.total_s == pytest.approx(sum(stage.total_s for stage in predicted.stages))
    assert predicted.cost["machines"] == pytest.approx(predicted.total_s / 3600 * 16)


def test_predict__more_images_take_longer() -> None:
    totals = [chain(number).total_s for number in (10_000, 100_000, 1_000_000)]
    assert totals == sorted(totals)


def test_measured_rates__from_benchmarks_rows() -> None:
    benched = Training(
        forward_flops=1e9, frozen_flops=0.0, recomputed_flops=0.0, num_weights=1.0, num_frozen_weights=0.0
    )
    outcomes: dict[str, tuple[float, dict[str, float]]] = {
        "ingest": (4.0, {"gretfound.ingest, disk": 400.0, "webdataset": 9.0}),
        "pretrain": (2.0, {"gretfound.fit.train, float32": 10.0, "gretfound.fit.train, bfloat16": 20.0}),
    }
    found = capacity.measured_rates(outcomes, benched=benched, precision="bfloat16")
    assert found == pytest.approx({"mae_images_per_cpu_s": 100.0, "cpu_gflops": 30.0})
    given = outcomes | {"plan": (1.0, {"rates.cpu_gflops": 5.0, "rates.unknown": 1.0})}
    assert capacity.measured_rates(given, benched=benched, precision="float32")["cpu_gflops"] == 5.0
    assert capacity.measured_rates({}, benched=benched, precision="float32") == {}


@pytest.mark.parametrize(
    ("group", "consumer"),
    [
        (plan.ClusterConfig, Cluster),
        (plan.RatesConfig, Rates),
        (plan.PricesConfig, Prices),
        (plan.GeneratorsConfig, Generators),
    ],
)
def test_groups__fields_are_those_of_their_consumer(group: type, consumer: type) -> None:
    assert [each.name for each in fields(group)] == [each.name for each in fields(consumer)]
