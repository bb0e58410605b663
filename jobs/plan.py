"""Cluster and recipe -> prediction: hours, limits, storage and cost of the whole chain, and which resource to add.

    python -m jobs.plan conf/pretrain/retfound_mae.yaml conf/plan/hub_8_gpus.yaml num_images=100_000_000
    python -m jobs.plan conf/plan/laptop.yaml rates_uri=runs/bench
    python -m jobs.plan conf/plan/hub_8_gpus.yaml run_uri=s3://BUCKET/hub/runs/RECIPE

A layer of jobs.pretrain_encoder gives the recipe, one below conf/plan the cluster, its rates and prices. Rates are
assumed until rates_uri (outcomes of `make bench` on the machine that decodes) or run_uri (a short run of
jobs.pretrain_encoder on one of the GPUs) replace them by measured ones. The model is in docs/planning.md. Prints a
table and what to add; writes the prediction as JSON, and prints its place as the last line.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gretfound import capacity
from gretfound.capacity import Rates
from gretfound.config import canonical, load, setting
from gretfound.errors import ConfigError
from jobs import console
from jobs.pretrain_encoder import Config as PretrainConfig
from jobs.recipe import CropConfig, DINOv2Config, EncoderConfig, FitConfig, MAEConfig, training_of

if TYPE_CHECKING:
    from gretfound.planning import Plan


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


def rates_of(config: Config) -> tuple[Rates, dict[str, str]]:
    """Returns the rates, and by name the source of each that was measured."""
    from gretfound import planning

    measured: dict[str, float] = {}
    sources: dict[str, str] = {}
    if config.rates_uri:
        measured |= planning.read_benchmarks(config.rates_uri, precision=config.fit.precision)
        sources |= dict.fromkeys(measured, config.rates_uri)
    if config.run_uri:
        name, value = rate_of_run(config)
        measured[name], sources[name] = value, config.run_uri
    rates = replace(Rates(**asdict(config.rates)), **measured)
    if not config.cluster.num_gpus and not rates.cpu_gflops:
        raise ConfigError("found rates.cpu_gflops=0 and no benchmark or run that gives it; required more than 0")
    return rates, sources


def rate_of_run(config: Config) -> tuple[str, float]:
    """Returns the rate that the pace of the run in ``run_uri`` gives: its name and its value."""
    from gretfound import planning, storage

    with storage.scratch_folder() as folder:
        path = Path(folder) / "config.yaml"
        storage.download_file(storage.join(storage.normalised(config.run_uri), "config.yaml"), path)
        run = load(PretrainConfig, [str(path)])
    flops_per_s = planning.read_pace(
        config.run_uri,
        training=training_of(run),
        num_units=run.cluster.num_workers * (run.cluster.gpus_per_worker or run.cluster.cpus_per_worker),
    )
    if bool(run.cluster.gpus_per_worker) != bool(config.cluster.num_gpus):
        raise ConfigError(
            f"run_uri={config.run_uri} trained with cluster.gpus_per_worker={run.cluster.gpus_per_worker:g}; "
            f"it says nothing of cluster.num_gpus={config.cluster.num_gpus}"
        )
    if run.cluster.gpus_per_worker:
        return "pretrain_gpu_share", flops_per_s / (config.cluster.gpu_tflops * 1e12)
    return "cpu_gflops", flops_per_s / 1e9


def predict(config: Config) -> "Plan":
    """Predicts the chain of a configuration."""
    from gretfound import planning
    from gretfound.encoder.architecture import measure_encoder

    rates, sources = rates_of(config)
    encoder = measure_encoder(**asdict(config.encoder))
    every_images = config.fit.checkpoint_every_images
    return planning.make_plan(
        capacity.Corpus(
            num_images=config.num_images,
            synthetic_share=config.synthetic_share,
            synthetic_kib=config.synthetic_kib,
            real_kib=config.real_kib,
            num_evaluated=config.num_evaluated,
        ),
        capacity.Generators(**asdict(config.generators)),
        capacity.Pretraining(
            training=training_of(config),
            encoder_flops=encoder.image_flops(config.encoder.image_size_px),
            encoder_weights=encoder.num_weights,
            images_seen=config.images_seen,
            batch_size=config.fit.batch_size,
            images_per_cpu_s=rates.mae_images_per_cpu_s if config.objective == "mae" else rates.dinov2_images_per_cpu_s,
            num_checkpoints=1 + (int(config.images_seen // every_images) if every_images else 0),
            zero_stage=config.fit.zero_stage,
        ),
        cluster=capacity.Cluster(**asdict(config.cluster)),
        rates=rates,
        sources=sources,
        prices=capacity.Prices(**asdict(config.prices)),
    )


def main(argv: list[str]) -> str:
    """Predicts, prints and writes; returns the place of the JSON."""
    config = load(Config, argv)
    from gretfound import planning, storage

    planned = predict(config)
    print(planning.tell(planned), flush=True)
    out_uri = storage.normalised(config.out_uri)
    storage.write_json(out_uri, planning.to_json(planned) | {"settings": canonical(config)})
    return out_uri


if __name__ == "__main__":
    console.run(Config, main)
