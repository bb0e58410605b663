"""The corpus: a manifest over shards of real and synthetic photographs of all sites.

A manifest has a row for each row group of a shard: where it is, how often its images are drawn, which are excluded. No
image is copied, and no image is read to plan one. `gretfound.ingest` streams a corpus.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gretfound import shard, storage
from gretfound.errors import ConfigError
from gretfound.lineage import Corpus, ShardSet

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


def plan(
    hub_uri: str,
    shard_sets: Sequence[ShardSet],
    *,
    excluded_image_ids: frozenset[str] = frozenset(),
    temperature: float = 1.0,
    real_share: float | None = None,
) -> pa.Table:
    """Makes the manifest of a corpus.

    A site with n images gets n ** ``temperature`` of the draws: 1 leaves sites as they are, 0 makes them equal. Within
    that, ``real_share`` of all draws go to real photographs. Weights are scaled so that an epoch has as many draws as
    there are images; a weight is the expected number of draws of an image in an epoch.

    Args:
        hub_uri: The hub.
        shard_sets: What to include.
        excluded_image_ids: Images that no corpus may hold, such as those of evaluation sets.
        temperature: 0 to 1.
        real_share: 0 to 1, or None to leave the shares as they are.

    Returns:
        A table of `MANIFEST_SCHEMA`.

    Raises:
        ConfigError: If nothing is left, or ``real_share`` asks for an origin that is absent.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for shard_set in sorted(shard_sets, key=lambda each: each.id):
        for part in shard_set.shards:
            with shard.open_shard(storage.join(hub_uri, part.path)) as parquet:
                for index in range(parquet.num_row_groups):
                    image_ids = parquet.read_row_group(index, columns=["image_id"])["image_id"].to_pylist()
                    excluded = []
                    for row, image_id in enumerate(image_ids):
                        if image_id in excluded_image_ids or image_id in seen:
                            excluded.append(row)
                        seen.add(image_id)
                    rows.append(
                        {
                            "shard_path": part.path,
                            "row_group": index,
                            "num_images": len(image_ids),
                            "site_id": shard_set.site_id,
                            "origin": shard_set.origin,
                            "weights": [1.0],
                            "excluded": excluded,
                        }
                    )
    if not any(row["num_images"] > len(row["excluded"]) for row in rows):
        raise ConfigError("found no image for the corpus; contribute, take in or synthesize photographs first")
    _set_weights(rows, temperature=temperature, real_share=real_share)
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def _set_weights(rows: list[dict[str, Any]], *, temperature: float, real_share: float | None) -> None:
    num_images = [row["num_images"] - len(row["excluded"]) for row in rows]
    by_site = _summed([row["site_id"] for row in rows], num_images)
    for row in rows:
        row["weights"] = [float(max(by_site[row["site_id"]], 1)) ** (temperature - 1.0)]
    if real_share is not None:
        expected = [number * row["weights"][0] for row, number in zip(rows, num_images, strict=True)]
        draws = _summed([row["origin"] for row in rows], expected)
        shares = {"real": real_share, "synthetic": 1.0 - real_share}
        absent = [origin for origin, share in shares.items() if share > 0 and not draws.get(origin)]
        if absent:
            raise ConfigError(f"real_share={real_share} needs {absent[0]} photographs; found none in the shard sets")
        for row in rows:
            row["weights"][0] *= shares[row["origin"]] / draws[row["origin"]]
    scale = sum(num_images) / sum(number * row["weights"][0] for row, number in zip(rows, num_images, strict=True))
    for row in rows:
        row["weights"][0] *= scale


def _summed(keys: Sequence[str], amounts: Sequence[float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for key, amount in zip(keys, amounts, strict=True):
        sums[key] = sums.get(key, 0.0) + amount
    return sums


def count(manifest: pa.Table) -> dict[str, Any]:
    """Returns what a Corpus record says of its manifest: images in all, excluded, by origin, and the sites."""
    by_origin: dict[str, int] = {}
    num_excluded = 0
    for row in manifest.to_pylist():
        included = row["num_images"] - len(row["excluded"])
        by_origin[row["origin"]] = by_origin.get(row["origin"], 0) + included
        num_excluded += len(row["excluded"])
    return {
        "num_images": sum(by_origin.values()),
        "num_excluded": num_excluded,
        "site_ids": tuple(sorted(set(manifest["site_id"].to_pylist()))),
        "num_images_by_origin": by_origin,
    }


def encode_manifest(manifest: pa.Table) -> bytes:
    """Returns a manifest as Parquet bytes."""
    stream = io.BytesIO()
    pq.write_table(manifest, stream, compression="ZSTD")
    return stream.getvalue()


def read_manifest(hub_uri: str, corpus: Corpus) -> pa.Table:
    """Reads a corpus's manifest."""
    content = storage.read_bytes(storage.join(storage.record_uri(hub_uri, corpus), "manifest.parquet"))
    return pq.read_table(io.BytesIO(content)).cast(MANIFEST_SCHEMA)


def contained_image_ids(hub_uri: str, corpus: Corpus, image_ids: Iterable[str]) -> set[str]:
    """Returns those of ``image_ids`` that the corpus holds and does not exclude."""
    wanted, found = set(image_ids), set()
    for row in read_manifest(hub_uri, corpus).to_pylist():
        with shard.open_shard(storage.join(hub_uri, row["shard_path"])) as parquet:
            held = parquet.read_row_group(row["row_group"], columns=["image_id"])["image_id"].to_pylist()
        excluded = set(row["excluded"])
        found |= {image_id for place, image_id in enumerate(held) if place not in excluded} & wanted
    return found
