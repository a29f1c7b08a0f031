"""What can go wrong and be told in one line: the message says what, why, and what to do."""


class Error(Exception):
    """The base of our errors; `status` is what the process exits with."""

    status = 1


class UsageError(Error, ValueError):
    """Something asked for that cannot be done."""

    status = 2


def first_of(error: ValueError) -> str:
    """The first finding of a pydantic ValidationError in one line: which value, what it must be."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    found = min(error.errors(), key=lambda each: each["type"] not in unknown)
    key = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return f"{key} is missing"
    if found["type"] in unknown:
        return f"{key} is unknown"
    return f"{key} is {found['input']!r:.60}: {found['msg']}"
