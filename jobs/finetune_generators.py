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
from dataclasses import asdict, dataclass

from gretfound.config import load, setting, to_yaml
from gretfound.errors import GretfoundError, LineageError
from jobs import console, site_runs
from jobs.tuning import Config, plan


@dataclass(frozen=True)
class StatusConfig:
    """What `--status` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    every_s: float = setting(0.0, "seconds between tables until all sites have ended; 0: one table")


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
        window = site_runs.window_for(config, ray.cluster_resources())
        sites = {work.recipe_id: (work.site_id, state) for work, state in site_runs.first_states(works, finished, {})}
        with site_states.telling(hub_uri, works[0].group, sites):
            faults = site_runs.encode(unfinished, window=window, hub_uri=hub_uri)
        states = site_runs.drive(works, finished, faults, window=window, hub_uri=hub_uri, run_id=works[0].group)
        failed = {work.site_id: states[work.recipe_id].message for work in unfinished
                  if states[work.recipe_id].state == "failed"}  # fmt: skip
        if failed:
            told = "\n".join(f"  - {site_id}: {message}" for site_id, message in failed.items())
            raise GretfoundError(f"{len(failed)} of {len(works)} sites failed; the others are finished:\n{told}")
        finished = {recipe: state.generator_id for recipe, state in states.items()}
    return ",".join(finished[work.recipe_id] for work in works)


if __name__ == "__main__":
    console.run(Config, main)
