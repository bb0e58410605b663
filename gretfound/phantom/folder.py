"""A drawn site's folder, as a data manager would prepare it."""

import csv
import io
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from PIL import Image

from gretfound.phantom.eye import draw_eye
from gretfound.phantom.population import Eye, PhantomSite, stream

CHUNK_IMAGES = 32
DR_WORDS = (
    "no diabetic retinopathy",
    "mild diabetic retinopathy",
    "moderate diabetic retinopathy",
    "severe diabetic retinopathy",
    "proliferative diabetic retinopathy",
)
METADATA_COLUMNS = (
    "Image", "Patient", "Eye", "Age", "Sex", "Ethnicity", "Country", "Camera", "FieldOfView", "DR", "Glaucoma", "AMD"
)  # fmt: skip


def list_eyes(site: PhantomSite, *, num_images: int, seed: int) -> list[tuple[int, Eye]]:
    """Lists the photographs of a site: (patient's seed, eye), at most one of each eye of a patient.

    A longer list begins with the shorter one; the patients of two seeds differ.
    """
    photographs: list[tuple[int, Eye]] = []
    for index in count():
        patient_seed = seed * 2**32 + index
        rng = stream(site, patient_seed, "visit")
        eyes: tuple[Eye, Eye] = ("right", "left") if rng.random() < 0.5 else ("left", "right")
        photographs.extend((patient_seed, eye) for eye in (eyes if rng.random() < site.both_eyes_share else eyes[:1]))
        if len(photographs) >= num_images:
            break
    return photographs[:num_images]


def _write_file(path: Path, content: bytes) -> None:
    """Writes through a temporary file beside it, so that no reader sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as partial:
        partial.write(content)
    Path(partial.name).replace(path)


def _write_eyes(
    site: PhantomSite, folder_path: Path, photographs: list[tuple[int, Eye]], size_px: int, image_format: str
) -> list[list[str]]:
    """Draws and writes some photographs; returns their rows of the metadata."""
    rows = []
    for patient_seed, eye in photographs:
        drawn = draw_eye(site, seed=patient_seed, size_px=size_px, eye=eye)
        truth, patient = drawn.truth, f"{site.name}-{patient_seed:05d}"
        side = "OD" if eye == "right" else "OS"
        name = f"{patient}_{side}.{image_format}"
        encoded = io.BytesIO()
        if image_format == "jpg":
            Image.fromarray(drawn.image).save(encoded, "JPEG", quality=site.jpeg_quality, subsampling=0)
        else:
            Image.fromarray(drawn.image).save(encoded, "PNG")
        _write_file(folder_path / "traindata" / name, encoded.getvalue())
        rows.append([
            name, patient, side, str(truth.age), truth.sex, truth.ethnicity, site.country, site.camera,
            f"{site.fov_deg:g}", DR_WORDS[truth.dr], "glaucoma" if truth.glaucoma else "no glaucoma",
            "age-related macular degeneration" if truth.amd else "no age-related macular degeneration",
        ])  # fmt: skip
    return rows


def write_site(
    site: PhantomSite,
    folder_path: Path,
    *,
    num_images: int,
    seed: int,
    size_px: int,
    image_format: Literal["jpg", "png"] = "jpg",
    num_workers: int | None = None,
) -> Path:
    """Writes a site's folder, `traindata/` and `metadata.csv`, as a data manager would prepare it.

    Equal arguments give equal bytes, whatever the number of workers. The metadata is written last.

    Args:
        folder_path: Made if absent.
        num_workers: Processes; by default one for each core this process may use. Fewer than 64 photographs take none.

    Returns:
        `folder_path`.

    Raises:
        ValueError: If an argument is out of range.
    """
    if image_format not in ("jpg", "png") or num_images < 1 or seed < 0:
        raise ValueError(
            f"found image_format={image_format!r}, num_images={num_images}, seed={seed}; "
            "required jpg or png, at least 1 image and a seed of at least 0"
        )
    folder_path = Path(folder_path)
    (folder_path / "traindata").mkdir(parents=True, exist_ok=True)
    photographs = list_eyes(site, num_images=num_images, seed=seed)
    chunks = [photographs[i : i + CHUNK_IMAGES] for i in range(0, num_images, CHUNK_IMAGES)]
    num_chunks = len(chunks)
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), num_chunks // 2)
    shared = ([site] * num_chunks, [folder_path] * num_chunks, chunks, [size_px] * num_chunks)
    formats = [image_format] * num_chunks
    if num_workers > 1:
        # Spawned, not forked: the caller may hold threads (torch, Ray) that a fork would deadlock.
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            rows = list(chain.from_iterable(pool.map(_write_eyes, *shared, formats)))
    else:
        rows = list(chain.from_iterable(map(_write_eyes, *shared, formats)))
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([METADATA_COLUMNS, *rows])
    _write_file(folder_path / "metadata.csv", table.getvalue().encode())
    return folder_path
