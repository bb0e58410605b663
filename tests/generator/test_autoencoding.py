"""The fitted autoencoder against scikit-learn's principal components and the limit that they set."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderTiny
from sklearn.decomposition import PCA

from gretfound import phantom
from gretfound.generator import autoencoding, squares

SIZE_PX = 32
NUM_FITTED = 32


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    site = phantom.SITES["public"]
    return squares.as_tensor([phantom.draw_eye(site, seed=seed, size_px=SIZE_PX).image for seed in range(48)])


@pytest.fixture(scope="module")
def fitted(photographs: torch.Tensor) -> AutoencoderTiny:
    autoencoder = autoencoding.build_autoencoder(latent_channels=8, encoder_width=48, decoder_width=16, num_halvings=2)
    autoencoding.fit_autoencoder(autoencoder, photographs[:NUM_FITTED])
    return autoencoder


def _patches(photographs: torch.Tensor) -> npt.NDArray[np.float64]:
    """4x4 patches in [0, 1], one a row."""
    unshuffled = torch.nn.functional.pixel_unshuffle((photographs + 1) / 2, 4)
    return unshuffled.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()


def test_fit_autoencoder__latents_are_the_principal_components(
    fitted: AutoencoderTiny, photographs: torch.Tensor
) -> None:
    components = PCA(8, whiten=True, svd_solver="full").fit(_patches(photographs[:NUM_FITTED]))
    required = components.transform(_patches(photographs))
    latents = autoencoding.encode_photographs(fitted, photographs)
    found = latents.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    signs = np.sign((found * required).sum(axis=0))
    np.testing.assert_allclose(found * signs, required, atol=5e-3)


def test_fit_autoencoder__decodes_almost_as_well_as_any_linear_map_of_the_patches(
    fitted: AutoencoderTiny, photographs: torch.Tensor
) -> None:
    with torch.inference_mode():
        decoded = fitted.decode(fitted.encode(photographs[NUM_FITTED:]).latents).sample
    components = PCA(8, svd_solver="full").fit(_patches(photographs[:NUM_FITTED]))
    unseen = _patches(photographs[NUM_FITTED:])
    limit = np.mean((components.inverse_transform(components.transform(unseen)) - unseen) ** 2)
    error = float(((decoded - photographs[NUM_FITTED:]) / 2).square().mean())
    # The decoder's nearest-neighbour doublings cannot draw the finest of the patches' patterns.
    assert error < 4 * limit
    assert error < 0.05 * np.var(unseen)


def test_build_autoencoder__too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_width=8"):
        autoencoding.build_autoencoder(latent_channels=8, encoder_width=48, decoder_width=8, num_halvings=2)
