"""A state that several processes of one machine share: roles, connections, messages, calls and their results.

`docs/design/shared.md` describes the protocol. A manager with `Config(shared=True)` creates a `Member` (`_member.py`), which is the
entry point.
"""
