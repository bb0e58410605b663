"""Spaces of features: the scattering against direct convolution, networks against timm, and what each space sees."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from scipy import ndimage

from gretfound import fundus
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError
from gretfound.evaluation import features, fidelity
from gretfound.phantom import SITES, draw_eye, list_eyes


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    site = SITES["aster"]
    eyes = list_eyes(site, num_images=64, seed=0)
    return [draw_eye(site, seed=seed, eye=eye, size_px=160).image for seed, eye in eyes]


@pytest.fixture(scope="module")
def halves(photographs) -> list[fidelity.Sample]:
    return [fidelity.describe(photographs[half::2], features.scattering_space) for half in (0, 1)]


def morlet(scale: int, index: int, reach: int) -> np.ndarray:
    """A Morlet wavelet in space, written down from its definition: a wave under a Gaussian, less its mean."""
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    angle, sigma, slant = math.pi * index / 6, 0.8 * 2**scale, 4 / 6
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
    wave = envelope * np.exp(1j * 0.75 * math.pi / 2**scale * along)
    return wave - envelope * wave.sum() / envelope.sum()


def convolved(image: np.ndarray, wavelet: np.ndarray) -> np.ndarray:
    real, imaginary = (ndimage.convolve(image, part, mode="wrap") for part in (wavelet.real, wavelet.imag))
    return np.hypot(real, imaginary)


def test_scattering_space__equals_direct_convolution(photographs):
    square = fundus.to_square(photographs[0], fundus.find_field_of_view(photographs[0]), 128) / 255.0
    green, red_green, green_blue = square[..., 1], square[..., 0] - square[..., 1], square[..., 1] - square[..., 2]
    found_D = features.scattering_space(photographs[:1])[0]
    assert found_D.shape == (features.NUM_SCATTERING_FEATURES,) == (82,)
    corner = [channel[:43, :43].mean() for channel in (green, red_green, green_blue)]
    assert found_D[[0, 9, 18]] == pytest.approx(corner, abs=1e-5)
    # Scale 1 begins after 27 means, 3 first-order and 16 second-order features of scale 0.
    moduli = [convolved(green, morlet(1, index, 9)) for index in range(6)]
    first = np.mean(moduli)
    assert found_D[27 + 3 + 16] == pytest.approx(math.log((first + 1e-4) / 1e-2), abs=0.02)
    # Then its pairs with scale 2: angles 0, 30, 60 and 90 degrees.
    second = {angle: [] for angle in range(4)}
    for index in range(6):
        for other in range(6):
            turn = (other - index) % 6
            second[min(turn, 6 - turn)].append(convolved(moduli[index], morlet(2, other, 18)).mean())
    expected = [math.log((np.mean(second[angle]) + 1e-4) / (first + 1e-4)) for angle in range(4)]
    assert found_D[27 + 3 + 16 + 3 :][:4] == pytest.approx(expected, abs=0.03)


def test_scattering_space__mirrored_and_turned_details_are_about_the_same(photographs):
    image = photographs[1]
    whole_D, mirrored_D, turned_D = features.scattering_space([image, image[:, ::-1].copy(), np.rot90(image).copy()])
    assert mirrored_D[27:] == pytest.approx(whole_D[27:], abs=0.02)
    assert turned_D[27:] == pytest.approx(whole_D[27:], abs=0.02)
    assert np.abs(mirrored_D[:27] - whole_D[:27]).max() > 0.01, "the grid of colours knows left from right"


def test_scattering_space__batch_and_black_photograph(photographs):
    together_ND = features.scattering_space(photographs[:3])
    apart_ND = np.concatenate([features.scattering_space([image]) for image in photographs[:3]])
    assert together_ND == pytest.approx(apart_ND, abs=1e-5)
    assert np.isfinite(features.scattering_space([np.zeros((50, 60, 3), dtype=np.uint8)])).all()


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)))


def shuffled(image: np.ndarray) -> np.ndarray:
    """Places quarters of the photograph anew: the same details, no fundus."""
    height, width = (side // 2 for side in image.shape[:2])
    top, bottom = image[:height], image[height:]
    return np.concatenate([
        np.concatenate([bottom[:, width:], bottom[:, :width]], axis=1),
        np.concatenate([top[:, width:], top[:, :width]], axis=1),
    ])  # fmt: skip


def repainted(image: np.ndarray) -> np.ndarray:
    return (image * np.array([0.75, 1.0, 1.0])).astype(np.uint8)


@pytest.mark.parametrize("damage", [blurred, shuffled, repainted])
def test_scattering_space__kid_sees_damage(photographs, halves, damage):
    real, fine = halves
    damaged = fidelity.describe((damage(image) for image in photographs[1::2]), features.scattering_space)
    arguments = {"trained_on": ["another"], "figures": ["kid"], "num_resamples": 100}
    good = fidelity.compare(real, fine, **arguments)["kid"]
    bad = fidelity.compare(real, damaged, **arguments)["kid"]
    assert good.low <= 0.0 <= good.high, "two halves of a site are alike"
    assert bad.is_above(good)


def test_encoder_space__gives_what_probes_see(tmp_path, photographs):
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, global_pool="avg",
    ).eval()  # fmt: skip
    transform = Transform(image_size_px=32)
    folder.write_encoder_folder(encoder, tmp_path, architecture="vit_tiny_patch16_224", transform=transform)
    found_ND = features.encoder_space(tmp_path)(photographs[:3])
    expected_ND = folder.embed(encoder, transform.apply_batch(photographs[:3]))
    assert found_ND.shape == (3, 48) and np.array_equal(found_ND, expected_ND)


@pytest.fixture
def network_path(tmp_path):
    """A small stand-in for a folder of Inception v3: any network that timm knows is read the same way."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    settings = {"input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "classifier": "fc"}
    config = {"architecture": "resnet10t", "num_classes": 5, "pretrained_cfg": settings | {"num_classes": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, network.eval()


def test_timm_space__gives_the_networks_own_features(network_path, photographs):
    path, network = network_path
    found_ND = features.timm_space(path)(photographs[:2])
    x_BCHW = Transform(image_size_px=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)).apply_batch(photographs[:2])
    with torch.inference_mode():
        expected_ND = network.forward_head(network.forward_features(x_BCHW), pre_logits=True).numpy()
    assert found_ND.shape == (2, 512)
    assert found_ND == pytest.approx(expected_ND, abs=1e-6)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_timm_space__absent_or_damaged_file_is_an_error(network_path, name):
    path, _ = network_path
    (path / name).write_bytes(b"{}")
    with pytest.raises(StorageError, match="could not read"):
        features.timm_space(path)
    (path / name).unlink()
    with pytest.raises(StorageError, match=f"found no {name}"):
        features.timm_space(path)


def test_thumbnail_space__is_colour_by_place_at_any_size():
    half = np.zeros((90, 90, 3), dtype=np.uint8)
    half[:, :45, 0], half[:, 45:, 2] = 255, 255
    found = features.thumbnail_space([half, half[::3, ::3]])
    assert found.shape == (2, 108) and found.dtype == np.float32
    for cells in found.reshape(2, 6, 6, 3):
        assert cells[:, :2] == pytest.approx(np.broadcast_to([1.0, -1.0, -1.0], (6, 2, 3)), abs=0.05)
        assert cells[:, 4:] == pytest.approx(np.broadcast_to([-1.0, -1.0, 1.0], (6, 2, 3)), abs=0.05)
