"""What Ray does to evaluate generators: photographs are drawn or read and taken to every space in parts, side by side.

A part is a few photographs of one *side* of a generator: ``held_out`` and ``trained_on`` real ones, brought to the
generator's size as for its training, ``generated`` ones, those that its ``base`` draws for the same captions and seeds,
and ``sweep``, the same seed with one value changed. What is measured of a part is a file under HUB/runs/RECIPE/parts/;
those that are there are not made again. Of real photographs such a file holds features, never pixels.
"""

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions

from gretfound import (
    duplicates,
    fundus,
    holdout,
    inspection,
    lineage,
    matching,
    metadata,
    release,
    shard,
    storage,
    synthesis,
    tracking,
)
from gretfound.errors import GretfoundError, StorageError
from gretfound.evaluation import appraisal, features, generator_report
from gretfound.evaluation.appraisal import Side
from gretfound.evaluation.fidelity import Space
from gretfound.evaluation.generator_report import Contrast, Drawn, Pictures, Sweep
from gretfound.fundus import Photograph
from gretfound.generator.sampling import draw_photographs
from gretfound.lineage import Contribution, Generator, Report, ShardSet
from gretfound.metadata import BLANK, Cells, MetadataSummary
from gretfound.synthesis import Wish

SIDES = ("held_out", "trained_on", "generated", "base", "sweep")
VESSEL_SIDES = SIDES[:-1]
TRAINING_KEYS = ("method", "resolution_px", "num_images", "images_seen", "final_loss")
PICTURE_PX = 288  # of real photographs in a report: twice what a page shows them at
TRAINING_METRICS = "training/metrics.jsonl"  # of a contribution whose generator was trained at the site
MAX_SWEPT_VALUES = 6
CELL_KEYS = tuple(field.name for field in metadata.ARROW_FIELDS)
SHARD_COLUMNS = ["image", "image_id", *CELL_KEYS]
PART_FIELDS = (
    pa.field("image", pa.binary()),  # of drawn photographs only
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("patient", pa.string(), nullable=False),
    pa.field("cells", pa.string(), nullable=False),  # as JSON
    pa.field("caption", pa.string(), nullable=False),
    pa.field("seed", pa.int64()),
    pa.field("hash", pa.binary(64), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a real photograph lies: a row of a row group of a shard."""

    path: str
    row_group: int
    row: int
    image_id: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one generator is measured on.

    Args:
        generator: The generator.
        run_uri: Its run's folder.
        contribution: What it was trained on.
        missing: Why there are no held-out real photographs; empty where there are.
        held_out: Those that it is measured against.
        trained_on: Those that it was trained on, as many as are looked at.
        num_held_out: All that were held out.
        num_trained_on: All that it was trained on.
        num_near_duplicates: Held-out ones that are left out, since a photograph of the training is nearly the same.
    """

    generator: Generator
    run_uri: str
    contribution: Contribution
    missing: str = ""
    held_out: tuple[Place, ...] = ()
    trained_on: tuple[Place, ...] = ()
    num_held_out: int = 0
    num_trained_on: int = 0
    num_near_duplicates: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One unit of work: photographs ``first`` to ``first + num`` of a side.

    ``places`` are of real ones only; what is drawn has ``wishes`` of its own, or those of `wishes_of`.
    """

    run_uri: str
    generator_id: str
    contribution_id: str
    side: str
    num: int
    resolution_px: int
    index: int = 0
    first: int = 0
    places: tuple[Place, ...] = ()
    wishes: tuple[Wish, ...] = ()

    @property
    def uri(self) -> str:
        """Where what was measured lies."""
        return storage.join(self.run_uri, "parts", f"{self.side}-{self.index:06d}.parquet")


def real_shards(hub_uri: str, generators: Sequence[Generator]) -> dict[str, ShardSet]:
    """Returns by generator id the real photographs that its contribution brought; none where they stay at the site."""
    brought = {
        parent: each
        for each in storage.read_records(hub_uri, ShardSet)
        if each.origin == "real"
        for parent in each.parents
    }
    found = {each.id: brought.get(synthesis.contribution_of(hub_uri, each).id) for each in generators}
    return {generator_id: each for generator_id, each in found.items() if each is not None}


def plan(hub_uri: str, generator: Generator, shard_set: ShardSet | None, *, run_uri: str, max_real: int) -> Plan:
    """Finds the real photographs that a generator can be measured against.

    Args:
        hub_uri: The hub.
        generator: A site's generator.
        shard_set: The site's real photographs, with signatures; None where they stay at the site.
        run_uri: Its run's folder.
        max_real: Photographs at most, held out and trained on each; the first by image id.
    """
    contribution = synthesis.contribution_of(hub_uri, generator)
    if shard_set is None:
        missing = (
            "not measurable at the hub: this site's photographs stay at the site, and its package says nothing of "
            "fidelity"
        )
        return Plan(generator=generator, run_uri=run_uri, contribution=contribution, missing=missing)
    held_out = read_holdout(hub_uri, generator)
    if held_out is None or not held_out.image_ids:
        found = "the generator's record does not say what was held out" if held_out is None else "none was held out"
        missing = (
            f"not measurable: {found}; required {holdout.MIN_PHOTOGRAPHS} photographs or more that it was not trained "
            "on: run jobs.finetune_generators with a larger held_out_share"
        )
        return Plan(generator=generator, run_uri=run_uri, contribution=contribution, missing=missing)
    places = list(places_of(hub_uri, shard_set))
    is_held_out_N = np.isin([each.image_id for each in places], held_out.image_ids)
    hashes_NW = duplicates.read_signatures(hub_uri, shard_set.shards).hashes
    again = duplicates.find_matches(hashes_NW[~is_held_out_N], hashes_NW[is_held_out_N])[:, 1]
    near = np.flatnonzero(is_held_out_N)[np.unique(again)]
    is_reference_N = is_held_out_N.copy()
    is_reference_N[near] = False
    missing = "" if is_reference_N.any() else "not measurable: every held-out photograph is nearly one of the training"
    return Plan(
        generator=generator,
        run_uri=run_uri,
        contribution=contribution,
        missing=missing,
        held_out=choose_places(itertools.compress(places, is_reference_N), num_images=max_real),
        trained_on=choose_places(itertools.compress(places, ~is_held_out_N), num_images=max_real),
        num_held_out=int(is_held_out_N.sum()),
        num_trained_on=int((~is_held_out_N).sum()),
        num_near_duplicates=len(near),
    )


def read_holdout(hub_uri: str, generator: Generator) -> holdout.Holdout | None:
    """Returns what a generator was not trained on, or None where its folder does not say."""
    if holdout.FILE_NAME not in {file.path for file in generator.files}:
        return None
    return holdout.from_json(storage.read_json(storage.join(storage.record_uri(hub_uri, generator), holdout.FILE_NAME)))


def places_of(hub_uri: str, shard_set: ShardSet) -> Iterator[Place]:
    """Yields where each photograph of a shard set lies, in order."""
    for part in shard_set.shards:
        with shard.open_shard(storage.join(hub_uri, part.path)) as parquet:
            for group in range(parquet.num_row_groups):
                ids = parquet.read_row_group(group, columns=["image_id"])["image_id"].to_pylist()
                for row, image_id in enumerate(ids):
                    yield Place(path=part.path, row_group=group, row=row, image_id=image_id)


def choose_places(places: Iterable[Place], *, num_images: int) -> tuple[Place, ...]:
    """Returns the first by image id, each once, in the order in which they lie, so that a part reads few row groups."""
    wanted = {each.image_id: each for each in places}
    chosen = [wanted[image_id] for image_id in sorted(wanted)[:num_images]]
    return tuple(sorted(chosen, key=lambda each: (each.path, each.row_group, each.row)))


def cut_into_parts(
    hub_uri: str, found: Plan, *, images_per_part: int, compares_base: bool, **wishing: Any
) -> list[Part]:
    """Cuts everything that has to be drawn or read for one generator into parts of ``images_per_part``.

    Args:
        hub_uri: The hub.
        found: What it is measured on.
        images_per_part: Photographs a part; the last one of a side may have fewer.
        compares_base: Whether the base draws as well.
        wishing: The other arguments of `wishes_of`.
    """
    generator = found.generator
    summary = synthesis.read_summary(hub_uri, found.contribution.id)
    num_images, num_swept = (len(wishes_of(summary, is_swept=is_swept, **wishing)) for is_swept in (False, True))
    sides: dict[str, tuple[str, int, tuple[Place, ...]]] = {
        "held_out": (generator.id, len(found.held_out), found.held_out),
        "trained_on": (generator.id, len(found.trained_on), found.trained_on),
        "generated": (generator.id, num_images, ()),
        "base": (generator.base_id, num_images if compares_base and found.held_out else 0, ()),
        "sweep": (generator.id, num_swept, ()),
    }
    wholes = [
        Part(
            run_uri=found.run_uri,
            generator_id=generator_id,
            contribution_id=found.contribution.id,
            side=side,
            num=num,
            resolution_px=generator.resolution_px,
            places=places,
        )
        for side, (generator_id, num, places) in sides.items()
    ]
    return [part for whole in wholes for part in cut(whole, images_per_part=images_per_part)]


def cut(whole: Part, *, images_per_part: int) -> list[Part]:
    """Cuts a whole side, given as one part, into parts of ``images_per_part``; the last one may have fewer."""
    return [
        replace(
            whole,
            index=index,
            first=first,
            num=min(images_per_part, whole.num - first),
            places=whole.places[first : first + images_per_part],
            wishes=whole.wishes[first : first + images_per_part],
        )
        for index, first in enumerate(range(0, whole.num, images_per_part))
    ]


def wishes_of(
    summary: MetadataSummary,
    *,
    is_swept: bool,
    num_images: int,
    attributes: Sequence[str],
    num_seeds: int,
    seed: int,
) -> list[Wish]:
    """Asks for what is drawn of a generator, with seeds that no other job draws with.

    Args:
        summary: What the site released.
        is_swept: Asks for each value of each attribute with the same seeds, all other columns with the site's commonest
            value; else for captions as synthesis draws them.
        num_images: How many of the latter.
        attributes: Columns that are swept.
        num_seeds: Seeds of each sweep.
        seed: Decides captions and seeds.
    """
    if not is_swept:
        drawn = matching.draw_cells(matching.fit_groups(summary, balance={}), num=num_images, seed=seed)
        return [wish_for(cells, "evaluated", seed, row) for row, cells in enumerate(drawn)]
    usual = usual_cells(summary)
    return [
        wish_for(usual | metadata.cells_of(attribute, text), "swept", seed, number)
        for attribute in appraisal.attributes_of(summary.counts, attributes)
        for number in range(num_seeds)
        for text in swept_values(summary, attribute)
    ]


def usual_cells(summary: MetadataSummary) -> Cells:
    """Returns the commonest value of each column of a site's summary."""
    usual: Cells = {}
    for key in sorted(summary.counts):
        usual |= metadata.cells_of(key, next(iter(_commonest(summary, key)), BLANK))
    return usual


def wish_for(cells: Cells, *seeded_by: Any) -> Wish:
    """Asks for a photograph of these cells; what it is seeded by decides its first latents, the same everywhere."""
    return Wish(caption=metadata.caption(cells), cells=cells, seed=synthesis.seed_from(list(seeded_by)))


def swept_values(summary: MetadataSummary, attribute: str) -> list[str]:
    """Returns the values of a column that a sweep shows: the commonest ones, in their own order."""
    return sorted(_commonest(summary, attribute)[:MAX_SWEPT_VALUES])


def _commonest(summary: MetadataSummary, key: str) -> list[str]:
    return sorted(appraisal.told_values(summary.counts, key), key=lambda text: -(summary.counts[key][text] or 0))


class Examiner:
    """Draws or reads parts and takes them to every space; one actor of the pool. It keeps the last generator loaded.

    Args:
        hub_uri: The hub.
        encoder_id: The encoder whose features are the second space; empty: thumbnails.
        batch_size: Photographs drawn together, and held at a time.
        device: ``cpu`` or ``cuda``.
        precision: ``float32`` or ``bfloat16``, of generators.
        wishing: Arguments of `wishes_of`, for parts without wishes of their own.
        drawing: ``num_steps`` and ``guidance_scale`` of `draw_photographs`, for parts that are drawn.
    """

    def __init__(
        self,
        *,
        hub_uri: str,
        encoder_id: str,
        batch_size: int,
        device: str,
        precision: str = "float32",
        wishing: Mapping[str, Any] = MappingProxyType({}),
        drawing: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._hub_uri, self._device, self._precision, self._batch_size = hub_uri, device, precision, batch_size
        self._wishing, self._drawing = dict(wishing), dict(drawing)
        self._spaces = spaces_of(hub_uri, encoder_id, device=device)
        self._loaded: tuple[str, Any] = ("", None)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Measures each part, given as JSON, that is not there yet; returns how many photographs each one has."""
        parts = [part_from_json(text) for text in batch["part"].tolist()]
        for part in parts:
            if not storage.exists(part.uri):
                self.examine(part)
        return {"num_images": [part.num for part in parts]}

    def examine(self, part: Part) -> None:
        """Draws or reads one part, takes it to every space and writes what was measured."""
        spaces: dict[str, Space] = {} if part.side == "sweep" else dict(self._spaces)
        if part.side in VESSEL_SIDES:
            spaces[appraisal.VESSELS] = appraisal.vessel_space(part.resolution_px)
        photographs = self._read(part) if part.places else self._draw(part)
        rows: list[dict[str, Any]] = []
        while block := list(itertools.islice(photographs, self._batch_size)):
            images = [image for image, _ in block]
            found = {name: space(images) for name, space in spaces.items()}
            for place, (image, row) in enumerate(block):
                hashed = duplicates.hash_photograph(image, fundus.find_field_of_view(image))
                measured = {name: feature_ND[place].tolist() for name, feature_ND in found.items()}
                rows.append({**row, "hash": hashed.astype("<u8").tobytes(), **measured})
        schema = pa.schema([*PART_FIELDS, *(pa.field(name, pa.list_(pa.float32())) for name in spaces)])
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), stream, compression="ZSTD", use_dictionary=False)
        storage.write_bytes(part.uri, stream.getvalue())

    def _read(self, part: Part) -> Iterator[tuple[Photograph, dict[str, Any]]]:
        for row in read_rows(self._hub_uri, part.places):
            image = fundus.decode_photograph(row["image"])
            cells = {key: row[key] for key in CELL_KEYS if row[key] is not None}
            yield (
                fundus.to_square(image, fundus.find_field_of_view(image), part.resolution_px),
                {
                    "image_id": row["image_id"],
                    "patient": row["patient"] or "",
                    "cells": json.dumps(cells),
                    "caption": "",
                },
            )

    def _draw(self, part: Part) -> Iterator[tuple[Photograph, dict[str, Any]]]:
        asked: Sequence[Wish] = part.wishes
        if not asked:
            summary = synthesis.read_summary(self._hub_uri, part.contribution_id)
            wishes = wishes_of(summary, is_swept=part.side == "sweep", **self._wishing)
            asked = wishes[part.first : part.first + part.num]
        drawn = draw_photographs(
            pipeline=self._pipeline(part.generator_id),
            captions=[wish.caption for wish in asked],
            seeds=[wish.seed for wish in asked],
            batch_size=self._batch_size,
            **self._drawing,
        )
        for image, wish in zip(drawn, asked, strict=True):
            yield (
                image,
                {
                    "image": fundus.encode_png(image),
                    "image_id": fundus.pixel_digest(image),
                    "patient": "",
                    "cells": json.dumps(dict(wish.cells)),
                    "caption": wish.caption,
                    "seed": wish.seed,
                },
            )

    def _pipeline(self, generator_id: str) -> Any:
        if self._loaded[0] != generator_id:
            loaded = synthesis.load_generator(
                self._hub_uri, generator_id, device=self._device, precision=self._precision
            )
            self._loaded = (generator_id, loaded)
        return self._loaded[1]


def spaces_of(hub_uri: str, encoder_id: str, *, device: str) -> dict[str, Space]:
    """Returns the two spaces of features by name: the fixed one, and an encoder's or, without one, thumbnails."""
    spaces: dict[str, Space] = {"scattering": features.scattering_space}
    if not encoder_id:
        return spaces | {"thumbnail": features.thumbnail_space}
    return spaces | {"encoder": features.space_of(hub_uri, encoder_id, device=device)}


def examine_parts(
    parts: Sequence[Part],
    *,
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    on_progress: Callable[[int], object],
    **examiner: Any,
) -> None:
    """Works off the parts that are not there yet with a pool of actors; arguments as of `synthesis.work_off`."""
    missing = [part for part in parts if not storage.exists(part.uri)]
    on_progress(sum(part.num for part in parts) - sum(part.num for part in missing))
    done = synthesis.work_off(
        [{"part": json.dumps(asdict(part))} for part in missing],
        Examiner,
        examiner,
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
    )
    for row in done:
        on_progress(int(row["num_images"]))


def part_from_json(text: str) -> Part:
    """Rebuilds a part from the JSON of its fields."""
    content = json.loads(text)
    places, wishes = (Place(**each) for each in content["places"]), (Wish(**each) for each in content["wishes"])
    return Part(**{**content, "places": tuple(places), "wishes": tuple(wishes)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Examined:
    """A side as its parts' files hold it: rows in order, features apart."""

    side: Side
    hashes: duplicates.Words
    rows: tuple[dict[str, Any], ...]

    def where(self, is_kept_N: npt.NDArray[np.bool_]) -> "Examined":
        """Returns some of the photographs."""
        rows = tuple(itertools.compress(self.rows, is_kept_N))
        return Examined(side=self.side.where(is_kept_N), hashes=self.hashes[is_kept_N], rows=rows)


def read_examined(parts: Sequence[Part], side: str) -> Examined | None:
    """Reads what was measured of one side, or None where there is nothing to measure."""
    files = [pq.read_table(io.BytesIO(storage.read_bytes(part.uri))) for part in parts if part.side == side]
    if not files:
        return None
    table = pa.concat_tables(files)
    names = [name for name in table.column_names if name not in {field.name for field in PART_FIELDS}]
    rows = table.select([field.name for field in PART_FIELDS]).to_pylist()
    return Examined(
        side=Side(
            features={name: np.array(table[name].to_pylist(), dtype=np.float32) for name in names},
            image_ids=tuple(row["image_id"] for row in rows),
            patients=tuple(row["patient"] for row in rows),
            cells=tuple(json.loads(row["cells"]) for row in rows),
        ),
        hashes=duplicates.words_of(table["hash"]),
        rows=tuple(rows),
    )


def publish(
    hub_uri: str,
    found: Plan,
    parts: Sequence[Part],
    *,
    recipe_id: str,
    encoder_id: str,
    attributes: Sequence[str],
    is_screened: bool,
    num_pictures: int,
    num_resamples: int,
    seed: int,
    project: str,
    group: str,
    settings: Mapping[str, Any],
) -> Report:
    """Measures one generator from its finished parts and writes its report; the record comes last.

    Args:
        hub_uri: The hub.
        found: What it is measured on.
        parts: All of its parts, finished.
        recipe_id: Of its run.
        encoder_id: Of the second space; empty: thumbnails.
        attributes: Columns by whose values conditions are told apart.
        is_screened: Whether the figures leave out what `inspection` rejects; it is counted either way.
        num_pictures: Photographs shown of each condition and side.
        num_resamples: Bootstrap resamples of the patients.
        seed: Of the resamples.
        project: The W&B project.
        group: Of all generators measured together.
        settings: What decides the result, for W&B and the report.
    """
    generator = found.generator
    summary = synthesis.read_summary(hub_uri, found.contribution.id)
    examined = {side: read_examined(parts, side) for side in SIDES}
    drawn = examined["generated"]
    assert drawn is not None  # at least one photograph is drawn
    reasons = _inspect(drawn)
    kept = drawn.where(np.array([not (reason and is_screened) for reason in reasons]))
    held_out, trained_on, base = examined["held_out"], examined["trained_on"], examined["base"]
    if base is not None and is_screened:
        base = base.where(np.array([not reason for reason in _inspect(base)]))
    missing = found.missing or ("" if kept.rows else "not measurable: inspection rejected every drawn photograph")
    measured: dict[str, Any] = appraisal.nothing(missing)
    num_copies = None
    if held_out is not None and trained_on is not None and not missing:
        sides = {"generated": kept.side} | ({"base": base.side} if base and base.rows else {})
        sides |= {"trained_on": trained_on.side}
        measured = appraisal.appraise(
            held_out.side,
            sides,
            spaces=[name for name in held_out.side.features if name != appraisal.VESSELS],
            trained_on=_trained_on(hub_uri, generator),
            tables=summary.counts,
            attributes=attributes,
            num_resamples=num_resamples,
            seed=seed,
        )
        num_copies = len(np.unique(duplicates.find_matches(trained_on.hashes, kept.hashes)[:, 1]))
    content = {
        **measured,
        "missing": missing,
        "site_id": generator.site_id,
        "generator_id": generator.id,
        "base_id": generator.base_id,
        "encoder_id": encoder_id,
        "form": found.contribution.form,
        "training": {key: getattr(generator, key) for key in TRAINING_KEYS},
        "num_drawn": len(reasons),
        "num_kept": len(kept.rows),
        "num_copies": num_copies,
        "rejected": dict(sorted(Counter(filter(None, reasons)).items())),
        "held_out": _describe_held_out(found, held_out),
        "settings": dict(settings),
        "lineage": release.read_lineage(hub_uri, generator),
    }
    attributes = appraisal.attributes_of(summary.counts, attributes)
    pictures = Pictures(
        contrasts=tuple(
            contrast
            for attribute in attributes
            for contrast in _contrasts(hub_uri, found, summary, attribute, kept, held_out, num_pictures)
        ),
        sweeps=_sweeps(examined["sweep"], summary, attributes),
        rejected=_rejected(drawn, reasons, num_pictures),
    )
    losses = read_losses(hub_uri, found)
    with tracking.Tracker(found.run_uri, run_id=recipe_id, project=project, group=group, settings=settings) as tracker:
        tracker.write({"images_seen": generator.images_seen, **_flat_figures(content["figures"])})
    with storage.scratch_folder() as scratch:
        generator_report.write_report(Path(scratch), content, pictures=pictures, loss_curve=losses)
        digest = content["held_out"]["digest"]
        record = Report(
            parents=(generator.id, *([encoder_id] if encoder_id else [])),
            recipe_id=recipe_id,
            evaluation_sets=(f"{generator.site_id} held out:{digest}",) if digest else (),
            num_images=len(found.held_out),
        )
        return storage.publish_folder(hub_uri, Path(scratch), record)


def publish_all(
    hub_uri: str, found: Mapping[str, Plan], parts: Mapping[str, Sequence[Part]], **settings: Any
) -> dict[str, Report]:
    """Publishes every generator's report, each in a Ray task of one CPU; one that fails leaves the others alone.

    Args:
        hub_uri: The hub.
        found: What is measured, by recipe id.
        parts: The finished parts, by recipe id.
        settings: The other arguments of `publish`.

    Raises:
        GretfoundError: Naming the sites that failed, once the others' reports are written.
    """
    remote = ray.remote(num_cpus=1)(publish)
    pending = {
        recipe_id: remote.remote(hub_uri, each, parts[recipe_id], recipe_id=recipe_id, **settings)
        for recipe_id, each in found.items()
    }
    reports: dict[str, Report] = {}
    failed: dict[str, str] = {}
    for recipe_id, reference in pending.items():
        try:
            reports[recipe_id] = ray.get(reference)
        except ray.exceptions.RayError as error:
            failed[found[recipe_id].generator.site_id] = str(error).strip().splitlines()[-1]
    if failed:
        told = "\n".join(f"  - {site_id}: {message}" for site_id, message in failed.items())
        raise GretfoundError(
            f"{len(failed)} of {len(pending)} generators were not measured; the others' reports are written:\n{told}"
        )
    return reports


def plan_all(
    hub_uri: str, generators: Mapping[str, Generator], shard_sets: Mapping[str, ShardSet], *, max_real: int
) -> dict[str, Plan]:
    """Plans every generator by its recipe id, each in a Ray task of one CPU; ``shard_sets`` as of `real_shards`."""
    remote = ray.remote(num_cpus=1)(plan)
    pending = {
        recipe_id: remote.remote(
            hub_uri,
            generator,
            shard_sets.get(generator.id),
            run_uri=storage.run_uri(hub_uri, recipe_id),
            max_real=max_real,
        )
        for recipe_id, generator in generators.items()
    }
    return dict(zip(pending, ray.get(list(pending.values())), strict=True))


def read_losses(hub_uri: str, found: Plan) -> list[tuple[int, float]]:
    """Returns images seen and loss over a generator's fine-tuning, at the hub or, as its package tells, at the site."""
    if found.generator.recipe_id:
        lines = tracking.read_metrics(storage.run_uri(hub_uri, found.generator.recipe_id))
        return [(line["images_seen"], line["loss"]) for line in lines if "loss" in line]
    if TRAINING_METRICS not in {file.path for file in found.contribution.files}:
        return []
    uri = storage.join(storage.record_uri(hub_uri, found.contribution), TRAINING_METRICS)
    try:
        content = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
        losses = [(int(line["images_seen"]), float(line["loss"])) for line in content]
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{uri} is not lines of images_seen and loss, as a site's package has them") from error
    return [(images_seen, loss) for images_seen, loss in losses if math.isfinite(loss)]


def _trained_on(hub_uri: str, generator: Generator) -> Callable[[str], bool]:
    """Tells whether a photograph may have been trained on: whatever is not among those held out."""
    held_out = read_holdout(hub_uri, generator)
    known = frozenset(held_out.image_ids if held_out else ())
    return lambda image_id: image_id not in known


def _inspect(drawn: Examined) -> list[str]:
    """Returns why each drawn photograph is rejected, empty for those that stay, as `inspection` does in synthesis."""
    inspector = inspection.Inspector(num_images=len(drawn.rows))
    return [inspector.judge(_pixels(row)) or "" for row in drawn.rows]


def _pixels(row: Mapping[str, Any]) -> Photograph:
    return fundus.decode_photograph(row["image"])


def _describe_held_out(found: Plan, held_out: Examined | None) -> dict[str, Any]:
    ids = list(held_out.side.image_ids) if held_out else []
    return {
        "num_images": len(ids),
        "num_patients": held_out.side.num_patients if held_out else 0,
        "num_held_out": found.num_held_out,
        "num_compared": len(found.trained_on),
        "num_trained_on": found.num_trained_on,
        "num_near_duplicates": found.num_near_duplicates,
        "digest": lineage.digest_of(sorted(ids))[:16] if ids else "",
        "image_ids": sorted(ids),
    }


def _contrasts(
    hub_uri: str,
    found: Plan,
    summary: MetadataSummary,
    attribute: str,
    kept: Examined,
    held_out: Examined | None,
    num_pictures: int,
) -> Iterator[Contrast]:
    """Yields the photographs of each value of a column: drawn ones, and held-out ones where they are at the hub."""
    drawn = appraisal.conditions_of(kept.side, summary.counts, attribute)
    real = appraisal.conditions_of(held_out.side, summary.counts, attribute) if held_out else ()
    for text in swept_values(summary, attribute):
        shown = [row for row, value in zip(kept.rows, drawn, strict=True) if value == text][:num_pictures]
        places = [place for place, value in zip(found.held_out, real, strict=True) if value == text][:num_pictures]
        yield Contrast(
            attribute=attribute,
            words=appraisal.words_of(attribute, text),
            generated=tuple(Drawn(image=_pixels(row), caption=row["caption"]) for row in shown),
            real=tuple(
                Drawn(image=fundus.to_square(image, fundus.find_field_of_view(image), PICTURE_PX), caption="")
                for image in (fundus.decode_photograph(row["image"]) for row in read_rows(hub_uri, places))
            ),
        )


def read_rows(hub_uri: str, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    """Yields the rows of real photographs; those of one row group that follow each other are read together."""
    for (path, row_group), group in itertools.groupby(places, key=lambda each: (each.path, each.row_group)):
        with shard.open_shard(storage.join(hub_uri, path)) as parquet:
            table = parquet.read_row_group(row_group, columns=SHARD_COLUMNS)
        yield from table.take([each.row for each in group]).to_pylist()


def _sweeps(swept: Examined | None, summary: MetadataSummary, attributes: Sequence[str]) -> tuple[Sweep, ...]:
    """Cuts the swept photographs into a grid for each attribute, in the order of `wishes_of`: a row a seed."""
    rows = list(swept.rows) if swept else []
    values = {attribute: swept_values(summary, attribute) for attribute in attributes}
    num_seeds = len(rows) // max(1, sum(map(len, values.values())))
    sweeps = []
    for attribute, texts in values.items():
        block, rows = rows[: num_seeds * len(texts)], rows[num_seeds * len(texts) :]
        if block:
            images = [_pixels(row) for row in block]
            grid = tuple(tuple(images[first : first + len(texts)]) for first in range(0, len(images), len(texts)))
            words = tuple(appraisal.words_of(attribute, text) for text in texts)
            sweeps.append(Sweep(attribute=attribute, words=words, rows=grid, caption=block[0]["caption"]))
    return tuple(sweeps)


def _rejected(drawn: Examined, reasons: Sequence[str], num_pictures: int) -> tuple[Drawn, ...]:
    """Returns the first rejected photographs of each reason, with it."""
    shown: dict[str, list[Drawn]] = {}
    for row, reason in zip(drawn.rows, reasons, strict=True):
        if reason and len(shown.setdefault(reason, [])) < num_pictures:
            shown[reason].append(Drawn(image=_pixels(row), caption=reason))
    return tuple(each for reason in sorted(shown) for each in shown[reason])


def _flat_figures(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Returns the generator's own figures as one flat row for a tracker."""
    return {
        f"{space}/{name}": interval["value"]
        for space, sides in figures.items()
        for name, interval in sides["generated"]["figures"].items()
    }
