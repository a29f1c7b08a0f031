"""What can go wrong and be told in one line: the message says what, why, and what to do."""


class Error(Exception):
    """The base of our errors; `status` is what the process exits with."""

    status = 1


class UsageError(Error, ValueError):
    """Something asked for that cannot be done."""

    status = 2
