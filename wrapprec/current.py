"""Which scope each thread has open."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wrapprec.scope import Scope


class _Thread(threading.local):
    def __init__(self) -> None:
        # In the instance's own dict from the start: dynamo guards on whether it is there.
        self.scope: Scope | None = None


thread = _Thread()
"""The innermost scope that this thread has open."""
