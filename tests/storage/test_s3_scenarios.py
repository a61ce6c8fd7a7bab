"""Two and three writers of one state, behind proxies with faults: nothing acknowledged is lost, no writer is fenced falsely.

And with a bug put into the storage, the same scenarios fail.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import s3_scenarios
from s3_world import Bucket, endpoint, session_of_all
from seeded import Change, put_in

from lab_state import UnavailableError
from lab_state.storage.s3 import _open, _outcomes
from lab_state.storage.s3._open import Loader
from lab_state.storage.s3._session import S3Session

ORDINARY = 40
SCENARIOS = int(os.environ.get("LAB_STATE_TEST_S3_SCENARIOS", ORDINARY))
"""How many; more with `nox -s s3-scenarios`."""

BLOCK = 20


# What a writer that died was spooling is found by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    session_of_all()  # made outside the event loop, for it reads files
    caplog.set_level(logging.CRITICAL, "lab_state")
    yield
    gc.collect()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SCENARIOS, BLOCK))
async def test_scenarios(first: int) -> None:
    """No acknowledged change is lost, no number goes back, and no writer is told falsely that it is deposed."""
    seeds = range(first, min(first + BLOCK, SCENARIOS))
    outcome = await s3_scenarios.play(seeds, Bucket().name, endpoint())
    assert not outcome.problems, s3_scenarios.told(outcome)
    assert outcome.counted["scenarios"] == len(seeds)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("history", ["conditions", "bytes"])
@pytest.mark.parametrize("first", range(0, SCENARIOS // 10, BLOCK // 2))
async def test_scenarios_with_a_history(first: int, history: s3_scenarios.History) -> None:
    """The same holds with a history. Each copy is the snapshot that its key names, and the records lead from it to the state."""
    seeds = range(first, min(first + BLOCK // 2, SCENARIOS // 10))
    outcome = await s3_scenarios.play(seeds, Bucket().name, endpoint(), history=history)
    assert not outcome.problems, s3_scenarios.told(outcome)
    assert outcome.counted["copies"]


# A harness that passes everything proves nothing

SOONER = (1, 2, 5, 19, 35, 37, 43, 51, 77, 105, 108, 166)
"""Scenarios in which some bug showed; they come first."""

BUGS: dict[str, list[Change]] = {
    "fences are deleted with the records": [
        (S3Session, "_clean_pages", "if size and number <= covered", "if number <= covered"),
    ],
    "the write id is not looked at after a refusal": [
        (_outcomes, "after_look", "if found is not None and", "if answer is not Verdict.REFUSED and found is not None and"),
    ],
    "a record of unknown outcome counts as failed, and its number is used for another": [
        (S3Session, "_send_until_known", "        except NotOursError as refused:", "        except UnavailableError:\n            self._pending = None\n            raise\n        except NotOursError as refused:"),
    ],
    "a record of unknown outcome is packed anew under the next number": [
        (S3Session, "_send_until_known", "        except NotOursError as refused:", "        except UnavailableError:\n            self._pending, self._seq = None, number\n            raise\n        except NotOursError as refused:"),
    ],
    "a record of unknown outcome counts as committed": [
        (S3Session, "_send_until_known", "        except NotOursError as refused:", "        except UnavailableError:\n            pass\n        except NotOursError as refused:"),
    ],
    "a checkpoint is not conditional": [
        (S3Session, "_replace", "        for _ in range(_MOST_REFUSALS):\n", "        for _ in range(_MOST_REFUSALS):\n            there = await self._store.head(self._names.snapshot)\n            self._etag = None if there is None else there.etag\n"),
    ],
    "a newer writer's snapshot is overwritten": [
        (S3Session, "_replace", "elif there.fence > self._fence:", "elif False:"),
        (S3Session, "_replace", "there.fence == self._fence and there.seq >= stamp.seq", "False"),
    ],
    "what was committed beside a checkpoint is deleted with what it covers": [
        (S3Session, "_publish", "await self._clean(covered, own)", "await self._clean(self._seq, own)"),
    ],
    "what a snapshot covers is deleted before it is in place": [
        (S3Session, "_publish", "        try:\n", "        await self._clean(stamp.seq, [])\n        try:\n"),
    ],
    "a snapshot of unknown outcome counts as in place": [
        (S3Session, "_replace", "            except NotOursError as refused:", "            except UnavailableError:\n                return stamp.seq\n            except NotOursError as refused:"),
    ],
    "a gap is not noticed while loading": [
        (_open, "gap", "if len(listed) == end - covered", "if len(listed) <= end - covered"),
        (_open, "fetch", "            if gone or got is None:\n                gone = True\n                return", "            if got is None:\n                continue"),
        (Loader, "_look", "        if self._looked:\n", "        if self._looked:\n            return\n"),
    ],
    "the snapshot is not looked at again behind the fence": [
        (Loader, "_look", "        if self._looked:\n", "        if self._looked:\n            return\n"),
    ],
    "a fence at a number that was used and deleted counts": [
        (Loader, "_load", "covered >= fence or ", ""),
        (_open, "gap", "if len(listed) == end - covered", "if covered >= end or len(listed) == end - covered"),
    ],
    "a fence is created at the next number without looking again": [
        (_open, "_fence", "    except NotOursError:\n        return None\n", "    except NotOursError:\n        return fence + 1\n"),
    ],
}  # fmt: skip


# They take minutes: for `nox -s s3-scenarios`.
BUGS_PLAYED = BUGS if SCENARIOS > ORDINARY else dict.fromkeys(["the write id is not looked at after a refusal"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS_PLAYED)
async def test_bugs_are_caught(bug: str) -> None:
    """With a bug in the storage, some scenario of the first 200 fails."""
    with put_in(BUGS[bug], {"UnavailableError": UnavailableError}):
        seeds = [*SOONER, *(seed for seed in range(200) if seed not in SOONER)]
        outcome = await s3_scenarios.play(seeds, Bucket().name, endpoint(), stop=True)
    assert outcome.problems


BUGS_OF_A_HISTORY: dict[str, list[Change]] = {
    "the snapshot is replaced before it is copied": [
        (S3Session, "_publish", "            if self._keeper", "            covered = await self._replace(body, stamp)\n            if self._keeper"),
        (S3Session, "_publish", "self.snapshot_bytes)\n            covered = await self._replace(body, stamp)\n", "self.snapshot_bytes)\n"),
    ],
    "the records of a history are deleted at a checkpoint": [(S3Session, "_clean", "if self._keeper is not None:", "if False:")],
    "a copy has the number of the next snapshot": [(S3Session, "_publish", "keep(self._etag, self._covered,", "keep(self._etag, stamp.seq,")],
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS_OF_A_HISTORY if SCENARIOS > ORDINARY else [*BUGS_OF_A_HISTORY][:1])
async def test_bugs_of_a_history_are_caught(bug: str) -> None:
    """With a bug in the history, some scenario of the first 20 fails."""
    with put_in(BUGS_OF_A_HISTORY[bug]):
        outcome = await s3_scenarios.play(range(20), Bucket().name, endpoint(), at_once=1, stop=True, history="bytes")
    assert outcome.problems
