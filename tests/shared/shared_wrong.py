"""Wrong readings of the protocol, each with a scenario in which the search finds its fault."""

from __future__ import annotations

from shared_search import Scenario
from shared_world import Faults

ONE, TWO = (("incr",), ()), (("incr",), ("incr",))
READY = ("A connects", "A receives welcome", "A loads", "B connects", "B receives welcome", "B loads")
REFUSED = (*READY, "A calls", "B calls", "owner serves B", "owner serves A", "A receives no")
"""A's update was refused, with a value of B's that is not durable."""

FORGOTTEN = (
    *(*READY, "A calls", "owner serves A", "owner writes", "A is cut"),
    *("owner syncs", "a minute passes", "owner forgets A"),
)
"""A's call is durable, its answer is lost, and the owner has forgotten A."""

HELD = (
    *("B connects", "B receives welcome", "B loads", "A connects", "A receives welcome", "A loads", "A calls"),
    *("A is cut", "A sees the end", "A connects", "A receives welcome", "B calls", "owner serves B", "owner serves A"),
    *("A receives no", "owner dies", "A sees the end", "a new process takes the lock"),
)
"""A refusal came while A loaded, and then its connection ended."""

UNDER_WAY = (
    *(*READY, "A calls", "owner serves A", "owner writes", "A is cut"),
    *("A calls", "A sees the end", "a minute passes", "owner forgets A"),
)
"""A was forgotten while its call was being written, and has another call that was not sent."""

LEFT_BEHIND = ("B connects", "B receives welcome", "owner dies", "A takes the lock", "owner settles")

WRONG: dict[str, Scenario] = {
    "answers before the sync": Scenario(ONE, Faults()),
    "answers before the record": Scenario(ONE, Faults()),
    "feeds before the sync": Scenario(ONE, Faults()),
    "the owner reads its layer": Scenario((("incr", "incr"), ()), Faults(deaths=1)),
    "shows a load at once": Scenario(TWO, Faults()),
    "admits before it has settled": Scenario(ONE, Faults(deaths=1)),
    "an unchanged call is answered at once": Scenario((("add",), ("add",)), Faults()),
    "an unchanged call has the durable revision": Scenario((("add",), ("add",)), Faults()),
    "a record has no results": Scenario(ONE, Faults(deaths=1)),
    "a new owner skips the results of the tail": Scenario(ONE, Faults(deaths=1)),
    "a new owner does not look up its own calls": Scenario(ONE, Faults(deaths=1)),
    "a new owner keeps to its copy": Scenario(ONE, Faults(deaths=1)),
    "sends again with new numbers": Scenario(ONE, Faults(cuts=1)),
    "a repeat misses what is not durable": Scenario(ONE, Faults(cuts=1)),
    "a failed commit drops its results": Scenario(ONE, Faults(failures=1, cuts=1)),
    "a full frame lacks its own results": Scenario(ONE, Faults(failures=1, deaths=1)),
    "a full frame has newer changes": Scenario((("incr", "incr"), ()), Faults(failures=1, deaths=1)),
    "acknowledges what is open": Scenario((("incr", "incr"), ()), Faults(cuts=1)),
    "a snapshot has no results": Scenario(ONE, Faults(deaths=1, checkpoints=1)),
    "a snapshot has results that are not durable": Scenario(ONE, Faults(deaths=1, checkpoints=1)),
    "moves a call that it applied": Scenario(ONE, Faults(stops=1)),
    "serves a connection that ended": Scenario((("claim",), ()), Faults(cuts=1)),
    "a check misses what is not durable": Scenario((("claim",), ("add",)), Faults()),
    "a check misses what was not there": Scenario((("claim",), ("add",)), Faults()),
    "a new owner checks from 0": Scenario(
        (("claim",), ("add",)), Faults(deaths=1), (*READY, "B calls", "owner serves B", "owner writes")
    ),
    "sends a check again": Scenario((("update",), ("incr",)), Faults(deaths=1, joins=1), REFUSED),
    "a refusal counts on the next connection": Scenario(
        (("update", "add"), ("incr",)), Faults(deaths=1, joins=1), (*REFUSED, "owner dies")
    ),
    "a refusal counts for a call that was not sent": Scenario(
        (("update", "add"), ("incr",)), Faults(deaths=1, joins=1), (*REFUSED, "owner dies")
    ),
    "held answers outlive their connection": Scenario(
        (("update",), ("incr",)), Faults(deaths=1, joins=1, cuts=1, loads=2), HELD
    ),
    "a load outlives its connection": Scenario((("incr", "incr"), ("incr",)), Faults(deaths=1), LEFT_BEHIND),
    "admits a forgotten client": Scenario(TWO, Faults(cuts=1, minutes=1), FORGOTTEN),
    "answers go to a later connection": Scenario((("incr", "add"), ()), Faults(cuts=1, minutes=1), UNDER_WAY),
    "a new owner was not forgotten": Scenario(TWO, Faults(deaths=1, cuts=1, minutes=1), (*FORGOTTEN, "A sees the end")),
}
