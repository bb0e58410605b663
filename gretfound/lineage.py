"""The records of the chain: frozen, content-addressed, each naming its parents.

`site -> contribution -> generator -> shard set -> corpus -> encoder -> report -> release`. A record's id is the digest
of its canonical content, so writing one twice is harmless. This room knows no bucket: `gretfound.storage` keeps them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from gretfound import canonical
from gretfound.errors import LineageError

ID_HEX_DIGITS = 20


def canonical_json(content: Any) -> bytes:
    """Returns ``content`` as the one JSON text that records' ids are digests of."""
    return canonical.to_bytes(content, spelling="record")


def digest_of(content: Any) -> str:
    """Returns the SHA-256 of ``content``'s canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def recipe_id(job: str, settings: Any, parent_ids: list[str]) -> str:
    """Names a piece of work by what determines its result, so that the same command finds its own earlier run.

    Args:
        job: The job's name, for example ``pretrain_encoder``.
        settings: The part of the merged configuration that changes the result, as plain JSON-able values.
        parent_ids: The ids of the records that the job reads.
    """
    digest = digest_of({"job": job, "settings": settings, "parents": sorted(parent_ids)})
    return f"{job}-{digest[:ID_HEX_DIGITS]}"


@dataclass(frozen=True, kw_only=True)
class File:
    """One object of an artefact; ``path`` is relative to its record's folder."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a shard set; ``path`` is relative to the hub.

    ``row_group_images`` is what its footer says of each row group, so that a corpus is planned from records alone.
    """

    path: str
    sha256: str
    size_bytes: int
    row_group_images: tuple[int, ...]

    @property
    def num_images(self) -> int:
        """Images in all row groups."""
        return sum(self.row_group_images)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records share. ``parents`` holds the ids of the records that this one was made from."""

    kind: ClassVar[str]
    folder: ClassVar[str]

    parents: tuple[str, ...] = ()
    recipe_id: str = ""
    files: tuple[File, ...] = ()

    @property
    def id(self) -> str:
        """The kind and the digest of the canonical content, for example ``encoder-3f0c...``."""
        return f"{self.kind}-{digest_of(to_json(self))[:ID_HEX_DIGITS]}"


@dataclass(frozen=True, kw_only=True)
class Site(Record):
    """A hospital or study: the identity that every later record leads back to."""

    kind: ClassVar[str] = "site"
    folder: ClassVar[str] = "sites"
    site_id: str
    country: str = ""
    form: str = "images"


@dataclass(frozen=True, kw_only=True)
class Contribution(Record):
    """A verified, opened package."""

    kind: ClassVar[str] = "contribution"
    folder: ClassVar[str] = "contributions"
    site_id: str
    form: str
    package_sha256: str
    num_images: int
    num_patients: int | None = None


@dataclass(frozen=True, kw_only=True)
class Generator(Record):
    """A diffusers text-to-image pipeline folder; ``site_id`` is empty for a base that belongs to no site.

    ``method`` is how it was made of its base: ``lora``, ``full``, or ``consistency``, a few-step student whose
    ``base_id`` is its teacher; ``adopted`` is a base that was not trained here.
    """

    kind: ClassVar[str] = "generator"
    folder: ClassVar[str] = "generators"
    site_id: str
    base_id: str = ""
    method: str = "full"
    resolution_px: int
    num_images: int
    images_seen: int
    final_loss: float

    @property
    def is_few_step(self) -> bool:
        """Tells whether it draws in a few steps, without guidance."""
        return self.method == "consistency"


@dataclass(frozen=True, kw_only=True)
class ShardSet(Record):
    """Parquet shards of one site and one origin (``real`` or ``synthetic``)."""

    kind: ClassVar[str] = "shards"
    folder: ClassVar[str] = "shards"
    site_id: str
    origin: str
    num_images: int
    shards: tuple[Shard, ...]
    rejected: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Corpus(Record):
    """A manifest over shard sets: which images, how often; beside it what was left out, and on whose account.

    ``phase_images`` holds the images of each phase of the curriculum; the last one lasts as long as the run.
    """

    kind: ClassVar[str] = "corpus"
    folder: ClassVar[str] = "corpora"
    num_images: int
    num_excluded: int
    site_ids: tuple[str, ...]
    num_images_by_origin: dict[str, int]
    phase_images: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Encoder(Record):
    """A folder that plain timm loads: weights, architecture, preprocessing."""

    kind: ClassVar[str] = "encoder"
    folder: ClassVar[str] = "encoders"
    architecture: str
    objective: str
    image_size_px: int
    images_seen: int
    final_loss: float


@dataclass(frozen=True, kw_only=True)
class Report(Record):
    """Metrics, page and predictions of one evaluation."""

    kind: ClassVar[str] = "report"
    folder: ClassVar[str] = "reports"
    evaluation_sets: tuple[str, ...]
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Release(Record):
    """A signed folder that anyone can load."""

    kind: ClassVar[str] = "release"
    folder: ClassVar[str] = "releases"
    name: str
    licence: str


KINDS: tuple[type[Record], ...] = (Site, Contribution, Generator, ShardSet, Corpus, Encoder, Report, Release)
RecordT = TypeVar("RecordT", bound=Record)


def to_json(record: Record) -> dict[str, Any]:
    """Returns the record's canonical content, without its id."""
    return {"kind": record.kind, **json.loads(json.dumps(asdict(record)))}


def from_json(content: dict[str, Any], expected: type[RecordT]) -> RecordT:
    """Rebuilds a record from `to_json`'s content.

    Raises:
        LineageError: If the content is of another kind, or has other fields than that kind.
    """
    if content.get("kind") != expected.kind:
        raise LineageError(f"found a record of kind {content.get('kind')!r}, required {expected.kind!r}")
    names = {field.name for field in fields(expected)}
    if set(content) - {"kind"} != names:
        odd = sorted(set(content) - {"kind"} ^ names)
        raise LineageError(f"a {expected.kind} record has other fields than this version writes: {odd}")
    values = {name: _restored(name, value) for name, value in content.items() if name != "kind"}
    return expected(**values)


def shard_from_json(content: dict[str, Any]) -> Shard:
    """Rebuilds one shard of a shard set.

    Raises:
        LineageError: If the content has other fields than this version writes.
    """
    if odd := sorted(set(content) ^ {field.name for field in fields(Shard)}):
        raise LineageError(f"a shard has other fields than this version writes: {odd}; make its shard set again")
    return Shard(**{**content, "row_group_images": tuple(content["row_group_images"])})


def with_files(record: RecordT, files: tuple[File, ...]) -> RecordT:
    """Returns the record with the files of its artefact, and so with its final id."""
    return replace(record, files=files)


def kind_of(record_id: str) -> type[Record]:
    """Returns the record class that an id belongs to.

    Raises:
        LineageError: If the id has no known kind.
    """
    for record_class in KINDS:
        if record_id.rpartition("-")[0] == record_class.kind:
            return record_class
    raise LineageError(f"{record_id!r} is no record id; required KIND-HEX with a kind of {[k.kind for k in KINDS]}")


def _restored(name: str, value: Any) -> Any:
    if name == "files":
        return tuple(File(**file) for file in value)
    if name == "shards":
        return tuple(shard_from_json(shard) for shard in value)
    return tuple(value) if isinstance(value, list) else value
