"""What reading JSON raises where another program, or damage, may have written it."""

from __future__ import annotations

from typing import Final

import msgspec

NOT_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""No JSON, JSON of another shape, no UTF-8, and nesting deeper than the parser goes."""
