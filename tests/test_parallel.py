"""One training in several processes: as one alone trains; nothing lost, told twice, or hung.

The processes are forked, with the environment and the store that torchrun gives them; the last
tests start torchrun itself.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import networks
import parallel
import train
import utils
from errors import UsageError
from parallel import Team
from support import files, flags
from tests import forked
from tests.conftest import run_in

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("no_pictures")

# Without BatchNorm, whose statistics are each process's own on the CPU, and without dropout.
NETWORK = """
import os
import pathlib
import torch
from torch import nn

PLAN = pathlib.Path("{plan}")  # "rank batch signal": who is to be stopped in which batch


RECIPE = dict(
    optimizer="{optimizer}", lr=0.02, weight_decay=5e-4, schedule="onecycle", batch_size=199,
    target_accuracy=85.0, target_epochs=60, augment=0.5, clip_norm=1.0, label_smoothing=0.1,
)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.linear = nn.Linear(8, 10)
        self.unused = nn.Linear(3, 3)
        self.batches = 0

    def forward(self, x):
        if self.training and len(x) > 2:  # not when it is tried out
            self.batches += 1
            if PLAN.exists():
                rank, batch, number = PLAN.read_text().split()
                if int(batch) == self.batches and rank in ("all", os.environ["RANK"]):
                    if rank != "all":
                        PLAN.unlink()
                    os.kill(os.getpid(), int(number))
        return self.linear(torch.relu(self.conv(x)).mean(dim=(2, 3)))
"""


class Ended(NamedTuple):
    """A process that ended: its status (below 0: killed by that signal), and what it printed."""

    status: int | None
    out: str
    err: str


def run_team(
    work: Callable[[], int | None], size: int, folder: Path, attempt: int = 0, store=None
) -> list[Ended]:
    """Runs the work in `size` processes as torchrun starts them; returns how each ended."""
    store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # None may talk to the store, whose thread takes locks here, before all have been forked.
    gate, opened = os.pipe()

    def begin(rank: int) -> None:
        os.close(opened)
        os.read(gate, 1)  # ends when the last writer has closed
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_ERROR_FILE": f"{folder}/attempt_{attempt}/{rank}/error.json",
        }
        out, err = ((folder / f"{rank}.{name}").open("w", buffering=1) for name in ("out", "err"))
        faulthandler.dump_traceback_later(60, file=err)  # where it stood, if it hangs
        with out, err, redirect_stdout(out), redirect_stderr(err):
            status = work()
        os._exit(status or 0)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=begin, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    os.close(opened)
    os.close(gate)
    end = time.monotonic() + 90
    while any(process.is_alive() for process in processes):
        time.sleep(0.1)
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            for process in processes:  # as torchrun does where one has failed
                process.terminate()
            for process in processes:
                process.join(10)
                process.kill()
                process.join()
    texts = [[(folder / f"{r}.{n}").read_text() for n in ("out", "err")] for r in range(size)]
    return [Ended(p.exitcode, *text) for p, text in zip(processes, texts, strict=True)]


@pytest.fixture
def exact(monkeypatch) -> None:
    """float32 on this CPU, too: in bf16 a sum in another order differs by far more."""
    pick = utils.Device.pick
    monkeypatch.setattr(utils.Device, "pick", lambda name=None: pick(name).exact)


@pytest.fixture
def started(exact, tmp_path) -> Callable:
    """Starts train.py in so many processes; returns how they ended and the run's folder."""

    def start(size: int, *arguments, optimizer="sgd", plan="", resume=None, **others):
        model, stop = tmp_path / "plain.py", tmp_path / "plan"
        model.write_text(NETWORK.format(optimizer=optimizer, plan=stop))
        stop.unlink(missing_ok=True)
        if plan:
            stop.write_text(plan)
        output = tmp_path / f"{size}-{optimizer}"
        line = ["--epochs", 2, "--output-dir", output] if resume is None else ["--resume", resume]
        line += ["--dry-run", "--device", "cpu", "--model", model, *arguments]
        line = [str(each) for each in line]
        if size == 1:
            assert train.main(line) == 0
            ended = []
        else:
            folder = tmp_path / f"torchrun-{output.name}"
            folder.mkdir(exist_ok=True)
            ended = run_team(lambda: train.main(line), size, folder, **others)
        folders = sorted(output.glob("[0-9]*")) if resume is None else [resume]
        return ended, folders[-1] if folders else None

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return files.read_checkpoint(folder / "weights.pt")


def assert_same(ours: Path, theirs: Path) -> None:
    """Equal but for the order in which float32 numbers were added up."""
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, atol=1e-5, rtol=0)
    ours, theirs = (
        np.genfromtxt(folder / "log.csv", delimiter=",", skip_header=1) for folder in (ours, theirs)
    )
    exact, during = [0, 1, 4, 5], [2, 3]  # the last batch of 5 counts once for each process
    np.testing.assert_allclose(ours[:, exact], theirs[:, exact], atol=1e-4)
    np.testing.assert_allclose(ours[:, during], theirs[:, during], atol=0.5)


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_parts_hold_every_image_once_and_weigh_as_much_as_they_hold(processes):
    for size in [*range(2 * processes, 70), 256, 1000]:
        shares = [Team(rank, processes).share(size) for rank in range(processes)]
        held = [image for part, _ in shares for image in range(size)[part]]
        assert held == list(range(size))
        losses = np.random.default_rng(size).random(size)
        means = [weight * losses[part].mean() for part, weight in shares]
        assert np.mean(means) == pytest.approx(losses.mean())
        assert min(part.stop - part.start for part, _ in shares) >= 2


def test_a_batch_too_short_to_be_shared_goes_to_all():
    for size in range(1, 6):
        assert Team(1, 3).share(size) == (slice(0, size), 1.0)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_batch_has_its_turn_in_one_process(processes):
    turns = [Team(rank, processes).turns(1234, 100) for rank in range(processes)]
    assert sorted(np.concatenate(turns)) == list(range(1234))
    batches = [list(turn[i : i + 100]) for turn in turns for i in range(0, len(turn), 100)]
    assert sorted(batches) == [list(range(i, min(i + 100, 1234))) for i in range(0, 1234, 100)]


@pytest.mark.parametrize("size", [999, 1000, 1001, 1501, 2001])
@pytest.mark.parametrize("processes", [2, 3])
def test_what_all_evaluate_is_gathered_in_order(processes, size, monkeypatch):
    """Also where a last image is alone in its batch."""
    teams = [Team(rank, processes) for rank in range(processes)]
    device = utils.Device(torch.device("cpu"))
    images, labels = np.zeros((size, 32, 32, 3), np.uint8), np.arange(size)
    transform, everybodys = utils.test_transform((0.5,) * 3, (0.2,) * 3), []
    for team in teams:
        turns = team.turns(size, utils.TEST_BATCH)
        loader = utils.make_loader(
            images[turns], labels[turns], transform, utils.TEST_BATCH, device
        )
        everybodys.append([labels for _, labels in loader])

    def all_gather(found: list, mine: list) -> None:
        found[:] = everybodys

    monkeypatch.setattr(parallel.dist, "all_gather_object", all_gather)
    assert torch.cat(teams[0].gather(everybodys[0])).tolist() == list(range(size))


@pytest.mark.parametrize("name", sorted(utils.TRANSFORMS))
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(name, sample):
    images, labels = sample.train_images[:90], sample.train_labels[:90]
    transform = utils.TRANSFORMS[name]((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 0.5)
    device = utils.Device(torch.device("cpu"))

    def batches(team: Team) -> list:
        loader = utils.make_loader(
            images, labels, transform, 40, device, shuffle=True, seed=3, team=team
        )
        loader.sampler.set_epoch(2)
        return list(loader)

    parts = zip(*[batches(Team(rank, 3)) for rank in range(3)], strict=True)
    for whole, part in zip(batches(parallel.ALONE), parts, strict=True):
        for one, several in zip(whole, zip(*part, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


def test_processes_draw_differently_and_the_first_as_one_alone():
    drawn = []
    for arguments in ((5, 1), (5, 1, 0), (5, 1, 1), (5, 1, 2)):
        utils.seed_everything(*arguments)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


# ---------------------------------------------------------------- a training


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_training_does_not_depend_on_the_number_of_processes(optimizer, started, sample):
    """1,000 images in batches of 199: neither 2 nor 3 divide them, and the last batch holds 5."""
    _, alone = started(1, optimizer=optimizer)
    for size in (2, 3):
        ended, folder = started(size, optimizer=optimizer)
        assert [each.status for each in ended] == [0] * size, ended
        assert_same(folder, alone)
        assert json.loads((folder / "settings.json").read_text())["processes"] == size
        assert "pictures and log" in ended[0].out
        assert [each.out for each in ended[1:]] == [""] * (size - 1)
        # Shared out, the evaluation gives exactly what one process gives.
        found = networks.load_trained(folder, named=folder.parents[1] / "plain.py")
        device = utils.Device(torch.device("cpu"), layout=torch.channels_last)
        network = networks.prepare(found.network, device)
        loader = utils.make_loader(
            sample.test_images, sample.test_labels, found.transform, utils.TEST_BATCH, device
        )
        one = utils.evaluate(network, loader, device)
        results = json.loads((folder / "results.json").read_text())
        assert (results["final_loss"], results["final_accuracy"]) == (one.loss, one.accuracy)


def test_a_layer_that_only_some_steps_use_is_trained(started, monkeypatch):
    now_and_then = (
        "        if self.batches % 2:\n            x = x + self.unused.bias[:, None, None]\n"
    )
    network = NETWORK.replace(
        "        return self.linear", now_and_then + "        return self.linear"
    )
    monkeypatch.setattr(sys.modules[__name__], "NETWORK", network)
    ended, folder = started(2)
    assert [(each.status, each.err) for each in ended] == [(0, "")] * 2
    assert weights(folder)["unused.weight"].abs().sum() > 0


def test_running_statistics_become_the_mean_of_all(tmp_path):
    def work() -> None:
        with parallel.join() as team:
            network = nn.Sequential(nn.BatchNorm2d(2))
            network[0].running_mean += torch.tensor([1.0, 10.0]) * (team.rank + 1)
            network.register_buffer("mask", torch.tensor([3e38, float(team.rank)]))
            team.agree(network)
            assert network[0].running_mean.tolist() == [2.0, 20.0]
            assert network[0].num_batches_tracked == 0
            assert torch.equal(network.mask, torch.tensor([3e38, 0.0]))  # the first one's

    assert [each.status for each in run_team(work, 3, tmp_path)] == [0, 0, 0]


def test_what_one_gathers_comes_in_the_order_of_turns(tmp_path):
    def work() -> None:
        with parallel.join() as team:
            mine = [torch.tensor(number) for number in range(team.rank, 7, 3)]
            assert [int(each) for each in team.gather(mine)] == list(range(7))
            assert team.sum(torch.tensor(2.0**team.rank)) == 7

    assert [each.status for each in run_team(work, 3, tmp_path)] == [0, 0, 0]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--epochs", "none"], 2, "--epochs"),  # all of them find it
        (["--val-split", "1000"], 2, "--val-split 1000 is too large"),
        (["--resume", "nowhere"], 2, "nowhere"),  # the first alone finds it
        (["--batch-size", "5"], 2, "a batch of 5 images is too small to be shared by 3 processes"),
        (["--lr", "1e12"], 1, "the training diverged"),
    ],
)
def test_an_error_is_told_once(arguments, status, said, started):
    ended, _ = started(3, *arguments)
    # The others may find it themselves, miss the one that did, or get torchrun's signal.
    assert status in {each.status for each in ended} <= {status, 1, 143}, ended
    (line,) = "".join(each.err for each in ended).strip().splitlines()
    assert said in line


def test_questions_are_asked_once_and_the_answers_are_everybodys(tmp_path):
    def work() -> None:
        sys.stdin = io.StringIO("3\n7\n" if os.environ["RANK"] == "0" else "")
        args = argparse.Namespace(
            model=None, epochs=None, dry_run=False, no_test=False, val_split=None
        )
        with parallel.join() as team:
            model, epochs = team.once(flags.choose, args)
            assert (Path(model).name, epochs) == ("model_3.py", 7)

    ended = run_team(work, 2, tmp_path)
    assert [each.status for each in ended] == [0, 0]
    assert ended[0].out.count("Which model?") == 1
    assert ended[1].out == ""


def test_whoever_asks_may_wait_longer_than_for_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", timedelta(seconds=1))

    def work() -> None:
        with parallel.join() as team:
            assert team.once(lambda: time.sleep(1.4) or "answer") == "answer"
            turns = []
            team.once_a_machine(lambda: (turns.append(1), team.first and time.sleep(1.4)))
            assert turns == [1]

    assert [each.status for each in run_team(work, 2, tmp_path)] == [0, 0]


def test_a_next_attempt_asks_nobody_and_repeats_nothing(started, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UsageError, match="started this anew, and what was answered is lost"):
        flags.choose(
            argparse.Namespace(
                model=None, epochs=None, dry_run=False, no_test=False, val_split=None
            )
        )
    ended, folder = started(2)
    assert [each.status for each in ended] == [0, 0]
    log = (folder / "train.log").read_text()
    ended, again = started(2, attempt=1)
    assert [each.status for each in ended] == [0, 0]
    assert (again, (folder / "train.log").read_text()) == (folder, log)


def test_help_comes_once_and_half_an_environment_is_none(tmp_path, monkeypatch, capsys):
    ended = run_team(lambda: train.main(["--help"]), 2, tmp_path)
    assert [each.out.count("usage: train.py") for each in ended] == [1, 0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert train.main(["--nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_signal_leaves_a_run_that_goes_on_with_any_number(started):
    _, whole = started(1)
    ended, folder = started(2, plan=f"all 9 {int(signal.SIGTERM)}")
    assert [each.status for each in ended] == [143, 143], ended
    assert "Stopped in epoch 2: SIGTERM" in ended[0].out
    assert "Go on with: " in ended[0].out
    assert "".join(each.err for each in ended).count("interrupted") == 1
    ended, _ = started(3, resume=folder)
    assert [each.status for each in ended] == [0, 0, 0], ended
    assert "Resumed after epoch 1" in ended[0].out
    assert_same(folder, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_kill_the_next_attempt_goes_on_by_itself(rank, started):
    _, whole = started(1)
    # torchrun keeps its store: what the dead have left there must not be taken for the living's.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended, folder = started(2, plan=f"{rank} 9 {int(signal.SIGKILL)}", store=store)
    assert ended[rank].status == -signal.SIGKILL
    assert ended[1 - rank].status in (1, 143), ended  # torchrun's signal comes soon, or at once
    assert "".join(each.err for each in ended).count("train.py: ") == 1
    ended, again = started(2, attempt=1, store=store)
    assert [each.status for each in ended] == [0, 0], ended
    assert again == folder
    assert_same(folder, whole)


def test_who_waits_in_vain_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", timedelta(seconds=1))

    def work() -> int:
        os.environ["WORLD_SIZE"] = "2"
        return train.main(["--dry-run", "--model", "2", "--output-dir", str(tmp_path)])

    ((status, _, error),) = run_team(work, 1, tmp_path)
    assert status == 1
    assert error.startswith(f"train.py: error: {parallel.MISSING}")
    assert error.count("\n") == 1


def test_more_processes_than_devices_are_refused(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parallel.device_index(cuda, 4) == 3
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert parallel.device_index(cuda, 4) == 0
    with pytest.raises(UsageError, match="4 processes on a machine of 2 cuda devices; give it"):
        parallel.device_index(cuda, 2)
    with pytest.raises(UsageError, match="instead of cuda:1 give cuda, and CUDA_VISIBLE_DEVICES"):
        parallel.device_index(torch.device("cuda:1"), 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for device in (cuda, torch.device("cuda:1")):  # alone: as --device says
        assert parallel.device_index(device, 2) is None


# ---------------------------------------------------------------- torchrun itself

# What torchrun starts: stands for a process of `serve`, and ends as that one does.
STAND_IN = """
import json, os, signal, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect(sys.argv[1])
socket.send_fds(asked, [json.dumps(dict(os.environ)).encode()], [1, 2])
process = int(asked.recv(100))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(process, number))
status = int(asked.recv(100))
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def serve(listener: socket.socket, arguments: Sequence[str]) -> None:
    """Forks a training for each that asks, with its environment and output; tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        asked, _ = listener.accept()
        if os.fork():
            asked.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        environment, descriptors, _, _ = socket.recv_fds(asked, 100_000, 2)
        os.environ.clear()
        os.environ |= json.loads(environment)
        process = forked.fork(lambda: train.main(arguments), 0, *descriptors)
        asked.send(str(process).encode())
        asked.send(str(forked.status_of(process)).encode())
        os._exit(0)


def test_two_machines_lose_a_process_and_end_as_one_alone(started, tmp_path):
    """Two agents on 127.0.0.1, a process each; the second is killed once and started anew."""
    import torch.distributed.run as distributed_run  # takes a while

    _, whole = started(1)
    (tmp_path / "plan").write_text(f"1 9 {int(signal.SIGKILL)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    training = [
        "--dry-run", "--device", "cpu", "--epochs", "2", "--model", str(tmp_path / "plain.py"),
        "--output-dir", str(tmp_path / "two"),
    ]  # fmt: skip
    torchrun = [
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--monitor-interval", "0.1",
        "--no-python", sys.executable, "-IS", str(tmp_path / "stand_in.py"), str(tmp_path / "ask"),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "ask"))
        listener.listen()
        server = forked.fork(lambda: serve(listener, training), 0, 1, 2)
        stack.callback(forked.status_of, server)
        stack.callback(os.kill, server, signal.SIGKILL)
        texts = [stack.enter_context((tmp_path / name).open("w+")) for name in "ab"]
        agents = [
            forked.fork(lambda: distributed_run.main(torchrun), 0, text.fileno(), text.fileno())
            for text in texts
        ]
        statuses = [forked.status_of(agent) for agent in agents]
    printed = [(tmp_path / name).read_text() for name in "ab"]
    assert statuses == [0, 0], printed
    assert sum(text.count("Resumed after epoch 1") for text in printed) == 1
    folder = run_in(tmp_path / "two")
    assert_same(folder, whole)
