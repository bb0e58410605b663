"""Encoder and its report -> release: the signed folder that anyone can load.

python -m jobs.publish_release hub_uri=runs/demo/hub encoder_id=encoder-... report_id=report-... name=demo

Gates come first: the folder loads in plain timm with bit-equal features, the ONNX export agrees with PyTorch, the
report is on this very encoder and measured something. Records one Release, writes it to the ledger, prints its id.
"""

from dataclasses import dataclass
from pathlib import Path

from gretfound.config import load, setting, to_yaml
from gretfound.errors import ConfigError
from jobs import console


@dataclass(frozen=True)
class Config:
    """What `publish_release` reads."""

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    encoder_id: str = setting(help="the encoder's record id")
    report_id: str = setting(help="the record id of the report on that encoder")
    name: str = setting(help="what the release is called; letters, digits, dots and dashes")
    signing_key_path: str = setting(help="local Ed25519 private key (PEM, mode 0600), outside the hub; made if absent")
    max_onnx_error: float = setting(1e-4, "gate: largest absolute difference of a feature, ONNX against PyTorch")
    min_mean_auroc_gain: float = setting(
        -1.0, "gate: least mean AUROC above the untrained encoder; -1: none, a loss is only warned of and shown"
    )

    def __post_init__(self) -> None:
        """Checks the name."""
        if not self.name.replace("-", "").replace(".", "").isalnum() or not self.name.isascii():
            raise ConfigError(f"name={self.name!r} has other characters than letters, digits, dots and dashes")


def main(argv: list[str]) -> str:
    """Runs the job; returns the release's id."""
    config = load(Config, argv)
    from gretfound import lineage, release, signing, storage, withdrawal
    from gretfound.lineage import Encoder, Release, Report

    hub_uri = storage.normalised(config.hub_uri)
    key_path = Path(config.signing_key_path).absolute()
    hub_path = storage.local_path(hub_uri)
    if hub_path is not None and key_path.resolve().is_relative_to(hub_path.resolve()):
        raise ConfigError(f"signing_key_path={key_path} lies in the hub; keep the private key elsewhere")
    encoder = storage.read_record(hub_uri, config.encoder_id, Encoder)
    report = storage.read_record(hub_uri, config.report_id, Report)
    withdrawal.require_unmarked(hub_uri, encoder)
    signing_key = release.read_signing_key(key_path)
    key_id = signing.key_id(signing_key.public_key())
    settings = {
        "name": config.name,
        "key_id": key_id,
        "max_onnx_error": config.max_onnx_error,
        "min_mean_auroc_gain": config.min_mean_auroc_gain,
    }
    recipe = lineage.recipe_id("publish_release", settings, [encoder.id, report.id])
    record = storage.finished_record(hub_uri, recipe, Release)
    if record is None:
        storage.write_bytes(storage.join(storage.run_uri(hub_uri, recipe), "config.yaml"), to_yaml(config).encode())
        with storage.scratch_folder() as scratch:
            path = release.write_release_folder(
                Path(scratch) / config.name,
                name=config.name,
                encoder_path=storage.fetch_folder(hub_uri, encoder, Path(scratch) / "encoder"),
                encoder=encoder,
                report=report,
                report_content=storage.read_json(storage.join(storage.record_uri(hub_uri, report), "report.json")),
                records=release.read_lineage(hub_uri, encoder),
                signing_key=signing_key,
                max_onnx_error=config.max_onnx_error,
                min_mean_auroc_gain=config.min_mean_auroc_gain,
            )
            parents = (encoder.id, report.id)
            record = Release(parents=parents, recipe_id=recipe, name=config.name, licence=release.LICENCE)
            record = storage.publish_folder(hub_uri, path, record)
    # A run that was killed before this line is finished by running the same command again.
    release.announce(hub_uri, record, key_id=key_id)
    return record.id


if __name__ == "__main__":
    console.run(Config, main)
