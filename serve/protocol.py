"""What goes over the wire: the endpoint's arguments, requests, answers and refusals, as pydantic models with examples.

Nothing here carries pixels back to a caller, and no refusal repeats what was sent.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gretfound import storage
from gretfound.lineage import Release

EXAMPLE_RELEASE_ID = "release-3f0c9d1b7a5e4c2d8f60"
EXAMPLE_JOB_ID = "fine_tuning-0123456789ab-5b2d6c0f9e8a7d1c3b40"


def _split(value: Any) -> Any:
    # `serve run` passes every argument as text; a list comes as JSON or separated by commas.
    if isinstance(value, str):
        return json.loads(value) if value.startswith("[") else [part for part in value.split(",") if part]
    return value


Places = Annotated[tuple[str, ...], BeforeValidator(_split)]


class Arguments(BaseModel):
    """What `serve run serve.app:app key=value ...` and `args:` in conf/serve/*.yaml take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release_uri: str = Field(description="a release folder, or a release id to be looked up in the hub")
    hub_uri: str = Field("", description="the hub that keeps fine-tuning jobs; without it there is no fine-tuning")
    keys_uri: str = Field("", description="the key file of `python -m serve.keys`; HUB/keys.json if left out")
    public_key_path: str = Field("", description="Ed25519 public key (PEM) that must have signed the release, if given")
    cache_path: str = Field("", description="local folder for the release; ~/.cache/gretfound/releases if left out")

    device: str = Field("cpu", description="torch device of the encoder: cpu, cuda")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic of the encoder")
    encoder_cpus: float = Field(1.0, ge=0, description="CPUs reserved by one encoder replica")
    encoder_gpus: float = Field(0.0, ge=0, description="GPUs reserved by one encoder replica")
    encoder_threads: int = Field(1, ge=1, description="torch threads of one encoder replica on a CPU")
    endpoint_cpus: float = Field(0.5, ge=0, description="CPUs reserved by one endpoint replica")
    decode_threads: int = Field(4, ge=1, description="threads that decode photographs in one endpoint replica")
    batch_images: int = Field(32, ge=1, description="most photographs in one pass of the encoder")
    batch_wait_s: float = Field(0.01, ge=0, description="seconds that a batch waits for company")

    max_images: int = Field(32, ge=1, description="most photographs in one request")
    max_image_bytes: int = Field(20_000_000, ge=1, description="most bytes of one encoded photograph")
    max_request_bytes: int = Field(64_000_000, ge=1, description="most bytes of one request body")
    max_ongoing_requests: int = Field(32, ge=1, description="requests that one endpoint replica works on at once")
    max_queued_requests: int = Field(128, ge=1, description="requests that wait at one proxy before 503")
    max_requests_per_key: int = Field(8, ge=1, description="requests of one key at once in one replica before 429")
    request_timeout_s: float = Field(60.0, gt=0, description="seconds until a request is given up with 504")

    training_roots: Places = Field((), description="local folders below which training_uri may lie")
    training_prefixes: Places = Field((), description="object-store prefixes below which training_uri may lie")
    max_jobs_per_owner: int = Field(2, ge=1, description="unfinished fine-tuning jobs of one owner before 429")
    job_cpus: float = Field(1.0, ge=0, description="CPUs reserved by one fine-tuning job")
    job_gpus: float = Field(0.0, ge=0, description="GPUs reserved by one fine-tuning job")
    job_device: str = Field("cpu", description="torch device of fine-tuning jobs")

    @model_validator(mode="after")
    def _hangs_together(self) -> "Arguments":
        if self.batch_images < self.max_images:
            raise ValueError(f"batch_images={self.batch_images} must be at least max_images={self.max_images}")
        if not self.hub_uri and not self.keys_uri:
            raise ValueError("keys_uri is required where there is no hub_uri")
        if not self.hub_uri and self._is_release_id():
            raise ValueError(f"release_uri={self.release_uri} is an id: hub_uri is required to look it up")
        return self

    def _is_release_id(self) -> bool:
        return self.release_uri.startswith(f"{Release.kind}-") and "/" not in self.release_uri

    def resolved(self) -> "Arguments":
        """Returns the arguments with every place spelled as a whole URI: replicas have other working directories."""
        hub_uri = storage.normalised(self.hub_uri) if self.hub_uri else ""
        places: dict[str, Any] = {
            "hub_uri": hub_uri,
            "release_uri": storage.join(hub_uri, Release.folder, self.release_uri)
            if self._is_release_id()
            else storage.normalised(self.release_uri),
            "keys_uri": storage.normalised(self.keys_uri) if self.keys_uri else storage.join(hub_uri, "keys.json"),
            "cache_path": str(Path(self.cache_path).absolute()) if self.cache_path else "",
            "public_key_path": str(Path(self.public_key_path).absolute()) if self.public_key_path else "",
            "training_roots": tuple(storage.normalised(root) for root in self.training_roots),
        }
        return self.model_copy(update=places)


class Answer(BaseModel):
    """What every answer holds."""

    release_id: str = Field(description="the release that answered", examples=[EXAMPLE_RELEASE_ID])
    request_id: str = Field(description="name this when you report a fault", examples=["6f1c2b9e0d4a4d0f"])


class Fault(BaseModel):
    """Why a request was refused."""

    code: str = Field(description="stable, for programs", examples=["unreadable_photograph"])
    message: str = Field(description="what was found, required, and what to do", examples=["not a JPEG, PNG or TIFF"])
    index: int | None = Field(None, description="which photograph of the request, from 0", examples=[0])


class Refusal(Answer):
    """The answer to a request that was refused: nothing of it was done."""

    error: Fault


class FieldOfView(BaseModel):
    """The photographed circle, in pixels of the photograph."""

    x_px: float
    y_px: float
    radius_px: float


class Photograph(BaseModel):
    """What was seen in one photograph; asked for with `?describe=true`."""

    width_px: int = Field(examples=[1068])
    height_px: int = Field(examples=[712])
    field_of_view: FieldOfView | None = Field(description="null where no photographed circle was found")
    quality: float = Field(ge=0, le=1, description="0 to 1, from sharpness, illumination and contrast", examples=[0.71])


class Embeddings(Answer):
    """One embedding a photograph, in the order of the request."""

    encoder: str = Field(description="timm architecture", examples=["vit_large_patch16_224"])
    dimension: int = Field(description="length of one embedding", examples=[1024])
    embeddings: list[list[float]] = Field(examples=[[[0.12, -1.3, 0.07]]])
    photographs: list[Photograph] | None = Field(None, description="only with `?describe=true`")


class Predictions(Answer):
    """Class probabilities, one entry a photograph, in the order of the request."""

    fine_tuning_job_id: str = Field(examples=[EXAMPLE_JOB_ID])
    label_column: str = Field(examples=["DR"])
    labels: list[str] = Field(examples=[["0", "1", "2"]])
    predictions: list[dict[str, float]] = Field(examples=[[{"0": 0.71, "1": 0.2, "2": 0.09}]])


class FineTuningRequest(BaseModel):
    """A head for somebody's own task: a linear classifier on the frozen encoder's embeddings."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"training_uri": "s3://my-bucket/clinic-a", "label_column": "DR"}]},
    )

    training_uri: str = Field(
        min_length=1,
        max_length=1024,
        description="a folder with traindata/ and metadata.csv, below a place that this endpoint may read",
    )
    label_column: str = Field(
        "DR", min_length=1, max_length=100, description="the column of metadata.csv that holds the label"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the folds and the bootstrap")


class Interval(BaseModel):
    """A figure with its 95% bootstrap interval over patients."""

    value: float = Field(examples=[0.83])
    low: float = Field(examples=[0.79])
    high: float = Field(examples=[0.87])


class Outcome(BaseModel):
    """What a finished job found."""

    labels: dict[str, int] = Field(description="photographs of each class", examples=[{"0": 134, "1": 20}])
    num_images: int = Field(description="photographs used", examples=[413])
    num_unlabelled: int = Field(description="rows left out: blank or not understood")
    num_unreadable: int = Field(description="rows left out: photograph missing or unreadable")
    num_folds: int = Field(examples=[5])
    auroc: Interval = Field(description="cross-validated; macro one-versus-rest where there are several classes")
    head_sha256: str = Field(description="digest of head.safetensors")


class FineTuningJob(Answer):
    """A fine-tuning job as its durable record has it."""

    fine_tuning_job_id: str = Field(examples=[EXAMPLE_JOB_ID])
    state: Literal["queued", "running", "succeeded", "failed"]
    trained_on_release_id: str = Field(description="predictions need an endpoint that serves this release")
    training_uri: str
    label_column: str
    seed: int
    attempt: int = Field(description="1, and one more for each time that a failed job was asked for again")
    created_at: str = Field(examples=["2026-10-05T09:12:33+00:00"])
    updated_at: str = Field(examples=["2026-10-05T09:13:10+00:00"])
    error: str = Field(description="why it failed; empty otherwise")
    outcome: Outcome | None = None


class FineTuningJobs(Answer):
    """The jobs of the caller, newest first."""

    jobs: list[FineTuningJob]


class Health(Answer):
    """Whether the endpoint can answer now."""

    status: Literal["ready", "not_ready"]
    encoder: str = Field(examples=["vit_large_patch16_224"])
    fine_tuning: bool = Field(description="whether fine-tuning is set up here")


def image_request_schema(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the OpenAPI description of a request that carries photographs, as form or as JSON.

    Args:
        extra: Further required text fields, name to schema.
    """
    fields = extra or {}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "one part a photograph"}
    texts = {
        "type": "array",
        "items": {"type": "string", "format": "byte"},
        "minItems": 1,
        "description": "base64 of each JPEG, PNG or TIFF file",
        "examples": [["/9j/4AAQSkZJRgABAQ..."]],
    }
    required = ["images", *fields]
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "required": required, "properties": {"images": files, **fields}}
                },
                "application/json": {
                    "schema": {"type": "object", "required": required, "properties": {"images": texts, **fields}}
                },
            },
        }
    }
