"""tools.answers and the teacher that replays them, against one that is asked at every step."""

import csv
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

import cifar10
import networks
import train
import utils
from errors import UsageError
from parallel import Team
from support import provenance, teachers
from tests.conftest import SMALL_NETWORK, call_main, run_in
from tools import answers, search

EPOCHS = 3
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("network") / "small.py"
    file.write_text(SMALL_NETWORK)
    return file


def flags(network: Path, output: Path) -> list[object]:
    """Of a training and of tools.answers alike."""
    return ["--model", network, "--epochs", EPOCHS, "--dry-run", "--output-dir", output]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture, network: Path, tmp_path: Path) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        given = (*flags(network, tmp_path), *arguments)
        return call_main(answers.main, capsys, given)

    return call


@pytest.fixture
def learn(capsys: pytest.CaptureFixture, network: Path, tmp_path: Path, no_pictures: None) -> Call:
    def call(teacher: object, *arguments: object) -> tuple[int, str, str]:
        given = (*flags(network, tmp_path / "runs"), "--set", f"teacher={teacher}", *arguments)
        return call_main(train.main, capsys, given)

    return call


@pytest.fixture(scope="module")
def asked_once(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model 2's answers to two views."""
    output = tmp_path_factory.mktemp("asked")
    arguments = [*flags(network, output), "model_2", "--views", 2]
    assert answers.main([str(argument) for argument in arguments]) == 0
    return only(output)


@pytest.fixture
def folder(asked_once: Path, tmp_path: Path) -> Path:
    """A copy of them, where tools.answers would have put them."""
    return shutil.copytree(asked_once, tmp_path / "answers" / asked_once.name)


def only(output: Path) -> Path:
    (found,) = (output / "answers").iterdir()
    return found


def stored(folder: Path, view: int) -> torch.Tensor:
    return torch.load(folder / f"view_{view:04}.pt", weights_only=True)["answers"].float()


def batches(folder: Path, view: int) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Those of a folder's view as make_loader gives them: indices, images in float32, labels."""
    seed = json.loads((folder / "answers.json").read_text())["seed"]
    data = cifar10.load_sample()
    recipe = networks.load_network("2").recipe  # for the type alone
    transform = type(recipe)(**SMALL).train_transform(*utils.channel_stats(data.train_images), 3)
    device = utils.Device.pick("cpu")
    loader = utils.make_loader(
        data.train_images, data.train_labels, transform, 100, device, shuffle=True, seed=seed
    )
    loader.sampler.set_epoch(view)
    indices = loader.sampler.draw()[0]
    return [
        (index, images.float(), labels)
        for index, (images, labels) in zip(indices, loader, strict=True)
    ]


SMALL = {
    "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "schedule": "onecycle",
    "batch_size": 100, "target_accuracy": 85.0, "target_epochs": 60,
}  # fmt: skip


def test_stored_answers_are_the_mean_of_what_the_teachers_take_the_images_for(ask, tmp_path):
    status, out, _ = ask("model_2", "model_3", "--views", 2)
    assert status == 0
    folder = only(tmp_path)
    assert out.endswith(f"--set teacher={folder}\n")
    asked = [networks.load_trained(name).network for name in ("model_2", "model_3")]
    for view in (1, 2):
        found, right = stored(folder, view), 0
        for index, images, labels in batches(folder, view):
            with torch.inference_mode():
                mean = sum(network(images).softmax(dim=1) for network in asked) / 2
            # bfloat16 in the networks
            assert (found[torch.from_numpy(index)].exp() - mean).abs().max() < 0.06
            assert (found[torch.from_numpy(index)].exp() - mean).abs().mean() < 0.003
            right += (mean.argmax(dim=1) == labels).sum().item()
        line = next(line for line in out.splitlines() if line.startswith(f"View {view} of 2"))
        assert float(line.split()[4]) == pytest.approx(right / 10, abs=0.5)
    about = json.loads((folder / "answers.json").read_text())
    assert about["network"] == "CNN_Model_2 and CNN_Model_3"


def test_replaying_is_being_taught(ask, learn, tmp_path):
    """With as many views as epochs, and seed 0: the same batches and targets."""
    assert ask("model_2", "--views", EPOCHS)[0] == 0
    ways = {"asked": networks.REFERENCE / "model_2", "replayed": only(tmp_path)}
    losses = {}
    for name, teacher in ways.items():
        status, _, error = learn(teacher, "--output-dir", tmp_path / name)
        assert status == 0, error
        with open(run_in(tmp_path / name) / "log.csv") as file:
            losses[name] = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses["replayed"] == pytest.approx(losses["asked"], rel=2e-3)
    settings = json.loads((run_in(tmp_path / "replayed") / "settings.json").read_text())
    assert settings["teacher"]["network"] == "CNN_Model_2"
    assert settings["teacher"]["views"] == "3"
    assert settings["seed"] == 0


def test_no_teacher_answers_for_the_images_that_it_was_trained_on(folder, tmp_path):
    """The very crops and flips; nor for those that another taught it with, a chain of teachers."""
    device, replay = utils.Device.pick("cpu"), teachers.Replay(folder)
    sampler = utils.BatchSampler(1000, 100, shuffle=True)
    replay.attend(sampler, replay.about["circumstances"])
    seeds = [0, 2**32 - 1, sampler.seed]  # of a run, the highest of one, of the stored answers
    for name in ("model_2", "model_3"):
        run = networks.REFERENCE / name
        asked = networks.load_teacher(str(run), run / "x.py", None, device)[0]
        sampler = utils.BatchSampler(1000, 100, shuffle=True, seed=7)
        asked.attend(sampler, {})
        digest = hashlib.sha256((run / "weights.pt").read_bytes()).hexdigest()
        assert sampler.seed == 7 + teachers.batch_seed(digest)
        seeds.append(sampler.seed)
    samplers = [utils.BatchSampler(1000, 100, shuffle=True, seed=seed) for seed in seeds]
    drawn = [sampler.draw()[1] for sampler in samplers]
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_the_same_views_come_again_whatever_the_seed(folder):
    sampler = utils.BatchSampler(1000, 100, shuffle=True, seed=7)
    before = sampler.draw()[0]
    teacher, told = networks.load_teacher(str(folder), Path("x"), None, utils.Device.pick("cpu"))
    teacher.attend(sampler, teacher.about["circumstances"])
    assert told["views"] == "2"

    def drawn(epoch: int) -> list[int]:
        sampler.set_epoch(epoch)
        return [*np.concatenate(sampler.draw()[0]), *sampler.draw()[1]]

    assert drawn(1) == drawn(3) == drawn(5)
    assert drawn(2) == drawn(4)
    assert drawn(1) != drawn(2)
    sampler.set_epoch(1)
    assert not np.array_equal(before[0], sampler.draw()[0][0])
    assert np.array_equal(sampler.draw()[0][0], batches(folder, 1)[0][0])


@pytest.mark.parametrize("epoch", [1, 4])
def test_each_process_of_a_team_replays_its_part(folder, epoch):
    replay, seen = teachers.Replay(folder), []
    view = batches(folder, (epoch - 1) % 2 + 1)
    for rank in range(3):
        sampler = utils.BatchSampler(1000, 100, shuffle=True, team=Team(rank, 3))
        replay.attend(sampler, {})
        sampler.set_epoch(epoch)
        answer, found = replay.begin(sampler), []
        for (_, images, labels), (part, _) in zip(view, sampler.shares(), strict=True):
            found.append(answer(images[part], labels[part]).answers)
        seen.append(found)
    together = torch.cat([torch.cat(parts) for parts in zip(*seen, strict=True)])
    order = torch.from_numpy(np.concatenate([index for index, _, _ in view]))
    assert torch.equal(together, stored(folder, (epoch - 1) % 2 + 1)[order])


def test_held_out_images_are_not_asked_about(ask, learn, tmp_path, capsys, network):
    output = tmp_path / "held out"
    arguments = (*flags(network, output), "--val-split", 100)
    assert call_main(train.main, capsys, arguments)[0] == 0
    status, out, _ = ask(run_in(output), "--val-split", 100, "--views", 1)
    assert status == 0
    folder = only(tmp_path)
    assert len(stored(folder, 1)) == 900
    assert "'teacher=" not in out  # nothing in its path wants quotes
    status, _, error = learn(folder, "--val-split", 100, "--no-test")
    assert status == 0, error
    status, _, error = learn(folder)
    assert status == 2
    assert "their val_split was another (100 then, None now)" in error


def test_albumentations_own_pictures_are_answered_too(ask, learn, tmp_path):
    loader = ("--loader", "albumentations", "--workers", 0)
    assert ask("model_2", "--views", 1, *loader)[0] == 0
    folder = only(tmp_path)
    about = json.loads((folder / "answers.json").read_text())["circumstances"]
    assert (about["loader"], about["processes"], about["device"]) == ("albumentations", 1, "any")
    assert learn(folder, *loader)[0] == 0
    device, recipe = utils.Device.pick("cpu"), networks.load_network("2").recipe
    transform = utils.test_transform(*utils.channel_stats(cifar10.load_sample().train_images))
    given = cifar10.load_sample(), None, transform, recipe
    two = teachers.circumstances(*given, 0, device, Team(0, 2))
    assert two["processes"] == 2  # each of which draws its part anew, so they are other batches
    with pytest.raises(UsageError, match=r"was another \(1 then, 2 now\); train in one process$"):
        teachers.Replay(folder).attend(
            utils.BatchSampler(1000, 100, shuffle=True), about | {"processes": 2}
        )
    assert teachers.circumstances(*given, None, device, Team(0, 2))["processes"] == "any"


def test_a_relative_folder_is_the_working_folder_s(ask, tmp_path, monkeypatch):
    shutil.copytree(networks.REFERENCE / "model_3", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert ask("mine", "--views", 1)[0] == 0
    about = json.loads((only(tmp_path) / "answers.json").read_text())
    assert about["network"] == "CNN_Model_3"


def test_the_same_command_adds_views_and_keeps_those_that_are_there(ask, folder, tmp_path):
    kept = {path.name: path.read_bytes() for path in folder.glob("view_*")}
    (folder / "view_0002.pt").unlink()  # as if it had been stopped
    status, out, _ = ask("model_2", "--views", 3)
    assert status == 0
    assert "View 1 of 3: is there" in out
    assert only(tmp_path) == folder
    assert sorted(path.name for path in folder.glob("view_*"))[2:] == ["view_0003.pt"]
    assert (folder / "view_0001.pt").read_bytes() == kept["view_0001.pt"]
    assert (folder / "view_0002.pt").read_bytes() == kept["view_0002.pt"]  # the same draws again
    status, out, _ = ask("model_2", "--views", 1)
    assert "View 3 of 3: is there" in out
    assert "They were begun with --views 3, so they get as many" in out
    (folder / "view_0003.pt").write_bytes(b"broken")
    status, out, _ = ask("model_2", "--views", 1)
    assert "is asked for anew" in out
    teachers.Replay(folder)
    # Other weights of the same network: another folder.
    assert ask("model_2_distilled", "--views", 1)[0] == 0
    assert len(list((tmp_path / "answers").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "batch_size=50"), "their batch_size was another (100 then, 50 now)"),
        (("--set", "augment=0.1"), "their train_transform was another;"),
        (("--val-split", 100), "their val_split was another (None then, 100 now)"),
        (
            ("--loader", "albumentations"),
            "their loader was another ('batched' then",
        ),
    ],
)
def test_answers_to_other_batches_are_refused(arguments, words, folder, learn, tmp_path):
    status, _, error = learn(folder, *arguments)
    assert status == 2
    assert error.startswith("train.py: error: the answers in ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["data_sha256", "device"])
def test_each_circumstance_counts(key, folder, learn):
    path = folder / "answers.json"
    about = json.loads(path.read_text())
    about["circumstances"][key] = "x" * 1000
    path.write_text(json.dumps(about))
    status, _, error = learn(folder)
    assert status == 2
    assert f"their {key} was another" in error
    assert len(error) < 600


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(**contents: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    """What changes the tensors of a view's file."""

    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(content | {name: to(content[name]) for name, to in contents.items()}, path)

    return change


def said(**values: object) -> Callable[[Path], None]:
    """What changes the values of answers.json."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_draws(path: Path) -> None:
    shutil.copy(path.with_name("view_0002.pt"), path)


def without_a_seed(path: Path) -> None:
    about = json.loads(path.read_text())
    del about["seed"]
    path.write_text(json.dumps(about))


NONE = "does not hold a teacher's answers"
VIEW, JSON = "view_0001.pt", "answers.json"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (VIEW, cut, "view_0001.pt is not a whole checkpoint"),
        ("view_0002.pt", cut, "view_0002.pt is not a whole checkpoint"),
        (VIEW, other_draws, "are to other images than these"),
        (VIEW, changed(first=lambda first: first[:, [1, 0, 2]]), "are to other images"),
        (VIEW, changed(first=lambda first: first[:-1]), "are to other images than these"),
        (VIEW, changed(first=lambda first: first * torch.nan), NONE),
        (VIEW, changed(first=lambda first: first[None]), NONE),
        (VIEW, changed(first=lambda first: first.double()), NONE),
        (VIEW, changed(answers=lambda answers: answers[:-1]), "has not an answer for each image"),
        (VIEW, changed(answers=lambda answers: answers[:, :-1]), NONE),
        (VIEW, changed(answers=lambda answers: answers.long()), NONE),
        (VIEW, changed(answers=lambda answers: answers.float().log()), NONE),
        (VIEW, changed(answers=lambda answers: answers * torch.inf), NONE),
        (VIEW, changed(answers=lambda answers: -answers), NONE),
        (VIEW, changed(answers=lambda answers: answers.requires_grad_()), NONE),
        (VIEW, changed(answers=lambda answers: answers[:1, :1].expand(10**12, 10)), NONE),
        pytest.param(
            VIEW,
            changed(answers=lambda answers: answers.to_sparse()),
            NONE,
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        (VIEW, changed(answers=lambda answers: answers.to("meta")), NONE),
        (VIEW, changed(answers=lambda answers: 5), NONE),
        (VIEW, Path.unlink, "view_0001.pt is not there; the command of tools.answers that began"),
        ("view_0002.pt", Path.unlink, "view_0002.pt is not there"),
        (JSON, said(views=3), "view_0003.pt is not there"),
        (JSON, said(views=0), "answers.json is damaged: views is 0"),
        (JSON, said(views=10**19), "answers.json is damaged: views is 10"),
        (JSON, without_a_seed, "are an older version's, maybe to the very images that"),
        (JSON, said(network=["x"]), "answers.json is damaged: network is"),
        (JSON, said(circumstances=5), "answers.json is damaged: circumstances is 5"),
        (JSON, lambda path: path.write_text("{}"), "answers.json is damaged: network"),
        (JSON, lambda path: path.write_text("[]"), "answers.json holds no settings"),
        (JSON, cut, "answers.json cannot be read"),
    ],
)
def test_damaged_answers_are_one_line_before_anything_is_trained(
    name, damage, words, folder, learn, tmp_path
):
    damage(folder / name)
    status, out, error = learn(folder)
    assert status in (1, 2)
    assert error.startswith("train.py: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert "Epoch" not in out
    assert ("asks for it anew" in error) == (words == NONE or "whole checkpoint" in words)


@pytest.mark.parametrize("views", ["five", None, [1], 2.5, -3, 10_000])
def test_a_damaged_count_of_views_is_one_line_for_the_tool_as_well(folder, ask, views):
    said(views=views)(folder / JSON)
    before = (folder / JSON).read_text()
    status, _, error = ask("model_2", "--views", 3)
    assert status == 2
    assert "answers.json is damaged: views is" in error
    assert error.count("\n") == 1
    assert (folder / JSON).read_text() == before


def test_a_run_goes_on_with_the_answers_it_began_with_alone(
    folder, learn, ask, capsys, network, tmp_path
):
    """Views that were added since are none of them; other answers to the same views are refused."""
    assert learn(folder)[0] == 0
    run = run_in(tmp_path / "runs")
    again = ("--resume", run, "--model", network)
    before = torch.load(run / "weights.pt", weights_only=True)
    assert ask("model_2", "--views", 3)[0] == 0
    for name in ("results.json", "weights.pt"):
        (run / name).unlink()
    status, _, error = call_main(train.main, capsys, again)
    assert status == 0, error
    after = torch.load(run / "weights.pt", weights_only=True)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (run / "results.json").unlink()
    for view in (VIEW, "view_0002.pt"):
        kept = (folder / view).read_bytes()
        changed(answers=lambda answers: answers.flip(1))(folder / view)
        status, _, error = call_main(train.main, capsys, again)
        assert status == 2
        assert "its teacher is not what it began with (answers_sha256: " in error
        assert error.count("\n") == 1
        (folder / view).write_bytes(kept)
    changed(answers=lambda answers: answers.flip(1))(folder / "view_0003.pt")
    status, _, error = call_main(train.main, capsys, again)
    assert status == 0, error


def test_a_run_s_third_epoch_is_its_first_view_again_though_there_is_a_third(folder, ask):
    began = teachers.Replay(folder).describe()
    assert ask("model_2", "--views", 3)[0] == 0
    for before, views in ((began, 2), (None, 3), ({"views": "x"}, 3), ({"views": "9"}, 3)):
        replay = teachers.Replay(folder, before)
        sampler = utils.BatchSampler(1000, 100, shuffle=True)
        replay.attend(sampler, {})
        assert replay.describe()["views"] == str(views)
        sampler.set_epoch(3)
        assert sampler.epoch == (1 if views == 2 else 3)
    assert teachers.Replay(folder, began).describe() == began


def test_a_run_whose_teacher_is_gone_says_so(folder, learn, capsys, network, tmp_path):
    assert learn(folder)[0] == 0
    run = run_in(tmp_path / "runs")
    (run / "results.json").unlink()
    folder.rename(tmp_path / "elsewhere")
    again = ("--resume", run, "--model", network)
    status, _, error = call_main(train.main, capsys, again)
    assert status == 2
    assert error == f"train.py: error: {run} learns from {folder}, which is gone; put it back\n"
    (tmp_path / "elsewhere").rename(folder)
    assert call_main(train.main, capsys, again)[0] == 0


def test_views_that_are_being_added_leave_the_folder_usable(
    folder, learn, ask, monkeypatch, tmp_path
):
    """Stopped before the last of them; and they count once the command has come to its end."""
    whole, asked = answers.answer, []

    def stopped(*given: object) -> tuple:
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(answers, "answer", stopped)
    assert ask("model_2", "--views", 4)[0] == 130
    assert len(asked) == 2  # the first two were there; the third was stored, the fourth was not
    assert (folder / "view_0003.pt").is_file()
    assert json.loads((folder / JSON).read_text())["views"] == 2
    status, _, error = learn(folder)
    assert status == 0, error
    monkeypatch.undo()
    assert ask("model_2", "--views", 4)[0] == 0
    assert json.loads((folder / JSON).read_text())["views"] == 4
    assert len(teachers.Replay(folder).views) == 4


def test_the_first_views_of_a_folder_count_from_the_beginning(ask, learn, monkeypatch, tmp_path):
    """So that the folder of a command that was stopped does not pass for fewer views."""

    def stopped(*given: object) -> tuple:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "answer", stopped)
    assert ask("model_2", "--views", 2)[0] == 130
    status, _, error = learn(only(tmp_path))
    assert status == 2
    assert "view_0001.pt is not there; the command of tools.answers that began it" in error


def test_a_folder_with_a_gap_counts_all_that_were_asked_for(folder, ask, monkeypatch):
    """It taught nobody as it was, so that there is nothing to keep usable."""

    def stopped(*given: object) -> tuple:
        raise KeyboardInterrupt

    (folder / "view_0002.pt").unlink()
    monkeypatch.setattr(answers, "answer", stopped)
    assert ask("model_2", "--views", 3)[0] == 130
    assert json.loads((folder / JSON).read_text())["views"] == 3


@pytest.mark.parametrize("damage", [other_draws, changed(answers=lambda answers: answers[:-1])])
def test_whole_answers_to_other_images_are_kept(damage, folder, ask):
    """Of another machine or version, whose runs may go on with them."""
    damage(folder / VIEW)
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
    status, out, error = ask("model_2", "--views", 3)
    assert status == 2
    assert "view_0001.pt answers for other images than this machine or version draws" in error
    assert error.count("\n") == 1
    assert "View" not in out
    assert kept == {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}


def test_a_damaged_view_is_asked_for_anew(folder, ask):
    kept = (folder / VIEW).read_bytes()
    cut(folder / VIEW)
    status, out, _ = ask("model_2", "--views", 2)
    assert status == 0
    assert out.count("it is asked for anew") == 1
    assert "View 1 of 2: is there" not in out
    assert "View 2 of 2: is there" in out
    assert (folder / VIEW).read_bytes() == kept


def test_a_teacher_that_went_astray_is_one_line(ask, tmp_path):
    run = shutil.copytree(networks.REFERENCE / "model_2", tmp_path / "astray")
    weights = torch.load(run / "weights.pt", weights_only=True)
    torch.save(
        {k: v * float("nan") if v.ndim > 1 else v for k, v in weights.items()}, run / "weights.pt"
    )
    status, _, error = ask(run, "--views", 1)
    assert status == 2
    assert error.endswith("the teacher's answers are no numbers; its training went astray\n")
    assert error.count("\n") == 1
    assert not list(only(tmp_path).glob("view_*"))


def test_answers_name_the_command_that_asked_for_them(folder, learn, monkeypatch, network):
    monkeypatch.setattr(sys, "argv", ["tools.answers", "model_2", "--views", "2"])
    assert "tools.answers model_2 --views 2" in provenance.command()
    said(command="python -m tools.answers x --batch-size 100")(folder / JSON)
    status, _, error = learn(folder, "--batch-size", 50)
    assert status == 2
    assert "train as they were asked for (python -m tools.answers x --batch-size 100), or" in error
    said(command="y" * 5000)(folder / JSON)
    assert len(learn(folder, "--batch-size", 50)[2]) < 900


def test_a_command_may_hold_any_byte(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools.answers", "m\udcff", "\u00e4"])
    command = provenance.command()
    assert command.encode().decode() == command
    assert command.endswith("'m\\udcff' '\u00e4'")


def test_the_tool_stores_its_command(asked_once):
    command = json.loads((asked_once / JSON).read_text())["command"]
    assert "python" in command
    assert command == provenance.command()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody",), "nobody is not there; give a run's folder"),
        (("model_2", "--val-split", 100), "was trained with --val-split None, this run has 100"),
        (("model_2", "--set", "teacher=x"), "has the teacher x, which is for train.py"),
        (("model_2", "--resume"), "--resume is for train.py"),
        (("model_2", "--set", "augment=2"), "augment is 2"),
        (("model_2", "--views", 0), "from 1 to 9999"),
        ((), "RUN"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, words, ask, tmp_path):
    status, _, error = ask(*arguments)
    assert status == 2
    assert error.startswith("tools.answers: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "answers").exists()


def test_model_and_epochs_have_to_be_given(capsys, network):
    for given in (("--model", network), ("--epochs", 2)):
        status, _, error = call_main(answers.main, capsys, ["model_2", "--dry-run", *given])
        assert status == 2
        assert "give --model and --epochs" in error


def test_a_link_that_leads_to_itself_is_no_teacher(ask, learn, tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    for status, _, error in (ask(link), learn(link)):
        assert status == 2
        assert "loop is not there; give a run's folder" in error
        assert error.count("\n") == 1


def test_answers_are_no_teacher_of_other_answers(ask, folder):
    status, _, error = ask(folder)
    assert status == 2
    assert f"{folder} holds answers; give the run of the network itself" in error


def test_two_processes_do_not_make_the_same_answers(ask, folder):
    with filelock.FileLock(folder / ".lock"):
        status, _, error = ask("model_2", "--views", 3)
    assert status == 2
    assert "is in use: another process makes these answers" in error


@pytest.mark.parametrize(
    ("grid", "words"),
    [("batch_size=100,50", "their batch_size was another"), ("lr=0.1", "their val_split was")],
)
def test_a_search_that_could_not_train_is_refused_at_once(
    grid, words, ask, capsys, network, tmp_path
):
    held_out = () if grid == "lr=0.1" else ("--val-split", 100)
    if held_out:
        given = (*flags(network, tmp_path / "teacher"), *held_out)
        assert call_main(train.main, capsys, given)[0] == 0
    teacher = run_in(tmp_path / "teacher") if held_out else "model_2"
    assert ask(teacher, "--views", 1, *held_out)[0] == 0
    asked = ("--set", f"teacher={only(tmp_path)}", "--grid", grid, "--val-split", 100)
    status, _, error = call_main(search.main, capsys, (*flags(network, tmp_path), *asked))
    assert status == 2
    assert words in error
    assert not (tmp_path / "search").exists()


def test_a_copy_of_the_folder_teaches_as_well(folder, learn, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert learn(copy)[0] == 0


def test_a_recipe_s_teacher_is_known_by_its_name_too(capsys, tmp_path, no_pictures):
    taught = SMALL_NETWORK.replace("optimizer=", 'teacher="model_2", optimizer=')
    network = tmp_path / "taught.py"
    network.write_text(taught)
    status, _, error = call_main(train.main, capsys, flags(network, tmp_path / "runs"))
    assert status == 0, error
    settings = json.loads((run_in(tmp_path / "runs") / "settings.json").read_text())
    assert settings["recipe"]["teacher"] == "output/reference/model_2"
    assert settings["teacher"]["network"] == "CNN_Model_2"
    network.write_text(taught.replace("model_2", "nobody"))
    status, _, error = call_main(train.main, capsys, flags(network, tmp_path / "runs"))
    assert status == 2
    assert "nobody" in error
    assert error.count("\n") == 1
