"""Planning: rates from what benchmarks and runs measured, and a prediction of `capacity` with what to add, in words.

`jobs.plan` describes the chain and the cluster; the arithmetic is in `capacity`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gretfound import capacity, storage, tracking
from gretfound.capacity import Advice, Cluster, Corpus, Generators, Prediction, Pretraining, Prices, Rates, Training
from gretfound.encoder.architecture import measure_encoder
from gretfound.errors import ConfigError

UNITS = {"GPUs": "GPUs", "training CPUs": "training CPUs", "CPUs": "CPUs", "bucket": "Gbit/s to the bucket",
         "GPU network": "Gbit/s between GPUs"}  # fmt: skip
# The encoder of `tests.bench pretrain`.
BENCHED_ENCODER: dict[str, Any] = {"architecture": "vit_base_patch16_224", "image_size_px": 224}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prediction, what it rests on, and what to add.

    Args:
        prediction: Of the whole chain.
        advice: For each of its stages.
        cluster: What there is.
        rates: Measured and assumed ones.
        sources: By name of a measured rate, where it was measured.
        gpu_memory_share: Share of a GPU's memory that weights, gradients and averages take; 0 without GPUs.
    """

    prediction: Prediction
    advice: tuple[Advice, ...]
    cluster: Cluster
    rates: Rates
    sources: Mapping[str, str]
    gpu_memory_share: float


def make_plan(
    corpus: Corpus,
    generators: Generators,
    pretraining: Pretraining,
    *,
    cluster: Cluster,
    rates: Rates,
    sources: Mapping[str, str],
    prices: Prices,
) -> Plan:
    """Predicts the chain and finds what to add for each stage; ``sources`` are those of `Plan`."""
    stages = capacity.stages_of(corpus, generators, pretraining, rates)
    memory_bytes = cluster.gpu_memory_gib * capacity.GIB
    return Plan(
        prediction=capacity.predict(
            stages, corpus, generators, pretraining, cluster=cluster, rates=rates, prices=prices
        ),
        advice=tuple(capacity.advise(stage, cluster, rates, prices) for stage in stages),
        cluster=cluster,
        rates=rates,
        sources=sources,
        gpu_memory_share=pretraining.gpu_state_bytes(cluster.num_gpus) / memory_bytes if cluster.num_gpus else 0.0,
    )


def read_benchmarks(rates_uri: str, *, precision: str) -> dict[str, float]:
    """Reads the rates that the outcomes of `make bench` give.

    Args:
        rates_uri: Their folder.
        precision: ``float32`` or ``bfloat16``: in which pretraining will be.

    Returns:
        Fields of `capacity.Rates`, as far as they were measured.

    Raises:
        ConfigError: If there is none, or an outcome does not say on how many CPUs it was measured.
    """
    outcomes = {}
    for uri in storage.list_uris(storage.normalised(rates_uri)):
        if uri.endswith(".json"):
            outcome = storage.read_json(uri)
            cpus = outcome.get("machine", {}).get("cpus")
            if cpus is None:
                raise ConfigError(f"rates_uri: {uri} does not say on how many CPUs it was measured; run it again")
            outcomes[outcome["name"]] = (cpus, {row["name"]: row["value"] for row in outcome["rows"]})
    benched = capacity.masked_autoencoder(
        measure_encoder(**BENCHED_ENCODER), image_size_px=224, mask_ratio=0.75, predicted_share=1.0,
        decoder_width=512, decoder_depth=8,
    )  # fmt: skip
    found = capacity.measured_rates(outcomes, benched=benched, precision=precision)
    if not found:
        raise ConfigError(f"rates_uri={rates_uri} holds no benchmark with a rate; run `make bench` first")
    return found


def read_pace(run_uri: str, *, training: Training, num_units: float) -> float:
    """Reads the operations a second that a pretraining run reached, of one unit, while it did not wait for data.

    Args:
        run_uri: The run's folder in the hub.
        training: What the run computes for an image.
        num_units: GPUs that it had, or without any the CPUs that trained.

    Raises:
        ConfigError: If the run has no metrics yet.
    """
    metrics = tracking.read_metrics(storage.normalised(run_uri))
    if not metrics:
        raise ConfigError(f"run_uri={run_uri} has no metrics yet; let the run go on for some minutes")
    return capacity.flops_per_s_of(
        images_per_s=metrics[-1]["images_per_s"],
        data_wait_share=metrics[-1]["data_wait_share"],
        training=training,
        num_workers=num_units,
    )


def tell(plan: Plan) -> str:
    """Returns the plan as text: the table, storage and cost, which rates were measured, and what to add."""
    prediction, sources = plan.prediction, plan.sources
    gib = {name: size / capacity.GIB for name, size in prediction.storage_bytes.items()}
    lines = [
        _table(prediction),
        "",
        f"storage: {sum(gib.values()):,.0f} GiB: " + ", ".join(f"{name} {size:,.1f}" for name, size in gib.items()),
        f"cost: {prediction.total_cost:,.0f}: "
        + ", ".join(f"{name} {amount:,.0f}" for name, amount in prediction.cost.items()),
    ]
    if plan.cluster.num_gpus:
        fits = "activations come on top" if plan.gpu_memory_share < 1 else "it does not fit: raise fit.zero_stage"
        share = f"{plan.gpu_memory_share:.0%} for weights, gradients and AdamW's averages"
        lines.append(f"GPU memory: {share}; {fits}")
    lines += [
        f"measured: {', '.join(f'{name} ({source})' for name, source in sources.items()) or 'nothing'}",
        f"assumed: {', '.join(name for name in asdict(plan.rates) if name not in sources)}",
        "",
        *(f"- {each}" for each in _sentences(prediction, plan.advice, plan.cluster)),
        "",
    ]
    return "\n".join(lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON-able values; hours beside seconds."""
    prediction = plan.prediction
    return {
        "total_h": prediction.total_s / 3600,
        "total_cost": prediction.total_cost,
        "gpu_memory_share": plan.gpu_memory_share,
        "stages": [
            asdict(stage) | {"hours": stage.total_s / 3600, "bottleneck": stage.bottleneck}
            for stage in prediction.stages
        ],
        "advice": [asdict(each) for each in plan.advice],
        "storage_bytes": dict(prediction.storage_bytes),
        "cost": dict(prediction.cost),
        "rates": asdict(plan.rates),
        "measured": dict(plan.sources),
    }


def _table(prediction: Prediction) -> str:
    """Returns the stages as text: hours, the limit, the share of the time that each resource works, and cost."""
    shown = [name for name in capacity.RESOURCES if any(each.seconds[name] for each in prediction.stages)]
    head = f"{'stage':<22}{'images':>15}{'hours':>10}  {'limit':<14}" + "".join(f"{name:>15}" for name in shown)
    lines = [head + f"{'cost':>12}", "-" * (len(head) + 12)]
    for stage in prediction.stages:
        shares = "".join(f"{stage.seconds[name] / max(stage.total_s, 1e-9):>15.0%}" for name in shown)
        lines.append(
            f"{stage.name:<22}{stage.num_images:>15,.0f}{_hours(stage.total_s):>10}  {stage.bottleneck:<14}{shares}"
            f"{stage.cost:>12,.0f}"
        )
    total = f"{'all':<22}{'':>15}{_hours(prediction.total_s):>10}  {'':<14}{'':>{15 * len(shown)}}"
    return "\n".join([*lines, total + f"{prediction.cost['machines']:>12,.0f}"])


def _sentences(prediction: Prediction, advice: Sequence[Advice], cluster: Cluster) -> list[str]:
    """Says what to add, for each stage that takes a fiftieth of the time or more, the longest first."""
    told = []
    pairs = zip(prediction.stages, advice, strict=True)
    for stage, each in sorted(pairs, key=lambda pair: -pair[0].total_s):
        if stage.total_s < prediction.total_s / 50:
            continue
        start = f"{stage.name}: {_hours(stage.total_s)} h, limited by {each.resource}"
        if each.resource == "start and end":
            told.append(f"{start}, which no resource shortens")
            continue
        if each.doubled_s < stage.total_s:
            start += f". With twice as many {UNITS[each.resource]}: {_hours(each.doubled_s)} h"
        if not each.amount:
            told.append(f"{start}; no number of them moves the limit")
            continue
        unit = UNITS[each.resource] + (f" (with {cluster.cpus_per_gpu:g} CPUs each)" if each.resource == "GPUs" else "")
        limit = f"{each.next_bottleneck} {'are' if each.next_bottleneck.endswith('s') else 'is'}"
        if each.next_bottleneck == "start and end":
            limit = "only start and end are"
        larger = ", or take larger steps (fit.batch_size: another recipe)" if each.resource == "GPU network" else ""
        told.append(
            f"{start}. Add {each.amount:,} {unit}: then {limit} the limit and it takes {_hours(each.total_s)} h{larger}"
        )
    return told


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2f}"
