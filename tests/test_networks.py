"""Model files of all kinds, and whose weights are whose."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli
import networks
import train
import utils
from fast.batched import A
from support import files, flags, model_files, provenance, workers
from tests.conftest import SMALL_NETWORK, call_main, run_in
from tools import evaluate, find_lr, predict

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).parents[1]
ARGUMENTS = sorted(flags.to_store(flags.parser().parse_args([])))
HEAD = SMALL_NETWORK[: SMALL_NETWORK.index("class Small")]


def dry_run(capsys, model: object, *arguments: object) -> tuple[int, str, str]:
    return call_main(train.main, capsys, ["--dry-run", "--model", model, *arguments])


def written(folder: Path, text: str, name: str = "net.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def trained(capsys, folder: Path, text: str = SMALL_NETWORK, name: str = "net.py") -> Path:
    """The run's folder of an epoch of that model file."""
    model = written(folder, text, name)
    status, _, error = dry_run(capsys, model, "--epochs", 1, "--output-dir", folder / "out")
    assert status == 0, error
    run = run_in(folder / "out")
    return run


def evaluated(capsys, run: Path, folder: Path, *arguments: object) -> float:
    """What tools.evaluate finds on the sample's test images, in percent."""
    output = folder / "evaluated"
    flags = [run, "--dry-run", "--output-dir", output, *arguments]
    status, _, error = call_main(evaluate.main, capsys, flags)
    assert status == 0, error
    (found,) = output.iterdir()
    return json.loads((found / "evaluation.json").read_text())["top1"]


# ---------------------------------------------------------------- legal networks train

TUTORIAL = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.linear = nn.Linear(16 * 5 * 5, 10)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        return self.linear(x.view(-1, 16 * 5 * 5))
"""
ATTENTION = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(self.encoder(self.patches(x).flatten(2).mT).mean(dim=1))
"""
RECURRENT = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(96, 16, batch_first=True)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])
"""
DICTIONARY = """
class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return {"features": self.conv(x)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.linear = _Block(), nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(self.block(x)["features"].mean(dim=(2, 3)))
"""
NORMALISED = """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        )
"""
WEIGHT_NORM = """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, stride=4)),
            nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )
"""


@pytest.mark.parametrize(
    ("network", "arguments", "said"),
    [
        (TUTORIAL, (), "contiguous, since channels_last fails: line"),
        (ATTENTION, (), ""),
        (RECURRENT, (), ""),
        (DICTIONARY, (), ""),
        # 1,000 images in batches of 333 leave one over.
        (NORMALISED, ("--batch-size", 333), ""),
        (WEIGHT_NORM, ("--set", "optimizer=muon"), ""),
    ],
    ids=["tutorial", "attention", "recurrent", "dictionary", "normalised", "weight norm"],
)
def test_legal_networks_train_and_are_evaluated(network, arguments, said, capsys, tmp_path):
    model = written(tmp_path, HEAD + network)
    output = tmp_path / "out"
    status, out, error = dry_run(capsys, model, "--epochs", 1, "--output-dir", output, *arguments)
    assert status == 0, error
    assert said in out
    run = run_in(output)
    summary = (run / "summary.txt").read_text()
    assert summary
    if network in (ATTENTION, RECURRENT, DICTIONARY):
        assert summary.startswith("torchsummary can make no table of Net: ")
    settings = json.loads((run / "settings.json").read_text())
    contiguous = settings["memory_format"] == "torch.contiguous_format"
    assert contiguous == (network == TUTORIAL)
    found = evaluated(capsys, run, tmp_path, "--model", model)
    assert found == json.loads((run / "results.json").read_text())["final_accuracy"]


def test_a_contiguous_teacher_teaches_a_network_that_is_not(capsys, tmp_path):
    """By another file than the student's: it has to lie beside model_2.py to be run."""
    model = written(tmp_path, HEAD + TUTORIAL)
    network = networks.load_network(str(model))
    assert network.fitting(utils.Device.pick("cpu")).layout == torch.contiguous_format
    teacher = networks.Teacher(network.build().eval(), utils.Device(torch.device("cpu")), 0)
    images = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    answers = teacher(images, torch.tensor([0, 1, 2, 3])).answers
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(4))


def test_an_epoch_holds_every_image_once_and_no_batch_of_one(sample):
    for size, batch_size, sizes in (
        (10, 3, [3, 3, 4]),
        (10, 4, [4, 4, 2]),
        (7, 7, [7]),
        (8, 7, [8]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ):
        sampler = utils.BatchSampler(size, batch_size, shuffle=True, seed=3)
        batches = [indices for _, indices in sampler]
        assert [len(batch) for batch in batches] == sizes
        assert len(sampler) == len(sizes)
        assert sorted(index for batch in batches for index in batch.tolist()) == [*range(size)]
        loader = utils.make_loader(
            sample.train_images[:size],
            sample.train_labels[:size],
            utils.test_transform((0.5,) * 3, (0.2,) * 3),
            batch_size,
            utils.Device(torch.device("cpu")),
            shuffle=True,
            seed=3,
        )
        assert [labels.tolist() for _, labels in loader] == [
            sample.train_labels[batch].tolist() for batch in batches
        ]


def test_a_run_builds_its_network_twice(capsys, tmp_path):
    """Once to see that it is a network, once to train it."""
    counter = tmp_path / "built"
    text = SMALL_NETWORK.replace(
        "super().__init__()", f"super().__init__()\n        open({str(counter)!r}, 'a').write('x')"
    )
    trained(capsys, tmp_path, text)
    assert counter.read_text() == "xx"


def test_the_summary_changes_no_draw(sample):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    before, state = model[1].running_mean.clone(), torch.get_rng_state()
    assert "Conv2d-1" in model_files.summary_table(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, before)


# ---------------------------------------------------------------- model files


def test_a_model_file_may_hold_what_python_files_hold(tmp_path):
    written(tmp_path, "WIDTH = 8\n", "neighbour_of_net.py")
    text = (
        "from __future__ import annotations\n\nfrom dataclasses import dataclass\n\n"
        f"from neighbour_of_net import WIDTH\n{HEAD}\n"
        "@dataclass\nclass Sizes:\n    width: int = WIDTH\n\n"
        "class Base(nn.Module):\n    def forward(self, x):\n"
        "        return self.linear(x.mean(dim=(2, 3)))\n\n"
        "class Net(Base):\n    def __init__(self, sizes: Sizes | None = None):\n"
        "        super().__init__()\n        self.linear = nn.Linear(3, 10)\n"
    )
    network = networks.load_network(str(written(tmp_path, text)))
    assert (network.build.__name__, network.parameters) == ("Net", 40)


FORWARD = "        return self.linear(self.dropout(x).mean(dim=(2, 3)))"
CLASS, LAST = (
    1 + SMALL_NETWORK[: SMALL_NETWORK.index(text)].count("\n") for text in ("class Small", FORWARD)
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Small", "1 / 0\n\nclass Small", f"cannot be run: line {CLASS}: ZeroDivisionError"),
        ("class Small", "exit(0)\nclass Small", f"line {CLASS}: it ends the program"),
        (FORWARD, f"        nn.Linear(3, 4)(x)\n{FORWARD}", rf"fails on images .*: line {LAST}: "),
        (FORWARD, "        raise SystemExit(0)", f"line {LAST}: it ends the program"),
        (FORWARD, "        return {'a': x}", "turns 2 images into a dict"),
        (
            FORWARD,
            f"        if self.training:\n            exit(0)\n{FORWARD}",
            f"line {LAST + 1}: it ends the program",
        ),
        (
            FORWARD,
            f"{FORWARD}, 'auxiliary'",
            "turns 2 images into a tuple; it must be",
        ),
        (
            FORWARD,
            f"        if self.training:\n            return x, x\n{FORWARD}",
            "Small in training turns 2 images into a tuple",
        ),
        (FORWARD, f"{FORWARD}.detach()", "no gradient leads from Small's logits to its parameters"),
        ("nn.BatchNorm2d(8)", "nn.LazyBatchNorm2d(affine=False)", "Small has lazy layers"),
        ("nn.Linear(8, 10)", "nn.LazyLinear(10)", "Small has lazy layers, .* give their sizes"),
        (
            "class Small",
            "class Part(nn.ReLU):\n    pass\n\n\nclass Small",
            "found: Part, Small; begin the names of its parts with an underscore",
        ),
        (
            'schedule="onecycle"',
            'schedule="onecycle", transform=["x"]',
            "transform is ..x..: Input should be",
        ),
        ("lr=0.05", f"lr={'9' * 400}", "lr is 9+: Input should be a valid number"),
    ],
    ids=[
        "error",
        "exit",
        "forward",
        "exit in it",
        "dict",
        "exit in training",
        "tuple",
        "tuple in training",
        "detached",
        "lazy norm",
        "lazy",
        "parts",
        "list",
        "digits",
    ],
)
def test_what_is_wrong_with_a_model_file_is_one_line_with_its_place(old, new, message, tmp_path):
    assert old in SMALL_NETWORK
    path = written(tmp_path, SMALL_NETWORK.replace(old, new, 1))
    with pytest.raises(cli.UsageError, match=message) as caught:
        networks.load_network(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "arguments", "message"),
    [
        (
            FORWARD,
            f"        assert len(x) < 50 or not self.training\n{FORWARD}",
            (),
            f"line {LAST}: AssertionError",
        ),
        (
            FORWARD,
            f"        if len(x) > 50 and self.training:\n            exit(0)\n{FORWARD}",
            (),
            f"line {LAST + 1}: SystemExit: 0",
        ),
        (FORWARD, FORWARD, ("--set", "transform=[1]"), "transform is [1]: Input should be"),
        (FORWARD, FORWARD, ("--set", f"lr={'9' * 400}"), "Input should be a valid number"),
        (FORWARD, FORWARD, ("--set", f"momentum={'9' * 400}"), "Input should be a valid number"),
        (FORWARD, FORWARD, ("--set", f"lr={'-' * 5000}1"), "lr is '---"),
        (FORWARD, FORWARD, ("--weight-decay", "1e308"), "'1e308' is not a number from 0 up"),
        (
            "self.linear = nn.Linear(8, 10)",
            "self.linear = nn.Linear(8, 10)\n        self.requires_grad_(False)",
            (),
            "Small has no parameter that requires a gradient: nothing to train",
        ),
    ],
    ids=["forward", "exit", "list", "digits", "momentum", "signs", "weight decay", "frozen"],
)
def test_what_cannot_be_trained_is_one_line(old, new, arguments, message, capsys, tmp_path):
    path = written(tmp_path, SMALL_NETWORK.replace(old, new, 1))
    status, _, error = dry_run(capsys, path, "--output-dir", tmp_path / "out", *arguments)
    assert status in (1, 2)
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 500


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            FORWARD,
            f"        y = self.linear.weight.exp()\n        z = y * y\n        y += 1\n"
            f"{FORWARD} + z.sum()",
            "modified by an inplace operation",
        ),
        (
            "self.linear = nn.Linear(8, 10)",
            "self.linear = nn.Linear(8, 10)\n        self.table = nn.Embedding(3, 10, sparse=True)",
            "sparse gradients",
        ),
        (
            "    def forward",
            "    def get_extra_state(self):\n        return nn.ReLU()\n\n    def forward",
            "Weights only load failed",
        ),
        ("class Small", "torch.set_default_dtype(torch.float64)\n\n\nclass Small", "default dtype"),
    ],
    ids=["in place", "sparse", "extra state", "float64"],
)
def test_what_could_not_be_trained_or_saved_is_refused_before(old, new, message, tmp_path):
    text = SMALL_NETWORK.replace(old, new, 1)
    if "Embedding" in new:
        text = text.replace(FORWARD, f"{FORWARD} + self.table(torch.tensor([1]))")
    path = written(tmp_path, text)
    with pytest.raises(cli.UsageError, match=message) as caught:
        networks.load_network(str(path))
    assert torch.get_default_dtype() == torch.float32
    assert "\n" not in str(caught.value)


def test_a_view_that_fails_in_training_alone_is_trained_contiguous(tmp_path):
    view = "        if self.training:\n            x.view(len(x), -1)\n"
    path = written(tmp_path, SMALL_NETWORK.replace(FORWARD, view + FORWARD))
    assert f"line {LAST + 1}: RuntimeError" in networks.load_network(str(path)).only_contiguous


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(cli.ArgumentParser(prog="x"), lambda _: print(1 / 0), [])


@pytest.mark.parametrize("layer", ["Dropout", "Dropout1d", "Dropout2d", "AlphaDropout"])
def test_the_recipe_scales_every_dropout(layer):
    model = torch.nn.Sequential(getattr(torch.nn, layer)(0.4), torch.nn.LSTM(4, 4, 2, dropout=0.2))
    model_files.scale_dropout(model, 0.5)
    assert (model[0].p, model[1].dropout) == (0.2, 0.1)
    model_files.scale_dropout(model, 0.0)
    images = torch.rand(3, 5, 4, 4) if layer == "Dropout2d" else torch.rand(3, 5, 4)
    assert torch.equal(model[0](images), images)
    with pytest.raises(cli.UsageError, match="makes a probability of 1"):
        model_files.scale_dropout(torch.nn.Sequential(getattr(torch.nn, layer)(0.5)), 2)


def test_a_dropout_of_everything_is_no_traceback_of_the_range_test(capsys, tmp_path):
    path = written(tmp_path, SMALL_NETWORK.replace("Dropout(0.2)", "Dropout(1.0)"))
    arguments = ["--model", path, "--dry-run", "--steps", 20, "--output-dir", tmp_path]
    status, _, error = call_main(find_lr.main, capsys, arguments)
    assert status in (0, 2)
    assert error.count("\n") <= 1


def test_tools_take_an_augmentation_without_a_batched_form(capsys, tmp_path, monkeypatch):
    def rotated(mean, std, probability=0.5):
        return utils._pipeline(mean, std, A.Rotate(limit=10))

    monkeypatch.setitem(utils.TRANSFORMS, "standard", rotated)
    monkeypatch.setattr(workers, "default_workers", lambda: 2)
    path = written(tmp_path, SMALL_NETWORK)
    arguments = ["--model", path, "--dry-run", "--steps", 20, "--output-dir", tmp_path]
    status, _, error = call_main(find_lr.main, capsys, arguments)
    assert status in (0, 2), error
    assert "Traceback" not in error
    count, line = workers.choose(rotated((0.5,) * 3, (0.2,) * 3), workers=3)
    assert count == 3
    assert "because there is no batched form of Rotate" in line
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------- whose weights are whose


def test_remarks_and_recipes_are_no_code(tmp_path):
    digest = provenance.code_digest(written(tmp_path, SMALL_NETWORK))
    for old, new in (
        ("class Small(nn.Module):", "# A.\nclass Small(nn.Module):  # B.\n    'Doc.'\n"),
        ("lr=0.05", "lr=0.04"),
        ("RECIPE =", "PUBLISHED = {'lr': 3}\n'''Wörds,\nmore.'''\nRECIPE: dict ="),
        ("\n\n", "\n\n\n"),
    ):
        assert old in SMALL_NETWORK
        assert provenance.code_digest(written(tmp_path, SMALL_NETWORK.replace(old, new))) == digest
    for old, new in (
        ("torch.relu", "torch.sigmoid"),
        ("stride=4", "stride=8"),
        ("RECIPE =", "'words'; torch.relu = torch.sigmoid\nRECIPE ="),
        ("class Small", "torch.relu = '# no remark'\nclass Small"),
        ("import torch\n", "import torch\nimport neighbour\n"),
    ):
        assert old in SMALL_NETWORK
        assert provenance.code_digest(written(tmp_path, SMALL_NETWORK.replace(old, new))) != digest


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from near import f", "near.py"),
        ("import between", "near.py"),  # which between.py imports
        ("from package.part import f", "package/part.py"),
        ("from package import part", "package/part.py"),
        ("import package.part as part", "package/__init__.py"),
        ("from package import relative", "package/part.py"),  # which relative.py imports
    ],
)
def test_what_a_model_file_imports_of_its_own_is_its_code(line, file, tmp_path):
    (tmp_path / "package").mkdir()
    written(tmp_path, "import near\n", "between.py")
    written(tmp_path, "from .part import f\n", "package/relative.py")
    for name in ("near.py", "package/__init__.py", "package/part.py"):
        written(tmp_path, "f = 1\n", name)
    path = written(tmp_path, f"{line}\n{SMALL_NETWORK}")
    digest = provenance.code_digest(path)
    written(tmp_path, "f = 1  # remark\n", file)
    assert provenance.code_digest(path) == digest
    written(tmp_path, "f = 2\n", file)
    assert provenance.code_digest(path) != digest


def test_weights_are_evaluated_with_the_code_that_was_trained(capsys, tmp_path):
    """A copy of model 2 with another activation, class name kept."""
    text = (ROOT / "model_2.py").read_text().replace("F.relu", "F.elu")
    run = trained(capsys, tmp_path, text, "model_2.py")
    accuracy = json.loads((run / "results.json").read_text())["final_accuracy"]
    assert evaluated(capsys, run, tmp_path, "--model", tmp_path / "model_2.py") == accuracy
    for main, arguments in (
        (evaluate.main, [run, "--dry-run"]),
        (evaluate.main, [run, "--dry-run", "--model", "2"]),
        (predict.main, [ROOT / "data/sample/test.png", "--weights", run]),
        (train.main, ["--model", "2", "--dry-run", "--set", f"teacher={run}"]),
    ):
        status, _, error = call_main(main, capsys, arguments)
        assert status == 2
        assert "was trained with other code than" in error
        assert error.count("\n") == 1


def test_a_run_s_folder_runs_no_code_of_its_own(capsys, tmp_path):
    run, marker = trained(capsys, tmp_path), tmp_path / "ran"
    (run / "results.json").unlink()
    path = written(run, f"open({str(marker)!r}, 'w').close()\n{SMALL_NETWORK}", "small.py")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    settings = json.loads((run / "settings.json").read_text())
    for named in (str(path), "baselines/../" + files.stored_path(path), "output/x/small.py"):
        settings |= {"model_file": named, "model_sha256": provenance.code_digest(path)}
        (run / "settings.json").write_text(json.dumps(settings))
        for main, arguments in (
            (evaluate.main, [run, "--dry-run"]),
            (predict.main, [tmp_path / "x.png", "--weights", run]),
            (train.main, ["--resume", run]),
            (train.main, ["--model", "2", "--dry-run", "--set", f"teacher={run}"]),
        ):
            status, _, error = call_main(main, capsys, arguments)
            assert status == 2
            assert "which is no file of this repository" in error
            assert error.count("\n") == 1
    assert not marker.exists()


def test_going_on_with_other_code_is_refused(capsys, tmp_path):
    run = trained(capsys, tmp_path)
    (run / "results.json").unlink()
    model = written(tmp_path, SMALL_NETWORK.replace("torch.relu", "torch.sigmoid"))
    status, _, error = call_main(train.main, capsys, ["--resume", run, "--model", model])
    assert (status, "was trained with other code than" in error) == (2, True)
    model = written(tmp_path, SMALL_NETWORK.replace("class", "# The same.\nclass"))
    status, _, error = call_main(train.main, capsys, ["--resume", run, "--model", model])
    assert status == 0, error


def test_a_run_of_the_repository_goes_on_and_teaches_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ROOT / "baselines" / "dilated_cnn.py"
    status, _, error = dry_run(capsys, model, "--epochs", 1, "--output-dir", "out")
    assert status == 0, error
    run = run_in(Path("out"))
    settings = json.loads((run / "settings.json").read_text())
    assert settings["model_file"] == "baselines/dilated_cnn.py"
    taught = ("--set", f"teacher={run}", "--output-dir", "taught")
    status, _, error = dry_run(capsys, "2", "--epochs", 1, *taught)
    assert status == 0, error
    run = run_in(tmp_path / "taught")
    (run / "results.json").unlink()
    monkeypatch.chdir(ROOT)
    status, _, error = call_main(train.main, capsys, ["--resume", run])
    assert status == 0, error


# ---------------------------------------------------------------- damaged settings


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """A committed run that looks as if it had been cut off."""
    folder = shutil.copytree(ROOT / "output/reference/model_3_12_epochs", tmp_path / "run")
    (folder / "results.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", 5), ("model_file", ["x"]), ("model_sha256", {}), ("arguments", "x"),
        ("mean", "abc"), ("mean", [1, 2]), ("std", [1, 2, "3"]), ("recipe", []), ("val_split", "x"),
    ],
)  # fmt: skip
def test_settings_of_wrong_types_are_one_line(name, value, unfinished, capsys):
    path = unfinished / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for main, arguments in (
        (evaluate.main, [unfinished, "--dry-run"]),
        (train.main, ["--resume", unfinished]),
    ):
        status, _, error = call_main(main, capsys, arguments)
        assert status == 2
        assert f"settings.json is damaged: {name}" in error
        assert error.count("\n") == 1


def resumed_with(folder: Path, capsys, name: str, value: object) -> tuple[int, str]:
    """Exit status and standard error of going on with that among the stored arguments."""
    settings = json.loads((folder / "settings.json").read_text())
    settings["arguments"][name] = value
    (folder / "settings.json").write_text(json.dumps(settings))
    status, _, error = call_main(train.main, capsys, ["--resume", folder])
    return status, error


REQUIRED = [
    name for name in ARGUMENTS if flags.to_store(flags.parser().parse_args([]))[name] is not None
]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, {"no": "value"}) for name in ARGUMENTS]
    + [(name, None) for name in [*REQUIRED, "epochs"]],
)
def test_stored_arguments_of_wrong_types_are_one_line(name, value, unfinished, capsys):
    status, error = resumed_with(unfinished, capsys, name, value)
    assert status == 2
    assert "settings.json is damaged: " in error
    assert name in error.replace("--", "").replace("-", "_")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe", "x"),
        ("set", [[1, 2]]),
        ("set", [["lr"]]),
        ("set", [["no_key", 1]]),
        ("set", [["teacher", 5]]),
    ],
)
def test_stored_arguments_that_mean_nothing_are_one_line(name, value, unfinished, capsys):
    status, error = resumed_with(unfinished, capsys, name, value)
    assert status == 2
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_file": "\\ud800"}', '{"a": "\\u0000"}'])
@pytest.mark.parametrize("name", ["settings.json", "results.json"])
def test_json_of_no_use_is_one_line(name, text, unfinished, capsys):
    (unfinished / name).write_text(text)
    for main, arguments in (
        (evaluate.main, [unfinished, "--dry-run", "--output-dir", unfinished / "out"]),
        (train.main, ["--resume", unfinished, "--data-dir", unfinished / "settings.json"]),
    ):
        status, _, error = call_main(main, capsys, arguments)
        assert status in ((2,) if name == "settings.json" else (0, 1))  # 1: no such data folder
        assert error.count("\n") <= 1
