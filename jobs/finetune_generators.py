"""Contribution -> generator: fine-tunes a base generator on the photographs of every site that sent them.

    python -m jobs.finetune_generators conf/generator/finetune_demo.yaml hub_uri=runs/demo/hub base_id=generator-1f0c

    python -m jobs.finetune_generators --status hub_uri=runs/demo/hub every_s=5

The photographs are encoded first, once, by Ray Data, and their latents kept in HUB/latents. Then every contribution of
the form `images` gets one Ray Train run; a bounded number of runs is under way at a time, and one
that fails leaves the others alone. A run that was cut short goes on from its last checkpoint when the same command is
run again. Some patients' photographs are held out, so that jobs.evaluate_generators can measure a generator against
them. The last line is the generator's id; with several sites, their generators' ids joined by commas. It fails at the
end if any site's run failed.

With tuning.objective=consistency each site's generator that was fine-tuned from base_id gets a student that draws in a
few steps and without guidance; jobs.synthesize is_few_step=true draws with it.

--status prints the table of sites and states of the latest run, from any machine that reads the hub, and needs no
cluster; its keys are hub_uri and every_s (seconds between tables until all sites have ended; 0: one table).
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gretfound.config import canonical, load, setting, to_yaml
from gretfound.errors import ConfigError, GretfoundError, LineageError
from jobs import console

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gretfound.lineage import Contribution, Generator
    from gretfound.site_states import State


@dataclass(frozen=True)
class TuningConfig:
    """The fine-tuning of one generator; progress and schedule are counted in images."""

    objective: str = setting(
        "denoising", "denoising; consistency: few-step students of the sites' own generators of base_id"
    )
    method: str = setting("lora", "lora: low-rank factors; full: the whole denoiser")
    num_images_seen: int = setting(200_000, "photographs to train on, repeats counted")
    batch_size: int = setting(16, "photographs a step, over all workers of a site")
    learning_rate: float = setting(1e-4, "peak learning rate")
    lora_rank: int = setting(16, "rank of the low-rank factors")
    resolution_px: int | None = setting(None, "side of the square photographs, pixels; null: the base's own")
    warmup_images: int = setting(0, "images over which the rate rises")
    weight_decay: float = setting(0.01, "AdamW's")
    caption_dropout: float = setting(0.1, "share of images that see the empty caption")
    cell_dropout: float = setting(0.0, "share of the cells left out of each other caption, in tenths: 0.1, 0.2, ...")
    offset_noise: float = setting(0.0, "deviation of a shift of each latent channel's noise; 0: none")
    min_snr_gamma: float | None = setting(5.0, "min-SNR weighting; null: all times weigh alike")
    guidance_scale: float = setting(2.0, "of consistency: weight of the caption that a student learns")
    average_decay: float = setting(0.9999, "of the moving average of the weights that is kept, per step; 0: the last")
    precision: str = setting("float32", "float32 or bfloat16")
    accumulation: int = setting(1, "parts that a step is computed in, one after another, to save memory")
    recomputes_activations: bool = setting(
        False, "whether blocks are computed anew in the backward pass, to save memory"
    )
    zero_stage: int | None = setting(None, "DeepSpeed ZeRO stage, 0 to 3; null: plain PyTorch, one worker a site")
    checkpoint_every_images: int = setting(20_000, "images between checkpoints; 0: at the end only")
    seed: int = setting(0, "decides factors, order and noise")


@dataclass(frozen=True)
class ClusterConfig:
    """What one site's run takes of the cluster."""

    num_workers: int = setting(1, "training workers of a site")
    cpus_per_worker: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_worker: float = setting(0.0, "GPUs that each one reserves; 0 trains on CPU")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")
    max_failures: int = setting(3, "restarts of a site's run from its last checkpoint before it fails")


@dataclass(frozen=True)
class Config:
    """What `finetune_generators` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    base_id: str = setting(help="record id of the base generator (jobs.build_base), or of the one of a site to distil")
    site_ids: list[str] = setting([], "the sites to fine-tune for; empty: all that sent photographs")
    held_out_share: float = setting(
        0.1, "share of a site's photographs, by patient, that is not trained on; none is held out if it is under 20"
    )
    max_concurrent: int = setting(8, "runs under way at a time, at most; fewer where the cluster holds fewer")
    project: str = setting("gretfound", "the W&B project")
    tuning: TuningConfig = setting(TuningConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if self.tuning.method not in ("lora", "full"):
            raise ConfigError(f"tuning.method={self.tuning.method!r} is neither lora nor full")
        if self.tuning.objective not in ("denoising", "consistency"):
            raise ConfigError(f"tuning.objective={self.tuning.objective!r} is neither denoising nor consistency")
        if self.tuning.guidance_scale < 1:
            raise ConfigError(f"tuning.guidance_scale={self.tuning.guidance_scale:g} must be at least 1")
        if self.tuning.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"tuning.precision={self.tuning.precision!r} is neither float32 nor bfloat16")
        if self.tuning.zero_stage is None and self.cluster.num_workers > 1:
            raise ConfigError(
                f"cluster.num_workers={self.cluster.num_workers} needs tuning.zero_stage; null is one process"
            )
        if self.tuning.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"tuning.zero_stage={self.tuning.zero_stage} is none of null, 0, 1, 2, 3")
        parts = self.cluster.num_workers * self.tuning.accumulation
        if parts < 1 or self.tuning.batch_size % parts:
            raise ConfigError(
                f"tuning.batch_size={self.tuning.batch_size} is not divisible by "
                f"cluster.num_workers={self.cluster.num_workers} times tuning.accumulation={self.tuning.accumulation}"
            )
        if not 0 <= self.tuning.cell_dropout < 1 or round(self.tuning.cell_dropout * 10, 6) % 1:
            raise ConfigError(f"tuning.cell_dropout={self.tuning.cell_dropout:g} is none of 0, 0.1, 0.2, ... 0.9")
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share={self.held_out_share} is not within 0 to under 1")
        if self.max_concurrent < 1:
            raise ConfigError(f"max_concurrent={self.max_concurrent} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One site's run."""

    hub_uri: str
    run_uri: str
    recipe_id: str
    site_id: str
    contribution_id: str
    shard_set_id: str
    base_id: str
    group: str
    config: Config


@dataclass(frozen=True)
class StatusConfig:
    """What `--status` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    every_s: float = setting(0.0, "seconds between tables until all sites have ended; 0: one table")


def finetune_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each Ray Train worker of a site: trains, and the first one writes the generator's record."""
    import ray.train

    from gretfound import encoding, fit, holdout, shard, storage, tracking
    from gretfound.checkpoints import RayCheckpoints
    from gretfound.generator import adapter, finetune, pipeline
    from gretfound.lineage import Generator, ShardSet

    work: Work = settings["work"]
    is_first = ray.train.get_context().get_world_rank() == 0
    tracker = tracking.Tracker(
        work.run_uri,
        run_id=work.recipe_id,
        project=work.config.project,
        group=work.group,
        settings=canonical(work.config),
        is_active=is_first,
    )
    with storage.scratch_folder() as folder, tracker:
        scratch_path = Path(folder)
        base = storage.read_record(work.hub_uri, work.base_id, Generator)
        base_path = storage.fetch_folder(work.hub_uri, base, scratch_path / "base")
        shard_set = storage.read_record(work.hub_uri, work.shard_set_id, ShardSet)
        parts = encoding.parts_of(
            shard_set,
            base=base,
            resolution_px=work.config.tuning.resolution_px,
            cell_dropout=work.config.tuning.cell_dropout,
        )
        latents_path = encoding.fetch(work.hub_uri, parts, scratch_path / "latents", base=base)
        shard_uris = [storage.join(work.hub_uri, each.path) for each in shard_set.shards]
        rows = (row for uri in shard_uris for row in shard.read_rows(uri, columns=["image_id", "patient"]))
        is_student = work.config.tuning.objective == "consistency"
        if is_student:  # what its teacher has not seen
            held_out = holdout.from_json(storage.read_json(str(base_path / holdout.FILE_NAME)))
        else:
            held_out = holdout.choose(
                ((row["image_id"], row["patient"]) for row in rows),
                share=work.config.held_out_share,
                seed=work.config.tuning.seed,
            )
        adapter_path = finetune.finetune_locally(
            base_path=base_path,
            latents_path=latents_path,
            work_path=scratch_path / "work",
            left_out=held_out.image_ids,
            device="cuda" if work.config.cluster.gpus_per_worker else "cpu",
            checkpoints=RayCheckpoints(fit.train_uri(work.run_uri, work.recipe_id)),
            on_progress=lambda progress: tracker.write(progress.figures()),
            **(asdict(work.config.tuning) | {"resolution_px": parts[0].resolution_px}),
        )
        if is_first:
            terms = adapter.read_terms(adapter_path)
            record = Generator(
                parents=(work.contribution_id, work.base_id),
                recipe_id=work.recipe_id,
                site_id=work.site_id,
                base_id=work.base_id,
                method="consistency" if is_student else terms.method,
                resolution_px=terms.resolution_px,
                num_images=held_out.num_trained_on,
                images_seen=terms.images_seen,
                final_loss=terms.final_loss,
            )
            generator_path = pipeline.install_adapter(
                base_path, adapter_path, scratch_path / "generator", is_few_step=is_student
            )
            storage.write_json(str(generator_path / holdout.FILE_NAME), holdout.to_json(held_out))
            storage.publish_folder(work.hub_uri, generator_path, record)


def finetune_site(work: Work) -> "State":
    """Drives one site's Ray Train run to its end and says how it ended."""
    import ray.train

    from gretfound import fit, storage
    from gretfound.lineage import Generator
    from gretfound.site_states import State

    began_s = time.monotonic()
    try:
        fit.run(
            finetune_on_worker,
            {"work": work},
            run_uri=work.run_uri,
            name=work.recipe_id,
            **asdict(work.config.cluster),
        )
    except ray.train.WorkerGroupError as error:
        causes = {f"{type(cause).__name__}: {cause}".splitlines()[-1] for cause in error.worker_failures.values()}
        return State(state="failed", message="; ".join(sorted(causes)), wall_s=time.monotonic() - began_s)
    except (ray.train.TrainingFailedError, GretfoundError) as error:
        return State(state="failed", message=f"{type(error).__name__}: {error}", wall_s=time.monotonic() - began_s)
    record = storage.finished_record(work.hub_uri, work.recipe_id, Generator)
    if record is None:
        return State(state="failed", message="the run ended without a record", wall_s=time.monotonic() - began_s)
    return State(state="finished", generator_id=record.id, wall_s=time.monotonic() - began_s)


def first_states(
    works: list[Work], finished: Mapping[str, str], faults: Mapping[str, str]
) -> "Iterator[tuple[Work, State]]":
    """Yields each site's state before any run; arguments as of `drive`."""
    from gretfound.site_states import State

    for work in works:
        if work.recipe_id in finished:
            yield work, State(state="finished", generator_id=finished[work.recipe_id])
        elif work.site_id in faults:
            yield work, State(state="failed", message=faults[work.site_id])
        else:
            yield work, State(state="waiting")


def drive(
    works: list[Work],
    finished: Mapping[str, str],
    faults: Mapping[str, str],
    *,
    window: int,
    hub_uri: str,
    run_id: str,
) -> dict[str, "State"]:
    """Drives the unfinished runs, ``window`` at a time; returns and keeps writing the state of each site.

    A site's driver is a task without CPUs of its own, so that Ray Train's controllers, which stay on their driver's
    node, spread over the cluster with it.

    Args:
        works: All runs.
        finished: The generators of those that an earlier call finished, by recipe id.
        faults: By site, why its photographs could not be encoded: it fails without a run.
        window: Runs under way at a time.
        hub_uri: The hub.
        run_id: Names the run over all sites.
    """
    import ray
    import ray.exceptions
    from tqdm import tqdm

    from gretfound import site_states
    from gretfound.site_states import State

    states = {work.recipe_id: state for work, state in first_states(works, finished, faults)}
    sites = {work.recipe_id: work.site_id for work in works}
    waiting = [work for work in works if states[work.recipe_id].state == "waiting"]
    running: dict[Any, Work] = {}
    remote = ray.remote(num_cpus=0, max_retries=0)(finetune_site)

    def tell() -> None:
        told = {recipe: (sites[recipe], state) for recipe, state in states.items()}
        site_states.write(hub_uri, run_id, told)

    with tqdm(total=len(works), initial=len(works) - len(waiting), desc="fine-tuning", unit="site") as bar:
        while waiting or running:
            while waiting and len(running) < window:
                work = waiting.pop(0)
                running[remote.remote(work)] = work
                states[work.recipe_id] = State(state="running")
            tell()
            done, _ = ray.wait(list(running), timeout=site_states.HEARTBEAT_S)
            for reference in done:
                work = running.pop(reference)
                try:
                    states[work.recipe_id] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    lost = str(error).splitlines()[0]
                    states[work.recipe_id] = State(state="failed", message=f"its driver was lost: {lost}")
                bar.update()
    tell()
    return states


def encode(works: list[Work], *, window: int, hub_uri: str) -> dict[str, str]:
    """Encodes the photographs of all runs that are not encoded yet; returns by site what was wrong with it.

    As many actors encode as runs will be under way, each on what a training worker takes.
    """
    from tqdm import tqdm

    from gretfound import encoding, storage
    from gretfound.lineage import Generator, ShardSet

    bases = {base_id: storage.read_record(hub_uri, base_id, Generator) for base_id in {each.base_id for each in works}}
    parts = [
        part
        for work in works
        for part in encoding.parts_of(
            storage.read_record(hub_uri, work.shard_set_id, ShardSet),
            base=bases[work.base_id],
            resolution_px=work.config.tuning.resolution_px,
            cell_dropout=work.config.tuning.cell_dropout,
        )
    ]
    with tqdm(total=sum(part.num_images for part in parts), desc="encoding", unit="image") as bar:
        return encoding.encode(
            hub_uri,
            parts,
            bases=bases,
            num_actors=window,
            cpus_per_actor=works[0].config.cluster.cpus_per_worker,
            gpus_per_actor=works[0].config.cluster.gpus_per_worker,
            on_progress=bar.update,
        )


def window_for(config: Config, available: Mapping[str, float]) -> int:
    """Returns how many runs the cluster holds at a time, at most ``max_concurrent``, at least one."""
    cluster = config.cluster
    if cluster.autoscaling:
        return config.max_concurrent
    needs = {"CPU": cluster.num_workers * cluster.cpus_per_worker, "GPU": cluster.num_workers * cluster.gpus_per_worker}
    fits = [int(available.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount]
    return max(1, min([config.max_concurrent, *fits]))


WITHOUT_EFFECT = ("accumulation", "recomputes_activations")  # but for rounding
LATER_KEYS = (("cell_dropout", 0.0), ("offset_noise", 0.0))  # with what was done before they came


def settings_of(config: Config) -> dict[str, Any]:
    """Returns what a generator depends on; at the defaults of later keys a hub's earlier runs are found again."""
    settings = {
        name: value
        for name, value in canonical(config.tuning).items()
        if name not in WITHOUT_EFFECT and (name, value) not in LATER_KEYS
    }
    return settings | {"held_out_share": config.held_out_share}


def plan(config: Config, hub_uri: str) -> list[Work]:
    """Lists the runs that the configuration asks for: one for each contribution of photographs.

    Raises:
        LineageError: If a site in ``site_ids`` sent none.
    """
    from gretfound import lineage, storage, withdrawal
    from gretfound.lineage import Contribution, Generator, ShardSet

    base = storage.read_record(hub_uri, config.base_id, Generator)
    wanted = set(config.site_ids)
    contributions = [
        each
        for each in withdrawal.read_remaining(hub_uri, Contribution)
        if each.form == "images" and (not wanted or each.site_id in wanted)
    ]
    absent = sorted(wanted - {each.site_id for each in contributions})
    if absent or not contributions:
        raise LineageError(f"no photographs were contributed by {absent or 'any site'}; run jobs.intake first")
    of_contribution = {
        each.parents[0]: each for each in storage.read_records(hub_uri, ShardSet) if each.origin == "real"
    }
    settings = settings_of(config)
    group = lineage.recipe_id("finetune_generators", settings, [base.id, *(each.id for each in contributions)])
    generators = list(withdrawal.read_remaining(hub_uri, Generator))
    works = []
    for contribution in sorted(contributions, key=lambda each: (each.site_id, each.id)):
        if contribution.id not in of_contribution:
            raise LineageError(f"{contribution.id} of {contribution.site_id} has no shard set; run jobs.intake again")
        shard_set = of_contribution[contribution.id]
        start = teacher_of(contribution, base, generators) if config.tuning.objective == "consistency" else base
        parents = [start.id, contribution.id, shard_set.id]
        recipe = lineage.recipe_id("finetune_generator", settings, parents)
        works.append(
            Work(
                hub_uri=hub_uri,
                run_uri=storage.run_uri(hub_uri, recipe),
                recipe_id=recipe,
                site_id=contribution.site_id,
                contribution_id=contribution.id,
                shard_set_id=shard_set.id,
                base_id=start.id,
                group=group,
                config=config,
            )
        )
    return works


def teacher_of(contribution: "Contribution", base: "Generator", generators: "Sequence[Generator]") -> "Generator":
    """Finds the generator of a contribution that a student is made of: the one that was fine-tuned from the base.

    Raises:
        LineageError: If there is none, or more than one.
    """
    found = [
        each
        for each in generators
        if contribution.id in each.parents and not each.is_few_step and base.id in (each.base_id, each.id)
    ]
    if len(found) != 1:
        raise LineageError(
            f"found {len(found)} generators of {contribution.id} of {contribution.site_id} to distil that descend from "
            f"{base.id}: {[each.id for each in found]}; required one: fine-tune it, or name it as base_id with "
            f"site_ids=[{contribution.site_id}]"
        )
    return found[0]


def show_status(argv: list[str]) -> str:
    """Prints the latest run's table, again and again if that is asked for; returns the last one.

    Raises:
        LineageError: If the hub holds no run of this job.
    """
    config = load(StatusConfig, argv)
    from gretfound import site_states, storage

    while True:
        tables = site_states.read(storage.normalised(config.hub_uri), job="finetune_generators")
        if not tables:
            raise LineageError("this hub holds no run of jobs.finetune_generators; see that hub_uri is the hub's")
        latest = tables[-1]
        if not config.every_s or latest.is_over:
            return site_states.to_text(latest)
        print(site_states.to_text(latest), end="\n\n", flush=True)
        time.sleep(config.every_s)


def main(argv: list[str]) -> str:
    """Runs the job; returns the generators' ids, joined by commas."""
    if "--status" in argv:
        return show_status([each for each in argv if each != "--status"])
    config = load(Config, argv)
    from gretfound import fit, site_states, storage
    from gretfound.lineage import Generator

    hub_uri = storage.normalised(config.hub_uri)
    works = plan(config, hub_uri)
    records = {work.recipe_id: storage.finished_record(hub_uri, work.recipe_id, Generator) for work in works}
    finished = {recipe: record.id for recipe, record in records.items() if record is not None}
    unfinished = [work for work in works if work.recipe_id not in finished]
    if unfinished:
        for work in unfinished:
            storage.write_bytes(storage.join(work.run_uri, "config.yaml"), to_yaml(config).encode())
        console.start_ray()
        import ray

        fit.check_resources(**{name: value for name, value in asdict(config.cluster).items() if name != "max_failures"})
        window = window_for(config, ray.cluster_resources())
        sites = {work.recipe_id: (work.site_id, state) for work, state in first_states(works, finished, {})}
        with site_states.telling(hub_uri, works[0].group, sites):
            faults = encode(unfinished, window=window, hub_uri=hub_uri)
        states = drive(works, finished, faults, window=window, hub_uri=hub_uri, run_id=works[0].group)
        failed = {work.site_id: states[work.recipe_id].message for work in unfinished
                  if states[work.recipe_id].state == "failed"}  # fmt: skip
        if failed:
            told = "\n".join(f"  - {site_id}: {message}" for site_id, message in failed.items())
            raise GretfoundError(f"{len(failed)} of {len(works)} sites failed; the others are finished:\n{told}")
        finished = {recipe: state.generator_id for recipe, state in states.items()}
    return ",".join(finished[work.recipe_id] for work in works)


if __name__ == "__main__":
    console.run(Config, main)
