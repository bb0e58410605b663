"""Drawn CFPs: pure, at home in the site's layout, hard for raw pixels and easy for who looks at structure."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from gretfound.phantom import SITES, Phantom, draw_eye, draw_patient, list_eyes, write_site

NUM_PHOTOGRAPHS = 400
SIZE_PX = 128


@pytest.fixture(scope="module")
def photographs() -> list[Phantom]:
    site = SITES["dune"]
    eyes = list_eyes(site, num_images=NUM_PHOTOGRAPHS, seed=0)
    return [draw_eye(site, seed=seed, eye=eye, size_px=SIZE_PX) for seed, eye in eyes]


def labels(photographs: list[Phantom], task: str) -> npt.NDArray[np.bool_]:
    match task:
        case "referable DR":
            return np.array([p.truth.dr >= 2 for p in photographs])
        case "glaucoma":
            return np.array([p.truth.glaucoma for p in photographs])
        case _:
            return np.array([p.truth.amd for p in photographs])


def distance(photograph: Phantom, x_px: float, y_px: float) -> npt.NDArray[np.floating]:
    y, x = np.mgrid[: photograph.truth.height_px, : photograph.truth.width_px]
    return np.hypot(x - x_px, y - y_px)


def blob_score(
    photograph: Phantom,
    *,
    sign: int,
    scales_deg: tuple[float, ...],
    reach_deg: float,
    faintest: float,
    strongest: float,
) -> float:
    """Sums how much of the green channel is blobs within `reach_deg` of the fovea, off disc and fovea.

    Both eigenvalues of the Hessian are strong in a blob, only one in a vessel.
    """
    truth = photograph.truth
    green = photograph.image[..., 1].astype(np.float32)
    relative = sign * green / (ndimage.uniform_filter(green, int(6 * truth.px_per_deg)) + 4)
    fovea = distance(photograph, truth.fovea_x_px, truth.fovea_y_px) / truth.px_per_deg
    searched = distance(photograph, truth.fov_x_px, truth.fov_y_px) < 0.9 * truth.fov_radius_px
    searched &= distance(photograph, truth.disc_x_px, truth.disc_y_px) > 1.4 * truth.disc_radius_px
    searched &= (fovea > 0.6) & (fovea < reach_deg)
    score = 0.0
    for scale_deg in scales_deg:
        sigma = max(1.0, scale_deg * truth.px_per_deg)
        xx, yy, xy = (
            sigma**2 * ndimage.gaussian_filter(relative, sigma, order=order) for order in ((0, 2), (2, 0), (1, 1))
        )
        weaker = -((xx + yy) / 2 + np.sqrt(((xx - yy) / 2) ** 2 + xy**2))
        peaks = searched & (weaker == ndimage.maximum_filter(weaker, 5)) & (weaker > faintest)
        score += float(np.minimum(weaker[peaks], strongest).sum())
    return score


def cup_score(photograph: Phantom) -> float:
    """How bright the disc still is at half its radius, relative to its border: the cup's edge lies beyond or before."""
    truth = photograph.truth
    green = photograph.image[..., 1].astype(np.float32)
    away = distance(photograph, truth.disc_x_px, truth.disc_y_px) / truth.disc_radius_px
    seen = distance(photograph, truth.fov_x_px, truth.fov_y_px) < truth.fov_radius_px - 2
    rings = [green[seen & (away >= low) & (away < low + 0.2)] for low in (0.0, 0.5, 0.7)]
    if min(map(len, rings)) < 2:
        return 0.0
    centre, half, border = (float(np.median(ring)) for ring in rings)
    return (half - border) / (abs(centre) + 1)


def structure_score(photograph: Phantom, task: str) -> float:
    match task:
        case "referable DR":
            return blob_score(
                photograph, sign=-1, scales_deg=(0.28, 0.45, 0.7), reach_deg=90, faintest=0.03, strongest=0.2
            )
        case "glaucoma":
            return cup_score(photograph)
        case _:
            return blob_score(photograph, sign=1, scales_deg=(0.45,), reach_deg=6.5, faintest=0.012, strongest=0.04)


@pytest.mark.parametrize("task", ["referable DR", "glaucoma", "AMD"])
def test_draw_eye__raw_pixels_tell_little(photographs: list[Phantom], task: str) -> None:
    thumbnails = [
        np.asarray(Image.fromarray(p.image).resize((32, 32), Image.Resampling.BOX), np.float64) for p in photographs
    ]
    x = np.stack(thumbnails).reshape(len(photographs), -1) / 255
    y = labels(photographs, task)
    # All components are kept: a rotation, so the same probe in 320 numbers instead of 3,072.
    probe = make_pipeline(StandardScaler(), PCA(), LogisticRegression(C=1e-2, max_iter=500))
    patients = [p.truth.seed for p in photographs]
    # Two BLAS threads on two busy cores wait for each other ten times longer than they work.
    with threadpool_limits(1):
        predicted = cross_val_predict(probe, x, y, groups=patients, cv=GroupKFold(5), method="predict_proba")[:, 1]
    assert roc_auc_score(y, predicted) < 0.65


@pytest.mark.parametrize("task", ["referable DR", "glaucoma", "AMD"])
def test_draw_eye__structure_tells_disease(photographs: list[Phantom], task: str) -> None:
    scores = [structure_score(p, task) for p in photographs]
    assert roc_auc_score(labels(photographs, task), scores) > 0.85


@pytest.mark.parametrize("task", ["referable DR", "glaucoma", "AMD"])
def test_draw_eye__mean_colour_tells_little(photographs: list[Phantom], task: str) -> None:
    y = labels(photographs, task)
    for channel in range(3):
        area = roc_auc_score(y, [p.image[..., channel].mean() for p in photographs])
        assert 0.4 < area < 0.6


def test_draw_eye__is_a_pure_function() -> None:
    first = draw_eye(SITES["aster"], seed=7, eye="left", size_px=96)
    draw_eye(SITES["birch"], seed=8, size_px=64)
    second = draw_eye(SITES["aster"], seed=7, eye="left", size_px=96)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.image.dtype == np.uint8
    assert first.image.shape == (96, 96, 3)


def test_draw_eye__same_eye_at_another_size() -> None:
    small, large = (draw_eye(SITES["dune"], seed=11, size_px=size) for size in (112, 448))
    assert large.truth.fov_radius_px == pytest.approx(4 * small.truth.fov_radius_px)
    np.testing.assert_allclose((large.truth.arteries[..., 0] + 0.5) / 4, small.truth.arteries[..., 0] + 0.5, atol=0.01)
    reduced = np.asarray(Image.fromarray(large.image).reduce(4), np.float32)
    assert np.abs(reduced - small.image).mean() < 6
    assert np.corrcoef(reduced.ravel(), small.image.ravel())[0, 1] > 0.99


def test_draw_eye__truth_lies_where_it_was_drawn() -> None:
    site = replace(SITES["dune"], noise=0.0)
    for seed in range(6):
        for eye, side in (("right", 1), ("left", -1)):
            drawn = draw_eye(site, seed=seed, eye=eye, size_px=224)  # type: ignore[arg-type]
            truth = drawn.truth
            assert side * (truth.disc_x_px - truth.fovea_x_px) > 10 * truth.px_per_deg
            away = distance(drawn, truth.fov_x_px, truth.fov_y_px)
            assert drawn.image[away > truth.fov_radius_px + 2].max() <= 2
            assert np.median(drawn.image[(away < 0.97 * truth.fov_radius_px)][:, 0]) > 25
            green = drawn.image[..., 1].astype(np.float32)
            near_disc = distance(drawn, truth.disc_x_px, truth.disc_y_px) / truth.disc_radius_px
            ring = green[(near_disc > 1.4) & (near_disc < 2.0) & (away < truth.fov_radius_px - 2)]
            assert np.percentile(green[near_disc < 0.9], 75) > np.median(ring)
            from_centre = np.hypot(truth.veins[..., 0] - truth.fov_x_px, truth.veins[..., 1] - truth.fov_y_px)
            inside = from_centre < 0.9 * truth.fov_radius_px
            x, y, _ = truth.veins[inside & (truth.veins[..., 2] > 2.0)].T
            background = ndimage.uniform_filter(green, 25)
            on_vein = green[y.round().astype(int), x.round().astype(int)]
            assert np.median(on_vein / background[y.round().astype(int), x.round().astype(int)]) < 0.85


def test_draw_eye__lesions_keep_colour_and_vessels() -> None:
    healthy, ill = (replace(SITES["aster"], noise=0.0, amd_share=amd) for amd in (0.0, 1.0))
    healthy = replace(healthy, dr_shares=(1, 0, 0, 0, 0))
    ill = replace(ill, dr_shares=(0, 0, 1, 0, 0))
    changes, differences = [], []
    for seed in range(20):
        before, after = (draw_eye(site, seed=seed, size_px=128) for site in (healthy, ill))
        np.testing.assert_array_equal(before.truth.arteries, after.truth.arteries)
        changes.append(after.image.mean((0, 1)) - before.image.mean((0, 1)))
        differences.append(np.abs(after.image.astype(float) - before.image).mean())
    assert np.abs(np.mean(changes, axis=0)).max() < 0.15
    assert np.mean(differences) > 0.5


def test_draw_eye__grades_have_their_lesions() -> None:
    for grade in range(5):
        shares = tuple(float(grade == g) for g in range(5))
        site = replace(SITES["aster"], dr_shares=shares, amd_share=0.0)  # type: ignore[arg-type]
        for seed in range(8):
            truth = draw_eye(site, seed=seed, size_px=64).truth
            # The fellow eye may be a grade milder.
            assert truth.dr in (grade, max(0, grade - 1))
            assert (len(truth.microaneurysms) > 0) == (truth.dr > 0)
            assert (len(truth.haemorrhages) > 0) == (truth.dr > 1)
            assert (len(truth.neovascular_tufts) > 0) == (truth.dr == 4)


def test_draw_eye__age_and_sex_leave_a_graded_mark() -> None:
    truths = [draw_eye(SITES["public"], seed=seed, size_px=32).truth for seed in range(200)]
    is_female = [t.sex == "female" for t in truths]
    separation = [-abs(t.disc_x_px - t.fovea_x_px) / t.disc_radius_px for t in truths]
    assert 0.6 < roc_auc_score(is_female, separation) < 0.95
    ratio = [float(np.median(t.arteries[-4:, :, 2]) / np.median(t.veins[-4:, :, 2])) for t in truths]
    assert np.corrcoef(ratio, [t.age for t in truths])[0, 1] < -0.25


def test_draw_patient__two_eyes_share_a_patient() -> None:
    site = SITES["cedar"]
    for seed in range(10):
        patient = draw_patient(site, seed=seed)
        for eye in ("right", "left"):
            truth = draw_eye(site, seed=seed, eye=eye, size_px=32).truth
            assert (truth.age, truth.sex, truth.ethnicity) == (patient.age, patient.sex, patient.ethnicity)


def test_draw_patient__sites_differ_as_they_say() -> None:
    for site in SITES.values():
        patients = [draw_patient(site, seed=seed) for seed in range(1500)]
        grades = np.bincount([p.dr for p in patients], minlength=5) / len(patients)
        np.testing.assert_allclose(grades, site.dr_shares, atol=0.045)
        assert np.mean([p.glaucoma for p in patients]) == pytest.approx(site.glaucoma_share, abs=0.045)
        assert np.mean([p.age for p in patients]) == pytest.approx(site.age_mean, abs=1.5)
        assert sum(share for _, share, _ in site.ethnicities) == pytest.approx(1)
        assert sum(site.dr_shares) == pytest.approx(1)


@pytest.mark.parametrize(("seed", "size_px", "eye"), [(-1, 64, "left"), (0, 8, "left"), (0, 64, "OD")])
def test_draw_eye__rejects_what_it_cannot_draw(seed: int, size_px: int, eye: str) -> None:
    with pytest.raises(ValueError, match="required"):
        draw_eye(SITES["aster"], seed=seed, size_px=size_px, eye=eye)  # type: ignore[arg-type]


def folder_bytes(folder_path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder_path)): p.read_bytes() for p in sorted(folder_path.rglob("*")) if p.is_file()}


def test_write_site__equal_bytes_whatever_the_workers(tmp_path: Path) -> None:
    alone = write_site(SITES["birch"], tmp_path / "1", num_images=70, seed=3, size_px=48, num_workers=1)
    together = write_site(SITES["birch"], tmp_path / "2", num_images=70, seed=3, size_px=48, num_workers=2)
    assert folder_bytes(alone) == folder_bytes(together)
    assert len(folder_bytes(alone)) == 71


def test_write_site__has_the_layout_of_a_site(tmp_path: Path) -> None:
    site = SITES["cedar"]
    folder_path = write_site(site, tmp_path, num_images=20, seed=1, size_px=64, image_format="png")
    with (folder_path / "metadata.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert sorted(r["Image"] for r in rows) == sorted(p.name for p in (folder_path / "traindata").iterdir())
    assert len({(r["Patient"], r["Eye"]) for r in rows}) == 20
    assert len({r["Patient"] for r in rows}) < 20
    for row, (seed, eye) in zip(rows, list_eyes(site, num_images=20, seed=1), strict=True):
        drawn = draw_eye(site, seed=seed, eye=eye, size_px=64)
        np.testing.assert_array_equal(np.asarray(Image.open(folder_path / "traindata" / row["Image"])), drawn.image)
        assert row["Eye"] == {"right": "OD", "left": "OS"}[drawn.truth.eye]
        assert int(row["Age"]) == drawn.truth.age
        assert row["Glaucoma"] == ("glaucoma" if drawn.truth.glaucoma else "no glaucoma")


def test_write_site__rejects_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jpg or png"):
        write_site(SITES["aster"], tmp_path, num_images=1, seed=0, size_px=64, image_format="tif")  # type: ignore[arg-type]


def test_main__writes_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gretfound.phantom", "aster", str(tmp_path / "a"), "--num-images", "3"]
    subprocess.run([*command, "--size-px", "64", "--seed", "2"], check=True, timeout=60)
    assert len(list((tmp_path / "a" / "traindata").glob("*.jpg"))) == 3
