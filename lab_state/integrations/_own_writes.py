"""The revisions of a client's own writes in the headers of requests and responses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lab_state.integrations._lifespan import NO_LIFESPAN, Served
from lab_state.manager import Manager

HEADER = b"lab-state-revision"
"""The header of a request and of a response: `visits=42, orders=7`."""

COOKIE = b"lab_state-"
"""The name of a cookie, without the name of its state. The value is the revision."""

MAX_AGE = 600
"""The lifetime of a cookie, in seconds. Each worker has the change long before the cookie expires."""

_MOST_DIGITS = 19

Headers = Iterable[tuple[bytes, bytes]]
"""The headers of an ASGI message."""


def revisions_of(headers: Headers, names: Collection[str]) -> dict[str, int]:
    """Return the revisions that a client sends, by the name of the state.

    A client may send anything, in cookies and in the header. Only numbers of up to 19 digits count. If there are several
    such numbers for one state, the highest number counts.

    Args:
        headers: The headers of the request.
        names: The names of the states.
    """
    found: dict[str, int] = {}
    for header, value in headers:
        if header == b"cookie":
            parts, prefix = value.split(b";"), COOKIE
        elif header == HEADER:
            parts, prefix = value.split(b","), b""
        else:
            continue
        for part in parts:
            key, _, digits = part.strip().partition(b"=")
            name = key.removeprefix(prefix).decode("latin-1")
            if key.startswith(prefix) and name in names and digits.isdigit() and len(digits) <= _MOST_DIGITS:
                found[name] = max(found.get(name, 0), int(digits))
    return found


def headers_for(
    written: Mapping[str, int], sent: Mapping[str, int], *, cookie: bool, secure: bool
) -> list[tuple[bytes, bytes]]:
    """Return the headers that send revisions to a client. If nothing was written, there are no headers.

    Args:
        written: The new revisions by the name of the state.
        sent: The revisions that the client has sent. They are repeated in `HEADER`, because a client keeps only its last value.
        cookie: Whether the revisions are sent as cookies, too.
        secure: Whether the request came over HTTPS.
    """
    if not written:
        return []
    known = {**written, **{name: revision for name, revision in sent.items() if name not in written}}
    headers = [(HEADER, ", ".join(f"{name}={revision}" for name, revision in known.items()).encode())]
    if cookie:
        attributes = b"; Path=/; Max-Age=%d; HttpOnly; SameSite=Lax%b" % (MAX_AGE, b"; Secure" if secure else b"")
        headers += [
            (b"set-cookie", b"%b%b=%d%b" % (COOKIE, name.encode(), revision, attributes))
            for name, revision in written.items()
        ]
    return headers


def shared_states(served: Mapping[str, Served] | None) -> dict[str, Manager]:
    """Return the managers of shared states, by name.

    Raises:
        LookupError: The application's lifespan does not run.
    """
    if served is None:
        raise LookupError(NO_LIFESPAN)
    return {name: one for name, one in served.items() if isinstance(one, Manager) and one.config.shared}


async def reached(states: Mapping[str, Manager], sent: Mapping[str, int]) -> dict[str, int]:
    """Wait until this process has revisions that a client has sent. Return the revisions that it has.

    A revision is durable before any client gets it. So this process has each such revision when `catch_up` returns. If this
    process does not have the number after that, the number is not a revision of this state: the client has invented the
    number, or the state was deleted or restored.

    Args:
        states: The managers by the name of the state.
        sent: The revisions by the name of the state, which is one of `states`.

    Raises:
        UnavailableError: There was no sign of life of an owner for `Config.owner_timeout` seconds.
        LabStateError: This process has lost its state; see `Manager.catch_up`.
        ClosedError: The manager is not running.
    """
    for name, revision in sent.items():
        if revision > states[name].revision:
            await states[name].catch_up()
    return {name: revision for name, revision in sent.items() if revision <= states[name].revision}
