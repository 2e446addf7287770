"""One module a device type: what it can do, what it does fast, and the only place that names it."""

ABSENT = (RuntimeError, TypeError, AssertionError, ImportError)
"""What torch raises for a device that is not there, or that cannot compute in a dtype."""
