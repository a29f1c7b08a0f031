"""Pages of runs that have none, or older ones: report.html in each, index.html beside them.

    python -m tools.report                              # every run in output/
    python -m tools.report output/reference/model_2     # one run, finished or not

A folder that holds no run, or a damaged one, is told of in a line after the others are written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
import reports
import runs
from support.files import write_file


def work(args: argparse.Namespace) -> None:
    """Writes the pages of all runs that can be read; then tells of the others."""
    problems, folders = [], {}
    for folder in args.runs:
        alone = (folder / runs.Run.SETTINGS).is_file()
        found = [folder] if alone else [p.parent for p in folder.glob("*/" + runs.Run.SETTINGS)]
        if not found:
            problems.append(f"{folder} holds no run (a folder with {runs.Run.SETTINGS})")
        folders |= dict.fromkeys(sorted(found))
    for folder in folders:
        try:
            print(write_file(folder / reports.PAGE, reports.page(folder)))
        except (cli.UsageError, OSError) as error:
            problems.append(str(error))
    for parent in dict.fromkeys(folder.absolute().parent for folder in folders):
        try:
            print(reports.update_index(parent))
        except OSError as error:
            problems.append(str(error))
    if problems:
        raise cli.UsageError("; ".join(problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.report", description=__doc__.splitlines()[0])
    told, default = "runs or their folders (output)", [Path("output")]
    parser.add_argument("runs", nargs="*", type=Path, default=default, help=told)
    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
