"""Cluster and recipe -> prediction: hours, limits, storage and cost of the whole chain, and which resource to add.

    python -m jobs.plan conf/pretrain/retfound_mae.yaml conf/plan/hub_8_gpus.yaml num_images=100_000_000
    python -m jobs.plan conf/plan/laptop.yaml rates_uri=runs/bench
    python -m jobs.plan conf/plan/hub_8_gpus.yaml run_uri=s3://BUCKET/hub/runs/RECIPE

A layer of jobs.pretrain_encoder gives the recipe, one below conf/plan the cluster, its rates and prices. Rates are
assumed until rates_uri (outcomes of `make bench` on the machine that decodes) or run_uri (a short run of
jobs.pretrain_encoder on one of the GPUs) replace them by measured ones. The model is in docs/planning.md. Prints a
table and what to add; writes the prediction as JSON, and prints its place as the last line.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gretfound import capacity
from gretfound.capacity import Advice, Prediction, Rates, Training
from gretfound.config import canonical, load, setting
from gretfound.errors import ConfigError
from jobs import console
from jobs.pretrain_encoder import Config as PretrainConfig
from jobs.recipe import CropConfig, DINOv2Config, EncoderConfig, FitConfig, MAEConfig

UNITS = {"GPUs": "GPUs", "training CPUs": "training CPUs", "CPUs": "CPUs", "bucket": "Gbit/s to the bucket",
         "GPU network": "Gbit/s between GPUs"}  # fmt: skip
BENCHED_ENCODER: dict[str, Any] = {
    "architecture": "vit_base_patch16_224",
    "image_size_px": 224,
}  # that of `tests.bench pretrain`


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster; conf/plan has examples."""

    num_gpus: int = setting(8, "GPUs; 0 trains and draws on training_cpus")
    gpu_tflops: float = setting(989.0, "published dense peak of one GPU in the recipe's precision, TFLOP/s")
    gpu_memory_gib: float = setting(80.0, "memory of one GPU, GiB")
    gpu_network_gbit_per_s: float = setting(400.0, "what a GPU can send to others, each way, Gbit/s")
    cpus_per_gpu: float = setting(12.0, "CPUs that come with each GPU and are free for decoding")
    other_cpus: float = setting(0.0, "CPUs of machines without GPUs, for decoding")
    training_cpus: float = setting(0.0, "CPUs that networks run on; only with num_gpus=0")
    bucket_gbit_per_s: float = setting(25.0, "to and from the bucket, all machines together, Gbit/s")


@dataclass(frozen=True)
class RatesConfig:
    """How fast one unit of each resource works; assumed where docs/planning.md doesn't say measured."""

    pretrain_gpu_share: float = setting(0.25, "share of the GPUs' peak that pretraining reaches, 0 to 1")
    generator_gpu_share: float = setting(0.3, "the same for fine-tuning and sampling generators")
    cpu_gflops: float = setting(0.0, "what a training CPU reaches, GFLOP/s")
    mae_images_per_cpu_s: float = setting(150.0, "photographs a CPU second decoded and cropped for mae")
    dinov2_images_per_cpu_s: float = setting(25.0, "photographs a CPU second decoded and cropped for dinov2")
    intake_images_per_cpu_s: float = setting(10.0, "photographs a CPU second verified and made anew")
    drawn_images_per_cpu_s: float = setting(35.0, "drawn photographs a CPU second screened and encoded")
    signed_images_per_cpu_s: float = setting(300.0, "photographs a CPU second hashed for the corpus")
    search_s_per_million: float = setting(25.0, "seconds a million images of one process that plans the corpus")
    probe_s: float = setting(3600.0, "seconds of probes, intervals and the report page")
    start_up_s: float = setting(300.0, "seconds from a job's command to its first image, nodes included")


@dataclass(frozen=True)
class PricesConfig:
    """Prices in one currency; replace them by your own."""

    gpu_hour: float = setting(3.0, "a GPU with its CPUs, an hour")
    cpu_hour: float = setting(0.05, "another CPU, an hour")
    gib_month: float = setting(0.023, "a GiB in the bucket, a month")
    read_gib: float = setting(0.0, "a GiB read from the bucket; 0 within its region")
    months_kept: float = setting(12.0, "months for which the hub keeps everything")


@dataclass(frozen=True)
class GeneratorsConfig:
    """Fine-tuning and sampling; the operations are counted on Stable Diffusion 1.5 at 512 px."""

    num_sites: int = setting(100, "generators to fine-tune at the hub")
    gpus_per_site: int = setting(1, "GPUs of each site's run")
    images_seen: int = setting(960_000, "photographs that each run sees, repeats counted")
    passes: float = setting(2.0, "forward passes that a step is worth: 2 for low-rank factors, 3 for all weights")
    unet_tflop: float = setting(0.803, "TFLOP of the denoiser, a photograph and step")
    decode_tflop: float = setting(2.515, "TFLOP of decoding one photograph")
    encode_tflop: float = setting(1.117, "TFLOP of encoding one photograph")
    photographs_per_site: int = setting(10_000, "photographs of a site")
    num_steps: int = setting(20, "steps of the solver when drawing")
    guidance_scale: float = setting(3.0, "weight of the caption; 1 halves the work")
    adapter_mib: float = setting(100.0, "size of a generator's adapter, MiB")


@dataclass(frozen=True)
class Config:
    """What `plan` reads; objective, encoder, mae, dinov2, crops and fit are those of a pretraining recipe."""

    num_images: int = setting(100_000_000, "photographs in the corpus")
    num_epochs: float | None = setting(None, "times that pretraining sees each; null: fit.num_images, as the recipe")
    synthetic_share: float = setting(0.9, "share of the photographs that the hub draws, 0 to 1; the others arrive")
    synthetic_kib: float = setting(90.0, "mean size of a drawn photograph, KiB")
    real_kib: float = setting(400.0, "mean size of a photograph that arrives, KiB")
    num_evaluated: int = setting(20_000, "photographs of all evaluation sets")
    rates_uri: str = setting("", "folder of benchmark outcomes (runs/bench) whose rates replace those of `rates`")
    run_uri: str = setting("", "HUB/runs/RECIPE of a pretraining run whose pace replaces the one in `rates`")
    out_uri: str = setting("runs/plan.json", "where the prediction is written")
    objective: str = setting("mae", "mae: masked autoencoder; dinov2: self-distillation")
    encoder: EncoderConfig = setting(EncoderConfig())
    mae: MAEConfig = setting(MAEConfig())
    dinov2: DINOv2Config = setting(DINOv2Config())
    crops: CropConfig = setting(CropConfig())
    fit: FitConfig = setting(FitConfig())
    generators: GeneratorsConfig = setting(GeneratorsConfig())
    cluster: ClusterConfig = setting(ClusterConfig())
    rates: RatesConfig = setting(RatesConfig())
    prices: PricesConfig = setting(PricesConfig())

    @property
    def images_seen(self) -> float:
        """The images that pretraining sees, repeats counted."""
        return self.fit.num_images if self.num_epochs is None else self.num_images * self.num_epochs

    def __post_init__(self) -> None:
        """Checks that nothing is zero that the chain needs."""
        cluster, rates = self.cluster, self.rates
        if self.objective not in ("mae", "dinov2"):
            raise ConfigError(f"objective={self.objective!r} is neither mae nor dinov2")
        if cluster.num_gpus and cluster.training_cpus:
            raise ConfigError(
                f"cluster.training_cpus={cluster.training_cpus:g} is for clusters without GPUs; "
                f"found cluster.num_gpus={cluster.num_gpus}"
            )
        needed: dict[str, float] = {
            "num_images": self.num_images,
            "num_epochs": 1 if self.num_epochs is None else self.num_epochs,
            "synthetic_kib": self.synthetic_kib,
            "real_kib": self.real_kib,
            "fit.num_images": self.fit.num_images,
            "fit.batch_size": self.fit.batch_size,
            "generators.gpus_per_site": self.generators.gpus_per_site,
            "cluster.num_gpus or cluster.training_cpus": max(cluster.num_gpus, cluster.training_cpus),
            "cluster.bucket_gbit_per_s": cluster.bucket_gbit_per_s,
            "cluster.cpus_per_gpu or cluster.other_cpus": cluster.num_gpus * cluster.cpus_per_gpu + cluster.other_cpus,
            **{f"rates.{name}": value for name, value in asdict(rates).items() if name.endswith("_per_cpu_s")},
        }
        if cluster.num_gpus:
            needed |= {
                "cluster.gpu_tflops": cluster.gpu_tflops,
                "cluster.gpu_memory_gib": cluster.gpu_memory_gib,
                "cluster.gpu_network_gbit_per_s": cluster.gpu_network_gbit_per_s,
                "rates.pretrain_gpu_share": rates.pretrain_gpu_share,
                "rates.generator_gpu_share": rates.generator_gpu_share,
            }
        elif not (self.rates_uri or self.run_uri):
            needed["rates.cpu_gflops"] = rates.cpu_gflops
        at_least_zero = {
            f"{group}.{name}": value
            for group in ("cluster", "rates", "prices", "generators")
            for name, value in asdict(getattr(self, group)).items()
        } | {"num_evaluated": self.num_evaluated}
        faults = [f"{key}={value:g}; required more than 0" for key, value in needed.items() if value <= 0]
        faults += [
            f"{key}={value:g}; required 0 or more"
            for key, value in at_least_zero.items()
            if value < 0 and key not in needed
        ]
        shares = {
            "synthetic_share": self.synthetic_share,
            "rates.pretrain_gpu_share": rates.pretrain_gpu_share,
            "rates.generator_gpu_share": rates.generator_gpu_share,
        }
        faults += [f"{key}={value:g}; required at most 1" for key, value in shares.items() if value > 1]
        if self.synthetic_share < 0:
            faults.append(f"synthetic_share={self.synthetic_share:g}; required 0 or more")
        if faults:
            raise ConfigError("found " + ", found ".join(faults))


def training_of(recipe: "Config | PretrainConfig") -> Training:
    """Counts the operations and weights of a recipe's objective."""
    from gretfound.encoder.architecture import measure_encoder

    encoder = measure_encoder(**asdict(recipe.encoder))
    shared: dict[str, Any] = {
        "image_size_px": recipe.encoder.image_size_px,
        "recomputes_activations": recipe.fit.recomputes_activations,
    }
    if recipe.objective == "mae":
        mae = recipe.mae
        return capacity.masked_autoencoder(
            encoder,
            mask_ratio=mae.mask_ratio,
            predicted_share=mae.predicted_share,
            decoder_width=mae.decoder_width,
            decoder_depth=mae.decoder_depth,
            **shared,
        )
    dinov2 = recipe.dinov2
    return capacity.self_distillation(
        encoder,
        num_local=recipe.crops.num_local,
        local_size_px=recipe.crops.local_size_px,
        prototypes=dinov2.prototypes,
        hidden=dinov2.hidden,
        bottleneck=dinov2.bottleneck,
        shared_head=dinov2.shared_head,
        mask_probability=dinov2.mask_probability,
        **shared,
    )


def rates_of(config: Config) -> tuple[Rates, dict[str, str]]:
    """Returns the rates, and by name the source of each that was measured."""
    from gretfound import storage
    from gretfound.encoder.architecture import measure_encoder

    measured: dict[str, tuple[float, str]] = {}
    if config.rates_uri:
        outcomes = {}
        for uri in storage.list_uris(storage.normalised(config.rates_uri)):
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
        found = capacity.measured_rates(outcomes, benched=benched, precision=config.fit.precision)
        if not found:
            raise ConfigError(f"rates_uri={config.rates_uri} holds no benchmark with a rate; run `make bench` first")
        measured |= {name: (value, config.rates_uri) for name, value in found.items()}
    if config.run_uri:
        name, value = _rate_of_run(config, storage.normalised(config.run_uri))
        measured[name] = (value, config.run_uri)
    rates = replace(capacity.Rates(**asdict(config.rates)), **{name: value for name, (value, _) in measured.items()})
    if not config.cluster.num_gpus and not rates.cpu_gflops:
        raise ConfigError("found rates.cpu_gflops=0 and no benchmark or run that gives it; required more than 0")
    return rates, {name: source for name, (_, source) in measured.items()}


def _rate_of_run(config: Config, run_uri: str) -> tuple[str, float]:
    from gretfound import storage, tracking

    with storage.scratch_folder() as folder:
        path = Path(folder) / "config.yaml"
        storage.download_file(storage.join(run_uri, "config.yaml"), path)
        recipe = load(PretrainConfig, [str(path)])
    metrics = tracking.read_metrics(run_uri)
    if not metrics:
        raise ConfigError(f"run_uri={config.run_uri} has no metrics yet; let the run go on for some minutes")
    cluster = recipe.cluster
    flops_per_s = capacity.flops_per_s_of(
        images_per_s=metrics[-1]["images_per_s"],
        data_wait_share=metrics[-1]["data_wait_share"],
        training=training_of(recipe),
        num_workers=cluster.num_workers * (cluster.gpus_per_worker or cluster.cpus_per_worker),
    )
    if bool(cluster.gpus_per_worker) != bool(config.cluster.num_gpus):
        raise ConfigError(
            f"run_uri={config.run_uri} trained with cluster.gpus_per_worker={cluster.gpus_per_worker:g}; "
            f"it says nothing of cluster.num_gpus={config.cluster.num_gpus}"
        )
    if cluster.gpus_per_worker:
        return "pretrain_gpu_share", flops_per_s / (config.cluster.gpu_tflops * 1e12)
    return "cpu_gflops", flops_per_s / 1e9


def predict(config: Config) -> tuple[Prediction, list[Advice], Rates, dict[str, str], float]:
    """Predicts the chain of a configuration.

    Returns:
        The prediction, advice for each stage, the rates with the sources of measured ones, and the share of a GPU's
        memory that weights, gradients and averages take.
    """
    from gretfound.encoder.architecture import measure_encoder

    rates, sources = rates_of(config)
    encoder = measure_encoder(**asdict(config.encoder))
    cluster = capacity.Cluster(**asdict(config.cluster))
    corpus = capacity.Corpus(
        num_images=config.num_images,
        synthetic_share=config.synthetic_share,
        synthetic_kib=config.synthetic_kib,
        real_kib=config.real_kib,
        num_evaluated=config.num_evaluated,
    )
    generators = capacity.Generators(**asdict(config.generators))
    every_images = config.fit.checkpoint_every_images
    pretraining = capacity.Pretraining(
        training=training_of(config),
        encoder_flops=encoder.image_flops(config.encoder.image_size_px),
        encoder_weights=encoder.num_weights,
        images_seen=config.images_seen,
        batch_size=config.fit.batch_size,
        images_per_cpu_s=rates.mae_images_per_cpu_s if config.objective == "mae" else rates.dinov2_images_per_cpu_s,
        num_checkpoints=1 + (int(config.images_seen // every_images) if every_images else 0),
        zero_stage=config.fit.zero_stage,
    )
    prices = capacity.Prices(**asdict(config.prices))
    stages = capacity.stages_of(corpus, generators, pretraining, rates)
    prediction = capacity.predict(stages, corpus, generators, pretraining, cluster=cluster, rates=rates, prices=prices)
    advice = [capacity.advise(stage, cluster, rates, prices) for stage in stages]
    memory_bytes = config.cluster.gpu_memory_gib * capacity.GIB
    held = pretraining.gpu_state_bytes(cluster.num_gpus) / memory_bytes if cluster.num_gpus else 0.0
    return prediction, advice, rates, sources, held


def table(prediction: Prediction) -> str:
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


def sentences(prediction: Prediction, advice: list[Advice], cluster: capacity.Cluster) -> list[str]:
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


def main(argv: list[str]) -> str:
    """Predicts, prints and writes; returns the place of the JSON."""
    config = load(Config, argv)
    from gretfound import storage

    prediction, advice, rates, sources, held = predict(config)
    print(table(prediction))
    stored_gib = sum(prediction.storage_bytes.values()) / capacity.GIB
    print(f"\nstorage: {stored_gib:,.0f} GiB: ", end="")
    print(", ".join(f"{name} {size / capacity.GIB:,.1f}" for name, size in prediction.storage_bytes.items()))
    print(f"cost: {prediction.total_cost:,.0f}: ", end="")
    print(", ".join(f"{name} {amount:,.0f}" for name, amount in prediction.cost.items()))
    if config.cluster.num_gpus:
        fits = "activations come on top" if held < 1 else "it does not fit: raise fit.zero_stage"
        print(f"GPU memory: {held:.0%} for weights, gradients and AdamW's averages; {fits}")
    assumed = [name for name in asdict(rates) if name not in sources]
    print(f"measured: {', '.join(f'{name} ({sources[name]})' for name in sources) or 'nothing'}")
    print(f"assumed: {', '.join(assumed)}\n")
    print(
        "\n".join(f"- {each}" for each in sentences(prediction, advice, capacity.Cluster(**asdict(config.cluster))))
        + "\n",
        flush=True,
    )
    out_uri = storage.normalised(config.out_uri)
    content: dict[str, Any] = {
        "total_h": prediction.total_s / 3600,
        "total_cost": prediction.total_cost,
        "gpu_memory_share": held,
        "stages": [
            asdict(stage) | {"hours": stage.total_s / 3600, "bottleneck": stage.bottleneck}
            for stage in prediction.stages
        ],
        "advice": [asdict(each) for each in advice],
        "storage_bytes": dict(prediction.storage_bytes),
        "cost": dict(prediction.cost),
        "rates": asdict(rates),
        "measured": sources,
        "settings": canonical(config),
    }
    storage.write_json(out_uri, json.loads(json.dumps(content)))
    return out_uri


if __name__ == "__main__":
    console.run(Config, main)
