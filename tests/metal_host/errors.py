"""Errors of the host runner."""


class HostError(RuntimeError):
    """The runner found a mistake in a kernel or in its call; the message starts with `<name>.metal:<line>` if known."""
