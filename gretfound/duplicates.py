"""Duplicates: what a photograph is recognised by, and which photographs of a hub are the same one again.

A *signature* is an image id, a perceptual hash of 512 bits and, for a real photograph, its patient. Signatures of a
shard lie beside it, named by its content: HUB/shards/signatures/SHA256.parquet. They are compared as arrays, never in a
loop over photographs. Near-duplicates are the same exposure again: encoded, resized, brightened, trimmed or mirrored;
two exposures of one eye are two photographs.
"""

import functools
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import fft, ndimage

from gretfound import fundus, shard, storage
from gretfound.errors import LineageError, StorageError
from gretfound.fundus import FieldOfView, Photograph
from gretfound.lineage import Shard

# Legend of array suffixes: N photographs, W words of a hash, P pairs, S side in pixels.
Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
THRESHOLD_BITS = 72  # of 512; measured in docs/log.md
SIGNATURE_SCHEMA = pa.schema(
    [
        pa.field("image_key", pa.uint64(), nullable=False),  # the first 64 bits of the image id
        pa.field("hash", pa.binary(64), nullable=False),  # zeros: a photograph without structure, like no other
        pa.field("patient", pa.uint64()),  # a digest of site and pseudonym
    ],
    metadata={"hash_version": "1"},
)
EVALUATION_SCHEMA = pa.schema(  # photographs that no corpus may hold
    [pa.field("image_id", pa.string(), nullable=False), pa.field("hash", pa.binary(64), nullable=False)]
)
_SIDE_PX = 64
_NUM_WORDS = 8
_RADIUS_SHARE = 0.9  # of the field of view: its rim differs with the camera's mask and the fitted circle
_ILLUMINATION_PX, _NOISE_PX = 4.0, 1.0  # standard deviations of the band of sizes that is looked at
_MIN_SPREAD = 0.35  # grey levels: less is a blank
_NUM_PIECES = 16  # of 16 bits: the half of the hash that bands are made of
_BANDS = tuple(
    (first, (first + step) % 16, (first + 2 * step + 1) % 16, (first + 3 * step + 2) % 16)
    for step in (1, 5)
    for first in range(_NUM_PIECES)
)
_NEIGHBOURS = 8
_ROWS_AT_ONCE = 2**22
_READERS = 16


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """The signatures of N photographs; ``patients`` is 0 where none is known."""

    image_keys: Words  # (N,)
    hashes: Words  # (N, 8)
    patients: Words  # (N,)

    def __len__(self) -> int:
        return len(self.image_keys)


def image_key(image_id: str) -> int:
    """Returns the first 64 bits of an image id; among 100 million images two share them with a chance of 1 in 3,700."""
    return int(image_id[:16], 16)


def patient_key(site_id: str, pseudonym: str) -> int:
    """Returns a digest of a site's pseudonym for a patient, never 0."""
    return int.from_bytes(hashlib.sha256(f"{site_id}\n{pseudonym}".encode()).digest()[:8], "big") or 1


def hash_photograph(image: Photograph, field_of_view: FieldOfView | None) -> Words:
    """Returns the perceptual hash of a photograph: signs of 512 low frequencies of its vessels, disc and lesions.

    The green channel of the field of view, 64 px wide, less its local mean: that takes illumination and the orange disc
    that all fundus photographs share. Mirroring turns the sign of the odd horizontal frequencies, so a mirrored
    photograph's hash follows from its own (`mirrored`).

    Source: Zauner, 2010 (signs of the discrete cosine transform); the band of sizes is ours.

    Args:
        image: At any scale at which the field of view is 64 px or wider.
        field_of_view: In pixels of ``image``, or None to take the whole of it.

    Returns:
        Eight words; all 0 where there is no structure to recognise.
    """
    green_SS, within_SS = _square(image, field_of_view)
    weight_SS = (within_SS & _disc()).astype(np.float32)
    blurred = functools.partial(ndimage.gaussian_filter, mode="constant")
    mean_SS = blurred(green_SS * weight_SS, _ILLUMINATION_PX) / np.maximum(blurred(weight_SS, _ILLUMINATION_PX), 1e-3)
    detail_SS = blurred((green_SS - mean_SS) * weight_SS, _NOISE_PX)
    if not weight_SS.any() or float(detail_SS[weight_SS > 0].std()) < _MIN_SPREAD:
        return np.zeros(_NUM_WORDS, np.uint64)
    frequencies = fft.dctn(detail_SS, norm="ortho").ravel()[_coefficients()]
    return np.packbits(frequencies > 0, bitorder="little").view("<u8").astype(np.uint64)


@functools.cache
def _disc() -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[:_SIDE_PX, :_SIDE_PX] - (_SIDE_PX - 1) / 2
    disc: npt.NDArray[np.bool_] = np.hypot(y, x) < _RADIUS_SHARE * _SIDE_PX / 2
    return disc


@functools.cache
def _coefficients() -> npt.NDArray[np.int64]:
    """The frequencies in the order of the bits: lowest first, the first 256 dealt over the pieces of the bands."""
    u, v = np.mgrid[:_SIDE_PX, :_SIDE_PX]
    radius = np.hypot(u, v)
    order = np.argsort(radius.ravel() + 1e-5 * u.ravel(), kind="stable")
    order = order[radius.ravel()[order] >= 3][: 64 * _NUM_WORDS]
    dealt = order[: 16 * _NUM_PIECES].reshape(16, _NUM_PIECES).T.ravel()
    return np.concatenate([dealt, order[16 * _NUM_PIECES :]])


@functools.cache
def _mirror_words() -> Words:
    is_odd = _coefficients() % _SIDE_PX % 2 == 1
    return np.packbits(is_odd, bitorder="little").view("<u8").astype(np.uint64)


def mirrored(hashes_NW: Words) -> Words:
    """Returns the hashes of the same photographs, mirrored left to right."""
    return hashes_NW ^ _mirror_words()


def distance(first_PW: Words, second_PW: Words) -> npt.NDArray[np.int64]:
    """Returns how many bits differ, row by row, in the better of the two orientations."""
    apart = first_PW ^ second_PW
    direct = np.bitwise_count(apart).sum(axis=1, dtype=np.int64)
    turned = np.bitwise_count(mirrored(apart)).sum(axis=1, dtype=np.int64)
    bits: npt.NDArray[np.int64] = np.minimum(direct, turned)
    return bits


def _square(
    image: Photograph, field_of_view: FieldOfView | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Returns the green channel of the square around the circle, and where it lies in the photograph."""
    height, width = image.shape[:2]
    if field_of_view is None:
        centre_x, centre_y, half = width / 2, height / 2, max(width, height) / 2
    else:
        centre_x, centre_y, half = field_of_view.x_px, field_of_view.y_px, field_of_view.radius_px
    reach = (half - centre_x, half - centre_y, centre_x + half - width, centre_y + half - height)
    pad = max(0, math.ceil(max(reach)))
    box = (centre_x - half + pad, centre_y - half + pad, centre_x + half + pad, centre_y + half + pad)
    canvas = np.pad(
        np.stack([image[:, :, 1], np.full((height, width), 255, np.uint8)]), ((0, 0), (pad, pad), (pad, pad))
    )
    green, within = (
        np.asarray(Image.fromarray(plane).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BILINEAR, box=box))
        for plane in canvas
    )
    return green.astype(np.float32), within > 250


def hash_encoded(encoded: bytes, *, width_px: int, field_of_view: FieldOfView | None) -> Words:
    """Hashes a shard's photograph, decoded at a fraction of its size.

    Args:
        encoded: JPEG or PNG bytes.
        width_px: The photograph's width.
        field_of_view: In pixels of the whole photograph.

    Raises:
        fundus.UnreadablePhotograph: If it cannot be decoded.
    """
    diameter_px = 2 * field_of_view.radius_px if field_of_view else width_px
    image, factor = fundus.decode_reduced(encoded, diameter_px / _SIDE_PX)
    if field_of_view:
        field_of_view = FieldOfView(
            x_px=field_of_view.x_px / factor,
            y_px=field_of_view.y_px / factor,
            radius_px=field_of_view.radius_px / factor,
        )
    return hash_photograph(image, field_of_view)


def signatures_uri(hub_uri: str, part: Shard) -> str:
    """Returns where the signatures of a shard lie: named by its content, so that they are made once."""
    return storage.join(hub_uri, "shards", "signatures", f"{part.sha256}.parquet")


def without_signatures(hub_uri: str, parts: Sequence[Shard]) -> list[Shard]:
    """Returns the shards that have no signatures yet, with one look at the hub."""
    signed = set(storage.list_names(storage.join(hub_uri, "shards", "signatures")))
    return [part for part in parts if f"{part.sha256}.parquet" not in signed]


def sign_shard(hub_uri: str, part: Shard) -> None:
    """Makes the signatures of one shard; a photograph that cannot be decoded gets the hash of a blank."""
    columns = ["image", "image_id", "site_id", "patient", "width_px", "fov_x_px", "fov_y_px", "fov_radius_px"]
    rows = []
    for row in shard.read_rows(storage.join(hub_uri, part.path), columns):
        field_of_view = None
        if row["fov_radius_px"] is not None:
            field_of_view = FieldOfView(x_px=row["fov_x_px"], y_px=row["fov_y_px"], radius_px=row["fov_radius_px"])
        try:
            words = hash_encoded(row["image"], width_px=row["width_px"], field_of_view=field_of_view)
        except fundus.UnreadablePhotograph:
            words = np.zeros(_NUM_WORDS, np.uint64)
        rows.append(
            {
                "image_key": image_key(row["image_id"]),
                "hash": words.astype("<u8").tobytes(),
                "patient": None if row["patient"] is None else patient_key(row["site_id"], row["patient"]),
            }
        )
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SIGNATURE_SCHEMA), stream, compression="ZSTD", use_dictionary=False)
    storage.write_bytes(signatures_uri(hub_uri, part), stream.getvalue())


def read_signatures(hub_uri: str, parts: Sequence[Shard]) -> Signatures:
    """Reads the signatures of shards, one after another in their order: 80 bytes a photograph.

    Raises:
        StorageError: If a shard has none.
        LineageError: If they were made by another version, or are of another number of photographs.
    """
    starts = np.concatenate([[0], np.cumsum([part.num_images for part in parts])]).astype(np.int64)
    signatures = Signatures(
        image_keys=np.empty(starts[-1], np.uint64),
        hashes=np.empty((starts[-1], _NUM_WORDS), np.uint64),
        patients=np.empty(starts[-1], np.uint64),
    )

    def read(place: int) -> None:
        uri, rows = signatures_uri(hub_uri, parts[place]), slice(starts[place], starts[place + 1])
        try:
            table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
        except StorageError as error:
            raise StorageError(f"{error}; `python -m jobs.assemble_corpus` makes signatures") from error
        if table.schema.metadata != SIGNATURE_SCHEMA.metadata or len(table) != parts[place].num_images:
            raise LineageError(f"{uri} is of another version or of another shard; delete it and assemble again")
        signatures.image_keys[rows] = table["image_key"].to_numpy()
        signatures.hashes[rows] = words_of(table["hash"])
        signatures.patients[rows] = table["patient"].fill_null(0).to_numpy()

    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(read, range(len(parts))))
    return signatures


def words_of(hashes: pa.ChunkedArray) -> Words:
    """Returns a column of hashes as words, (N, 8)."""
    joined = b"".join(
        chunk.buffers()[1][chunk.offset * 64 : (chunk.offset + len(chunk)) * 64] for chunk in hashes.chunks
    )
    return np.frombuffer(joined, dtype="<u8").reshape(-1, _NUM_WORDS).astype(np.uint64)


def _band_keys(hashes_NW: Words, band: tuple[int, ...]) -> Words:
    """Returns four pieces of each hash as one number, the same for a photograph and its mirror image."""
    pieces = np.ascontiguousarray(hashes_NW, dtype="<u8").view("<u2")
    mirror = _mirror_words()[: _NUM_PIECES // 4].astype("<u8").view("<u2")
    keys = np.empty((len(pieces), 4), "<u2")
    keys_mirror = np.empty((1, 4), "<u2")
    for place, piece in enumerate(reversed(band)):  # little endian: the band's first piece weighs most
        keys[:, place], keys_mirror[:, place] = pieces[:, piece], mirror[piece]
    straight = keys.view("<u8").ravel()
    canonical: Words = np.minimum(straight, straight ^ keys_mirror.view("<u8").ravel()).astype(np.uint64, copy=False)
    return canonical


def find_pairs(hashes_NW: Words, *, threshold_bits: int = THRESHOLD_BITS) -> Rows:
    """Finds pairs of near-duplicates among many photographs.

    Bands: two photographs are compared if in one of 32 orders, each a sort by 64 bits of the hash, they are at most
    eight places apart and agree in the first 32 bits. So time and memory grow as n log n however alike photographs are.

    Source: Charikar, STOC 2002 (sorted permutations of a hash); Manku et al., WWW 2007.

    Returns:
        Pairs of rows (P, 2), the lower row first, each once.
    """
    found: list[Rows] = [np.empty(0, np.int64)]
    for band in _BANDS:
        keys = _band_keys(hashes_NW, band)
        order = np.argsort(keys)
        prefixes = (keys >> np.uint64(32)).astype(np.uint32)[order]
        del keys
        places = np.flatnonzero(prefixes[1:] == prefixes[:-1])
        for offset in range(1, _NEIGHBOURS + 1):
            for chunk in _chunks(len(places)):
                left, right = order[places[chunk]], order[places[chunk] + offset]
                is_near = distance(hashes_NW[left], hashes_NW[right]) <= threshold_bits
                is_near &= hashes_NW[left].any(axis=1) & hashes_NW[right].any(axis=1)
                left, right = left[is_near], right[is_near]
                found.append(np.minimum(left, right) * len(hashes_NW) + np.maximum(left, right))
            places = places[places + offset + 1 < len(order)]
            places = places[prefixes[places] == prefixes[places + offset + 1]]
    return _decoded(np.unique(np.concatenate(found)), len(hashes_NW))


def find_matches(hashes_NW: Words, wanted_MW: Words, *, threshold_bits: int = THRESHOLD_BITS) -> Rows:
    """Finds the photographs that are near-duplicates of a few wanted ones.

    As `find_pairs`, but all that agree with a wanted one in the first 32 bits of a band are compared with it.

    Returns:
        Pairs (P, 2) of a row of ``hashes_NW`` and one of ``wanted_MW``, each once.
    """
    asked = np.flatnonzero(wanted_MW.any(axis=1))
    found: list[Rows] = [np.empty(0, np.int64)]
    for rows in _chunks(len(hashes_NW)) if len(asked) else ():
        chunk_NW = hashes_NW[rows]
        for band in _BANDS:
            wanted_keys = _band_keys(wanted_MW[asked], band) >> np.uint64(32)
            order = np.argsort(wanted_keys)
            keys = _band_keys(chunk_NW, band) >> np.uint64(32)
            first = np.searchsorted(wanted_keys[order], keys, side="left")
            num = np.searchsorted(wanted_keys[order], keys, side="right") - first
            near = np.flatnonzero(num)
            left = np.repeat(near, num[near])
            within = np.arange(len(left)) - np.repeat(np.cumsum(num[near]) - num[near], num[near])
            right = asked[order[np.repeat(first[near], num[near]) + within]]
            for part in _chunks(len(left)):
                is_near = distance(chunk_NW[left[part]], wanted_MW[right[part]]) <= threshold_bits
                is_near &= chunk_NW[left[part]].any(axis=1)
                found.append((rows.start + left[part][is_near]) * len(wanted_MW) + right[part][is_near])
    return _decoded(np.unique(np.concatenate(found)), len(wanted_MW))


def _decoded(codes: Rows, num_right: int) -> Rows:
    return np.stack(np.divmod(codes, max(1, num_right)), axis=1)


def _chunks(length: int) -> Iterator[slice]:
    for first in range(0, length, _ROWS_AT_ONCE):
        yield slice(first, min(first + _ROWS_AT_ONCE, length))


def repeated_rows(image_keys_N: Words, is_last_N: npt.NDArray[np.bool_]) -> Rows:
    """Returns the rows whose pixels another row has too, but for the one of each that stays.

    Args:
        image_keys_N: The image keys.
        is_last_N: Rows that stay only if no other does: the synthetic ones. Of several, the first row stays.
    """
    order = np.argsort(image_keys_N, kind="stable")
    same = np.flatnonzero(image_keys_N[order[1:]] == image_keys_N[order[:-1]])
    rows = order[np.unique(np.concatenate([same, same + 1]))]
    rows = rows[np.lexsort((rows, is_last_N[rows], image_keys_N[rows]))]
    is_first = np.concatenate([[True], image_keys_N[rows[1:]] != image_keys_N[rows[:-1]]])[: len(rows)]
    return np.sort(rows[~is_first])


def near_duplicate_rows(
    signatures: Signatures, is_last_N: npt.NDArray[np.bool_], *, threshold_bits: int = THRESHOLD_BITS
) -> Rows:
    """Returns the rows to leave out so that of near-duplicates one stays: real before synthetic, lowest image id first.

    Each row left out is a near-duplicate of one that stays. Where more than eight are alike, a round leaves too many;
    those that had a near-duplicate go through another.
    """
    rows, left_out = np.arange(len(signatures)), [np.empty(0, np.int64)]
    while len(rows) > 1:
        hashes_NW = signatures.hashes if len(rows) == len(signatures) else signatures.hashes[rows]
        pairs = rows[find_pairs(hashes_NW, threshold_bits=threshold_bits)]
        nodes = np.unique(pairs)
        ranked = nodes[np.lexsort((nodes, signatures.image_keys[nodes], is_last_N[nodes]))]
        ranks = np.argsort(ranked)[np.searchsorted(nodes, pairs)] if len(pairs) else pairs
        excluded = ranked[_dominated(np.sort(ranks, axis=1), len(nodes))]
        left_out.append(excluded)
        rows = np.setdiff1d(nodes, excluded)
    return np.sort(np.concatenate(left_out))


def _dominated(edges_P2: Rows, num_nodes: int) -> Rows:
    """Goes through nodes from the lowest up and excludes those with a neighbour that stays."""
    is_excluded = np.zeros(num_nodes, bool)
    while len(edges_P2):
        is_lower = np.zeros(num_nodes, bool)
        is_lower[edges_P2[:, 1]] = True
        stays = ~is_lower[edges_P2[:, 0]]
        is_excluded[edges_P2[stays, 1]] = True
        edges_P2 = edges_P2[~is_excluded[edges_P2].any(axis=1)]
    return np.flatnonzero(is_excluded)
