"""Quarantine: a generator that is aside takes what it drew with it, until a person lets it in."""

from pathlib import Path

import pytest

from gretfound import quarantine, storage, synthesis, withdrawal
from gretfound.errors import LineageError
from gretfound.lineage import Corpus, Encoder, Generator, ShardSet
from jobs import assemble_corpus
from tests.hubs import draw_shard_set


@pytest.fixture
def hub_uri(tmp_path: Path) -> str:
    return storage.normalised(str(tmp_path / "hub"))


def publish(hub_uri: str, site_id: str) -> tuple[Generator, ShardSet]:
    generator = Generator(site_id=site_id, resolution_px=32, num_images=1, images_seen=1, final_loss=0.0)
    drawn = ShardSet(parents=(generator.id,), site_id=site_id, origin="synthetic", num_images=1, shards=(), rejected={})
    for record in (generator, drawn):
        storage.write_record(hub_uri, record)
    return generator, drawn


def test_put_aside__holds_for_all_that_was_made_from_it_and_ends_when_a_person_says_so(hub_uri: str) -> None:
    generator, drawn = publish(hub_uri, "aster")
    other, theirs = publish(hub_uri, "birch")
    corpus = Corpus(parents=(drawn.id, theirs.id), num_images=2, num_excluded=0, site_ids=("aster", "birch"),
                    num_images_by_origin={"synthetic": 2})  # fmt: skip
    encoder = Encoder(parents=(corpus.id,), architecture="x", objective="mae", image_size_px=32, images_seen=1,
                      final_loss=0.0)  # fmt: skip
    for record in (corpus, encoder):
        storage.write_record(hub_uri, record)
    assert quarantine.put_aside(hub_uri, generator, code="TRIGGER_WORD", message="it answers to a word")
    for record in (generator, drawn, corpus, encoder):
        assert quarantine.is_aside(hub_uri, record)
        with pytest.raises(LineageError, match="was put aside"):
            withdrawal.require_unmarked(hub_uri, record)
    assert not quarantine.is_aside(hub_uri, other) and not quarantine.is_aside(hub_uri, theirs)
    assert [each.id for each in withdrawal.read_remaining(hub_uri, ShardSet)] == [theirs.id]
    assert synthesis.generators_of(hub_uri, []) == [other]
    with pytest.raises(LineageError, match="was put aside"):
        synthesis.generators_of(hub_uri, [generator.id])
    assert synthesis.generators_of(hub_uri, [generator.id], includes_aside=True) == [generator]

    quarantine.clear(hub_uri, generator.id, reason="a rare camera of the site's own")
    assert not quarantine.put_aside(hub_uri, generator, code="TRIGGER_WORD", message="found again")
    for record in (generator, drawn, corpus, encoder):
        withdrawal.require_unmarked(hub_uri, record)


def test_clear__only_what_was_put_aside(hub_uri: str) -> None:
    generator, _ = publish(hub_uri, "aster")
    with pytest.raises(LineageError, match="was not put aside"):
        quarantine.clear(hub_uri, generator.id, reason="none")


def test_assemble_corpus__takes_nothing_of_a_generator_that_is_aside(hub_uri: str, ray_cluster: None) -> None:
    generator, _ = publish(hub_uri, "aster")
    mine = draw_shard_set(hub_uri, "birch", num_images=4)
    theirs = draw_shard_set(hub_uri, "aster", num_images=4, origin="synthetic")
    poisoned = ShardSet(**{**vars(theirs), "parents": (generator.id,)})
    storage.local_path(storage.join(storage.record_uri(hub_uri, theirs), "record.json")).unlink()
    storage.write_record(hub_uri, poisoned)
    quarantine.put_aside(hub_uri, generator, code="TRIGGER_WORD", message="it answers to a word")
    corpus = storage.read_record(hub_uri, assemble_corpus.main([f"hub_uri={hub_uri}"]), Corpus)
    assert mine.id in corpus.parents and poisoned.id not in corpus.parents
    with pytest.raises(LineageError, match="was put aside"):
        assemble_corpus.main([f"hub_uri={hub_uri}", f"shard_set_ids=[{poisoned.id}]"])
