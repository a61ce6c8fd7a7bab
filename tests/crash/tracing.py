"""The second recorder: the kernel's own account of what a process did, by strace.

Run as a script, it is that process: `python tracing.py <workload> <seed> <beside> <root>`. What it
tries and what is acknowledged it writes to /dev/null, where strace sees it; the
versions, as JSON, to its standard output.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from disk import Ack, Create, Entry, Mark, Rename, Sync, SyncDirectory, Truncate, Try, Unlink, Withdraw, Write
from explore import Recording
from recorder import determined
from workloads import WORKLOADS
from world import Beside, World, decoded, encoded

MARKS = "/dev/null"
_TRACED = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,lseek,close,fsync,fdatasync,sync_file_range,ftruncate,"
    "truncate,fallocate,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "dup,dup2,dup3,sendfile,copy_file_range"
)
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_CLOSE = re.compile(r"^\d+ +close\(")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def missing() -> str | None:
    """Return why this recorder cannot work here; `None` if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()}"


def trace(workload: str, seed: int, beside: Beside) -> Recording:
    """Run a workload in a child, and make of its system calls what the in-process recorder makes of its calls.

    Raises:
        RuntimeError: The child failed, or did what this cannot follow.
    """
    with tempfile.TemporaryDirectory(prefix="lab_state-") as name:
        root, log = Path(name) / "root", Path(name) / "trace"
        root.mkdir()
        command = ["strace", "-f", "-xx", "-s", "100000000", "-o", str(log), "-e", f"trace={_TRACED}"]
        script = [sys.executable, __file__, workload, str(seed), beside.name, str(root)]
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        child = subprocess.run([*command, *script], env=environment, capture_output=True, check=False)
        if child.returncode != 0:
            raise RuntimeError(child.stderr.decode())
        seen = entries(log.read_text(), root)
    now, _, versions = child.stdout.partition(b"\n")
    return Recording({}, seen, decoded(versions), now=int(now))


def entries(log: str, root: Path) -> list[Entry]:
    """Return what a log of strace says about the files below the root."""
    calls = _Calls(root)
    for line in _whole_lines(log):
        calls.add(line)
    return calls.entries


def _whole_lines(log: str) -> Iterator[str]:
    """Return the calls in the order in which they ended; a call that another thread interrupted is put together.

    A close comes where it began. The kernel frees the number of the descriptor before the
    close ends: another thread may have opened, written and synced another file of this
    number by then.
    """
    begun: dict[str, str] = {}
    for line in log.splitlines():
        thread = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
            if _CLOSE.match(begun[thread]):
                yield f"{begun[thread].rstrip()}) = 0"
        elif " resumed>" in line:
            call = begun.pop(thread)
            if not _CLOSE.match(call):
                yield call + line.split(" resumed>", 1)[1]
        else:
            yield line


_MARKS: dict[str, Callable[..., Entry]] = {kind.__name__: kind for kind in (Try, Ack, Withdraw)}


class _Calls:
    """System calls in, entries out."""

    def __init__(self, root: Path) -> None:
        self.entries: list[Entry] = []
        self._root = f"{root}"
        self._inodes: dict[str, int] = {}
        self._number = 0
        self._open: dict[int, str | int | None] = {}  # a path for a directory, an inode, `None` for the marks
        self._positions: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def add(self, line: str) -> None:
        found = _CALL.match(line)
        if found is None:
            return
        name, arguments, result = found[1], found[2], int(found[3])
        if result < 0:
            if name in ("fsync", "fdatasync"):
                self._sync(arguments, ok=False)
            return
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in _STRING.findall(arguments)]
        paths = [self._name(os.fsdecode(text)) for text in texts]
        handlers: dict[str, Callable[[], None]] = {
            "openat": lambda: self._opened(os.fsdecode(texts[0]), arguments, result),
            "write": lambda: self._written(_fd(arguments), texts[0][:result], None),
            "pwrite64": lambda: self._written(_fd(arguments), texts[0][:result], int(arguments.rsplit(",", 1)[1])),
            "lseek": lambda: self._positions.__setitem__(_fd(arguments), result),
            "dup2": lambda: self._open.__setitem__(result, self._open[_fd(arguments)]),
            "close": lambda: self._closed(_fd(arguments)),
            "fsync": lambda: self._sync(arguments, ok=True),
            "fdatasync": lambda: self._sync(arguments, ok=True),
            "ftruncate": lambda: self._truncated(_fd(arguments), int(arguments.rsplit(",", 1)[1])),
            "rename": lambda: self._renamed(*paths),
            "unlink": lambda: self._unlinked(paths[0]),
            "rmdir": lambda: self._unlinked(paths[0]),
            "mkdir": lambda: self._created(paths[0], is_directory=True),
        }
        if name in handlers:
            handlers[name]()
        elif any(path is not None for path in paths) or (arguments[:1].isdigit() and _fd(arguments) in self._open):
            raise RuntimeError(f"no handler for a call that touches the state: {line[:200]}")

    def _name(self, path: str) -> str | None:
        if path == self._root:
            return "."
        if not path.startswith(f"{self._root}/") or path.endswith(".lock"):
            return None
        return path.removeprefix(f"{self._root}/")

    def _created(self, name: str | None, *, is_directory: bool) -> None:
        if name is not None:
            self._inodes[name] = self._number
            self._sizes[self._number] = 0
            self.entries.append(Create(name, self._number, is_directory))
            self._number += 1

    def _opened(self, path: str, arguments: str, fd: int) -> None:
        name = self._name(path)
        if path == MARKS:
            self._open[fd] = None
        elif name is not None and "O_DIRECTORY" in arguments:
            self._open[fd] = name
        elif name is not None and ("O_WRONLY" in arguments or "O_RDWR" in arguments):
            if "O_TRUNC" in arguments or "O_APPEND" in arguments:
                raise RuntimeError(f"{name} is opened in a way that is not known: {arguments[-80:]}")
            if name not in self._inodes:
                self._created(name, is_directory=False)
            self._open[fd], self._positions[fd] = self._inodes[name], 0
        elif name in self._inodes:  # read, or synced
            self._open[fd] = self._inodes[name]

    def _closed(self, fd: int) -> None:
        self._open.pop(fd, None)

    def _written(self, fd: int, data: bytes, offset: int | None) -> None:
        if fd not in self._open:
            return
        what = self._open[fd]
        if what is None:
            kind, *numbers = data.decode().split()
            self.entries.append(_MARKS[kind](*map(int, numbers)))
            return
        assert isinstance(what, int)
        if offset is None:
            offset = self._positions[fd]
            self._positions[fd] += len(data)
        self.entries.append(Write(what, offset, data))

    def _truncated(self, fd: int, size: int) -> None:
        if isinstance(what := self._open.get(fd), int):
            self.entries.append(Truncate(what, size))

    def _sync(self, arguments: str, *, ok: bool) -> None:
        what = self._open.get(_fd(arguments))
        if isinstance(what, str):
            self.entries.append(SyncDirectory(what, ok))
        elif what is not None:
            self.entries.append(Sync(what, ok))

    def _renamed(self, source: str | None, target: str | None) -> None:
        if source is not None and target is not None:
            self._inodes[target] = self._inodes.pop(source)
            self.entries.append(Rename(source, target, self._inodes[target]))

    def _unlinked(self, name: str | None) -> None:
        if name is not None:
            del self._inodes[name]
            self.entries.append(Unlink(name))


def _fd(arguments: str) -> int:
    return int(arguments.split(",", 1)[0])


class _Marks:
    """Says to strace what the application tries."""

    def __init__(self) -> None:
        self._fd = os.open(MARKS, os.O_WRONLY)

    def mark(self, entry: Mark) -> None:
        os.write(self._fd, " ".join([type(entry).__name__, *map(str, entry)]).encode())


def main() -> None:
    workload, seed, beside, root = sys.argv[1], int(sys.argv[2]), Beside[sys.argv[3]], Path(sys.argv[4])
    world = World(root, _Marks(), seed, beside=beside)
    with determined(seed):
        asyncio.run(WORKLOADS[workload](world))  # type: ignore[arg-type]
    sys.stdout.buffer.write(b"%d\n%s" % (int(world.clock.monotonic()), encoded(world.versions)))


if __name__ == "__main__":
    main()
