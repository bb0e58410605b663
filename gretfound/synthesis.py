"""Synthesis: generators draw photographs for captions that follow each site's released summary, into shards.

The work is cut into parts. A part is a pure function of (generator, seed, part number); its shard and then its receipt
are written by the actor that drew it. A job that is run again draws only the parts without a receipt, so no photograph
is lost or doubled.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import ray
import ray.data
import torch
from diffusers import StableDiffusionPipeline

from gretfound import fundus, grading, inspection, lineage, matching, metadata, shard, storage, withdrawal
from gretfound.errors import LineageError
from gretfound.fundus import Photograph
from gretfound.generator.pipeline import load_pipeline
from gretfound.generator.sampling import draw_photographs
from gretfound.lineage import Contribution, Generator, ShardSet

log = logging.getLogger(__name__)
SUMMARY_NAME = "summary/metadata_summary.json"
SEED_HEX_DIGITS = 15


@dataclass(frozen=True, kw_only=True)
class Part:
    """One unit of work: images ``first_image`` to ``first_image + num_images`` of a generator's shard set."""

    generator_id: str
    contribution_id: str
    site_id: str
    run_uri: str
    index: int
    first_image: int
    num_images: int

    @property
    def receipt_uri(self) -> str:
        """Where the finished part is noted."""
        return storage.join(self.run_uri, "parts", f"{self.index:06d}.json")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A photograph to be drawn."""

    caption: str
    cells: Mapping[str, Any]
    seed: int


def cut_into_parts(
    *, generator: Generator, contribution_id: str, run_uri: str, num_images: int, images_per_shard: int
) -> list[Part]:
    """Cuts a generator's images into parts of ``images_per_shard``; the last one may be smaller."""
    return [
        Part(
            generator_id=generator.id,
            contribution_id=contribution_id,
            site_id=generator.site_id,
            run_uri=run_uri,
            index=index,
            first_image=first,
            num_images=min(images_per_shard, num_images - first),
        )
        for index, first in enumerate(range(0, num_images, images_per_shard))
    ]


def contribution_of(hub_uri: str, generator: Generator) -> Contribution:
    """Returns the contribution that a generator was trained on.

    Raises:
        LineageError: If it has none, as a base generator has.
    """
    contributions = storage.read_parents(hub_uri, generator, Contribution)
    if not contributions:
        raise LineageError(
            f"{generator.id} was trained on no contribution, so there is no summary to draw captions from"
        )
    return contributions[0]


def generators_of(
    hub_uri: str, generator_ids: Sequence[str], *, is_few_step: bool = False, includes_aside: bool = False
) -> list[Generator]:
    """Returns the generators of these ids or, without ids, those of all sites that have not withdrawn.

    Args:
        hub_uri: The hub.
        generator_ids: Record ids, or none.
        is_few_step: Whether the few-step students are meant, or the generators that draw with a solver.
        includes_aside: Whether those in quarantine are meant, too: to be looked at, not to draw for a corpus.

    Raises:
        LineageError: If there is none, or one of them descends from a site that has withdrawn, is in quarantine or is
            of the other sort.
    """
    if generator_ids:
        named = [storage.read_record(hub_uri, generator_id, Generator) for generator_id in generator_ids]
        for record in named:
            withdrawal.require_unmarked(hub_uri, record, allows_aside=includes_aside)
            if record.is_few_step != is_few_step:
                sorts = ["one that draws with a solver", "a few-step one"]
                raise LineageError(
                    f"{record.id}: found {sorts[record.is_few_step]}; required {sorts[is_few_step]} "
                    "(jobs.synthesize is_few_step)"
                )
        return named
    every = withdrawal.read_remaining(hub_uri, Generator, includes_aside=includes_aside)
    remaining = [record for record in every if record.site_id]
    found_ones = [record for record in remaining if record.is_few_step == is_few_step]
    if not found_ones:
        made_by = "tuning.objective=consistency" if is_few_step else "or jobs.intake for weights"
        raise LineageError(f"the hub holds no such generator of a site; run jobs.finetune_generators, {made_by}")
    return found_ones


def make_wishes(groups: Sequence[matching.Group], part: Part, *, seed: int) -> list[Wish]:
    """Draws the captions and seeds of a part from what `matching` makes of the site's released summary."""
    key = [seed, part.generator_id, part.index]
    rows = matching.draw_cells(groups, num=part.num_images, seed=seed_from(["cells", *key]))
    return [
        Wish(caption=metadata.caption(cells), cells=cells, seed=seed_from(["image", *key, row]))
        for row, cells in enumerate(rows)
    ]


def seed_from(content: list[Any]) -> int:
    """Returns a seed that content decides, the same on every machine."""
    return int(lineage.digest_of(content)[:SEED_HEX_DIGITS], 16)


class Painter:
    """Draws parts; one actor of the pool. It keeps the last generator loaded.

    Args:
        hub_uri: The hub.
        seed: Seeds captions and images.
        balance: What to draw more evenly than the site has it, as `matching.fit_groups` takes it.
        num_steps: Steps of the solver.
        guidance_scale: Weight of the caption.
        batch_size: Photographs drawn together.
        jpeg_quality: 1 to 100; 0 stores PNG, without loss.
        is_screened: Whether what `inspection` rejects is left out.
        is_graded: Whether what contradicts its row is left out, by the graders in the run's folder.
        device: ``cpu`` or ``cuda``.
        precision: ``float32`` or ``bfloat16``.
    """

    def __init__(
        self,
        *,
        hub_uri: str,
        seed: int,
        balance: Mapping[str, float],
        num_steps: int,
        guidance_scale: float,
        batch_size: int,
        jpeg_quality: int,
        is_screened: bool,
        is_graded: bool,
        device: str,
        precision: str,
    ) -> None:
        self._hub_uri, self._seed, self._balance, self._jpeg_quality = hub_uri, seed, balance, jpeg_quality
        self._is_screened, self._is_graded, self._batch_size = is_screened, is_graded, batch_size
        self._drawing: dict[str, Any] = {
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
        }
        self._device, self._precision = device, precision
        self._loaded: tuple[str, Any] = ("", None)
        self._graders: tuple[str, Any] = ("", None)

    def __call__(self, parts: dict[str, npt.NDArray[Any]]) -> dict[str, list[Any]]:
        """Draws each part that has no receipt yet; returns how many photographs each one holds."""
        names = list(Part.__dataclass_fields__)
        rows = [
            Part(**dict(zip(names, row, strict=True))) for row in zip(*(parts[n].tolist() for n in names), strict=True)
        ]
        for part in rows:
            if not storage.exists(part.receipt_uri):
                self.paint(part)
        return {"num_images": [part.num_images for part in rows]}

    def paint(self, part: Part) -> None:
        """Draws one part, writes its shard and then its receipt."""
        summary = read_summary(self._hub_uri, part.contribution_id)
        groups = matching.fit_groups(summary, balance=self._balance)
        wishes = make_wishes(groups, part, seed=self._seed)
        drawn = draw_photographs(
            pipeline=self._pipeline(part.generator_id),
            captions=[wish.caption for wish in wishes],
            seeds=[wish.seed for wish in wishes],
            **self._drawing,
        )
        rejected: Counter[str] = Counter()
        inspector = inspection.Inspector(num_images=part.num_images)

        def inspected() -> Iterator[tuple[Photograph, Wish]]:
            for image, wish in zip(drawn, wishes, strict=True):
                if self._is_screened and (reason := inspector.judge(image)):
                    rejected[reason] += 1
                    continue
                yield image, wish

        def rows() -> Iterator[dict[str, Any]]:
            for image, wish in self._graded(part, inspected(), rejected) if self._is_graded else inspected():
                jpeg = self._jpeg_quality
                yield shard.row_of(
                    fundus.encode_jpeg(image, quality=jpeg) if jpeg else fundus.encode_png(image),
                    site_id=part.site_id,
                    origin="synthetic",
                    cells=wish.cells,
                    generator_id=part.generator_id,
                    seed=wish.seed,
                    prompt=wish.caption,
                )

        written = shard.write_shard(self._hub_uri, rows())
        receipt = {"shard": asdict(written) if written.num_images else None, "rejected": dict(rejected)}
        storage.write_json(part.receipt_uri, receipt)

    def _graded(
        self, part: Part, drawn: Iterator[tuple[Photograph, Wish]], rejected: Counter[str]
    ) -> Iterator[tuple[Photograph, Wish]]:
        if self._graders[0] != part.run_uri:
            uri = storage.join(part.run_uri, grading.NAME)
            self._graders = (part.run_uri, grading.read(self._hub_uri, uri, device=self._device))
        while block := list(itertools.islice(drawn, self._batch_size)):
            reasons = self._graders[1].judge([image for image, _ in block], [dict(wish.cells) for _, wish in block])
            rejected.update(filter(None, reasons))
            yield from (each for each, reason in zip(block, reasons, strict=True) if reason is None)

    def _pipeline(self, generator_id: str) -> Any:
        if self._loaded[0] != generator_id:
            loaded = load_generator(self._hub_uri, generator_id, device=self._device, precision=self._precision)
            self._loaded = (generator_id, loaded)
        return self._loaded[1]


def load_generator(hub_uri: str, generator_id: str, *, device: str, precision: str) -> StableDiffusionPipeline:
    """Loads a generator of the hub; ``precision`` is ``float32`` or ``bfloat16``."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    record = storage.read_record(hub_uri, generator_id, Generator)
    with storage.scratch_folder() as folder:
        path = storage.fetch_folder(hub_uri, record, Path(folder))
        return load_pipeline(path, device=device, dtype=dtype)


def read_summary(hub_uri: str, contribution_id: str) -> metadata.MetadataSummary:
    """Reads the summary of its metadata that a site released with its contribution."""
    uri = storage.join(hub_uri, Contribution.folder, contribution_id, SUMMARY_NAME)
    return metadata.summary_from_json(storage.read_json(uri))


def paint(
    parts: Sequence[Part],
    *,
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    on_progress: Callable[[int], object],
    **painter: Any,
) -> None:
    """Draws parts with a pool of actors on the cluster; those that have a receipt are skipped.

    Args:
        parts: What to draw.
        num_actors: Actors, each with a pipeline loaded.
        cpus_per_actor: CPUs that each one reserves.
        gpus_per_actor: GPUs that each one reserves.
        on_progress: Told the number of photographs of each finished part.
        painter: The arguments of `Painter`.
    """
    missing = [part for part in parts if not storage.exists(part.receipt_uri)]
    on_progress(sum(part.num_images for part in parts) - sum(part.num_images for part in missing))
    done = work_off(
        [asdict(part) for part in missing],
        Painter,
        painter,
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
    )
    for row in done:
        on_progress(int(row["num_images"]))


def work_off(
    parts: list[dict[str, Any]],
    worker: type,
    settings: Mapping[str, Any],
    *,
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
) -> Iterator[dict[str, Any]]:
    """Gives parts, one at a time, to a pool of actors on the cluster; yields what is told of each when it is done.

    Args:
        parts: A row each.
        worker: The actor; called with a batch of one row, it returns another one.
        settings: The arguments that an actor is made with.
        num_actors: Actors at most.
        cpus_per_actor: CPUs that each one reserves.
        gpus_per_actor: GPUs that each one reserves.
    """
    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        worker,
        fn_constructor_kwargs=dict(settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(parts)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor,
    )
    yield from done.iter_rows()


def gather(parts: Sequence[Part], *, generator: Generator, recipe_id: str, graded_by: Sequence[str] = ()) -> ShardSet:
    """Makes the shard set of a generator's finished parts; ``graded_by`` are ids of what its graders were fitted on.

    Raises:
        LineageError: If every photograph was rejected.
    """
    receipts = [storage.read_json(part.receipt_uri) for part in parts]
    shards = tuple(lineage.shard_from_json(receipt["shard"]) for receipt in receipts if receipt["shard"])
    rejected: Counter[str] = Counter()
    for receipt in receipts:
        rejected.update(receipt["rejected"])
    if not shards:
        raise LineageError(f"{generator.id} drew no usable photograph; rejected: {dict(rejected)}; train it longer")
    return ShardSet(
        parents=(generator.id, *graded_by),
        recipe_id=recipe_id,
        site_id=generator.site_id,
        origin="synthetic",
        num_images=sum(each.num_images for each in shards),
        shards=shards,
        rejected=dict(sorted(rejected.items())),
    )
