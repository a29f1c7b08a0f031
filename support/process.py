"""What surrounds a command line: signals that end it in good order, its streams, its cores."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator


class Interruption(KeyboardInterrupt):
    """Ctrl-C, or the system's wish that the process ends; `status` is what it exits with."""

    def __init__(self, number: int) -> None:
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        self.status = 128 + number  # as shells report it


def _interrupt(number: int, _frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: what is done is being saved now
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):  # it may have ended the DataLoader's workers, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Interruption(number)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM raise an Interruption, once, and no stream ends the work."""
    _prepare_streams()
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread, which has no signals
                before[number] = signal.signal(number, _interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Streams that are closed, or know few characters, end no work."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: without this, the next file would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def usable_cores() -> int:
    """The cores that this process may use; all of the machine's where the system does not say."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def line_of_model_file(error: BaseException) -> str | None:
    """Where in a model file the error arose, if in one: whatever somebody's network may raise."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_globals.get("RECIPE"), dict):
            return f"{frame.f_code.co_filename}, line {line}"
    return None
