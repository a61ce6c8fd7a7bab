"""What is rare in the command: other programs at a socket, calls that move, files that no writer makes."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from command import command
from commanded import World, on_terminal, owner, set_to
from msgspec import Raw

from lab_state import Config, ConflictError, FileStorage, InvalidValueError, Manager, UnsupportedError
from lab_state._codec import encode_snapshot
from lab_state.cli import _app, _client, _watch
from lab_state.cli._client import Client
from lab_state.cli._doctor import of_file_system
from lab_state.cli._exits import Stop
from lab_state.cli._input import Item
from lab_state.cli._output import Output
from lab_state.cli._run import asynchronous
from lab_state.cli._target import parse_state
from lab_state.cli._verify import torn_bytes
from lab_state.cli._writers import Shared, _is_shared
from lab_state.shared import _frames
from lab_state.shared._frames import STARTING, frame
from lab_state.shared._messages import Moved


async def test_a_call_that_moves(tmp_path: Path) -> None:
    """A call that an owner hands over is sent again with the same number, and made once."""
    async with owner(tmp_path):
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        client.answered(Moved(1))  # no call is open
        calling = asyncio.create_task(client.call(set_to(b"1")))
        await asyncio.sleep(0)
        client.answered(Moved(1))
        assert (await calling).revision == 2
        await client.aclose()


async def test_an_owner_that_refuses(tmp_path: Path) -> None:
    """An owner of another state, and one with another version of the protocol, are errors."""
    async with owner(tmp_path):
        (tmp_path / "other.sock").symlink_to(tmp_path / "shop.sock")
        with pytest.raises(UnsupportedError, match="does not admit"):
            await Client(FileStorage(tmp_path), "other").connect()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(frame(STARTING, b"\0" * 8, b'{"lab_state":"shared","protocol":99}'))
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "new.sock"):
        client = Client(FileStorage(tmp_path), "new")
        with pytest.raises(UnsupportedError, match="another version of lab_state"):
            await client.connect()
        await client.aclose()


async def test_a_load_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a running shared state has to fit into one message. The error says what to do."""
    async with owner(tmp_path):
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        monkeypatch.setattr(_frames, "MOST_BYTES", 100)
        with pytest.raises(InvalidValueError, match="stop the processes of the state first"):
            await Shared(client).load({"a": Item("x" * 200)}, replace=False)
        monkeypatch.undo()
        await client.aclose()


async def test_watch_by_way_of_the_next_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an owner dies and another process becomes the owner, its records are printed. Records in between come from the files."""
    storage = FileStorage(tmp_path)
    state = parse_state(str(tmp_path / "shop"))
    output = Output()
    monkeypatch.setattr(_client, "_NEXT", 60.0)  # a takeover takes longer on a busy machine
    written: list[bytes] = []
    monkeypatch.setattr(output, "_write", written.append)
    monkeypatch.setattr(output, "flush", lambda: None)
    async with owner(tmp_path) as first, Manager(Config(name="shop", shared=True), storage) as second:
        watching = asyncio.create_task(_watch._follow(storage, state, _watch._Printer(output, "", nl=False)))

        async def until(holds: Callable[[], bool]) -> None:
            while not holds():
                if watching.done():
                    pytest.fail(f"watch has ended: {await watching}")
                await asyncio.sleep(0.01)

        await until(lambda: "watching" in capsys.readouterr().err)
        first.kill()
        await second.set("a", 5)
        await until(lambda: b"set  a  5" in b"".join(written))
        await second.set("b", 6)
        await until(lambda: b"set  b  6" in b"".join(written))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_an_edit_of_a_key_that_has_expired(tmp_path: Path) -> None:
    """An edited value is not stored with an expiry that has come: it would be lost at once."""
    async with Manager(Config(name="shop", shared=True), FileStorage(tmp_path)) as state:
        await state.set("a", 0)
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        with pytest.raises(ConflictError, match="'a' was changed meanwhile"):
            await Shared(client).replace("a", b"0", int(client.now * 1000), 5, 1)
        assert (await state.get("a"), state.revision) == (0, 1)
        await client.aclose()


async def test_changes_between_two_owners_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the state was written, stopped and shared again while `watch` looked for an owner, it says which changes it has not printed."""
    storage, state, output = FileStorage(tmp_path), parse_state(str(tmp_path / "shop")), Output()
    monkeypatch.setattr(_client, "_NEXT", 60.0)
    monkeypatch.setattr(output, "flush", lambda: None)
    shared = Config(name="shop", shared=True)
    texts: list[str] = []

    async def until(text: str) -> None:
        while text not in "".join(texts):
            await asyncio.sleep(0.01)
            texts.append(capsys.readouterr().err)

    async with Manager(shared, storage):
        watching = asyncio.create_task(_watch._follow(storage, state, _watch._Printer(output, "", nl=False)))
        await until("after revision 0")
    async with Manager("shop", storage) as alone:
        await alone.set("gap", 1)
    async with Manager(shared, storage):
        await until("not printed, because a checkpoint was written meanwhile: change 1;")
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_record_of_two_generations_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tail --since` leaves out a record that the generation before has, too."""
    storage, output, lines = FileStorage(tmp_path), Output(), list[str]()
    monkeypatch.setattr(output, "line", lines.append)
    monkeypatch.setattr(output, "flush", lambda: None)
    printer = _watch._Printer(output, "", nl=False)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set("a", 1)
        await state.set("a", 2)
        reading = await storage.read("shop")
    last = _watch._print_after(printer, reading._replace(records=reading.records[:1]), 0, 0)
    assert _watch._print_after(printer, reading, 0, last) == 2
    assert [line.split("  ")[1:] for line in lines] == [["r1", "set", "a", "1"], ["r2", "set", "a", "2"]]


async def test_a_record_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next owner sends a record that was read from the files already. It is not printed again."""
    output, lines = Output(), list[str]()
    monkeypatch.setattr(output, "line", lines.append)
    monkeypatch.setattr(output, "flush", lambda: None)
    records: asyncio.Queue[bytes | None] = asyncio.Queue()
    for number in (1, 2):
        records.put_nowait(
            b'{"from":%d,"to":%d,"clear":false,"set":{"a":%d},"delete":[],"expires":{}}' % (number - 1, number, number)
        )
    records.put_nowait(None)
    client = cast("Client", SimpleNamespace(watch=lambda on_end: None))
    assert await _watch._print_records(client, records, _watch._Printer(output, "", nl=False), 1) == 2
    assert ["set  a" in line and line.endswith("2") for line in lines] == [True]


async def test_records_that_a_checkpoint_has_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the journal does not reach back, `watch` says which changes it has not seen."""
    storage = FileStorage(tmp_path)
    output = Output()
    lines: list[str] = []
    monkeypatch.setattr(output, "line", lines.append)
    monkeypatch.setattr(output, "flush", lambda: None)
    printer = _watch._Printer(output, "", nl=False)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set("a", 1)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set("a", 2)
        await state.set("a", 3)
        assert await _watch._fill(storage, "shop", printer, 3, 3) == 3
        assert capsys.readouterr().err == ""
        assert await _watch._fill(storage, "shop", printer, 0, 3) == 3
        noted = capsys.readouterr().err
        assert (
            "not printed, because a checkpoint was written meanwhile: changes 1 to 3; if the state has a history"
            in noted
        )
        assert "`lab-state tail --since r0` prints them" in noted
        assert lines == []
        assert await _watch._fill(storage, "shop", printer, 1, 2) == 2
        assert [line.split("  ")[1:] for line in lines] == [["r2", "set", "a", "2"]]


def test_an_abort_and_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C outside of a subcommand is code 130. An error of the system that no storage has translated is code 5."""

    def abort(**_: Any) -> None:
        raise click.Abort

    monkeypatch.setattr(_app.cli, "main", abort)
    with pytest.raises(SystemExit) as ended:
        _app.run()
    assert ended.value.code == 130

    async def fail(_: Output) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Output, "flush", lambda _: None)
    with pytest.raises(Stop) as stopped:
        asynchronous(fail, writes=True)()
    assert stopped.value.code == 5


async def test_keys_and_values_that_no_state_can_have(tmp_path: Path) -> None:
    """`verify` finds keys and values that another program has written with a right checksum, and prints each of them."""
    world = World("stopped", tmp_path)
    (tmp_path / "state").mkdir()
    view: dict[str, Any] = {"": Raw(b"1"), "bad": Raw(b'"\xff"'), "good": Raw(b"1")}
    (tmp_path / "state" / "shop.json").write_bytes(b"".join(encode_snapshot(view, 1, 0, copy_loaded=False)))
    found = await world.run("verify", world.state)
    assert found.code == 4
    assert found.out.splitlines()[2].startswith("a key is not valid: ")
    assert found.out.splitlines()[3] == "the value of 'bad' is not JSON in UTF-8"
    assert torn_bytes(b"#", "shop", "journal") == 0


async def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    """A directory in the place of a file, and a missing bucket, are code 5.

    An empty directory name, and a backup in a directory that is missing or on a file of a state, are usage errors.
    If the system refuses the path of a backup, the code is 5.
    """
    world = World("stopped in a bucket", tmp_path)
    assert (await world.run("ls", "")).code == 2
    async with Manager("shop", FileStorage(tmp_path / "state")) as state:
        await state.set("a", 1)
    for target in ("none/backup.json", "state/shop.json"):
        refused = await world.run("backup", "state/shop", target)
        assert (refused.code, refused.out) == (2, "")
    (tmp_path / "two" / "shop.json").mkdir(parents=True)
    assert (await world.run("copy", "state/shop", "two/shop")).code == 5
    report = await world.run("doctor", "s3://no-such-bucket/shop")
    assert report.code == 5
    assert [line.split(":")[0] for line in report.out.splitlines()] == ["LOOK  content", "LOOK  store"]
    failed = await world.run("backup", "state/shop", f"{'x' * 300}.json")
    assert failed.code == 5
    assert "File name too long" in failed.err


async def test_another_program_at_the_socket_is_reported(tmp_path: Path) -> None:
    """`doctor` marks a socket at which another program answers."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "state" / "shop.sock"):
        report = (await world.run("doctor", "--json", world.state)).json
    (line,) = [check for check in report["checks"] if check["subject"] == "socket"]
    assert not line["ok"]
    assert "another program answers" in line["text"]


def test_file_systems() -> None:
    """A file system of several machines, and one in memory, are marked."""
    assert [of_file_system(kind).is_good for kind in ("ext4", "nfs4", "tmpfs")] == [True, False, False]


async def test_a_hole_in_the_history_of_a_key(tmp_path: Path) -> None:
    """A snapshot shows that a key was deleted in a hole of the history. A key that begins with the same text is another one."""
    world = World("stopped", tmp_path)
    for storage, value in ((FileStorage(tmp_path / "state", history=3600), 1), (FileStorage(tmp_path / "state"), None)):
        async with Manager(Config(name="shop", flush_interval=0), storage) as state:
            if value is None:
                await state.delete("a")
            else:
                await state.set_many({"a": value, "ab": value})
    async with Manager(Config(name="shop", flush_interval=0), FileStorage(tmp_path / "state", history=3600)) as state:
        await state.set("b", 1)
        found = (await world.run("history", "--nl", world.state, "a")).lines
    assert [(one["revision"], one["kind"]) for one in found][-1] == (2, "delete")


async def test_input_from_a_terminal(tmp_path: Path) -> None:
    """`load` from a terminal says how to end the input. A shell completes the argument of `ls` as a directory."""
    async with Manager("shop", FileStorage(tmp_path / "state")) as state:
        await state.set("a", 1)
    done = await asyncio.to_thread(on_terminal, "load", "state/shop", cwd=tmp_path, typed=b'{"b":2}\n\x04')
    assert "end with Ctrl-D" in done.out
    assert done.out.endswith("loaded 1 key; revision 2\r\n")
    words = {"COMP_WORDS": "lab-state ls sta", "COMP_CWORD": "2"}
    env = {**os.environ, "_LAB_STATE_COMPLETE": "bash_complete", **words}
    assert (await asyncio.to_thread(command, cwd=tmp_path, env=env)).out == "dir,sta\n"


async def test_an_owner_that_loads_its_state(tmp_path: Path) -> None:
    """A client notes the process id of an owner that loads its state. If this owner ends, there is no owner."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(frame(STARTING, b"\0" * 8, b'{"lab_state":"shared","protocol":1,"host":"here","pid":77}'))
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "new.sock"):
        client = Client(FileStorage(tmp_path), "new")
        assert not await client.connect()
        assert client.pid == 77
        await client.aclose()


async def test_a_writer_that_finds_no_owner_yet(tmp_path: Path) -> None:
    """While the holder of the lock shares the state and does not listen yet, both ways to write are tried again."""
    tried: list[str] = []

    class Late:
        async def connect(self) -> bool:
            tried.append("connect")
            return len(tried) > 1

        async def may_appear(self) -> bool:
            tried.append("may appear")
            return True

    async with owner(tmp_path):
        manager = Manager("shop", FileStorage(tmp_path))
        assert await _is_shared(cast("Client", Late()), manager, parse_state("shop"))
    assert tried == ["connect", "may appear", "connect"]


async def test_a_sign_of_life(tmp_path: Path) -> None:
    """A client notes the durable revision that a sign of life has."""
    async with owner(tmp_path):
        client = Client(FileStorage(tmp_path), "shop")
        assert await client.connect()
        assert client._connection is not None
        client._connection.revision(client.revision + 1)
        assert client.revision == 2
        await client.aclose()


def test_the_module_is_imported() -> None:
    """To import `lab_state.__main__` runs no command."""
    assert importlib.import_module("lab_state.__main__").__name__ == "lab_state.__main__"
