"""The HTTP interface: routes over an encoder, fine-tuning jobs and keys, as a FastAPI application without Ray in it.

A request is done whole or refused whole: one photograph that cannot be read refuses all, naming its index. Photographs
live in memory (uploads above 1 MB in an unnamed temporary file) until the answer is sent, and are kept nowhere.
"""

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from gretfound import fundus
from gretfound.encoder.transform import Transform
from gretfound.fine_tuning import Head
from serve import page, protocol
from serve.fine_tuning import FineTuningDesk
from serve.gate import Gate, Refused, refusal
from serve.keys import Key, KeyRing

log = logging.getLogger(__name__)
MAX_TEXT_FIELDS = 4
MAX_HEADS = 256  # kept in memory; one is a row of numbers for each class
DESCRIPTION = """
Embeddings of colour fundus photographs from a released encoder, and linear heads fine-tuned on it for your own task.

* Every `/v1/` request needs `Authorization: Bearer gf_...`. A key in the URL is not accepted.
* Photographs go in as `multipart/form-data` (parts named `images`) or as JSON with base64.
* A request is done whole or refused whole. A refusal says which photograph, what was found and what is required.
* Every answer names the release and the request, in its body and as `X-Release-Id` and `X-Request-Id`.
* Photographs are not kept and never sent back. Research use only: not a medical device.
"""
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.Refusal, "description": description}
    for status, description in {
        401: "no key, or one that is unknown, revoked or expired",
        403: "the key's scope or the place of the training folder does not allow this",
        413: "a body or a photograph is too large",
        422: "a photograph cannot be read, or a field is wrong",
        429: "too many requests or unfinished jobs of this key; see Retry-After",
        503: "overloaded; see Retry-After",
        504: "not done in time",
    }.items()
}
Square = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the interface needs of an encoder, wherever that runs.

    Args:
        release_id: The release that is served.
        encoder: Its timm architecture.
        dimension: Length of an embedding.
        transform: Its preprocessing; the interface crops and resizes, the encoder normalises.
        embed: Squares (NxSxSx3 uint8) to embeddings (NxD).
        is_ready: Whether `embed` would be answered now.
    """

    release_id: str
    encoder: str
    dimension: int
    transform: Transform
    embed: Callable[[Square], Awaitable[Features]]
    is_ready: Callable[[], Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for; the fields are those of `protocol.Arguments`."""

    max_images: int
    max_image_bytes: int
    max_request_bytes: int
    max_requests_per_key: int
    request_timeout_s: float
    decode_threads: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    square: Square
    photograph: protocol.Photograph | None


@dataclass
class _Sent:
    images: list[bytes] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def build(engine: Engine, *, keys: KeyRing, limits: Limits, desk: FineTuningDesk | None) -> FastAPI:
    """Returns the interface.

    Args:
        engine: The encoder.
        keys: Who may call.
        limits: What a request may ask for.
        desk: Where fine-tuning is asked for; None switches it off.
    """
    app = FastAPI(title="gretfound", version=engine.release_id, description=DESCRIPTION, responses=REFUSALS)
    app.add_middleware(
        Gate,
        release_id=engine.release_id,
        keys=keys,
        max_request_bytes=limits.max_request_bytes,
        max_requests_per_key=limits.max_requests_per_key,
        request_timeout_s=limits.request_timeout_s,
    )
    decoders = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="decode")
    heads: dict[tuple[str, str], Head] = {}

    async def look(images: list[bytes], *, describe: bool = False) -> list[_Seen]:
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(decoders, _see, image, engine.transform, describe) for image in images]
        seen = await asyncio.gather(*tasks, return_exceptions=True)
        for index, result in enumerate(seen):
            if isinstance(result, fundus.UnreadablePhotograph):
                raise Refused(422, "unreadable_photograph", f"photograph {index}: {result}", index=index)
            if isinstance(result, BaseException):
                raise result
        return [result for result in seen if isinstance(result, _Seen)]

    async def embed(seen: list[_Seen]) -> Features:
        features = await engine.embed(np.stack([one.square for one in seen]))
        if not np.isfinite(features).all():
            raise ArithmeticError("the encoder gave numbers that are not finite")
        return features

    def answer(request: Request, content: Mapping[str, Any], status: int = 200) -> JSONResponse:
        return JSONResponse({**_mark(request, engine), **content}, status)

    def require_desk() -> FineTuningDesk:
        if desk is None:
            raise Refused(501, "no_fine_tuning", "fine-tuning is not set up here; the operator must give hub_uri")
        return desk

    @app.post(
        "/v1/embeddings",
        response_model=protocol.Embeddings,
        tags=["embeddings"],
        openapi_extra=protocol.image_request_schema(),
        dependencies=[Depends(_needs("embed"))],
    )
    async def embed_photographs(request: Request, describe: bool = False) -> Response:
        """Embeds one or many photographs."""
        sent = await _read_images(request, limits)
        seen = await look(sent.images, describe=describe)
        features = await embed(seen)
        content: dict[str, Any] = {"encoder": engine.encoder, "dimension": engine.dimension}
        content["embeddings"] = features.astype(str).astype(np.float64).tolist()  # the fewest digits that tell float32
        if describe:
            content["photographs"] = [one.photograph.model_dump() for one in seen if one.photograph is not None]
        return answer(request, content)

    @app.post(
        "/v1/predictions",
        response_model=protocol.Predictions,
        tags=["fine-tuning"],
        openapi_extra=protocol.image_request_schema(
            {"fine_tuning_job_id": {"type": "string", "examples": [protocol.EXAMPLE_JOB_ID]}}
        ),
        dependencies=[Depends(_needs("finetune"))],
    )
    async def predict(request: Request) -> Response:
        """Predicts with the head of a finished fine-tuning job of the caller."""
        opened = require_desk()
        sent = await _read_images(request, limits)
        job_id = sent.texts.get("fine_tuning_job_id", "")
        if not job_id:
            raise Refused(422, "job_required", "fine_tuning_job_id is required beside the images")
        name = (_key(request).id, job_id)
        if (head := heads.get(name)) is None:
            head = await asyncio.to_thread(opened.head, job_id, _key(request))
            if len(heads) >= MAX_HEADS:
                del heads[next(iter(heads))]
            heads[name] = head
        probability_NC = head.probabilities(await embed(await look(sent.images)))
        predictions = [dict(zip(head.labels, row, strict=True)) for row in probability_NC.tolist()]
        found = {"fine_tuning_job_id": job_id, "label_column": head.label_column, "labels": list(head.labels)}
        return answer(request, {**found, "predictions": predictions})

    @app.post(
        "/v1/fine_tuning/jobs",
        response_model=protocol.FineTuningJob,
        tags=["fine-tuning"],
        status_code=202,
        dependencies=[Depends(_needs("finetune"))],
    )
    async def ask_for_fine_tuning(request: Request, asked: protocol.FineTuningRequest) -> Response:
        """Starts a fine-tuning job, or returns the one that the same request started before.

        A failed job that is asked for again is tried again.
        """
        job = await asyncio.to_thread(
            require_desk().ask,
            _key(request),
            training_uri=asked.training_uri,
            label_column=asked.label_column,
            seed=asked.seed,
        )
        return answer(request, _shown(job), 202)

    @app.get(
        "/v1/fine_tuning/jobs",
        response_model=protocol.FineTuningJobs,
        tags=["fine-tuning"],
        dependencies=[Depends(_needs("finetune"))],
    )
    async def list_fine_tuning(request: Request) -> Response:
        """Lists the caller's jobs, newest first."""
        jobs = await asyncio.to_thread(require_desk().jobs_of, _key(request))
        return answer(request, {"jobs": [{**_mark(request, engine), **_shown(job)} for job in jobs]})

    @app.get(
        "/v1/fine_tuning/jobs/{job_id}",
        response_model=protocol.FineTuningJob,
        tags=["fine-tuning"],
        responses={404: {"model": protocol.Refusal, "description": "no such job of this caller"}},
        dependencies=[Depends(_needs("finetune"))],
    )
    async def find_fine_tuning(request: Request, job_id: str) -> Response:
        """Returns one of the caller's jobs."""
        return answer(request, _shown(await asyncio.to_thread(require_desk().find, job_id, _key(request))))

    @app.get("/healthz", response_model=protocol.Health, tags=["health"])
    async def tell_health(request: Request) -> Response:
        """Tells whether the endpoint can answer now; needs no key."""
        is_ready = await engine.is_ready()
        content = {
            "status": "ready" if is_ready else "not_ready",
            "encoder": engine.encoder,
            "fine_tuning": desk is not None,
        }
        return answer(request, content, 200 if is_ready else 503)

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page.PAGE, headers={"Content-Security-Policy": page.SECURITY_POLICY})

    def refuse(request: Request, error: Refused) -> Response:
        mark = _mark(request, engine)
        return refusal(error, release_id=mark["release_id"], request_id=mark["request_id"])

    @app.exception_handler(HTTPException)
    async def refuse_by_status(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refused):
            return refuse(request, error)
        return refuse(request, Refused(error.status_code, "http_error", str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> Response:
        # FastAPI's own answer repeats the input; this one names the fields only.
        faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
        return refuse(request, Refused(422, "wrong_field", "; ".join(faults)))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        # Starlette raises it again behind this answer, so Ray Serve logs where it came from.
        log.error("request %s failed: %s", _mark(request, engine)["request_id"], type(error).__name__)
        return refuse(request, Refused(500, "fault", "a fault of the endpoint; tell the operator the request id"))

    return app


def _mark(request: Request, engine: Engine) -> dict[str, str]:
    return {"release_id": engine.release_id, "request_id": request.state.request_id}


def _key(request: Request) -> Key:
    key: Key = request.state.key
    return key


def _needs(scope: str) -> Callable[..., None]:
    bearer = HTTPBearer(auto_error=False, description=f"an API key with the scope `{scope}`: `gf_...`")

    def require_scope(request: Request, _: Any = Depends(bearer)) -> None:  # noqa: B008  (FastAPI's way)
        if not _key(request).allows(scope):
            raise Refused(403, "scope_required", f"this key has not the scope {scope!r}; ask the operator for it")

    return require_scope


def _shown(job: Any) -> dict[str, Any]:
    outcome = None
    if job.outcome is not None:
        outcome = protocol.Outcome.model_validate(job.outcome, from_attributes=True).model_dump()
    return {
        "fine_tuning_job_id": job.id,
        "state": job.state,
        "trained_on_release_id": job.release_id,
        "training_uri": job.training_uri,
        "label_column": job.label_column,
        "seed": job.seed,
        "attempt": job.attempt,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "error": job.error,
        "outcome": outcome,
    }


def _see(encoded: bytes, transform: Transform, describe: bool) -> _Seen:
    image = fundus.decode_photograph(encoded)
    square = transform.square(image)
    if not describe:
        return _Seen(square=square, photograph=None)
    found = fundus.find_field_of_view(image)
    circle = None
    if found is not None:
        circle = protocol.FieldOfView(x_px=found.x_px, y_px=found.y_px, radius_px=found.radius_px)
    photograph = protocol.Photograph(
        width_px=image.shape[1],
        height_px=image.shape[0],
        field_of_view=circle,
        quality=fundus.quality_score(image, found),
    )
    return _Seen(square=square, photograph=photograph)


async def _read_images(request: Request, limits: Limits) -> _Sent:
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "multipart/form-data":
            sent = await _read_form(request, limits)
        case "application/json":
            sent = await asyncio.to_thread(_read_json, await request.body())
        case _:
            raise Refused(415, "wrong_content_type", "send multipart/form-data or application/json")
    if not sent.images:
        raise Refused(422, "images_required", "no photograph was sent; put files or base64 texts under `images`")
    if len(sent.images) > limits.max_images:
        raise Refused(422, "too_many_images", f"found {len(sent.images)} photographs; at most {limits.max_images}")
    for index, image in enumerate(sent.images):
        if len(image) > limits.max_image_bytes:
            message = f"photograph {index} has {len(image)} bytes; at most {limits.max_image_bytes}"
            raise Refused(413, "image_too_large", message, index=index)
    return sent


async def _read_form(request: Request, limits: Limits) -> _Sent:
    sent = _Sent()
    async with request.form(max_files=limits.max_images + 1, max_fields=MAX_TEXT_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                sent.images.append(await value.read())
            else:
                sent.texts[name] = value
    return sent


def _read_json(body: bytes) -> _Sent:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(422, "wrong_json", "the body is not JSON") from error
    images = content.pop("images", []) if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(text, str) for text in [*images, *content.values()]):
        raise Refused(422, "wrong_json", 'required {"images": ["BASE64", ...]} with text fields beside it')
    sent = _Sent(texts=content)
    for index, text in enumerate(images):
        try:
            sent.images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refused(422, "wrong_base64", f"photograph {index} is not base64", index=index) from error
    return sent
