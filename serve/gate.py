"""What every request passes before a route sees it: a name, a key, limits on body, time and company, and the log.

The log line holds the key's id, the body's SHA-256 and size, the status and the latency; never pixels, a query string
or a secret. Ray Serve itself has no body limit and no authentication, so both are here.
"""

import asyncio
import collections
import hashlib
import json
import logging
import re
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Key, KeyRing

log = logging.getLogger("ray.serve.requests")  # below Ray Serve's own logger, which writes each replica's log file
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROTECTED_PREFIX = "/v1/"
RETRY_AFTER_S = 2
SECURITY_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Refused(HTTPException):
    """A request that is turned down, with a stable code; ``index`` names the photograph."""

    def __init__(
        self, status: int, code: str, message: str, *, index: int | None = None, retry_after_s: int | None = None
    ) -> None:
        headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code, self.index = code, index


def refusal(error: Refused, *, release_id: str, request_id: str) -> JSONResponse:
    """Returns the answer to a refused request."""
    content = {
        "release_id": release_id,
        "request_id": request_id,
        "error": {"code": error.code, "message": error.detail, "index": error.index},
    }
    return JSONResponse(content, error.status_code, error.headers)


class Gate:
    """ASGI middleware around the whole interface.

    Args:
        app: The interface.
        release_id: Sent with every answer.
        keys: Who may enter.
        max_request_bytes: Bodies are cut off while they stream in.
        max_requests_per_key: At once, in this replica.
        request_timeout_s: For the whole request, its body included.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        release_id: str,
        keys: KeyRing,
        max_request_bytes: int,
        max_requests_per_key: int,
        request_timeout_s: float,
    ) -> None:
        self._app = app
        self._release_id = release_id
        self._keys = keys
        self._max_request_bytes = max_request_bytes
        self._max_requests_per_key = max_requests_per_key
        self._request_timeout_s = request_timeout_s
        self._num_requests: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(scope, receive, send, self._release_id, self._max_request_bytes)
        try:
            async with asyncio.timeout(self._request_timeout_s):
                await self._enter(passage)
        except TimeoutError:
            message = f"not done within {self._request_timeout_s:g} s; send fewer photographs or try again"
            await passage.refuse(Refused(504, "timed_out", message, retry_after_s=RETRY_AFTER_S))
        except Refused as error:
            await passage.refuse(error)
        finally:
            passage.write_log()

    async def _enter(self, passage: "_Passage") -> None:
        scope = passage.scope
        if not scope["path"].startswith(PROTECTED_PREFIX):
            passage.require_declared_size()
            await self._app(scope, passage.receive, passage.send)
            return
        key = await self._key_of(scope)
        scope["state"]["key"], passage.key_id = key, key.id
        passage.require_declared_size()
        if self._num_requests[key.id] >= self._max_requests_per_key:
            message = f"this key has {self._max_requests_per_key} requests in progress here; wait for one to end"
            raise Refused(429, "too_many_requests", message, retry_after_s=RETRY_AFTER_S)
        self._num_requests[key.id] += 1
        try:
            await self._app(scope, passage.receive, passage.send)
        finally:
            self._num_requests[key.id] -= 1
            if not self._num_requests[key.id]:
                del self._num_requests[key.id]

    async def _key_of(self, scope: Scope) -> Key:
        if self._keys.is_due():
            await asyncio.to_thread(self._keys.refresh)
        if self._keys.is_stale():
            message = "the keys cannot be checked at the moment; try again later"
            raise Refused(503, "keys_unavailable", message, retry_after_s=30)
        presented = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, token = presented.partition(" ")
        if not token:
            message = "send `Authorization: Bearer gf_...`; a key in the URL is not accepted, because URLs are logged"
            raise Refused(401, "key_required", message)
        key = self._keys.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refused(401, "key_not_valid", "this key is unknown, revoked or expired; ask for a new one")
        return key


class _Passage:
    # One request on its way: counts what comes in, marks what goes out, and can be refused until an answer started.
    def __init__(self, scope: Scope, receive: Receive, send: Send, release_id: str, max_bytes: int) -> None:
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = asked if REQUEST_ID_PATTERN.fullmatch(asked) else uuid.uuid4().hex
        self.scope = scope
        self.key_id = ""
        scope.setdefault("state", {})
        scope["state"].update(request_id=self.request_id)
        self._receive, self._send = receive, send
        self._release_id = release_id
        self._max_bytes = max_bytes
        self._declared = headers.get(b"content-length", b"0")
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._status = 0
        self._started_s = time.monotonic()

    def require_declared_size(self) -> None:
        if not self._declared.isdigit() or int(self._declared) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._num_bytes += len(body)
            self._digest.update(body)
            if self._num_bytes > self._max_bytes:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            # Ray Serve's proxy sends X-Request-Id with the id that it gave or was given, which is this request's.
            mark = (b"x-release-id", self._release_id.encode())
            sent = {name.lower() for name, _ in message.get("headers", [])}
            added = [header for header in (mark, *SECURITY_HEADERS) if header[0] not in sent]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    async def refuse(self, error: Refused) -> None:
        if self._status:
            return  # the answer is on its way; closing the connection is all that is left
        answer = refusal(error, release_id=self._release_id, request_id=self.request_id)
        await answer(self.scope, self.receive, self.send)

    def write_log(self) -> None:
        line = {
            "request_id": self.request_id,
            "key_id": self.key_id,
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self._status,
            "body_sha256": self._digest.hexdigest(),
            "body_bytes": self._num_bytes,
            "latency_s": round(time.monotonic() - self._started_s, 4),
        }
        log.info("%s", json.dumps(line))

    def _too_large(self) -> Refused:
        message = f"the request's body is larger than {self._max_bytes} bytes; send fewer photographs at once"
        return Refused(413, "request_too_large", message)
