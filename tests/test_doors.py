"""Each door in a fresh interpreter: what it asks of the network, the terminal and the user."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL_NETWORK

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
MODULES = ["train", "utils", "networks", "fast.batched", "recipes"]
DOORS = [*MODULES, *(f"tools.{name}" for name in TOOLS)]

# Imports what is slow once, then each door in a fork that has seen nothing of Albumentations.
WATCH = """
import os, sys
import cv2, matplotlib.figure, sklearn.metrics, torch, torchvision
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "albumentations" and os.environ.get("NO_ALBUMENTATIONS_UPDATE") != "1":
            os._exit(7)
sys.meta_path.insert(0, Watch())
assert "albumentations" not in sys.modules
for door in sys.argv[1:]:
    if not (child := os.fork()):
        __import__(door)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(door, status)
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env=os.environ | environment,
    )  # fmt: skip


def test_no_door_lets_albumentations_ask_its_server():
    environment = {name: value for name, value in os.environ.items() if "ALBUMENT" not in name}
    result = subprocess.run(
        [sys.executable, "-c", WATCH, *DOORS],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


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
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    result = run(*door, "--help", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_is_answered_after_the_imports():
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "import cli; parser = cli.ArgumentParser(prog='x')\n"
        "sys.exit(cli.run(parser, lambda _: os.kill(os.getpid(), signal.SIGINT), []))"
    )
    result = run("-c", code)
    assert (result.returncode, result.stderr) == (130, "\nx: interrupted\n")


def test_a_terminal_without_the_character_is_no_error():
    code = (
        "import cli, sys; parser = cli.ArgumentParser(prog='x')\n"
        "sys.exit(cli.run(parser, lambda _: print('90.18 \\u00b1 0.21'), []))"
    )
    result = run("-c", code, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "90.18 ? 0.21\n")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_ends_no_training(closed, tmp_path):
    network = tmp_path / "small.py"
    network.write_text(SMALL_NETWORK)
    command = f'exec "$0" train.py --dry-run --model "$1" --epochs 1 --output-dir "$2" {closed}>&-'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, network, tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert "Epoch [1/1]" in (folder / "train.log").read_text()
