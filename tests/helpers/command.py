"""Run the command `lab-state` in processes of its own, some hundred of them in the time of a few starts.

A server imports the command once. It forks a process for each run, which gets its own arguments, environment, directory and
pipes. So a run is a real process with real signals and exit codes, and takes 20 ms in place of 400.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
KILL_AT = "LAB_STATE_TEST_KILL_AT"
_STATUS = struct.Struct("=ii")


class Done:
    """A run that has ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.bytes = out
        self.out = out.decode()
        self.err = err.decode()

    def __repr__(self) -> str:
        return f"<exit code {self.code}>\n{self.out}{self.err}"

    @property
    def json(self) -> Any:
        """The output as one JSON value."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """The output as JSON values, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Run:
    """A run that is under way."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str], *, terminal: int | None) -> None:
        with _serving:
            server = _server()
            pipes = [os.pipe(), os.pipe(), os.pipe()]
            theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
            if terminal is not None:
                theirs = [terminal] * 3
            status, their_status = socket.socketpair()
            request = json.dumps({"argv": arguments, "cwd": str(cwd), "env": {**os.environ, **env}}).encode()
            socket.send_fds(server, [request], [*theirs, their_status.fileno()])
            their_status.close()
            for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
                os.close(fd)
        self.stdin = os.fdopen(pipes[0][1], "wb", buffering=0)
        self.stdout = os.fdopen(pipes[1][0], "rb")
        self.stderr = os.fdopen(pipes[2][0], "rb")
        self._status = status
        status.settimeout(TIMEOUT)
        self.pid: int = _STATUS.unpack(status.recv(_STATUS.size, socket.MSG_WAITALL))[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, given: bytes = b"") -> Done:
        """Give the input, and wait for the end."""
        found: dict[str, bytes] = {}
        readers = [
            threading.Thread(target=lambda name=name, file=file: found.update({name: file.read()}), daemon=True)
            for name, file in (("out", self.stdout), ("err", self.stderr))
            if not file.closed
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(given)
        self.stdin.close()
        _, status = _STATUS.unpack(self._status.recv(_STATUS.size, socket.MSG_WAITALL))
        for reader in readers:
            reader.join(TIMEOUT)
        self.close()
        return Done(os.waitstatus_to_exitcode(status), found.get("out", b""), found.get("err", b""))

    def close(self) -> None:
        for file in (self.stdin, self.stdout, self.stderr, self._status):
            file.close()


def start(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, terminal: int | None = None) -> Run:
    """Start `lab-state` with these arguments. With `terminal`, this is its stdin, stdout and stderr."""
    return Run(tuple(map(str, arguments)), cwd, env or {}, terminal=terminal)


def command(*arguments: str | Path, cwd: Path, given: bytes | str = b"", env: Mapping[str, str] | None = None) -> Done:
    """Run `lab-state` with these arguments to its end."""
    return start(*arguments, cwd=cwd, env=env).wait(given.encode() if isinstance(given, str) else given)


_serving = threading.Lock()


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait(TIMEOUT)

    atexit.register(end)
    return ours


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, until the socket is closed."""
    import aiobotocore.session  # noqa: F401, PLC0415 -- the server imports what a run may need

    import lab_state.cli._app  # noqa: PLC0415
    import lab_state.storage.s3  # noqa: F401, PLC0415

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, fds, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            _watch(json.loads(request), fds)
        for fd in fds:
            os.close(fd)


def _watch(request: dict[str, Any], fds: list[int]) -> None:
    """Fork the run, tell its pid, wait for it, and tell its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = fds.pop()
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _run(request, fds)
    for fd in fds:
        os.close(fd)
    os.write(status, _STATUS.pack(pid, 0))
    os.write(status, _STATUS.pack(pid, os.waitpid(pid, 0)[1]))
    os._exit(0)


def _run(request: dict[str, Any], fds: list[int]) -> None:
    from lab_state.cli import main  # noqa: PLC0415

    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    for fd in set(fds):
        if fd > 2:
            os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    encoding = request["env"].get("PYTHONIOENCODING", "utf-8")
    sys.stdin = os.fdopen(0, encoding=encoding)
    sys.stdout = os.fdopen(1, "w", encoding=encoding)
    sys.stderr = os.fdopen(2, "w", encoding=encoding)
    sys.argv = ["lab-state", *request["argv"]]
    if KILL_AT in os.environ:
        _kill_at(int(os.environ[KILL_AT]), Path(request["cwd"]))
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 -- as the interpreter does at its end
        sys.excepthook(*sys.exc_info())
    finally:
        for file in (sys.stdout, sys.stderr):
            if file is not None:
                file.flush()
        _save_coverage()
        os._exit(code)


def _kill_at(number: int, directory: Path) -> None:
    """End this process with SIGKILL before its n-th call that opens, writes, syncs, renames or deletes a file in the directory."""
    sys.path.append(str(Path(__file__).parents[1] / "crash"))
    from injector import Injector, Kill  # noqa: PLC0415

    Injector(directory, [], Kill(number=number)).install()


def _save_coverage() -> None:
    if "coverage" in sys.modules:
        import coverage  # noqa: PLC0415

        measured = coverage.Coverage.current()
        if measured is not None:
            measured.stop()
            measured.save()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
