"""The run's folder, its history and its pictures."""

import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plots
import runs
import utils
from support import provenance
from support.history import History, duration

ROOT = Path(__file__).parents[1]


def test_two_starts_in_one_second_get_two_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.Run.create(tmp_path, "model_2").folder, range(40)))
    assert len(set(made)) == 40
    assert all(folder.is_dir() and "-model_2" in folder.name for folder in made)


def test_a_file_in_the_place_of_the_output_folder_is_an_error(tmp_path):
    (tmp_path / "output").write_text("in the way")
    with pytest.raises(OSError, match="output"):
        runs.Run.create(tmp_path / "output", "model_2")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    run = runs.Run(tmp_path)
    run.write("results.json", "old")

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space .*results\.json"):
        run.write("results.json", "new")
    assert (tmp_path / "results.json").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [".lock", "results.json"]


def test_what_lies_in_a_folder_leads_no_write_elsewhere(tmp_path):
    """A folder may come from anybody: a link, or a pipe, where the file is made."""
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    run = runs.Run(tmp_path / "run")
    part = run.folder / ".curves.png.part"
    for put in (lambda: part.symlink_to(precious), lambda: os.mkfifo(part)):
        put()
        run.write("curves.png", "a picture")
        assert (run.folder / "curves.png").read_text() == "a picture"
        assert not (run.folder / "curves.png").is_symlink()
        assert precious.read_text() == "mine"
        run.remove("curves.png")


def test_log_goes_to_the_screen_and_to_the_file(tmp_path, capsys):
    run = runs.Run(tmp_path)
    run.log("one")
    run.log("two")
    assert capsys.readouterr().out == (tmp_path / "train.log").read_text() == "one\ntwo\n"


def test_checkpoint_loads_as_data(tmp_path):
    runs.Run(tmp_path).save_checkpoint("last.pt", {"epoch": 3, "model": {"w": torch.ones(2)}})
    loaded = torch.load(tmp_path / "last.pt", weights_only=True)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["w"], torch.ones(2))


def history_of(*accuracies: float, split: str = "test") -> History:
    figures = History(split, epochs=20, target=85.0, target_epochs=70)
    for accuracy in accuracies:
        figures.add(
            0.11424, utils.Metrics(0.7349, 74.166), utils.Metrics(0.6012, accuracy), (12.0, 1.2)
        )
    return figures


def test_epoch_line_has_the_promised_form():
    line = history_of(*[70.0] * 11, 79.66).line()
    assert line == (
        "Epoch [12/20] - Train: 74.17% | Test: 79.66% | loss 0.735/0.601 | lr 0.1142 | 13.2s"
        " | 1m46s left | best so far"
    )


def test_an_epoch_that_was_halted_does_not_count_for_the_time_left():
    history = history_of(70.0, 71.0, 72.0)
    history.rows[1]["train_seconds"] = 8775.5
    assert " | 13.2s | 3m44s left" in history.line()  # 17 epochs of 13.2 s


def test_marks_of_the_best_and_of_the_target():
    assert "best so far" in history_of(70.0).line()
    assert "best so far" not in history_of(70.0, 70.0).line()
    assert history_of(84.99).target_epoch is None
    assert history_of(84.0, 85.0, 86.0, 85.5).target_epoch == 2
    assert "target 85% reached" in history_of(84.0, 85.0).line()
    assert "target" not in history_of(84.0, 85.0, 86.0).line()
    assert history_of(84.0, 86.0, 85.0, 86.0).best_epoch == 2
    assert "Val: 70.00%" in history_of(70.0, split="val").line()


def test_results_table_and_summary():
    run = history_of(84.0, 86.0, 85.0)
    figures = run.summary()
    assert (figures["best_accuracy"], figures["best_epoch"]) == (86.0, 2)
    assert figures["last_accuracy"] == 85.0
    assert figures["target_reached_at"] == 2
    assert figures["gap_points"] == pytest.approx(74.166 - 85.0)
    assert figures["train_seconds"] == 36.0
    table = run.table("test", 85.0, Path("output/x"))
    for part in ("85.00 %", "86.00 %", "reached at epoch 2", "-10.83 points", "output/x", "40s"):
        assert part in table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (106, "1m46s"), (3599.7, "1h00m"), (3900, "1h05m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_csv_and_json_are_read_back(tmp_path):
    run = runs.Run(tmp_path)
    rows = history_of(84.0, 86.0).rows
    with open(run.write_csv("log.csv", rows), newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [
        "epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc",
        "train_seconds", "test_seconds",
    ]  # fmt: skip
    assert float(read[1]["test_acc"]) == 86.0
    value = {"a": [1, 2.5, None], "b": "ü"}
    assert json.loads(run.write_json("x.json", value).read_text()) == value


def test_environment_can_be_written_as_json():
    assert json.loads(json.dumps(provenance.environment()))["packages"]["torch"] == "2.14.1"


# ---------------------------------------------------------------- pictures


def picture(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all(), "something touches the edge: clipped?"
    return pixels


def test_curves_of_one_epoch_and_of_many():
    one = picture(plots.curves(history_of(70.0).rows, "test", 85.0, "x"))
    many = picture(plots.curves(history_of(70.0, 80.0, 86.0).rows, "test", 85.0, "x"))
    assert not np.array_equal(one, many)
    picture(plots.curves(history_of(70.0, split="val").rows, "val", 85.0, "x"))


def test_matrices_even_where_a_class_is_empty():
    matrix = np.diag(np.arange(10) * 100)
    picture(plots.confusion_matrix(matrix, "title"))
    picture(plots.class_accuracy(matrix, "title"))


@pytest.mark.parametrize("count", [0, 1, 30, 45])
def test_misclassified_of_any_number(count, sample):
    labels = np.zeros(count, int)
    images = sample.train_images[:count]
    picture(plots.misclassified(images, labels, labels + 1, labels + 0.5, "title"))


def test_augmentations_show_the_images(sample):
    chosen = np.flatnonzero(sample.train_labels < 3)[:40]  # a column for each class takes its time
    raw, labels = sample.train_images[chosen], sample.train_labels[chosen]
    stats = ((0.5,) * 3, (0.2,) * 3)
    pixels = picture(plots.augmentations(raw, labels, utils.train_transform(*stats), *stats))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


@pytest.mark.parametrize(
    ("started", "command"),
    [
        (ROOT / "train.py", "train.py --model 2"),
        (ROOT / "tools" / "bench.py", "-m tools.bench --model 2"),
        ("/usr/bin/pytest", "pytest --model 2"),
    ],
)
def test_the_command_holds_no_folder_of_this_machine(started, command, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(started), "--model", "2"])
    assert provenance.environment()["command"].partition(" ")[2] == command
