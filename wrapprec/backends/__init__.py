"""One module a device type: what it can do, what it does fast, and the only place that names it."""
