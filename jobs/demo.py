"""Photographs of three sites -> a served encoder: the whole chain on one machine, ending in a report.

python -m jobs.demo hub_uri=runs/demo
python -m jobs.demo conf/demo/real.yaml hub_uri=runs/real sites="DIR DIR:weights ..." evaluation=DIR

Without ``sites`` the photographs are drawn: three sites, one of each form, and a fourth to evaluate on. A site folder
may name its form behind a colon; otherwise small ones send `images` and larger ones `weights`. Every stage finds what
an earlier run finished, so the same command continues. HUB/summary.json holds the closing table. Prints the path of
the report as its last line.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gretfound.config import load, setting
from gretfound.errors import ConfigError, GretfoundError
from jobs import console

DRAWN_SITES = {"aster": "weights", "birch": "images", "cedar": "synthetic"}
DRAWN_EVALUATION = "dune"
FORMS = ("weights", "images", "synthetic")


@dataclass(frozen=True)
class Config:
    """What `demo` reads; the stages themselves are configured by the layers below conf/."""

    hub_uri: str = setting("runs/demo", "a local folder for everything that the demo makes")
    sites: str = setting("", "site folders, separated by spaces, each with an optional :form; empty: drawn ones")
    evaluation: str = setting("", "a labelled site folder to evaluate on; needed with sites")
    num_drawn: int = setting(240, "photographs of each drawn site")
    drawn_size_px: int = setting(160, "side of a drawn photograph, pixels")
    weights_from_images: int = setting(200, "a site folder without a form sends weights from this many images on")
    base: str = setting("conf/generator/base_demo.yaml", "layer of jobs.build_base")
    finetune: str = setting("conf/generator/finetune_demo.yaml", "layer of jobs.finetune_generators")
    synthesize: str = setting("conf/generator/synthesize_demo.yaml", "layer of jobs.synthesize")
    pretrain: str = setting("conf/pretrain/demo.yaml", "layer of jobs.pretrain_encoder")
    evaluate_generators: str = setting(
        "", "layer of jobs.evaluate_generators, as conf/generator/evaluate_demo.yaml; empty: generators aren't measured"
    )
    site_images_seen: int = setting(2400, "photographs that a site's own fine-tuning sees, repeats counted")
    site_num_drawn: int = setting(160, "photographs that a site of the form synthetic draws")
    site_learning_rate: float = setting(2e-3, "learning rate of a site's own fine-tuning")
    site_lora_rank: int = setting(16, "rank of a site's own fine-tuning")

    def __post_init__(self) -> None:
        """Checks what spans keys."""
        if bool(self.sites) != bool(self.evaluation):
            raise ConfigError("sites and evaluation go together: give both, or neither for drawn photographs")


@dataclass
class Journal:
    """The closing table, kept while the chain runs."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a stage; the block fills in ``record_id`` and ``items``."""
        row: dict[str, Any] = {"stage": name, "record_id": "", "items": 0, "seconds": 0.0}
        print(f"\n== {name}", flush=True)
        began_s = time.monotonic()
        yield row
        row["seconds"] = round(time.monotonic() - began_s, 1)
        self.rows.append(row)
        print(f"   {row['record_id']}  {row['items']} items  {row['seconds']} s", flush=True)

    def table(self) -> str:
        """Returns the rows as text."""
        lines = [f"{'stage':<24}{'items':>8}{'seconds':>10}  record", "-" * 90]
        lines += [
            f"{row['stage']:<24}{row['items']:>8}{row['seconds']:>10.1f}  {row['record_id'].replace(',', ' ')}"
            for row in self.rows
        ]
        return "\n".join(lines)


def site_folders(config: Config, hub_path: Path, journal: Journal) -> tuple[dict[Path, str], Path]:
    """Returns the site folders with their forms, and the evaluation folder; draws them where none are given."""
    if config.sites:
        folders = dict(_folder_and_form(text, config.weights_from_images) for text in config.sites.split())
        return folders, Path(config.evaluation).absolute()
    from gretfound import phantom

    with journal.stage("draw photographs") as row:
        for name in (*DRAWN_SITES, DRAWN_EVALUATION):
            folder = hub_path / "sites_drawn" / name
            if not (folder / "metadata.csv").is_file():
                phantom.write_site(
                    phantom.SITES[name], folder, num_images=config.num_drawn, seed=1, size_px=config.drawn_size_px
                )
            row["items"] += config.num_drawn
    drawn = hub_path / "sites_drawn"
    return {drawn / name: form for name, form in DRAWN_SITES.items()}, drawn / DRAWN_EVALUATION


def _folder_and_form(text: str, weights_from_images: int) -> tuple[Path, str]:
    folder, colon, form = text.partition(":")
    path = Path(folder).absolute()
    if not (path / "traindata").is_dir():
        raise ConfigError(f"found no traindata/ in {folder}; required a site folder, as docs/sites.md describes it")
    if colon and form not in FORMS:
        raise ConfigError(f"found the form {form!r}; required one of {', '.join(FORMS)}")
    if not form:
        num_images = sum(1 for _ in (path / "traindata").iterdir())
        form = "weights" if num_images >= weights_from_images else "images"
    return path, form


def keys_path_of(hub_path: Path) -> Path:
    """Returns where the demo keeps the sites' and the committee's secrets: beside the hub, never in it."""
    return hub_path.with_name(f"{hub_path.name}.keys")


def contribute(config: Config, folder: Path, form: str, base_path: Path, hub_path: Path) -> Path:
    """Runs `gretfound-site keys` and `contribute` on a site folder, as the site would; returns the package.

    The hub then enters the site's card into its roster.
    """
    from gretfound import site
    from jobs import roster

    site_id = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    out_path = hub_path / "packages" / site_id
    keys_path = keys_path_of(hub_path)
    site_keys = ["--site-id", site_id, "--keys", str(keys_path / site_id)]
    code = site.main(["keys", *site_keys, "--no-passphrase", "--hub", str(keys_path / "hub.json")]) or site.main(
        [
            *("contribute", str(folder), "--form", form, *site_keys, "--out", str(out_path)),
            *("--policy", "demonstration", "--key", str(keys_path / f"{site_id}.key")),
            *("--base", str(base_path), "--images-seen", str(config.site_images_seen)),
            *("--num-images", str(config.site_num_drawn), "--learning-rate", str(config.site_learning_rate)),
            *("--lora-rank", str(config.site_lora_rank)),
        ]
    )
    packages = sorted(out_path.glob("*.age"))
    if code or len(packages) != 1:
        raise GretfoundError(f"the contribution of site {site_id} ended with code {code}; see its report above")
    roster.main(["admit", f"hub_uri={hub_path}", f"card_path={keys_path / site_id / f'{site_id}.site.json'}"])
    return packages[0]


def call_endpoint(release_uri: str, hub_path: Path, photograph_path: Path) -> int:
    """Serves the release on a free port, asks it for one embedding over HTTP; returns the embedding's length."""
    import socket
    import urllib.request

    from ray import serve as ray_serve

    from serve.app import app
    from serve.keys import create_key
    from serve.protocol import Arguments

    keys_path = hub_path / "keys.json"
    key = create_key(keys_uri=str(keys_path), scopes=("embed",), days=1.0, note="one call of the demo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = Arguments(release_uri=release_uri, keys_uri=str(keys_path), encoder_cpus=0.5, endpoint_cpus=0.25)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(app(arguments), name="demo", route_prefix="/")
    boundary = "gretfound-demo"
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="photograph.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + photograph_path.read_bytes()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings",
        data=body,
        headers={"Authorization": f"Bearer {key}", "Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    ray_serve.shutdown()
    print(f"   POST /v1/embeddings -> {answer['dimension']} numbers from {answer['release_id']}")
    return len(answer["embeddings"][0])


def main(argv: list[str]) -> str:
    """Runs the chain; returns the path of the report."""
    config = load(Config, argv)
    hub_path = Path(config.hub_uri).absolute()
    hub_path.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(hub_path))
    began_s = time.monotonic()
    from gretfound import storage
    from gretfound.lineage import Encoder, Generator, Release, Report, ShardSet
    from jobs import (
        assemble_corpus,
        build_base,
        evaluate_encoder,
        evaluate_generators,
        finetune_generators,
        intake,
        pretrain_encoder,
        publish_release,
        roster,
        synthesize,
    )

    hub = f"hub_uri={hub_path}"
    hub_uri = storage.normalised(str(hub_path))
    journal = Journal()
    folders, evaluation_path = site_folders(config, hub_path, journal)
    console.start_ray()
    with journal.stage("build base generator") as row:
        base_id = row["record_id"] = build_base.main([config.base, hub])
        base = storage.read_record(hub_uri, base_id, Generator)
        row["items"] = base.num_images
        base_path = storage.fetch_folder(hub_uri, base, hub_path / "base")
    with journal.stage("keys and roster") as row:
        row["record_id"], row["items"] = roster.main(["init", hub]), 1
    packages = []
    for folder, form in folders.items():
        with journal.stage(f"contribute {form}") as row:
            packages.append(contribute(config, folder, form, base_path, hub_path))
            row["record_id"], row["items"] = packages[-1].name, 1
    with journal.stage("intake") as row:
        uris = ",".join(str(package) for package in packages)
        row["record_id"] = intake.main([hub, f"package_uris=[{uris}]", "policy=demonstration"])
        row["items"] = len(packages)
    if "images" in folders.values():
        with journal.stage("fine-tune generators") as row:
            row["record_id"] = finetune_generators.main([config.finetune, hub, f"base_id={base_id}"])
            row["items"] = len(row["record_id"].split(","))
    with journal.stage("synthesize") as row:
        row["record_id"] = synthesize.main([config.synthesize, hub])
        drawn = [storage.read_record(hub_uri, each, ShardSet) for each in row["record_id"].split(",")]
        row["items"] = sum(each.num_images for each in drawn)
    if config.evaluate_generators:
        with journal.stage("evaluate generators") as row:
            row["record_id"] = evaluate_generators.main([config.evaluate_generators, hub])
            row["items"] = len(row["record_id"].split(","))
    with journal.stage("assemble corpus") as row:
        corpus_id = row["record_id"] = assemble_corpus.main([hub, f"evaluation_uris=[{evaluation_path}]"])
        row["items"] = len(list(storage.read_records(hub_uri, ShardSet)))
    with journal.stage("pretrain encoder") as row:
        encoder_id = row["record_id"] = pretrain_encoder.main([config.pretrain, hub, f"corpus_id={corpus_id}"])
        row["items"] = storage.read_record(hub_uri, encoder_id, Encoder).images_seen
    with journal.stage("evaluate encoder") as row:
        report_id = row["record_id"] = evaluate_encoder.main(
            [hub, f"encoder_id={encoder_id}", f"evaluation_uris=[{evaluation_path}]"]
        )
        row["items"] = storage.read_record(hub_uri, report_id, Report).num_images
    with journal.stage("publish release") as row:
        release_id = row["record_id"] = publish_release.main(
            [
                *(hub, f"encoder_id={encoder_id}", f"report_id={report_id}", "name=demo"),
                f"signing_key_path={keys_path_of(hub_path) / 'release.pem'}",
            ]
        )
        release = storage.read_record(hub_uri, release_id, Release)
        row["items"] = len(release.files)
    with journal.stage("serve") as row:
        photograph_path = sorted((evaluation_path / "traindata").iterdir())[0]
        row["record_id"] = release_id
        row["items"] = call_endpoint(storage.record_uri(hub_uri, release), hub_path, photograph_path) and 1
    total_s = round(time.monotonic() - began_s, 1)
    storage.write_json(str(hub_path / "summary.json"), {"stages": journal.rows, "total_s": total_s})
    print(f"\n{journal.table()}\n{'total':<24}{'':>8}{total_s:>10.1f}")
    print(f"\nserve it:  serve run serve.app:app release_uri={storage.record_uri(hub_uri, release)} hub_uri={hub_path}")
    return str(hub_path / "reports" / report_id / "report.html")


if __name__ == "__main__":
    console.run(Config, main)
