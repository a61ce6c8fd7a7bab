"""The rules by which several processes of one machine share a state: messages, results, checks, open calls.

`docs/design/shared.md` describes the protocol. Everything here is pure and synchronous: it opens no socket
and awaits nothing. No manager uses it yet.
"""
