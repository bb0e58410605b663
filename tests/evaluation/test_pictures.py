"""Pictures: the first of each site and origin, and reconstructions that leave what the encoder saw as it was."""

import numpy as np
import pytest
from safetensors.torch import save_file

from gretfound import phantom, storage
from gretfound.encoder import folder, mae
from gretfound.encoder.transform import Transform
from gretfound.errors import StorageError
from gretfound.evaluation import pictures, protocol
from gretfound.lineage import Encoder
from tests.hubs import assemble, draw_shard_set
from tests.test_fit import autoencoder


def publish(hub_uri, path, *, weights=None):
    folder.write_encoder_folder(
        autoencoder().encoder, path, architecture="vit_tiny_patch16_224", transform=Transform(image_size_px=32)
    )
    if weights:
        save_file(weights, path / mae.AUTOENCODER_NAME)
    settings = {"architecture": "vit_tiny_patch16_224", "objective": "mae", "image_size_px": 32}
    return storage.publish_folder(hub_uri, path, Encoder(images_seen=1, final_loss=1.0, **settings))


def photographs_of(evaluation_set):
    numbers = tuple(row.number for row in evaluation_set.rows)
    return protocol.Photographs(
        name="dune", row_numbers=numbers, image_ids=tuple(map(str, numbers)), cells=(), features={}
    )


def test_sample_sites__the_first_of_each_origin(tmp_path):
    hub_uri = storage.normalised(str(tmp_path))
    aster = [draw_shard_set(hub_uri, "aster", num_images=4, origin=origin) for origin in ("real", "synthetic")]
    birch = draw_shard_set(hub_uri, "birch", num_images=2, origin="synthetic")
    first, second = pictures.sample_sites(hub_uri, [assemble(hub_uri, *aster, birch)], num_pictures=3)
    assert (first.site_id, len(first.real), len(first.synthetic)) == ("aster", 3, 3)
    assert (second.site_id, second.real, len(second.synthetic)) == ("birch", (), 2)
    assert all(sample.caption and sample.image.ndim == 3 for sample in (*first.real, *second.synthetic))
    assert pictures.sample_sites(hub_uri, [], num_pictures=3) == []


def test_reconstruct_photographs__seen_patches_stay_and_others_change(tmp_path):
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    site_path = phantom.write_site(phantom.SITES["dune"], tmp_path / "dune", num_images=4, seed=1, size_px=48)
    found = protocol.read_evaluation_set(storage.normalised(str(site_path)))
    record = publish(hub_uri, tmp_path / "encoder", weights=autoencoder().state_dict())
    given = {"num_pictures": 3, "build_objective": lambda path: autoencoder()}
    reconstructed = pictures.reconstruct_photographs(hub_uri, record, found, photographs_of(found), **given)
    assert len(reconstructed) == 3
    for each in reconstructed:
        assert each.original.shape == each.masked.shape == each.reconstruction.shape == (32, 32, 3)
        is_same = (each.original == each.masked).reshape(4, 8, 4, 8, 3).all(axis=(1, 3, 4))
        assert is_same.sum() == 4, "a quarter of 16 patches is seen"
        seen = np.kron(is_same, np.ones((8, 8), bool))
        assert np.array_equal(each.reconstruction[seen], each.original[seen])
        assert not np.array_equal(each.reconstruction[~seen], each.masked[~seen])


def test_reconstruct_photographs__only_of_a_masked_autoencoder_and_with_its_own_weights(tmp_path):
    hub_uri = storage.normalised(str(tmp_path / "hub"))
    empty = protocol.EvaluationSet(name="dune", digest="", rows=(), num_cells_not_understood=0)
    given = {"num_pictures": 1, "build_objective": lambda path: autoencoder()}
    distilled = publish(hub_uri, tmp_path / "distilled")
    assert pictures.reconstruct_photographs(hub_uri, distilled, empty, photographs_of(empty), **given) == []
    weights = autoencoder().state_dict()
    del weights["mask_token"]
    other = publish(hub_uri, tmp_path / "other", weights=weights)
    with pytest.raises(StorageError, match="missing mask_token"):
        pictures.reconstruct_photographs(hub_uri, other, empty, photographs_of(empty), **given)
