"""tools/bench and tools/minutes: what they run and how they report; no figure is a test's."""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

import networks
import plots
import recipes
import utils
from fast import cpu
from support import workers
from tests.conftest import PIXEL, SMALL_NETWORK, call_main
from tools import bench, minutes, usual, ways

CPU = utils.Device.pick("cpu")
NET = """
import torch
print("a model file may print")
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False)
        self.linear = torch.nn.Linear(8, 10)
    def forward(self, x):
        return self.linear(self.conv(x).mean(dim=(2, 3)))
RECIPE = dict(optimizer='sgd', lr=0.1, weight_decay=0.0, schedule='cosine',
              batch_size=128, target_accuracy=85.0, target_epochs=9)
"""


@pytest.fixture
def net(tmp_path):
    """The path of a network small enough not to matter."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def turn(speeds: dict[str, float], **more: float) -> dict[str, dict[str, float]]:
    figures = {way: {"images_per_second": s, "start_seconds": s / 1e3} for way, s in speeds.items()}
    figures["ours"] |= {"matmul_gflops": 400.0}
    return figures


TURNS = [
    turn({"usual": 100, "torchvision": 200, "whole_batch": 400, "ours": 1000, "kept memory": 500}),
    turn({"usual": 200, "torchvision": 200, "whole_batch": 500, "ours": 1200, "kept memory": 400}),
    turn({"usual": 400, "torchvision": 200, "whole_batch": 600, "ours": 1600, "kept memory": 800}),
]
TRANSFORM = {
    rate: {"albumentations": bench.spread([240.0]), "batched": bench.spread([16.0])}
    for rate in ("p=1", "own p")
}
RESULTS = bench.figures(TURNS, 100.0) | {"images": 5000, "transform": TRANSFORM}


def test_figures_are_medians_and_ratios_within_each_turn():
    assert RESULTS["images_per_second"]["ours"] == {"median": 1200, "min": 1000, "max": 1600}
    assert RESULTS["start_seconds"]["usual"] == {"median": 0.2, "min": 0.1, "max": 0.4}
    assert set(RESULTS["images_per_second"]) == {"usual", "torchvision", "whole_batch", "ours"}
    # 10, 6 and 4; the ratio of the medians would be 6, their extremes 2.5 and 16.
    assert RESULTS["times_faster"]["usual"] == {"median": 6, "min": 4, "max": 10}
    assert RESULTS["parts"] == {"kept memory": {"median": 2, "min": 2, "max": 3}}
    # 1,000 images/s of 100 MFLOP are 100 GFLOP/s, of 400.
    assert RESULTS["share_percent"] == pytest.approx({"median": 30, "min": 25, "max": 40})


def test_report_names_every_figure():
    text = bench.report(RESULTS)
    for part in ("1,200", "(1,000 to 1,600)", "0.20", "6.00", "30.0", "100.0", "16.0", "240.0"):
        assert part in text
    assert "kept memory" in text


def white_edge(png: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool((edge == 255).all())


def test_picture_is_not_clipped():
    assert white_edge(bench.picture(RESULTS, "title"))


def test_training_flops_against_arithmetic(net):
    """A forward pass, and for each layer two more of its size; none for the images' gradient."""
    conv, linear = 2 * 8 * 3 * 9 * 32 * 32, 2 * 8 * 10
    counted = bench.mflop_per_image(networks.load_network(str(net)))
    assert counted == pytest.approx((2 * conv + 3 * linear) / 1e6)


def test_start_and_epoch_are_timed_apart(net, monkeypatch, capsys):
    """By a clock that only the loader moves: 5 s until its first batch, then 1 s each."""
    clock, counts = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)

    def way(network, device, count):
        def batches():
            for seconds in (5.0, 1.0, 1.0):
                clock.now += seconds
                yield seconds

        counts.append(count)
        loader = batches()
        return loader, lambda: list(loader)

    monkeypatch.setitem(bench.KINDS, "usual", way)
    arguments = ["--way", "usual", "--model", net, "--device", "cpu", "--images", 700]
    status, out, _ = call_main(bench.main, capsys, arguments)
    assert status == 0
    assert json.loads(out) == {"images_per_second": 100.0, "start_seconds": 5.0}
    assert counts == [4 * 128 + 60, 700, 700]  # the size of the last batch is warmed up, too


# ---------------------------------------------------------------- the ways


def test_usual_data_set_is_the_same_pipeline(sample):
    mean, std = utils.channel_stats(sample.test_images)
    transform = utils.test_transform(mean, std)
    item_by_item = usual.UsualDataset(
        sample.test_images, sample.test_labels, partial(usual.albumented, transform)
    )
    ((images, labels),) = utils.make_loader(
        sample.test_images,
        sample.test_labels,
        transform,
        len(sample.test_images),
        utils.Device(torch.device("cpu")),
    )
    assert [item_by_item[i][1] for i in range(len(labels))] == labels.tolist()
    torch.testing.assert_close(torch.stack([image for image, _ in item_by_item]), images)


def test_whole_batches_are_crops_and_flips_of_every_image_once(net, monkeypatch):
    images, _ = ways.repeated_sample(60)
    monkeypatch.setattr(ways, "repeated_sample", lambda count: (images, np.arange(count)))
    device = utils.Device(torch.device("cpu"), torch.float32, torch.channels_last)
    net.write_text(NET.replace("batch_size=128", "batch_size=25"))
    network = networks.load_network(str(net))
    epochs = [ways.whole_batch(network, device, 60)[0] for _ in range(2)]
    mean, std = utils.channel_stats(images)
    normalised = (images / 255 - np.array(mean)) / np.array(std)
    padded = np.pad(normalised, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))
    places, flips, order, sizes = set(), set(), [], []
    for batch, labels in itertools.chain(*epochs):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        sizes.append(len(labels))
        order += labels.tolist()
        for image, label in zip(batch.numpy(), labels.tolist(), strict=True):
            found = [
                (y, x, flip)
                for flip in (False, True)
                for y, x in np.argwhere(
                    np.isclose(windows[label], image[..., ::-1] if flip else image, atol=1e-5).all(
                        axis=(2, 3, 4)
                    )
                )
            ]
            assert found, label
            places.add(found[0][:2])
            flips.add(found[0][2])
    assert sizes == [25, 25, 10, 25, 25, 10]
    first, second = order[:60], order[60:]
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert flips == {False, True}
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_trains(name, net, monkeypatch):
    """An epoch of each moves the weights of the same network, in the recipe's batches."""
    network = networks.load_network(str(net))
    built = []
    monkeypatch.setattr(workers, "default_workers", lambda: 0)  # nothing to start
    monkeypatch.setattr(
        ways,
        "DataLoader",
        lambda *a, **k: torch.utils.data.DataLoader(*a, **k | {"num_workers": 0}),
    )
    build = network.build
    network = network._replace(build=lambda: built.append(build()) or built[-1])
    loader, _ = ways.WAYS[name](network, CPU, 300)
    assert [len(labels) for _, labels in loader] == [128, 128, 44]
    _, epoch = ways.WAYS[name](network, CPU, 300)
    model = built[-1]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    epoch()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, old)


def test_the_images_are_the_sample_over_and_over(sample):
    images, labels = ways.repeated_sample(2300)
    assert np.array_equal(images, np.concatenate([sample.train_images] * 3)[:2300])
    assert np.array_equal(labels, np.concatenate([sample.train_labels] * 3)[:2300])


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_smooths_labels_as_the_recipe_says(name, net, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn, "CrossEntropyLoss", lambda **options: asked.append(options) or None
    )
    net.write_text(NET.replace("batch_size=128", "batch_size=128, label_smoothing=0.1"))
    ways.WAYS[name](networks.load_network(str(net)), CPU, 256)
    assert asked == [{"label_smoothing": 0.1}]


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_has_the_recipe_s_share_of_dropout(name, net):
    for old, new in (
        ("dict(optimizer", "dict(dropout=0.25, optimizer"),
        ("        self.linear", "        self.drop = torch.nn.Dropout(0.4)\n        self.linear"),
        ("self.conv(x)", "self.drop(self.conv(x))"),
    ):
        net.write_text(net.read_text().replace(old, new))
    network, seen = networks.load_network(str(net)), set()

    def keep(module: torch.nn.Module, _inputs: object) -> None:
        if isinstance(module, torch.nn.Dropout) and module.training:
            seen.add(module.p)

    _, epoch = ways.WAYS[name](network, CPU, 256)
    with torch.nn.modules.module.register_module_forward_pre_hook(keep):
        epoch()
    assert seen == {0.1}


@pytest.mark.parametrize(
    ("name", "processes", "steps"),
    [
        ("usual", 5, ["HorizontalFlip", "Affine", "CoarseDropout", "Normalize", "ToTensorV2"]),
        ("torchvision", 2, ["RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]),
    ],
)
def test_textbook_ways_load_as_their_authors_do(name, processes, steps, net, monkeypatch):
    loaded, epochs = [], []
    monkeypatch.setattr(ways, "DataLoader", lambda *a, **k: loaded.append((*a, k)))
    monkeypatch.setattr(workers, "default_workers", lambda: 5)
    train_transform = recipes.Recipe.train_transform

    def augmentation(recipe: recipes.Recipe, *stats: object) -> A.Compose:
        epochs.append(stats[2])
        return train_transform(recipe, *stats)

    monkeypatch.setattr(recipes.Recipe, "train_transform", augmentation)
    ways.WAYS[name](networks.load_network(str(net)), CPU, 256)
    ((dataset, size, options),) = loaded
    assert (len(dataset), size, options["shuffle"]) == (256, 128, True)
    assert options["num_workers"] == processes
    transform = dataset.transform
    if name == "usual":
        transform = transform.args[0]
        assert epochs == [ways.EPOCHS]
    assert [type(step).__name__ for step in transform.transforms] == steps
    if name == "torchvision":
        crop = transform.transforms[0]
        assert (crop.size, crop.padding) == ((32, 32), 4)


@pytest.mark.parametrize("part", ways.PARTS)
def test_what_is_left_out_is_left_out(part, net, monkeypatch):
    calls, trained = [], []
    for name in ("keep_freed_memory", "speed_up"):
        monkeypatch.setattr(cpu, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(utils, "train", lambda model, loader, *rest: trained.append(rest))
    monkeypatch.setattr(workers, "default_workers", lambda: 0)
    loader, epoch = ways.KINDS[part](networks.load_network(str(net)), CPU, 256)
    epoch()
    found = trained[0][4]
    assert isinstance(loader, utils.BatchedLoader) == (part != "batched loader")
    assert ("keep_freed_memory" in calls) == (part != "kept memory")
    assert ("speed_up" in calls) == (part != "faster layers")
    assert found.dtype == (torch.float32 if part == "reduced precision" else CPU.dtype)
    assert found.layout == (
        torch.contiguous_format if part == "channels_last" else torch.channels_last
    )


def test_ours_is_what_train_runs():
    """The same precision, layers and augmentation as train.py takes."""
    loader, _ = ways.ours(networks.load_network("2"), CPU, 256)
    assert type(loader.transform.steps[0]).__name__ == "PadIfNeeded"


def test_ours_loads_an_augmentation_without_a_batched_form(net, monkeypatch):
    pipeline = utils.test_transform((0.5,) * 3, (0.2,) * 3)
    blurred = A.Compose([A.Blur(p=1.0), *pipeline.transforms])
    monkeypatch.setitem(utils.TRANSFORMS, "standard", lambda *_: blurred)
    monkeypatch.setattr(workers, "default_workers", lambda: 0)
    loader, _ = ways.ours(networks.load_network(str(net)), CPU, 256)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert loader.dataset.transform is blurred


# ---------------------------------------------------------------- the command


def test_a_process_of_its_own_answers_with_an_epoch_s_figures(net):
    """A real one; the other ways, and what is made of their answers, are called in this process."""
    answer = bench.measure("ours", networks.load_network(str(net)), CPU, 256)
    assert set(answer) == {"images_per_second", "start_seconds", "matmul_gflops"}
    assert all(0 < value < math.inf for value in answer.values())


class Served:
    """In place of a process: the command line that it is started with, called in this one."""

    commands: list[list[str]]

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[:3] == [sys.executable, "-m", "tools.bench"]
        assert options["cwd"] == bench.HERE
        self.commands.append(command[3:])
        self.pid = 2**22 + 1  # nobody's: beyond what a process can have

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def communicate(self) -> tuple[str, None]:
        arguments = bench_parser(self.commands[-1])
        answers = io.StringIO()
        with contextlib.redirect_stdout(answers), contextlib.redirect_stderr(io.StringIO()):
            bench.serve(arguments)
        return answers.getvalue(), None

    def kill(self) -> None:
        pass


def bench_parser(arguments: list[str]) -> argparse.Namespace:
    """What the command line makes of them."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.cli, "run", lambda parser, *_: found.append(parser) or 0)
        bench.main([])
    return found[0].parse_args(arguments)


def test_the_whole_command(net, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "TRANSFORM_IMAGES", 100)
    monkeypatch.setattr(bench, "MATRIX_SIDE", 64)
    monkeypatch.setattr(workers, "default_workers", lambda: 0)
    monkeypatch.setattr(
        ways,
        "DataLoader",
        lambda *a, **k: torch.utils.data.DataLoader(*a, **k | {"num_workers": 0}),
    )
    for name in ("keep_freed_memory", "speed_up"):  # which some parts replace, for good
        monkeypatch.setattr(cpu, name, getattr(cpu, name))
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(Popen=Served, PIPE=subprocess.PIPE))
    monkeypatch.setattr(Served, "commands", [], raising=False)
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or PIXEL)
    arguments = ["--model", net, "--device", "cpu", "--images", 300, "--repetitions", 1, "--parts"]
    status, out, error = call_main(
        bench.main, capsys, [*arguments, "--output-dir", tmp_path / "out"]
    )
    assert (status, error) == (0, "")
    flags = ["--images", "300", "--model", str(net), "--device", "cpu"]
    assert Served.commands == [["--way", kind, *flags] for kind in ways.KINDS]
    assert len(drawn) == 1
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in folder.glob("[!.]*")) == [
        "bench.json",
        "bench.png",
        "train.log",
    ]
    results = json.loads((folder / "bench.json").read_text())
    assert results["network"] == "Net"
    assert list(results["images_per_second"]) == list(ways.WAYS)
    assert list(results["parts"]) == list(ways.PARTS)
    assert (results["images"], results["repetitions"], results["batch_size"]) == (300, 1, 128)
    for values in (
        *results["images_per_second"].values(),
        *results["start_seconds"].values(),
        results["share_percent"],
        *results["parts"].values(),
        *(form for forms in results["transform"].values() for form in forms.values()),
    ):
        assert 0 < values["min"] <= values["median"] <= values["max"] < math.inf
    assert "Standard transform alone" in out


@pytest.mark.parametrize(("parts", "kinds"), [([], ways.WAYS), (["--parts"], ways.KINDS)])
def test_the_kinds_take_turns(parts, kinds, net, tmp_path, capsys, monkeypatch):
    calls = []

    def measure(kind, _network, _device, images: int) -> dict[str, float]:
        calls.append((kind, images))
        return {"images_per_second": len(calls), "start_seconds": 1.0, "matmul_gflops": 2.0}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "bench_transform", lambda *_: TRANSFORM)
    monkeypatch.setattr(bench, "picture", lambda *_: PIXEL)
    arguments = ["--model", net, "--device", "cpu", "--images", 700, "--repetitions", 3, *parts]
    assert call_main(bench.main, capsys, [*arguments, "--output-dir", tmp_path / "out"])[0] == 0
    assert calls == [(kind, 700) for kind in kinds] * 3
    (file,) = (tmp_path / "out").glob("*/bench.json")
    speeds = json.loads(file.read_text())["images_per_second"]
    first, step = 1 + list(kinds).index("ours"), len(kinds)
    wanted = {"median": first + step, "min": first, "max": first + 2 * step}
    assert speeds["ours"] == wanted


def fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("script", ["exit 3", "printf '{\"ima'"])
def test_a_measured_process_that_dies_is_told_in_one_line(
    script, net, tmp_path, capsys, monkeypatch
):
    """Without an answer, and with half of one."""
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", script))
    status, _, error = call_main(bench.main, capsys, ["--model", net, "--output-dir", tmp_path])
    assert status == 1
    assert error == (
        "tools.bench: error: the process that measures 'usual' ended; its error is above\n"
    )


def alive(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_all_processes(number, status, net, tmp_path, capsys, monkeypatch):
    """The measured one, deaf to the signal as it is, and its workers."""
    pids = tmp_path / "pids"
    script = f"trap '' INT TERM\nsleep 600 &\necho $$ $! >> '{pids}'\nwait"
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", script))

    def interrupt() -> None:
        while not pids.is_file() or len(pids.read_text().split()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    found, _, error = call_main(bench.main, capsys, ["--model", net, "--output-dir", tmp_path])
    thread.join()
    assert found == status
    assert error == "\ntools.bench: interrupted\n"
    deadline = time.monotonic() + 10  # the orphaned workers are init's to bury
    left = [int(pid) for pid in pids.read_text().split()]
    while any(map(alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, left))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "9"], "'9' is neither"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--images", "10"], "'10' is not a whole number from 256 to 1000000"),
        (["--repetitions", "0"], "'0' is not a whole number from 1 to 100"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, message, capsys, tmp_path):
    status, _, error = call_main(bench.main, capsys, [*arguments, "--output-dir", tmp_path])
    assert status == 2
    assert error.startswith("tools.bench: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the usual way's training


@pytest.fixture(scope="session")
def begun_once(tmp_path_factory) -> tuple[list, Path]:
    """The flags and the folder of a training of two epochs that --until stopped after one."""
    folder = tmp_path_factory.mktemp("begun")
    net, out = folder / "net.py", folder / "out"
    net.write_text(NET + "PUBLISHED = dict(RECIPE)\n")
    common = ["--model", str(net), "--dry-run", "--device", "cpu", "--epochs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "default_workers", lambda: 0)
        assert usual.main([*common, "--output-dir", str(out), "--until", "0.01"]) == 0
    (run,) = out.iterdir()
    return common, run


@pytest.fixture
def begun(begun_once, tmp_path, monkeypatch) -> tuple[list, Path]:
    """A copy of it."""
    monkeypatch.setattr(workers, "default_workers", lambda: 0)
    common, run = begun_once
    return [*common], shutil.copytree(run, tmp_path / "out" / run.name)


def test_usual_trains_until_the_accuracy_and_goes_on(begun, capsys):
    common, folder = begun
    assert len(minutes.read_curve(folder, "usual", None)[1]) == 1
    again = [*common, "--resume", folder, "--until", 0.01]  # there already
    assert call_main(usual.main, capsys, again)[0] == 0
    assert len(minutes.read_curve(folder, "usual", None)[1]) == 1
    assert call_main(usual.main, capsys, [*common, "--resume", folder])[0] == 0
    spent, accuracies = minutes.read_curve(folder, "usual", None)
    assert len(spent) == len(accuracies) == 2
    assert 0 < spent[0] < spent[1]
    assert all(0 < accuracy < 100 for accuracy in accuracies)


@pytest.mark.parametrize("flags", [["--model", "1"], ["--epochs", "3"], ["--seed", "1"]])
def test_usual_goes_on_with_the_same_training_alone(flags, begun, capsys, monkeypatch):
    common, folder = begun
    one = networks.load_network(str(common[1]))
    other = one._replace(build=type("Other", (one.build,), {}))
    load = networks.load_network
    monkeypatch.setattr(networks, "load_network", lambda c: other if c == "1" else load(c))
    status, _, error = call_main(usual.main, capsys, [*common, *flags, "--resume", folder])
    assert status == 2
    assert error.startswith(f"tools.usual: error: {folder} was begun with ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value"), [("dry_run", False), ("data_sha256", {}), ("recipe", {"lr": 1.0})]
)
def test_usual_goes_on_with_the_same_images_and_recipe_alone(key, value, begun, capsys):
    common, folder = begun
    settings = json.loads((folder / "usual.json").read_text())
    (folder / "usual.json").write_text(json.dumps(settings | {key: value}))
    status, _, error = call_main(usual.main, capsys, [*common, "--resume", folder])
    assert status == 2
    assert error.startswith(f"tools.usual: error: {folder} was begun with {key} {value!r}; give")


@pytest.mark.parametrize("entry", ["clip_norm=1.0", "label_smoothing=0.1", "teacher='model_1'"])
def test_usual_refuses_a_recipe_that_it_would_not_follow(entry, tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET + f"PUBLISHED = dict(RECIPE, {entry})\n")
    status, _, error = call_main(usual.main, capsys, ["--model", tmp_path / "net.py", "--dry-run"])
    assert status == 2
    assert f"PUBLISHED recipe has {entry.partition('=')[0]}, which" in error


def keep_only_the_model(path: Path) -> None:
    torch.save({"model": torch.load(path)["model"]}, path)


def keep_another_model(path: Path) -> None:
    torch.save(torch.load(path) | {"model": {"x": torch.zeros(1)}}, path)


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("usual.json", Path.unlink, "usual.json cannot be read"),
        ("usual.json", lambda path: path.write_text('{"net'), "usual.json cannot be read"),
        ("usual.json", lambda path: path.write_text("[]"), "usual.json holds no settings"),
        ("last.pt", Path.unlink, "last.pt"),
        ("last.pt", lambda path: path.write_bytes(path.read_bytes()[:-99]), "whole checkpoint"),
        ("last.pt", keep_only_the_model, "last.pt does not fit: KeyError: 'optimizer'"),
        ("last.pt", keep_another_model, "last.pt does not fit: RuntimeError"),
    ],
)
def test_usual_tells_of_a_damaged_folder_in_one_line(name, break_it, message, begun, capsys):
    common, folder = begun
    break_it(folder / name)
    status, _, error = call_main(usual.main, capsys, [*common, "--resume", folder])
    assert status in (1, 2)
    assert error.startswith("tools.usual: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_usual_makes_no_folder_of_one_that_is_not_there(begun, tmp_path, capsys):
    common, _ = begun
    status, _, error = call_main(usual.main, capsys, [*common, "--resume", tmp_path / "gone"])
    assert (status, error.count("\n")) == (2, 1)
    assert not (tmp_path / "gone").exists()


def test_usual_trains_by_the_textbook():
    """Two steps of gradient descent on one weight by hand, the second at half the rate."""
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    batches = [
        (torch.tensor([[2.0]]), torch.tensor([1])),
        (torch.tensor([[-1.0], [-1.0]]), torch.tensor([1, 1])),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    found = usual.run_epoch(model, batches, torch.nn.CrossEntropyLoss(), optimizer, scheduler)
    weights, losses = np.array([1.0, 0.0]), []
    for x, rate in ((2.0, 0.8), (-1.0, 0.4)):
        shares = np.exp(weights * x) / np.exp(weights * x).sum()
        losses.append(-np.log(shares[1]))
        weights -= rate * x * (shares - [0, 1])
    np.testing.assert_allclose(model.weight.detach().numpy()[:, 0], weights, rtol=1e-5)
    assert found.loss == pytest.approx((losses[0] + 2 * losses[1]) / 3, rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_usual_trains_on_the_training_images_and_evaluates_on_the_others(
    net, tmp_path, capsys, monkeypatch, sample
):
    """A clock that only the epochs move: 5 s of training, 2 s of evaluation."""
    clock, seen, augmented = SimpleNamespace(now=0.0), [], []

    def run_epoch(model, loader, criterion, optimizer=None, scheduler=None) -> utils.Metrics:
        clock.now += 2 if optimizer is None else 5
        images = loader.dataset.images
        kinds = [type(step).__name__ for step in loader.dataset.transform.args[0].transforms]
        seen.append((optimizer is not None, images, kinds[0], torch.initial_seed()))
        return utils.Metrics(1.0, 30.0) if optimizer is None else utils.Metrics(2.0, 20.0)

    train_transform = recipes.Recipe.train_transform

    def augmentation(recipe: recipes.Recipe, mean, std, epochs: int) -> A.Compose:
        augmented.append((mean, std, epochs))
        return train_transform(recipe, mean, std, epochs)

    monkeypatch.setattr(usual, "run_epoch", run_epoch)
    monkeypatch.setattr(usual.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(workers, "default_workers", lambda: 0)
    monkeypatch.setattr(recipes.Recipe, "train_transform", augmentation)
    net.write_text(NET + "PUBLISHED = dict(RECIPE)\n")
    arguments = ["--model", net, "--dry-run", "--device", "cpu", "--epochs", 2, "--seed", 3]
    status, _, _ = call_main(usual.main, capsys, [*arguments, "--output-dir", tmp_path / "out"])
    assert status == 0
    assert augmented == [(*utils.channel_stats(sample.train_images), 2)]
    assert [trains for trains, *_ in seen] == [True, False] * 2
    for trains, images, first, _ in seen:
        assert np.array_equal(images, sample.train_images if trains else sample.test_images)
        assert first == ("HorizontalFlip" if trains else "Normalize")
    assert seen[0][3] != seen[2][3]  # each epoch draws anew
    (log,) = (tmp_path / "out").glob("*/log.csv")
    header, *rows = (line.split(",") for line in log.read_text().splitlines())
    for row in rows:
        values = dict(zip(header, map(float, row), strict=True))
        assert (values["train_seconds"], values["test_seconds"]) == (5, 2)
        assert (values["train_loss"], values["test_loss"]) == (2, 1)
        assert (values["train_acc"], values["test_acc"]) == (20, 30)
    assert len(rows) == 2


def test_usual_evaluates_without_an_optimizer(sample):
    """The figures of utils.evaluate, in eval mode, and nothing learned of the images."""
    scope = {"RECIPE": None}
    exec(SMALL_NETWORK, scope)
    model = scope["Small"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.from_numpy(sample.test_images[:50]).permute(0, 3, 1, 2) / 255
    pairs = torch.utils.data.TensorDataset(images, torch.from_numpy(sample.test_labels[:50]).long())
    loader = torch.utils.data.DataLoader(pairs, 20)
    found = usual.run_epoch(model, loader, torch.nn.CrossEntropyLoss())
    plain = utils.Device(torch.device("cpu"))
    assert found == pytest.approx(utils.evaluate(model, loader, plain)[:2])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_usual_wants_a_published_recipe(net, tmp_path, capsys):
    arguments = ["--model", net, "--dry-run", "--output-dir", tmp_path]
    status, _, error = call_main(usual.main, capsys, arguments)
    assert status == 2
    assert error == ("tools.usual: error: net has no PUBLISHED recipe, which this trains by\n")


# ---------------------------------------------------------------- accuracy over minutes


@pytest.fixture
def folders(tmp_path):
    """Two folders: 85 % after the third epoch of 2 minutes, and after the second of half a one."""
    for name, seconds, accuracies in (
        ("slow", 120, (50, 84.99, 85, 80)),
        ("fast", 30, (60, 90)),
        ("weak", 30, (60, 70.5)),
    ):
        (tmp_path / name).mkdir()
        rows = [f"{n},{acc},{seconds},7" for n, acc in enumerate(accuracies, 1)]
        text = "\n".join(["epoch,test_acc,train_seconds,test_seconds", *rows]) + "\n"
        (tmp_path / name / "log.csv").write_text(text)
    (tmp_path / "bench.json").write_text(json.dumps(RESULTS))
    return tmp_path


@pytest.mark.parametrize(
    ("ours", "options", "lines"),
    [
        ("fast", [], ["usual 85 % on the test set: 6.00 minutes", "1.00 minutes", "ratio 6.00"]),
        ("weak", [], ["6.00 minutes", "not reached, at most 70.50 %"]),
        ("fast", ["--target", 60], ["usual 60 % on the test set: 4.00", "0.50", "ratio 8.00"]),
        # Three epochs of 50,000 at 200 images a second; two at 1,200.
        ("fast", ["--bench"], ["12.50 minutes", "1.39 minutes", "ratio 9.00"]),
        ("fast", ["--bench", "--bench-for", "usual"], ["12.50 minutes", "ours  85", "ratio 12.50"]),
    ],
)
def test_minutes_to_the_target(ours, options, lines, folders, capsys, monkeypatch):
    if "--bench" in options:
        options = ["--bench", folders / "bench.json", *options[1:]]
    picture = folders / "minutes.png"
    if ours != "weak":  # one of them is drawn; test_tool_pictures.py looks at the figure
        monkeypatch.setattr(plots, "png", lambda *_: PIXEL)
    arguments = [folders / "slow", folders / ours, "--output", picture, *options]
    status, out, _ = call_main(minutes.main, capsys, arguments)
    assert status == 0
    for line in lines:
        assert line in out
    assert ("ratio" in out) == (ours != "weak")
    assert ours != "weak" or white_edge(picture.read_bytes())


def test_minutes_says_in_the_picture_whose_seconds_they_are(folders, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    arguments = [folders / "slow", folders / "fast", "--output", folders / "minutes.png"]
    bench_flags = ["--bench", folders / "bench.json", "--bench-for", "usual"]
    assert call_main(minutes.main, capsys, [*arguments, *bench_flags])[0] == 0
    usual_name, ours_name, _ = (text.get_text() for text in drawn[0].legends[0].get_texts())
    assert "tools.bench, 250" in usual_name
    assert "85 %: 12.50 minutes" in usual_name
    assert "tools.bench" not in ours_name


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "slow" / "log.csv").unlink(), "log.csv cannot be read"),
        (
            lambda f: (f / "slow" / "log.csv").write_text("epoch\n1\n"),
            "there is no 'test_acc' in it",
        ),
        (
            lambda f: (f / "slow" / "log.csv").write_text("test_acc,train_seconds\nx,1\n"),
            "could not convert string to float: 'x'",
        ),
        (
            lambda f: (f / "slow" / "log.csv").write_text("test_acc,train_seconds\n"),
            "no epoch in it",
        ),
        (
            lambda f: (f / "fast" / "log.csv").write_text("test_acc,train_seconds\n90,0\n"),
            "an epoch of no time",
        ),
        (
            lambda f: (f / "slow" / "log.csv").write_text("test_acc\n" + "9" * 200_000),
            "field larger than field limit",
        ),
        (
            lambda f: (f / "bench.json").write_text("{}"),
            "bench.json cannot be read: there is no 'images_per_second' in it",
        ),
        (lambda f: (f / "bench.json").unlink(), "bench.json cannot be read"),
    ],
)
def test_minutes_of_bad_files_get_one_clear_line(break_it, message, folders, capsys):
    break_it(folders)
    bench = ["--bench", folders / "bench.json", "--bench-for", "usual"]
    arguments = [folders / "slow", folders / "fast", *bench]
    status, _, error = call_main(
        minutes.main, capsys, [*arguments, "--output", folders / "minutes.png"]
    )
    assert status == 2
    assert error.startswith("tools.minutes: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folders / "minutes.png").exists()
