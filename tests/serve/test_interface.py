"""The HTTP interface over a real encoder, without Ray: answers, refusals, limits and what is logged."""

import asyncio
import base64
import io
import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from gretfound import fundus
from gretfound.encoder.folder import read_encoder_folder
from serve import page
from tests.serve.tiny_endpoint import Keys, Opened, Place, bearer, photograph

JPEG = "image/jpeg"


@pytest.fixture(scope="module")
def opened(open_endpoint: Callable[..., Opened]) -> Opened:
    return open_endpoint()


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{index}.jpg", content, JPEG)) for index, content in enumerate(contents)]


def in_base64(*contents: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(content).decode() for content in contents]}


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    content: dict[str, Any] = answer.json()
    assert content["error"]["code"] == code
    assert content["release_id"] == answer.headers["x-release-id"]
    assert content["request_id"]
    return content["error"]


def test_embeddings__are_those_of_plain_timm(opened: Opened, place: Place, key_set: Keys) -> None:
    content = photograph(seed=1)
    answer = opened.client.post("/v1/embeddings", files=files(content), headers=bearer(key_set.embed)).json()
    plain = timm.create_model(f"local-dir:{place.release_path}", pretrained=True).eval()
    _, transform = read_encoder_folder(place.release_path)
    with torch.inference_mode():
        tensor_BCHW = transform.apply_batch([fundus.decode_photograph(content)])
        expected = plain.forward_head(plain.forward_features(tensor_BCHW), pre_logits=True)[0]
    assert (answer["release_id"], answer["dimension"]) == (place.release.id, 32)
    np.testing.assert_allclose(answer["embeddings"][0], expected.numpy(), atol=1e-5)


def test_embeddings__form_and_json_agree_and_order_is_kept(opened: Opened, key_set: Keys) -> None:
    contents = [photograph(seed=seed, brightness=60 + 50 * seed) for seed in range(3)]
    headers = bearer(key_set.embed)
    form = opened.client.post("/v1/embeddings", files=files(*contents), headers=headers).json()["embeddings"]
    texts = opened.client.post("/v1/embeddings", json=in_base64(*contents), headers=headers).json()["embeddings"]
    single = opened.client.post("/v1/embeddings", json=in_base64(contents[2]), headers=headers).json()["embeddings"]
    assert form == texts
    np.testing.assert_allclose(form[2], single[0], atol=1e-5)
    assert np.abs(np.subtract(form[0], form[2])).max() > 1e-3


def test_embeddings__describe_tells_the_known_circle(opened: Opened, key_set: Keys) -> None:
    answer = opened.client.post(
        "/v1/embeddings?describe=true", files=files(photograph(seed=1)), headers=bearer(key_set.embed)
    )
    seen = answer.json()["photographs"][0]
    assert (seen["width_px"], seen["height_px"]) == (96, 96)
    assert seen["field_of_view"]["radius_px"] == pytest.approx(42, abs=2)
    assert 0 <= seen["quality"] <= 1


@pytest.mark.parametrize(
    "method_path", ["POST /v1/embeddings", "POST /v1/predictions", "GET /v1/fine_tuning/jobs", "GET /v1/none"]
)
def test_gate__without_a_key_nothing_is_done(opened: Opened, method_path: str) -> None:
    method, path = method_path.split()
    answer = opened.client.request(method, path)
    refused(answer, 401, "key_required")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_gate__refuses_wrong_keys_and_keys_in_the_url(opened: Opened, key_set: Keys) -> None:
    content = files(photograph(seed=1))
    wrong = key_set.embed[:-4] + "AAAA"
    refused(opened.client.post("/v1/embeddings", files=content, headers=bearer(wrong)), 401, "key_not_valid")
    basic = {"Authorization": f"Basic {key_set.embed}"}
    refused(opened.client.post("/v1/embeddings", files=content, headers=basic), 401, "key_not_valid")
    for name in ("key", "api_key", "access_token"):
        answer = opened.client.post(f"/v1/embeddings?{name}={key_set.embed}", files=content)
        assert "URL" in refused(answer, 401, "key_required")["message"]


def test_gate__a_scope_opens_only_its_routes(opened: Opened, key_set: Keys) -> None:
    content = files(photograph(seed=1))
    refused(opened.client.get("/v1/fine_tuning/jobs", headers=bearer(key_set.embed)), 403, "scope_required")
    refused(opened.client.post("/v1/embeddings", files=content, headers=bearer(key_set.other)), 403, "scope_required")
    assert opened.client.post("/v1/embeddings", files=content, headers=bearer(key_set.admin)).status_code == 200


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_embeddings__name_the_unreadable_photograph_and_do_nothing(opened: Opened, key_set: Keys) -> None:
    good = photograph(seed=1)
    for bad in (b"Patient Jane Doe, 12.3.1950\n", b"", bomb(), good[: len(good) // 2]):
        answer = opened.client.post("/v1/embeddings", files=files(good, bad), headers=bearer(key_set.embed))
        error = refused(answer, 422, "unreadable_photograph")
        assert error["index"] == 1 and len(error["message"]) > 20
        assert "Jane" not in answer.text and ".jpg" not in answer.text


def test_embeddings__refuse_what_is_no_request(opened: Opened, key_set: Keys) -> None:
    def post(**sent: Any) -> httpx.Response:
        return opened.client.post(
            "/v1/embeddings", headers={**bearer(key_set.embed), **sent.pop("headers", {})}, **sent
        )

    good = photograph(seed=1)
    refused(post(content=good, headers={"Content-Type": JPEG}), 415, "wrong_content_type")
    refused(post(json={"images": []}), 422, "images_required")
    refused(post(json={"images": ["@@@"]}), 422, "wrong_base64")
    refused(post(json={"images": [1]}), 422, "wrong_json")
    refused(post(json=["x"]), 422, "wrong_json")
    refused(post(content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 422, "wrong_json")
    refused(post(files=files(*[good] * 5)), 422, "too_many_images")
    assert 400 <= post(files=files(*[good] * 9)).status_code < 500


def test_gate__cuts_a_body_off_while_it_streams(opened: Opened, key_set: Keys) -> None:
    num_sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_sent
        while num_sent < 1000:
            num_sent += 1
            yield b"x" * 10_000

    headers = {**bearer(key_set.embed), "Content-Type": "application/json"}
    refused(opened.client.post("/v1/embeddings", content=b"x" * 400_001, headers=headers), 413, "request_too_large")
    refused(opened.client.post("/v1/embeddings", content=endless(), headers=headers), 413, "request_too_large")
    large = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (280, 280, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large, "PNG")
    error = refused(
        opened.client.post("/v1/embeddings", files=files(large.getvalue()), headers=bearer(key_set.embed)),
        413,
        "image_too_large",
    )
    assert error["index"] == 0


def test_gate__gives_up_in_time_and_limits_each_key(open_endpoint: Callable[..., Opened], key_set: Keys) -> None:
    small = open_endpoint(max_requests_per_key=1, request_timeout_s=1.0)

    async def race() -> list[int]:
        transport = httpx.ASGITransport(app=small.client.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def slow() -> Any:
                yield b"{"
                await asyncio.sleep(5)
                yield b"}"

            headers = {**bearer(key_set.embed), "Content-Type": "application/json"}
            first = asyncio.create_task(client.post("/v1/embeddings", content=slow(), headers=headers))
            await asyncio.sleep(0.2)
            second = await client.post("/v1/embeddings", json=in_base64(photograph(seed=1)), headers=headers)
            assert second.headers["retry-after"]
            return [(await first).status_code, second.status_code]

    assert asyncio.run(race()) == [504, 429]
    again = small.client.post("/v1/embeddings", files=files(photograph(seed=1)), headers=bearer(key_set.embed))
    assert again.status_code == 200


def test_gate__logs_the_key_the_digest_and_no_content(
    opened: Opened, key_set: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.dumps(in_base64(photograph(seed=1))).encode()
    with caplog.at_level(logging.INFO, "ray.serve.requests"):
        headers = {**bearer(key_set.embed), "Content-Type": "application/json", "X-Request-Id": "mine-1"}
        answer = opened.client.post("/v1/embeddings?describe=true", content=content, headers=headers)
    assert answer.json()["request_id"] == "mine-1"
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "ray.serve.requests"]
    assert line["key_id"] == key_set.embed.split("_")[1]
    assert line["body_bytes"] == len(content) and len(line["body_sha256"]) == 64
    assert (line["status"], line["path"], line["request_id"]) == (200, "/v1/embeddings", "mine-1")
    assert len(caplog.text) < 1000 and key_set.embed.split("_", 2)[2] not in caplog.text


def test_healthz__needs_no_key_and_names_the_release(opened: Opened, place: Place) -> None:
    answer = opened.client.get("/healthz")
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["release_id"]) == ("ready", place.release.id)


def test_openapi__describes_every_route_with_examples(opened: Opened) -> None:
    content = opened.client.get("/openapi.json").json()
    assert set(content["paths"]) == {
        "/v1/embeddings",
        "/v1/predictions",
        "/v1/fine_tuning/jobs",
        "/v1/fine_tuning/jobs/{job_id}",
        "/healthz",
    }
    for path, methods in content["paths"].items():
        for method in methods.values():
            assert method["description"]
            assert path == "/healthz" or method["security"] == [{"HTTPBearer": []}]
    assert "multipart/form-data" in content["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]
    assert content["components"]["schemas"]["FineTuningRequest"]["examples"]


def test_page__runs_its_own_script_and_nothing_else(opened: Opened) -> None:
    answer = opened.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.text == page.PAGE
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    for outside in ("http://", "https://", "//cdn", "style=", "onclick"):
        assert outside not in page.PAGE
    for name in ("key", "photograph", "job"):
        assert f'<label for="{name}">' in page.PAGE and f'<input id="{name}"' in page.PAGE


def test_build__many_requests_at_once_are_each_answered_with_their_own(opened: Opened, key_set: Keys) -> None:
    contents = [photograph(seed=seed, brightness=60 + 20 * seed) for seed in range(8)]

    def post(content: bytes) -> list[float]:
        answer = opened.client.post("/v1/embeddings", files=files(content), headers=bearer(key_set.embed))
        embedding: list[float] = answer.json()["embeddings"][0]
        return embedding

    alone = [post(content) for content in contents]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(post, contents))
    np.testing.assert_allclose(together, alone, atol=1e-5)
