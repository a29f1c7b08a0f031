"""The committed runs, README.md and docs/: figures, weights, links and commands agree."""

import csv
import json
import re
import shlex
import statistics
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import cifar10
import networks
import recipes
from support import provenance
from tests.conftest import SMALL_NETWORK, call_main
from tools import compare, corruptions

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "output" / "reference"
RUNS = sorted(path.parent for path in REFERENCE.glob("*/settings.json"))
KEPT = {"settings.json", "log.csv", "results.json", "weights.pt"}
WHOLE = "model_2"  # the run that is there as train.py left it
PICTURES = ("curves", "confusion_matrix", "class_accuracy", "misclassified", "augmentations")
FOR_USERS = (
    "model_1", "model_1_distilled", "model_2", "model_2_distilled", "model_3", "model_3_distilled",
    "model_3_robust",
)  # fmt: skip
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# The ways of tools.bench, as the table calls them.
WAYS = {
    "usual": "the usual way, Albumentations image by image",
    "torchvision": "torchvision's crop and flip, two workers",
    "whole_batch": "whole batches on the device, bf16, plain SGD",
    "ours": "**ours**",
}
every = pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
# Searches that have not the recipe itself among their settings, and the one that has, made alike.
ELSEWHERE = {
    f"model_3_{name}": "model_3_label_smoothing"
    for name in ("augmentation", "peak", "transform", "batch_size", "dropout")
} | {"model_2_temperature": "model_2_momentum"}
# What all trainings of a search had beside its grid, and those of its "nothing" had not.
FIXED = {"model_2_temperature": ["--set teacher=ANSWERS"]}
each_page = pytest.mark.parametrize("page", PAGES)


@cache
def text(name: str) -> str:
    return (ROOT / name).read_text()


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def log_of(folder: Path) -> list[dict]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells(page: str, beginning: str, holding: str = "") -> list[str]:
    """The table row of a page that begins so, without its first cell."""
    line = next(
        line
        for line in text(page).splitlines()
        if line.startswith(f"| {beginning}") and holding in line
    )
    return [cell.strip() for cell in line.split("|")[2:-1]]


def choice_of(settings: dict) -> str:
    """What --model has to be given."""
    number = re.fullmatch(r"model_(\d)\.py", settings["model_file"])
    return number[1] if number else settings["model_file"]


def network_of(settings: dict) -> networks.Network:
    choice = choice_of(settings)
    return networks.load_network(str(ROOT / choice) if choice.endswith(".py") else choice)


# ---------------------------------------------------------------- the runs


def test_every_network_has_its_run_and_its_20_epoch_default():
    names = {folder.name for folder in RUNS}
    assert names >= set(FOR_USERS)
    for number in (1, 2, 3):
        assert {f"model_{number}", f"model_{number}_20_epochs"} & {
            folder.name for folder in RUNS if read(folder, "settings.json")["epochs"] == 20
        }


@every
def test_a_run_keeps_what_is_used_and_one_is_whole(folder):
    """Weights lie beside every run but the large network's."""
    small = read(folder, "settings.json")["parameters"] < 3_000_000
    wanted = KEPT if small else KEPT - {"weights.pt"}
    if folder.name == WHOLE:
        wanted = wanted | {"train.log", "summary.txt", *(f"{name}.png" for name in PICTURES)}
    pages = {"report.html"}  # which a user may have made
    assert {path.name for path in folder.iterdir()} - pages == wanted


@every
def test_log_and_results_tell_the_same(folder):
    results, settings = read(folder, "results.json"), read(folder, "settings.json")
    rows = log_of(folder)
    assert results["completed"] is True
    assert len(rows) == results["epochs_done"] == results["epochs_asked"] == settings["epochs"]
    assert float(rows[-1]["test_acc"]) == results["final_accuracy"]
    accuracies = [float(row["test_acc"]) for row in rows]
    assert max(accuracies) == results["best_accuracy"]
    assert accuracies.index(max(accuracies)) + 1 == results["best_epoch"]


def test_the_log_of_the_whole_run_is_its_table():
    lines = (REFERENCE / WHOLE / "train.log").read_text().splitlines()
    shown = [line for line in lines if line.startswith("Epoch")]
    assert len(shown) == len(log_of(REFERENCE / WHOLE))
    for line, row in zip(shown, log_of(REFERENCE / WHOLE), strict=True):
        assert f"Test: {float(row['test_acc']):5.2f}%" in line


@every
def test_the_recipe_is_the_committed_one(folder):
    settings = read(folder, "settings.json")
    network = network_of(settings)
    recipe = recipes.Recipe.read(settings["recipe"])
    committed = {
        "tuned": network.recipe,
        "published": network.published,
        "ours": networks.load_network("2").recipe,
    }[settings["recipe_name"]]
    assert recipe == replace(committed, **dict(settings["arguments"]["set"]))
    assert settings["parameters"] == network.parameters
    assert settings["augmentation"] == recipe.augmentation(settings["epochs"])


@every
def test_runs_name_their_model_file_in_the_repository(folder):
    settings = read(folder, "settings.json")
    assert (ROOT / settings["model_file"]).is_file()
    for name in ("data_dir", "output_dir"):
        assert not Path(settings["arguments"][name]).is_absolute()
    assert settings["model_sha256"] == provenance.code_digest(ROOT / settings["model_file"])


def hits(network: torch.nn.Module, images: np.ndarray, labels: np.ndarray, settings: dict) -> int:
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    planar = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        predictions = network((planar - mean) / std).argmax(dim=1)
    return int((predictions == torch.from_numpy(labels).long()).sum())


@pytest.mark.parametrize(
    "folder", [run for run in RUNS if (run / "weights.pt").is_file()], ids=lambda run: run.name
)
def test_weights_recognise_the_sample(folder, sample):
    """200 test images, of which the network is right on as many as its accuracy says, +-4 sigma."""
    settings = read(folder, "settings.json")
    share = read(folder, "results.json")["final_accuracy"] / 100
    network = network_of(settings).build().eval()
    network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    found = hits(network, sample.test_images, sample.test_labels, settings)
    assert abs(found - 200 * share) <= 4 * (200 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("name", FOR_USERS)
def test_networks_that_come_along_are_ready_for_inference(name, sample):
    trained = networks.load_trained(name)
    assert not trained.network.training
    tensors = torch.stack([trained.transform(image=image)["image"] for image in sample.test_images])
    with torch.inference_mode():
        predictions = trained.network(tensors).argmax(dim=1)
    found = int((predictions == torch.from_numpy(sample.test_labels).long()).sum())
    settings = read(REFERENCE / name, "settings.json")
    assert found == hits(trained.network, sample.test_images, sample.test_labels, settings)


def test_the_committed_comparison_is_of_the_committed_runs(capsys, tmp_path):
    status, _, error = call_main(compare.main, capsys, ["--output-dir", tmp_path])
    assert status == 0, error
    (written,) = tmp_path.glob("*/compare.md")
    assert written.read_text() == (REFERENCE / "compare" / "compare.md").read_text()


def test_no_tracked_file_holds_a_path_of_somebody_s_machine():
    """Paths in settings are relative to the repository; a log's are where they were."""
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[\"' =:(])/(tmp|work|root|home|Users|mnt)/", "--", ".",
         ":!tests", ":!.ci"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""


# ---------------------------------------------------------------- the figures of the pages


def alike(settings: dict) -> list[Path]:
    """The runs that differ from this one in their seed at most, by their seeds."""
    same = ("network", "epochs", "recipe_name", "recipe")
    found = [
        run for run in RUNS if all(read(run, "settings.json")[key] == settings[key] for key in same)
    ]
    return sorted(found, key=lambda run: read(run, "settings.json")["seed"])


# What a row of the results says behind its minutes, by where its runs were trained.
MACHINES = {
    "cpu (AMD EPYC, 1 threads)": "min",
    "cpu (Intel Xeon, 1 threads)": "min (Xeon)",
    "cpu (Intel Xeon, 2 threads)": "min (Xeon, 2 cores)",
}


def accuracy_of(folders: list[Path]) -> str:
    """That of one run, or mean and deviation of those that differ in their seed alone."""
    finals = [read(run, "results.json")["final_accuracy"] for run in folders]
    spread = f" ± {statistics.stdev(finals):.2f}" if len(finals) > 1 else ""
    return f"{statistics.mean(finals):.2f}{spread} %"


@every
def test_results_and_the_network_s_file_tell_the_runs_accuracy(folder):
    settings = read(folder, "settings.json")
    folders = alike(settings)
    first, *seeds = [read(run, "settings.json")["seed"] for run in folders]
    results = [read(run, "results.json") for run in folders]
    accuracy, epochs = accuracy_of(folders), settings["epochs"]
    named = settings["recipe_name"]
    flags = "" if named == "tuned" else f" --recipe {named}"
    flags += "".join(f" --set {key}={value}" for key, value in settings["arguments"]["set"])
    choice = choice_of(settings)
    command = f"`python train.py --model {choice} --epochs {epochs} --seed {first}{flags}`"
    if seeds:
        command += f", seeds {', '.join(map(str, [first, *seeds]))}"
    row = cells("docs/results.md", "", holding=f"{command} |")
    assert f"**{accuracy}**" in row or accuracy in row
    assert str(epochs) in row
    minutes = [f"{each['total_seconds'] / 60:.0f}" for each in results]
    (device,) = {read(run, "settings.json")["device"] for run in folders}
    assert f"{', '.join(minutes)} {MACHINES[device]}" in row
    if choice.endswith(".py"):
        assert f"{results[0]['train_accuracy']:.1f} %" in row
    else:
        assert ", ".join(str(each["target_reached_at"]) for each in results) in row
    taught = settings.get("teacher")
    changed = f", distilled from {taught['network']}" if taught else ""
    if taught and (several := taught["network"].count(" and ") + 1) > 2:
        changed = f", distilled from {several} networks"
    code = " ".join((ROOT / settings["model_file"]).read_text().split())  # wherever lines break
    assert f"{accuracy} after {epochs} epochs{changed}" in code


@every
def test_results_tell_a_best_epoch_that_was_not_the_last(folder):
    results = read(folder, "results.json")
    if results["best_epoch"] != results["epochs_done"]:
        best = f"{results['best_accuracy']:.2f} % at epoch {results['best_epoch']}"
        assert best in " ".join(text("docs/results.md").split())


@pytest.mark.parametrize(
    "folder",
    [run for run in RUNS if read(run, "settings.json")["recipe_name"] == "published"],
    ids=lambda run: run.name,
)
def test_published_recipes_here(folder):
    """What is said of them beside their rows, which the tests of all runs compare."""
    said = text("docs/results.md").partition("## Do the published figures hold?")[2].partition("##")
    assert re.search(rf"\b{read(folder, 'results.json')['final_accuracy']:.2f}\b", said[0])


def shown(value: str) -> str:
    """A setting of a search as a command line gives it: 0.10 and 0.1 alike."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def search_of(path: Path) -> tuple[list[str], dict[tuple, dict[str, float]], list[tuple]]:
    """What a search changed, the accuracy of each of its settings by seed, and what is left out."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])[2 : list(rows[0]).index("seed")]
    found: dict[tuple, dict[str, float]] = {}
    left_out = []
    for row in rows:
        setting = tuple(shown(row[name]) for name in names)
        if row["state"] == "COMPLETE":
            found.setdefault(setting, {})[row["seed"]] = float(row["accuracy"])
        elif row["seed"]:
            left_out.append((setting, row["seed"]))
    return names, found, left_out


@pytest.mark.parametrize(
    "path", sorted(REFERENCE.glob("search/*/trials.csv")), ids=lambda path: path.parent.name
)
def test_recipes_tell_what_the_searches_found(path):
    """Mean and deviation of each setting's seeds, and the difference to the first, by seed."""
    page = text("docs/recipes.md")
    names, found, left_out = search_of(path)
    for setting, seed in left_out:
        if setting in found:
            assert seed not in found[setting]
        else:
            assert f"{', '.join(setting)} was not finished" in page
    other = ELSEWHERE.get(path.parent.name)
    usual = next(iter(found)) if other is None else tuple("" for _ in names)
    known = found if other is None else search_of(REFERENCE / "search" / other / path.name)[1]
    base = next(iter(known.values()))
    for setting, seeds in found.items():
        changed = FIXED.get(path.parent.name, []) + [
            f"--set {name}={value}"
            for name, value, first in zip(names, setting, usual, strict=True)
            if value != first
        ]
        flags = f"`{' '.join(sorted(changed))}`" if changed else ""
        row = f"| {flags} | " if flags else "| nothing | | "
        lost = [seeds[seed] - base[seed] for seed in sorted(seeds)]
        if list(seeds) == ["0"]:
            row += f"{seeds['0']:.2f} | " + (f"{lost[0]:+.1f} |" if changed else "|")
        else:
            assert len(seeds) == 3
            mean, spread = statistics.mean(seeds.values()), statistics.stdev(seeds.values())
            row += f"{mean:.2f} ± {spread:.2f} |"
            if changed:
                error = statistics.stdev(lost) / len(lost) ** 0.5
                row += f" {statistics.mean(lost):+.2f} ± {error:.2f} |"
        assert row in page


def test_recipes_tell_what_label_smoothing_is_worth_at_all_peaks():
    _, found, _ = search_of(REFERENCE / "search/model_2_peak/trials.csv")
    gains = [
        found[peak, "0.1"][seed] - without
        for (peak, smoothing), seeds in found.items()
        if smoothing == "0"
        for seed, without in seeds.items()
    ]
    assert len(gains) == 9
    error = statistics.stdev(gains) / len(gains) ** 0.5
    page = " ".join(text("docs/recipes.md").split())
    assert f"{statistics.mean(gains):.2f} ± {error:.2f} over the nine pairs of b" in page


@pytest.mark.parametrize("name", FOR_USERS)
def test_results_tell_what_damage_costs(name):
    found, run = read(REFERENCE / "corruptions", f"{name}.json"), REFERENCE / name
    assert found["weights"] == f"output/reference/{name}/weights.pt"
    assert (found["of"], found["images"]) == ("test set", 10_000)
    assert found["top1"] == pytest.approx(read(run, "results.json")["final_accuracy"], abs=0.02)
    assert list(found["corruptions"]) == list(corruptions.CORRUPTIONS)
    heading, *_ = (line for line in text("docs/results.md").splitlines() if "| JPEG 90" in line)
    assert heading.count("|") == len(found["corruptions"]) + 3
    row = cells("docs/results.md", f"{name} | {found['top1']:.2f} |")[1:]
    assert row == [f"{each['accuracy']:.1f}" for each in found["corruptions"].values()]


def span(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def test_the_log_in_results_is_the_run_s():
    folder = REFERENCE / "model_2_20_epochs"
    rows = [{key: float(value) for key, value in row.items()} for row in log_of(folder)]
    page, best, passed, reached = text("docs/results.md").splitlines(), 0.0, 0.0, False
    for number, row in enumerate(rows, 1):
        seconds = row["train_seconds"] + row["test_seconds"]
        passed += seconds
        line = (
            f"Epoch [{number:2d}/20] - Train: {row['train_acc']:.2f}% | "
            f"Test: {row['test_acc']:.2f}% | loss {row['train_loss']:.3f}/{row['test_loss']:.3f} | "
            f"lr {row['lr']:.4f} | {seconds:.1f}s"
        )
        if number < 20:
            line += f" | {span(passed / number * (20 - number))} left"
        if row["test_acc"] > best:
            best = row["test_acc"]
            line += " | best so far"
        if not reached and row["test_acc"] >= 85:
            reached = True
            line += " | target 85% reached"
        assert line in page
    results = read(folder, "results.json")
    for figures in (
        f"{results['final_accuracy']:.2f} %  (epoch 20, last.pt)",
        f"{results['best_accuracy']:.2f} %  (epoch {results['best_epoch']}, best.pt",
        f"reached at epoch {results['target_reached_at']}",
        f"{results['gap_points']:+.2f} points",
        f"{span(results['total_seconds'])}  (training {span(results['train_seconds'])}, "
        f"evaluation {span(results['test_seconds'])})",
    ):
        assert figures in text("docs/results.md")


BENCHES = [read(REFERENCE / f"bench_model_{number}_cpu", "bench.json") for number in "123"]


def ranged(values: dict, form: str, unit: str = "") -> str:
    """As the tables show a median, and the least and the greatest."""
    median, least, most = (format(values[key], form) for key in ("median", "min", "max"))
    return f"{median}{unit} ({least} to {most})"


@pytest.mark.parametrize("column", [0, 1, 2])
def test_speeds_in_docs_are_the_bench_s(column):
    """Every figure of the tables, as tools.bench saved it, to the last digit shown."""
    bench, transform = BENCHES[column], BENCHES[column]["transform"]
    wanted = {}
    for way, title in WAYS.items():
        wanted[title] = ranged(bench["images_per_second"][way], ",.0f")
        if way != "ours":
            wanted[title] += ", " + ranged(bench["times_faster"][way], ".1f", "x")
    wanted |= {
        "MFLOP an image, forward and backward": f"{bench['mflop_per_image']:.0f}",
        "product of 2048x2048 matrices, GFLOP/s": ranged(bench["matmul_gflops"], ",.0f"),
        "share of the matrix product's rate": ranged(bench["share_percent"], ".1f", " %"),
        "Albumentations, p=1": ranged(transform["p=1"]["albumentations"], ".1f"),
        "batched, p=1": ranged(transform["p=1"]["batched"], ".1f"),
        "Albumentations, own p": ranged(transform["own p"]["albumentations"], ".1f"),
        "batched, own p": ranged(transform["own p"]["batched"], ".1f"),
    }
    for beginning, cell in wanted.items():
        assert cells("docs/speed.md", f"{beginning} |")[column] == cell


def test_the_speed_without_amx_is_the_bench_s():
    bench = read(REFERENCE / "bench_model_2_cpu_float32", "bench.json")
    assert bench["precision"] == "torch.float32"
    row = cells("docs/speed.md", "model 2 without AMX |")
    for way, cell in zip(WAYS, row, strict=True):
        wanted = ranged(bench["images_per_second"][way], ",.0f")
        if way != "ours":
            wanted += ", " + ranged(bench["times_faster"][way], ".1f", "x")
        assert cell == wanted
    minutes = 70 * 50_000 / bench["images_per_second"]["ours"]["median"] / 60
    assert f"with AMX (without it, model 2 takes {minutes:.0f})" in " ".join(
        text("README.md").split()
    )


def minutes_of(number: int, way: str, epochs: int) -> float:
    return epochs * 50_000 / BENCHES[number - 1]["images_per_second"][way]["median"] / 60


@pytest.mark.parametrize(("number", "epochs"), [(1, 6), (2, 10), (3, 12)])
def test_minutes_to_85_are_the_runs_epochs_at_the_bench_s_speed(number, epochs):
    run = REFERENCE / f"model_{number}_{epochs}_epochs"
    row = cells("docs/speed.md", f"model {number} |", holding="min |")
    reached = read(run, "results.json")["target_reached_at"]
    published = read(REFERENCE / f"model_{number}_published", "results.json")["target_reached_at"]
    assert row[0] == str(published)
    usual = minutes_of(number, "usual", published)
    ours = minutes_of(number, "ours", reached)
    assert [row[1], *row[3:]] == [
        f"{usual:.0f} min", str(reached), f"{ours:.1f} min", f"{usual / ours:.0f}x",
    ]  # fmt: skip


def test_minutes_to_85_as_they_were_really_run():
    """Training alone, until the end of the first epoch at 85 % or more."""
    minutes, epochs = {}, {}
    for way in ("usual", "ours"):
        rows = log_of(REFERENCE / "minutes" / f"{way}_model_2")
        number = next(at for at, row in enumerate(rows, 1) if float(row["test_acc"]) >= 85)
        epochs[way] = number
        minutes[way] = sum(float(row["train_seconds"]) for row in rows[:number]) / 60
    usual, ours = minutes.values()
    seconds = {way: 60 * minutes[way] / epochs[way] for way in minutes}
    smaller = 50_000 / BENCHES[1]["images_per_second"]["usual"]["median"]  # in batches of 256
    cost = epochs["usual"] * (seconds["usual"] - smaller) / 60
    told = {
        "README.md": f"ours reaches 85 % in {ours:.1f} minutes; the published recipe, written the "
        f"usual way, in {usual:.0f} (some {round(cost, -1):.0f} of them due to its batches of "
        f"{networks.load_network('2').published.batch_size:,}):",
        "docs/speed.md": f"took {usual:.0f} minutes of training to 85 %, ours {ours:.1f}.",
    }
    parts = (
        f"{usual / ours:.0f}x, made of three parts",
        f"{epochs['usual']} epochs of a schedule of 100 against {epochs['ours']} of 10, "
        f"{epochs['usual'] / epochs['ours']:.1f}x",
        f"takes the usual way {seconds['usual']:.0f} s, in batches of 256 it would take "
        f"{smaller:.0f} s",
        f"This is {seconds['usual'] / smaller:.1f}x",
        f"{smaller:.0f} s against {seconds['ours']:.0f} s, {smaller / seconds['ours']:.1f}x",
    )
    for page, sentence in [*told.items(), *(("docs/speed.md", part) for part in parts)]:
        assert sentence in " ".join(text(page).split())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_readme_s_table_is_the_runs_and_the_bench_s(number):
    settings = read(REFERENCE / f"model_{number}", "settings.json")
    epochs, speed = settings["epochs"], BENCHES[number - 1]["images_per_second"]["ours"]["median"]
    minutes = f"{minutes_of(number, 'ours', epochs):.0f}"
    accuracy = accuracy_of(alike(settings))
    parameters = f"{settings['parameters']:,}"
    row = cells("README.md", f"model {number}: ")
    assert row == [parameters, f"**{accuracy}** at {epochs} epochs", minutes]
    assert cells("docs/results.md", f"`CNN_Model_{number}` |")[0] == parameters
    row = cells("docs/results.md", f"model {number} | {epochs} |")
    assert row == [str(epochs), f"{speed:,.0f}", minutes]


def test_the_readme_tells_how_long_the_runs_took():
    taken = []
    for number in (1, 2, 3):
        folders = alike(read(REFERENCE / f"model_{number}", "settings.json"))
        minutes = sorted(read(run, "results.json")["total_seconds"] / 60 for run in folders)
        least, most = f"{minutes[0]:.0f}", f"{minutes[-1]:.0f}"
        taken.append(least if len(minutes) == 1 else f"{least} to {most}")
    sentence = f"took {taken[0]}, {taken[1]} and {taken[2]} on one core"
    assert sentence in " ".join(text("README.md").split())


def test_near_duplicates_are_those_of_the_report():
    report = " ".join((REFERENCE / "explore" / "report.md").read_text().split())
    page = " ".join(text("docs/tools.md").split())
    count, share = re.search(r"(\d+) of the 10,000 test images \(([\d.]+) %\)", page).groups()
    assert f"- {count} ({share}%) have a training image, or a mirrored one" in report
    assert "- 0 of 10,000 are there byte for byte" in report


# ---------------------------------------------------------------- the pages themselves


def test_the_readme_takes_five_minutes():
    readme = text("README.md")
    assert len(readme.split()) <= 1000
    assert max(map(len, readme.splitlines())) < 100
    assert readme.count("![") <= 4


@each_page
def test_lines_are_short(page):
    """But where they cannot be wrapped: tables, pictures, a training's own lines."""
    fixed = ("|", "![", "Epoch [")
    long = [line for line in text(page).splitlines() if len(line) > 100]
    assert [line for line in long if not line.startswith(fixed)] == []


@each_page
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text(page))
    local = [target for target in targets if not target.startswith("http")]
    assert [name for name in local if not (ROOT / page).parent.joinpath(name).exists()] == []


def test_every_page_is_linked_from_the_readme():
    assert [page for page in PAGES[1:] if f"]({page})" not in text("README.md")] == []


def commands(page: str) -> list[list[str]]:
    """What follows "python" in the code of a page, in words."""
    code = text(page).replace("\\\n", " ")
    lines = re.findall(r"^(?: {4}|)(?:.*&& )?python (.*)$", code, re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", code, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`python ([^`]*)`", " ".join(prose.split()))
    return [shlex.split(line, comments=True) for line in [*lines, *spans]]


def test_commands_are_found():
    assert ["train.py", "--resume"] in commands("README.md")
    assert ["-m", "tools.predict", "cat.jpg"] in commands("README.md")
    assert ["train.py"] in commands("README.md")
    assert len(commands("docs/results.md")) > 15


@each_page
def test_commands_name_files_and_flags_that_exist(page):
    for words in commands(page):
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        if module in ("tools.", "tools.NAME"):  # one of them
            continue
        program = ROOT / f"{module.replace('.', '/')}.py"
        assert program.is_file(), words
        flags = [word for word in words if word.startswith("--")]
        known = "".join(
            path.read_text() for path in (program, ROOT / "cli.py", ROOT / "support/flags.py")
        )
        assert [flag for flag in flags if f'"{flag}"' not in known + '"--help"'] == [], words
        values = [word.rpartition("=")[2] for word in words]
        paths = [word for word in values if word.startswith(("output/reference/", "baselines/"))]
        # What is written is not there yet, and what was published is.
        assert [path for path in paths if not (ROOT / path).exists()] == [], words


def test_every_tool_is_in_the_table():
    for path in (ROOT / "tools").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            assert re.search(rf"^\| .*`{path.stem}\b", text("docs/tools.md"), re.MULTILINE), path


def test_every_room_is_in_the_table():
    named = set(re.findall(r"^\| (`.*?`) \|", text("docs/code.md"), re.MULTILINE))
    named = {name.strip("`") for cell in named for name in cell.split(", ")}
    assert [name for name in named if not (ROOT / name).exists()] == []
    inner = [path for name in ("fast", "support") for path in (ROOT / name).glob("[!_]*.py")]
    rooms = [*ROOT.glob("*.py"), *inner]
    assert {str(path.relative_to(ROOT)) for path in rooms} - named == set()


def test_the_code_to_read_first_is_as_short_as_the_readme_says():
    readme = text("README.md")
    files = re.findall(r"^\d\. \[(\w+\.py)\]", readme, re.MULTILINE)
    assert files[:2] == ["model_1.py", "train.py"]
    most = int(re.search(r"at most ([\d,]+) lines", readme)[1].replace(",", ""))
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= most


def code_block(page: str) -> str:
    return re.search(r"^```python\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)[1]


def test_the_readme_s_code_runs(sample, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {"images": torch.from_numpy(sample.test_images)}
    exec(code_block("README.md"), names)
    settings = json.loads((REFERENCE / "model_2" / "settings.json").read_text())
    found = int((names["probabilities"].argmax(dim=1).numpy() == sample.test_labels).sum())
    assert found == hits(names["network"], sample.test_images, sample.test_labels, settings)


def test_the_accuracy_without_our_loops(sample, monkeypatch, capsys):
    monkeypatch.setattr(cifar10, "load_cifar10", lambda _: sample)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code_block("docs/results.md"), names)
    found = hits(names["model"], sample.test_images, sample.test_labels, names["settings"])
    assert capsys.readouterr().out == f"{found / 2:.2f} %\n"


def test_the_profile_of_a_step(monkeypatch, tmp_path, capsys):
    network = tmp_path / "small.py"
    network.write_text(SMALL_NETWORK)
    monkeypatch.setattr("sys.argv", ["profile.py", str(network)])
    exec(code_block("docs/speed.md"), {})
    assert "aten::conv" in capsys.readouterr().out
