"""Interrupted and resumed runs: the same weights, one log, nothing lost, nothing mistaken."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TextIO

import pytest
import torch

import cifar10
import cli
import plots
import runs
import train
import utils
from support import files
from support.history import History
from tests import forked, torture
from tests.conftest import TRAIN_DRAWING_NOTHING, call_main, draw_nothing, run_in
from tools import answers

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> str:
    """A model file with convolutions, BatchNorm and dropout that trains in no time."""
    path = tmp_path_factory.mktemp("network") / "small.py"
    path.write_text(torture.NETWORK)
    return str(path)


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(train.main, capsys, arguments)


def resume(capsys, folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Goes on with the run, and names its model file, which it may not do itself."""
    model = json.loads((folder / "settings.json").read_text())["model_file"]
    return call(capsys, "--resume", folder, "--model", ROOT / model, *arguments)


def flags(network: str, output: Path) -> tuple[object, ...]:
    return ("--dry-run", "--model", network, "--epochs", 3, "--output-dir", output)


def only(output: Path) -> Path:
    return run_in(output)


def stop_in(monkeypatch, epoch: int, error: type[BaseException], batches: int = 0) -> None:
    """The training loop raises in that epoch, after so many batches.

    A class, not an exception: one kept here would hold the frame that holds it, and the loader's
    workers with it, until the garbage collector comes to wait for them.
    """
    loop, calls = utils.train, []

    def stopped(model, loader, *rest: object) -> object:
        calls.append(1)
        if len(calls) != epoch:
            return loop(model, loader, *rest)

        class Broken:
            dataset, sampler = loader.dataset, loader.sampler

            def __iter__(self):
                for number, batch in enumerate(loader):
                    if number == batches:
                        loader._iterator = None  # with its workers; collected later, they hang
                        raise error()
                    yield batch

        return loop(model, Broken(), *rest)

    monkeypatch.setattr(utils, "train", stopped)


@pytest.fixture(scope="session")
def undisturbed(network, tmp_path_factory) -> Callable[..., Path]:
    """Gives the folder, not to be changed, of a run with these flags that nobody disturbed."""

    @cache
    def run(*options: object) -> Path:
        output = tmp_path_factory.mktemp("undisturbed")
        with pytest.MonkeyPatch.context() as context:
            draw_nothing(context)
            arguments = [str(argument) for argument in (*flags(network, output), *options)]
            assert train.main(arguments) == 0
        return only(output)

    return run


KINDS = {
    "default": (),
    "two workers": ("--loader", "albumentations", "--workers", 2),
    "distilled": ("--set", "teacher={teacher}"),
    "replayed": ("--set", "teacher={teacher}"),
    "no teacher": ("--set", "teacher="),
}


@pytest.mark.parametrize(
    ("kind", "epoch", "batches"),
    [("default", *place) for place in ((1, 4), (2, 0), (2, 5), (3, 0), (3, 9))]
    + [("two workers", 2, 5), ("distilled", 2, 5), ("distilled", 3, 0), ("replayed", 3, 5)]
    + [("no teacher", 2, 5)],
)
def test_a_resumed_run_ends_with_the_same_weights(
    kind, epoch, batches, network, undisturbed, capsys, tmp_path, monkeypatch
):
    options = KINDS[kind]
    if kind in ("distilled", "replayed"):
        teacher = undisturbed("--seed", 1)
        if kind == "replayed":
            asked = (teacher, *flags(network, tmp_path / "asked"), "--views", 2)
            assert call_main(answers.main, capsys, asked)[0] == 0
            teacher = only(tmp_path / "asked" / "answers")
        options = tuple(each.format(teacher=teacher) for each in options)
    whole, cut = undisturbed(*options), tmp_path / "cut"
    with monkeypatch.context() as context:
        stop_in(context, epoch, KeyboardInterrupt, batches)
        status, out, _ = call(capsys, *flags(network, cut), *options)
    assert status == 130
    folder = only(cut)
    assert f"Stopped in epoch {epoch}: Ctrl-C" in out
    assert f"Go on with: python train.py --resume {folder} --model {network}" in out
    torch.rand(17)  # the state of this process must not matter
    random.random()
    status, out, error = call(capsys, "--resume", "--output-dir", cut, "--model", network)
    assert status == 0, error
    assert only(cut) == folder
    torture.check_finished(folder, torture.weights_of(whole))
    for name in ("last.pt", "best.pt"):
        ours = files.read_checkpoint(folder / name)["model"]
        for key, value in files.read_checkpoint(whole / name)["model"].items():
            assert torch.equal(ours[key], value)
    with open(whole / "log.csv") as one, open(folder / "log.csv") as other:
        for row, resumed in zip(one, other, strict=True):  # all but the two columns of seconds
            assert row.split(",")[:-2] == resumed.split(",")[:-2]


def test_the_torture_finds_nothing(tmp_path):
    """Ten SIGKILLs to living trainings, two of them with two workers; by hand: 1,000."""
    found = torture.Torture(tmp_path, seed=0)
    alone, with_workers = torture.KINDS[0], torture.KINDS[-1]
    found.run(8, [alone])
    found.run(2, [with_workers])
    assert found.kills == 10
    assert found.finished >= 2


def test_a_kill_strikes_before_the_process_has_run(tmp_path):
    for _ in range(20):
        child = torture.spawn(["--help"], tmp_path / "screen")
        assert torture.wait(child, seconds=0) is None


@contextmanager
def training(real: bool, *arguments: object) -> Iterator[tuple[int, TextIO, Callable[[], int]]]:
    """A training in a group of its own, forked or as the shell starts it.

    Its number, its output, and what waits for its exit status.
    """
    reading, writing = os.pipe()
    given = [str(argument) for argument in arguments]
    if real:  # the end of the interpreter, which waits for its workers, is in question, too
        started = subprocess.Popen(
            [sys.executable, "-c", TRAIN_DRAWING_NOTHING, *given],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writing, process_group=0,
        )  # fmt: skip
        process, wait = started.pid, started.wait
    else:
        process = forked.fork(lambda: train.main(given), 0, writing, 2)
        wait = partial(forked.status_of, process)
    os.close(writing)
    watchdog = threading.Timer(100, os.killpg, (process, signal.SIGKILL))
    watchdog.start()
    try:
        with open(reading) as output:
            yield process, output, wait
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):  # it has ended, as it should
            os.killpg(process, signal.SIGKILL)


@pytest.mark.parametrize("workers", [(), ("--loader", "albumentations", "--workers", "1")])
def test_sigterm_to_all_of_a_run_s_processes_keeps_the_epochs_and_exits_143(
    workers, network, tmp_path
):
    arguments = ("--dry-run", "--model", network, "--epochs", 5000, "--output-dir", tmp_path)
    with training(bool(workers), *arguments, *workers) as (process, output, wait):
        for line in output:
            if line.startswith("Epoch [   3/"):
                os.killpg(process, signal.SIGTERM)
                break
        out = output.read()
        assert wait() == 143, out
    assert ": SIGTERM\n" in out
    assert "Go on with: python train.py --resume " in out
    folder = only(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["completed"] is False
    assert results["epochs_done"] == files.read_checkpoint(folder / "last.pt")["epoch"] >= 3
    torture.check_files(folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_work_with_its_status_and_leaves_the_handlers(name, capsys):
    before = signal.getsignal(signal.SIGTERM)
    number = getattr(signal, name)
    parser = cli.ArgumentParser(prog="x")
    assert cli.run(parser, lambda _: os.kill(os.getpid(), number), []) == 128 + number
    assert capsys.readouterr().err == "\nx: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="session")
def stopped_run(network, tmp_path_factory) -> Path:
    """A run that was stopped in its third epoch; not to be changed."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as context:
        draw_nothing(context)
        stop_in(context, 3, KeyboardInterrupt)
        assert train.main([str(argument) for argument in flags(network, output)]) == 130
    return only(output)


@pytest.fixture
def cut(stopped_run, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped_run, tmp_path / "cut" / stopped_run.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 10), "was laid out for 3 epochs"),
        (("--lr", 0.5), "began with --lr None, and going on cannot change that"),
        (("--batch-size", 10), "began with --batch-size None"),
        (("--seed", 1), "began with --seed 0"),
        (("--recipe", "published"), "began with --recipe tuned"),
        (("--set", "augment=0.1"), "began with --set []"),
        (("--model", "2"), "was trained with other code than"),
        (("--loader", "albumentations"), "began with --loader batched"),
        (("--device", "tpu"), "no device 'tpu' here"),
    ],
)
def test_what_a_run_began_with_stays(arguments, message, cut, capsys):
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    status, _, error = resume(capsys, cut, *arguments)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == before


def test_flags_that_say_the_same_are_no_change(cut, capsys):
    status, _, error = resume(capsys, cut, "--epochs", 3, "--seed", 0)
    assert status == 0, error


def test_a_run_of_an_older_version_that_knew_fewer_keys_goes_on(cut, undisturbed, capsys):
    for name, read, write in (
        ("settings.json", lambda path: json.loads(path.read_text()), files.write_file),
        ("last.pt", files.read_checkpoint, None),
    ):
        values = read(cut / name)
        assert values["recipe"].pop("robust") == 0
        if write:
            write(cut / name, json.dumps(values))
        else:
            torch.save(values, cut / name)
    status, _, error = resume(capsys, cut)
    assert status == 0, error
    torture.check_finished(cut, torture.weights_of(undisturbed()))


def test_a_recipe_or_augmentation_that_was_edited_meanwhile_is_refused(
    cut, network, capsys, monkeypatch
):
    text = Path(network).read_text()
    Path(network).write_text(text.replace("lr=0.05", "lr=0.06"))
    try:
        status, _, error = resume(capsys, cut)
    finally:
        Path(network).write_text(text)
    assert status == 2
    assert "its recipe is not what it began with (lr: 0.05 then, 0.06 now)" in error
    edited = utils.train_transform((0, 0, 0), (1, 1, 1))
    monkeypatch.setitem(utils.TRANSFORMS, "standard", lambda *_: edited)
    status, _, error = resume(capsys, cut)
    assert status == 2
    assert "its train_transform is not what it began with; put that back" in error


def test_nothing_to_resume(cut, capsys, tmp_path):
    for arguments, message in (
        ((tmp_path / "absent",), "is not a run's folder: there is no settings.json in it"),
        (("--output-dir", tmp_path / "empty"), "there is no unfinished run in"),
    ):
        status, _, error = call(capsys, "--resume", *arguments)
        assert status == 2
        assert message in error
        assert error.count("\n") == 1
    assert resume(capsys, cut)[0] == 0
    status, _, error = resume(capsys, cut)
    assert (status, "is finished; there is nothing to go on with" in error) == (2, True)
    status, _, error = call(capsys, "--resume", "--output-dir", cut.parent)
    assert (status, "there is no unfinished run" in error) == (2, True)


def test_a_run_that_is_being_trained_is_left_alone(cut, capsys):
    with runs.Run.reopen(cut):
        status, _, error = resume(capsys, cut)
        assert (status, "is in use: another process trains this run" in error) == (2, True)
        status, _, error = call(capsys, "--resume", "--output-dir", cut.parent)
        assert (status, "there is no unfinished run" in error) == (2, True)
    assert resume(capsys, cut)[0] == 0


def test_the_newest_unfinished_run_is_taken(cut):
    older = cut.with_name("20200101-000000-older")
    newer = cut.with_name("20990101-000000-newer")
    for folder in (older, newer):
        shutil.copytree(cut, folder)
    assert runs.unfinished("", cut.parent)[0] == newer
    (newer / "results.json").write_text('{"completed": true}')
    assert runs.unfinished("", cut.parent)[0] == cut


# ---------------------------------------------------------------- damage


def test_a_checkpoint_of_another_network_is_refused(cut, network, capsys):
    checkpoint = files.read_checkpoint(cut / "last.pt")
    checkpoint["model"]["9.bias"] = torch.zeros(11)
    torch.save(checkpoint, cut / "last.pt")
    status, _, error = resume(capsys, cut)
    assert status == 1
    assert f"{cut}/last.pt does not hold the weights of Small: 9.bias is (11,) there" in error


@pytest.mark.parametrize("key", ["history", "optimizer", "scheduler", "scaler", "epoch"])
@pytest.mark.parametrize("value", [None, {}, [], "x", 3])
def test_a_checkpoint_with_something_else_in_it_is_refused(key, value, cut, capsys):
    checkpoint = files.read_checkpoint(cut / "last.pt")
    torch.save(checkpoint | {key: value}, cut / "last.pt")
    status, _, error = resume(capsys, cut)
    if key == "scaler" and value in ({}, []):  # a disabled one's is empty
        assert status == 0
        return
    assert status == 1
    assert f"{cut}/last.pt is no checkpoint of this run" in error
    assert error.count("\n") == 1


def test_damaged_checkpoints_are_noticed_or_harmless(cut, capsys):
    """A bit flipped, a byte set, a piece missing: never a wrong number, never a traceback."""
    whole = (cut / "last.pt").read_bytes()
    good = files.read_checkpoint(cut / "last.pt")
    draw = random.Random(0)
    messages = []
    for _ in range(250):
        damaged = bytearray(whole)
        place = draw.randrange(len(damaged))
        kind = draw.choice(("flip", "cut", "zeros", "byte"))
        if kind == "flip":
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del damaged[place : place + draw.choice((1, 100, len(damaged)))]
        elif kind == "zeros":
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
        else:
            damaged[place] = draw.randrange(256)
        (cut / "last.pt").write_bytes(damaged)
        try:
            loaded = files.read_checkpoint(cut / "last.pt")
        except files.CheckpointError as error:
            messages.append(str(error))
            continue
        assert loaded["history"] == good["history"]
        for name, value in good["model"].items():
            assert torch.equal(loaded["model"][name], value)
    assert len(messages) > 200
    assert all(str(cut / "last.pt") in text and "\n" not in text for text in messages)
    (cut / "last.pt").write_bytes(whole[: len(whole) // 2])
    status, _, error = resume(capsys, cut)
    assert status == 1
    assert "is not a whole checkpoint" in error
    assert error.count("\n") == 1


def test_damaged_caches_are_noticed_or_harmless(fake, tmp_path):
    """The fake data set's cache, damaged in 250 ways, never passes for other images."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-batches-py").mkdir()
    for name, content in fake.batches.items():
        (root / "cifar-10-batches-py" / name).write_bytes(content)
    cifar10.load_cifar10(root, announce=lambda _: None)
    whole = (root / cifar10.CACHE).read_bytes()
    draw, refused = random.Random(1), 0
    for _ in range(250):
        damaged = bytearray(whole)
        place = draw.randrange(len(damaged))
        if draw.random() < 0.8:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            del damaged[place : place + draw.choice((1, 100, len(damaged)))]
        (root / cifar10.CACHE).write_bytes(damaged)
        try:
            data = cifar10.read_cache(root / cifar10.CACHE)
        except cifar10.DataError:
            refused += 1
            continue
        assert cifar10.digests(data) == cifar10.digests(fake.data)
    assert refused > 200


# ---------------------------------------------------------------- disks


def fail_writing(monkeypatch, name: str, error: OSError, after: int = 0) -> None:
    """Writing the file of that name fails, after it worked so many times."""
    replace, calls = os.replace, []

    def failing(source, target) -> None:
        if Path(target).name == name:
            calls.append(1)
            if len(calls) > after:
                raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    log = runs.Run.log

    def failing_log(run: runs.Run, line: str = "") -> None:
        if name == run.LOG:
            calls.append(1)
            if len(calls) > after:
                raise error
        log(run, line)

    monkeypatch.setattr(runs.Run, "log", failing_log)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "after"),
    [("last.pt", 1), ("weights.pt", 1), ("best.pt", 0), ("log.csv", 1), ("train.log", 7),
     ("curves.png", 0), ("results.json", 0)],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    name, after, network, undisturbed, capsys, tmp_path, monkeypatch
):
    with monkeypatch.context() as context:
        fail_writing(context, name, FULL, after)
        status, _, error = call(capsys, *flags(network, tmp_path / "full"))
    assert status == 1
    assert error.startswith("train.py: error: [Errno 28] No space left on device")
    assert "go on with python train.py --resume" in error
    assert error.count("\n") == 1
    folder = only(tmp_path / "full")
    assert not list(folder.glob("*.part"))
    assert not list(folder.glob(".*.part"))
    torture.check_files(folder)
    status, _, error = resume(capsys, folder)
    assert status == 0, error
    torture.check_finished(folder, torture.weights_of(undisturbed()))


def test_short_writes_never_replace_a_whole_file(tmp_path, monkeypatch):
    run = runs.Run(tmp_path)
    run.write("results.json", "whole")
    real = os.fsync

    def short(file: int) -> None:
        os.ftruncate(file, 2)
        real(file)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", short)
    with pytest.raises(OSError, match="Input/output"):
        run.write("results.json", "a longer text")
    assert (tmp_path / "results.json").read_text() == "whole"


def test_no_space_for_the_cache_is_said_and_leaves_nothing_behind(fake, tmp_path, monkeypatch):
    root = tmp_path / "data"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in fake.batches.items():
        (root / "cifar-10-batches-py" / name).write_bytes(content)
    fail_writing(monkeypatch, cifar10.CACHE, FULL)
    with pytest.raises(cifar10.DataError, match="no space for the cache"):
        cifar10.load_cifar10(root, announce=lambda _: None)
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]


# ---------------------------------------------------------------- interrupted at the end, and files


def test_ctrl_c_in_the_last_evaluation_reports_and_says_how_to_go_on(
    network, capsys, tmp_path, monkeypatch
):
    arguments = (*flags(network, tmp_path / "cut"), "--val-split", 100)
    evaluate = utils.evaluate

    def interrupted(model, loader, device, split: str, *team) -> utils.Evaluation:
        if split == "test":
            raise KeyboardInterrupt
        return evaluate(model, loader, device, split, *team)

    with monkeypatch.context() as context:
        context.setattr(utils, "evaluate", interrupted)
        status, out, _ = call(capsys, *arguments)
    folder = only(tmp_path / "cut")
    assert status == 130
    assert "Stopped in the last evaluation: Ctrl-C" in out
    assert f"Go on with: python train.py --resume {folder}" in out
    results = json.loads((folder / "results.json").read_text())
    assert (results["completed"], results["evaluated"]) == (False, "val")
    assert results["final_accuracy"] == results["last_accuracy"]
    assert (folder / "curves.png").is_file()
    status, _, error = resume(capsys, folder)
    assert status == 0, error
    assert json.loads((folder / "results.json").read_text())["evaluated"] == "test"


@pytest.mark.parametrize("name", ["curves", "of_evaluation"])
def test_a_report_that_ctrl_c_cut_off_is_made_when_the_run_goes_on(
    name, network, undisturbed, capsys, tmp_path, monkeypatch
):
    """What was not written any more is written when the run goes on."""
    with monkeypatch.context() as context:
        context.setattr(plots, name, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        status, out, _ = call(capsys, *flags(network, tmp_path / "out"))
    assert status == 130
    folder, whole = only(tmp_path / "out"), undisturbed()
    assert f"Go on with: python train.py --resume {folder} " in out
    assert not (folder / "results.json").exists()
    status, _, error = resume(capsys, folder)
    assert status == 0, error
    torture.check_finished(folder, torture.weights_of(whole))
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("name", ["last.pt", "weights.pt", "best.pt", "log.csv"])
@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_while_an_epoch_is_saved_loses_nothing_of_it(
    name, after, network, undisturbed, capsys, tmp_path, monkeypatch
):
    """Just after the file was written the first, or the second time."""
    write, written = runs.Run.write, []

    def struck(run: runs.Run, file: str, content: str | bytes) -> None:
        write(run, file, content)
        written.append(file)
        if written.count(name) == after + 1 and file == name:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as context:
        context.setattr(runs.Run, "write", struck)
        status, out, _ = call(capsys, *flags(network, tmp_path / "out"))
    folder, epochs = only(tmp_path / "out"), written.count("last.pt")
    if status == 0:  # no second best epoch came
        assert name == "best.pt"
        return
    assert status == 130
    assert f"Stopped in epoch {epochs + 1}: Ctrl-C" in out
    assert json.loads((folder / "results.json").read_text())["epochs_done"] == epochs
    torture.check_files(folder)
    status, _, error = resume(capsys, folder)
    assert status == 0, error
    torture.check_finished(folder, torture.weights_of(undisturbed()))


def test_a_run_goes_on_with_another_devices_scaler(cut, capsys):
    """As fp16 on CUDA leaves it; on the CPU nothing is scaled."""
    checkpoint = files.read_checkpoint(cut / "last.pt")
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
              "growth_interval": 2000, "_growth_tracker": 7}  # fmt: skip
    torch.save(checkpoint | {"scaler": scaler}, cut / "last.pt")
    status, _, error = resume(capsys, cut)
    assert status == 0, error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", {"network": "Net", "weights_sha256": "0"}),
        ("data_sha256", {"train_images": "0"}),
        ("seed", 5),
        ("epochs", 7),
        ("val_split", 100),
        ("network", "Other"),
    ],
)
def test_a_run_whose_settings_tell_another_story_is_refused(name, value, cut, capsys):
    settings = json.loads((cut / "settings.json").read_text()) | {name: value}
    (cut / "settings.json").write_text(json.dumps(settings))
    status, _, error = resume(capsys, cut)
    assert (status, f"its {name} is not what it began with" in error) == (2, True)
    assert error.count("\n") == 1


@pytest.mark.parametrize("flag", [("--seed", 7), ("--lr", 0.01)])
def test_another_run_s_checkpoint_is_refused(flag, cut, network, capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        stop_in(context, 2, KeyboardInterrupt)
        call(capsys, *flags(network, tmp_path / "other"), *flag)
    shutil.copy(only(tmp_path / "other") / "last.pt", cut / "last.pt")
    status, _, error = resume(capsys, cut)
    assert (status, "last.pt is no checkpoint of this run" in error) == (1, True)


def test_results_of_an_earlier_stop_do_not_outlive_going_on(cut, capsys, monkeypatch):
    of_the_stop = [cut / "results.json", cut / "report.html"]
    assert all(path.is_file() for path in of_the_stop)
    monkeypatch.setattr(utils, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(capsys, cut)
    assert not any(path.exists() for path in of_the_stop)


def test_a_second_ctrl_c_does_not_cost_the_report(network, capsys, tmp_path, monkeypatch):
    """The first stops the epoch; the others come while the report is made."""
    drawn = plots.curves

    def struck(*arguments: object) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*arguments)

    stop_in(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT) or KeyboardInterrupt)
    monkeypatch.setattr(plots, "curves", struck)
    status, out, _ = call(capsys, *flags(network, tmp_path / "out"))
    assert status == 130
    assert "Stopped in epoch 2: Ctrl-C" in out
    assert json.loads((only(tmp_path / "out") / "results.json").read_text())["epochs_done"] == 1


def test_ctrl_c_after_the_results_has_nothing_to_go_on_with(network, capsys, tmp_path, monkeypatch):
    write = runs.Run.write

    def struck(run: runs.Run, name: str, content: str | bytes) -> None:
        write(run, name, content)
        if name == run.RESULTS:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Run, "write", struck)
    status, out, _ = call(capsys, *flags(network, tmp_path / "out"))
    assert status == 130
    assert "Interrupted, but the run is finished" in out
    assert "Go on with" not in out


def test_the_log_grows_and_is_not_written_anew(tmp_path):
    run = runs.Run(tmp_path)
    run.log("first")
    file = (tmp_path / "train.log").stat().st_ino
    run.log("second ±")
    assert (tmp_path / "train.log").stat().st_ino == file
    assert (tmp_path / "train.log").read_text() == "first\nsecond ±\n"


def test_a_line_of_the_log_that_was_cut_off_is_dropped(cut, capsys):
    with open(cut / "train.log", "ab") as file:
        file.write("Epoch [3/3] - Tr±".encode()[:-1])
    status, _, error = resume(capsys, cut)
    assert status == 0, error
    log = (cut / "train.log").read_text()
    assert log.count("Epoch [3/3]") == 1
    assert "\nResumed after epoch 2" in log


def test_a_run_without_its_last_checkpoint_does_not_begin_anew(cut, capsys):
    (cut / "last.pt").unlink()
    before = {path.name: path.read_bytes() for path in cut.iterdir()}
    status, _, error = resume(capsys, cut)
    assert status == 2
    assert "last.pt is gone, without which nothing can go on" in error
    assert "(weights.pt, best.pt, log.csv)" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == before


def test_the_table_names_no_weights_that_are_gone(tmp_path):
    history = History("test", 2, 85.0, 60)
    for accuracy in (50.0, 40.0):
        scores = utils.Metrics(1.0, accuracy)
        history.add(0.1, scores, scores, (1.0, 1.0))
    (tmp_path / "best.pt").write_bytes(b"")
    assert "(epoch 1, best.pt; picked" in history.table("test", 40.0, tmp_path)
    (tmp_path / "best.pt").unlink()
    assert "best.pt" not in history.table("test", 40.0, tmp_path)
