"""Capacity: how long, how much storage and how much money the whole chain takes on a cluster, in closed form.

Every stage is a sum of demands (floating-point operations, CPU seconds, bytes); a cluster is a set of capacities. What
streams overlaps, so a stage lasts as long as its slowest resource, and after that what cannot overlap: starting,
checkpoints. Nothing is simulated and nothing is measured here: rates come in, hours go out. docs/planning.md says what
is assumed and how far predictions were from measured runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

GIB = 2**30
KIB = 2**10
HOURS_PER_MONTH = 730.0
WEIGHT_BYTES = 4  # float32: autocast keeps weights, gradients and AdamW's two averages in it
NUM_GLOBAL_CROPS = 2  # gretfound.encoder.dinov2's
MEAN_MASK_RATIO = 0.3  # of its masked crops: uniform from 0.1 to 0.5
EVALUATED_ENCODERS = 2  # the encoder and the untrained baseline
SIGNATURE_BYTES = 96  # an image's in the corpus: 512 bits of hash, keys of image and patient, manifest
MAX_FACTOR = 4096  # advice looks no further than so many times the cluster

RESOURCES = ("GPUs", "training CPUs", "CPUs", "bucket", "GPU network")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is: networks run on GPUs, or without any on CPUs of their own; decoding runs beside them.

    Args:
        num_gpus: GPUs.
        gpu_tflops: The published dense peak of one, in the precision used, TFLOP/s.
        gpu_memory_gib: Memory of one, GiB.
        gpu_network_gbit_per_s: What one can send to the others and receive at the same time, Gbit/s.
        cpus_per_gpu: CPUs that come with each GPU and are free for decoding.
        other_cpus: CPUs of machines without GPUs, for decoding.
        training_cpus: CPUs that networks run on where there is no GPU; they decode where a stage has no network.
        bucket_gbit_per_s: To and from the bucket, of all machines together, Gbit/s.
    """

    num_gpus: int
    gpu_tflops: float
    gpu_memory_gib: float
    gpu_network_gbit_per_s: float
    cpus_per_gpu: float
    other_cpus: float
    training_cpus: float
    bucket_gbit_per_s: float

    @property
    def cpus(self) -> float:
        """CPUs for decoding."""
        return self.num_gpus * self.cpus_per_gpu + self.other_cpus


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one unit of each resource works; measured, or assumed.

    Args:
        pretrain_gpu_share: Share of a GPU's peak that pretraining reaches, counted in the operations of `Training`.
        generator_gpu_share: The same of fine-tuning and sampling generators.
        cpu_gflops: What a training CPU reaches, GFLOP/s; only used without GPUs.
        mae_images_per_cpu_s: Photographs decoded and cropped for a masked autoencoder.
        dinov2_images_per_cpu_s: Photographs decoded and cropped for self-distillation.
        intake_images_per_cpu_s: Photographs verified and made anew from their pixels.
        drawn_images_per_cpu_s: Drawn photographs screened and encoded.
        signed_images_per_cpu_s: Photographs decoded and hashed when a corpus is assembled.
        search_s_per_million: Seconds of one process for a million images' near-duplicates and manifest.
        probe_s: Seconds of probes, intervals and the report page.
        start_up_s: Seconds from a job's command to its first image.
    """

    pretrain_gpu_share: float
    generator_gpu_share: float
    cpu_gflops: float
    mae_images_per_cpu_s: float
    dinov2_images_per_cpu_s: float
    intake_images_per_cpu_s: float
    drawn_images_per_cpu_s: float
    signed_images_per_cpu_s: float
    search_s_per_million: float
    probe_s: float
    start_up_s: float


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What things cost, in one currency.

    Args:
        gpu_hour: A GPU with its CPUs, an hour.
        cpu_hour: Another CPU, an hour.
        gib_month: A GiB in the bucket, a month.
        read_gib: A GiB read from the bucket; 0 within its region.
        months_kept: Months for which everything is kept.
    """

    gpu_hour: float
    cpu_hour: float
    gib_month: float
    read_gib: float
    months_kept: float


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A vision transformer's sizes.

    Args:
        width: Of a token.
        depth: Blocks.
        patch_px: Side of a patch.
        num_prefix_tokens: Class and register tokens.
        block_weights: Weights of one block's matrices; 12 width ** 2 for the plain block of Dosovitskiy et al., 2021.
    """

    width: int
    depth: int
    patch_px: int
    num_prefix_tokens: int
    block_weights: int

    def num_patches(self, image_size_px: int) -> int:
        """Returns the whole patches of a square image."""
        return (image_size_px // self.patch_px) ** 2

    def embed_flops(self, num_patches: int) -> float:
        """Returns the operations of embedding patches."""
        return 2.0 * num_patches * 3 * self.patch_px**2 * self.width

    def block_flops(self, num_tokens: int) -> float:
        """Returns the operations of all blocks on one sequence."""
        return block_flops(num_tokens, width=self.width, depth=self.depth, block_weights=self.block_weights)

    def image_flops(self, image_size_px: int) -> float:
        """Returns the operations of one forward pass on a whole image."""
        num_patches = self.num_patches(image_size_px)
        return self.embed_flops(num_patches) + self.block_flops(num_patches + self.num_prefix_tokens)

    @property
    def num_weights(self) -> float:
        """The weights of all matrices; biases, norms and positions are less than a hundredth."""
        return self.depth * self.block_weights + 3.0 * self.patch_px**2 * self.width


def block_flops(num_tokens: int, *, width: int, depth: int, block_weights: int) -> float:
    """Returns a forward pass's operations: 2 a weight and token, and 4 a pair of tokens and channel for attention.

    Source: Kaplan et al., arXiv:2001.08361, section 2.1, without its biases, norms and activations.
    """
    return 2.0 * depth * (num_tokens * block_weights + 2 * num_tokens**2 * width)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What an objective computes for one image, and what it holds.

    Args:
        forward_flops: Forward pass of what is trained.
        frozen_flops: Forward pass of what is not, such as a teacher.
        recomputed_flops: Forward pass of the blocks that are computed anew in the backward pass.
        num_weights: Trained weights.
        num_frozen_weights: Others in a checkpoint.
    """

    forward_flops: float
    frozen_flops: float
    recomputed_flops: float
    num_weights: float
    num_frozen_weights: float

    @property
    def flops(self) -> float:
        """Operations of a step, an image: a backward pass counts as two forward ones."""
        return 3 * self.forward_flops + self.frozen_flops + self.recomputed_flops

    @property
    def checkpoint_bytes(self) -> float:
        """Weights with AdamW's two averages; of frozen ones the weights alone."""
        return WEIGHT_BYTES * (3 * self.num_weights + self.num_frozen_weights)


def masked_autoencoder(
    encoder: Transformer,
    *,
    image_size_px: int,
    mask_ratio: float,
    predicted_share: float,
    decoder_width: int,
    decoder_depth: int,
    recomputes_activations: bool = False,
) -> Training:
    """Counts a masked autoencoder: the encoder sees the kept patches, the decoder those and the predicted ones.

    Source: He et al., CVPR 2022, section 3; the counts of `gretfound.encoder.mae`.
    """
    num_patches = encoder.num_patches(image_size_px)
    num_kept = int(num_patches * (1 - mask_ratio))
    num_predicted = max(1, round((num_patches - num_kept) * predicted_share))
    decoder_weights = 12 * decoder_width**2
    encoded = encoder.block_flops(1 + num_kept)
    decoded = block_flops(
        1 + num_kept + num_predicted, width=decoder_width, depth=decoder_depth, block_weights=decoder_weights
    )
    joint_weights = encoder.width * decoder_width
    pixel_weights = decoder_width * 3 * encoder.patch_px**2
    ends = encoder.embed_flops(num_kept) + 2.0 * (joint_weights * (1 + num_kept) + pixel_weights * num_predicted)
    return Training(
        forward_flops=encoded + decoded + ends,
        frozen_flops=0.0,
        recomputed_flops=recomputes_activations * (encoded + decoded),
        num_weights=encoder.num_weights + decoder_depth * decoder_weights + joint_weights + pixel_weights,
        num_frozen_weights=0.0,
    )


def self_distillation(
    encoder: Transformer,
    *,
    image_size_px: int,
    num_local: int,
    local_size_px: int,
    prototypes: int,
    hidden: int,
    bottleneck: int,
    shared_head: bool,
    mask_probability: float,
    recomputes_activations: bool = False,
) -> Training:
    """Counts self-distillation: the student sees all crops, the teacher the global ones, without a backward pass.

    Source: DINOv2 (Oquab et al., arXiv:2304.07193), section 4; the counts of `gretfound.encoder.dinov2`, for the
    expected number of masked patches.
    """
    head_weights = encoder.width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes
    num_patches = encoder.num_patches(image_size_px)
    num_masked = NUM_GLOBAL_CROPS * num_patches * mask_probability * MEAN_MASK_RATIO
    teacher = NUM_GLOBAL_CROPS * encoder.image_flops(image_size_px)
    student = teacher + num_local * encoder.image_flops(local_size_px)
    blocks = NUM_GLOBAL_CROPS * encoder.block_flops(num_patches + encoder.num_prefix_tokens)
    blocks += num_local * encoder.block_flops(encoder.num_patches(local_size_px) + encoder.num_prefix_tokens)
    num_weights = encoder.num_weights + (1 if shared_head else 2) * head_weights
    return Training(
        forward_flops=student + 2.0 * head_weights * (NUM_GLOBAL_CROPS + num_local + num_masked),
        frozen_flops=teacher + 2.0 * head_weights * (NUM_GLOBAL_CROPS + num_masked),
        recomputed_flops=recomputes_activations * blocks,
        num_weights=num_weights,
        num_frozen_weights=num_weights,
    )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The whole demand of one job.

    Args:
        name: The job's, in words.
        num_images: What it works on.
        flops: Floating-point operations, in all.
        gpu_share: Share of a GPU's peak at which they are done.
        num_runs: Runs side by side, each on ``gpus_per_run`` GPUs; 0 is one run on all of them.
        gpus_per_run: See ``num_runs``.
        cpu_s: Seconds of one CPU.
        read_bytes: From the bucket.
        written_bytes: To the bucket, while it streams.
        blocking_bytes: To the bucket, while everything waits.
        exchanged_bytes: That each GPU sends to the others.
        serial_s: Seconds that no resource shortens.
    """

    name: str
    num_images: float
    flops: float = 0.0
    gpu_share: float = 1.0
    num_runs: int = 0
    gpus_per_run: int = 1
    cpu_s: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    blocking_bytes: float = 0.0
    exchanged_bytes: float = 0.0
    serial_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """How long a stage takes.

    ``seconds`` has for each of `RESOURCES` the seconds that it would need alone; ``waiting_s`` is what cannot overlap.
    """

    name: str
    num_images: float
    seconds: Mapping[str, float]
    waiting_s: float
    cost: float

    @property
    def total_s(self) -> float:
        """Wall seconds."""
        return max(self.seconds.values()) + self.waiting_s

    @property
    def bottleneck(self) -> str:
        """The slowest resource, or ``start and end`` where what cannot overlap takes longer."""
        slowest = max(RESOURCES, key=lambda name: self.seconds[name])
        return slowest if self.seconds[slowest] > self.waiting_s else "start and end"

    @property
    def runner_up(self) -> str:
        """The second slowest resource."""
        return sorted(RESOURCES, key=lambda name: self.seconds[name])[-2]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The whole chain's hours, storage and cost."""

    stages: tuple[StagePrediction, ...]
    storage_bytes: Mapping[str, float]
    cost: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """Wall seconds of the chain, one stage after the other."""
        return sum(stage.total_s for stage in self.stages)

    @property
    def total_cost(self) -> float:
        """Machines, storage and transfers."""
        return sum(self.cost.values())


@dataclass(frozen=True, kw_only=True)
class Generators:
    """The generators' part of the chain; the defaults of its layers are counts of Stable Diffusion 1.5 at 512 px.

    Args:
        num_sites: Generators to fine-tune at the hub, each in a run of its own.
        gpus_per_site: GPUs of such a run.
        images_seen: Photographs that each run sees, repeats counted.
        passes: Forward passes that a training step is worth: 2 for low-rank factors, 3 for all weights.
        unet_tflop: TFLOP of the denoiser, a photograph and step.
        decode_tflop: TFLOP of decoding a latent.
        encode_tflop: TFLOP of encoding a photograph.
        photographs_per_site: Photographs of a site, each encoded once in each of two views.
        num_steps: Steps of the solver.
        guidance_scale: Weight of the caption; other than 1 each step is two passes.
        adapter_mib: Size of a generator's adapter.
    """

    num_sites: int
    gpus_per_site: int
    images_seen: int
    passes: float
    unet_tflop: float
    decode_tflop: float
    encode_tflop: float
    photographs_per_site: int
    num_steps: int
    guidance_scale: float
    adapter_mib: float


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The photographs of the chain.

    Args:
        num_images: In the corpus.
        synthetic_share: Share that is drawn at the hub; the others arrive.
        synthetic_kib: Mean size of a drawn photograph, KiB.
        real_kib: Mean size of one that arrives.
        num_evaluated: Photographs of all evaluation sets.
    """

    num_images: int
    synthetic_share: float
    synthetic_kib: float
    real_kib: float
    num_evaluated: int

    @property
    def num_drawn(self) -> float:
        """Photographs drawn at the hub."""
        return self.num_images * self.synthetic_share

    @property
    def num_bytes(self) -> float:
        """All shards."""
        arrived_bytes = (self.num_images - self.num_drawn) * self.real_kib * KIB
        return self.num_drawn * self.synthetic_kib * KIB + arrived_bytes


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The pretraining run.

    Args:
        training: What an image costs.
        encoder_flops: A forward pass of the encoder on a whole image, for the evaluation.
        encoder_weights: The encoder's.
        images_seen: Images of the run, repeats counted.
        batch_size: Images a step.
        images_per_cpu_s: Images that a CPU decodes and crops.
        num_checkpoints: Checkpoints, the last one included.
        zero_stage: DeepSpeed's, 0 to 3.
    """

    training: Training
    encoder_flops: float
    encoder_weights: float
    images_seen: float
    batch_size: int
    images_per_cpu_s: float
    num_checkpoints: int
    zero_stage: int

    @property
    def exchanged_bytes(self) -> float:
        """Sent by each GPU: a ring's two passes over the gradients; ZeRO 3 gathers the weights once more."""
        passes = 3 if self.zero_stage == 3 else 2
        return math.ceil(self.images_seen / self.batch_size) * passes * WEIGHT_BYTES * self.training.num_weights

    def gpu_state_bytes(self, num_gpus: int) -> float:
        """Returns what a GPU holds of weights, gradients and AdamW's averages; activations come on top.

        Source: ZeRO (Rajbhandari et al., arXiv:1910.02054), figure 1, with everything in float32.
        """
        parts = [1, 1, 2]  # weights, gradients, averages
        sharded = {0: 0, 1: 1, 2: 2, 3: 3}[self.zero_stage]
        held = sum(part / (num_gpus if place >= 3 - sharded else 1) for place, part in enumerate(parts))
        frozen = self.training.num_frozen_weights / (num_gpus if sharded == 3 else 1)
        return WEIGHT_BYTES * (held * self.training.num_weights + frozen)


def stages_of(corpus: Corpus, generators: Generators, pretraining: Pretraining, rates: Rates) -> tuple[Stage, ...]:
    """Lists the chain's stages and their demands."""
    arrived = corpus.num_images - corpus.num_drawn
    unet_flops = generators.unet_tflop * 1e12
    tuned = generators.num_sites * generators.images_seen
    encoded = generators.num_sites * generators.photographs_per_site
    step_passes = 1 if generators.guidance_scale == 1 else 2
    drawn_flops = generators.num_steps * step_passes * unet_flops + generators.decode_tflop * 1e12
    mean_bytes = corpus.num_bytes / corpus.num_images
    start_s = rates.start_up_s
    return (
        Stage(
            name="intake",
            num_images=arrived,
            cpu_s=arrived / rates.intake_images_per_cpu_s,
            read_bytes=arrived * corpus.real_kib * KIB,
            written_bytes=arrived * corpus.real_kib * KIB,
            serial_s=start_s if arrived else 0.0,
        ),
        Stage(
            name="fine-tune generators",
            num_images=tuned,
            flops=tuned * generators.passes * unet_flops + encoded * 2 * generators.encode_tflop * 1e12,
            gpu_share=rates.generator_gpu_share,
            num_runs=generators.num_sites,
            gpus_per_run=generators.gpus_per_site,
            cpu_s=2 * encoded / rates.mae_images_per_cpu_s,
            read_bytes=encoded * corpus.real_kib * KIB,
            written_bytes=generators.num_sites * generators.adapter_mib * 2**20,
            serial_s=start_s if generators.num_sites else 0.0,
        ),
        Stage(
            name="synthesize",
            num_images=corpus.num_drawn,
            flops=corpus.num_drawn * drawn_flops,
            gpu_share=rates.generator_gpu_share,
            cpu_s=corpus.num_drawn / rates.drawn_images_per_cpu_s,
            written_bytes=corpus.num_drawn * corpus.synthetic_kib * KIB,
            serial_s=start_s if corpus.num_drawn else 0.0,
        ),
        Stage(
            name="assemble corpus",
            num_images=corpus.num_images,
            cpu_s=corpus.num_images / rates.signed_images_per_cpu_s,
            read_bytes=corpus.num_bytes,
            written_bytes=corpus.num_images * SIGNATURE_BYTES,
            serial_s=start_s + corpus.num_images / 1e6 * rates.search_s_per_million,
        ),
        Stage(
            name="pretrain encoder",
            num_images=pretraining.images_seen,
            flops=pretraining.images_seen * pretraining.training.flops,
            gpu_share=rates.pretrain_gpu_share,
            cpu_s=pretraining.images_seen / pretraining.images_per_cpu_s,
            read_bytes=pretraining.images_seen * mean_bytes,
            blocking_bytes=pretraining.num_checkpoints * pretraining.training.checkpoint_bytes,
            exchanged_bytes=pretraining.exchanged_bytes,
            serial_s=start_s,
        ),
        Stage(
            name="evaluate encoder",
            num_images=corpus.num_evaluated,
            flops=corpus.num_evaluated * EVALUATED_ENCODERS * pretraining.encoder_flops,
            gpu_share=rates.pretrain_gpu_share,
            cpu_s=corpus.num_evaluated / rates.mae_images_per_cpu_s,
            read_bytes=corpus.num_evaluated * corpus.real_kib * KIB,
            serial_s=start_s + rates.probe_s,
        ),
        Stage(
            name="publish release",
            num_images=0.0,
            written_bytes=3 * WEIGHT_BYTES * pretraining.encoder_weights,  # safetensors, .pth, ONNX
            serial_s=start_s,
        ),
    )


def predict_stage(stage: Stage, cluster: Cluster, rates: Rates, prices: Prices) -> StagePrediction:
    """Predicts one stage: each resource's demand over its capacity, the slowest of them, and what cannot overlap.

    Raises:
        ValueError: If a resource is needed that the cluster does not have.
    """
    gpu_flops_per_s = cluster.num_gpus * cluster.gpu_tflops * 1e12 * stage.gpu_share
    on_gpu, on_cpu = (stage.flops, 0.0) if cluster.num_gpus else (0.0, stage.flops)
    cpus = cluster.cpus if stage.flops else cluster.cpus + cluster.training_cpus
    bucket_bytes_per_s = cluster.bucket_gbit_per_s * 1e9 / 8
    exchanged_bytes = stage.exchanged_bytes if cluster.num_gpus > 1 else 0.0
    seconds = {
        "GPUs": _over(on_gpu, gpu_flops_per_s, "gpu_tflops") * _unevenness(stage, cluster),
        "training CPUs": _over(on_cpu, cluster.training_cpus * rates.cpu_gflops * 1e9, "training_cpus or cpu_gflops"),
        "CPUs": _over(stage.cpu_s, cpus, "cpus_per_gpu or other_cpus"),
        "bucket": _over(stage.read_bytes + stage.written_bytes, bucket_bytes_per_s, "bucket_gbit_per_s"),
        "GPU network": _over(exchanged_bytes, cluster.gpu_network_gbit_per_s * 1e9 / 8, "gpu_network_gbit_per_s"),
    }
    waiting_s = stage.serial_s + _over(stage.blocking_bytes, bucket_bytes_per_s, "bucket_gbit_per_s")
    hours = (max(seconds.values()) + waiting_s) / 3600
    return StagePrediction(
        name=stage.name,
        num_images=stage.num_images,
        seconds=seconds,
        waiting_s=waiting_s,
        cost=hours
        * (cluster.num_gpus * prices.gpu_hour + (cluster.other_cpus + cluster.training_cpus) * prices.cpu_hour),
    )


def _over(demand: float, capacity: float, key: str) -> float:
    if demand and capacity <= 0:
        raise ValueError(f"found {key}=0 and work for it; required more than 0")
    return demand / capacity if demand else 0.0


def _unevenness(stage: Stage, cluster: Cluster) -> float:
    """Returns how much longer runs side by side take than one run on all GPUs: some GPUs wait in the last round."""
    if not stage.num_runs or not cluster.num_gpus:
        return 1.0
    slots = max(1, cluster.num_gpus // stage.gpus_per_run)
    gpus_used = min(stage.gpus_per_run, cluster.num_gpus)
    return math.ceil(stage.num_runs / slots) * cluster.num_gpus / (stage.num_runs * gpus_used)


def predict(
    stages: tuple[Stage, ...],
    corpus: Corpus,
    generators: Generators,
    pretraining: Pretraining,
    *,
    cluster: Cluster,
    rates: Rates,
    prices: Prices,
) -> Prediction:
    """Predicts the chain: its stages one after the other on one cluster that is held throughout."""
    predicted = tuple(predict_stage(stage, cluster, rates, prices) for stage in stages)
    storage_bytes = {
        "photographs": corpus.num_bytes,
        "signatures and manifest": float(corpus.num_images * SIGNATURE_BYTES),
        "generators": generators.num_sites * generators.adapter_mib * 2**20,
        "checkpoints": 2 * pretraining.training.checkpoint_bytes,
        "encoder and release": WEIGHT_BYTES * (4 * pretraining.encoder_weights + pretraining.training.num_weights),
    }
    read_bytes = sum(stage.read_bytes for stage in stages)
    return Prediction(
        stages=predicted,
        storage_bytes=storage_bytes,
        cost={
            "machines": sum(stage.cost for stage in predicted),
            "storage": sum(storage_bytes.values()) / GIB * prices.gib_month * prices.months_kept,
            "reading": read_bytes / GIB * prices.read_gib,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to add to a cluster so that a stage's bottleneck moves.

    ``amount`` is the least whole amount of ``resource`` after which ``next_bottleneck`` is the limit and the stage
    takes ``total_s``; 0 where no amount moves it. ``doubled_s`` is the stage with twice as much of it.
    """

    stage: str
    resource: str
    amount: int
    total_s: float
    next_bottleneck: str
    doubled_s: float


def advise(stage: Stage, cluster: Cluster, rates: Rates, prices: Prices) -> Advice:
    """Finds what to add for one stage; looks no further than `MAX_FACTOR` times the cluster."""
    now = predict_stage(stage, cluster, rates, prices)
    resource = now.bottleneck
    found = Advice(
        stage=stage.name,
        resource=resource,
        amount=0,
        total_s=now.total_s,
        next_bottleneck=resource,
        doubled_s=now.total_s,
    )
    if resource == "start and end":
        return found

    def then(amount: int) -> StagePrediction:
        return predict_stage(stage, grown(cluster, resource, amount), rates, prices)

    held = math.ceil(held_of(cluster, resource))
    found = replace(found, doubled_s=then(held).total_s)
    low, high = 0, MAX_FACTOR * max(1, held)
    if then(high).bottleneck == resource:
        return found
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if then(middle).bottleneck == resource else (low, middle)
    after = then(high)
    return replace(found, amount=high, total_s=after.total_s, next_bottleneck=after.bottleneck)


def grown(cluster: Cluster, resource: str, amount: float) -> Cluster:
    """Returns the cluster with more of one resource; a GPU brings its CPUs along."""
    match resource:
        case "GPUs":
            return replace(cluster, num_gpus=cluster.num_gpus + int(amount))
        case "training CPUs":
            return replace(cluster, training_cpus=cluster.training_cpus + amount)
        case "CPUs":
            return replace(cluster, other_cpus=cluster.other_cpus + amount)
        case "bucket":
            return replace(cluster, bucket_gbit_per_s=cluster.bucket_gbit_per_s + amount)
        case "GPU network":
            return replace(cluster, gpu_network_gbit_per_s=cluster.gpu_network_gbit_per_s + amount)
        case _:
            raise ValueError(f"found resource={resource!r}; required one of {', '.join(RESOURCES)}")


def held_of(cluster: Cluster, resource: str) -> float:
    """Returns how much the cluster has of a resource, in the unit of `grown`."""
    match resource:
        case "GPUs":
            return float(cluster.num_gpus)
        case "training CPUs":
            return cluster.training_cpus
        case "CPUs":
            return cluster.cpus
        case "bucket":
            return cluster.bucket_gbit_per_s
        case _:
            return cluster.gpu_network_gbit_per_s


def measured_rates(
    outcomes: Mapping[str, tuple[float, Mapping[str, float]]], *, benched: Training, precision: str
) -> dict[str, float]:
    """Reads rates from the outcomes of `tests.bench`.

    Args:
        outcomes: By benchmark's name, the CPUs that it worked on, and its rows' values by name.
        benched: The autoencoder of the benchmark ``pretrain``.
        precision: ``float32`` or ``bfloat16``: which of its rows counts.

    Returns:
        Fields of `Rates`, as far as they were measured. A row named ``rates.FIELD`` is taken as it is, and before
        others.
    """
    found: dict[str, float] = {}
    if "ingest" in outcomes:
        cpus, rows = outcomes["ingest"]
        found["mae_images_per_cpu_s"] = rows["gretfound.ingest, disk"] / cpus
    if "pretrain" in outcomes:
        cpus, rows = outcomes["pretrain"]
        found["cpu_gflops"] = rows[f"gretfound.fit.train, {precision}"] * benched.flops / cpus / 1e9
    names = {field.name for field in fields(Rates)}
    for _, rows in outcomes.values():
        found |= {
            name.removeprefix("rates."): value
            for name, value in rows.items()
            if name.startswith("rates.") and name.removeprefix("rates.") in names
        }
    return found


def flops_per_s_of(*, images_per_s: float, data_wait_share: float, training: Training, num_workers: float) -> float:
    """Returns the operations a second of one worker of a measured run, while it did not wait for data."""
    return images_per_s / (1 - data_wait_share) * training.flops / num_workers
