"""The corpus: a manifest over shards of real and synthetic photographs of all sites.

A manifest has a row for each row group of a shard: where it is, how often its images are drawn in each phase, which are
excluded. It is planned from the shard sets' records: no image is copied, and no shard is opened. What is excluded, and
why, lies beside it, and so does what it was kept free of: the evaluation images. `gretfound.ingest` streams a corpus.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gretfound import duplicates, lineage, storage
from gretfound.duplicates import Signatures
from gretfound.errors import ConfigError, LineageError
from gretfound.lineage import Corpus, Shard, ShardSet, Site

# Legend of array suffixes: G row groups, N images, C cells (a site's images of one origin).
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Reasons = npt.NDArray[np.uint8]

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("shard_path", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("site_id", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("weights", pa.list_(pa.float64()), nullable=False),  # expected draws of an image, for each phase
        pa.field("excluded", pa.list_(pa.int32()), nullable=False),
    ]
)
REASONS = (  # the first that applies
    "evaluation_image",
    "evaluation_near_duplicate",
    "evaluation_patient",
    "duplicate",
    "near_duplicate",
    "site_cap",
    "vetoed",  # goes before duplicates; the number of a reason is its place here
)
EXCLUSIONS_SCHEMA = pa.schema(
    [
        pa.field("shard_path", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    ]
)
MANIFEST_NAME, EXCLUSIONS_NAME, EVALUATION_NAME = "manifest.parquet", "exclusions.parquet", "evaluation.parquet"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the curriculum; ``num_images`` 0 means the rest of the run, whatever its length.

    ``temperature`` and ``country_temperature`` are 0 to 1; without the latter countries play no part. ``real_share`` of
    all draws are real photographs; None leaves the shares as they come.
    """

    num_images: int = 0
    real_share: float | None = None
    temperature: float = 1.0
    country_temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Every row group of some shard sets and, running over all of them, every image; the order is the manifest's."""

    parts: tuple[Shard, ...]
    cells: tuple[tuple[str, str], ...]  # (site, origin)
    part: Ints  # (G,), as the next three: an index of parts
    row_group: Ints
    num_images: Ints
    cell: Ints  # an index of cells

    @property
    def first_row(self) -> Ints:
        """The number of each row group's first image, and at the end that of all images."""
        return np.concatenate([[0], np.cumsum(self.num_images)]).astype(np.int64)

    @property
    def is_synthetic(self) -> npt.NDArray[np.bool_]:
        """Which images are synthetic."""
        is_synthetic_C = np.array([origin == "synthetic" for _, origin in self.cells], dtype=bool)
        return np.repeat(is_synthetic_C[self.cell], self.num_images)

    def group_of(self, rows: Ints) -> Ints:
        """Returns the row group that each image is in."""
        return np.searchsorted(self.first_row, rows, side="right") - 1


def lay_out(shard_sets: Sequence[ShardSet]) -> Layout:
    """Puts the row groups of shard sets in order of site, origin and content; a shard in two sets counts once."""
    held = {part.path: (each.site_id, each.origin, part) for each in shard_sets for part in each.shards}
    ordered = [held[path] for path in sorted(held, key=lambda path: (*held[path][:2], path))]
    cells = sorted({(site_id, origin) for site_id, origin, _ in ordered})
    num_groups = [len(part.row_group_images) for _, _, part in ordered]
    part_G = np.repeat(np.arange(len(ordered)), num_groups)
    cell_of = {cell: place for place, cell in enumerate(cells)}
    cell_of_part = np.array([cell_of[site_id, origin] for site_id, origin, _ in ordered], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(num_groups)]).astype(np.int64)
    return Layout(
        parts=tuple(part for _, _, part in ordered),
        cells=tuple(cells),
        part=part_G,
        row_group=np.arange(starts[-1]) - starts[part_G],
        num_images=np.fromiter((n for _, _, part in ordered for n in part.row_group_images), np.int64, starts[-1]),
        cell=cell_of_part[part_G],
    )


def find_exclusions(
    layout: Layout,
    signatures: Signatures,
    evaluation: pa.Table,
    *,
    vetoed_image_ids: Sequence[str] = (),
    has_near_duplicates_removed: bool = True,
    threshold_bits: int = duplicates.THRESHOLD_BITS,
) -> Reasons:
    """Finds the images that a corpus leaves out, by what they show.

    An evaluation image, its near-duplicates, and all images of a patient who has one of these. Drawn
    photographs that a site vetoed. Then all but one of images with the
    same pixels, and of near-duplicates: a real one stays before a synthetic one.

    Args:
        layout: The images.
        signatures: Theirs, in the same order. Hashes of images that are left out are set to 0 to save memory.
        evaluation: A table of `duplicates.EVALUATION_SCHEMA`.
        vetoed_image_ids: Of `gretfound.veto`.
        has_near_duplicates_removed: Whether near-duplicates among the images are; those of evaluation images are.
        threshold_bits: The most bits of 512 in which near-duplicates differ.

    Returns:
        For each image 0, or 1 + the index of its reason in `REASONS`.
    """
    reasons_N = np.zeros(len(signatures), np.uint8)

    def exclude(rows: Ints, reason: str) -> None:
        free = rows[reasons_N[rows] == 0]
        reasons_N[free] = 1 + REASONS.index(reason)

    image_rows, near_rows = _evaluation_rows(signatures, evaluation, threshold_bits=threshold_bits)
    exclude(image_rows, "evaluation_image")
    exclude(near_rows[:, 0], "evaluation_near_duplicate")
    patients = np.setdiff1d(signatures.patients[reasons_N > 0], [0])
    if len(patients):
        exclude(np.flatnonzero(np.isin(signatures.patients, patients)), "evaluation_patient")
    is_synthetic_N = layout.is_synthetic
    exclude(_vetoed_rows(layout, signatures, vetoed_image_ids), "vetoed")
    left = np.flatnonzero(reasons_N == 0)
    repeated = duplicates.repeated_rows(signatures.image_keys[left], is_synthetic_N[left])
    exclude(left[repeated], "duplicate")
    del left
    if has_near_duplicates_removed:
        signatures.hashes[reasons_N > 0] = 0
        near = duplicates.near_duplicate_rows(signatures, is_synthetic_N, threshold_bits=threshold_bits)
        exclude(near, "near_duplicate")
    return reasons_N


def _vetoed_rows(layout: Layout, signatures: Signatures, image_ids: Sequence[str]) -> Ints:
    """Returns the rows that are vetoed; a veto is of drawn photographs, so no real one is ever among them."""
    keys = np.array([duplicates.image_key(each) for each in image_ids], dtype=np.uint64)
    return np.flatnonzero(np.isin(signatures.image_keys, keys) & layout.is_synthetic)


def _evaluation_rows(signatures: Signatures, evaluation: pa.Table, *, threshold_bits: int) -> tuple[Ints, Ints]:
    """Returns the rows that are evaluation images, and (row, row of ``evaluation``) of their near-duplicates."""
    keys = np.array([duplicates.image_key(each) for each in evaluation["image_id"].to_pylist()], dtype=np.uint64)
    wanted_MW = duplicates.words_of(evaluation["hash"])
    near = duplicates.find_matches(signatures.hashes, wanted_MW, threshold_bits=threshold_bits)
    return np.flatnonzero(np.isin(signatures.image_keys, keys)), near


def cap_sites(layout: Layout, reasons_N: Reasons, site_cap: int) -> Reasons:
    """Excludes images of sites that have more than ``site_cap`` real or more than that many synthetic ones.

    Whole row groups go, in an order that their content decides, and a part of the one at the limit, so that what is
    left is read as fast as before. 0 is no cap.
    """
    if not site_cap:
        return reasons_N
    reasons_N = reasons_N.copy()
    kept_G = layout.num_images - _num_excluded(layout, reasons_N)
    digests = np.array([int(part.sha256[:12], 16) for part in layout.parts], dtype=np.uint64)
    # Fibonacci hashing spreads the row groups of one shard.
    mixed_G = (digests[layout.part] + layout.row_group.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((layout.row_group, layout.part, mixed_G, layout.cell))
    sums = np.cumsum(kept_G[order])
    cell = layout.cell[order]
    before_cell = np.concatenate([[0], sums])[np.searchsorted(cell, cell, side="left")]
    allowed_G = np.empty_like(kept_G)
    allowed_G[order] = np.clip(site_cap - (sums - kept_G[order] - before_cell), 0, kept_G[order])
    first_row_G = layout.first_row
    for group in np.flatnonzero(allowed_G < kept_G):
        held = reasons_N[first_row_G[group] : first_row_G[group + 1]]
        held[np.flatnonzero(held == 0)[allowed_G[group] :]] = 1 + REASONS.index("site_cap")
    return reasons_N


def _num_excluded(layout: Layout, reasons_N: Reasons) -> Ints:
    sums = np.concatenate([[0], np.cumsum(reasons_N > 0, dtype=np.int64)])
    first_row_G = layout.first_row
    excluded_G: Ints = sums[first_row_G[1:]] - sums[first_row_G[:-1]]
    return excluded_G


def countries_of(hub_uri: str) -> dict[str, str]:
    """Returns the country of each site by its Site records; of several that disagree, the first by the alphabet."""
    countries: dict[str, str] = {}
    for site in storage.read_records(hub_uri, Site):
        if site.country:
            countries[site.site_id] = min(site.country, countries.get(site.site_id, site.country))
    return countries


def plan(
    layout: Layout,
    *,
    reasons: Reasons | None = None,
    phases: Sequence[Phase] = (Phase(),),
    countries: Mapping[str, str] | None = None,
) -> pa.Table:
    """Makes the manifest of a corpus; row groups of which nothing is left are not in it.

    Weights are those of docs/dataflow.md, "How often a photograph is drawn": an expected number of draws of an image in
    an epoch, scaled so that an epoch has as many draws as there are images with a weight.

    Args:
        layout: The images.
        reasons: Which are excluded, as `find_exclusions` and `cap_sites` say; None: none.
        phases: The curriculum; the manifest has a weight for each.
        countries: The country of each site; one that is not in it is a country of its own.

    Returns:
        A table of `MANIFEST_SCHEMA`.

    Raises:
        ConfigError: If nothing is left, or ``real_share`` asks for an origin that is absent.
    """
    excluded_G = np.zeros_like(layout.num_images) if reasons is None else _num_excluded(layout, reasons)
    num_left_G = layout.num_images - excluded_G
    kept = np.flatnonzero(num_left_G)
    if not len(kept):
        raise ConfigError("found no image for the corpus; contribute, take in or synthesize photographs first")
    num_left_C = np.bincount(layout.cell, weights=num_left_G, minlength=len(layout.cells))
    weights_CP = np.stack(
        [_weights(layout.cells, num_left_C.astype(np.float64), phase, countries or {}) for phase in phases], axis=1
    )
    offsets = np.concatenate([[0], np.cumsum(excluded_G[kept])]).astype(np.int32)
    rows = np.empty(0, np.int64)
    if reasons is not None:
        is_kept_G = num_left_G > 0
        rows = np.flatnonzero((reasons > 0) & np.repeat(is_kept_G, layout.num_images))
    rows_within = rows - layout.first_row[layout.group_of(rows)]
    per_phase = np.arange(0, len(kept) * len(phases) + 1, len(phases), dtype=np.int32)
    cells = layout.cell[kept]
    return pa.table(
        {
            "shard_path": pa.array([part.path for part in layout.parts]).take(pa.array(layout.part[kept])),
            "row_group": pa.array(layout.row_group[kept].astype(np.int32)),
            "num_images": pa.array(layout.num_images[kept].astype(np.int32)),
            "site_id": pa.array([site_id for site_id, _ in layout.cells]).take(pa.array(cells)),
            "origin": pa.array([origin for _, origin in layout.cells]).take(pa.array(cells)),
            "weights": pa.ListArray.from_arrays(per_phase, weights_CP[cells].ravel()),
            "excluded": pa.ListArray.from_arrays(offsets, rows_within.astype(np.int32)),
        },
        schema=MANIFEST_SCHEMA,
    )


def _weights(
    cells: Sequence[tuple[str, str]], num_images_C: Floats, phase: Phase, countries: Mapping[str, str]
) -> Floats:
    """Returns the expected draws in an epoch of an image of each cell (a site's images of one origin)."""
    share_C = np.zeros(len(cells))
    if phase.real_share is None:
        share_C = _site_shares(cells, num_images_C, phase, countries)
    else:
        for origin, share in (("real", phase.real_share), ("synthetic", 1.0 - phase.real_share)):
            is_origin_C = np.array([each == origin for _, each in cells])
            if share > 0 and not num_images_C[is_origin_C].any():
                raise ConfigError(
                    f"real_share={phase.real_share} needs {origin} photographs; found none in the shard sets"
                )
            if share > 0:
                share_C += share * _site_shares(cells, num_images_C * is_origin_C, phase, countries)
    num_weighted = num_images_C[share_C > 0].sum()
    weights_C: Floats = share_C * num_weighted / np.maximum(num_images_C, 1.0)
    return weights_C


def _site_shares(
    cells: Sequence[tuple[str, str]], num_images_C: Floats, phase: Phase, countries: Mapping[str, str]
) -> Floats:
    """Returns each cell's share of the draws: countries by their temperature, sites in one by theirs."""
    sites = [site_id for site_id, _ in cells]
    share_C = _tempered(sites, num_images_C, phase.temperature)
    if phase.country_temperature is not None:
        # A site without a country is one of its own; the space keeps it apart from a country of the same name.
        lands = [countries.get(site_id, f" {site_id}") for site_id in sites]
        wanted = _tempered(lands, num_images_C, phase.country_temperature)
        share_C = share_C * _summed(lands, wanted) / np.maximum(_summed(lands, share_C), np.finfo(float).tiny)
    return share_C


def _tempered(keys: Sequence[str], num_images_C: Floats, temperature: float) -> Floats:
    sums = np.maximum(_summed(keys, num_images_C), 1.0)
    share_C = num_images_C * sums ** (temperature - 1.0)
    shares: Floats = share_C / share_C.sum()
    return shares


def _summed(keys: Sequence[str], amounts: Floats) -> Floats:
    """Returns for each place the sum over all places with the same key."""
    _, codes = np.unique(np.array(keys), return_inverse=True)
    sums = np.bincount(codes, weights=amounts).astype(np.float64)
    return sums[codes]


def list_exclusions(layout: Layout, reasons: Reasons) -> pa.Table:
    """Returns a table of `EXCLUSIONS_SCHEMA`: each excluded image by its place, and why."""
    rows = np.flatnonzero(reasons)
    groups = layout.group_of(rows)
    paths = pa.array([part.path for part in layout.parts], pa.string())
    return pa.table(
        {
            "shard_path": pa.DictionaryArray.from_arrays(layout.part[groups].astype(np.int32), paths),
            "row_group": pa.array(layout.row_group[groups].astype(np.int32)),
            "row": pa.array((rows - layout.first_row[groups]).astype(np.int32)),
            "reason": pa.DictionaryArray.from_arrays((reasons[rows] - 1).astype(np.int8), pa.array(REASONS)),
        },
        schema=EXCLUSIONS_SCHEMA,
    )


def count(layout: Layout, manifest: pa.Table) -> dict[str, Any]:
    """Returns what a Corpus record says of its manifest: images in all, excluded, by origin, and the sites."""
    left = pc.subtract(manifest["num_images"], pc.list_value_length(manifest["excluded"]))
    by_origin = pa.table({"origin": manifest["origin"], "left": left}).group_by("origin").aggregate([("left", "sum")])
    num_images = pc.sum(left).as_py()
    return {
        "num_images": num_images,
        "num_excluded": int(layout.num_images.sum()) - num_images,
        "site_ids": tuple(sorted(pc.unique(manifest["site_id"]).to_pylist())),
        "num_images_by_origin": {row["origin"]: row["left_sum"] for row in by_origin.to_pylist()},
    }


def publish(hub_uri: str, record: Corpus, *, manifest: pa.Table, exclusions: pa.Table, evaluation: pa.Table) -> Corpus:
    """Writes a corpus: its manifest, what is excluded and why, and the evaluation images that it was kept free of."""
    tables = {MANIFEST_NAME: manifest, EXCLUSIONS_NAME: exclusions, EVALUATION_NAME: evaluation}
    with storage.scratch_folder() as folder:
        for name, table in tables.items():
            (Path(folder) / name).write_bytes(_encoded(table))
        return storage.publish_folder(hub_uri, Path(folder), record)


def _encoded(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="ZSTD")
    return stream.getvalue()


def read_manifest(hub_uri: str, corpus: Corpus) -> pa.Table:
    """Reads a corpus's manifest."""
    return _read_table(storage.join(storage.record_uri(hub_uri, corpus), MANIFEST_NAME), MANIFEST_SCHEMA)


def read_exclusions(hub_uri: str, corpus: Corpus) -> pa.Table:
    """Reads which images a corpus leaves out, and why."""
    return _read_table(storage.join(storage.record_uri(hub_uri, corpus), EXCLUSIONS_NAME), EXCLUSIONS_SCHEMA)


def _read_table(uri: str, schema: pa.Schema) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri))).cast(schema)


def register_evaluation(hub_uri: str, name: str, evaluation: pa.Table) -> None:
    """Adds an evaluation set to those that no corpus of this hub may hold; doing it again is harmless.

    Args:
        hub_uri: The hub.
        name: The set's name.
        evaluation: A table of `duplicates.EVALUATION_SCHEMA`.
    """
    if len(evaluation):
        digest = lineage.digest_of(sorted(evaluation["image_id"].to_pylist()))[: lineage.ID_HEX_DIGITS]
        storage.create_bytes(storage.join(hub_uri, "evaluation", f"{name}-{digest}.parquet"), _encoded(evaluation))


def registered_evaluation(hub_uri: str) -> pa.Table:
    """Returns the images of every registered evaluation set, each once, sorted by id."""
    uris = [uri for uri in storage.list_uris(storage.join(hub_uri, "evaluation")) if uri.endswith(".parquet")]
    tables = [_read_table(uri, duplicates.EVALUATION_SCHEMA) for uri in uris]
    together = pa.concat_tables([duplicates.EVALUATION_SCHEMA.empty_table(), *tables])
    image_ids = together["image_id"].to_numpy()
    _, first = np.unique(image_ids.astype(str), return_index=True)
    return together.take(pa.array(first)).combine_chunks()


def check_uncontaminated(hub_uri: str, corpus: Corpus) -> None:
    """Verifies that a corpus holds no image of any evaluation set that the hub has registered, nor a near-duplicate.

    Raises:
        LineageError: Naming such an image and its shard.
    """
    require_absent(hub_uri, corpus, registered_evaluation(hub_uri))


def require_absent(hub_uri: str, corpus: Corpus, evaluation: pa.Table) -> None:
    """Verifies that a corpus holds none of some evaluation images, and no near-duplicate of one.

    What the corpus was kept free of when it was assembled is known from its own list; only the rest is looked for.

    Args:
        hub_uri: The hub.
        corpus: The corpus.
        evaluation: A table of `duplicates.EVALUATION_SCHEMA`.

    Raises:
        LineageError: Naming such an image and its shard.
    """
    uri = storage.join(storage.record_uri(hub_uri, corpus), EVALUATION_NAME)
    known = _read_table(uri, duplicates.EVALUATION_SCHEMA)["image_id"]
    unknown = evaluation.filter(pc.invert(pc.is_in(evaluation["image_id"], value_set=known.combine_chunks())))
    if not len(unknown):
        return
    layout = lay_out([storage.read_record(hub_uri, parent, ShardSet) for parent in corpus.parents])
    is_held_N = _held(layout, read_manifest(hub_uri, corpus))
    signatures = duplicates.read_signatures(hub_uri, layout.parts)
    same, near = _evaluation_rows(signatures, unknown, threshold_bits=duplicates.THRESHOLD_BITS)
    same, near = same[is_held_N[same]], near[is_held_N[near[:, 0]]]
    if not len(same) and not len(near):
        return
    if len(same):
        keys = np.array([duplicates.image_key(each) for each in unknown["image_id"].to_pylist()], dtype=np.uint64)
        row, place = int(same[0]), int(np.flatnonzero(keys == signatures.image_keys[same[0]])[0])
    else:
        row, place = int(near[0, 0]), int(near[0, 1])
    path = layout.parts[layout.part[layout.group_of(np.array([row]))[0]]].path
    what = "is" if len(same) else "has a near-duplicate"
    num_found = len(np.union1d(same, near[:, 0]))
    raise LineageError(
        f"the evaluation image {unknown['image_id'][place].as_py()} {what} in {path} of {corpus.id}; {num_found} of "
        "its images are such, required none: give their folders to `jobs.assemble_corpus` as evaluation_uris, "
        "which leaves them out, and pretrain on the new corpus"
    )


def check_unvetoed(hub_uri: str, corpus: Corpus, vetoed_image_ids: Sequence[str]) -> None:
    """Verifies that a corpus holds no photograph that a site has vetoed, be it after it was assembled.

    Raises:
        LineageError: If it does.
    """
    if not vetoed_image_ids:
        return
    layout = lay_out([storage.read_record(hub_uri, parent, ShardSet) for parent in corpus.parents])
    rows = _vetoed_rows(layout, duplicates.read_signatures(hub_uri, layout.parts), vetoed_image_ids)
    num_held = int(_held(layout, read_manifest(hub_uri, corpus))[rows].sum())
    if num_held:
        raise LineageError(
            f"{corpus.id} holds {num_held} drawn photographs that a site has vetoed since, required none: run "
            "`jobs.assemble_corpus` again, which leaves them out, and pretrain on the new corpus"
        )


def _held(layout: Layout, manifest: pa.Table) -> npt.NDArray[np.bool_]:
    """Returns which images of the layout a manifest holds and does not exclude."""
    part_of = {part.path: place for place, part in enumerate(layout.parts)}
    first_group = np.searchsorted(layout.part, np.arange(len(layout.parts)))
    encoded = manifest["shard_path"].combine_chunks().dictionary_encode()
    part_of_code = np.array([part_of[path] for path in encoded.dictionary.to_pylist()], dtype=np.int64)
    groups = first_group[part_of_code[encoded.indices.to_numpy()]] + manifest["row_group"].to_numpy()
    is_held_G = np.zeros(len(layout.num_images), bool)
    is_held_G[groups] = True
    is_held_N = np.repeat(is_held_G, layout.num_images)
    excluded = manifest["excluded"].combine_chunks()
    firsts = np.repeat(layout.first_row[groups], pc.list_value_length(excluded).to_numpy(zero_copy_only=False))
    is_held_N[firsts + excluded.flatten().to_numpy()] = False
    return is_held_N
