"""Each door: what it asks of the network, the terminal and the user; and its flags' limits."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cifar10
import cli
from support import flags
from tests import forked
from tests.conftest import SMALL_NETWORK, TRAIN_DRAWING_NOTHING, run_in

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
MODULES = ["train", "utils", "networks", "fast.batched", "recipes"]
DOORS = [*MODULES, *(f"tools.{name}" for name in TOOLS)]


class Watch:
    """Ends the process where Albumentations is imported: with 7 where it would ask its server."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "albumentations":
            os._exit(0 if os.environ.get("NO_ALBUMENTATIONS_UPDATE") == "1" else 7)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_no_door_lets_albumentations_ask_its_server(door, monkeypatch):
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE", raising=False)  # set by our own import

    def work() -> int:
        forked.forget("albumentations", *forked.OURS)
        sys.meta_path.insert(0, Watch())
        importlib.import_module(door)
        return 0

    assert forked.run(work) == (0, "", "")


def test_one_file_alone_imports_albumentations():
    importers = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if re.search(r"^(import|from) albumentations", path.read_text(), re.MULTILINE)
        and path.parent.name != "tests"
        and ".venv" not in path.parts
    ]
    assert importers == ["fast/batched.py"]


@pytest.mark.parametrize("door", [("train.py",), ("-m", "tools.compare")])
def test_ctrl_c_during_the_imports_shows_no_traceback(door, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        # As in a terminal: a suite in a script's background would hand down that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    result = run(*door, "--help", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_is_answered_after_the_imports():
    def work() -> int:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        parser = cli.ArgumentParser(prog="x")
        return cli.run(parser, lambda _: os.kill(os.getpid(), signal.SIGINT), [])

    assert forked.run(work) == (130, "", "\nx: interrupted\n")


def test_a_terminal_without_the_character_is_no_error():
    def work() -> int:
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
        parser = cli.ArgumentParser(prog="x")
        return cli.run(parser, lambda _: print("90.18 \u00b1 0.21"), [])

    assert forked.run(work) == (0, "90.18 ? 0.21\n", "")


def test_closed_streams_end_no_training(tmp_path):
    network = tmp_path / "small.py"
    network.write_text(SMALL_NETWORK)
    command = 'exec "$0" -c "$3" --dry-run --model "$1" --epochs 1 --output-dir "$2" >&- 2>&-'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, network, tmp_path / "out", TRAIN_DRAWING_NOTHING],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    folder = run_in(tmp_path / "out")
    assert "Epoch [1/1]" in (folder / "train.log").read_text()


# ---------------------------------------------------------------- the limits of the flags

FROM_ZERO, ABOVE_ZERO = ("0", "1e15"), ("1e-300", "1e15")  # of real numbers
SEED = (0, 2**32 - 1)
# Least and greatest of each flag that is a number; None: there is no greatest.
LIMITS = {
    "train": {
        "--epochs": (1, 10_000),
        "--batch-size": (1, None),
        "--lr": ABOVE_ZERO,
        "--weight-decay": FROM_ZERO,
        "--seed": SEED,
        "--workers": (0, 256),
        "--val-split": (1, None),
        "--download-timeout": ("0", "86400"),
    },
    "tools.answers": {
        "--views": (1, 9999),
        "--epochs": (1, 10_000),
        "--batch-size": (1, None),
        "--lr": ABOVE_ZERO,
        "--weight-decay": FROM_ZERO,
        "--seed": SEED,
        "--workers": (0, 256),
        "--val-split": (1, None),
        "--download-timeout": ("0", "86400"),
    },
    "tools.export": {"--calibration-images": (1, 5000)},
    "tools.bench": {"--images": (256, 1_000_000), "--repetitions": (1, 100)},
    "tools.find_lr": {
        "--low": ABOVE_ZERO,
        "--high": ABOVE_ZERO,
        "--steps": (20, 100_000),
        "--seed": SEED,
    },
    "tools.minutes": {"--target": ABOVE_ZERO},
    "tools.search": {
        "--epochs": (1, 10_000),
        "--seeds": (1, 1000),
        "--trials": (1, 100_000),
        "--val-split": (1, None),
        "--jobs": (1, 256),
    },
    "tools.usual": {"--epochs": (1, 10_000), "--until": ABOVE_ZERO, "--seed": SEED},
}
FLAGS = [(door, flag, *ends) for door, named in LIMITS.items() for flag, ends in named.items()]


def parser_of(door: str, monkeypatch) -> argparse.ArgumentParser:
    """The command line of a door, whose positional arguments may be left out here."""
    found = []
    monkeypatch.setattr(cli, "run", lambda parser, *_: found.append(parser) or 0)
    importlib.import_module(door).main([])
    for action in found[0]._actions:
        action.required = False
    return found[0]


# Of other tools.
PARTS = (
    "corruptions", "explain", "exported", "findings", "first_convolution", "pictures", "studies",
    "to_onnx", "trials", "ways",
)  # fmt: skip
COMMANDS = ["train", *(f"tools.{name}" for name in TOOLS if name not in PARTS)]


@pytest.mark.parametrize("door", COMMANDS)
def test_every_flag_that_is_a_number_has_its_limits_tested(door, monkeypatch):
    parser, makers = parser_of(door, monkeypatch), ("whole_number.", "real_number.")
    numbers = {
        action.option_strings[0]
        for action in parser._actions
        if getattr(action.type, "__qualname__", "").startswith(makers)
        or action.type in (int, float)
    }
    assert numbers == set(LIMITS.get(door, {}))


@pytest.mark.parametrize(("door", "flag", "least", "greatest"), FLAGS)
def test_a_flag_takes_its_limits_and_nothing_beyond(door, flag, least, greatest, monkeypatch):
    parser = parser_of(door, monkeypatch)
    whole = isinstance(least, int)
    for good in (least, 10**18 if greatest is None else greatest):
        found = getattr(parser.parse_args([f"{flag}={good}"]), flag[2:].replace("-", "_"))
        assert found == (good if whole else float(good))
        assert isinstance(found, int if whole else float)
    beyond = [least - 1, "1.5"] if whole else ["0" if float(least) else "-1e-300", "nan", "inf"]
    if greatest is not None:
        beyond.append(greatest + 1 if whole else "1.0000001e15")
    for bad in [*beyond, "", "x"]:
        with pytest.raises(cli.UsageError) as caught:
            parser.parse_args([f"{flag}={bad}"])
        message = str(caught.value)
        assert message.startswith(f"argument {flag}: {str(bad)!r} is not a ")
        assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "seconds"),
    [([], 60.0), (["--download-timeout", "7.5"], 7.5), (["--download-timeout", "0"], 0.0)],
)
def test_the_download_is_told_how_long_it_may_take(given, seconds, monkeypatch):
    asked = []
    monkeypatch.setattr(cifar10, "load_cifar10", lambda *each: asked.append(each))
    cli.load_data(flags.parser().parse_args(["--data-dir", "there", *given]))
    assert asked == [("there", seconds)]
