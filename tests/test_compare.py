"""tools.compare on made-up runs, and the sizes that it computes, against counts by hand."""

import csv
import itertools
import json
import math

import pytest
from matplotlib.transforms import Bbox

import plots
from tests.conftest import PIXEL, call_main
from tools import compare

RECIPE = {"optimizer": "muon", "lr": 0.06, "batch_size": 256, "teacher": "", "augment": 0.5}


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
                "recipe": RECIPE,
                "seed": seed,
                "device": "cpu",
                "command": "python train.py --model 2 --epochs 20",
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
                "target_accuracy": 85.0,
                "gap_points": 1.0,
                "train_seconds": 400.0,
                "epochs_done": 20,
            }
        )
    )
    (folder / "log.csv").write_text(f"epoch,test_acc\n1,{final - 5}\n2,{final}\n")
    return folder


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """For tests of the table: drawing takes longest."""
    for name in ("comparison", "progress"):
        monkeypatch.setattr(compare, name, lambda *_: PIXEL)


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(compare.main, capsys, arguments)


def test_seeds_are_one_row_and_what_is_no_training_on_the_test_set_is_left_out(
    capsys, tmp_path, monkeypatch
):
    drawn = figures(monkeypatch)
    root = tmp_path / "runs"
    for seed, final in ((0, 88.0), (1, 89.0), (2, 90.0)):
        make_run(root, f"seed{seed}", "CNN_Model_2", seed, final)
    taught = {
        "command": "python train.py --set teacher=x --model 2 --set augment=0.1 --batch 64",
        "teacher": {"network": "CNN_Model_1"},
        "recipe": RECIPE | {"teacher": "x", "batch_size": 64, "augment": 0.1},
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
    assert {path.name for path in folder.glob("*.png")} == {"compare.png", "progress.png"}
    assert set(drawn) == {"comparison", "progress"}
    # A run that is named twice, and by its parent's folder, counts once.
    several = root, root / "seed0", tmp_path / "out" / ".." / "runs" / "seed0"
    _, out, _ = call(capsys, *several, "--output-dir", tmp_path / "out")
    assert "| 16.8 | 89.00 ± 1.00 | 89.10 |" in out
    # Nor does a seed that was trained twice count as two.
    make_run(root, "seed0_again", "CNN_Model_2", 0, 88.4)
    _, out, _ = call(capsys, root, "--output-dir", tmp_path / "out")
    assert "| 16.8 | 89.00 ± 1.00 | 89.10 |" in out
    assert "| CNN_Model_2 | the file's RECIPE, seed 0 | 20 | 222,058 | 0.89 | 16.8 | 88.40 |" in out


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"network": "A and B"}, "A and B"),
        ({"network": "A and B", "views": 20}, "A and B (20 views)"),
        ({"network": "A and B and B", "views": 20}, "3 networks (20 views)"),
    ],
)
def test_many_teachers_are_counted(teacher, said):
    command = "python train.py --model 2 --set teacher=x"
    settings = {"command": command, "teacher": teacher, "recipe": {"teacher": "x"}}
    assert compare.changes(settings) == f", distilled from {said}"


def change_results(folder, **values: object) -> None:
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_every_figure_of_a_row_is_the_mean_over_its_seeds(tmp_path):
    """A seed that never came to the target is not left out of a mean: there is none then."""
    values = {
        "final_accuracy": (86.0, 87.0, 91.0),
        "best_accuracy": (86.5, 88.0, 92.0),
        "target_reached_at": (3, 5, 13),
        "gap_points": (1.0, -2.0, 4.0),
        "train_seconds": (100.0, 300.0, 800.0),
    }
    folders = [make_run(tmp_path, f"s{seed}", "CNN_Model_2", seed, 88.0) for seed in (2, 0, 1)]
    for place, folder in enumerate(folders):
        change_results(folder, **{key: each[place] for key, each in values.items()}, epochs_done=10)
    (row,) = compare.measured(list(map(compare.read_training, folders)))
    assert row["source"] == "the file's RECIPE, seed 0, 1, 2"
    found = [row[key] for key in ("final", "best", "to_target", "gap", "seconds")]
    assert found == pytest.approx([88.0, 266.5 / 3, 7.0, 1.0, 40.0])
    # Squares of -2, -1 and 3 over one less than there are.
    assert row["final_std"] == pytest.approx((14 / 2) ** 0.5)
    for folder, missing in ((folders[1], None), (folders[2], None)):
        change_results(folder, target_reached_at=missing)
        (row,) = compare.measured(list(map(compare.read_training, folders)))
        assert row["to_target"] is None
        assert row["final"] == pytest.approx(88.0)
        assert "|  | +1.00 | 40.0 |" in compare.markdown([row])
    (alone,) = compare.measured([compare.read_training(folders[0])])
    assert (alone["to_target"], alone["final_std"]) == (3, None)


def test_epochs_to_another_target_are_none_to_85_percent(tmp_path):
    folder = make_run(tmp_path, "a", "CNN_Model_2", 0, 88.0)
    assert compare.read_training(folder)["to_target"] == 15
    change_results(folder, target_accuracy=90.0)
    assert compare.read_training(folder)["to_target"] is None


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 21},
        {"recipe": RECIPE | {"lr": 0.05}},
        {"recipe_name": "published"},
        {"parameters": 222_057},
        {"network": "CNN_Model_3"},
        {"model_sha256": "a" * 64},
        {"model_file": "elsewhere/model_2.py"},
    ],
)
def test_trainings_that_differ_in_more_than_the_seed_are_rows_of_their_own(other, tmp_path):
    make_run(tmp_path, "a", "CNN_Model_2", 0, 88.0)
    make_run(tmp_path, "b", "CNN_Model_2", 1, 90.0, device="cuda")
    folders = [tmp_path / "a", tmp_path / "b"]
    (row,) = compare.measured(list(map(compare.read_training, folders)))
    assert row["final"] == 89.0
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    (tmp_path / "b" / "settings.json").write_text(json.dumps(settings | other))
    rows = compare.measured(list(map(compare.read_training, folders)))
    assert [each["final"] for each in rows] == [88.0, 90.0]
    assert [each["final_std"] for each in rows] == [None, None]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m train --model /my/net.py --epochs 3", ""),
        ("python train.py --lr=0.06 --seed 1", ", lr 0.06"),
        ("python train.py --weight-decay 0 --set 'teacher=my runs/x'", ", teacher my runs/x"),
        ("python train.py --set unknown=3 --set", ""),
        ("", ""),
    ],
)
def test_changes_are_what_the_command_asked_for(command, expected):
    recipe = RECIPE | {"teacher": "my runs/x"}
    assert compare.changes({"command": command, "recipe": recipe}) == expected


def test_the_form_of_the_stored_arguments_does_not_matter(capsys, tmp_path, no_pictures):
    make_run(tmp_path / "runs", "a", "CNN_Model_2", 0, 88.0, arguments={"set": "anything"})
    status, out, error = call(capsys, tmp_path / "runs", "--output-dir", tmp_path / "out")
    assert (status, error) == (0, "")
    assert "| CNN_Model_2 | the file's RECIPE, seed 0 | 20 |" in out


def test_a_curve_is_the_test_accuracy_of_every_epoch(tmp_path):
    run = make_run(tmp_path, "a", "CNN_Model_2", 3, 88.0)
    assert compare.curve(run) == [83.0, 88.0]
    (run / "log.csv").unlink()
    assert compare.curve(run) == []


def test_multiply_adds_of_model_2_by_hand():
    """Outputs x inputs x window of each layer of the table in model_2.py, and the linear layer."""
    by_hand = (
        32 * 32 * (432 + 4608)
        + 16 * 16 * (13_824 + 2304 + 432)
        + 8 * 8 * (4608 + 82_944)
        + 4 * 4 * 110_592
        + 1280
    )
    parameters, megabytes, macs = compare.size_of("CNN_Model_2")
    assert (parameters, megabytes) == (222_058, pytest.approx(0.888232))
    assert macs == pytest.approx(by_hand / 1e6)


def test_the_pareto_front_is_what_nothing_smaller_beats():
    def row(parameters: int, final: float) -> dict:
        return {"parameters": parameters, "final": final}

    rows = [row(10, 80), row(20, 79), row(30, 85), row(30, 84), row(40, 85), row(50, 90)]
    assert [each["parameters"] for each in compare.pareto(rows)] == [10, 30, 50]
    for each in rows:  # nothing outside the front is missing from it
        beaten = any(
            other["parameters"] <= each["parameters"] and other["final"] >= each["final"]
            for other in rows
            if other != each
        )
        assert beaten == (each not in compare.pareto(rows))


def test_folders_without_runs_are_refused(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        status, _, error = call(capsys, folder)
        assert status == 2
        assert f"{folder} holds no finished training on the test set" in error
        assert error.count("\n") == 1


def test_names_in_the_picture_cover_no_other_and_are_whole(monkeypatch):
    changes = {
        "distilled": ", distilled from a larger one",
        "changed": ", augment 0.5, augment_epochs 24, other_lr 0.02",
        "taught": ", distilled from A and another (10 views), teacher_temperature 2.0" + 90 * " b",
    }

    def row(network: str, source: str, parameters: int, final: float) -> dict:
        return {
            "network": network,
            "source": source,
            "changes": changes.get(source, ""),
            "epochs": 20,
            "parameters": parameters,
            "final": final,
            "final_std": 1.5 if final == 89.4 else None,
        }

    rows = [
        row("C1C2C3C4", "distilled", 92_394, 90.3),
        row("CNN_Model_2", "distilled", 222_058, 89.4),
        row("ResNet", "published", 6_573_130, 92.2),
        row("ResNet", "changed", 6_573_130, 93.8),
        row("CNN_Model_3", "changed", 73_994, 90.1),
        row("CNN_Model_2", "published", 222_058, 87.3),
        row("CNN_Model_3", "published", 73_994, 86.4),
        row("CNN_Model_3", "a run", 73_994, 86.37),
        row("CNN_Model_3", "a run", 73_994, 86.9),
        row("CNN_Model_3", "distilled", 73_994, 91.4),
        row("CNN_Model_3", "taught", 73_994, 88.7),
        row("CNN_Model_2", "distilled", 222_058, 91.4),
        row("DilatedCNN", "a run", 86_954, 85.4),
        row("C1C2C3C4", "published", 92_394, 85.1),
        row("CifarNet", "a run", 174_762, 83.0),
        row("CifarNet", "published", 174_762, 82.5),
        row("CNN_Model_2", "a run", 222_058, 83.2),
    ]
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    figure = compare.comparison(rows)
    assert {tuple(each) for line in figure.axes[0].lines for each in line.get_xydata()} >= {
        (each["parameters"], each["final"]) for each in rows
    }
    boxes = {text: text.get_window_extent() for text in figure.axes[0].texts}
    assert len(boxes) == len(rows)
    for text, box in boxes.items():
        assert figure.axes[0].bbox.x0 <= box.x0 < box.x1 <= figure.axes[0].bbox.x1, text.get_text()
    bars = [bar for each in figure.axes[0].collections for bar in each.get_segments()]
    assert len(bars) == len(rows)
    for bar in bars:
        bar = Bbox(figure.axes[0].transData.transform(bar)).padded(0.5)
        assert [text.get_text() for text, box in boxes.items() if box.overlaps(bar)] == []
    for (one, box), (other, its) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(its), (one.get_text(), other.get_text())
    for text, box in boxes.items():  # and nobody takes a name for another point's
        gaps = {}
        for each in boxes:
            x, y = figure.axes[0].transData.transform(each.xy)
            nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
            gaps[each] = math.dist((x, y), nearest)
        assert gaps[text] <= min(gaps.values()) + 1, text.get_text()


def figures(monkeypatch) -> dict:
    """What the tool hands to plots, by the picture's name, as figures."""
    drawn = {}

    def keep(figure):
        drawn["progress" if "epoch" in figure.axes[0].get_title() else "comparison"] = figure
        figure.draw_without_rendering()
        return b""

    monkeypatch.setattr(plots, "png", keep)
    return drawn


def test_long_names_leave_room_to_curves_and_others(capsys, tmp_path, monkeypatch):
    """Those of the committed runs, of which the distilled ones have many changes."""
    drawn = figures(monkeypatch)
    status, _, error = call(capsys, "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    figure = drawn["progress"]
    legend, title = figure.legends[0].get_window_extent(), figure.axes[0].title.get_window_extent()
    assert not legend.overlaps(title)
    assert figure.axes[0].bbox.width > 0.6 * figure.bbox.width
    names = [text.get_window_extent() for text in drawn["comparison"].axes[0].texts]
    assert not any(box.overlaps(other) for box, other in itertools.combinations(names, 2))


def test_trainings_that_were_stopped_at_the_start_are_in_the_table_alone(
    capsys, tmp_path, monkeypatch
):
    root = tmp_path / "runs"
    make_run(root, "stopped", "ResNet", 0, 92.22 - 5.01, epochs=2, parameters=6_573_130)
    make_run(root, "just", "CifarNet", 0, 87.88 - 4.99, parameters=174_762)
    make_run(root, "good", "CNN_Model_2", 0, 89.0)
    make_run(root, "bad_seed", "CNN_Model_2", 1, 60.0)
    own = {"parameters": 50, "model_file": "/home/somebody/resnet.py", "model_sha256": "5" * 64}
    make_run(root, "another", "ResNet", 0, 12.0, **own)  # of which nothing was published
    drawn = figures(monkeypatch)
    status, out, error = call(capsys, root, "--output-dir", tmp_path / "out")
    assert (status, error) == (0, "")
    assert "| ResNet | the file's RECIPE, seed 0 | 2 |" in out
    assert "| CNN_Model_2 | the file's RECIPE, seed 0, 1 | 20 |" in out
    (line,) = (line for line in out.splitlines() if line.startswith("Not in the pictures"))
    assert "more than 5 points below the published figure" in line
    assert "ResNet after 2 epochs (87.21 %, published 92.22 %)" in line
    assert "CNN_Model_2 after 20 epochs (60.00 %, published 87.30 %)" in line
    assert "CifarNet" not in line
    assert "12.00" not in line
    for figure in drawn.values():
        (note,) = (text for text in figure.texts if "Not in the pictures" in text.get_text())
        assert " ".join(note.get_text().split()) == line
        box, whole = note.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 < figure.axes[0].get_tightbbox().y0
    names = {text.get_text() for text in drawn["comparison"].axes[0].texts}
    assert "ResNet, 2 epochs" not in names
    assert names >= {"CifarNet, 20 epochs", "ResNet (resnet.py), 20 epochs"}
    heights = {y for line in drawn["comparison"].axes[0].lines for y in line.get_ydata()}
    assert heights >= {89.0, 12.0, 87.88 - 4.99}
    assert not heights & {60.0, 74.5, 92.22 - 5.01}
    labels = {text.get_text() for text in drawn["progress"].legends[0].get_texts()}
    assert "ResNet (resnet.py), 20 epochs, seed 0: 12.00" in labels
    ends = {line.get_ydata()[-1] for line in drawn["progress"].axes[0].lines}
    assert ends == {89.0, 12.0, 87.88 - 4.99} | {
        final for _, final, *_ in compare.PUBLISHED.values()
    }


def test_nothing_is_said_to_be_left_out_where_nothing_is(capsys, tmp_path, monkeypatch):
    make_run(tmp_path / "runs", "good", "CNN_Model_2", 0, 89.0)
    drawn = figures(monkeypatch)
    status, out, _ = call(capsys, tmp_path / "runs", "--output-dir", tmp_path / "out")
    assert status == 0
    assert "Not in the pictures" not in out
    assert all(not figure.texts for figure in drawn.values())


def test_pictures_of_nothing_but_stopped_trainings_are_drawn(capsys, tmp_path, monkeypatch):
    drawn = figures(monkeypatch)
    make_run(tmp_path / "runs", "stopped", "CNN_Model_2", 0, 30.0)
    status, _, error = call(capsys, tmp_path / "runs", "--output-dir", tmp_path / "out")
    assert (status, error) == (0, "")
    assert set(drawn) == {"comparison", "progress"}


def test_progress_has_one_strong_line_a_network_and_a_diamond_a_published_figure(
    monkeypatch, tmp_path
):
    def run(name: str, network: str, *accuracies: float) -> dict:
        folder = make_run(tmp_path, name, network, 0, accuracies[-1])
        (folder / "log.csv").write_text("\n".join(["test_acc", *map(str, accuracies)]))
        return compare.read_training(folder)

    trainings = [
        run("a", "A", 50.0, 80.0),
        run("b", "A", 40.0, 95.0, 90.0),  # its best at the end, not the one with the best epoch
        run("c", "A", 99.0, 89.0),
        run("d", "B", 70.0),
    ]
    published = [{"network": name, "epochs": 100, "final": 87.3} for name in "AC"]
    monkeypatch.setattr(plots, "png", lambda figure: figure)
    figure = compare.progress(trainings, published)
    figure.draw_without_rendering()
    lines = figure.axes[0].lines
    diamonds = [line for line in lines if line.get_marker() == "D"]
    labelled = {line.get_label(): line for line in lines if not line.get_label().startswith("_")}
    assert list(labelled) == [
        "A, 20 epochs, seed 0: 90.00",
        "B, 20 epochs, seed 0: 70.00",
        "other runs (2)",
        "A, published: 87.30 at 100",
        "C, published: 87.30 at 100",
    ]
    faint = [line for line in lines if (line.get_alpha() or 1) < 0.5 and len(line.get_ydata())]
    assert sorted(line.get_ydata()[-1] for line in faint) == [80.0, 89.0]
    strong = labelled["A, 20 epochs, seed 0: 90.00"]
    assert min(
        strong.get_linewidth(), labelled["B, 20 epochs, seed 0: 70.00"].get_linewidth()
    ) > 2 * max(line.get_linewidth() for line in faint)
    assert strong.get_color() == labelled["A, published: 87.30 at 100"].get_color()
    assert len({line.get_color() for line in labelled.values()}) == 4
    first, second = (diamond.get_markersize() for diamond in diamonds)
    assert first > second + 3  # one covers the other: both are seen
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_networks_of_one_name_and_different_code_are_not_averaged(capsys, tmp_path, no_pictures):
    root = tmp_path / "runs"
    theirs = {"parameters": 1000, "model_sha256": "a" * 64, "model_file": "/somebody/nets/mine.py"}
    make_run(root, "a0", "CNN_Model_2", 0, 60.0, **theirs)
    make_run(root, "a1", "CNN_Model_2", 1, 62.0, **theirs)
    make_run(root, "b0", "CNN_Model_2", 0, 70.0, **theirs | {"model_sha256": "b" * 64})
    yours = {"model_sha256": "c" * 64, "model_file": "nets/yours.py"}
    make_run(root, "c0", "CNN_Model_2", 0, 72.0, **theirs | yours)
    ours = {"model_sha256": "d" * 64, "model_file": "model_2.py"}
    make_run(root, "d0", "CNN_Model_2", 0, 88.0, **ours)
    make_run(root, "e0", "CNN_Model_2", 0, 89.0)  # from before these keys
    make_run(root, "r0", "ResNet", 0, 92.0, parameters=6_573_130, model_file="baselines/resnet.py")
    make_run(root, "edited", "ResNet", 0, 91.0, parameters=7, model_file="baselines/resnet.py")
    status, _, error = call(capsys, root, "--output-dir", tmp_path / "out")
    assert (status, error) == (0, "")
    (table,) = (tmp_path / "out").glob("*/compare.csv")
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] != "published"]
    found = {(row["network"], float(row["final"])): row["macs"] for row in rows}
    assert {key: round(float(macs), 1) if macs else None for key, macs in found.items()} == {
        ("CNN_Model_2 (mine.py)", 61.0): None,
        ("CNN_Model_2 (mine.py)", 70.0): None,
        ("CNN_Model_2 (yours.py)", 72.0): None,
        ("CNN_Model_2", 88.0): 16.8,
        ("CNN_Model_2", 89.0): 16.8,
        ("ResNet", 92.0): 379.3,
        ("ResNet", 91.0): None,
    }


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("settings.json", "network", 5),
        ("settings.json", "parameters", "many"),
        ("settings.json", "parameters", None),
        ("settings.json", "epochs", 20.5),
        ("settings.json", "epochs", True),
        ("settings.json", "seed", "0"),
        ("settings.json", "device", ["cpu"]),
        ("settings.json", "recipe", [1]),
        ("settings.json", "recipe_name", "unheard of"),
        ("settings.json", "recipe_name", ["tuned"]),
        ("settings.json", "model_file", 3),
        ("settings.json", "model_sha256", {"a": 1}),
        ("settings.json", "command", ["train.py", "--lr", "3"]),
        ("settings.json", "dry_run", "yes"),
        ("settings.json", "val_split", "5000"),
        ("settings.json", "teacher", "CNN_Model_1"),
        ("settings.json", "teacher.network", 1),
        ("results.json", "target_accuracy", "85"),
        ("results.json", "final_accuracy", "88 %"),
        ("results.json", "final_accuracy", float("nan")),
        ("results.json", "final_accuracy", 10**400),
        ("results.json", "best_accuracy", None),
        ("results.json", "gap_points", [1]),
        ("results.json", "train_seconds", "400"),
        ("results.json", "epochs_done", 0),
        ("results.json", "target_reached_at", "never"),
    ],
)
def test_a_value_of_another_kind_is_one_line_that_names_file_and_key(
    name, key, value, capsys, tmp_path
):
    file = make_run(tmp_path / "runs", "a", "CNN_Model_2", 0, 88.0) / name
    content = json.loads(file.read_text())
    *outer, last = key.split(".")
    place = content.setdefault(outer[0], {}) if outer else content
    place[last] = value
    file.write_text(json.dumps(content))
    status, _, error = call(capsys, tmp_path / "runs", "--output-dir", tmp_path / "out")
    assert status == 2
    assert f"{file} is damaged: {key}" in error
    assert error.count("\n") == 1
    if value is None:  # and the same if it is not there at all
        del place[last]
        file.write_text(json.dumps(content))
        status, _, error = call(capsys, tmp_path / "runs")
        assert (status, f"{file} is damaged: {key} is missing" in error) == (2, True)


@pytest.mark.parametrize("table", ["", "epoch,test_acc\n", "epoch\n1\n", "epoch,test_acc\n1,x\n"])
def test_a_damaged_table_is_one_line(table, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "comparison", lambda *_: PIXEL)
    file = make_run(tmp_path / "runs", "a", "CNN_Model_2", 0, 88.0) / "log.csv"
    file.write_text(table)
    status, _, error = call(capsys, tmp_path / "runs", "--output-dir", tmp_path / "out")
    assert status == 2
    assert f"{file}: test_acc must be a number for each epoch" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
