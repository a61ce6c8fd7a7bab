"""Ceph's S3 gateway on loopback, for tests: a monitor, a store in memory, and the gateway.

    with running(directory) as url: ...

or `python rgw.py COMMAND ...`: runs the command with the gateway's address and
credentials in its environment. Needs Debian's ceph-mon, ceph-osd and radosgw.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
KEY, SECRET = "testaccess", "testsecret"
PATIENCE = 60.0

# What makes it quick and reliable: no waiting between the monitor's rounds, no class and
# no place of the store looked up at start, and no delayed small packets.
CONFIG = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
ms bind ipv6 = false
ms bind msgr2 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = {directory}
admin socket = {directory}/$name.asok
log file = {directory}/$name.log
pid file = {directory}/$name.pid
mon cluster log file = {directory}/cluster.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.02
paxos min wait = 0.01
osd class update on start = false
osd crush update on start = false
osd objectstore = memstore
memstore device bytes = 2147483648
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
rgw enable ops log = false
[mon.a]
mon data = {directory}/mon
[osd.0]
osd data = {directory}/osd
"""


def missing() -> list[str]:
    """Return the binaries that are not installed."""
    return [name for name in NEEDED if shutil.which(name) is None]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "ceph.conf"
        self.port = free_port()
        self.daemons: list[subprocess.Popen[bytes]] = []
        for part in ("mon", "osd"):
            (directory / part).mkdir()

    def start(self) -> str:
        fsid, osd, mon_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        self.config.write_text(CONFIG.format(fsid=fsid, mon_port=mon_port, port=self.port, directory=self.directory))
        monmap = str(self.directory / "monmap")
        self.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self.daemon("ceph-mon", "-i", "a", "-f")
        self.run("ceph", "osd", "new", osd, "0")
        self.run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.daemon("ceph-osd", "-i", "0", "-f")
        self.until("the store is up", lambda: b"1 up" in self.run("ceph", "osd", "stat"))
        self.daemon("radosgw", "-n", "client.rgw.a", "-f")
        url = f"http://127.0.0.1:{self.port}"
        self.until("the gateway answers", lambda: urllib.request.urlopen(url, timeout=5).status == 200)
        self.run(
            "radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
            f"--access-key={KEY}", f"--secret={SECRET}",
        )  # fmt: skip
        return url

    def run(self, program: str, *arguments: str) -> bytes:
        command = [program, *(() if program == "monmaptool" else ("-c", str(self.config))), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr.decode(errors='replace')[-500:]}")
        return done.stdout

    def daemon(self, program: str, *arguments: str) -> None:
        with (self.directory / f"{program}.out").open("wb") as out:
            command = [program, "-c", str(self.config), *arguments]
            self.daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def until(self, what: str, holds: object) -> None:
        assert callable(holds)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if holds():
                    return
            time.sleep(0.05)
        raise RuntimeError(f"gave up waiting until {what}; the logs are in {self.directory}")

    def stop(self) -> None:
        """Stop the daemons. Everything is in memory, so there is nothing to save."""
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[str]:
    """Run the gateway, and yield its URL; `directory` must be empty."""
    cluster = Cluster(directory)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def main() -> int:
    if absent := missing():
        print(
            f"skipped: {', '.join(absent)} not found; on Debian: "
            "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"
        )
        return 0
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as url:
        print(f"Ceph RGW at {url}", flush=True)
        credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**os.environ, **credentials, "LAB_STATE_TEST_S3_ENDPOINT": url}
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
