"""The rules by which several processes of one machine share a state: messages, results, checks, open calls.

`docs/design/shared.md` describes the protocol. Nothing here opens a socket. Only `_owner_flusher` awaits
anything; the other modules are pure and synchronous. No manager shares a state yet: so far the other packages
use only `_results`.
"""
