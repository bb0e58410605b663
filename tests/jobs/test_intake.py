"""Intake: good packages become records, others go to quarantine with a reason, and nothing happens twice."""

import concurrent.futures
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from PIL import Image

from gretfound import (
    admission,
    confinement,
    deidentify,
    disclosure,
    duplicates,
    fine_tuning,
    fundus,
    keyring,
    ledger,
    lineage,
    phantom,
    reasons,
    receipt,
    sealing,
    shard,
    storage,
    strongbox,
    withdrawal,
)
from gretfound.admission import History
from gretfound.disclosure import Policy
from gretfound.dispatch import Recipe
from gretfound.errors import ConfigError, ContributionRejected, LineageError
from gretfound.generator import adapter, pipeline
from gretfound.keyring import Keyring
from gretfound.lineage import Contribution, Corpus, Generator, ShardSet, Site
from jobs import assemble_corpus, evaluate_encoder, intake, pretrain_encoder, withdraw_site
from tests import faulty_s3, hubs, odd_weights, parties, summaries, tiny_generator
from tests.faulty_s3 import Faults
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


def _s3_hub(uri: str, tmp_path: Path) -> Hub:
    hub = Hub(uri, tmp_path / "hub.keys")
    hub.join(tmp_path / "aster.keys", "aster")
    return hub


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
    odd_image: bytes = b"",
    num_images_stated: int | None = None,
    words_in_footer: str = "",
    site_id: str = "aster",
    row_site_id: str = "",
    row_changes: Mapping[str, Any] = MappingProxyType({}),
    summary: bytes = b"",
    told_by: Policy | None = None,
    **changes: Any,
) -> Path:
    staging_path = path.with_suffix("")
    (staging_path / "shards").mkdir(parents=True)
    known = [{"sex": ("female", "male")[place % 2]} for place in range(num_images)]  # all of one would not be told
    made_by = told_by or disclosure.read_policy("demonstration")
    summary_made = summaries.write_summary(staging_path, known, policy=made_by)
    told = disclosure.told_rows(known, summary_made, policy=made_by)
    rows = []
    for seed, cells in enumerate(told, start=first_seed):
        image = phantom.draw_eye(phantom.SITES["aster"], seed=seed, size_px=SIZE_PX).image
        methods = deidentify.methods_of(cells, has_year=False)
        place = {"site_id": row_site_id or site_id, "origin": "real"}
        row = shard.row_of(fundus.encode_png(image), **place, cells=cells, deid_methods=methods) | row_changes
        if len(rows) < num_damaged:
            row["image"] = row["image"][:200]
        rows.append(row)
    if odd_image:
        rows[-1]["image"] = odd_image
    part_path = staging_path / "shards" / "part-00000.parquet"
    shard.write_shard_file(part_path, rows)
    if words_in_footer:
        pq.write_table(pq.read_table(part_path).replace_schema_metadata({"note": words_in_footer}), part_path)
    if summary:
        (staging_path / "summary" / "metadata_summary.json").write_bytes(summary)
    stated = num_images if num_images_stated is None else num_images_stated
    return _seal(staging_path, path, **_terms("images", stated, site_id=site_id, **changes))


def _seal(staging_path: Path, path: Path, *, site_id: str, **terms: Any) -> Path:
    ring = Keyring(folder_path=path.parent / f"{site_id}.keys", site_id=site_id)
    return parties.seal(ring, staging_path, path, site_id=site_id, **terms).path


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator.write_base(tmp_path_factory.mktemp("bases") / "base")


def _weights_package(
    path: Path,
    base_path: Path,
    *,
    rank: int = 2,
    stated_rank: int = 2,
    method: str = "lora",
    factor: float = 1.0,
    fault: str = "",
    content: bytes = b"",
    stated_base_sha256: str = "",
    told_by: Policy | None = None,
    gate: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    staging_path = path.with_suffix("")
    unet = pipeline.load_pipeline(base_path).unet
    if method == "full":
        tensors = {name: 1.01 * tensor for name, tensor in unet.state_dict().items()}
    generator = torch.Generator().manual_seed(rank)
    for parameter in pipeline.add_lora(unet, rank=rank, alpha=rank):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    base_sha256 = pipeline.denoiser_sha256(base_path)
    terms = adapter.AdapterTerms(
        method=method,
        rank=stated_rank,
        alpha=2.0,
        target_modules=adapter.TARGET_MODULES,
        base_sha256=stated_base_sha256 or base_sha256,
        resolution_px=32,
        images_seen=64,
        final_loss=0.5,
    )
    staging_path.mkdir(parents=True)
    if method == "lora":
        tensors = pipeline.adapter_tensors(dict(unet.named_parameters()), method="lora")
        tensors = {name: factor * each if "lora_B" in name else each for name, each in tensors.items()}
    pipeline.save_adapter(staging_path / "weights", tensors=tensors, terms=terms)
    if content:
        (staging_path / "weights" / adapter.ADAPTER_TENSORS).write_bytes(content)
    if fault:
        odd_weights.spoil(staging_path / "weights" / adapter.ADAPTER_TENSORS, fault)
    summary = summaries.write_summary(staging_path, [{"sex": "female"}] * 9, policy=told_by)
    parties.write_gate_report(staging_path, **(gate or {}))
    (staging_path / "training").mkdir()
    (staging_path / "training" / "config.json").write_text(json.dumps(asdict(Recipe())))
    (staging_path / "training" / "metrics.jsonl").write_text('{"images_seen":64,"loss":0.5}\n')
    return _seal(staging_path, path, **_terms("weights", summary.num_images, base_sha256=base_sha256, **changes))


def _publish_base(hub_uri: str, base_path: Path) -> Generator:
    record = Generator(site_id="", resolution_px=32, num_images=0, images_seen=0, final_loss=0.0)
    return storage.publish_folder(hub_uri, base_path, record)


def _records(hub_uri: str) -> list[str]:
    kinds: tuple[type[lineage.Record], ...] = (Site, Contribution, Generator, ShardSet)
    return [record.id for kind in kinds for record in storage.read_records(hub_uri, kind)]


def _events(hub_uri: str) -> list[tuple[str, str]]:
    return [(entry.event, entry.details["code"]) for entry in ledger.read(hub_uri) if entry.event != "roster"]


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
    assert [row["sex"] for row in rows] == ["female", "male"] * 2
    made = admission.made_by(hub_uri, record)
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
    generator_id = admission.made_by(hub_uri, record).generator_id
    generator = storage.read_record(hub_uri, generator_id, Generator)
    assert set(generator.parents) == {contribution_id, base.id}
    assert (generator.site_id, generator.base_id, generator.method) == ("aster", base.id, "lora")
    assert (generator.resolution_px, generator.images_seen, generator.final_loss) == (32, 64, 0.5)
    fetched = storage.fetch_folder(hub_uri, generator, tmp_path / "generator")
    assert pipeline.load_pipeline(fetched).unet.config.sample_size == 16


@pytest.mark.parametrize(("case", "code"), [("no base", "UNKNOWN_BASE"), ("wrong rank", "W2_SHAPE")])
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
    made = admission.made_by(hub_uri, record)
    steps = [f"admissions/{made.package_sha256}/{number:03d}.json" for number in range(9)]
    verdict = storage.read_json(storage.join(hub_uri, steps[-1]))
    assert verdict["state"] == "ADMITTED"
    written = [  # in the order of writing, last first: each prefix of removals is what a kill leaves behind
        f"receipts/{made.package_sha256}-008.json",
        "ledger/00000002.json",
        f"runs/{record.recipe_id}/record.json",
        f"contributions/{contribution_id}/record.json",
        f"contributions/{contribution_id}/summary/metadata_summary.json",
        f"runs/{record.recipe_id}/outcome.json",
        f"shards/{made.shard_set_id}/record.json",
        *reversed(steps),
    ]
    for length in (1, 3, 5, 7, 12, len(written)):
        for name in written[:length]:
            (tmp_path / "hub" / name).unlink()
        assert intake.main(arguments) == contribution_id
        assert (_records(hub_uri), _events(hub_uri)) == (records, events)
        assert all((tmp_path / "hub" / name).exists() for name in written)


def test_main__an_empty_inbox_is_an_error(hub_uri: str) -> None:
    with pytest.raises(ConfigError, match="no package"):
        intake.main([f"hub_uri={hub_uri}"])


def test_main__takes_a_sites_packages_in_their_turn_whatever_the_order(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    paths = [_image_package(tmp_path / f"{index}.age", num_images=1, first_seed=index) for index in range(3)]
    missing = f"package_uris=[{paths[2]},{paths[1]}]"
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", missing, POLICY])
    assert caught.value.code == "PREVIOUS_MISSING" and _records(hub_uri) == [] and _events(hub_uri) == []
    assert storage.list_names(storage.join(hub_uri, "quarantine")) == []
    assert storage.list_names(storage.join(hub_uri, "receipts")) == []
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{paths[2]},{paths[1]},{paths[0]}]", POLICY])
    assert _events(hub_uri) == [("accepted", "")] * 3


def test_main__a_package_waits_until_its_site_is_in_the_roster(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    ring = keyring.make(tmp_path / "early.keys", "early")
    ring.hub_path.write_bytes((hub.keys_path / "hub.json").read_bytes())
    path = _image_package(tmp_path / "early.age", num_images=1, site_id="early")
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    assert caught.value.code == "UNKNOWN_SITE" and _records(hub_uri) == [] and _events(hub_uri) == []
    assert storage.list_names(storage.join(hub_uri, "quarantine")) == []
    hub.change_roster("admit", f"card_path={ring.card_path}")
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    assert _events(hub_uri) == [("accepted", "")]


def test_main__a_rejected_package_keeps_its_number(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    bad = _image_package(tmp_path / "bad.age", num_images=2, odd_image=_odd_image("GIF"))
    good = _image_package(tmp_path / "good.age", num_images=1)
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{bad},{good}]", POLICY])
    assert sorted(_events(hub_uri)) == [("accepted", ""), ("rejected", "IMAGE_NOT_A_PHOTOGRAPH")]


def test_main__a_package_may_follow_one_that_is_lost(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    _image_package(tmp_path / "lost.age", num_images=1)
    path = _image_package(tmp_path / "second.age", num_images=1, first_seed=1)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", f"follows_lost=[{sha256}]", POLICY])
    assert _events(hub_uri) == [("accepted", "")]


def test_main__quarantines_what_a_suspended_site_sends(hub: Hub, hub_uri: str, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=1)
    hub.change_roster("suspend", "site_id=aster")
    with pytest.raises(ContributionRejected) as caught:
        intake.main([f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY])
    assert caught.value.code == "SITE_SUSPENDED"
    assert (_records(hub_uri), _events(hub_uri)) == ([], [("quarantined", "SITE_SUSPENDED")])


def _admit(hub: Hub, path: Path | str, *, policy: str = "demonstration", **limits: Any) -> admission.Outcome:
    return admission.admit(
        hub.uri,
        str(path),
        policy=policy,
        keys_path=hub.keys_path,
        roster=hub.roster,
        limits=confinement.Limits(**limits),
        cpu_s_per_mib=2.0,
    )


def _enter(hub: Hub, outcome: admission.Outcome, book: ledger.Ledger | None = None) -> None:
    key = strongbox.read_receipt_key(hub.keys_path)
    admission.enter(book or ledger.Ledger(hub.uri), hub.uri, outcome, receipt_key=key)


def test_admit__reads_nothing_of_what_is_too_large(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _image_package(tmp_path / "package.age", num_images=1)
    monkeypatch.setattr(storage, "download_file", None)
    outcome = admission.admit(
        hub.uri,
        str(path),
        policy="demonstration",
        keys_path=hub.keys_path,
        roster=hub.roster,
        limits=confinement.Limits(),
        cpu_s_per_mib=2.0,
        max_package_bytes=path.stat().st_size - 1,
    )
    assert (outcome.verdict, outcome.code) == ("", "TOO_LARGE")
    assert not (tmp_path / "hub" / "admissions").exists()


def test_admit__works_on_an_object_store(s3_hub: str, tmp_path: Path) -> None:
    hub = _s3_hub(storage.join(s3_hub, "intake"), tmp_path)
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=100)
    outcome = _admit(hub, path)
    assert storage.read_record(hub.uri, outcome.shard_set_id, ShardSet).num_images == 2
    assert _admit(hub, path) == outcome
    states = [step.state for step in History(hub.uri, outcome.package_sha256).steps]
    assert states == [*admission.STATES, "ADMITTED"]


def test_admit__says_what_it_did_not_judge_and_writes_a_receipt(hub: Hub, tmp_path: Path) -> None:
    outcome = _admit(hub, _image_package(tmp_path / "package.age", num_images=2))
    steps = {step.state: step.message for step in History(hub.uri, outcome.package_sha256).steps}
    assert "no generator" in steps["PRIVACY"] and "jobs.probe_generators" in steps["BEHAVIOUR"]
    book = ledger.Ledger(hub.uri)
    for _ in range(2):
        _enter(hub, outcome, book)
    receipts_uri = storage.join(hub.uri, "receipts")
    (uri,) = storage.list_uris(receipts_uri)
    found = receipt.read(storage.read_bytes(uri), receipt_key=hub.roster.receipt_key)
    assert (found.package_sha256, found.verdict, found.codes) == (outcome.package_sha256, "ADMITTED", ())
    assert found.contribution_id == outcome.contribution_id
    assert ledger.verify(hub.uri, anchors=ledger.read_anchors(receipts_uri))
    (tmp_path / "hub" / "ledger" / "00000002.json").unlink()
    with pytest.raises(LineageError, match="entry 2 is the first bad one"):
        ledger.verify(hub.uri, anchors=ledger.read_anchors(receipts_uri))


def test_admit__two_workers_race_for_one_verdict(s3_hub: str, tmp_path: Path) -> None:
    hub = _s3_hub(storage.join(s3_hub, "race"), tmp_path)
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=50)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda _: _admit(hub, path), range(3)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda each: _enter(hub, each), outcomes))
    states = [step.state for step in History(hub.uri, outcomes[0].package_sha256).steps]
    assert states == [*admission.STATES, "ADMITTED"]
    assert _events(hub.uri) == [("accepted", "")]
    assert len(_records(hub.uri)) == 3


def test_history__of_two_verdicts_the_first_stands(tmp_path: Path) -> None:
    ours, theirs = History(str(tmp_path), "0" * 64), History(str(tmp_path), "0" * 64)
    ours.add("RECEIVED")
    theirs.add("RECEIVED")
    theirs.add("DECRYPTED")
    ours.add("REJECTED", code="LIMIT_CPU")
    theirs.add("SIGNED")
    theirs.add("ADMITTED")
    assert [step.state for step in theirs.steps] == ["RECEIVED", "DECRYPTED", "REJECTED"]
    assert theirs.verdict == ours.verdict and theirs.verdict is not None and theirs.verdict.code == "LIMIT_CPU"
    theirs.reopen()
    assert theirs.verdict is not None, "a rejection stands"


def test_main__a_quarantined_package_waits_and_may_be_examined_again(
    hub_uri: str, tmp_path: Path, base_path: Path
) -> None:
    path = _weights_package(tmp_path / "package.age", base_path)
    arguments = [f"hub_uri={hub_uri}", f"package_uris=[{path}]", POLICY]
    for _ in range(2):
        with pytest.raises(ContributionRejected, match="UNKNOWN_BASE"):
            intake.main(arguments)
    assert _records(hub_uri) == [] and _events(hub_uri) == [("quarantined", "UNKNOWN_BASE")]
    base = _publish_base(hub_uri, base_path)
    with pytest.raises(ContributionRejected, match="UNKNOWN_BASE"):
        intake.main(arguments)
    contribution_id = intake.main([*arguments, "is_reopened=true"])
    record = storage.read_record(hub_uri, contribution_id, Contribution)
    assert storage.read_record(hub_uri, admission.made_by(hub_uri, record).generator_id, Generator).base_id == base.id
    assert [event for event, _ in _events(hub_uri)] == ["quarantined", "accepted"]
    reason = storage.read_json(storage.join(hub_uri, "quarantine", record.package_sha256, "reason.json"))
    assert reason["verdict"] == "ADMITTED"


def test_admit__standard_takes_no_whole_unet_and_demonstration_does(hub: Hub, tmp_path: Path, base_path: Path) -> None:
    _publish_base(hub.uri, base_path)
    terms: dict[str, Any] = {"method": "full", "policy": "standard/1"}
    first = _weights_package(tmp_path / "first.age", base_path, told_by=disclosure.read_policy("standard"), **terms)
    second = _weights_package(tmp_path / "second.age", base_path, **terms)
    assert _admit(hub, first, policy="standard").code == "W2_METHOD"
    outcome = _admit(hub, second)
    assert (outcome.verdict, outcome.code) == ("ADMITTED", "")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_admit__executes_nothing_of_a_package(hub: Hub, tmp_path: Path, base_path: Path) -> None:
    _publish_base(hub.uri, base_path)
    canary = tmp_path / "canary"
    # A pickle whose ninth byte is that of a safetensors file, so that it is sealed without a fault.
    evil = b"Vxxxxxxx{\n0" + pickle.dumps(_Touch(canary), protocol=0)
    pickle.loads(evil)
    assert canary.exists(), "it would run"
    canary.unlink()
    path = _weights_package(tmp_path / "package.age", base_path, content=evil)
    outcome = _admit(hub, path)
    assert (outcome.verdict, outcome.code) == ("REJECTED", "W0_HEADER")
    assert not canary.exists()


def test_admit__rejects_weights_of_another_base_than_the_manifests(hub: Hub, tmp_path: Path, base_path: Path) -> None:
    _publish_base(hub.uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path, stated_base_sha256="0" * 64)
    assert _admit(hub, path).code == "BASE_MISMATCH"


def test_admit__holds_weights_against_other_sites(hub: Hub, tmp_path: Path, base_path: Path) -> None:
    base = _publish_base(hub.uri, base_path)
    first = _admit(hub, _weights_package(tmp_path / "first.age", base_path))
    base_sha256 = pipeline.denoiser_sha256(base_path)
    folder_uri = storage.join(hub.uri, "cohorts", base_sha256)
    assert storage.list_names(folder_uri) == ["aster.json"] and base.id
    measured = storage.read_json(storage.join(folder_uri, "aster.json"))
    for index in range(adapter.MIN_COHORT):  # sites whose adapters do a tenth of what the next one does
        other = measured | {"largest_singular_value": (0.1 + 0.001 * index) * measured["largest_singular_value"]}
        storage.write_json(storage.join(folder_uri, f"site-{index}.json"), other)
    second = _weights_package(tmp_path / "second.age", base_path, rank=3, stated_rank=3)
    outcome = _admit(hub, second)
    assert (outcome.verdict, outcome.code, outcome.site_id) == ("QUARANTINED", "W4_OUTLIER", "aster")
    generators = [record for record in storage.read_records(hub.uri, Generator) if record.site_id]
    assert [record.id for record in generators] == [first.generator_id]


def _odd_image(case: str) -> bytes:
    """Encodes an image that is small as a file and not as pixels, or is none."""
    stream = io.BytesIO()
    match case:
        case "120 megapixels":
            Image.new("L", (12_000, 10_000)).save(stream, "PNG")
        case "20k x 20k":
            Image.new("1", (20_000, 20_000)).save(stream, "PNG")
        case "TIFF of 25k x 25k":
            Image.new("1", (25_000, 25_000)).save(stream, "TIFF", compression="group4")
        case "TIFF of many frames":
            frames = [Image.new("L", (8, 8)) for _ in range(1000)]
            frames[0].save(stream, "TIFF", save_all=True, append_images=frames[1:])
        case "animated PNG":
            frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
            frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
        case "GIF":
            Image.new("L", (8, 8)).save(stream, "GIF")
        case "FITS":
            stream.write(b"SIMPLE  =                    T".ljust(2880))
        case "PSD":
            stream.write(b"8BPS\0\1" + bytes(100))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("120 megapixels", "IMAGE_TOO_MANY_PIXELS"),
        pytest.param("20k x 20k", "IMAGE_TOO_MANY_PIXELS", marks=pytest.mark.slow),
        ("TIFF of 25k x 25k", "IMAGE_NOT_A_PHOTOGRAPH"),
        pytest.param("TIFF of many frames", "IMAGE_NOT_A_PHOTOGRAPH", marks=pytest.mark.slow),
        ("animated PNG", "IMAGE_SEVERAL_FRAMES"),
        ("GIF", "IMAGE_NOT_A_PHOTOGRAPH"),
        pytest.param("FITS", "IMAGE_NOT_A_PHOTOGRAPH", marks=pytest.mark.slow),
        pytest.param("PSD", "IMAGE_NOT_A_PHOTOGRAPH", marks=pytest.mark.slow),
    ],
)
def test_admit__rejects_image_bombs_and_lives_on(hub: Hub, tmp_path: Path, case: str, code: str) -> None:
    path = _image_package(tmp_path / "package.age", num_images=2, odd_image=_odd_image(case))
    sealing.unseal(path, tmp_path / "package.tar", identities=hub.identities)
    reply = confinement.run(
        "gretfound.opening",
        {
            "task": "screen",
            "tar_path": str(tmp_path / "package.tar"),
            "into_path": str(tmp_path / "work" / "opened"),
            "own_recipients": strongbox.recipients_of(hub.identities),
            "roster": hub.roster.to_bytes().decode(),
            "policy": "demonstration",
            "today": parties.today().isoformat(),
        },
        folder_path=_made(tmp_path / "work"),
        readable_paths=[tmp_path / "package.tar"],
        limits=confinement.Limits(),
        is_strict=False,
    )
    assert reply.code == code
    assert 0 < reply.peak_bytes < 300 * 2**20


def test_admit__only_the_process_that_parses_nothing_has_the_identity(
    hub: Hub, tmp_path: Path, base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish_base(hub.uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path)
    requests: list[dict[str, Any]] = []
    original = confinement.run

    def watched(module: str, request: dict[str, Any], **terms: Any) -> confinement.Reply:
        requests.append(request)
        left = [each.name for each in terms["folder_path"].parent.rglob("*.tar")]
        assert left == (["package.tar"] if request["task"] == "screen" else []), "decrypted bytes lie there too long"
        return original(module, request, **terms)

    monkeypatch.setattr(confinement, "run", watched)
    assert _admit(hub, path).verdict == "ADMITTED"
    assert [request["task"] for request in requests] == ["unseal", "screen", "weigh"]
    has_secret = [any(identity in json.dumps(request) for identity in hub.identities) for request in requests]
    assert has_secret == [True, False, False]


@pytest.mark.parametrize("report", [{}, {"photographs": 3}])
def test_admit__reads_no_page_of_a_package_outside_of_the_confined_processes(
    hub: Hub, tmp_path: Path, base_path: Path, monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    _publish_base(hub.uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path, gate={"policy_name": "demonstration"} | report)
    read: list[str] = []
    original = io.open

    def watched(file: Any, mode: str = "r", *arguments: Any, **terms: Any) -> Any:
        if "/work/opened/" in str(file) and "w" not in mode:
            read.append(str(file))
        return original(file, mode, *arguments, **terms)

    monkeypatch.setattr(io, "open", watched)
    monkeypatch.setattr("builtins.open", watched)
    assert _admit(hub, path).code == ("GATE_MALFORMED" if report else "")
    assert read == []


def test_admit__repeats_no_word_of_the_process_that_parses(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _image_package(tmp_path / "package.age", num_images=1)
    original = confinement.run

    def taken_over(module: str, request: dict[str, Any], **terms: Any) -> confinement.Reply:
        if request["task"] == "screen":
            module, request = "tests.hostile_work", {"attempt": "reject"}
        return original(module, request, **terms)

    monkeypatch.setattr(confinement, "run", taken_over)
    outcome = _admit(hub, path)
    assert (outcome.verdict, outcome.code, outcome.message) == ("QUARANTINED", "CRASHED", reasons.WORDS["CRASHED"])
    kept = storage.read_json(storage.join(hub.uri, "quarantine", outcome.package_sha256, "reason.json"))
    assert kept["message"] == reasons.WORDS["CRASHED"]


def test_admit__believes_no_manifest_without_its_signatures(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.join(tmp_path / "birch.keys", "birch")
    path = _image_package(tmp_path / "package.age", num_images=4)
    original = confinement.run

    def taken_over(module: str, request: dict[str, Any], **terms: Any) -> confinement.Reply:
        reply = original(module, request, **terms)
        if request["task"] != "screen":
            return reply
        signed, manifest = reply.reports[0], json.loads(reply.reports[1]["manifest"])
        manifest["site_id"] = "birch"
        lines = [signed, {"manifest": lineage.canonical_json(manifest).decode()}, {"state": "STRUCTURE"}]
        return original("tests.hostile_work", {"attempt": "forge", "lines": lines}, **terms)

    monkeypatch.setattr(confinement, "run", taken_over)
    outcome = _admit(hub, path)
    assert (outcome.verdict, outcome.code) == ("QUARANTINED", "CRASHED")
    assert storage.list_names(storage.join(hub.uri, "sequence", "birch")) == [], "another site's number was taken"


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_admit__a_package_at_a_limit_goes_to_quarantine_with_its_code(hub: Hub, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    path = _image_package(tmp_path / "package.age", num_images=2, odd_image=fundus.encode_png(noise))
    outcome = _admit(hub, path, file_bytes=2**20)
    assert (outcome.verdict, outcome.code) == ("QUARANTINED", "LIMIT_FILE_SIZE")
    assert storage.read_json(storage.join(hub.uri, "quarantine", outcome.package_sha256, "reason.json"))["code"]
    assert _admit(hub, path) == outcome, "one verdict, also with more room later"


def test_admit__keeps_no_hidden_bytes_of_a_shard(hub: Hub, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=2, words_in_footer="MRN 12345")
    assert b"MRN 12345" in (tmp_path / "package" / "shards" / "part-00000.parquet").read_bytes()
    outcome = _admit(hub, path)
    (part,) = storage.read_record(hub.uri, outcome.shard_set_id, ShardSet).shards
    assert b"MRN 12345" not in storage.read_bytes(storage.join(hub.uri, part.path))


def _through_faults(hub: Hub, path: Path | str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> admission.Outcome:
    monkeypatch.setattr(storage, "UPLOAD_PAUSE_S", 0.01)
    with faulty_s3.serve(os.environ["AWS_ENDPOINT_URL"], faults) as endpoint, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()  # it remembers the endpoint
        outcome = _admit(hub, path)
        _enter(hub, outcome)
    s3fs.S3FileSystem.clear_instance_cache()
    return outcome


@pytest.mark.parametrize(
    ("kinds", "within"),
    [
        (("conflict", "lost"), "/admissions/"),
        pytest.param(("slow down", "lost", "conflict"), "/admissions/", marks=pytest.mark.slow),
        pytest.param(("slow down", "checksum"), "", marks=pytest.mark.slow),
        pytest.param(("lost",), "", marks=pytest.mark.slow),
    ],
)
def test_admit__gives_one_verdict_through_a_faulty_bucket(
    s3_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], within: str
) -> None:
    hub = _s3_hub(storage.join(s3_hub, "-".join(kinds).replace(" ", "-")), tmp_path)
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=70)
    faults = Faults(kinds=kinds, within=within)
    outcome = _through_faults(hub, path, faults, monkeypatch)
    assert all(faults.made[kind] >= 9 for kind in kinds), "each of the nine steps had each fault"
    states = [step.state for step in History(hub.uri, outcome.package_sha256).steps]
    assert states == [*admission.STATES, "ADMITTED"]
    assert _events(hub.uri) == [("accepted", "")] and len(_records(hub.uri)) == 3
    assert _admit(hub, path) == outcome
    assert not [uri for uri in storage.list_uris(hub.uri) if "partial" in uri]


@pytest.mark.slow
def test_admit__reads_through_a_bucket_that_is_slow_to_answer(
    s3_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _s3_hub(storage.join(s3_hub, "slow-to-read"), tmp_path)
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=90)
    uri = storage.join(hub.uri, "inbox", "package.age")
    storage.upload_file(path, uri)
    faults = Faults(kinds=("slow down", "slow down"), within="package.age", method="GET")
    outcome = _through_faults(hub, uri, faults, monkeypatch)
    assert faults.made["slow down"] == 2
    assert (outcome.verdict, outcome.package_sha256) == ("ADMITTED", storage.sha256_of(path))


def _traces(hub: Hub) -> list[str]:
    folders = ("admissions", "quarantine", "sequence", "runs", "contributions")
    return [name for folder in folders for name in storage.list_uris(storage.join(hub.uri, folder))]


def test_admit__judges_nothing_that_is_not_what_its_name_says(hub: Hub, tmp_path: Path) -> None:
    path = _image_package(tmp_path / "package.age", num_images=2)
    whole = path.read_bytes()
    uri = storage.join(hub.uri, "inbox", "aster", "first", f"{storage.sha256_of(path)}.age")
    for changed in (whole[:-100], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b""):
        storage.write_bytes(uri, changed)
        outcome = _admit(hub, uri)
        assert (outcome.verdict, outcome.code, outcome.package_sha256) == ("", "CHANGED_ON_THE_WAY", "")
        assert _traces(hub) == [], "something was written of a site's package that nobody has seen"
    storage.write_bytes(uri, whole)
    assert _admit(hub, uri).verdict == "ADMITTED"


@pytest.mark.parametrize("num_flips", [pytest.param(1, marks=pytest.mark.slow), admission.FETCH_ATTEMPTS])
def test_admit__judges_nothing_that_is_not_what_the_bucket_says(
    s3_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_flips: int
) -> None:
    hub = _s3_hub(storage.join(s3_hub, f"flips-{num_flips}"), tmp_path)
    uri = storage.join(hub.uri, "inbox", "package.age")
    path = _image_package(tmp_path / "package.age", num_images=2, first_seed=120)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=path.read_bytes())  # in one part: the ETag is the MD5
    faults = Faults(kinds=("flip",) * num_flips, within="package.age", method="GET")
    with monkeypatch.context() as patch:
        patch.setattr(admission, "enter", lambda *arguments, **terms: None)  # there is no verdict to enter
        outcome = _through_faults(hub, uri, faults, monkeypatch)
    assert faults.made["flip"] == num_flips
    if num_flips == admission.FETCH_ATTEMPTS:
        assert (outcome.verdict, outcome.code) == ("", "CHANGED_ON_THE_WAY") and _traces(hub) == []
        outcome = _admit(hub, uri)
    assert (outcome.verdict, outcome.code) == ("ADMITTED", "")


def test_main__a_package_that_changed_on_the_way_waits(
    hub: Hub, hub_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _image_package(tmp_path / "package.age", num_images=2)
    uri = storage.join(hub_uri, "inbox", f"{'0' * 64}.age")
    storage.upload_file(path, uri)
    command = [f"hub_uri={hub_uri}", POLICY]
    with pytest.raises(ContributionRejected, match="CHANGED_ON_THE_WAY"):
        intake.main(command)
    assert "waits  not read  CHANGED_ON_THE_WAY" in capsys.readouterr().err
    assert _traces(hub) == [] and _events(hub_uri) == []
    storage.upload_file(path, storage.join(hub_uri, "inbox", f"{storage.sha256_of(path)}.age"))
    assert intake.main(command).startswith("intake-"), "the other package does not wait for it"
    assert _events(hub_uri) == [("accepted", "")]


def _mixed_packages(hub: Hub, folder_path: Path, base_path: Path, *, num: int) -> dict[Path, str]:
    """Makes packages of which a third is good, one a site; returns the code that each has to get, empty for a good one.

    Those with weights come last.
    """
    found: dict[Path, str] = {}

    def join(name: str) -> dict[str, Any]:
        hub.join(folder_path / f"site-{name}.keys", f"site-{name}")
        return {"site_id": f"site-{name}"}

    def put(name: str, content: bytes, code: str) -> None:
        (folder_path / f"{name}.age").write_bytes(content)
        found[folder_path / f"{name}.age"] = code

    good = _image_package(folder_path / "first.age", num_images=2, first_seed=1000)
    whole = good.read_bytes()
    found[good] = ""
    put("cut", whole[:-4000], "DAMAGED")
    put("longer", whole + bytes(512), "DAMAGED")
    put("flipped", whole[:-3000] + bytes([whole[-3000] ^ 1]) + whole[-2999:], "DAMAGED")
    put("words", b"nothing of a package" * 100, "NOT_SEALED")
    images = {
        "bomb": ({"odd_image": _odd_image("120 megapixels")}, "IMAGE_TOO_MANY_PIXELS"),
        "gif": ({"odd_image": _odd_image("GIF")}, "IMAGE_NOT_A_PHOTOGRAPH"),
        "theirs": ({"row_site_id": "birch"}, "SITE_MISMATCH"),
        "unsummed": ({"summary": b"{}"}, "BAD_SUMMARY"),
        "known": ({"row_changes": {"patient": "Jane Doe"}}, "NOT_DEIDENTIFIED"),
        "miscounted": ({"num_images_stated": 3}, "COUNT_MISMATCH"),
    }
    for name, (changes, code) in images.items():
        found[_image_package(folder_path / f"{name}.age", num_images=2, **join(name), **changes)] = code
    weights: dict[str, tuple[dict[str, Any], str]] = {
        "scaled": ({"factor": 50.0}, "W4_NORM"),
        "unlearned": ({"factor": 0.0}, "W5_ZERO"),
        "fine": ({}, ""),
    }
    weights |= {name: ({"fault": name}, odd_weights.FAULTS[name]) for name in ("NaN", "words", "float32", "hole")}
    for name, (changes, code) in weights.items():
        site = join(f"w-{name.lower()}")
        found[_weights_package(folder_path / f"w-{name}.age", base_path, **site, **changes)] = code
    rest = num - len(found)
    for index in range(rest):
        path = folder_path / f"more-{index:03d}.age"
        is_good = index < rest // 2
        odd_image = b"" if is_good else b"GIF89a" + index.to_bytes(4, "big")
        _image_package(path, num_images=2, first_seed=2 * index, odd_image=odd_image, **join(f"{index}"))
        found[path] = "" if is_good else "IMAGE_NOT_A_PHOTOGRAPH"
    return dict(sorted(found.items(), key=lambda each: each[0].name))


def _verdicts(hub_uri: str, packages: dict[Path, str]) -> dict[Path, list[tuple[str, str]]]:
    histories = {path: History(hub_uri, storage.sha256_of(path)) for path in packages}
    return {path: [(s.state, s.code) for s in each.steps if s.is_verdict] for path, each in histories.items()}


def _killed_and_run_again(hub_uri: str, packages: dict[Path, str], command: list[str], *, after: int) -> None:
    """Kills ``command`` once there are ``after`` verdicts, takes the packages in again, and looks at what there is."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while sum(map(bool, _verdicts(hub_uri, packages).values())) < after:
        assert running.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    running.kill()
    running.wait()
    assert after <= sum(map(bool, _verdicts(hub_uri, packages).values())) < len(packages)

    arguments = [f"hub_uri={hub_uri}", f"package_uris=[{','.join(map(str, packages))}]", POLICY]
    intake_id = intake.main(arguments)

    required = {}
    for path, code in packages.items():
        state = "ADMITTED" if not code else "QUARANTINED" if code in admission.QUARANTINE_CODES else "REJECTED"
        required[path] = [(state, code)]
    assert _verdicts(hub_uri, packages) == required
    events = _events(hub_uri)
    assert sorted(code for _, code in events) == sorted(packages.values())
    assert [event for event, code in events if not code] == ["accepted"] * list(packages.values()).count("")
    num_good = list(packages.values()).count("")
    assert len(list(storage.read_records(hub_uri, Contribution))) == num_good
    assert len(list(storage.read_records(hub_uri, ShardSet))) == num_good - 1, "quarantined ones made none"
    assert len(list(storage.read_records(hub_uri, Generator))) == 2, "the base and the one good adapter"
    assert len(storage.list_names(storage.join(hub_uri, "receipts"))) == len(packages)
    records = _records(hub_uri)
    assert intake.main(arguments) == intake_id
    assert (_records(hub_uri), _events(hub_uri)) == (records, events)
    ledger.verify(hub_uri, anchors=ledger.read_anchors(storage.join(hub_uri, "receipts")))


@pytest.mark.long
def test_main__hundred_packages_and_the_job_itself_is_killed(
    hub: Hub, hub_uri: str, tmp_path: Path, base_path: Path
) -> None:
    _publish_base(hub_uri, base_path)
    packages = _mixed_packages(hub, tmp_path, base_path, num=100)
    command = [sys.executable, "-m", "jobs.intake", f"hub_uri={hub_uri}"]
    command += [f"package_uris=[{','.join(map(str, packages))}]", POLICY]
    _killed_and_run_again(hub_uri, packages, command, after=30)


def test_admit__takes_nothing_of_a_site_that_has_withdrawn(hub: Hub, tmp_path: Path) -> None:
    withdrawal.mark(hub.uri, [], site_id="aster", withdrawal_id="withdrawal-1")
    assert _admit(hub, _image_package(tmp_path / "package.age", num_images=2)).code == "SITE_WITHDRAWN"


def test_withdraw_site__marks_what_descends_and_makes_the_successor(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_uri = hub.uri
    ours = _admit(hub, _image_package(tmp_path / "ours.age", num_images=3))
    theirs = hubs.draw_shard_set(hub_uri, "birch", num_images=4)
    for shard_set in storage.read_records(hub_uri, ShardSet):
        for part in shard_set.shards:
            duplicates.sign_shard(hub_uri, part)
    at_hub = f"hub_uri={hub_uri}"
    corpus_id = assemble_corpus.main([at_hub, "temperature=0.5"])
    alone_id = assemble_corpus.main([at_hub, "temperature=0.5", f"shard_set_ids=[{ours.shard_set_id}]"])
    terms = {"objective": "mae", "image_size_px": 64, "images_seen": 1, "final_loss": 0.0}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.safetensors").write_bytes(b"weights")
    first = storage.publish_folder(
        hub_uri,
        tmp_path / "encoder",
        lineage.Encoder(parents=(corpus_id,), architecture="a", **terms),  # type: ignore[arg-type]
    )
    second = lineage.Encoder(parents=(first.id,), architecture="b", **terms)  # type: ignore[arg-type]
    unrelated = lineage.Encoder(parents=(theirs.id,), architecture="c", **terms)  # type: ignore[arg-type]
    released = lineage.Release(parents=(first.id,), name="r", licence="CC BY-NC 4.0")
    for record in (second, unrelated, released):
        storage.write_record(hub_uri, record)

    for site_id in ("aster", "birch"):
        storage.write_bytes(storage.join(storage.latents_uri(hub_uri, site_id), "key", "latents.parquet"), b"rows")

    withdrawal_id = withdraw_site.main([at_hub, "site_id=aster"])
    assert "withdrawn  latents/aster/key\n" in capsys.readouterr().err
    marked = [uri for uri in storage.list_uris(storage.join(hub_uri, "latents")) if uri.endswith(withdrawal.MARK_NAME)]
    assert marked == [storage.join(storage.latents_uri(hub_uri, "aster"), "key", withdrawal.MARK_NAME)]
    assert storage.read_json(marked[0]) == [{"site_id": "aster", "withdrawal_id": withdrawal_id}]
    being_made = ShardSet(site_id="aster", origin="synthetic", num_images=0, shards=(), rejected={})
    assert withdrawal.is_marked(hub_uri, being_made), "by its site, without a mark"

    found = withdrawal.descendants(hub_uri, site_id="aster")
    found_ids = [record.id for record in found]
    assert {first.id, second.id, ours.shard_set_id, ours.contribution_id, corpus_id} < set(found_ids)
    assert all(withdrawal.is_marked(hub_uri, record) for record in found)
    assert not {unrelated.id, theirs.id} & set(found_ids) and not withdrawal.is_marked(hub_uri, theirs)
    assert withdraw_site.main([at_hub, "site_id=aster"]) == withdrawal_id
    (entry,) = [entry for entry in ledger.read(hub_uri) if entry.event == "withdrawn"]
    assert entry.details["records"] == found_ids
    assert entry.details["latents"] == ["key"]
    assert entry.details["successors"].pop(alone_id) == "", "nothing is left of a corpus of that site alone"
    (successor_id,) = entry.details["successors"].values()
    successor = storage.read_record(hub_uri, successor_id, Corpus)
    assert (successor.site_ids, successor.parents) == (("birch",), (theirs.id,))
    assert successor_id == assemble_corpus.main([at_hub, "temperature=0.5"]), "the same recipe, without the site"
    with pytest.raises(LineageError, match="has withdrawn"):
        assemble_corpus.main([at_hub, f"shard_set_ids=[{ours.shard_set_id}]"])
    with pytest.raises(LineageError, match="has withdrawn"):
        withdrawal.require_unmarked(hub_uri, first)
    (tmp_path / "copy.safetensors").write_bytes(b"weights")
    for uri in (first.id, second.id, tmp_path / "copy.safetensors"):
        with pytest.raises(LineageError, match="has withdrawn"):
            pretrain_encoder.main([at_hub, f"corpus_id={successor_id}", f"initial_weights_uri={uri}"])
    with pytest.raises(LineageError, match="has withdrawn"):
        evaluate_encoder.main([at_hub, f"encoder_id={first.id}", "evaluation_uris=[nowhere]"])
    with pytest.raises(LineageError, match="has withdrawn"):
        fine_tuning.fetch_release(storage.record_uri(hub_uri, released), tmp_path / "cache")
    with pytest.raises(ConfigError, match="nothing of a site"):
        withdraw_site.main([at_hub, "site_id=cedar"])


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ({"policy_name": "demonstration"}, "GATE_POLICY"),
        ({"verdict": "FAIL"}, "GATE_VERDICT"),
        ({"checks": []}, "GATE_VERDICT"),
        ({"weights_sha256": "1" * 64}, "GATE_WEIGHTS"),
        ({"photographs": 3}, "GATE_MALFORMED"),
    ],
)
def test_admit__takes_no_weights_whose_gate_report_is_not_good(
    hub: Hub, base_path: Path, tmp_path: Path, gate: dict[str, Any], code: str
) -> None:
    _publish_base(hub.uri, base_path)
    told_by = disclosure.read_policy("standard")
    path = _weights_package(tmp_path / "package.age", base_path, told_by=told_by, policy="standard/1", gate=gate)
    outcome = _admit(hub, path, policy="standard")
    assert (outcome.verdict, outcome.code) == ("REJECTED", code)


def test_admit__a_demonstration_takes_the_report_of_one(hub: Hub, base_path: Path, tmp_path: Path) -> None:
    _publish_base(hub.uri, base_path)
    path = _weights_package(tmp_path / "package.age", base_path, gate={"policy_name": "demonstration"})
    assert _admit(hub, path).verdict == "ADMITTED"
