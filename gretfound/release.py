"""Releases: the encoder folder with its model card, licence, lineage, digests and signature, behind gates.

``digests.json`` names every file with its SHA-256; ``signature.json`` is a DSSE envelope over exactly those bytes,
signed with Ed25519. The private key is a local file that never enters the hub. Whoever has the public key can verify a
release with `verify_release`, offline.
"""

import base64
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from safetensors.torch import load_file

from gretfound import ledger, lineage, signing, storage
from gretfound.encoder import folder
from gretfound.encoder.transform import Transform
from gretfound.errors import LineageError, ReleaseBlocked, StorageError
from gretfound.lineage import Encoder, Record, Release, Report, ShardSet
from gretfound.signing import key_id

log = logging.getLogger(__name__)
LICENCE = "CC-BY-NC-4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-nc/4.0/legalcode"
DIGESTS_NAME, SIGNATURE_NAME, LINEAGE_NAME = "digests.json", "signature.json", "lineage.json"
LABEL_MAPS_NAME, CARD_NAME, LICENCE_NAME, REPORT_NAME = "label_maps.json", "README.md", "LICENSE", "report.json"
PAYLOAD_TYPE = "application/vnd.gretfound.digests+json"
# The hub keeps a record beside the files of every artefact; it is not part of what is signed.
RECORD_NAME = "record.json"


def write_release_folder(
    path: Path,
    *,
    name: str,
    encoder_path: Path,
    encoder: Encoder,
    report: Report,
    report_content: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    signing_key: Ed25519PrivateKey,
    max_onnx_error: float,
    min_mean_auroc_gain: float,
) -> Path:
    """Writes, checks and signs a release folder.

    Args:
        path: The folder, made if absent.
        name: What the release is called, for example ``retfound-global-2026``.
        encoder_path: The encoder's folder.
        encoder: Its record.
        report: The record of the report on that encoder.
        report_content: That report's JSON.
        records: The encoder's lineage, from `read_lineage`.
        signing_key: The consortium's.
        max_onnx_error: Largest absolute difference of a feature between the ONNX export and PyTorch.
        min_mean_auroc_gain: Least mean difference in AUROC to the untrained encoder.

    Returns:
        ``path``.

    Raises:
        ReleaseBlocked: If a gate did not pass; names the gate, what was found and what is required.
    """
    _check_report(encoder, report, report_content, min_mean_auroc_gain)
    path.mkdir(parents=True, exist_ok=True)
    for file_name in (folder.WEIGHTS_NAME, folder.CONFIG_NAME, folder.TRANSFORM_NAME, folder.CHECKPOINT_NAME):
        if not (encoder_path / file_name).is_file():
            raise ReleaseBlocked("encoder_folder", f"no {file_name}", f"{file_name} in the encoder's folder")
        shutil.copyfile(encoder_path / file_name, path / file_name)
    onnx_error, transform = _check_encoder(path, max_onnx_error)
    label_maps = {
        task: {str(index): label for index, label in enumerate(entry["classes"])}
        for task, entry in report_content["tasks"].items()
    }
    _write_json(path / LABEL_MAPS_NAME, label_maps)
    _write_json(path / REPORT_NAME, report_content)
    _write_json(
        path / LINEAGE_NAME,
        {"release": name, "encoder_id": encoder.id, "report_id": report.id, "records": list(records)},
    )
    (path / LICENCE_NAME).write_text(licence_text(name))
    card = model_card(
        name=name,
        encoder=encoder,
        report=report,
        report_content=report_content,
        records=records,
        transform=transform,
        onnx_error=onnx_error,
        key_id=key_id(signing_key.public_key()),
    )
    (path / CARD_NAME).write_text(card)
    sign_folder(path, signing_key)
    verify_release(path, signing_key.public_key())
    return path


def read_lineage(hub_uri: str, record: Record) -> list[dict[str, Any]]:
    """Reads a record and everything it descends from, nearest first.

    Returns:
        For each record its id, kind, parents, a summary in words, and for a shard set its site, origin and size.

    Raises:
        LineageError: If an ancestor is absent or was changed.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting: list[Record] = [record]
    while waiting:
        current = waiting.pop(0)
        if current.id in found:
            continue
        entry: dict[str, Any] = {
            "id": current.id,
            "kind": current.kind,
            "parents": list(current.parents),
            "summary": _summary(current),
        }
        if isinstance(current, ShardSet):
            entry |= {"site_id": current.site_id, "origin": current.origin, "num_images": current.num_images}
        found[current.id] = entry
        waiting += [storage.read_record(hub_uri, parent, lineage.kind_of(parent)) for parent in current.parents]
    return list(found.values())


def announce(hub_uri: str, record: Release, *, key_id: str) -> None:
    """Writes a release to the ledger, unless it is there already."""
    details = {"name": record.name, "licence": record.licence, "key_id": key_id}
    ledger.append(hub_uri, event="released", subject=record.id, details=details)


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Reads the private signing key; on first use makes it, readable by its owner alone, with ``PATH.pub`` beside it.

    Raises:
        ConfigError: If others can read it, or it is no Ed25519 key.
    """
    if not path.exists():
        signing.make_private_key(path)
        log.info("made a signing key; give %s.pub to whoever verifies releases, and back the key up", path)
    return signing.read_private_key(path)


def sign_folder(path: Path, signing_key: Ed25519PrivateKey) -> None:
    """Writes ``digests.json`` over every file of a folder and ``signature.json`` over its bytes.

    Source: DSSE v1, https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    """
    for name in (DIGESTS_NAME, SIGNATURE_NAME):
        (path / name).unlink(missing_ok=True)
    _write_json(path / DIGESTS_NAME, {"files": _digests(path)})
    payload = (path / DIGESTS_NAME).read_bytes()
    signature = signing_key.sign(_pre_authentication_encoding(payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(signing_key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    _write_json(path / SIGNATURE_NAME, envelope)


def verify_release(path: Path, public_key: Ed25519PublicKey) -> None:
    """Checks that a release folder is, file for file, what the holder of the key signed.

    Raises:
        LineageError: If the signature is absent, of another key, or not over these digests.
        StorageError: Naming every file that is changed, missing or not in the digests.
    """
    try:
        envelope = json.loads((path / SIGNATURE_NAME).read_text())
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = {entry["keyid"]: base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]}
        payload_type = envelope["payloadType"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LineageError(f"a release has no readable {SIGNATURE_NAME}; fetch the release again") from error
    wanted = key_id(public_key)
    if payload_type != PAYLOAD_TYPE or wanted not in signatures:
        raise LineageError(f"a release is signed by {sorted(signatures)}; required a signature of the key {wanted}")
    try:
        public_key.verify(signatures[wanted], _pre_authentication_encoding(payload))
    except InvalidSignature as error:
        raise LineageError("a release's signature does not fit its digests: it was changed after signing") from error
    signed = json.loads(payload)["files"]
    found = _digests(path)
    faults = [f"{name} is missing" for name in signed if name not in found]
    faults += [f"{name} was not signed" for name in found if name not in signed]
    faults += [f"{name} was changed" for name in signed if name in found and found[name] != signed[name]]
    if (path / DIGESTS_NAME).read_bytes() != payload:
        faults.append(f"{DIGESTS_NAME} was changed")
    if faults:
        raise StorageError(f"a release is not what was signed: {'; '.join(sorted(faults))}; fetch it again")


def licence_text(name: str) -> str:
    """Returns the notice that stands for the licence; the legal code itself is at its canonical address."""
    return f"""{name}

Copyright (c) the Global RETFound Consortium and its contributors.

This encoder (its weights, configuration and documentation) is licensed under the Creative Commons
Attribution-NonCommercial 4.0 International licence (CC BY-NC 4.0). The legal code, which alone is binding, is at

    {LICENCE_URL}

In short, and without replacing the legal code, you may copy and redistribute the encoder in any medium or format, and
adapt it, as long as you

  - give appropriate credit, keep a link to the licence, and say what you changed;
  - do not use it for commercial purposes;
  - add no legal terms or technical measures that keep others from what the licence permits.

It is offered as it is, without warranties of any kind. It is not a medical device.

The source code that made it is under another licence, Apache-2.0.
"""


def model_card(
    *,
    name: str,
    encoder: Encoder,
    report: Report,
    report_content: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    transform: Transform,
    onnx_error: float,
    key_id: str,
) -> str:
    """Returns the model card in Markdown: measured results with intervals, gaps between groups, use and limits."""
    sets = report_content["evaluation_sets"]
    tested = ", ".join(
        f"{set_name} ({entry['num_readable']:,} photographs)"
        for set_name, entry in sets.items()
        if entry["role"] == "tested on"
    )
    lines = [
        "---",
        "license: cc-by-nc-4.0",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags: [medical-imaging, ophthalmology, colour-fundus-photography, foundation-model]",
        "---",
        "",
        f"# {name}",
        "",
        "A frozen encoder of colour fundus photographs, pretrained without labels by the Global RETFound Consortium "
        "on photographs, and on synthetic photographs, of many sites.",
        "",
        f"- Architecture: `{encoder.architecture}` (timm), {encoder.image_size_px} px, objective `{encoder.objective}`",
        f"- Pretraining: {encoder.images_seen:,} images seen, final loss {encoder.final_loss:.4f}",
        f"- Licence: CC BY-NC 4.0 ({LICENCE_URL}); the code that made it is Apache-2.0",
        f"- Encoder record: `{encoder.id}`; report record: `{report.id}`",
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "",
        'encoder = timm.create_model("local-dir:PATH", pretrained=True, num_classes=0).eval()',
        "features = encoder(images)  # (B, D)",
        "```",
        "",
        "`pretrained=True` is needed: without it timm builds the same network with random weights. "
        "`model.onnx` takes `images` (batch, 3, H, W) and gives `features`; it agrees with PyTorch within "
        f"{onnx_error:.1e}. `checkpoint.pth` holds the weights as RETFound's own fine-tuning script reads them.",
        "",
        "Preprocess exactly as in `transform.json`: "
        + ("crop to the photographed circle, " if transform.crop_to_field_of_view else "")
        + f"pad to a square with black, resize to {transform.image_size_px} px (bicubic with antialiasing), divide by "
        f"255, subtract the mean {list(transform.mean)} and divide by {list(transform.std)}. "
        "`gretfound.encoder.folder.read_encoder_folder(PATH)` gives the encoder with this transform.",
        "",
        "## Results",
        "",
        report_content["verdict"]["sentence"],
        "",
        f"Frozen linear probe, AUROC with 95% intervals over patients; tested on {tested}. "
        "Full figures: `report.json`; classes: `label_maps.json`.",
        "",
        "| task | photographs | pretrained | untrained | raw pixels | nearest neighbours |",
        "|---|---|---|---|---|---|",
        *_result_rows(report_content),
        "",
        *[
            f"- Skipped: {entry['title']} on {entry['set']}: {entry['reason']}."
            for entry in report_content["skipped_tasks"]
        ],
        "",
        "## Groups",
        "",
        *_group_rows(report_content["groups"]),
        "",
        "## Training data",
        "",
        *_training_rows(records),
        "",
        "## Intended use",
        "",
        "Research on retinal photographs: features for probes and fine-tuning, comparison of methods, teaching. Fit "
        "and test a head on data of the population and camera where it is to be used.",
        "",
        "Not intended for diagnosis, screening or any decision about a patient, for identifying a person, or for "
        "commercial use. It is not a medical device.",
        "",
        "## Limits",
        "",
        "- It was measured on the sets above only; cameras, populations and diseases outside them are unknown.",
        "- Intervals hold resampled patients, not resampled training photographs; tests are not corrected for their "
        "number.",
        "- Differences between groups may come from the photographs, the labels or the numbers, not only the encoder.",
        "- Part of the training photographs may be synthetic; faults of the generators can be carried over.",
        "- Weights can carry traces of the photographs they were trained on.",
        "",
        "## Verify",
        "",
        f"`digests.json` lists the SHA-256 of every file; `signature.json` is a DSSE envelope over it (Ed25519, key "
        f"`{key_id}`). `gretfound.release.verify_release(PATH, public_key)` checks both; take the public key from the "
        "consortium, not from where you took the release.",
        "",
        "## Lineage",
        "",
        "| record | id | what |",
        "|---|---|---|",
        *[f"| {entry['kind']} | `{entry['id']}` | {entry['summary']} |" for entry in records],
        "",
        "## Sources",
        "",
        "Tham et al., Building the world's first truly global medical foundation model, Nature Medicine 2025, "
        "doi:10.1038/s41591-025-03859-5. Zhou et al., A foundation model for generalizable disease detection from "
        "retinal images, Nature 2023.",
        "",
    ]
    return "\n".join(lines)


def _check_report(
    encoder: Encoder, report: Report, report_content: Mapping[str, Any], min_mean_auroc_gain: float
) -> None:
    found = report_content.get("lineage", {}).get("encoder_id")
    if encoder.id not in report.parents or found != encoder.id:
        raise ReleaseBlocked("report_of_encoder", f"a report on {found}", f"a report on {encoder.id}")
    tasks = report_content["tasks"]
    if not tasks:
        raise ReleaseBlocked("measured", "a report in which every task was skipped", "at least one measured task")
    gain = float(report_content["verdict"]["against"]["untrained"]["mean_gain"])
    if gain < min_mean_auroc_gain:
        raise ReleaseBlocked(
            "mean_auroc_gain",
            f"a mean AUROC {gain:+.3f} against the untrained encoder",
            f"at least {min_mean_auroc_gain:+.3f}",
        )
    if gain <= 0:
        log.warning("the encoder is no better than untrained (mean AUROC %+.3f); its model card says so", gain)


def _check_encoder(path: Path, max_onnx_error: float) -> tuple[float, Transform]:
    try:
        encoder, transform = folder.read_encoder_folder(path)
        weights = load_file(path / folder.WEIGHTS_NAME)
    except StorageError as error:
        raise ReleaseBlocked("encoder_folder", str(error), "an encoder folder that is read strictly") from error
    size = transform.image_size_px
    probe_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = folder.embed(encoder, probe_BCHW)
    try:
        plain = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ReleaseBlocked("plain_timm", str(error), "timm.create_model loads the folder") from error
    with torch.inference_mode():
        if not np.array_equal(plain(probe_BCHW).numpy(), expected):
            raise ReleaseBlocked("plain_timm", "other features in plain timm", "bit-equal features")
    checkpoint = torch.load(path / folder.CHECKPOINT_NAME, weights_only=True)["model"]
    if set(checkpoint) != set(weights) or any(not torch.equal(checkpoint[name], weights[name]) for name in weights):
        raise ReleaseBlocked("checkpoint", "other weights in checkpoint.pth", "those of model.safetensors")
    folder.export_onnx(encoder, path / folder.ONNX_NAME, image_size_px=size)
    onnx_error = folder.onnx_error(path / folder.ONNX_NAME, encoder, probe_BCHW)
    if not onnx_error <= max_onnx_error:
        raise ReleaseBlocked("onnx", f"a difference of {onnx_error:.2e}", f"at most {max_onnx_error:.2e} to PyTorch")
    return onnx_error, transform


def _result_rows(report_content: Mapping[str, Any]) -> list[str]:
    encoders = report_content["encoders"]
    rows = []
    for task, entry in report_content["tasks"].items():
        cells = [_cell(encoders[name][task]["auroc"]) for name in ("pretrained", "untrained", "raw_pixels")]
        cells.append(_cell(encoders["pretrained"][task]["knn_auroc"]))
        rows.append(f"| {entry['title']} (`{task}`) | {entry['num_images']:,} | {' | '.join(cells)} |")
    return rows


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def _group_rows(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not groups:
        return ["No attribute of the evaluation sets had two groups with enough patients of each class."]
    rows = [
        "AUROC of the pretrained encoder's linear probe within groups.",
        "",
        "| task | by | worst group | gap to the best | equity-scaled AUROC | groups (photographs) |",
        "|---|---|---|---|---|---|",
    ]
    for task, attributes in groups.items():
        for attribute, entry in attributes.items():
            worst = entry["worst_group"]
            counts = ", ".join(f"{group} ({figures['num_images']})" for group, figures in entry["groups"].items())
            rows.append(
                f"| `{task}` | {attribute.replace('_', ' ')} | {worst}: {_cell(entry['groups'][worst]['auroc'])} | "
                f"{entry['gap']:.3f} | {entry['equity_scaled_auroc']:.3f} | {counts} |"
            )
    return rows


def _training_rows(records: Sequence[Mapping[str, Any]]) -> list[str]:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"real": 0, "synthetic": 0})
    for entry in records:
        if entry["kind"] == ShardSet.kind:
            counts[entry["site_id"]][entry["origin"]] += entry["num_images"]
    if not counts:
        return ["The encoder's lineage names no shard sets."]
    totals = {origin: sum(count[origin] for count in counts.values()) for origin in ("real", "synthetic")}
    return [
        "| site | real photographs | synthetic photographs |",
        "|---|---|---|",
        *[f"| {site} | {count['real']:,} | {count['synthetic']:,} |" for site, count in sorted(counts.items())],
        f"| all {len(counts)} sites | {totals['real']:,} | {totals['synthetic']:,} |",
        "",
        "Before the corpus's own exclusions. Real photographs were contributed de-identified; for sites that "
        "contributed a generator, photographs never left the site.",
    ]


def _summary(record: Record) -> str:
    content = lineage.to_json(record)
    shown = {
        key: content[key]
        for key in ("name", "site_id", "origin", "form", "method", "objective", "architecture", "num_images")
        if content.get(key) not in (None, "")
    }
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _digests(path: Path) -> dict[str, str]:
    return {
        str(file_path.relative_to(path)): sha256
        for file_path, sha256, _ in storage.describe_folder(path)
        if str(file_path.relative_to(path)) not in (DIGESTS_NAME, SIGNATURE_NAME, RECORD_NAME)
    }


def _pre_authentication_encoding(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
