"""Measurement: features are those of the encoder folder, whatever the batches; what cannot be read says why."""

import numpy as np
import pytest
import torch

from gretfound import duplicates, fundus, phantom, storage
from gretfound.encoder import folder
from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.transform import Transform
from gretfound.evaluation import measurement, protocol
from gretfound.lineage import Encoder

SIZE_PX = 32


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a tiny encoder, that encoder's folder, and a labelled folder of which two photographs are no use."""
    root = tmp_path_factory.mktemp("measurement")
    hub_uri = storage.normalised(str(root / "hub"))
    torch.manual_seed(0)
    path = folder.write_encoder_folder(
        build_encoder("vit_tiny_patch16_224", image_size_px=SIZE_PX, patch_size=8, embed_dim=48, depth=2, num_heads=3),
        root / "encoder",
        architecture="vit_tiny_patch16_224",
        transform=Transform(image_size_px=SIZE_PX),
    )
    settings = {"architecture": "vit_tiny_patch16_224", "objective": "mae", "image_size_px": SIZE_PX}
    record = storage.publish_folder(hub_uri, path, Encoder(images_seen=1, final_loss=1.0, **settings))
    site_path = phantom.write_site(phantom.SITES["dune"], root / "dune", num_images=5, seed=1, size_px=48)
    found = protocol.read_evaluation_set(storage.normalised(str(site_path)))
    storage.write_bytes(found.rows[1].uri, b"no photograph")
    storage.local_path(found.rows[3].uri).unlink()
    return hub_uri, record, path, protocol.read_evaluation_set(storage.normalised(str(site_path)))


def batch_of(evaluation_set):
    uris = [row.uri for row in evaluation_set.rows]
    return {"place": np.arange(len(uris)), "uri": np.array(uris)}


@pytest.mark.parametrize("pooling", folder.POOLINGS)
def test_embedder__features_are_those_of_the_encoder_folder(hub, pooling):
    hub_uri, record, path, evaluation_set = hub
    embed = measurement.Embedder(hub_uri, record, seed=3, pooling=pooling, device="cpu", batch_size=2)
    found = embed(batch_of(evaluation_set))
    assert found["place"].tolist() == [0, 1, 2, 3, 4]
    assert [bool(reason) for reason in found["reason"]] == [False, True, False, True, False]
    assert found["reason"][3].startswith("MISSING")
    encoder, transform = folder.read_encoder_folder(path)
    for place in (0, 2, 4):
        image = fundus.decode_photograph(storage.read_bytes(evaluation_set.rows[place].uri))
        assert found["image_id"][place] == fundus.pixel_digest(image)
        square = torch.from_numpy(transform.square(image).transpose(2, 0, 1)[None].copy())
        expected = folder.embed(encoder, transform.normalise(square), pooling=pooling)[0]
        assert found["pretrained"][place] == pytest.approx(expected, abs=1e-5)
        assert np.abs(found["untrained"][place] - expected).max() > 0.01
        assert found["raw_pixels"][place].shape == (3 * protocol.RAW_PIXELS_SIZE_PX**2,)
        assert found["raw_pixels"][place].min() >= 0 and found["raw_pixels"][place].max() <= 1


def test_sign_embedded__readable_photographs_are_signed_and_the_others_named(hub):
    hub_uri, record, _, evaluation_set = hub
    embed = measurement.Embedder(hub_uri, record, seed=3, pooling="mean", device="cpu", batch_size=2)
    batches = [embed(batch_of(evaluation_set))]
    photographs, faults = protocol.collect([("dune", row) for row in evaluation_set.rows], batches)
    signed = measurement.sign_embedded(photographs, batches)
    numbers = [row.number for row in evaluation_set.rows]
    assert photographs["dune"].row_numbers == (numbers[0], numbers[2], numbers[4])
    assert [fault["row"] for fault in faults["dune"]] == [numbers[1], numbers[3]]
    assert signed["dune"]["image_id"].to_pylist() == list(photographs["dune"].image_ids)
    first = fundus.decode_photograph(storage.read_bytes(evaluation_set.rows[0].uri))
    words = duplicates.hash_photograph(first, fundus.find_field_of_view(first))
    assert signed["dune"]["hash"][0].as_py() == words.astype("<u8").tobytes()
    assert signed["dune"].equals(protocol.sign(evaluation_set))
