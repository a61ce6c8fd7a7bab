"""The alerts and the dashboard of docs/operations.md, run by Debian's Prometheus against running managers: `nox -s operations`.

pytest collects this file only by its name, because the ordinary tests need no Prometheus.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from lab_state import Config, FileStorage, Manager
from lab_state.integrations.prometheus import LabStateCollector

FILES = Path(__file__).parent.parent / "docs" / "examples" / "operations"
RULES = FILES / "rules.yml"
COMPARISON = re.compile(r"\s*(==|>|<)\s*[\d.]+$")
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: lab_state
    static_configs: [{{targets: {targets}}}]
"""


def expressions() -> dict[str, str]:
    """Return each expression of the alerts and of the dashboard, by its name."""
    found = dict(re.findall(r"alert: (\w+)\n\s+expr: (.+)", RULES.read_text()))
    for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$name", ".+")
    return found


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def query(port: int, expression: str) -> list[Any]:
    """Return the result of an expression."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=5) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    result: list[Any] = found["data"]["result"]
    return result


@asynccontextmanager
async def prometheus(directory: Path, *targets: int) -> AsyncGenerator[int]:
    """Run Prometheus with the alerts, and return its port."""
    (directory / "prometheus.yml").write_text(
        CONFIG.format(rules=RULES, targets=json.dumps([f"127.0.0.1:{target}" for target in targets]))
    )
    port = free_port()
    arguments = [
        "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    process = await asyncio.to_thread(subprocess.Popen, arguments, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


def settled(port: int) -> bool:
    """Return whether Prometheus has enough scrapes for a rate."""
    try:
        return (
            bool(query(port, "rate(lab_state_operations_total[5m])")) and len(query(port, "lab_state_lag_seconds")) > 0
        )
    except OSError:
        return False


async def test_each_expression_has_a_result(tmp_path: Path) -> None:
    """Prometheus accepts each expression, and each of them has a result from managers that run. No alert is active."""
    storage = FileStorage(tmp_path / "state")
    owner = Manager(Config(name="shared", shared=True), storage)
    follower = Manager(Config(name="shared", shared=True), storage)
    async with owner, follower, Manager(Config(name="alone", flush_interval=0), storage) as alone:
        registry = CollectorRegistry()
        registry.register(LabStateCollector(owner, alone))
        other = CollectorRegistry()
        other.register(LabStateCollector(follower))
        server, thread = await asyncio.to_thread(start_http_server, 0, "127.0.0.1", registry)
        second, second_thread = await asyncio.to_thread(start_http_server, 0, "127.0.0.1", other)

        async with prometheus(tmp_path, server.server_port, second.server_port) as port:
            end = time.monotonic() + 60
            while not await asyncio.to_thread(settled, port):
                assert time.monotonic() < end
                await alone.set("key", time.time())
                await owner.set("key", time.time())
                await asyncio.sleep(0.3)
            empty = {
                name: expression
                for name, expression in expressions().items()
                if not await asyncio.to_thread(query, port, COMPARISON.sub("", expression))
            }
            assert empty == {}
            assert await asyncio.to_thread(query, port, "ALERTS") == []
        for running, its_thread in ((server, thread), (second, second_thread)):
            await asyncio.to_thread(running.shutdown)
            running.server_close()
            its_thread.join()


def test_promtool_accepts_the_alerts() -> None:
    """`promtool check rules` finds each alert."""
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=True)
    assert f"{RULES.read_text().count('alert:')} rules found" in done.stdout


def test_the_metrics_of_the_expressions_exist() -> None:
    """Each metric of an expression is in the table of docs/prometheus.md."""
    page = (FILES.parents[1] / "prometheus.md").read_text()
    for expression in expressions().values():
        for metric in re.findall(r"lab_state_\w+", expression):
            assert f"`{metric.removesuffix('_bucket')}`" in page, metric
