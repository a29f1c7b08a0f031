"""Processes forked from the tests' own: as new ones, but PyTorch is not imported once more.

They take no other thread along, so what they do may not wait for one. None outlives its alarm.
"""

import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
LONGEST = 100  # seconds, less than a test may take
OURS = {*(path.stem for path in ROOT.glob("*.py")), "fast", "support", "tools"}

Work = Callable[[], int | None]


class Ended(NamedTuple):
    """A process that ended: its status (below 0: killed by that signal), and what it printed."""

    status: int
    out: str
    err: str


def end_in_time() -> None:
    """In the forked process: the end, wherever it may hang."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the tests' own
    signal.alarm(LONGEST)


def become(work: Work) -> NoReturn:
    """In the forked process: does the work on the descriptors 0, 1 and 2, and ends with its status.

    Without the exit handlers, which are the tests' own.
    """
    status = 1
    try:
        end_in_time()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            status = work() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fork(work: Work, stdin: int, stdout: int, stderr: int) -> int:
    """Forks a process, in a group of its own, with these descriptors; returns its number."""
    sys.stdout.flush()
    if number := os.fork():
        # Both make the group, whoever comes first: a kill may strike before the new process has
        # run at all.
        os.setpgid(number, number)
        return number
    try:
        os.setpgid(0, 0)
        for own, given in enumerate((stdin, stdout, stderr)):
            os.dup2(given, own)
    except BaseException:
        os._exit(99)
    become(work)


def status_of(process: int) -> int:
    """The exit status of the process, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(work: Work, text: str = "") -> Ended:
    """Runs the work in a process that has the text on a pipe for its standard input."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())  # less than a pipe holds
    os.close(writing)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = fork(work, reading, out.fileno(), err.fileno())
        os.close(reading)
        status = status_of(process)
        out.seek(0)
        err.seek(0)
        return Ended(status, out.read(), err.read())


def command(*arguments: object) -> Work:
    """The work of `python FILE ...` at the root of the repository, whose files it reads anew."""

    def work() -> None:
        forget(*OURS)
        os.chdir(ROOT)
        sys.argv = [str(argument) for argument in arguments]
        folder = ROOT.joinpath(sys.argv[0]).parent
        sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return work


def forget(*packages: str) -> None:
    """Makes them be imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
