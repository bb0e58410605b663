"""Intake: good packages become records, others go to quarantine with a reason, and nothing happens twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gretfound import fundus, lineage, phantom, shard, storage
from gretfound.disclosure import Policy
from gretfound.errors import ConfigError, ContributionRejected, LineageError
from gretfound.generator import pipeline
from gretfound.keyring import Keyring
from gretfound.lineage import Contribution, Generator, ShardSet, Site
from jobs import intake, ledger, withdraw_site
from tests import parties, summaries, tiny_generator
from tests.parties import Hub

SIZE_PX = 64
POLICY = "policy=demonstration"


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = parties.hub_at(tmp_path)
    hub.join(tmp_path / "aster.keys", "aster")
    return hub


@pytest.fixture
def hub_uri(hub: Hub, ray_cluster: None) -> str:
    return hub.uri


def _terms(form: str, num_images: int, **changes: Any) -> dict[str, Any]:
    return {
        "site_id": "aster",
        "form": form,
        "country": "United Kingdom",
        "policy": "demonstration/1",
        "base_sha256": "",
        "num_images": num_images,
        "num_patients": None,
    } | changes


def _image_package(
    path: Path,
    *,
    num_images: int = 4,
    num_damaged: int = 0,
    first_seed: int = 0,
    told_by: Policy | None = None,
    **changes: Any,
) -> Path:
    staging_path = path.with_suffix("")
    (staging_path / "shards").mkdir(parents=True)
    rows = []
    for seed in range(first_seed, first_seed + num_images):
        image = phantom.draw_eye(phantom.SITES["aster"], seed=seed, size_px=SIZE_PX).image
        row = shard.row_of(fundus.encode_png(image), site_id="aster", origin="real", cells={"sex": "female"})
        if len(rows) < num_damaged:
            row["image"] = row["image"][:200]
        rows.append(row)
    shard.write_shard_file(staging_path / "shards" / "part-00000.parquet", rows)
    summaries.write_summary(staging_path, [{"sex": "female"}] * num_images, policy=told_by)
    return _seal(staging_path, path, **_terms("images", num_images, **changes))


def _seal(staging_path: Path, path: Path, **terms: Any) -> Path:
    ring = Keyring(folder_path=path.parent / "aster.keys", site_id="aster")
    return parties.seal(ring, staging_path, path, **terms).path


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator.write_base(tmp_path_factory.mktemp("bases") / "base")


def _weights_package(path: Path, base_path: Path, *, rank: int = 2, stated_rank: int = 2) -> Path:
    staging_path = path.with_suffix("")
    unet = pipeline.load_pipeline(base_path).unet
    pipeline.add_lora(unet, rank=rank, alpha=rank)
    base_sha256 = pipeline.unet_sha256(base_path)
    terms = pipeline.AdapterTerms(
        method="lora",
        rank=stated_rank,
        alpha=2.0,
        target_modules=pipeline.TARGET_MODULES,
        base_sha256=base_sha256,
        resolution_px=32,
        num_images=9,
        images_seen=64,
        final_loss=0.5,
    )
    staging_path.mkdir(parents=True)
    tensors = pipeline.adapter_tensors(dict(unet.named_parameters()), method="lora")
    pipeline.save_adapter(staging_path / "weights", tensors=tensors, terms=terms)
    summaries.write_summary(staging_path, [{"sex": "female"}] * 9)
    (staging_path / "training").mkdir()
    (staging_path / "training" / "config.json").write_text("{}")
    (staging_path / "training" / "metrics.jsonl").write_text('{"images_seen":64,"loss":0.5}\n')
    return _seal(staging_path, path, **_terms("weights", 9, base_sha256=base_sha256))


def _publish_base(hub_uri: str, base_path: Path) -> Generator:
    record = Generator(site_id="", resolution_px=32, num_images=0, images_seen=0, final_loss=0.0)
    return storage.publish_folder(hub_uri, base_path, record)


def _records(hub_uri: str) -> list[str]:
    kinds: tuple[type[lineage.Record], ...] = (Site, Contribution, Generator, ShardSet)
    return [record.id for kind in kinds for record in storage.read_records(hub_uri, kind)]


def _events(hub_uri: str) -> list[tuple[str, str]]:
    entries = [entry for entry in storage.read_ledger(hub_uri) if entry["event"] != "roster"]
    return [(entry["event"], entry["details"]["code"]) for entry in entries]


@pytest.mark.parametrize("policy", ["standard", "demonstration"])
def test_main__refuses_a_summary_of_another_disclosure_policy_or_that_breaks_its_own(
    hub_uri: str, tmp_path: Path, policy: str
) -> None:
    # The second site changed its own policy file: one patient is enough.
    told_by = {"standard": None, "demonstration": summaries.policy_of(1)}[policy]
    path = _image_package(tmp_path / "package.age", told_by=told_by, policy="standard/1")
    code = {"standard": "POLICY: its summary", "demonstration": "DISCLOSURE: its summary"}[policy]
    with pytest.raises(ContributionRejected, match=code):
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", f"policy={policy}"])


def test_main__admits_photographs(hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=4)
    contribution_id = intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    record = storage.read_record(hub_uri, contribution_id, Contribution)
    assert record.package_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record.site_id, record.form, record.num_images) == ("aster", "images", 4)
    (site,) = storage.read_records(hub_uri, Site)
    assert record.parents == (site.id,) and site.country == "United Kingdom"
    (shard_set,) = storage.read_records(hub_uri, ShardSet)
    assert shard_set.parents == (contribution_id,)
    assert (shard_set.num_images, shard_set.origin, shard_set.rejected) == (4, "real", {})
    rows = list(shard.read_rows(storage.join(hub_uri, shard_set.shards[0].path)))
    assert [row["sex"] for row in rows] == ["female"] * 4
    made = intake.made_by(hub_uri, record)
    assert (made.contribution_id, made.shard_set_id, made.generator_id) == (contribution_id, shard_set.id, "")
    assert _events(hub_uri) == [("accepted", "")]


def test_main__counts_a_damaged_photograph_and_keeps_its_neighbours(hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=4, num_damaged=1)
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    (shard_set,) = storage.read_records(hub_uri, ShardSet)
    assert (shard_set.num_images, shard_set.rejected) == (3, {"unreadable": 1})


def test_main__admits_weights_as_a_generator(hub_uri: str, tmp_path: Path, base_path: Path) -> None:
    base = _publish_base(hub_uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path)
    contribution_id = intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    record = storage.read_record(hub_uri, contribution_id, Contribution)
    generator_id = intake.made_by(hub_uri, record).generator_id
    generator = storage.read_record(hub_uri, generator_id, Generator)
    assert set(generator.parents) == {contribution_id, base.id}
    assert (generator.site_id, generator.base_id, generator.method) == ("aster", base.id, "lora")
    assert (generator.resolution_px, generator.images_seen, generator.final_loss) == (32, 64, 0.5)
    fetched = storage.fetch_folder(hub_uri, generator, tmp_path / "generator")
    assert pipeline.load_pipeline(fetched).unet.config.sample_size == 16


@pytest.mark.parametrize(("case", "code"), [("no base", "UNKNOWN_BASE"), ("wrong rank", "ADAPTER_TENSORS")])
def test_main__rejects_weights_that_do_not_fit(
    hub_uri: str, tmp_path: Path, base_path: Path, case: str, code: str
) -> None:
    if case == "wrong rank":
        _publish_base(hub_uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path, rank=3, stated_rank=2 if case == "wrong rank" else 3)
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    assert caught.value.code == code
    kinds: tuple[type[lineage.Record], ...] = (Site, Contribution, ShardSet)
    assert [record for kind in kinds for record in storage.read_records(hub_uri, kind)] == []


def test_main__a_standard_hub_refuses_the_demonstration_policy(hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age")
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]"])
    assert caught.value.code == "POLICY"
    assert _records(hub_uri) == []


def test_main__takes_the_inbox_and_does_nothing_twice(
    hub_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inbox_path = tmp_path / "hub" / "inbox"
    inbox_path.mkdir(parents=True)
    for index in range(3):
        path = _image_package(tmp_path / f"package-{index}.age", num_images=2, first_seed=10 * index)
        content = path.read_bytes()
        if index == 2:
            content = content[:-4000]
        (inbox_path / path.name).write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()

    intake_id = intake.main([f"hub_uri={hub_uri}", POLICY])

    assert intake_id.startswith("intake-")
    assert capsys.readouterr().err.count("accepted") == 2
    outcomes = storage.read_json(storage.join(storage.run_uri(hub_uri, intake_id), "outcomes.json"))
    assert [outcome["code"] for outcome in outcomes] == ["", "", "DAMAGED"]
    reason = storage.read_json(storage.join(hub_uri, "quarantine", sha256, "reason.json"))
    assert reason["code"] == "DAMAGED"
    assert storage.read_bytes(storage.join(hub_uri, "quarantine", sha256, "package.age")) == content
    records, events = _records(hub_uri), _events(hub_uri)
    assert len(records) == 1 + 2 + 2
    assert sorted(events) == [("accepted", ""), ("accepted", ""), ("rejected", "DAMAGED")]

    assert intake.main([f"hub_uri={hub_uri}", POLICY]) == intake_id
    assert (_records(hub_uri), _events(hub_uri)) == (records, events)


def test_main__goes_on_after_being_killed_at_any_write(hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age")
    arguments = [f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY]
    contribution_id = intake.main(arguments)
    records, events = _records(hub_uri), _events(hub_uri)
    record = storage.read_record(hub_uri, contribution_id, Contribution)
    written = [  # in the order of writing, last first: each prefix of removals is what a kill leaves behind
        "ledger/00000002.json",
        f"runs/{record.recipe_id}/record.json",
        f"contributions/{contribution_id}/record.json",
        f"contributions/{contribution_id}/summary/metadata_summary.json",
        f"shards/{intake.made_by(hub_uri, record).shard_set_id}/record.json",
    ]
    for length in range(1, len(written) + 1):
        for name in written[:length]:
            (tmp_path / "hub" / name).unlink()
        assert intake.main(arguments) == contribution_id
        assert (_records(hub_uri), _events(hub_uri)) == (records, events)


def test_main__an_empty_inbox_is_an_error(hub_uri: str) -> None:
    with pytest.raises(ConfigError, match="no package"):
        intake.main([f"hub_uri={hub_uri}"])


def test_main__works_on_an_object_store(s3_hub: str, ray_cluster: None, tmp_path: Path) -> None:
    hub = Hub(storage.join(s3_hub, "intake"), tmp_path / "hub.keys")
    hub.join(tmp_path / "aster.keys", "aster")
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=100)
    arguments = (hub.uri, str(path), "demonstration", hub.keys_path, hub.roster, [])
    outcome = intake.admit(*arguments)
    assert storage.read_record(hub.uri, outcome.shard_set_id, ShardSet).num_images == 2
    assert intake.admit(*arguments) == outcome


def test_main__takes_a_sites_packages_in_their_turn_whatever_the_order(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    paths = [_image_package(tmp_path / f"{index}.age", num_images=1, first_seed=index) for index in range(3)]
    missing = f"package_uris=[{paths[2]},{paths[1]}]"
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", missing, POLICY])
    assert caught.value.code == "PREVIOUS_MISSING" and _records(hub_uri) == [] and _events(hub_uri) == []
    assert storage.list_names(storage.join(hub_uri, "quarantine")) == []
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{paths[2]},{paths[1]},{paths[0]}]", POLICY])
    assert _events(hub_uri) == [("accepted", "")] * 3


def test_main__a_package_may_follow_one_that_is_lost(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    _image_package(tmp_path / "lost.age", num_images=1)
    path = _image_package(tmp_path / "second.age", num_images=1, first_seed=1)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", f"follows_lost=[{sha256}]", POLICY])
    assert _events(hub_uri) == [("accepted", "")]


def test_main__rejects_and_notes_what_nobody_may_send(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=1)
    hub.change_roster("suspend", "site_id=aster")
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    assert caught.value.code == "SITE_SUSPENDED"
    assert (_records(hub_uri), _events(hub_uri)) == ([], [("rejected", "SITE_SUSPENDED")])


def test_withdraw_site__lists_what_descends_from_a_site(hub_uri: str, tmp_path: Path) -> None:
    ours = _image_package(tmp_path / "ours.age", num_images=2)
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{ours}]", POLICY])
    shard_set = next(iter(storage.read_records(hub_uri, ShardSet)))
    other = ShardSet(site_id="birch", origin="real", num_images=1, shards=(), rejected={})
    storage.write_record(hub_uri, other)
    terms = {"objective": "mae", "image_size_px": 64, "images_seen": 1, "final_loss": 0.0}
    first = lineage.Encoder(parents=(shard_set.id,), architecture="a", **terms)  # type: ignore[arg-type]
    second = lineage.Encoder(parents=(first.id,), architecture="b", **terms)  # type: ignore[arg-type]
    unrelated = lineage.Encoder(parents=(other.id,), architecture="c", **terms)  # type: ignore[arg-type]
    for record in (first, second, unrelated):
        storage.write_record(hub_uri, record)

    withdrawal_id = withdraw_site.main([f"hub_uri={hub_uri}", "site_id=aster"])

    found = withdraw_site.descendants(hub_uri, site_id="aster")
    assert {first.id, second.id, shard_set.id} < set(found)
    assert not {unrelated.id, other.id} & set(found)
    assert withdraw_site.main([f"hub_uri={hub_uri}", "site_id=aster"]) == withdrawal_id
    entries = [entry for entry in storage.read_ledger(hub_uri) if entry["event"] == "withdrawn"]
    assert [entry["details"]["records"] for entry in entries] == [found]
    with pytest.raises(ConfigError, match="nothing of a site"):
        withdraw_site.main([f"hub_uri={hub_uri}", "site_id=cedar"])


def test_ledger__verify_names_the_first_bad_entry(tmp_path: Path) -> None:
    hub_uri = storage.normalised(str(tmp_path))
    digests = [storage.append_to_ledger(hub_uri, event="accepted", subject=str(index)) for index in range(4)]
    assert ledger.main(["verify", f"hub_uri={hub_uri}"]) == digests[-1]
    path = tmp_path / "ledger" / "00000001.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"subject": "somebody else"}))
    with pytest.raises(LineageError, match="ledger entry 2"):
        ledger.main(["verify", f"hub_uri={hub_uri}"])
    with pytest.raises(ConfigError, match="verify"):
        ledger.main([f"hub_uri={hub_uri}"])
