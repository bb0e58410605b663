"""A contribution's dispatch: everything from a site's folder to its sealed package, in one call that can be repeated.

It goes on where it stopped, and a finished package is found. What is learned about patients stays in the work folder
and goes away with it; only the package leaves.
"""

import contextlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from tqdm import tqdm

from gretfound import (
    contribution,
    deidentify,
    disclosure,
    examination,
    files,
    fundus,
    gatehouse,
    keyring,
    lineage,
    metadata,
    outgoing,
    roster,
    sealing,
    shard,
    signing,
    storage,
)
from gretfound.errors import ConfigError, GretfoundError, StorageError
from gretfound.examination import Examination, SitePolicy
from gretfound.gate import canaries, statement
from gretfound.gate import policy as gate_policy
from gretfound.gate import report as gate_report
from gretfound.gate.verdict import Check
from gretfound.generator import spending
from gretfound.generator.adapter import denoiser_weights
from gretfound.generator.spending import Ledger
from gretfound.keyring import Keyring
from gretfound.sealing import Package
from gretfound.veto import Veto

if TYPE_CHECKING:
    from gretfound import fit
    from gretfound.generator.squares import Square

KEY_BYTES = 32
_ROW_BYTES = 4096  # of a shard's row beside its image, at most
_PART_BYTES = 512 * 2**20


class NotFit(GretfoundError):
    """The site's folder is not fit for the form that was asked for; the report says why."""

    def __init__(self, report: str, form: str) -> None:
        super().__init__(f"{report}\nThis folder is not fit for the form {form!r}; nothing was made.")


class GateClosed(GretfoundError):
    """The privacy gate lets nothing of this generator leave; the report says why, and what the site can do."""

    def __init__(self, report: gate_report.Report, page_path: Path) -> None:
        page = f"\nThe pictures behind it, for your security officer (they stay here): {page_path}"
        super().__init__(
            f"{gate_report.to_text(report)}Nothing was packed, and nothing leaves; docs/sites.md says what you can do."
            + (page if page_path.exists() else "")
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a contribution is made; everything in it changes the result.

    Args:
        method: ``lora`` or ``full``.
        lora_rank: Rank of the factors that ``lora`` trains.
        images_seen: Photographs that the training looks at, repeats counted.
        batch_size: Photographs in one step of training, and drawn at once.
        learning_rate: Peak learning rate.
        num_drawn: Photographs to draw for ``synthetic``.
        num_steps: Denoising steps for each of them.
        guidance_scale: Weight of the caption.
        jpeg_quality: 0 stores PNG, without loss; 1 to 100 JPEG.
        seed: Seeds training and drawing.
        device: ``cpu`` or ``cuda``.
    """

    method: Literal["lora", "full"] = "lora"
    lora_rank: int = 8
    images_seen: int = 20_000
    batch_size: int = 16
    learning_rate: float = 1e-4
    num_drawn: int = 1_000
    num_steps: int = 25
    guidance_scale: float = 3.0
    jpeg_quality: int = 0
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What a contribution follows from beside the site's folder: another package comes of anything else in it."""

    site_id: str
    form: str
    policy: SitePolicy
    rules: disclosure.Policy
    gate: gate_policy.Policy
    recipe: Recipe
    base: str
    dp_epsilon: float | None

    def __post_init__(self) -> None:
        """Refuses what does not fit together.

        Raises:
            ConfigError: It says what to change.
        """
        require_site_id(self.site_id)
        is_full = self.recipe.method == "full"
        if self.form != "images" and not self.base:
            raise ConfigError(f"--base is required for the form {self.form!r}: the generator to start from")
        if self.form == "weights" and is_full and self.policy.name == "standard":
            raise ConfigError(
                "--method full is for the demonstration policy; the hub admits low-rank factors (lora) only"
            )
        if self.dp_epsilon is not None:
            if self.form == "images" or is_full:
                raise ConfigError("--dp-epsilon is for a form that is trained, with --method lora")
            spending.tier_of(self.dp_epsilon)


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where a contribution lies while it is made, and what of it stays at the site for good."""

    work_path: Path
    key_path: Path
    package_stem: str

    @property
    def staging_path(self) -> Path:
        """What is to be packed."""
        return self.work_path / "package"

    @property
    def ledger_path(self) -> Path:
        """The ledger of the site's releases."""
        return self.key_path.with_suffix(".releases.json")

    def beside_key(self, suffix: str) -> Path:
        """Returns a place for what stays at the site and is told of this package."""
        return self.key_path.with_name(f"{self.package_stem}.{suffix}")


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """What lies in the staging folder.

    Args:
        made: What is told of the patients.
        earlier: The site's ledger of releases, as it was when this one was made.
        num_images: Photographs that the package stands for.
        num_patients: Their patients as released; None where no codes are known.
        base_sha256: Of the base that was trained; "" where nothing was.
    """

    made: disclosure.Release
    earlier: list[disclosure.Release]
    num_images: int
    num_patients: int | None
    base_sha256: str = ""


def contribute(
    folder_path: Path,
    *,
    site_id: str,
    form: str,
    out_path: Path,
    policy: SitePolicy,
    recipe: Recipe,
    base: str = "",
    work_path: Path | None = None,
    key_path: Path | None = None,
    keys_path: Path | None = None,
    passphrase: str = "",
    today: date | None = None,
    min_patients_per_cell: int | None = None,
    dp_epsilon: float | None = None,
) -> Package:
    """Makes a site's contribution, or goes on with an interrupted one, or finds the finished one.

    It ends in a sealed package where the steward's key opens, and in a draft for the steward to sign where it does not.

    Args:
        folder_path: The site's folder.
        site_id: The site's pseudonym.
        form: ``weights``, ``images`` or ``synthetic``.
        out_path: The folder that the package goes to.
        policy: What the folder must hold, and from how many patients on a value may be told.
        recipe: How it is made.
        base: The generator to start from, for ``weights`` and ``synthetic``: a folder or an object-store URI.
        work_path: Where work in progress lies; ``out_path/.work`` by default. What is learned there is removed once
            the package is finished.
        key_path: The secret that pseudonyms are made with; it is made if it is absent, and stays at the site. The
            ledger of releases and the accounts of what was suppressed lie beside it, and stay there too.
        keys_path: The site's keyring; ``~/.config/gretfound/SITE`` by default.
        passphrase: The steward's.
        today: The day in UTC; the machine's by default.
        min_patients_per_cell: Where the site asks for more patients than the disclosure policy does.
        dp_epsilon: Of a training with differential privacy; None trains without.

    Returns:
        The package, or the draft.

    Raises:
        ConfigError: If the arguments do not fit together.
        NotFit: If the folder is not fit for the form.
        GateClosed: If the privacy gate does not let the generator leave.
        NonFiniteLoss: If the training diverged.
    """
    if form == "images":
        base = ""  # nothing is trained, so the base cannot change the result
    rules = disclosure.read_policy(policy.name)
    terms = _Terms(
        site_id=site_id,
        form=form,
        policy=policy,
        rules=rules if min_patients_per_cell is None else rules.raised_to(min_patients_per_cell),
        gate=gate_policy.read_policy(policy.name),
        recipe=recipe,
        base=base,
        dp_epsilon=dp_epsilon,
    )
    ring = keyring.read(keys_path or keyring.default_folder(site_id), site_id)
    today = today or datetime.now(UTC).date()
    digests = _digests_of_files(folder_path)
    work_id = _digest_of_inputs(folder_path, digests, terms)[:12]
    package_path = out_path / f"{site_id}-{form}-{work_id}.age"
    draft_path = package_path.with_suffix(".tar")
    if package_path.exists():
        draft_path.unlink(missing_ok=True)
        package = remembered(ring.folder_path, package_path)
        _require_acceptable(package, ring, today)
        return package
    if draft_path.exists():
        if _has_keys_of(ring, sealing.read_draft(draft_path)):
            return _sealed_if_ready(ring, draft_path, package_path, passphrase, today)
        draft_path.unlink()  # a key was replaced since
    found = examine(folder_path, _gated(policy, terms.gate, dp_epsilon))
    if not found.is_fit_for(form):
        raise NotFit(examination.to_text(found), form)
    places = _Places(
        work_path=(work_path or out_path / ".work") / work_id,
        key_path=key_path or default_key_path(site_id),
        package_stem=package_path.stem,
    )
    if form == "images":
        staged = _stage_photographs(terms, places, found, digests)
    else:
        staged = _stage_generator(terms, places, found, ring)
    # Before the package is there: it could leave at once.
    disclosure.enter(places.ledger_path, staged.made, after=staged.earlier)
    _write_account(places.beside_key("disclosure"), staged.made, terms.rules)
    sealing.draft(
        places.staging_path,
        draft_path,
        site_id=site_id,
        form=form,
        country=staged.made.summary.country,
        policy=policy.stamp,
        base_sha256=staged.base_sha256,
        num_images=staged.num_images,
        num_patients=staged.num_patients,
        label=keyring.label(ring, today=today),
        container_key=signing.read_private_key(ring.private_path("container")),
        steward_public_key=keyring.approval_of(ring, "steward").public_key,
    )
    shutil.rmtree(places.work_path)
    if places.work_path.parent.name == ".work" and not any(places.work_path.parent.iterdir()):
        places.work_path.parent.rmdir()
    return _sealed_if_ready(ring, draft_path, package_path, passphrase, today)


def _stage_photographs(terms: _Terms, places: _Places, found: Examination, digests: dict[Path, str]) -> _Staged:
    """De-identifies photographs and packs them with what may be told of each."""
    key = _site_key(places.key_path)
    found, leaving = _deidentified(found, digests, key, places.work_path, terms.recipe.jpeg_quality)
    rows = [each.cells for each in found.usable]
    made, earlier = _released(terms, places, rows, stale_path=places.staging_path)
    told_rows = disclosure.told_rows(rows, made.summary, policy=terms.rules)
    tasks = [
        _Task(
            path=leaving.folder_path / outcome.file_name,
            cells=(cells := _sent_cells(told, each.cells, outcome.visit, key)),
            site_id=terms.site_id,
            facts=outgoing.sent_facts(outcome, cells),
        )
        for each, outcome, told in zip(found.usable, leaving.leaving, told_rows, strict=True)
    ]
    _write_real_shards(tasks, places.staging_path / "shards", places.work_path, "packing")
    _write_private(places.beside_key("photographs.csv"), outgoing.ledger_text(leaving))
    return _Staged(
        made=made,
        earlier=earlier,
        num_images=len(found.usable),
        num_patients=None if found.num_patients is None else made.summary.num_patients,
    )


def _stage_generator(terms: _Terms, places: _Places, found: Examination, ring: Keyring) -> _Staged:
    """Fine-tunes the base, has the privacy gate look at it, and packs its weights or what it draws.

    Raises:
        GateClosed: If the gate does not let it leave: of the photographs alone, so before hours of training, or after.
    """
    rules, recipe, staging_path = terms.rules, terms.recipe, places.staging_path
    found = examination.narrowed(found, [each for each in found.usable if not each.is_dicom])
    rows = [each.cells for each in found.usable]
    made, earlier = _released(terms, places, rows, stale_path=places.work_path)
    # Of twice as many patients: some of a caption's are held out, and both sides must be captioned alike.
    common = rules.raised_to(2 * rules.min_patients_per_cell)
    captioned = disclosure.caption_rows(rows, made.summary, policy=common)
    prepared = gatehouse.prepare(found, captioned, rules=terms.gate, seed=recipe.seed, epsilon=terms.dp_epsilon)
    page_path = places.beside_key("gate.html")
    if prepared.first.verdict != "PASS":
        raise GateClosed(gate_report.make([prepared.first], policy_stamp=terms.gate.stamp), page_path)
    _require_told_patients(made.summary, rules, terms.gate, terms.dp_epsilon)
    reveal: canaries.Reveal | None = None
    if terms.form == "weights":
        coin_secret = canaries.coin_secret_of(_site_key(places.key_path), places.work_path.name)
        seed = keyring.read_hub_card(ring.hub_path)[0].canary_seed
        reveal = _commit(staging_path, terms.policy, seed, coin_secret)
    learned = _canaries(reveal, terms.policy) if reveal else []
    adapter_path, base_path = _trained(prepared, places.work_path, recipe, terms.base, learned, terms.dp_epsilon)
    ledger: Ledger | None = None
    if terms.dp_epsilon is not None:
        ledger = spending.read_ledger((adapter_path.parent / spending.LEDGER_NAME).read_bytes())
        storage.write_bytes(str(staging_path / "privacy" / spending.LEDGER_NAME), ledger.to_bytes())
    _stage_training(places.work_path, staging_path, recipe)
    extra: list[Check] = []
    if reveal is not None:
        canaries_check = gatehouse.judge_canaries(
            reveal,
            base_path=base_path,
            adapter_path=adapter_path,
            policy=terms.policy.name,
            ledger=ledger,
            device=recipe.device,
            work_path=places.work_path,
        )
        extra.append(canaries_check)
    num_drawn = recipe.num_drawn if terms.form == "synthetic" else 0
    outcome = _judged(prepared, made.summary, base_path, adapter_path, places, recipe, num_drawn, extra)
    _write_private(page_path, outcome.page)
    if outcome.report.verdict not in gate_report.LEAVES:
        raise GateClosed(outcome.report, page_path)
    storage.write_bytes(str(staging_path / gate_report.PATH), outcome.report.to_bytes())
    num_images = made.summary.num_images
    if terms.form == "weights":
        shutil.copytree(adapter_path, staging_path / "weights", dirs_exist_ok=True)
    else:
        leaving = [place for place in range(num_drawn) if place not in outcome.flagged]
        _write_drawn(outcome, leaving, staging_path / "shards", places.work_path, terms.site_id, recipe)
        num_images = len(leaving)
    return _Staged(
        made=made,
        earlier=earlier,
        num_images=num_images,
        num_patients=None if found.num_patients is None else made.summary.num_patients,
        base_sha256=storage.sha256_of(denoiser_weights(base_path)),
    )


def _released(
    terms: _Terms, places: _Places, rows: Sequence[dict[str, Any]], *, stale_path: Path
) -> tuple[disclosure.Release, list[disclosure.Release]]:
    """Puts the summary of the patients into the package; what was made by another one, at ``stale_path``, goes.

    Returns:
        What is told, and the site's ledger of earlier releases, which it was judged by.
    """
    earlier = disclosure.read_ledger(places.ledger_path)
    made = disclosure.release(rows, policy=terms.rules, earlier=earlier)
    content = metadata.to_bytes(made.summary)
    path = places.staging_path / "summary" / "metadata_summary.json"
    if path.exists() and path.read_bytes() != content:
        shutil.rmtree(stale_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    report = disclosure.describe_for_hub(made.summary, policy=terms.rules)
    _write_json(path.with_name("disclosure_report.json"), report)
    return made, earlier


def _has_keys_of(ring: Keyring, package: Package) -> bool:
    return package.manifest.approvals == tuple(keyring.approval_of(ring, role) for role in keyring.ROLES)


def _require_acceptable(package: Package, ring: Keyring, today: date) -> None:
    """Refuses to hand out a finished package that the hub would refuse: too old, or of other keys than today's."""
    recipients = keyring.read_hub_card(ring.hub_path)[0].recipients
    is_current = package.manifest.expires >= today and set(package.manifest.encrypted_to) == set(recipients)
    if not (is_current and _has_keys_of(ring, package)):
        raise ConfigError(
            f"{package.path.name} can no longer be taken in: it has expired, or was sealed with other keys; move it "
            f"away, run the command again, and tell the hub that the package {package.sha256} is lost"
        )


def _sealed_if_ready(ring: Keyring, draft_path: Path, package_path: Path, passphrase: str, today: date) -> Package:
    if not passphrase and not keyring.is_steward_ready(ring):
        return sealing.read_draft(draft_path)
    return keyring.seal(ring, draft_path, package_path, today=today, passphrase=passphrase)


def remembered(keys_path: Path, package_path: Path) -> Package:
    package = keyring.find(keys_path, package_path)
    if package is None:
        raise ConfigError(
            f"{package_path.name} is sealed, and the keys in {keys_path} did not seal it: only the hub can open it. "
            "Give --keys with the folder of the keys that sealed it, or move the file away to contribute again"
        )
    return package


def _digests_of_files(folder_path: Path) -> dict[Path, str]:
    root = folder_path / examination.FOLDER_NAME
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    paths += [path for path in [folder_path / examination.METADATA_NAME] if path.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(zip(paths, pool.map(storage.sha256_of, paths), strict=True))


def _digest_of_inputs(folder_path: Path, digests: dict[Path, str], terms: _Terms) -> str:
    base = terms.base
    base_path = storage.local_path(base) if base else None
    is_local = base_path is not None and denoiser_weights(base_path).is_file()
    return lineage.digest_of(
        {
            "files": [(path.relative_to(folder_path).as_posix(), digest) for path, digest in digests.items()],
            "site_id": terms.site_id,
            "form": terms.form,
            "policy": terms.policy.stamp,
            "disclosure": asdict(terms.rules),
            "gate": asdict(terms.gate) if terms.form != "images" else None,
            "recipe": asdict(terms.recipe),
            "dp_epsilon": terms.dp_epsilon,
            "base": storage.sha256_of(denoiser_weights(base_path)) if base_path and is_local else base,
        }
    )


def _gated(policy: SitePolicy, gate: gate_policy.Policy, dp_epsilon: float | None) -> SitePolicy:
    """Returns a policy that asks for as many patients as the gate does, where it asks for patients at all."""
    if not policy.min_patients_to_train:
        return policy
    needed = gate.num_patients_for(dp_epsilon)
    return replace(policy, min_images_to_train=needed, min_patients_to_train=needed)


def _require_told_patients(
    summary: metadata.MetadataSummary, rules: disclosure.Policy, gate: gate_policy.Policy, dp_epsilon: float | None
) -> None:
    """Refuses, before hours of training, what a standard hub would: a summary that does not tell of enough patients.

    Raises:
        ConfigError: As photographs without patients' codes have it, however many they are.
    """
    most, required = statement.most_patients(summary.num_patients, told_by=rules), gate.num_patients_for(dp_epsilon)
    if gate.name == "standard" and most < required:
        raise ConfigError(
            f"the summary that would leave tells of {most} patients at most; the hub requires {required} of a "
            "generator: give each photograph its patient's code (column Patient), add patients, or send --form images"
        )


def veto(folder_path: Path, drawn_path: Path, *, ring: Keyring, policy: SitePolicy) -> Veto:
    """Compares what the hub drew with all photographs of a site; returns the drop list, not signed yet.

    Raises:
        ConfigError: If the shard is not one of drawn photographs, or the site has too few to judge by.
    """
    rules = gate_policy.read_policy(policy.name)
    found = examine(folder_path, policy)
    size_px, squares, image_ids = 0, [], []
    try:
        for row in shard.read_rows(str(drawn_path), columns=["image", "image_id", "origin"]):
            image = fundus.decode_photograph(row["image"])
            if row["origin"] != "synthetic" or row["image_id"] != fundus.pixel_digest(image):
                raise ConfigError(
                    f"{drawn_path} has a row that was not drawn, or is not what its id says; ask the hub again"
                )
            size_px = size_px or min(image.shape[:2])
            squares.append(fundus.to_square(image, fundus.find_field_of_view(image), size_px))
            image_ids.append(row["image_id"])
    except (StorageError, fundus.UnreadablePhotograph, pa.ArrowException) as error:
        raise ConfigError(f"{drawn_path} is no shard of photographs: {error}; ask the hub for it again") from error
    if not squares:
        raise ConfigError(f"{drawn_path} holds no photograph; ask the hub for it again")
    with progress_bar("comparing", len(found.usable)) as bar:
        flagged = gatehouse.find_copies(found, squares, rules=rules, size_px=size_px, on_progress=bar.update)
    return Veto(
        site_id=ring.site_id,
        shard_sha256=storage.sha256_of(drawn_path),
        image_ids=tuple(sorted({image_ids[place] for place in flagged})),
        num_compared=len(squares),
        policy=rules.stamp,
        created=datetime.now(UTC).date(),
        approvals=(keyring.approval_of(ring, "container"), keyring.approval_of(ring, "steward")),
    )


def examine(folder_path: Path, policy: SitePolicy) -> Examination:
    if not folder_path.is_dir():
        raise ConfigError(f"there is no folder {folder_path}; give the folder that holds traindata and metadata.csv")
    with progress_bar("checking", None, leave=False) as bar:

        def show(num_done: int, num_total: int) -> None:
            bar.total = num_total
            bar.update(num_done - bar.n)

        return examination.examine(folder_path, policy=policy, on_progress=show)


def progress_bar(doing: str, total: int | None, *, leave: bool = True) -> "tqdm[Any]":
    return tqdm(desc=doing, total=total, unit=" photographs", file=sys.stderr, leave=leave, mininterval=0.5)


def require_site_id(site_id: str) -> None:
    if not re.fullmatch(roster.SITE_ID, site_id):
        raise ConfigError(f"--site-id {site_id!r} must be of lower-case letters, digits and hyphens")


def default_key_path(site_id: str) -> Path:
    return keyring.default_folder(site_id).with_name(f"{site_id}.key")


def _site_key(key_path: Path) -> bytes:
    """Reads the site's secret, or makes it, readable by its owner alone."""
    files.create(key_path, secrets.token_bytes(KEY_BYTES), mode=0o600)
    key = signing.read_secret(key_path)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{key_path} is no site key: found {len(key)} bytes, required {KEY_BYTES}")
    return key


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lineage.canonical_json(content) + b"\n")


def _require_room(sizes_bytes: Sequence[int]) -> None:
    total_bytes = sum(sizes_bytes) + _ROW_BYTES * len(sizes_bytes)
    if total_bytes > sealing.MAX_TOTAL_BYTES:
        raise ConfigError(
            f"found {total_bytes / 2**30:,.0f} GiB of photographs that may leave; a package may hold "
            f"{sealing.MAX_TOTAL_BYTES >> 30}: store them smaller with --jpeg-quality 95, or contribute in parts"
        )


def _parts(sizes_bytes: Sequence[int]) -> list[range]:
    """Cuts images into parts: few enough for a package, if it has room for all, and none too large for it.

    A third of the parts that may be are for cuts by number, the others for cuts by size: a part that ends for its size
    has its share of all bytes, so the two together are never too many.
    """
    total_bytes, max_cuts = sum(sizes_bytes) + _ROW_BYTES * len(sizes_bytes), contribution.MAX_SHARDS // 3
    per_part = shard.IMAGES_PER_ROW_GROUP * max(1, -(-len(sizes_bytes) // (max_cuts * shard.IMAGES_PER_ROW_GROUP)))
    share_bytes = total_bytes // (2 * max_cuts) + max(sizes_bytes, default=0) + _ROW_BYTES
    max_bytes = min(contribution.MAX_SHARD_BYTES, max(_PART_BYTES, share_bytes))
    parts, start, held_bytes = [], 0, 0
    for index, size_bytes in enumerate(sizes_bytes):
        held_bytes += size_bytes + _ROW_BYTES
        if index - start == per_part or held_bytes > max_bytes:
            parts.append(range(start, index))
            start, held_bytes = index, size_bytes + _ROW_BYTES
    return [*parts, range(start, len(sizes_bytes))]


def _write_parts(
    sizes_bytes: Sequence[int],
    shards_path: Path,
    work_path: Path,
    rows_of: Callable[[range], Iterator[dict[str, Any]]],
    *,
    content: Any,
) -> None:
    """Writes one shard file a part; what an earlier run finished of the same content is kept.

    Args:
        sizes_bytes: About how large each image is.
        shards_path: The folder for the parts.
        work_path: The folder of the work in progress.
        rows_of: Gives the rows of a part.
        content: Everything that decides the rows, JSON-able.
    """
    digest = lineage.digest_of(content).encode()
    made_of_path = work_path / f"{shards_path.name}.made_of"
    if not made_of_path.is_file() or made_of_path.read_bytes() != digest:
        shutil.rmtree(shards_path, ignore_errors=True)
        files.write(made_of_path, digest)
    shards_path.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(_parts(sizes_bytes)):
        part_path = shards_path / f"part-{index:05d}.parquet"
        if not part_path.exists():
            partial = work_path / "part.partial"
            shard.write_shard_file(partial, rows_of(part))
            partial.replace(part_path)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One photograph for a worker process; ``facts`` are the columns that de-identification fills."""

    path: Path
    cells: dict[str, Any]
    site_id: str
    facts: dict[str, Any]


def _row_of(task: _Task) -> dict[str, Any]:
    return shard.row_of(task.path.read_bytes(), site_id=task.site_id, origin="real", cells=task.cells, **task.facts)


def _write_account(path: Path, made: disclosure.Release, rules: disclosure.Policy) -> None:
    """Writes for the security officer what was suppressed and why; it would help an attacker, so it is never packed."""
    content = lineage.canonical_json(disclosure.describe(made, policy=rules)).decode()
    _write_private(path.with_name(f"{path.name}.json"), f"{content}\n")
    _write_private(path.with_name(f"{path.name}.txt"), disclosure.to_text(made, policy=rules))


def _write_private(path: Path, text: str) -> None:
    """Writes what stays at the site, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.write(path, text.encode(), mode=0o600)


def _deidentified(
    found: Examination, digests: dict[Path, str], key: bytes, work_path: Path, jpeg_quality: int
) -> tuple[Examination, outgoing.Prepared]:
    """Makes the photographs anew; returns the examination of those that may leave, and where they lie.

    Raises:
        NotFit: If too few of them may.
        ConfigError: If they are more than a package may hold.
    """
    with progress_bar("de-identifying", len(found.usable)) as bar:

        def show(num_done: int) -> None:
            bar.update(num_done - bar.n)

        leaving = outgoing.prepare(
            found.usable,
            root_path=found.folder_path,
            digests=digests,
            key=key,
            work_path=work_path,
            jpeg_quality=jpeg_quality,
            on_progress=show,
        )
    findings = leaving.findings()
    for finding in findings:
        tqdm.write(f"{finding.headline} ({'; '.join(finding.details)}). {finding.advice}", file=sys.stderr)
    _require_room([(leaving.folder_path / outcome.file_name).stat().st_size for outcome in leaving.leaving])
    found = examination.narrowed(found, [found.usable[outcome.place] for outcome in leaving.leaving], findings)
    if not found.is_fit_for("images"):
        raise NotFit(examination.to_text(found), "images")
    return found, leaving


def _sent_cells(told: dict[str, Any], cells: dict[str, Any], visit: str, key: bytes) -> dict[str, Any]:
    """Returns the cells that leave with a photograph: released values, measurements, and pseudonyms.

    ``visit`` is the pseudonym of a DICOM study, or blank. Free text that few patients share, visits as the site writes
    them and exact ages do not leave.
    """
    measured = {name: cells[name] for name in metadata.MEASUREMENTS if name in cells}
    person = {"patient": deidentify.pseudonym(key, cells["patient"])} if "patient" in cells else {}
    study = {"visit": visit} if visit else {}
    return told | measured | person | study


def _write_real_shards(tasks: Sequence[_Task], shards_path: Path, work_path: Path, doing: str) -> None:
    with _pool(len(tasks)) as pool, progress_bar(doing, len(tasks)) as bar:

        def rows_of(part: range) -> Iterator[dict[str, Any]]:
            chosen = [tasks[index] for index in part]
            for row in pool.map(_row_of, chosen, chunksize=4) if pool else map(_row_of, chosen):
                bar.update()
                yield row

        _write_parts(
            [task.path.stat().st_size for task in tasks],
            shards_path,
            work_path,
            rows_of,
            content=[[task.path.name, task.cells, task.facts] for task in tasks],
        )
        bar.update(len(tasks) - bar.n)  # parts that an earlier run finished


@contextlib.contextmanager
def _pool(num_images: int) -> Iterator[ProcessPoolExecutor | None]:
    if num_images < examination.MIN_PHOTOGRAPHS_FOR_POOL:
        yield None
        return
    num_processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _commit(staging_path: Path, policy: SitePolicy, canary_seed: int, coin_secret: str) -> canaries.Reveal:
    """Commits to the coins of the canaries, before the training."""
    flock = canaries.FLOCKS[policy.name]
    committed = canaries.Commitment(commitment=canaries.commitment_to(coin_secret))
    reveal = canaries.Reveal(canary_seed=canary_seed, num_canaries=flock.num_canaries, coin_secret=coin_secret)
    for name, document in ((canaries.COMMITMENT_NAME, committed), (canaries.REVEAL_NAME, reveal)):
        storage.write_bytes(str(staging_path / "privacy" / name), document.to_bytes())
    return reveal


def _canaries(reveal: canaries.Reveal, policy: SitePolicy) -> "list[Square]":
    """Draws the canaries that the training is to learn."""
    from gretfound.generator.squares import Square

    return [
        Square(pixels=pixels, caption=canaries.CAPTION, mirrored_caption=canaries.CAPTION)
        for pixels in canaries.draw_in(reveal.canary_seed, canaries.FLOCKS[policy.name], reveal.coin_secret)
    ]


def _trained(
    prepared: gatehouse.Preparation,
    work_path: Path,
    recipe: Recipe,
    base: str,
    learned: "list[Square]",
    dp_epsilon: float | None,
) -> tuple[Path, Path]:
    """Fine-tunes the base on the photographs that are not held out, with common captions, and on canaries.

    Returns:
        The adapter's folder and the base's; with ``dp_epsilon`` the ledger lies beside the adapter.
    """
    from gretfound.generator import finetune, pipeline

    base_path = pipeline.fetch_base(base, hub_uri=None, folder_path=work_path / "base")
    tasks = [
        _Task(
            path=each.path,
            cells=cells | ({"patient": each.cells["patient"]} if "patient" in each.cells else {}),
            site_id="",
            facts={},
        )
        for each, cells in zip(prepared.photographs, prepared.cells, strict=True)
    ]
    _write_real_shards(tasks, work_path / "photographs", work_path, "reading")
    metrics_path = work_path / "metrics.jsonl"
    if dp_epsilon is not None:
        return _trained_privately(work_path, recipe, base_path, learned, prepared.left_out, dp_epsilon), base_path
    with (
        metrics_path.open("a") as metrics,
        progress_bar("training", recipe.images_seen) as bar,
    ):

        def show(progress: "fit.Progress") -> None:
            bar.update(progress.images_seen - bar.n)
            bar.set_postfix(loss=f"{progress.loss:.4f}")
            metrics.write(json.dumps({"images_seen": progress.images_seen, "loss": round(progress.loss, 6)}) + "\n")

        adapter_path = finetune.finetune_locally(
            base_path=base_path,
            shard_path=work_path / "photographs",
            work_path=work_path / "training",
            num_images_seen=recipe.images_seen,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            method=recipe.method,
            lora_rank=recipe.lora_rank,
            canaries=learned,
            seed=recipe.seed,
            left_out=prepared.left_out,
            device=recipe.device,
            checkpoint_every_images=max(recipe.batch_size, recipe.images_seen // 20),
            on_progress=show,
        )
        bar.update(recipe.images_seen - bar.n)  # an earlier run may have finished it
    return adapter_path, base_path


def _trained_privately(
    work_path: Path,
    recipe: Recipe,
    base_path: Path,
    learned: "list[Square]",
    left_out: frozenset[str],
    dp_epsilon: float,
) -> Path:
    """Fine-tunes with differential privacy for each patient; the ledger lies beside the adapter's folder."""
    from gretfound.generator import private

    with progress_bar("training", recipe.images_seen) as bar:
        adapter_path = private.finetune_privately(
            base_path=base_path,
            shard_path=work_path / "photographs",
            work_path=work_path / "training",
            epsilon=dp_epsilon,
            left_out=left_out,
            num_images_seen=recipe.images_seen,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lora_rank=recipe.lora_rank,
            canaries=learned,
            seed=recipe.seed,
            device=recipe.device,
            on_progress=lambda images_seen: bar.update(images_seen - bar.n),
        ).adapter_path
        bar.update(recipe.images_seen - bar.n)
    # A loss is one of patients, outside of the account: the course says 0.
    (work_path / "metrics.jsonl").write_text(json.dumps({"images_seen": recipe.images_seen, "loss": 0.0}) + "\n")
    return adapter_path


def _stage_training(work_path: Path, staging_path: Path, recipe: Recipe) -> None:
    """Puts the settings and the course of the loss into the package; a stretch that was done twice counts once."""
    _write_json(staging_path / "training" / "config.json", asdict(recipe))
    lines = [json.loads(line) for line in (work_path / "metrics.jsonl").read_text().splitlines()]
    by_progress = {line["images_seen"]: line for line in lines}
    texts = [lineage.canonical_json(by_progress[images_seen]) + b"\n" for images_seen in sorted(by_progress)]
    (staging_path / "training" / "metrics.jsonl").write_bytes(b"".join(texts))


def _judged(
    prepared: gatehouse.Preparation,
    summary: metadata.MetadataSummary,
    base_path: Path,
    adapter_path: Path,
    places: _Places,
    recipe: Recipe,
    num_drawn: int,
    extra: Sequence[Check],
) -> gatehouse.Outcome:
    """Draws photographs whose captions follow the released summary, and has the privacy gate look at them."""
    gate = prepared.rules
    with progress_bar("drawing", max(num_drawn, gate.num_samples) + gate.num_exposed * gate.seeds_per_exposed) as bar:
        return gatehouse.judge(
            prepared,
            summary,
            base_path=base_path,
            adapter_path=adapter_path,
            drawing=gatehouse.Drawing(
                num_steps=recipe.num_steps,
                guidance_scale=recipe.guidance_scale,
                batch_size=recipe.batch_size,
                device=recipe.device,
            ),
            num_drawn=num_drawn,
            seed=recipe.seed,
            work_path=places.work_path,
            eye_path=places.key_path.parent,
            extra=extra,
            on_drawn=bar.update,
        )


def _write_drawn(
    outcome: gatehouse.Outcome,
    places: Sequence[int],
    shards_path: Path,
    work_path: Path,
    site_id: str,
    recipe: Recipe,
) -> None:
    """Writes the shards of drawn photographs; those that the gate flagged are not among the places."""
    generator_id = f"site-{outcome.report.weights_sha256[: lineage.ID_HEX_DIGITS]}"

    def rows_of(part: range) -> Iterator[dict[str, Any]]:
        for place in (places[index] for index in part):
            image, quality = outcome.samples[place], recipe.jpeg_quality
            yield shard.row_of(
                fundus.encode_jpeg(image, quality=quality) if quality else fundus.encode_png(image),
                site_id=site_id,
                origin="synthetic",
                cells=outcome.cells[place],
                generator_id=generator_id,
                seed=place,
                prompt=metadata.caption(outcome.cells[place]),
            )

    _write_parts(
        [outcome.samples[place].nbytes for place in places],
        shards_path,
        work_path,
        rows_of,
        content=[list(places), outcome.cells, generator_id, asdict(recipe)],
    )
