"""A real application, killed in the middle: nothing that it acknowledged is lost.

Starts `words.py` under uvicorn, feeds it lines of the standard library's own sources
over HTTP, kills it with SIGKILL half way, starts it again, and compares. Everything
happens on the loopback interface and in a temporary directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx
from rich.console import Console
from rich.progress import Progress

EVENTS = 3000
CLIENTS = 40
MODULES = ["argparse", "asyncio/base_events", "dataclasses", "email/message", "json/decoder", "pathlib", "typing"]

console = Console()


def events() -> list[dict[str, Any]]:
    """Return real text: lines of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for module in MODULES:
        path = library / f"{module}.py"
        lines = (path if path.exists() else library / module / "__init__.py").read_text("utf-8").splitlines()
        found += [{"module": module, "number": number, "text": text} for number, text in enumerate(lines, 1) if text]
    random.Random(1).shuffle(found)
    return found[:EVENTS]


class Server:
    """The application in a process of its own."""

    def __init__(self, directory: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "words:app"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--log-level", "warning"],
            env={**os.environ, "STATE_DIRECTORY": directory},
        )

    async def ready(self, client: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                (await client.get(f"{self.url}/words")).raise_for_status()
            except httpx.TransportError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise SystemExit("the application did not start") from None
                await asyncio.sleep(0.05)
            else:
                return

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


class Feeder:
    """Sends events from many clients at once, and remembers which were acknowledged."""

    def __init__(self, client: httpx.AsyncClient, todo: list[dict[str, Any]]) -> None:
        self.client = client
        self.todo = todo[::-1]
        self.tried: list[dict[str, Any]] = []
        self.acknowledged: list[dict[str, Any]] = []

    async def run(self, url: str, progress: Progress, bar: Any, until: int) -> None:
        async def one() -> None:
            while self.todo and len(self.acknowledged) < until:
                event = self.todo.pop()
                self.tried.append(event)
                try:
                    (await self.client.post(f"{url}/lines", json=event)).raise_for_status()
                except httpx.TransportError:
                    return  # killed under our hands: not acknowledged
                self.acknowledged.append(event)
                progress.update(bar, completed=len(self.acknowledged))

        await asyncio.gather(*(one() for _ in range(CLIENTS)))


def check(lines: dict[str, Any], words: dict[str, int], feeder: Feeder) -> None:
    """Check that every acknowledged change is there, and nothing that was never sent."""
    tried = {f"line/{event['module']}/{event['number']}": event for event in feeder.tried}
    lost = [e for e in feeder.acknowledged if lines.get(f"line/{e['module']}/{e['number']}") != e]
    invented = [key for key, line in lines.items() if tried.get(key) != line]
    least, most = Counter[str](), Counter[str]()
    for counter, sent in ((least, feeder.acknowledged), (most, feeder.tried)):
        for event in sent:
            counter[f"words/{event['module']}"] += len(event["text"].split())
    wrong = [key for key in most if not least[key] <= words.get(key, 0) <= most[key]]
    if lost or invented or wrong:
        raise SystemExit(f"LOST: {lost[:3]}  INVENTED: {invented[:3]}  WRONG: {wrong}")


async def main() -> None:
    begin = time.monotonic()
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    with tempfile.TemporaryDirectory() as directory, Progress(console=console) as progress:
        async with httpx.AsyncClient(limits=limits, timeout=20) as client:
            feeder = Feeder(client, events())
            bar = progress.add_task("events acknowledged as durable", total=len(feeder.todo))
            server = Server(directory)
            await server.ready(client)
            feeding = asyncio.create_task(feeder.run(server.url, progress, bar, EVENTS))
            while len(feeder.acknowledged) < EVENTS // 2:  # noqa: ASYNC110 -- a demo may look every now and then
                await asyncio.sleep(0.01)
            server.end(signal.SIGKILL)
            await feeding
            at_kill = len(feeder.acknowledged), len(feeder.tried)
            progress.console.print(f"SIGKILL: {at_kill[0]} acknowledged, {at_kill[1] - at_kill[0]} on their way")

            server = Server(directory)
            await server.ready(client)
            lines = (await client.get(f"{server.url}/lines")).json()
            words = (await client.get(f"{server.url}/words")).json()
            check(lines, words, feeder)
            progress.console.print(f"started again: {len(lines)} lines found, every acknowledged one among them")

            await feeder.run(server.url, progress, bar, EVENTS)
            server.end(signal.SIGTERM)
        path = Path(directory) / "words.json"
        data = path.read_bytes()
        state = json.loads(data)
        check(
            {key: value for key, value in state.items() if key.startswith("line/")},
            {key: value for key, value in state.items() if key.startswith("words/")},
            feeder,
        )
    own = state.pop("$lab_state")
    console.print(f"SIGTERM: {path.name} is plain JSON, {len(data):,} bytes, {len(state)} keys, the first:")
    for key in list(state)[:3]:
        console.print(f"  {key}: {json.dumps(state[key])[:90]}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(feeder.acknowledged)} changes acknowledged, 0 of them lost; "
        f"{len(feeder.tried) - len(feeder.acknowledged)} were on their way at the SIGKILL, and never answered; "
        f"{own['revision']} revisions, in {time.monotonic() - begin:.1f} s"
    )


if __name__ == "__main__":
    asyncio.run(main())
