"""Duplicates: planted near-duplicates are found, and photographs of other eyes are not taken for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from gretfound import duplicates, fundus, phantom, shard, storage
from gretfound.errors import LineageError, StorageError
from gretfound.fundus import Photograph
from tests.hubs import draw_shard_set

Bits = npt.NDArray[np.uint64]


def replicas(image: Photograph) -> Iterator[tuple[str, bytes]]:
    """Yields near-duplicates of a photograph by name, encoded as a shard holds them."""
    height, width = image.shape[:2]
    rows, columns = max(1, round(height * 0.02)), max(1, round(width * 0.02))

    def resized(share: float, of: Photograph = image) -> Photograph:
        return np.array(Image.fromarray(of).resize((round(width * share), round(height * share)), 3))

    def lit(share: float) -> Photograph:
        return np.clip(image * share, 0, 255).astype(np.uint8)

    yield "JPEG 50", fundus.encode_jpeg(image, quality=50)
    for share in (0.5, 0.7, 0.9):
        yield f"resized {share}", fundus.encode_jpeg(resized(share), quality=90)
    yield "trimmed 2%", fundus.encode_jpeg(image[rows:-rows, columns:-columns], quality=90)
    yield "trimmed 2%, one corner", fundus.encode_jpeg(image[rows:, columns:], quality=90)
    for share in (0.9, 1.1):
        yield f"brightness {share}", fundus.encode_jpeg(lit(share), quality=90)
    yield "mirrored", fundus.encode_jpeg(image[:, ::-1], quality=90)
    yield "mirrored, resized, dimmed", fundus.encode_jpeg(resized(0.7, of=lit(0.9)[:, ::-1]), quality=75)


def hashed(encoded: bytes) -> Bits:
    image = fundus.decode_photograph(encoded)
    return duplicates.hash_encoded(encoded, width_px=image.shape[1], field_of_view=fundus.find_field_of_view(image))


def measure(photographs: Mapping[str, Photograph], *, planted_every: int) -> tuple[float, float, float, set[str]]:
    """Plants near-duplicates of some photographs among all of them.

    Returns:
        Recall over planted pairs by `find_pairs` and by `find_matches`, precision of `find_pairs`, and the pairs of
        photographs that it found beyond the planted ones.
    """
    names, hashes, source = [], [], []
    for place, (name, image) in enumerate(photographs.items()):
        encoded = [("", fundus.encode_jpeg(image)), *(replicas(image) if place % planted_every == 0 else ())]
        for kind, content in encoded:
            names.append(f"{name} {kind}".strip())
            hashes.append(hashed(content))
            source.append(place)
    source_N, is_own_N = np.array(source), np.array([name in photographs for name in names])
    own_of = np.flatnonzero(is_own_N)[source_N]
    pairs = duplicates.find_pairs(np.stack(hashes))
    is_true = source_N[pairs[:, 0]] == source_N[pairs[:, 1]]
    planted = {(int(own), int(row)) for row, own in enumerate(own_of) if row != own}
    found = planted & {tuple(pair) for pair in pairs.tolist()}
    matches = duplicates.find_matches(np.stack(hashes), np.stack(hashes)[is_own_N])
    matched = {(int(np.flatnonzero(is_own_N)[wanted]), int(row)) for row, wanted in matches} & planted
    surplus = {" = ".join(sorted((names[a], names[b]))) for a, b in pairs[~is_true & is_own_N[pairs].all(axis=1)]}
    return len(found) / len(planted), len(matched) / len(planted), float(is_true.mean()), surplus


def test_find_pairs__planted_among_drawn_photographs() -> None:
    photographs = {
        f"{name} {seed} {eye}": phantom.draw_eye(phantom.SITES[name], seed=seed, size_px=160, eye=eye).image
        for name in ("aster", "birch", "cedar")
        for seed, eye in phantom.list_eyes(phantom.SITES[name], num_images=14, seed=11)
    }
    recall, recall_of_wanted, precision, surplus = measure(photographs, planted_every=3)
    assert recall >= 0.95 and recall_of_wanted >= 0.95
    assert precision == 1.0 and not surplus


def test_find_pairs__planted_among_real_photographs(real_photographs: Path) -> None:
    paths = [path for name in ("hrf", "chasedb1") for path in sorted((real_photographs / name / "traindata").iterdir())]
    photographs = {path.stem: np.array(Image.open(path).convert("RGB")) for path in paths}
    recall, recall_of_wanted, precision, surplus = measure(photographs, planted_every=8)
    assert recall >= 0.95 and recall_of_wanted >= 0.95
    assert precision == 1.0, f"other eyes and other patients were taken for near-duplicates: {surplus}"


def random_hashes(rng: np.random.Generator, num: int) -> Bits:
    return rng.integers(0, 2**64, size=(num, 8), dtype=np.uint64)


def with_flips(hashes: Bits, num_bits: int, rng: np.random.Generator) -> Bits:
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(512, num_bits, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def test_find_pairs__as_comparing_everything_with_everything() -> None:
    rng = np.random.default_rng(0)
    own = random_hashes(rng, 400)
    near = np.concatenate([with_flips(own[:100], 12, rng), duplicates.mirrored(with_flips(own[100:150], 12, rng))])
    far = with_flips(own[200:260], 73, rng)
    hashes = np.concatenate([own, near, far, np.zeros((5, 8), np.uint64)])
    apart = np.array([duplicates.distance(hashes, np.broadcast_to(row, hashes.shape)) for row in hashes])
    expected = {(a, b) for a, b in np.argwhere(apart <= duplicates.THRESHOLD_BITS).tolist() if a < b and b < 610}
    assert len(expected) == 150
    assert {tuple(pair) for pair in duplicates.find_pairs(hashes).tolist()} == expected
    matches = {(b, a) for a, b in duplicates.find_matches(hashes[400:], hashes[:400]).tolist()}
    assert matches == {(a, b - 400) for a, b in expected}
    assert len(duplicates.find_pairs(hashes[:1])) == len(duplicates.find_matches(hashes[:0], hashes)) == 0


def test_near_duplicate_rows__each_is_near_one_that_stays() -> None:
    rng = np.random.default_rng(1)
    one = random_hashes(rng, 1)
    hashes = np.concatenate([np.repeat(one, 300, axis=0), random_hashes(rng, 50), with_flips(one, 10, rng)])
    signatures = duplicates.Signatures(
        image_keys=rng.permutation(351).astype(np.uint64), hashes=hashes, patients=np.zeros(351, np.uint64)
    )
    is_synthetic = np.ones(351, bool)
    is_synthetic[[7, 350]] = False
    left_out = duplicates.near_duplicate_rows(signatures, is_synthetic)
    stays = set(range(351)) - set(left_out.tolist())
    first = min((7, 350), key=lambda row: signatures.image_keys[row])
    assert stays == {first, *range(300, 350)}, "of 301 alike the real one of the lower id stays"


def test_repeated_rows__real_before_synthetic_then_the_first() -> None:
    keys = np.array([5, 3, 5, 9, 3, 5], dtype=np.uint64)
    is_synthetic = np.array([True, False, False, True, False, False])
    assert duplicates.repeated_rows(keys, is_synthetic).tolist() == [0, 4, 5]
    assert duplicates.repeated_rows(np.arange(3, dtype=np.uint64), np.zeros(3, bool)).tolist() == []


def test_hash_photograph__a_blank_is_like_no_other() -> None:
    blank = np.full((80, 80, 3), 90, np.uint8)
    assert not duplicates.hash_photograph(blank, None).any()


def test_sign_shard__signatures_in_the_order_of_rows(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    record = draw_shard_set(hub_uri, "aster", num_images=6)
    uri = storage.join(hub_uri, record.shards[0].path)
    rows = list(shard.read_rows(uri))
    rows[0]["patient"], rows[1]["image"] = "pseudonym", rows[1]["image"][:100]
    parts = (shard.write_shard(hub_uri, rows), record.shards[1])
    with pytest.raises(StorageError, match=r"jobs\.assemble_corpus"):
        duplicates.read_signatures(hub_uri, parts)
    assert duplicates.without_signatures(hub_uri, parts) == list(parts)
    for part in parts:
        duplicates.sign_shard(hub_uri, part)
    assert not duplicates.without_signatures(hub_uri, parts)
    signatures = duplicates.read_signatures(hub_uri, parts)
    image_ids = [row["image_id"] for part in parts for row in shard.read_rows(storage.join(hub_uri, part.path))]
    assert signatures.image_keys.tolist() == [int(image_id[:16], 16) for image_id in image_ids]
    assert signatures.patients.tolist() == [duplicates.patient_key("aster", "pseudonym"), 0, 0, 0, 0, 0]
    assert signatures.hashes.any(axis=1).tolist() == [True, False, True, True, True, True]
    shorter = shard.write_shard(hub_uri, rows[:2])
    storage.write_bytes(
        duplicates.signatures_uri(hub_uri, shorter), storage.read_bytes(duplicates.signatures_uri(hub_uri, parts[1]))
    )
    with pytest.raises(LineageError, match="another version or of another shard"):
        duplicates.read_signatures(hub_uri, (shorter,))
