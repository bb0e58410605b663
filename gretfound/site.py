"""The site's command line: `check`, `contribute`, `sign`, `inspect`, `veto`, for a data manager, without a network.

A contribution is one command that can be run again (`gretfound.dispatch`).
"""

import argparse
import getpass
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gretfound import (
    contribution,
    dispatch,
    examination,
    keyring,
    metadata,
    receipt,
    sealing,
    signing,
    storage,
    strongbox,
    trial,
    veto,
)
from gretfound.errors import ConfigError, GretfoundError
from gretfound.examination import POLICIES
from gretfound.keyring import Keyring
from gretfound.sealing import Package

EXIT_FIT, EXIT_NOT_FIT, EXIT_USAGE = 0, 1, 2
FORM_LEAVES = {
    "weights": "the numbers that a generator learned, and counts; no photograph",
    "images": "de-identified photographs with their metadata under pseudonyms",
    "synthetic": "photographs that the site's generator drew, and counts; no photograph of a patient",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 for success or fit, 1 for not fit, 2 for a wrong command or a failure."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every autoencoder but its largest one
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which no site needs
    command = {
        "check": _check,
        "contribute": _contribute,
        "keys": _keys,
        "sign": _sign,
        "inspect": _inspect,
        "veto": _veto,
        "columns": _columns,
    }[arguments.command]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the libraries' own next versions: not for the reader
            return command(arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_USAGE
    except (dispatch.NotFit, dispatch.GateClosed) as error:
        print(error, file=sys.stderr)
        return EXIT_NOT_FIT
    except GretfoundError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except PermissionError as error:
        path = Path(str(error.filename))
        name = f"a photograph of {examination.FOLDER_NAME}" if examination.FOLDER_NAME in path.parts else path
        print(
            f"this user may not read or write {name}: give it to whoever runs this command (in a container, the user "
            "after --user)",
            file=sys.stderr,
        )
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gretfound-site", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    forms = contribution.FORMS

    check = commands.add_parser("check", help="is this folder fit? reads only; seconds")
    check.add_argument("folder", type=Path, metavar="DIR", help="holds traindata/ and metadata.csv")
    check.add_argument("--form", choices=forms, help="exit code for this form alone; without it, for any form")
    check.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page, too")
    check.add_argument(
        "--policy", choices=sorted(POLICIES), default="standard", help="which numbers to hold it against"
    )
    default = dispatch.Recipe()
    check.add_argument("--base", default="", metavar="DIR|URI",
                       help="time a few steps with this generator, to tell hours and memory; minutes")  # fmt: skip
    check.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="where to time them")
    check.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N")
    check.add_argument("--images-seen", type=int, default=default.images_seen, metavar="N", help="training length")
    check.add_argument("--num-images", type=int, default=default.num_drawn, metavar="N", help="photographs to draw")

    make = commands.add_parser("contribute", help="everything else; ends in one file; run it again to go on")
    make.add_argument("folder", type=Path, metavar="DIR", help="holds traindata/ and metadata.csv")
    make.add_argument("--form", choices=forms, required=True)
    make.add_argument("--site-id", required=True, metavar="NAME", help="lower-case letters, digits, hyphens")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the package goes")
    make.add_argument("--base", default="", metavar="DIR|URI", help="the generator to start from; images needs none")
    make.add_argument("--policy", choices=sorted(POLICIES), default="standard")
    make.add_argument("--min-patients-per-cell", type=int, metavar="N",
                      help="fewest patients of a count or a caption, where that is more than the policy's")  # fmt: skip
    make.add_argument(
        "--work", type=Path, metavar="DIR", help="work in progress; default OUT/.work/DIGEST, removed at the end"
    )
    make.add_argument(
        "--key", type=Path, metavar="FILE", help="secret for pseudonyms; default ~/.config/gretfound/NAME.key"
    )
    _add_keys_options(make)
    make.add_argument(
        "--method", choices=("lora", "full"), default=default.method, help="what of the generator is trained"
    )
    make.add_argument("--lora-rank", type=int, default=default.lora_rank, metavar="N")
    make.add_argument("--images-seen", type=int, default=default.images_seen, metavar="N", help="training length")
    make.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N")
    make.add_argument("--learning-rate", type=float, default=default.learning_rate, metavar="X")
    make.add_argument(
        "--num-images", type=int, default=default.num_drawn, metavar="N", help="photographs to draw (synthetic)"
    )
    make.add_argument("--steps", type=int, default=default.num_steps, metavar="N", help="denoising steps for each")
    make.add_argument(
        "--guidance", type=float, default=default.guidance_scale, metavar="X", help="weight of the caption"
    )
    make.add_argument("--jpeg-quality", type=int, default=default.jpeg_quality, metavar="Q",
                      help="store photographs as JPEG, 1 to 100; default PNG, without loss")  # fmt: skip
    make.add_argument("--dp-epsilon", type=float, metavar="X",
                      help="train with differential privacy for each patient (weights, synthetic): up to 3 is a strong "
                      "guarantee, up to 8 the standard, more than 10 none")  # fmt: skip
    make.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="cuda trains on the GPU")
    make.add_argument("--seed", type=int, default=default.seed, metavar="N")

    keys = commands.add_parser("keys", help="make this site's keys once, and show them; the card is for the hub")
    keys.add_argument("--site-id", required=True, metavar="NAME", help="lower-case letters, digits, hyphens")
    keys.add_argument("--hub", type=Path, metavar="FILE", help="the hub's card, hub.json: for whom to seal")
    keys.add_argument("--no-passphrase", action="store_true", help="do not ask for one: contribute then signs at once")
    keys.add_argument("--replace", choices=keyring.ROLES, help="put a new key in the place of this one")
    _add_keys_options(keys)

    sign = commands.add_parser("sign", help="the data steward, having read a draft, signs it; ends in one sealed file")
    sign.add_argument("draft", type=Path, metavar="FILE", help="the draft that contribute wrote, ending in .tar")
    sign.add_argument("--steward-key", type=Path, metavar="FILE", help="if the steward keeps it elsewhere")
    sign.add_argument("--yes", action="store_true", help="do not ask once more")
    _add_keys_options(sign)

    inspect = commands.add_parser("inspect", help="what is in a draft or package, in words; verifies every byte")
    inspect.add_argument("package", type=Path, metavar="FILE", nargs="?", help="a draft, or a package")
    inspect.add_argument("--receipt", type=Path, metavar="FILE", help="verify the hub's receipt, of FILE if given")
    inspect.add_argument(
        "--hub", type=Path, metavar="FILE", help="with --receipt: the hub's card; default DIR/hub.json"
    )
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--keys", type=Path, metavar="DIR", help="tell what this site's keyring remembers of it")
    inspect.add_argument("--identity", type=Path, metavar="FILE", help="at the hub: open it with this age identity")

    veto_ = commands.add_parser("veto", help="which photographs that the hub drew look like ours? a signed drop list")
    veto_.add_argument("folder", type=Path, metavar="DIR", help="holds traindata/ and metadata.csv")
    veto_.add_argument("--drawn", type=Path, required=True, metavar="FILE", help="a shard that the hub drew, .parquet")
    veto_.add_argument("--site-id", required=True, metavar="NAME", help="as the packages name it")
    veto_.add_argument("--out", type=Path, required=True, metavar="FILE", help="the list, for the hub")
    veto_.add_argument("--policy", choices=sorted(POLICIES), default="standard")
    veto_.add_argument("--steward-key", type=Path, metavar="FILE", help="if the steward keeps it elsewhere")
    _add_keys_options(veto_)

    commands.add_parser("columns", help="the metadata columns that are understood, and how to write them")
    return parser


def _add_keys_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=Path, metavar="DIR", help="the site's keys; default ~/.config/gretfound/NAME")
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help="the steward's passphrase; without it, it is asked for"
    )


def _check(arguments: argparse.Namespace) -> int:
    found = dispatch.examine(arguments.folder, POLICIES[arguments.policy])
    estimated = examination.estimates(
        found, _trial(arguments), images_seen=arguments.images_seen, num_drawn=arguments.num_images
    )
    print(examination.to_text(found, estimated=estimated), end="")
    if arguments.html is not None:
        storage.write_bytes(str(arguments.html), examination.to_html(found, estimated=estimated).encode())
        print(f"\nThe same as a page, with every file listed: {arguments.html}")
    return EXIT_FIT if found.is_fit_for(arguments.form) else EXIT_NOT_FIT


def _trial(arguments: argparse.Namespace) -> trial.Trial | None:
    if not arguments.base:
        return None
    from gretfound.generator import pipeline

    default = dispatch.Recipe()
    with tempfile.TemporaryDirectory() as folder, dispatch.progress_bar("timing", None, leave=False):
        return trial.run(
            pipeline.fetch_base(arguments.base, hub_uri=None, folder_path=Path(folder, "base")),
            device=arguments.device,
            batch_size=arguments.batch_size,
            lora_rank=default.lora_rank,
            num_steps=default.num_steps,
        )


def _contribute(arguments: argparse.Namespace) -> int:
    recipe = dispatch.Recipe(
        method=arguments.method,
        lora_rank=arguments.lora_rank,
        images_seen=arguments.images_seen,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        num_drawn=arguments.num_images,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        jpeg_quality=arguments.jpeg_quality,
        seed=arguments.seed,
        device=arguments.device,
    )
    package = dispatch.contribute(
        arguments.folder,
        site_id=arguments.site_id,
        form=arguments.form,
        out_path=arguments.out,
        policy=POLICIES[arguments.policy],
        recipe=recipe,
        base=arguments.base,
        work_path=arguments.work,
        key_path=arguments.key,
        keys_path=arguments.keys,
        passphrase=_passphrase(arguments.passphrase_file),
        min_patients_per_cell=arguments.min_patients_per_cell,
        dp_epsilon=arguments.dp_epsilon,
    )
    print(_in_words(package), end="")
    account_path = (arguments.key or dispatch.default_key_path(arguments.site_id)).with_name(
        f"{package.path.stem}.disclosure.txt"
    )
    print(f"\nWhat the summary suppresses, and why, for your security officer (it stays here): {account_path}")
    page_path = account_path.with_name(f"{package.path.stem}.gate.html")
    if page_path.exists():
        print(f"What the privacy gate found, with pictures of patients (it stays here): {page_path}")
    return EXIT_FIT


def _passphrase(path: Path | None) -> str:
    return "" if path is None else signing.read_secret(path).decode(errors="replace").rstrip("\n")


def _keys(arguments: argparse.Namespace) -> int:
    site_id = arguments.site_id
    dispatch.require_site_id(site_id)
    folder_path = arguments.keys or keyring.default_folder(site_id)
    ring = Keyring(folder_path=folder_path, site_id=site_id)
    passphrase = _passphrase(arguments.passphrase_file)
    is_asked = arguments.passphrase_file is None and not arguments.no_passphrase
    if is_asked and (arguments.replace or not ring.card_path.exists()):
        if not sys.stdin.isatty():
            raise ConfigError("there is no terminal to ask for a passphrase; give --passphrase-file or --no-passphrase")
        passphrase = getpass.getpass("The data steward's passphrase (none: leave it empty): ")
        if getpass.getpass("Once more: ") != passphrase:
            raise ConfigError("the two passphrases differ; nothing was made")
    keyring.make(folder_path, site_id, passphrase=passphrase)
    if arguments.replace:
        keyring.replace(ring, arguments.replace, passphrase=passphrase)
    print(f"Keys of {site_id} in {folder_path}: they never leave; keep a copy of the folder in a safe")
    for role in keyring.ROLES:
        path = ring.private_path(role)
        how = "kept elsewhere" if not path.exists() else "locked" if signing.is_locked(path) else "not locked"
        print(f"  {role:<10} {signing.spoken(keyring.approval_of(ring, role).key_id)}  {how}")
    if arguments.hub is not None:
        keyring.read_hub_card(arguments.hub)
        storage.write_bytes(str(ring.hub_path), arguments.hub.read_bytes())
    if ring.hub_path.exists():
        print(
            f"  {'hub':<10} {signing.spoken(keyring.read_hub_card(ring.hub_path)[1])}  packages are sealed for it alone"
        )
    print(f"\nSend {ring.card_path} to the hub, and compare these numbers with it over the telephone.")
    return EXIT_FIT


def _sign(arguments: argparse.Namespace) -> int:
    _require_file(arguments.draft)
    drafted = sealing.read_draft(arguments.draft)
    site_id = drafted.manifest.site_id
    ring = keyring.read(arguments.keys or keyring.default_folder(site_id), site_id)
    print(_in_words(drafted), end="")
    if not arguments.yes and not (sys.stdin.isatty() and input("\nSign it? Type yes: ").strip() == "yes"):
        raise ConfigError("it was not signed; type yes, or give --yes where there is no terminal")
    passphrase = _passphrase(arguments.passphrase_file)
    steward_path = arguments.steward_key or ring.private_path("steward")
    if not passphrase and signing.is_locked(steward_path):
        passphrase = getpass.getpass("The data steward's passphrase: ")
    package = keyring.seal(
        ring,
        arguments.draft,
        arguments.draft.with_suffix(".age"),
        today=datetime.now(UTC).date(),
        passphrase=passphrase,
        steward_path=steward_path,
    )
    print(
        f"\nSealed    {package.path}\nSHA-256   {package.sha256}\nThe draft was removed; send this one file to the hub."
    )
    return EXIT_FIT


def _veto(arguments: argparse.Namespace) -> int:
    _require_file(arguments.drawn)
    ring = keyring.read(arguments.keys or keyring.default_folder(arguments.site_id), arguments.site_id)
    passphrase, steward_path = _passphrase(arguments.passphrase_file), arguments.steward_key
    steward_path = steward_path or ring.private_path("steward")
    if not passphrase and signing.is_locked(steward_path):
        passphrase = getpass.getpass("The data steward's passphrase: ")
    steward_key = signing.read_private_key(steward_path, passphrase=passphrase)
    made = dispatch.veto(arguments.folder, arguments.drawn, ring=ring, policy=POLICIES[arguments.policy])
    container_key = signing.read_private_key(ring.private_path("container"))
    storage.write_bytes(str(arguments.out), veto.sign(made, [container_key, steward_key]))
    print(
        f"{len(made.image_ids)} of {made.num_compared} drawn photographs look like one of this site's\n"
        f"Their ids, signed by both keys, for the hub; nothing of a real photograph is in it: {arguments.out}"
    )
    return EXIT_FIT


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.receipt is not None:
        if arguments.hub is None and arguments.keys is None and arguments.package is None:
            raise ConfigError(
                "give --keys with the site's keys, or --hub with the hub's card, to verify a receipt with"
            )
        hub_path = arguments.hub or Keyring(folder_path=_keys_of(arguments), site_id="").hub_path
        print(_receipt_in_words(arguments.receipt, hub_path, arguments.package), end="")
        return EXIT_FIT
    if arguments.package is None:
        raise ConfigError("give the file to inspect, or --receipt with the hub's receipt")
    _require_file(arguments.package)
    if not sealing.is_sealed(arguments.package):
        package = sealing.read_draft(arguments.package)
    elif arguments.identity is not None:
        package = sealing.read_sealed(arguments.package, identities=strongbox.read_identities(arguments.identity))
    else:
        package = dispatch.remembered(_keys_of(arguments), arguments.package)
    if arguments.json:
        manifest = package.manifest.model_dump(mode="json")
        content = {"sha256": package.sha256, "size_bytes": package.size_bytes, "manifest": manifest}
        print(json.dumps(content, indent=2))
    else:
        print(_in_words(package), end="")
    return EXIT_FIT


def _keys_of(arguments: argparse.Namespace) -> Path:
    """Returns the folder of the keys that were given, or of the site that a package is named after."""
    if arguments.keys is not None:
        return Path(arguments.keys)
    return keyring.default_folder(arguments.package.name.rpartition("-")[0].rpartition("-")[0])


def _receipt_in_words(path: Path, hub_path: Path, package_path: Path | None) -> str:
    """Verifies a receipt with the hub's card, and that it is of a package, if there is one."""
    card, _ = keyring.read_hub_card(hub_path)
    for each in filter(None, (path, package_path)):
        _require_file(each)
    found = receipt.read(path.read_bytes(), receipt_key=card.receipt_key)
    if package_path is not None and storage.sha256_of(package_path) != found.package_sha256:
        raise ConfigError(f"{path} is the receipt of another package, {found.package_sha256}")
    lines = [
        f"Receipt   {path}; signed by the key on the hub's card",
        f"Package   {found.package_sha256}",
        f"Verdict   {found.verdict.lower()}{''.join(f', {code}' for code in found.codes)}",
        *([f"Reason    {found.message}"] if found.message else []),
        *([f"At the hub it is {found.contribution_id}"] if found.contribution_id else []),
        f"Entry     {found.ledger.index} of the hub's ledger, {found.ledger.sha256}",
    ]
    return "\n".join(lines) + "\n"


def _in_words(package: Package) -> str:
    manifest = package.manifest
    people = "patients not stated" if manifest.num_patients is None else f"{manifest.num_patients:,} patients"
    is_draft = package.num_signatures < 2
    lines = [
        f"{'Draft' if is_draft else 'Package':<9} {package.path}",
        f"SHA-256   {package.sha256}",
        f"Size      {_size(package.size_bytes)}; every byte was verified",
        f"Site      {manifest.site_id}{f', {manifest.country}' if manifest.country else ''}",
        f"Form      {manifest.form}: {FORM_LEAVES[manifest.form]}",
        f"Stands for {manifest.num_images:,} photographs, {people}; policy {manifest.policy}",
        f"Number    {manifest.sequence} of its container key; the hub may take it from {manifest.created} to "
        f"{manifest.expires}",
        f"Sealed for {len(manifest.encrypted_to)} keys of the hub: {', '.join(manifest.encrypted_to)}",
        *(f"{approval.role.capitalize():<9} key {signing.spoken(approval.key_id)}" for approval in manifest.approvals),
        "",
        "What leaves with it",
    ]
    for member in manifest.files:
        place = contribution.place_of(manifest.form, member.path)
        assert place is not None  # sealing lets no other member pass
        lines.append(f"  {member.path:<32} {_size(member.size_bytes):>10}  {place.contains}")
    lines.append(f"  {sealing.MANIFEST_NAME:<32} {'':>10}  this list, with the digest of each file")
    lines.append(f"  {sealing.ENVELOPE_NAME:<32} {'':>10}  the signatures of the container and of the data steward")
    if is_draft:
        lines += ["", f"Not sealed. Once the steward has read it:  gretfound-site sign {package.path}"]
    return "\n".join(lines) + "\n"


def _size(size_bytes: int) -> str:
    size, unit = float(size_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _columns(_: argparse.Namespace) -> int:
    print(metadata.dictionary_text())
    return EXIT_FIT


if __name__ == "__main__":
    sys.exit(main())
