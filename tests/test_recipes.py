"""The pages of docs/how-to and docs/coming-from: each has one program, which runs as a reader would run it."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient

from lab_state import FileStorage, Manager, read_state
from lab_state.testing import ManualClock

DOCS = Path(__file__).parent.parent / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
COMING_FROM = sorted((DOCS / "coming-from").glob("*.md"))
PAGES = [*HOW_TO, *COMING_FROM]
# Two screens of an editor, and what a browser of 1,280 pixels shows of a line of code.
LINES = 110
COLUMNS = 90
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^It prints:\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"^Save this as `(\w+)\.py`", re.MULTILINE)
SERVED = [page for page in HOW_TO if "uvicorn" in page.read_text()]
SCRIPTS = [page for page in PAGES if page not in SERVED]


def program_of(page: Path) -> str:
    (program,) = PROGRAM.findall(page.read_text())
    return str(program)


def saved(page: Path, directory: Path) -> str:
    """Save the program of a page under the name that the page gives, and return that name."""
    (name,) = NAME.findall(page.read_text())
    (directory / f"{name}.py").write_text(program_of(page))
    return str(name)


def run(directory: Path, *arguments: str) -> str:
    """Run Python in a directory, and return what it printed; it must end well and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@every_page
def test_a_page_fits_two_screens(page: Path) -> None:
    """A page is not longer than two screens, no line of code is cut off, and it says what a crash can lose."""
    lines = page.read_text().splitlines()
    assert len(lines) <= LINES
    assert "## What a crash can lose" in lines
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.stem)
def test_a_program_prints_what_its_page_says(page: Path, tmp_path: Path) -> None:
    """A program that was saved and run prints the text of its page. A second run does not move the old data again."""
    (expected,) = OUTPUT.findall(page.read_text())
    name = saved(page, tmp_path)
    assert run(tmp_path, f"{name}.py") == expected
    again = run(tmp_path, f"{name}.py")
    assert page in HOW_TO or again != expected


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.stem)
def test_the_calls_side_by_side_are_those_of_the_program(page: Path) -> None:
    """Each call in the table of both ways stands in the program, which runs."""
    table = page.read_text().split("## The same in both ways")[1].split("\n\n")[1]
    program = program_of(page)
    for row in table.splitlines()[2:]:
        _, _, old, new, _ = row.split("|")
        sides = [new] if page.stem in {"another-program", "home-assistant"} else [old, new]
        for call in re.findall(r"`([^`]+)`", " ".join(sides)):
            assert call in program


@contextmanager
def served(page: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Serve the application of a page with uvicorn, in a process of its own; it is killed at the end."""
    name = saved(page, directory)
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--port", "0", "--no-access-log", f"{name}:app"],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if match := re.search(r"unning on (http://127\.0\.0\.1:[1-9]\d*)", line):
                break
        else:
            raise AssertionError(said)
        with httpx.Client(base_url=match[1], timeout=30) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> Any:
    """Return a function that loads the application of a page, under a clock that stands still."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lab_state.Manager", functools.partial(Manager, clock=clock))

    def load(name: str) -> Any:
        module = ModuleType("recipe")
        monkeypatch.setitem(sys.modules, "recipe", module)  # where FastAPI looks up what annotations name
        exec(program_of(DOCS / "how-to" / f"{name}.md"), vars(module))
        return module.app

    return load


def test_job_queue_gives_each_job_to_one_worker(application: Any, clock: ManualClock) -> None:
    """Jobs are taken in order; each is given once during its lease, and again after it; its first result stays."""
    with TestClient(application("job-queue")) as client:
        for name in ("a", "b"):
            assert client.put(f"/jobs/{name}", json={"to": name}).status_code == 201
        assert client.put("/jobs/a", json={"to": "other"}).status_code == 201  # a repeated request
        first, second = client.post("/take").json(), client.post("/take").json()
        assert [first["name"], second["name"]] == ["a", "b"]
        assert (first["task"], first["tries"]) == ({"to": "a"}, 1)
        assert client.post("/take").json() is None

        clock.advance(61)
        again = client.post("/take").json()
        assert (again["name"], again["tries"]) == ("a", 2)
        assert client.post("/jobs/a/done", params={"lease": first["lease"]}, json="late").status_code == 409
        assert client.get("/jobs/a").json()["done"] is False
        for result in ("sent", "sent again"):
            assert client.post("/jobs/a/done", params={"lease": again["lease"]}, json=result).status_code == 200
        expected = {"task": {"to": "a"}, "tries": 2, "done": True, "result": "sent", "error": None}
        assert client.get("/jobs/a").json() == expected

        third = client.post("/take").json()
        assert third["name"] == "b"
        assert client.post("/take").json() is None
        assert client.post("/jobs/b/done", params={"lease": third["lease"]}).status_code == 200
        assert client.post("/take").json() is None


def test_job_queue_gives_a_failed_job_out_again(application: Any, clock: ManualClock) -> None:
    """A job that failed is given out again after 2, 4, 8 and 16 seconds. After five failures it is done, with its error."""
    with TestClient(application("job-queue")) as client:
        client.put("/jobs/a", json=1)
        for tries, pause in enumerate((2, 4, 8, 16), 1):
            job = client.post("/take").json()
            assert (job["name"], job["tries"]) == ("a", tries)
            parameters = {"lease": job["lease"]}
            assert client.post("/jobs/a/failed", params=parameters, json=f"no answer {tries}").status_code == 200
            assert client.get("/jobs/a").json()["error"] == f"no answer {tries}"
            # The lease ended with the failure. Until the end of the pause no worker has one.
            for end in ("done", "failed"):
                assert client.post(f"/jobs/a/{end}", params=parameters, json="late").status_code == 409
            clock.advance(pause - 0.1)
            assert client.post("/take").json() is None
            clock.advance(0.1)
        job = client.post("/take").json()
        for _ in range(2):  # a repeated request
            answer = client.post("/jobs/a/failed", params={"lease": job["lease"]}, json="no answer 5")
            assert answer.status_code == 200
        assert client.get("/jobs/a").json() == {"task": 1, "tries": 5, "done": True, "error": "no answer 5"}
        clock.advance(60)
        assert client.post("/take").json() is None


def test_job_queue_refuses_what_it_cannot_keep(application: Any, clock: ManualClock) -> None:
    """A name that could not be a key in every place is refused; an unknown job is 404; a result is forgotten in time."""
    with TestClient(application("job-queue")) as client:
        for name in ("n" * 201, "%00", "a%20b"):
            assert client.put(f"/jobs/{name}", json=1).status_code == 422
        assert client.get("/jobs/a").status_code == 404
        assert client.post("/jobs/a/done", params={"lease": "x"}).status_code == 404
        client.put("/jobs/a", json=1)
        taken = client.post("/take").json()
        client.post("/jobs/a/done", params={"lease": taken["lease"]})
        clock.advance(24 * 3600)
        assert client.get("/jobs/a").status_code == 404


def test_job_queue_keeps_each_step_that_it_answered(tmp_path: Path) -> None:
    """After SIGKILL right behind its answer, a job is there, is still leased, and is still done or failed."""
    page = DOCS / "how-to" / "job-queue.md"
    with served(page, tmp_path) as (_, client):
        for name in ("a", "b"):
            assert client.put(f"/jobs/{name}", json="task").status_code == 201
    with served(page, tmp_path) as (_, client):
        jobs = [client.post("/take").json() for _ in range(2)]
        assert [job["name"] for job in jobs] == ["a", "b"]
    with served(page, tmp_path) as (_, client):
        assert client.post("/take").json() is None
        done, failed = ({"lease": job["lease"]} for job in jobs)
        assert client.post("/jobs/a/done", params=done, json="ok").status_code == 200
        assert client.post("/jobs/b/failed", params=failed, json="no").status_code == 200
    with served(page, tmp_path) as (_, client):
        job = client.get("/jobs/a").json()
        assert job == {"task": "task", "tries": 1, "done": True, "result": "ok", "error": None}
        assert client.get("/jobs/b").json() == {"task": "task", "tries": 1, "done": False, "error": "no"}
        assert client.post("/jobs/b/done", params=failed, json="late").status_code == 409


def test_job_queue_loses_no_job_when_it_is_killed(tmp_path: Path) -> None:
    """After SIGKILL among concurrent clients and workers, each answered job is there, and each answered result."""
    page = DOCS / "how-to" / "job-queue.md"
    added: list[str] = []
    taken: list[str] = []
    finished: list[str] = []

    def add(name: str) -> None:
        if client.put(f"/jobs/{name}", json={"number": name}).status_code == 201:
            added.append(name)

    def work(_: int) -> None:
        if (job := client.post("/take").json()) is None:
            return
        taken.append(job["name"])
        if client.post(f"/jobs/{job['name']}/done", params={"lease": job["lease"]}, json="ok").status_code == 200:
            finished.append(job["name"])
            if len(finished) == 50:
                process.kill()

    def until_the_end(function: Any, argument: Any) -> None:
        with suppress(httpx.TransportError):  # the server is gone
            function(argument)

    with served(page, tmp_path) as (process, client), ThreadPoolExecutor(16) as pool:
        calls = []
        for number in range(1000):
            calls.append(pool.submit(until_the_end, add, f"job-{number}"))
            calls.append(pool.submit(until_the_end, work, number))
        for call in calls:
            call.result()
    assert 50 <= len(finished) < 1000
    assert len(set(taken)) == len(taken)

    view = asyncio.run(read_state("jobs", FileStorage(tmp_path / "state")))
    jobs = view.get_all_nowait("job/")
    assert all(jobs[f"job/{name}"]["task"] == {"number": name} for name in added)
    assert all(jobs[f"job/{name}"]["done"] for name in finished)
    done = {key.removeprefix("job/") for key, job in jobs.items() if job["done"]}
    running = set(view.get_nowait("running", []))
    assert set(taken) <= done | running
    with served(page, tmp_path) as (process, client):
        left = []
        while (job := client.post("/take").json()) is not None:
            left.append(job["name"])
    assert sorted(left) == sorted({key.removeprefix("job/") for key in jobs} - done - running)


def test_rate_limit_counts_a_window(application: Any, clock: ManualClock) -> None:
    """Five calls pass in a window, the sixth is told when to come back; others and the next window are not affected."""
    app = application("rate-limit")
    with TestClient(app) as client:
        assert [client.get("/search").json() for _ in range(5)] == [{"left": left} for left in (4, 3, 2, 1, 0)]
        clock.advance(20)
    with TestClient(app) as client:  # a restart
        refused = client.get("/search")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "40")
        assert client.get("/search", headers={"X-Api-Key": "k" * 5000}).json() == {"left": 4}
        clock.advance(40)
        assert client.get("/search").json() == {"left": 4}


def test_rate_limit_holds_for_concurrent_calls(tmp_path: Path) -> None:
    """Of 200 concurrent calls, exactly as many pass as the limit says."""
    with served(DOCS / "how-to" / "rate-limit.md", tmp_path) as (_, client), ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(lambda _: client.get("/search").status_code, range(200)))
    assert (statuses.count(200), statuses.count(429)) == (5, 195)


def test_lists_and_pages_show_each_user_once(application: Any) -> None:
    """Pages that follow each other show each user once, in order, although the last user of a page is deleted."""
    names = [f"user {number:02}" for number in range(25)]
    with TestClient(application("lists-and-pages")) as client:
        for name in (*names, "zoe"):
            assert client.put(f"/users/{name}", json={"age": 30}).status_code == 201
        shown: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = client.get("/users", params={"limit": 5, "search": "user", **after}).json()
            shown += page["users"]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
            assert client.delete(f"/users/{page['next']}").status_code == 204
        assert shown == names
        assert page == {"users": {}, "next": None, "of": 21}
        left = [*(name for name in names if name not in names[4::5]), "zoe"]
        assert client.get("/users/last", params={"limit": 3}).json() == left[:-4:-1]
        assert client.get("/users/last", params={"limit": 2, "before": left[-3]}).json() == left[-4:-6:-1]
        lines = [json.loads(line) for line in client.get("/export").text.splitlines()]
        assert lines == [{"name": name, "age": 30} for name in left]


def test_lists_and_pages_refuse_what_is_no_page(application: Any) -> None:
    """A limit out of bounds, and an `after` that is no valid key, are 422."""
    with TestClient(application("lists-and-pages")) as client:
        for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"after": "x" * 1025}):
            assert client.get("/users", params=wrong).status_code == 422


def test_lists_and_pages_keep_what_was_answered(tmp_path: Path) -> None:
    """After SIGKILL right behind its answer, a user is there, and the pages are those of before."""
    page = DOCS / "how-to" / "lists-and-pages.md"
    with served(page, tmp_path) as (_, client):
        for name in ("eve", "ann", "bob"):
            assert client.put(f"/users/{name}", json={}).status_code == 201
    with served(page, tmp_path) as (_, client):
        assert client.get("/users", params={"limit": 2}).json() == {
            "users": {"ann": {}, "bob": {}},
            "next": "bob",
            "of": 3,
        }
        assert client.get("/users", params={"limit": 2, "after": "bob"}).json()["users"] == {"eve": {}}


def test_sessions_live_as_long_as_they_are_used(application: Any, clock: ManualClock) -> None:
    """Each request lets a session live on, also one that changes it; after 30 minutes without one it is over."""
    with TestClient(application("sessions"), base_url="https://testserver") as client:
        assert client.get("/me").status_code == 401
        client.post("/login", json={"user": "ann"})
        for minutes in (29, 29):
            clock.advance(minutes * 60)
            assert client.get("/me").json()["user"] == "ann"
        clock.advance(29 * 60)
        assert client.post("/cart/apple").json() == ["apple"]
        clock.advance(29 * 60)
        assert client.get("/me").json() == {"user": "ann", "cart": ["apple"]}
        clock.advance(30 * 60)
        assert client.get("/me").status_code == 401


def test_sessions_answer_401_when_another_request_logs_out(application: Any) -> None:
    """A request whose session is deleted between its check and its use gets 401, not an error of the server."""
    app = application("sessions")
    app.dependency_overrides[sys.modules["recipe"].session] = lambda: "session/deleted"
    with TestClient(app) as client:
        assert client.get("/me").status_code == client.post("/cart/apple").status_code == 401


def test_sessions_survive_a_kill(tmp_path: Path) -> None:
    """After SIGKILL, who was logged in still is, and who was logged out still is; no concurrent change is lost."""
    page = DOCS / "how-to" / "sessions.md"

    def login(user: str) -> dict[str, str]:
        cookie = client.post("/login", json={"user": user}).headers["Set-Cookie"]
        client.cookies.clear()
        return {"Cookie": cookie.partition(";")[0]}

    with served(page, tmp_path) as (_, client):
        bob = login("bob")
        assert client.get("/me", headers=bob).status_code == 200
        assert client.post("/logout", headers=bob).status_code == 200
    with served(page, tmp_path) as (_, client):
        assert client.get("/me", headers=bob).status_code == 401
        ann = login("ann")
    with served(page, tmp_path) as (_, client), ThreadPoolExecutor(20) as pool:
        assert client.get("/me", headers=ann).json() == {"user": "ann", "cart": []}
        list(pool.map(lambda number: client.post(f"/cart/{number}", headers=ann), range(50)))
        assert sorted(client.get("/me", headers=ann).json()["cart"], key=int) == [str(number) for number in range(50)]
    token = ann["Cookie"].partition("=")[2]
    assert all(token not in file.read_text() for file in (tmp_path / "state").iterdir())


KILLED = """
import asyncio, os, sys
sys.path.insert(0, "")  # for `bot.py`, also where Python does not search the current directory
import bot

def killed():
    os._exit(9)

async def send(to, text):
    {before}
    print(f"to {{to}}: {{text}}", flush=True)
    {after}

async def at_a_durable_change():
    async with bot.state.watch(durable=True) as changes:
        await anext(changes)
        killed()

async def after(last, found=bot.chat.after):
    {start}
    async for message in found(last):
        yield message

bot.chat.send = send
bot.chat.after = after
bot.answer = {answer}
asyncio.run(bot.main())
"""
ALIVE = {"before": "pass", "after": "pass", "start": "pass", "answer": "bot.answer"}


@pytest.mark.parametrize(
    "case",
    [
        {"before": "killed()"},
        {"after": "killed()"},
        {"answer": "lambda user, text: killed()"},
        {"start": "asyncio.create_task(at_a_durable_change())"},
    ],
    ids=["before it sends", "after it sent", "in a transaction", "after a transaction"],
)
def test_bot_handles_each_message_once(case: dict[str, str], tmp_path: Path) -> None:
    """A bot that is killed at any step goes on: it counts each message once, and repeats at most one answer."""
    page = DOCS / "how-to" / "bot.md"
    (expected,) = OUTPUT.findall(page.read_text())
    saved(page, tmp_path)
    source = KILLED.format(**{**ALIVE, **case})
    killed = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stderr) == (9, "")
    sent = killed.stdout.splitlines()
    assert len(sent) <= 1
    assert list(dict.fromkeys([*sent, *run(tmp_path, "bot.py").splitlines()])) == expected.splitlines()
    assert run(tmp_path, "bot.py") == ""


async def test_backup_is_one_file_after_a_clean_stop(tmp_path: Path) -> None:
    """The file that the backup page copies with `cp` opens as the whole state, with the expiry times."""
    await asyncio.to_thread(run, tmp_path, saved(DOCS / "how-to" / "backup.md", tmp_path) + ".py")
    view = await read_state("shop", FileStorage(tmp_path))
    assert await view.get_all("stock/") == {"stock/apple": 12, "stock/pear": 3}
    assert (await view.expires_in("cart/ann") or 0) > 3000


def test_another_program_can_read_the_file_again(tmp_path: Path) -> None:
    """After a clean stop the other program's file is a JSON object with one more member; its first content is kept."""
    run(tmp_path, saved(DOCS / "coming-from" / "another-program.md", tmp_path) + ".py")
    content = json.loads((tmp_path / "state/modules/my-module.json").read_text())
    before = json.loads((tmp_path / "my-module.old.json").read_text())
    assert content.pop("$lab_state")
    assert content == {**{k: v for k, v in before.items() if k != "raw"}, "page": "a", "peers": ["n1", "n2", "n3"]}
