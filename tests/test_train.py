"""train.py as its users meet it: questions, refusals, and whole runs on the sample images."""

import csv
import hashlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

import cifar10
import model_2
import networks
import train
import utils
from errors import UsageError
from model_2 import CNN_Model_2
from support import flags
from tests import forked
from tests.conftest import SMALL_NETWORK, call_main, run_in

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).parents[1]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `python train.py ARGUMENTS`."""
    return call_main(train.main, capsys, arguments)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "'0' is not a whole number from 1 to 10000"),
        ("--epochs -1", "'-1' is not a whole number from 1 to 10000"),
        ("--epochs 1.5", "'1.5' is not a whole number"),
        ("--epochs ten", "'ten' is not a whole number"),
        ("--batch-size 0", "'0' is not a whole number from 1 up"),
        ("--lr -0.1", "'-0.1' is not a number above 0"),
        ("--lr inf", "'inf' is not a number above 0"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--weight-decay -1", "'-1' is not a number from 0 up"),
        ("--workers -1", "'-1' is not a whole number from 0"),
        ("--seed x", "'x' is not a whole number from 0"),
        ("--val-split 0", "'0' is not a whole number from 1 up"),
        ("--set lr", "'lr' is not KEY=VALUE"),
        ("--model 2 --dry-run --set size=3", "recipe: size is unknown; known are optimizer, lr, "),
        ("--model 2 --dry-run --set lr={[]:1}", "recipe: lr is '{[]:1}': Input should be a valid"),
        ("--model 2 --dry-run --set augment=2", "recipe: augment is 2: Input should be less"),
        ("--model 2 --dry-run --set optimizer=lion", "optimizer is 'lion': Input should be 'muon'"),
        ("--model 3 --dry-run --set dropout=5", "dropout 5 makes a probability of 1"),
        ("--recipe best", "invalid choice: 'best'"),
        ("--model 4 --dry-run", "'4' is neither 1, 2 or 3 nor the path of a model file"),
        ("--model nowhere.py --dry-run", "'nowhere.py' is neither"),
        ("--model 2 --dry-run --device tpu", "no device 'tpu' here; this machine has: "),
        ("--model 2 --dry-run --batch-size 1001", "give --batch-size a number from 1 to 1000"),
        ("--model 2 --dry-run --set batch_size=5000", "give --batch-size a number from 1 to 1000"),
        ("--model 2 --dry-run --val-split 1000", "--val-split 1000 is too large"),
        ("--model", "argument --model: expected one argument"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, capsys, tmp_path):
    status, _, error = call(capsys, "--output-dir", str(tmp_path / "out"), *arguments.split())
    assert status == 2
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_data_to_be_had_is_an_error_with_advice(capsys, tmp_path, no_network):
    data, out = str(tmp_path / "d"), str(tmp_path / "o")
    status, _, error = call(
        capsys, "--model", "2", "--epochs", "1", "--data-dir", data, "--output-dir", out
    )
    assert status == 1
    assert "CIFAR-10 could not be had" in error
    assert not (tmp_path / "o").exists()


def test_an_output_folder_that_cannot_be_made_is_one_clear_line(capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    status, _, error = call(
        capsys, "--model", "2", "--dry-run", "--output-dir", str(tmp_path / "out")
    )
    assert status == 1
    assert str(tmp_path / "out") in error
    assert error.count("\n") == 1


RECIPE = (ROOT / "model_2.py").read_text().split("RECIPE = ")[1].split("}\n")[0] + "}\n"
NET = """
class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = Block(3, width)
        self.linear = torch.nn.Linear(width, 10)
    def forward(self, x):
        return self.linear(self.body(x).mean(dim=(2, 3)))
"""
BLOCK = """
class Block(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, 3, stride=2)
    def forward(self, x):
        return self.conv(x).relu()
"""
WHOLE = f"import torch\n{BLOCK}{NET}\nRECIPE = {RECIPE}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = = 1", "cannot be run: SyntaxError"),
        ("import no_such_package", "cannot be run: line 1: ModuleNotFoundError"),
        (f"RECIPE = {RECIPE}", "must define one network .* found: none"),
        (WHOLE + NET.replace("class Net", "class Net2"), "must define one .* found: Net, Net2"),
        (WHOLE.split("RECIPE")[0], "has no RECIPE"),
        (WHOLE.replace('"lr"', '"learning_rate"'), "RECIPE: learning_rate is unknown"),
        (
            WHOLE.replace('"lr": ', '"lr": -'),
            f"RECIPE: lr is -{model_2.RECIPE['lr']}: Input should be greater than 0",
        ),
        (WHOLE + "RECIPE[1] = 2\n", "RECIPE: 1 is unknown; known are optimizer"),
        (WHOLE + "PUBLISHED = 3\n", "PUBLISHED: it is no dictionary"),
        (WHOLE + "PUBLISHED = {}\n", "PUBLISHED: optimizer is missing"),
        (WHOLE.replace("(width, 10)", "(width, 7)"), r"turns 2 images into \(2, 7\)"),
        (WHOLE.replace("dim=(2, 3)", "dim=2"), r"Net fails on images|turns 2 images"),
    ],
)
def test_a_model_file_that_cannot_be_used_is_refused(text, message, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        networks.load_network(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_a_model_file_of_ones_own_trains(capsys, tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(WHOLE)
    arguments = ["--model", str(path), "--dry-run", "--output-dir", str(tmp_path)]
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    assert "Net, 314 parameters" in out
    assert len(list(tmp_path.glob("*-my_net/last.pt"))) == 1
    status, _, error = call(capsys, *arguments, "--recipe", "published")
    assert status == 2
    assert "my_net has no PUBLISHED recipe" in error


@pytest.mark.parametrize("model", ["1", "2", "3"])
def test_recipes_as_published(model):
    """AdamW, batch 2048: the learning rates and schedules of the published projects."""
    network = networks.load_network(model)
    known = {"1": (0.01, "cosine"), "2": (0.01, "onecycle"), "3": (0.015, "cosine")}
    assert (network.published.lr, network.published.schedule) == known[model]
    assert (network.published.optimizer, network.published.batch_size) == ("adamw", 2048)
    assert network.published.augmentation(20) == network.published.augmentation(100) == 0.5
    for recipe in (network.recipe, network.published):
        assert recipe.target_accuracy == 85.0
        assert recipe.target_epochs == {"1": 60, "2": 70, "3": 75}[model]


def test_the_published_recipe_and_single_keys_of_a_recipe_can_be_asked_for(capsys, tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(f"{WHOLE}\nPUBLISHED = {model_2.PUBLISHED}\n")
    arguments = "--dry-run --recipe published --set label_smoothing=0.2 --set optimizer=sgd"
    given = ["--model", str(path), *arguments.split(), "--output-dir", str(tmp_path / "out")]
    assert call(capsys, *given)[0] == 0
    folder = run_in(tmp_path / "out")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["recipe_name"] == "published"
    published = networks.load_network("2").published
    changed = {"label_smoothing": 0.2, "optimizer": "sgd", "batch_size": 1000}
    assert settings["recipe"] == asdict(published) | changed
    assert settings["augmentation"] == 0.5


def test_a_network_is_distilled_from_another_run_s(capsys, tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(WHOLE)
    arguments = ["--model", str(path), "--dry-run", "--output-dir"]
    assert call(capsys, *arguments, str(tmp_path / "teacher"))[0] == 0
    teacher = run_in(tmp_path / "teacher")
    taught = [*arguments, str(tmp_path / "out"), "--set", f"teacher={teacher}"]
    status, _, error = call(capsys, *taught)
    assert status == 0, error
    folder = run_in(tmp_path / "out")
    settings = json.loads((folder / "settings.json").read_text())
    digest = hashlib.sha256((teacher / "weights.pt").read_bytes()).hexdigest()
    assert settings["recipe"]["teacher"] == str(teacher)
    assert settings["teacher"] == {"network": "Net", "weights_sha256": digest}
    ours, theirs = (
        torch.load(run / "weights.pt", weights_only=True)["linear.weight"]
        for run in (folder, teacher)
    )
    assert not torch.equal(ours, theirs)  # the same seed, other targets

    status, _, error = call(capsys, *taught, "--val-split", "100")
    assert status == 2
    assert "was trained with --val-split None, this run has 100" in error
    status, _, error = call(capsys, *taught, "--set", f"teacher={tmp_path}/nobody")
    assert status == 2
    assert f"{tmp_path}/nobody is not there; give a run's folder" in error
    with pytest.raises(UsageError, match="is a dry run's; give one of CIFAR-10"):
        networks.load_teacher(str(teacher), path, None, utils.Device.pick("cpu"))


def test_a_teacher_of_this_repository_is_known_by_its_name(monkeypatch, tmp_path):
    """But what lies in the folder of the user, or of the repository, comes first."""
    monkeypatch.chdir(tmp_path)
    theirs = "output/reference/model_1"
    assert flags.recipe_entry("teacher=model_1") == ("teacher", theirs)
    assert flags.recipe_entry(f"teacher={theirs}") == ("teacher", theirs)
    assert flags.recipe_entry("teacher=tests") == ("teacher", "tests")
    assert flags.recipe_entry("teacher=nobody") == ("teacher", "nobody")
    (tmp_path / "model_1").mkdir()
    assert flags.recipe_entry("teacher=model_1") == ("teacher", str(tmp_path / "model_1"))


# ---------------------------------------------------------------- questions


def questions_only(*arguments: str) -> forked.Work:
    """train.py with a stand-in for the training, so that the questions can be asked without it."""

    def work() -> int:
        def chosen(args, network) -> None:
            print("CHOSEN", network.name, args.epochs)
            raise SystemExit(0)

        flags.recipe_of = chosen
        return train.main(arguments)

    return work


@pytest.fixture
def ask(monkeypatch, capsys):
    """Exit status, standard output and error of train.py with this text on standard input."""

    def asked(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(flags, "recipe_of", flags.recipe_of)  # put back afterwards
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return call_main(lambda given: questions_only(*given)(), capsys, arguments)

    return asked


@pytest.mark.parametrize(
    ("text", "arguments", "chosen"),
    [
        ("3\n1\n", (), "model_3 1"),
        ("\n\n", (), "model_2 20"),
        ("", (), "model_2 20"),
        ("1\n", (), "model_1 20"),
        ("7\n3\nten\n0\n5\n", (), "model_3 5"),
        ("4\n", ("--model", "1"), "model_1 4"),
    ],
)
def test_answers_on_standard_input(text, arguments, chosen, ask):
    status, out, error = ask(text, *arguments)
    assert status == 0, error
    assert f"CHOSEN {chosen}\n" in out


def test_answers_through_a_pipe():
    ended = forked.run(questions_only(), "3\nfour\n5\n")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.endswith("CHOSEN model_3 5\n")


def test_a_wrong_answer_that_nothing_follows_is_an_error(ask):
    status, out, error = ask("nine\n")
    assert status == 2
    assert "CHOSEN" not in out
    assert "'nine' is neither 1, 2 or 3" in error


class Terminal:
    """A process of `questions_only` on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            forked.become(questions_only(*arguments))
        self.screen = ""

    def read(self, deadline: float) -> bool:
        """Adds what comes to the screen; False when no more will come."""
        if not select.select([self.file], [], [], max(0, deadline - time.monotonic()))[0]:
            os.kill(self.pid, signal.SIGKILL)  # silent for too long
            return False
        try:
            more = os.read(self.file, 4096).decode()
        except OSError:  # on Linux: the other end was closed
            return False
        self.screen += more
        return bool(more)

    def wait_for(self, text: str) -> None:
        """Reads until the text has appeared after what was waited for before."""
        deadline = time.monotonic() + 60
        while text not in self.screen and self.read(deadline):
            pass
        before, found, self.screen = self.screen.partition(text)
        assert found, f"{text!r} did not come after {before!r}"

    def wait_until_it_reads(self) -> None:
        """Until it sleeps; to be called when it has asked."""
        show = ["ps", "-o", "stat=", "-p", str(self.pid)]
        while not subprocess.run(show, capture_output=True, check=True).stdout.startswith(b"S"):
            pass

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def status(self) -> int:
        """The exit status, once the process has ended."""
        deadline = time.monotonic() + 60
        while self.read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)


def test_questions_on_a_terminal():
    terminal = Terminal()
    terminal.wait_for("CNN_Model_1  2,114,282 parameters, target 85 % within 60 epochs")
    terminal.wait_for("CNN_Model_2    222,058 parameters, target 85 % within 70 epochs")
    terminal.wait_for("CNN_Model_3     73,994 parameters, target 85 % within 75 epochs")
    terminal.wait_for("Which model? [2]: ")
    terminal.type("9\n")
    terminal.wait_for("'9' is neither 1, 2 or 3")
    terminal.wait_for("Which model? [2]: ")
    terminal.type("\n")
    terminal.wait_for("How many epochs? [20]: ")
    terminal.type("-3\n")
    terminal.wait_for("'-3' is not a whole number from 1 to 10000")
    terminal.wait_for("How many epochs? [20]: ")
    terminal.type("4\n")
    terminal.wait_for("CHOSEN model_2 4")
    assert terminal.status() == 0


@pytest.mark.parametrize(
    ("key", "status", "message"),
    [("\x03", 130, "interrupted"), ("\x04", 0, "nothing was done")],
)
def test_leaving_at_a_question(key, status, message):
    terminal = Terminal("--model", "1")
    terminal.wait_for("How many epochs? [20]: ")
    # Python shows the question and only then begins to read; a signal in between would wait for
    # the next key, as a second Ctrl-C is.
    terminal.wait_until_it_reads()
    terminal.type(key)
    terminal.wait_for(message)
    assert "Traceback" not in terminal.screen
    assert terminal.status() == status


def test_flags_leave_nothing_to_ask():
    terminal = Terminal("--model", "3", "--epochs", "2")
    terminal.wait_for("CHOSEN model_3 2")
    assert terminal.status() == 0


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def small(tmp_path) -> str:
    """A model file that trains in no time."""
    path = tmp_path / "small.py"
    path.write_text(SMALL_NETWORK)
    return str(path)


def dry_run(capsys, model: str, folder: Path, *arguments: str) -> Path:
    status, out, error = call(
        capsys, "--model", model, "--dry-run", "--output-dir", str(folder), *arguments
    )
    assert status == 0, error
    assert "final test accuracy" in out
    return run_in(folder)


FILES = {
    "settings.json", "summary.txt", "train.log", "log.csv", "curves.png", "confusion_matrix.png",
    "class_accuracy.png", "misclassified.png", "augmentations.png", "results.json", "best.pt",
    "last.pt", "weights.pt", "report.html",
}  # fmt: skip


def test_dry_run_from_the_shell_writes_every_file(tmp_path):
    """The command as a user types it, from another folder, without a terminal."""
    command = [sys.executable, str(ROOT / "train.py"), "--dry-run", "--model", "2", "--epochs", "2"]
    result = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    folder = run_in(tmp_path / "output")
    assert (tmp_path / "output" / "index.html").is_file()
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == FILES
    log = (folder / "train.log").read_text()
    assert log in result.stdout
    assert "Epoch [1/2] - Train: " in log
    assert "Epoch [2/2] - Train: " in log

    settings = json.loads((folder / "settings.json").read_text())
    assert settings["recipe"] == asdict(networks.load_network("2").recipe)
    assert settings["seed"] == 0
    assert settings["data_sha256"] == cifar10.SAMPLE_SHA256
    names = [
        step["__class_fullname__"]
        for step in settings["train_transform"]["transform"]["transforms"]
    ]
    assert names[:4] == ["PadIfNeeded", "RandomCrop", "HorizontalFlip", "CoarseDropout"]
    wanted = (ROOT / "tests/spec/model_2_summary.txt").read_text().splitlines()
    assert (folder / "summary.txt").read_text().splitlines()[: len(wanted)] == wanted

    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    results = json.loads((folder / "results.json").read_text())
    assert results["completed"] is True
    assert results["final_accuracy"] == float(rows[-1]["test_acc"])
    for name in FILES:
        if name.endswith(".png"):
            assert Image.open(folder / name).size[0] > 600

    for name in ("best.pt", "last.pt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        CNN_Model_2().load_state_dict(checkpoint["model"])
    assert checkpoint["epoch"] == 2
    assert {"optimizer", "scheduler", "scaler"} <= set(checkpoint)


def test_the_reported_accuracy_is_that_of_the_saved_weights(capsys, small, tmp_path, sample):
    """Counted again outside of our loops, in float32, one image at a time."""
    folder = dry_run(capsys, small, tmp_path / "out", "--epochs", "3")
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    model = networks.load_network(small).build().eval()
    model.load_state_dict(checkpoint["model"])
    pixels = torch.from_numpy(sample.test_images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(checkpoint[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        hits = sum(
            int(model(image[None]).argmax()) == int(label)
            for image, label in zip((pixels - mean) / std, sample.test_labels, strict=True)
        )
    reported = json.loads((folder / "results.json").read_text())["final_accuracy"]
    # bf16 may turn a close call or two of the 200.
    assert abs(reported - 100 * hits / 200) <= 1.0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(capsys, small, tmp_path):
    slow = ("--loader", "albumentations", "--workers")
    first = weights(dry_run(capsys, small, tmp_path / "a", *slow, "0"))
    again = weights(dry_run(capsys, small, tmp_path / "b", *slow, "2"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(capsys, small, tmp_path):
    first = weights(dry_run(capsys, small, tmp_path / "a"))
    again = weights(dry_run(capsys, small, tmp_path / "b"))
    other = weights(dry_run(capsys, small, tmp_path / "c", "--seed", "1"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_a_transform_without_a_batched_form_falls_back_and_says_so(
    capsys, small, tmp_path, monkeypatch
):
    original = utils.train_transform

    def edited(*settings):
        return A.Compose([A.GaussianBlur(p=0.2), *original(*settings).transforms], strict=True)

    monkeypatch.setitem(utils.TRANSFORMS, "standard", edited)
    folder = dry_run(
        capsys, small, tmp_path / "out", "--workers", "0", "--set", "transform=standard"
    )
    assert "no batched form of GaussianBlur" in (folder / "train.log").read_text()
    assert json.loads((folder / "settings.json").read_text())["loader"] == "albumentations"


def test_val_split_reports_held_out_images_and_reads_the_test_set_once(
    capsys, small, tmp_path, monkeypatch, sample
):
    read = []
    loop = utils.evaluate
    monkeypatch.setattr(
        utils,
        "evaluate",
        lambda model, loader, *rest: read.append(loader) or loop(model, loader, *rest),
    )
    folder = dry_run(capsys, small, tmp_path / "out", "--val-split", "200", "--epochs", "2")
    images = [loader.dataset.tensors[0].permute(0, 2, 3, 1).numpy() for loader in read]
    assert [np.array_equal(each, sample.test_images) for each in images] == [False, False, True]
    assert "Val: " in (folder / "train.log").read_text()
    assert "best val accuracy" in (folder / "train.log").read_text()
    header = (folder / "log.csv").read_text().splitlines()[0]
    assert "val_acc" in header
    assert "test_acc" not in header
    results = json.loads((folder / "results.json").read_text())
    assert (results["split"], results["evaluated"]) == ("val", "test")


def test_flags_replace_the_recipe(capsys, small, tmp_path):
    flags = ["--lr", "0.05", "--batch-size", "500", "--weight-decay", "0"]
    folder = dry_run(capsys, small, tmp_path / "out", *flags)
    recipe = json.loads((folder / "settings.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["batch_size"], recipe["weight_decay"]) == (0.05, 500, 0.0)
    assert "lr              0.05" in (folder / "train.log").read_text()


def test_a_diverging_run_stops_with_a_clear_error(capsys, small, tmp_path):
    status, _, error = call(
        capsys, "--model", small, "--dry-run", "--set", "optimizer=sgd", "--lr", "1e15",
        "--output-dir", str(tmp_path),
    )  # fmt: skip
    assert status == 1
    assert "the loss became" in error
    assert "try a lower learning rate" in error
    assert error.count("\n") == 1


def test_ctrl_c_reports_the_finished_epochs(capsys, small, tmp_path, monkeypatch):
    loop = utils.train
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loop(*arguments)

    monkeypatch.setattr(utils, "train", interrupted)
    status, out, _ = call(
        capsys, "--model", small, "--dry-run", "--epochs", "5",
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert status == 130
    assert "Stopped in epoch 3: Ctrl-C" in out
    folder = run_in(tmp_path / "out")
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == FILES
    results = json.loads((folder / "results.json").read_text())
    assert (results["completed"], results["epochs_done"]) == (False, 2)
