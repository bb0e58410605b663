"""The corpus: weights, curricula, exclusions and their reasons, and what no corpus may hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gretfound import corpus, duplicates, fundus, phantom, shard, storage
from gretfound.config import load
from gretfound.corpus import Phase
from gretfound.errors import ConfigError, LineageError
from gretfound.lineage import Corpus, Shard, ShardSet, Site
from jobs import assemble_corpus, pretrain_encoder
from tests.conftest import ROOT
from tests.hubs import assemble, draw_shard_set


def shard_set_of(site_id: str, origin: str, *row_groups: tuple[int, ...]) -> ShardSet:
    """A record of shards that nobody wrote: enough to plan with."""
    shards = tuple(
        Shard(
            path=f"shards/parts/{site_id}-{origin}-{place}.parquet",
            sha256=f"{place:064x}",
            size_bytes=1,
            row_group_images=images,
        )
        for place, images in enumerate(row_groups)
    )
    num_images = sum(part.num_images for part in shards)
    return ShardSet(site_id=site_id, origin=origin, num_images=num_images, shards=shards, rejected={})


def draws_of(manifest: object, phase: int = 0) -> dict[tuple[str, str], float]:
    """Expected draws of an epoch by site and origin."""
    draws: dict[tuple[str, str], float] = {}
    for row in manifest.to_pylist():  # type: ignore[attr-defined]
        cell = (row["site_id"], row["origin"])
        draws[cell] = draws.get(cell, 0.0) + row["weights"][phase] * (row["num_images"] - len(row["excluded"]))
    return draws


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase(), (900, 100)),
        (Phase(temperature=0.0), (500, 500)),
        (Phase(temperature=0.5), (750, 250)),
        (Phase(real_share=0.25), (250, 750)),
    ],
)
def test_plan__temperature_and_real_share(phase: Phase, expected: tuple[float, float]) -> None:
    layout = corpus.lay_out([shard_set_of("large", "real", (600, 300)), shard_set_of("small", "synthetic", (100,))])
    assert tuple(draws_of(corpus.plan(layout, phases=[phase])).values()) == pytest.approx(expected)


def test_plan__countries_then_sites() -> None:
    layout = corpus.lay_out([shard_set_of(site, "real", (n,)) for site, n in (("a", 1600), ("b", 400), ("c", 2000))])
    phase = Phase(temperature=0.5, country_temperature=0.0)
    draws = draws_of(corpus.plan(layout, phases=[phase], countries={"a": "india", "b": "india", "c": "chile"}))
    assert draws["c", "real"] == pytest.approx(2000), "two countries, half of 4,000 draws each"
    assert draws["a", "real"] / draws["b", "real"] == pytest.approx(2.0), "the root of 1,600 over the root of 400"
    unknown = draws_of(corpus.plan(layout, phases=[phase], countries={"a": "india"}))
    assert list(unknown.values()) == pytest.approx([4000 / 3] * 3), "a site without a country is one of its own"


def test_plan__a_weight_for_each_phase_and_an_epoch_of_what_it_draws() -> None:
    layout = corpus.lay_out([shard_set_of("a", "real", (30,), (10,)), shard_set_of("a", "synthetic", (100,))])
    phases = [Phase(num_images=500, real_share=0.0), Phase(num_images=70, real_share=0.5), Phase(real_share=1.0)]
    manifest = corpus.plan(layout, phases=phases)
    assert draws_of(manifest, 0) == pytest.approx({("a", "real"): 0, ("a", "synthetic"): 100})
    assert draws_of(manifest, 1) == pytest.approx({("a", "real"): 70, ("a", "synthetic"): 70})
    assert draws_of(manifest, 2) == pytest.approx({("a", "real"): 40, ("a", "synthetic"): 0})
    with pytest.raises(ConfigError, match="needs synthetic"):
        corpus.plan(corpus.lay_out([shard_set_of("a", "real", (3,))]), phases=[Phase(real_share=0.5)])
    with pytest.raises(ConfigError, match="found no image"):
        corpus.plan(corpus.lay_out([]))


def test_plan__excluded_rows_by_row_group() -> None:
    layout = corpus.lay_out([shard_set_of("a", "real", (4, 3), (2,))])
    reasons = np.array([0, 4, 0, 5, 4, 4, 4, 0, 1], np.uint8)
    manifest = corpus.plan(layout, reasons=reasons)
    assert manifest["excluded"].to_pylist() == [[1, 3], [1]], "nothing is left of the second row group"
    assert manifest["row_group"].to_pylist() == [0, 0]
    counted = corpus.count(layout, manifest)
    assert (counted["num_images"], counted["num_excluded"]) == (3, 6)
    listed = corpus.list_exclusions(layout, reasons).to_pylist()
    assert [(row["row_group"], row["row"], row["reason"]) for row in listed[:3]] == [
        (0, 1, "duplicate"),
        (0, 3, "near_duplicate"),
        (1, 0, "duplicate"),
    ]
    assert listed[-1]["reason"] == "evaluation_image" and listed[-1]["shard_path"].endswith("-1.parquet")


def test_cap_sites__whole_row_groups_of_each_origin() -> None:
    groups = tuple((256,) * 4 for _ in range(5))
    layout = corpus.lay_out(
        [shard_set_of("a", "real", *groups), shard_set_of("a", "synthetic", *groups), shard_set_of("b", "real", (90,))]
    )
    before = np.zeros(2 * 20 * 256 + 90, np.uint8)
    before[:100] = 4
    reasons = corpus.cap_sites(layout, before, 1000)
    manifest = corpus.plan(layout, reasons=reasons)
    left = {cell: round(number) for cell, number in draws_of(manifest).items()}
    assert left == {("a", "real"): 1000, ("a", "synthetic"): 1000, ("b", "real"): 90}
    assert len(manifest) <= 5 + 4 + 1, "what is left lies in few row groups"
    assert (reasons[:100] == 4).all() and set(reasons[100:]) == {0, 6}
    assert corpus.cap_sites(layout, before, 0) is before


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[ShardSet]]:
    """A hub of two sites with planted repeats, and an evaluation folder that shares an image and an eye with it."""
    root = tmp_path_factory.mktemp("corpus")
    hub_uri = storage.normalised(str(root / "hub"))
    first = draw_shard_set(hub_uri, "aster", num_images=12, size_px=96)
    drawn = [row for part in first.shards for row in shard.read_rows(storage.join(hub_uri, part.path))]
    folder = phantom.write_site(phantom.SITES["dune"], root / "dune", num_images=6, seed=3, size_px=96)
    paths = sorted((folder / "traindata").iterdir())
    paths[0].write_bytes(drawn[0]["image"])
    brighter = np.clip(fundus.decode_photograph(drawn[1]["image"]) * 1.1, 0, 255).astype(np.uint8)
    paths[1].write_bytes(fundus.encode_png(brighter))
    rows = [{**row, "patient": f"p{place // 3}"} for place, row in enumerate(drawn)]
    real = shard.write_shard(hub_uri, rows)
    mirrored = fundus.decode_photograph(drawn[4]["image"])[:, ::-1]
    again = [
        shard.row_of(content, site_id="aster", origin="synthetic", cells={})
        for content in (drawn[3]["image"], fundus.encode_jpeg(mirrored, quality=85))
    ]
    synthetic = shard.write_shard(hub_uri, again)
    records = [
        ShardSet(site_id="aster", origin="real", num_images=12, shards=(real,), rejected={}),
        ShardSet(site_id="aster", origin="synthetic", num_images=2, shards=(synthetic,), rejected={}),
    ]
    for record in records:
        storage.write_record(hub_uri, record)
    return hub_uri, folder, records


@pytest.mark.usefixtures("ray_cluster")
def test_main__what_is_left_out_and_why(hub: tuple[str, Path, list[ShardSet]]) -> None:
    hub_uri, folder, (real, synthetic) = hub
    unaware = assemble(hub_uri, real, synthetic)
    corpus.check_uncontaminated(hub_uri, unaware)
    ids = ",".join((real.id, synthetic.id))
    keys = [f"hub_uri={hub_uri}", f"shard_set_ids=[{ids}]", f"evaluation_uris=[{folder}]"]
    record = storage.read_record(hub_uri, assemble_corpus.main(keys), Corpus)
    listed = {
        (row["shard_path"] == real.shards[0].path, row["row"]): row["reason"]
        for row in corpus.read_exclusions(hub_uri, record).to_pylist()
    }
    assert listed == {
        (True, 0): "evaluation_image",
        (True, 1): "evaluation_near_duplicate",
        (True, 2): "evaluation_patient",
        (False, 0): "duplicate",
        (False, 1): "near_duplicate",
    }
    assert (record.num_images, record.num_excluded) == (9, 5)
    assert assemble_corpus.main(keys) == record.id
    assert assemble_corpus.main(keys[:2]) == record.id, "a registered set counts whether it is named or not"
    corpus.check_uncontaminated(hub_uri, record)
    image_id = next(shard.read_rows(storage.join(hub_uri, real.shards[0].path), ["image_id"]))["image_id"]
    with pytest.raises(LineageError, match=rf"evaluation image {image_id} is in {real.shards[0].path} of {unaware.id}"):
        pretrain_encoder.main([f"hub_uri={hub_uri}", f"corpus_id={unaware.id}"])
    evaluation = corpus.registered_evaluation(hub_uri)
    near = evaluation.filter([each != image_id for each in evaluation["image_id"].to_pylist()])
    with pytest.raises(LineageError, match="has a near-duplicate in"):
        corpus.require_absent(hub_uri, unaware, near)


@pytest.mark.usefixtures("ray_cluster")
def test_sign_shards__only_what_is_missing(hub: tuple[str, Path, list[ShardSet]], tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    parts = draw_shard_set(hub_uri, "birch", num_images=6).shards
    storage.write_bytes(duplicates.signatures_uri(hub_uri, parts[0]), b"as an earlier run left it")
    assemble_corpus.sign_shards(hub_uri, parts, hash_cpus=1.0)
    assert storage.read_bytes(duplicates.signatures_uri(hub_uri, parts[0])) == b"as an earlier run left it"
    assert len(duplicates.read_signatures(hub_uri, parts[1:])) == parts[1].num_images


def test_countries_of__by_site_records(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    for site_id, country in (("a", "india"), ("a", "chile"), ("a", ""), ("b", ""), ("c", "peru")):
        storage.write_record(hub_uri, Site(site_id=site_id, country=country))
    assert corpus.countries_of(hub_uri) == {"a": "chile", "c": "peru"}


def test_phases_of__what_a_phase_leaves_open_is_the_corpus_s() -> None:
    keys = ["hub_uri=x", "temperature=0.5", "real_share=0.2", "phases=[{num_images: 9, real_share: 1.0}, {}]"]
    assert assemble_corpus.phases_of(load(assemble_corpus.Config, keys)) == (
        Phase(num_images=9, real_share=1.0, temperature=0.5),
        Phase(real_share=0.2, temperature=0.5),
    )
    assert load(assemble_corpus.Config, keys).threshold_bits == duplicates.THRESHOLD_BITS
    for wrong in ("phases=[{}, {}]", "phases=[{temperature: 2}]", "site_cap=-1"):
        with pytest.raises(ConfigError):
            load(assemble_corpus.Config, ["hub_uri=x", wrong])


def test_plan__ten_thousand_shards_of_a_hundred_million_images_within_seconds() -> None:
    command = [sys.executable, "-m", "tests.bench.corpus", "plan", "10000"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(answer.stdout.splitlines()[-1])
    assert measured["num_images"] == 10_000 * 39 * 256 and measured["num_rows"] == 390_000
    assert measured["plan_s"] < 20 and measured["peak_gib"] < 4
