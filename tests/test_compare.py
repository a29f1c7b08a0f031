"""tools.compare on made-up runs, and the sizes that it computes, against counts by hand."""

import csv
import itertools
import json
from types import SimpleNamespace

import pytest
from PIL import Image

import plots
from tests.conftest import call_main
from tools import compare


def make_run(root, name: str, network: str, seed: int, final: float, **settings: object):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(
        json.dumps(
            {
                "network": network,
                "parameters": 222_058,
                "epochs": 20,
                "recipe_name": "tuned",
                "recipe": {"target_accuracy": 85.0},
                "seed": seed,
                "device": "cpu",
            }
            | settings
        )
    )
    (folder / "results.json").write_text(
        json.dumps(
            {
                "completed": True,
                "final_accuracy": final,
                "best_accuracy": final + 0.1,
                "target_reached_at": 15 + seed,
                "gap_points": 1.0,
                "train_seconds": 400.0,
                "epochs_done": 20,
            }
        )
    )
    (folder / "log.csv").write_text(f"epoch,test_acc\n1,{final - 5}\n2,{final}\n")
    return folder


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(compare.main, capsys, arguments)


def test_seeds_are_one_row_and_what_is_no_training_on_the_test_set_is_left_out(capsys, tmp_path):
    root = tmp_path / "runs"
    for seed, final in ((0, 88.0), (1, 89.0), (2, 90.0)):
        make_run(root, f"seed{seed}", "CNN_Model_2", seed, final)
    taught = {
        "arguments": {"lr": None, "batch_size": 64, "set": [["teacher", "x"], ["augment", 0.1]]},
        "teacher": {"network": "CNN_Model_1"},
        "recipe": {"target_accuracy": 85.0, "teacher": "x"},
    }
    make_run(root, "taught", "CNN_Model_2", 0, 91.0, **taught)
    make_run(root, "own", "MyNet", 0, 70.0, parameters=1000)
    make_run(root, "dry", "CNN_Model_2", 0, 10.0, dry_run=True)
    make_run(root, "held_out", "CNN_Model_2", 0, 99.0, val_split=5000)
    unfinished = make_run(root, "unfinished", "CNN_Model_2", 3, 50.0)
    (unfinished / "results.json").write_text('{"completed": false}')
    (root / "bench").mkdir()
    status, out, error = call(capsys, root, "--output-dir", tmp_path / "out")
    assert status == 0, error
    assert "| CNN_Model_2 | the file's RECIPE, seed 0, 1, 2 | 20 | 222,058 | 0.89 |" in out
    assert "| 16.8 | 89.00 ± 1.00 | 89.10 |" in out
    assert "| 89.10 | 16 | +1.00 | 20.0 | cpu |" in out
    how = "distilled from CNN_Model_1, batch_size 64, augment 0.1"
    assert f"| CNN_Model_2 | the file's RECIPE, {how}, seed 0 | 20 |" in out
    assert "| MyNet | the file's RECIPE, seed 0 | 20 | 1,000 | 0.00 |  | 70.00 |" in out
    for name, final in (("ResNet", "92.22"), ("CifarNet", "87.88"), ("CNN_Model_3", "86.40")):
        assert any(
            line.startswith(f"| {name} | published") and final in line for line in out.split("\n")
        )
    (folder,) = (tmp_path / "out").iterdir()
    with open(folder / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 + 3
    assert Image.open(folder / "compare.png").size[0] > 600
    assert Image.open(folder / "progress.png").size[0] > 600


def test_a_curve_is_the_test_accuracy_of_every_epoch(tmp_path):
    run = make_run(tmp_path, "a", "CNN_Model_2", 3, 88.0)
    bare = make_run(tmp_path, "b", "CNN_Model_2", 4, 88.0)
    (bare / "log.csv").unlink()
    (curve,) = compare.curves([run, bare])
    assert curve == ("CNN_Model_2", "CNN_Model_2, 20 epochs, seed 3", [83.0, 88.0])


def test_multiply_adds_of_model_2_by_hand():
    """Outputs x inputs x window of each layer of the table in model_2.py, and the linear layer."""
    by_hand = (
        32 * 32 * (432 + 4608)
        + 16 * 16 * (13_824 + 2304 + 432)
        + 8 * 8 * (4608 + 82_944)
        + 4 * 4 * 110_592
        + 1280
    )
    parameters, macs = compare.size_of("CNN_Model_2")
    assert parameters == 222_058
    assert macs == pytest.approx(by_hand / 1e6)


def test_the_pareto_front_is_what_nothing_smaller_beats():
    def row(parameters: int, final: float) -> compare.Row:
        return compare.Row(
            "", "", "", 1, parameters, 0, None, final, None, None, None, None, None, ""
        )

    rows = [row(10, 80), row(20, 79), row(30, 85), row(30, 84), row(40, 85), row(50, 90)]
    assert [each.parameters for each in compare.pareto(rows)] == [10, 30, 50]
    for each in rows:  # nothing outside the front is missing from it
        beaten = any(
            other.parameters <= each.parameters and other.final >= each.final and other != each
            for other in rows
        )
        assert beaten == (each not in compare.pareto(rows))


def test_folders_without_runs_are_refused(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        status, _, error = call(capsys, folder)
        assert status == 2
        assert f"{folder} holds no finished training" in error
        assert error.count("\n") == 1


def test_names_in_the_picture_cover_no_other(monkeypatch):
    def row(network: str, source: str, parameters: int, final: float) -> SimpleNamespace:
        return SimpleNamespace(
            network=network,
            source=source,
            changes=", distilled from a larger one" if source == "distilled" else "",
            epochs=20,
            parameters=parameters,
            final=final,
            final_std=None,
        )

    rows = [
        row("ResNet", "published", 6_573_130, 92.2),
        row("CNN_Model_2", "published", 222_058, 87.3),
        row("CNN_Model_3", "published", 73_994, 86.4),
        row("CNN_Model_3", "a run", 73_994, 86.37),
        row("CNN_Model_3", "a run", 73_994, 86.9),
        row("CNN_Model_3", "distilled", 73_994, 91.4),
        row("CNN_Model_2", "distilled", 222_058, 91.4),
        row("DilatedCNN", "a run", 86_954, 85.4),
        row("C1C2C3C4", "published", 92_394, 85.1),
        row("CifarNet", "a run", 174_762, 61.0),
    ]
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    figure = plots.comparison(rows, rows[:1])
    boxes = {text: text.get_window_extent() for text in figure.axes[0].texts}
    assert len(boxes) == len(rows)
    for (one, box), (other, its) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(its), (one.get_text(), other.get_text())
