"""The rules by which several processes of one machine share a state: messages, results, checks, open calls, connections.

`docs/design/shared.md` describes the protocol. `_channel` and `_server` use sockets, which others open.
`_owner_flusher` awaits a storage. The other modules are pure and synchronous. No manager shares a state yet: so far the other packages
use only `_results`.
"""
