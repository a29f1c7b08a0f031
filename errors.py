"""What can go wrong and be told in one line: the message says what, why, and what to do."""


class Error(Exception):
    """The base of our errors; `status` is what the process exits with."""

    status = 1


class UsageError(Error, ValueError):
    """Something asked for that cannot be done."""

    status = 2


def first_of(error: ValueError) -> str:
    """The first finding of a pydantic ValidationError in one line: which value, what it must be."""
    found = error.errors()[0]
    key = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return f"{key} is missing"
    try:
        value = f"{found['input']!r:.60}"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        value = "too long a number"
    return f"{key} is {value}: {found['msg']}"
