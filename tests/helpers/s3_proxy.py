"""A proxy in front of a store. On demand, it loses, delays, cuts, changes and invents responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    def is_for(self, method: str, part: str) -> bool:
        return self.method == method and part in self.target


@dataclass
class Response:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int | None = None  # the number of bytes of the body that are sent before the connection is closed

    def encoded(self, method: str) -> bytes:
        headers = {name: value for name, value in self.headers.items() if name != "transfer-encoding"}
        if method != "HEAD":
            headers["content-length"] = str(len(self.body))
        lines = [f"HTTP/1.1 {self.status} Whatever", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        body = b"" if method == "HEAD" else self.body[: self.sent]
        return "\r\n".join(lines).encode() + body


Forward = Callable[[Request], Awaitable[Response]]
Action = Callable[[Request, Forward], Awaitable[Response | None]]


def error(status: int, code: str) -> Response:
    return Response(status, {"content-type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def answers(status: int, code: str = "Code") -> Action:
    """Answer with an error. The store never receives the request."""

    async def action(request: Request, forward: Forward) -> Response | None:
        return error(status, code)

    action.__name__ = f"answers {status} {code}"
    return action


def done_but_answers(status: int, code: str = "InternalError") -> Action:
    """Let the store execute the request, and answer with an error."""

    async def action(request: Request, forward: Forward) -> Response | None:
        await forward(request)
        return error(status, code)

    action.__name__ = f"done but answers {status} {code}"
    return action


async def lost(request: Request, forward: Forward) -> Response | None:
    """Close the connection. The store never receives the request."""
    return None


async def answer_lost(request: Request, forward: Forward) -> Response | None:
    """Let the store execute the request, and close the connection without an answer."""
    await forward(request)
    return None


async def cut(request: Request, forward: Forward) -> Response | None:
    """Send only half of the body of the answer."""
    response = await forward(request)
    response.sent = len(response.body) // 2
    return response


async def without_etag(request: Request, forward: Forward) -> Response | None:
    """Let the store execute the request, and remove the ETag from the answer."""
    response = await forward(request)
    response.headers.pop("etag", None)
    return response


class Copies:
    """An action of a store that honours the condition of a copy. The stores of the tests ignore it.

    Attributes:
        etag: A function that returns the ETag of the object with a key, without quotation marks; an empty text if there is none.
        form: How the store writes the ETag, to compare it with the condition.
    """

    def __init__(self, etag: Callable[[str], str], form: str = '"{}"') -> None:
        self.etag = etag
        self.form = form

    async def __call__(self, request: Request, forward: Forward) -> Response | None:
        source = request.headers.get("x-amz-copy-source")
        if source is not None:
            present = self.etag(unquote(source).lstrip("/").split("/", 1)[1])
            if not present:
                return error(404, "NoSuchKey")
            if request.headers["x-amz-copy-source-if-match"] not in (self.form.format(present), present):
                return error(412, "PreconditionFailed")
        return await forward(request)


class Late:
    """An action that loses a request. `arrive` lets the store execute it later."""

    def __init__(self) -> None:
        self.lost: list[tuple[Request, Forward]] = []

    async def __call__(self, request: Request, forward: Forward) -> Response | None:
        self.lost.append((request, forward))
        return None

    async def arrive(self, action: Action) -> list[int]:
        """Let the lost requests arrive at a store with this action. Return the statuses of the answers."""
        answers = [await action(request, forward) for request, forward in self.lost]
        return [0 if answer is None else answer.status for answer in answers]


class Hang:
    """An action that makes a request wait, before or after the store has executed it. `reached` is set when it waits."""

    def __init__(self, *, after: bool = False) -> None:
        self.after = after
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def __call__(self, request: Request, forward: Forward) -> Response | None:
        response = await forward(request) if self.after else None
        self.reached.set()
        await self.released.wait()
        return response or await forward(request)


class Before:
    """An action that calls functions before the store receives the request."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = steps

    async def __call__(self, request: Request, forward: Forward) -> Response | None:
        for step in self.steps:
            result = step()
            if isinstance(result, Awaitable):
                await result
        return await forward(request)


@dataclass
class _Plan:
    method: str
    part: str
    action: Action
    times: float


class Proxy:
    """A proxy on a separate port. `async with` starts and ends it.

    Attributes:
        seen: The requests so far, as "PUT part-of-key".
        sizes: The size of the body of each of these requests, in bytes.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._plans: list[_Plan] = []
        self._connections: set[asyncio.Task[None]] = set()
        self.seen: list[str] = []
        self.sizes: list[int] = []

    def plan(self, method: str, part: str, action: Action, *, times: float = 1) -> None:
        """Plan an action for the next requests with this method, and with this part in the target."""
        self._plans.append(_Plan(method, part, action, times))

    def end_plans(self) -> None:
        self._plans.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").strip().split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
        if headers.pop("expect", None):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, target, _ = line.split(" ", 2)
        request = Request(method, target, headers, body)
        self.seen.append(f"{method} {target}")
        self.sizes.append(len(body))
        response = await self._planned(request)(request, self._forward)
        if response is None:
            return False
        writer.write(response.encoded(method))
        await writer.drain()
        return response.sent is None

    def _planned(self, request: Request) -> Action:
        for plan in self._plans:
            if plan.times > 0 and request.is_for(plan.method, plan.part):
                plan.times -= 1
                return plan.action
        return _through

    async def _forward(self, request: Request) -> Response:
        reader, writer = await asyncio.open_connection(*self._upstream, limit=2**20)
        try:
            headers = {**request.headers, "connection": "close"}
            lines = [f"{request.method} {request.target} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
            writer.write("\r\n".join(lines).encode("latin-1") + request.body)
            head = await reader.readuntil(b"\r\n\r\n")
            line, *rest = head.decode("latin-1").strip().split("\r\n")
            received = {
                name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)
            }
            received.pop("connection", None)
            body = await _body(reader, received) if request.method != "HEAD" else b""
            return Response(int(line.split(" ")[1]), received, body)
        finally:
            writer.close()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return (
            await reader.read()
            if "content-length" not in headers
            else await reader.readexactly(int(headers["content-length"]))
        )
    parts = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(parts)


async def _through(request: Request, forward: Forward) -> Response | None:
    return await forward(request)
