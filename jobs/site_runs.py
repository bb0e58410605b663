"""Fine-tunes the generators of many sites side by side: one Ray Train run a site, a bounded number at a time."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gretfound.config import canonical
from gretfound.errors import GretfoundError
from jobs.tuning import Config, Work

if TYPE_CHECKING:
    from gretfound.site_states import State


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
