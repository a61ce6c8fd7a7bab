"""Run the command `lab-state` in processes of its own, some hundred of them in the time of a few starts.

A server imports the command once. It forks a process for each run, which gets its own arguments, environment, directory and
pipes. So a run is a real process with real signals and exit codes, and takes 20 ms in place of 400.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

TIMEOUT = 60.0
_UNDER = "LAB_STATE_TEST_UNDER"
_STATUS = struct.Struct("=ii")


class Done:
    """A run that has ended."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.bytes = out
        self.out = out.decode(errors="surrogateescape")
        self.err = err.decode(errors="surrogateescape")

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


class Under(TypedDict, total=False):
    """The conditions that a run is under. It is put under them before it looks at its arguments.

    Members:
        at: The number of a call that touches a file in the directory: it opens, writes, syncs, renames, links or deletes
            the file. The run gets `signal` before this call, or with `half` in the middle of this write.
        signal: The number of a signal: SIGKILL, if it is missing.
        half: See `at`.
        faults: Calls that fail, as `injector.Fault` has them.
        most_bytes: The largest size of a file that the run may write.
        user: The id of the user that the run becomes. Only root can.
        read_only: A directory that the run sees as a read-only mount.
        closed: The standard streams that are closed: 0, 1 or 2.
        stdout: The path of a device in the place of stdout; empty for a pipe of which the reader has ended.
        stderr: The same for stderr.
        ignores: The number of a signal that the run ignores from its beginning.
    """

    at: int
    signal: int
    half: bool
    faults: list[dict[str, str | int]]
    most_bytes: int
    user: int
    read_only: str
    closed: list[int]
    stdout: str
    stderr: str
    ignores: int


def under(**conditions: Unpack[Under]) -> dict[str, str]:
    """Return the environment of a run that is under these conditions."""
    return {_UNDER: json.dumps(conditions)}


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
    import encodings.utf_8_sig  # noqa: PLC0415
    import encodings.utf_16_be  # noqa: F401, PLC0415

    import aiobotocore.session  # noqa: F401, PLC0415 -- the server imports what a run may need
    import click._termui_impl  # noqa: F401, PLC0415

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
    _put(Path(request["cwd"]), **json.loads(os.environ.pop(_UNDER, "{}")))
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
                try:
                    file.flush()
                except OSError:
                    code = 120  # as the interpreter does at its end
        _save_coverage()
        os._exit(code)


def _put(directory: Path, **conditions: Unpack[Under]) -> None:
    """Put this process under conditions."""
    if "at" in conditions or "faults" in conditions:
        sys.path.append(str(Path(__file__).parents[1] / "crash"))
        from injector import Fault, Injector, Kill  # noqa: PLC0415

        number, half = conditions.get("at", 0), conditions.get("half", False)
        kill = Kill(number=number, half=half, signal=conditions.get("signal", signal.SIGKILL))
        Injector(directory, [Fault(**fault) for fault in conditions.get("faults", [])], kill).install()  # type: ignore[arg-type]
    if "most_bytes" in conditions:
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions["most_bytes"], _largest()))
    if "read_only" in conditions:
        _mount_read_only(conditions["read_only"].encode())
    if "user" in conditions:
        os.setgroups([])
        os.setgid(conditions["user"])
        os.setuid(conditions["user"])
    for number, path in ((1, conditions.get("stdout")), (2, conditions.get("stderr"))):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY) if path else _closed_pipe(), number)
    if "ignores" in conditions:
        signal.signal(conditions["ignores"], signal.SIG_IGN)
    for number in conditions.get("closed", []):
        stream = ("stdin", "stdout", "stderr")[number]
        getattr(sys, stream).close()  # otherwise Python 3.13 reports the closed descriptor when it frees the stream
        setattr(sys, stream, None)
        with contextlib.suppress(OSError):  # the stream may have closed it
            os.close(number)


def _closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _largest() -> int:
    return resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def _mount_read_only(directory: bytes) -> None:
    """Mount a directory over itself, read-only, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(0x20000 if os.geteuid() == 0 else 0x10020000))  # CLONE_NEWNS, and CLONE_NEWUSER to be allowed to
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    check(libc.mount(directory, directory, None, 0x1000, None))  # MS_BIND
    check(libc.mount(b"none", directory, None, 0x1021, None))  # MS_BIND | MS_REMOUNT | MS_RDONLY


def _save_coverage() -> None:
    if "coverage" in sys.modules:
        import coverage  # noqa: PLC0415

        measured = coverage.Coverage.current()
        if measured is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_largest(), _largest()))
            measured.stop()
            with contextlib.suppress(Exception):  # another user may not write there
                measured.save()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
