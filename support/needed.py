"""Packages that few need: a line says what to install where they are missing."""

import contextlib
from collections.abc import Iterator

from errors import UsageError


class NotInstalledError(UsageError):
    """Packages of a requirements file of their own."""


@contextlib.contextmanager
def needed(by: str, requirements: str) -> Iterator[None]:
    """Imports within it that may fail.

    Raises:
        NotInstalledError: says who needs what, and the file to install.
    """
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(
            f"{by} needs {error.name or error}; pip install -r {requirements}"
        ) from None
