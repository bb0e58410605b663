"""The corpus: weights and exclusions."""

import pytest

from gretfound import corpus, shard, storage
from gretfound.errors import ConfigError
from gretfound.lineage import Corpus, ShardSet
from tests.hubs import assemble, draw_shard_set


def test_set_weights__temperature_and_real_share() -> None:
    rows = [
        {"num_images": 900, "excluded": [], "site_id": "large", "origin": "real", "weights": [1.0]},
        {"num_images": 100, "excluded": [], "site_id": "small", "origin": "synthetic", "weights": [1.0]},
    ]
    for settings, expected in (
        ({"temperature": 1.0, "real_share": None}, (900, 100)),
        ({"temperature": 0.0, "real_share": None}, (500, 500)),
        ({"temperature": 0.5, "real_share": None}, (750, 250)),
        ({"temperature": 1.0, "real_share": 0.25}, (250, 750)),
    ):
        corpus._set_weights(rows, **settings)  # type: ignore[arg-type]
        assert [row["num_images"] * row["weights"][0] for row in rows] == pytest.approx(expected)  # type: ignore[operator]


@pytest.fixture(scope="module")
def small_hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[ShardSet], Corpus]:
    hub_uri = storage.normalised(str(tmp_path_factory.mktemp("hub")))
    shard_sets = [
        draw_shard_set(hub_uri, "aster", num_images=30),
        draw_shard_set(hub_uri, "birch", num_images=21, origin="synthetic"),
    ]
    return hub_uri, shard_sets, assemble(hub_uri, *shard_sets)


def test_plan__evaluation_images_and_repeats_are_excluded(small_hub: tuple[str, list[ShardSet], Corpus]) -> None:
    hub_uri, shard_sets, whole = small_hub
    image_ids = [
        row["image_id"] for row in shard.read_rows(storage.join(hub_uri, shard_sets[0].shards[0].path), ["image_id"])
    ]
    manifest = corpus.plan(hub_uri, [*shard_sets, shard_sets[0]], excluded_image_ids=frozenset(image_ids[:4]))
    counted = corpus.count(manifest)
    assert counted["num_images"] == 51 - 4
    assert counted["num_excluded"] == 30 + 4
    assert counted["num_images_by_origin"] == {"real": 26, "synthetic": 21}
    assert corpus.contained_image_ids(hub_uri, whole, [*image_ids[:3], "unknown"]) == set(image_ids[:3])
    with pytest.raises(ConfigError, match="found no image"):
        corpus.plan(hub_uri, [])
