"""What a contribution may hold, form by form, and the screening of its shards.

`gretfound.sealing` packs, signs, encrypts and opens it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gretfound import deidentify, fundus, screening, shard
from gretfound.errors import ContributionRejected, StorageError
from gretfound.metadata import MetadataSummary

FORMS = ("weights", "images", "synthetic")
MAX_MEMBERS = 64
MAX_SHARDS = MAX_MEMBERS - 8
MAX_JSON_BYTES = 16 * 2**20
MAX_ACCOUNT_BYTES = 64 * 2**10
MAX_WEIGHTS_BYTES = 4 * 2**30
MAX_SHARD_BYTES = 2 * 2**30
MAX_ROWS_PER_GROUP = 1024


@dataclass(frozen=True, kw_only=True)
class Place:
    """What may stand at one place of a package: the only names that `sealing` writes and accepts."""

    pattern: str
    role: str
    contains: str
    max_bytes: int
    is_required: bool = True


_SUMMARY = Place(
    pattern=r"summary/metadata_summary\.json",
    role="summary",
    contains="counts of patients by age band, sex, disease and camera; no rows, no names, no dates",
    max_bytes=MAX_JSON_BYTES,
)
_DISCLOSURE = Place(
    pattern=r"summary/disclosure_report\.json",
    role="summary",
    contains="the rules by which these counts were made, and which of them were suppressed",
    max_bytes=MAX_JSON_BYTES,
)
_TRAINING = (
    Place(
        pattern=r"training/config\.json",
        role="training",
        contains="the settings of the training at the site",
        max_bytes=MAX_JSON_BYTES,
    ),
    Place(
        pattern=r"training/metrics\.jsonl",
        role="training",
        contains="the loss over the course of the training",
        max_bytes=MAX_JSON_BYTES,
    ),
)
_GATE = Place(
    pattern=r"privacy/gate_report\.json",
    role="privacy",
    contains="what the privacy gate found, as counts and figures; no photograph, no patient",
    max_bytes=MAX_JSON_BYTES,
)
_CANARIES = (
    Place(
        pattern=r"privacy/canary_commitment\.json",
        role="privacy",
        contains="a digest that binds the training to which drawn test photographs it learned",
        max_bytes=MAX_ACCOUNT_BYTES,
        is_required=False,
    ),
    Place(
        pattern=r"privacy/canary_reveal\.json",
        role="privacy",
        contains="which drawn test photographs (canaries) it learned, so that the hub can test its memory; no patient",
        max_bytes=MAX_ACCOUNT_BYTES,
        is_required=False,
    ),
)
_LEDGER = Place(
    pattern=r"privacy/dp_ledger\.json",
    role="privacy",
    contains="the noise and the steps of a training with differential privacy, and the epsilon they come to",
    max_bytes=MAX_ACCOUNT_BYTES,
    is_required=False,
)
PLACES: dict[str, tuple[Place, ...]] = {
    "weights": (
        Place(
            pattern=r"weights/adapter\.safetensors",
            role="weights",
            contains="what the generator learned at this site, as numbers; no photograph",
            max_bytes=MAX_WEIGHTS_BYTES,
        ),
        Place(
            pattern=r"weights/adapter_config\.json",
            role="weights",
            contains="the size and position of those numbers within the generator",
            max_bytes=MAX_JSON_BYTES,
        ),
        _SUMMARY,
        _DISCLOSURE,
        *_TRAINING,
        _GATE,
        *_CANARIES,
        _LEDGER,
    ),
    "images": (
        Place(
            pattern=r"shards/part-[0-9]{5}\.parquet",
            role="shard",
            contains="real photographs, de-identified, with their metadata under pseudonyms",
            max_bytes=MAX_SHARD_BYTES,
        ),
        _SUMMARY,
        _DISCLOSURE,
    ),
    "synthetic": (
        Place(
            pattern=r"shards/part-[0-9]{5}\.parquet",
            role="shard",
            contains="photographs drawn by the site's generator, with the captions they were drawn for; no patient",
            max_bytes=MAX_SHARD_BYTES,
        ),
        _SUMMARY,
        _DISCLOSURE,
        *_TRAINING,
        _GATE,
        _LEDGER,
    ),
}
TAKEN_OUT = ("unreadable", "not_the_named_photograph")  # why a row does not stay, where the others do
_IMAGE_FIRST_BYTES = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n")


def place_of(form: str, path: str) -> Place | None:
    """Returns the place that a member's name stands at in a package of ``form``, or None if it may not be there."""
    return next((place for place in PLACES[form] if re.fullmatch(place.pattern, path)), None)


def screen_shard_file(shard_path: Path, *, site_id: str, origin: str, summary: MetadataSummary) -> dict[str, int]:
    """Takes out the rows of an opened shard whose photograph is damaged; their neighbours stay.

    The file is written anew in any case, so that nothing stays of it but its rows: no bytes between row groups, no
    words in its footer. A sound file gets the same bytes again.

    Args:
        shard_path: A shard file of an opened package.
        site_id: The site that every row must name.
        origin: ``real`` or ``synthetic``, which every row must name.
        summary: The contribution's: no row says what it does not tell.

    Returns:
        How many rows were taken out, by reason.

    Raises:
        ContributionRejected: ``SHARD_FORMAT`` if the file is not of the shard format, ``SITE_MISMATCH`` if a row
            belongs to another site or origin, codes of `screening.require_real_row` and `require_drawn_row`, and
            ``IMAGE_...`` if an image is one that no container writes: of another kind, of too many pixels or frames,
            with anything beside its pixels.
    """
    _require_shard_format(shard_path)
    rejected: Counter[str] = Counter()
    sound_path = shard_path.with_suffix(".sound")
    try:
        shard.write_shard_file(sound_path, _sound_rows(shard_path, site_id, origin, summary, rejected))
        sound_path.replace(shard_path)
    finally:
        sound_path.unlink(missing_ok=True)
    return dict(sorted(rejected.items()))


def _require_shard_format(shard_path: Path) -> None:
    try:
        footer = pq.read_metadata(shard_path)
        is_right = pq.read_schema(shard_path).equals(shard.SCHEMA)
    except (pa.ArrowException, OSError):
        is_right = False
    if not is_right:
        raise ContributionRejected(
            "SHARD_FORMAT", "a shard has other columns than this version; seal the package again"
        )
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if group.num_rows > MAX_ROWS_PER_GROUP or group.total_byte_size > MAX_SHARD_BYTES:
            raise ContributionRejected(
                "SHARD_FORMAT", f"a row group is too large; at most {MAX_ROWS_PER_GROUP} rows may be: seal it again"
            )


def _sound_rows(
    shard_path: Path, site_id: str, origin: str, summary: MetadataSummary, rejected: Counter[str]
) -> Iterator[dict[str, Any]]:
    require_row = screening.require_real_row if origin == "real" else screening.require_drawn_row
    try:
        for row in shard.read_rows(str(shard_path)):
            if row["site_id"] != site_id or row["origin"] != origin:
                raise ContributionRejected("SITE_MISMATCH", "a row names another site or origin than the manifest")
            require_row(row, summary)
            try:
                if not row["image"].startswith(_IMAGE_FIRST_BYTES):
                    raise fundus.UnreadablePhotograph("NOT_A_PHOTOGRAPH", "required JPEG or PNG")
                image = fundus.decode_photograph(row["image"])
            except fundus.UnreadablePhotograph as error:
                if error.code != "TRUNCATED":
                    raise ContributionRejected(
                        f"IMAGE_{error.code}",
                        "a shard holds an image that no container writes; seal it again",
                    ) from error
                rejected["unreadable"] += 1
                continue
            if (fundus.pixel_digest(image), *image.shape[:2]) != (row["image_id"], row["height_px"], row["width_px"]):
                rejected["not_the_named_photograph"] += 1
                continue
            try:
                deidentify.require_bare(row["image"])
            except ValueError as error:
                raise ContributionRejected(
                    "IMAGE_NOT_BARE", "a shard holds an image with more than its pixels; contribute again"
                ) from error
            yield row
    except (StorageError, pa.ArrowException) as error:
        raise ContributionRejected("SHARD_FORMAT", "a shard is not readable Parquet; seal the package again") from error
