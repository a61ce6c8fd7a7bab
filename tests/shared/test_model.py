"""The protocol of docs/design/shared.md, as a model: every order of its steps, and wrong readings that are found."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from shared_owners import Model
from shared_search import Scenario, search
from shared_world import Faults, Violation, start
from shared_wrong import WRONG

SCENARIOS = {
    "two clients and three owners": Scenario((("incr",), ("incr",)), Faults(deaths=2, joins=1)),
    "a client acknowledges": Scenario((("incr", "add"), ("add",)), Faults(deaths=1)),
    "checks and two deaths": Scenario((("claim",), ("update",)), Faults(deaths=2)),
    "a failed commit, a cut and a death": Scenario((("incr",), ()), Faults(deaths=1, failures=1, cuts=1)),
    "two failed commits": Scenario((("add",), ("claim",)), Faults(failures=2, cuts=1)),
    "a checkpoint and a death": Scenario((("incr",), ("add",)), Faults(deaths=1, checkpoints=1)),
    "a minute and a death": Scenario((("incr",), ()), Faults(deaths=1, cuts=1, minutes=1)),
    "a planned end and a load": Scenario((("incr",), ("add",)), Faults(stops=1, loads=1)),
    "a call is given up": Scenario((("incr", "incr"), ()), Faults(deaths=1, given_up=1)),
}

DEEP = {
    "two clients, three owners, two calls": Scenario((("incr", "add"), ("update",)), Faults(deaths=2, joins=1)),
    "checks, a cut and a death": Scenario((("claim", "incr"), ("update",)), Faults(deaths=1, cuts=1, joins=1)),
    "a failed commit, a cut, two deaths": Scenario((("incr", "add"), ("add",)), Faults(deaths=2, failures=1, cuts=1)),
    "a failed commit, a checkpoint, a death": Scenario(
        (("incr", "update"), ("claim",)), Faults(deaths=1, failures=1, checkpoints=1, joins=1)
    ),
    "a minute, a cut, two deaths": Scenario((("incr", "add"), ("update",)), Faults(deaths=2, cuts=1, minutes=1)),
    "a planned end, a load and a death": Scenario(
        (("incr", "update"), ("claim",)), Faults(deaths=1, stops=1, loads=1, joins=1)
    ),
}
MOST = int(os.environ.get("LAB_STATE_SHARED_WORLDS", "0"))
"""How many worlds of each deep scenario are visited. It is set by `nox -s shared`."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_protocol_holds_in_every_order(name: str) -> None:
    """No order of steps in a scenario breaks a promise of the protocol, and each order comes to an end."""
    found = search(SCENARIOS[name])
    assert found.violation is None, found
    assert found.worlds > 500


@pytest.mark.parametrize("name", DEEP)
def test_the_protocol_holds_in_deep_scenarios(name: str) -> None:
    """Neither does one of the first worlds of a deep scenario; without the setting of `nox -s shared`, of the first 500."""
    found = search(DEEP[name], most=MOST or 500)
    assert found.violation is None, found
    assert found.worlds >= 500
    print(f"{name}: {found.worlds} worlds")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reading_is_found(wrong: str) -> None:
    """A search finds what a wrong reading of the protocol breaks."""
    found = search(WRONG[wrong], wrong)
    assert found.violation is not None


@pytest.mark.parametrize("wrong", WRONG)
def test_the_scenario_of_a_wrong_reading_is_sound(wrong: str) -> None:
    """In the same scenario, the protocol itself breaks nothing in the first worlds: the wrong reading is at fault."""
    assert search(WRONG[wrong], most=2000).violation is None


def test_each_wrong_reading_has_a_scenario() -> None:
    """The list has each wrong reading that the model knows, and there are more than fifteen."""
    sources = [Path(__file__).with_name(f"shared_{name}.py").read_text() for name in ("clients", "owners")]
    named = set(re.findall(r'wrong [!=]= "([^"]+)"', "".join(sources)))
    assert named == set(WRONG)
    assert len(named) >= 15


def test_a_call_that_hangs_is_noticed() -> None:
    """A world in which a call is open, and no step is left, is a violation."""
    model = Model()
    world = start((("incr",),), Faults())
    for step in ("A connects", "A receives welcome", "A loads", "A calls"):
        world = dict(model.steps(world))[step]
    conn = world.clients[0].conn
    assert conn is not None
    stuck = world._replace(clients=(world.clients[0]._replace(conn=conn._replace(up=())),))
    with pytest.raises(Violation, match="hangs"):
        list(model.steps(stuck))
