"""Fine-tuning job -> head: a linear probe on frozen embeddings of a labelled folder, cross-validated by patient.

The endpoint starts it as a Ray job (`POST /v1/fine_tuning/jobs`); by hand, on a record that is there already:

    python -m jobs.fine_tune_head job_uri=runs/demo/fine_tuning/fine_tuning-0123456789ab-5b2d6c0f9e8a7d1c3b40
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gretfound import config as configuration
from gretfound.config import setting
from gretfound.errors import ConfigError, GretfoundError
from jobs import console

if TYPE_CHECKING:
    from gretfound.fine_tuning import FineTuningJob, Outcome


@dataclass(frozen=True)
class Config:
    job_uri: str = setting(help="the job's folder in the hub: HUB/fine_tuning/<job id>")
    device: str = setting("cpu", "torch device that embeds the photographs: cpu, cuda")
    precision: str = setting("float32", "arithmetic of the encoder: float32 or bfloat16")
    batch_images: int = setting(32, "photographs in one pass of the encoder")
    num_threads: int = setting(1, "threads for decoding, and of torch on a CPU")
    num_resamples: int = setting(1000, "bootstrap resamples of patients for the interval")
    cache_path: str = setting("", "local folder for the release; ~/.cache/gretfound/releases if empty")

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision: found {self.precision!r}; required float32 or bfloat16")
        if min(self.batch_images, self.num_threads, self.num_resamples) < 1:
            raise ConfigError("batch_images, num_threads and num_resamples: required at least 1 each")


def main(argv: list[str]) -> str:
    config = configuration.load(Config, argv)

    from gretfound import fine_tuning, storage

    job_uri = storage.normalised(config.job_uri)
    job = fine_tuning.read_job(job_uri)
    if job.state == "succeeded":
        return job.id
    storage.write_bytes(storage.join(job_uri, "config.yaml"), configuration.to_yaml(config).encode())
    with _failure_recorded(job_uri, job):
        fine_tuning.write_job(job_uri, job.advanced("running"))
        outcome = _fit(config, job_uri, job)
        fine_tuning.write_job(job_uri, job.advanced("succeeded", outcome=outcome))
    return job.id


def _fit(config: Config, job_uri: str, job: "FineTuningJob") -> "Outcome":
    from pathlib import Path

    import torch

    from gretfound import fine_tuning
    from gretfound.encoder.folder import read_encoder_folder

    torch.set_num_threads(config.num_threads)
    cache_path = Path(config.cache_path) if config.cache_path else fine_tuning.default_cache_path()
    release, release_path = fine_tuning.fetch_release(job.release_uri, cache_path)
    encoder, transform = read_encoder_folder(release_path)
    labels = fine_tuning.read_labels(job.training_uri, job.label_column)
    fine_tuning.require_unchanged(job, release_id=release.id, training_digest=labels.digest)
    embedded = fine_tuning.embed_rows(
        labels.rows,
        encoder=encoder.to(config.device),
        transform=transform,
        precision=config.precision,
        batch_images=config.batch_images,
        num_threads=config.num_threads,
    )
    head, auroc = fine_tuning.fit_head(
        embedded.features,
        embedded.labels,
        embedded.patients,
        label_column=job.label_column,
        release_id=release.id,
        seed=job.seed,
        num_resamples=config.num_resamples,
    )
    return fine_tuning.Outcome(
        labels=fine_tuning.num_by_class(embedded.labels),
        num_images=len(embedded.labels),
        num_unlabelled=labels.num_unlabelled,
        num_unreadable=embedded.num_unreadable,
        num_folds=auroc.num_folds,
        auroc=auroc.figure,
        head_sha256=fine_tuning.write_head(job_uri, head),
    )


@contextlib.contextmanager
def _failure_recorded(job_uri: str, job: "FineTuningJob") -> Iterator[None]:
    # The caller sees only the record, so it must tell of every end; what is no error of ours stays in the job's log.
    from gretfound import fine_tuning

    error_text = "a fault of the endpoint ended the job; tell the operator the job id"
    try:
        yield
        error_text = ""
    except (GretfoundError, ValueError) as error:
        error_text = str(error)
        raise
    finally:
        if error_text:
            fine_tuning.write_job(job_uri, job.advanced("failed", error=error_text))


if __name__ == "__main__":
    console.run(Config, main)
