"""tools.search: what it asks for, trains, counts, and tells; kills, SQLite, and a real PostgreSQL.

Most trainings are those of fake_train.py, which ends in no time and whose accuracies are known.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

import networks
import plots
import runs
import train
import utils
from tests import forked
from tests.conftest import SMALL_NETWORK, call_main, run_in
from tests.fake_train import accuracy
from tools import findings, search, studies, trials

FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    file = tmp_path / "small.py"
    file.write_text(SMALL_NETWORK)
    return file


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake trainings, looked at often; workers that are dead after two seconds of silence."""
    monkeypatch.setattr(trials, "TRAIN", [sys.executable, "-I", "-S", str(FAKE)])
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr(studies, "HEARTBEAT", 1)
    monkeypatch.setattr(studies, "GRACE", 2)
    monkeypatch.setenv("FAKE_MENDED", str(tmp_path / "mended"))
    monkeypatch.setenv("FAKE_SECONDS", "0")
    return tmp_path / "out"


@pytest.fixture
def call(network: Path, tmp_path: Path, capsys, monkeypatch) -> Callable:
    """Exit status, output and errors of a search in a dry run, without pictures."""
    for name in ("parameters_picture", "epochs_picture", "importance_picture"):
        monkeypatch.setattr(findings, name, lambda *_: b"")

    def run(*arguments: object) -> tuple[int, str, str]:
        usual = ["--model", network, "--dry-run", "--output-dir", tmp_path / "out"]
        epochs = [] if "--epochs" in arguments else ["--epochs", 2]
        return call_main(search.main, capsys, [*usual, *epochs, *arguments])

    return run


def study_folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "search").glob("*-*-*") if path.is_dir())


def table_of(out: Path, name: str = "trials.csv") -> list[dict]:
    (folder,) = study_folders(out)
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def starts_of(out: Path) -> list[list[str]]:
    """How each run began and went on."""
    files = sorted((out / "search").glob("*/*/*/starts.txt"))
    return [file.read_text().split() for file in files]


# ---------------------------------------------------------------- train.py --no-test


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    """The splits that train.py evaluates."""
    seen, real = [], utils.evaluate

    def watch(model, loader, device, split, team):
        seen.append(split)
        return real(model, loader, device, split, team)

    monkeypatch.setattr(utils, "evaluate", watch)
    return seen


@pytest.mark.usefixtures("no_pictures")
def test_no_test_reports_the_held_out_images_alone(network, tmp_path, capsys, looked_at):
    base = ["--model", network, "--dry-run", "--epochs", 2, "--output-dir", tmp_path / "out"]
    status, out, error = call_main(train.main, capsys, [*base, "--val-split", 200, "--no-test"])
    assert (status, error) == (0, "")
    assert looked_at == ["val", "val"]
    folder = run_in(tmp_path / "out")
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert (results["evaluated"], results["completed"]) == ("val", True)
    assert results["final_accuracy"] == float(rows[-1]["val_acc"])
    assert "final val accuracy" in out
    assert "test accuracy" not in out


@pytest.mark.usefixtures("no_pictures")
def test_no_test_holds_when_a_run_goes_on(network, tmp_path, capsys, looked_at, monkeypatch):
    real = utils.train

    def stop(*arguments):
        monkeypatch.setattr(utils, "train", real)
        raise KeyboardInterrupt

    base = ["--model", network, "--dry-run", "--epochs", 1, "--output-dir", tmp_path / "out"]
    monkeypatch.setattr(utils, "train", stop)
    status, *_ = call_main(train.main, capsys, [*base, "--val-split", 200, "--no-test"])
    assert status == 130
    folder = run_in(tmp_path / "out")
    status, *_ = call_main(train.main, capsys, ["--resume", folder, "--model", network])
    assert status == 0
    assert looked_at == ["val"]
    assert json.loads((folder / "results.json").read_text())["evaluated"] == "val"


def test_no_test_without_held_out_images_is_refused(network, tmp_path, capsys):
    arguments = ["--model", network, "--dry-run", "--no-test", "--output-dir", tmp_path / "out"]
    status, out, error = call_main(train.main, capsys, arguments)
    assert (status, out) == (2, "")
    wanted = "--no-test leaves nothing to evaluate; hold images out with --val-split N"
    assert error == f"train.py: error: {wanted}\n"
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is asked for

P = studies.Parameter


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lr=0.03,0.045", P("lr", (0.03, 0.045), 0.03, 0.045)),
        ("augment=0,0.5,0.25", P("augment", (0, 0.5, 0.25), 0.0, 0.5)),
        ("batch_size=256,128", P("batch_size", (256, 128), 128, 256)),
        ("lr=1e-3", P("lr", (0.001,), 0.001, 0.001)),
        ("optimizer=muon,sgd", P("optimizer", ("muon", "sgd"))),
        ("nesterov=True,False", P("nesterov", (True, False))),
    ],
)
def test_a_grid_s_values_are_read_as_set_reads_them(text, wanted):
    found = studies.grid_entry(text)
    assert found == wanted
    assert list(map(type, found.ends)) == list(map(type, wanted.ends))
    assert list(map(type, found[2:4])) == list(map(type, wanted[2:4]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lr=0.01:0.1:log", P("lr", (), 0.01, 0.1, True)),
        ("augment=0:0.5", P("augment", (), 0.0, 0.5)),
        ("batch_size=128:512:int", P("batch_size", (), 128, 512)),
        ("batch_size=128:512", P("batch_size", (), 128, 512)),
        ("momentum=0:1", P("momentum", (), 0.0, 1.0)),
        ("batch_size=64:512:int:log", P("batch_size", (), 64, 512, True)),
        ("optimizer=muon,sgd", P("optimizer", ("muon", "sgd"))),
        ("batch_size=128,512", P("batch_size", (128, 512))),
    ],
)
def test_a_tuned_range(text, wanted):
    found = studies.tune_entry(text)
    assert found == wanted
    assert list(map(type, found[2:4])) == list(map(type, wanted[2:4]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either --grid or --tune"),
        ("--grid lr=0.1 --tune lr=0.1:0.2", "give either --grid or --tune"),
        ("--grid lr", "'lr' is not KEY=VALUE,VALUE"),
        ("--grid lr=", "'lr=' is not KEY=VALUE,VALUE"),
        ("--grid lr=0.1,,0.2", "'lr=0.1,,0.2' has an empty value"),
        ("--grid lr=0.1,0.10", "'lr=0.1,0.10' has 0.1 twice"),
        ("--grid lr=0.1 lr=0.2", "lr is given twice"),
        ("--grid lr=0.1 --set lr=0.2", "lr is given twice"),
        ("--grid seed=1,2", "seed is no key of a recipe; give --seeds N with --grid"),
        ("--tune seed=1:2:int", "seed is no key of a recipe"),
        ("--grid learning=1,2", "recipe: learning is unknown; known are optimizer, lr,"),
        ("--grid lr=0.1 --set learning=1", "recipe: learning is unknown"),
        ("--grid lr=0.1,-1", "recipe: lr is -1: Input should be greater than 0"),
        ("--grid lr=0.1,high", "recipe: lr is 'high': Input should be a valid number"),
        ("--grid optimizer=sgd,adam", "recipe: optimizer is 'adam'"),
        ("--grid dropout=1,6", "dropout 6 makes a probability of 1.2"),
        ("--grid batch_size=100,900", "the batch size 900 is above the number of training images"),
        ("--grid teacher=output/reference/model_1", "was trained with --val-split None"),
        ("--grid lr=0.1 --trials 3", "--trials and --no-pruning are for --tune"),
        ("--grid lr=0.1 --no-pruning", "--trials and --no-pruning are for --tune"),
        ("--grid lr=0.1 --val-split 1000", "--val-split 1000 is too large"),
        ("--grid lr=0.1 --seeds 0", "'0' is not a whole number from 1 to 1000"),
        ("--grid lr=0.1 --jobs 0", "'0' is not a whole number from 1 to 256"),
        ("--grid lr=0.1 --device abacus", "abacus"),
        ("--grid lr=0.1,0.2,0.3 dropout=0.1,0.2,0.3,0.4 --seeds 1000", "this grid is 12,000 train"),
        ("--tune lr=0.1", "'lr=0.1' leaves no choice; fix it with --set"),
        ("--tune lr=0.1:0.01", "'lr=0.1:0.01': the range must begin below its end"),
        ("--tune lr=0.1:0.1", "the range must begin below its end"),
        ("--tune lr=0:0.1:log", "a logarithmic range begins above 0"),
        ("--tune lr=0:0.1", "recipe: lr is 0.0: Input should be greater than 0"),
        ("--tune augment=0:2", "recipe: augment is 2.0"),
        ("--tune lr=a:b", "'lr=a:b' is not KEY=LOW:HIGH"),
        ("--tune lr=0.1:0.2:cubic", "'lr=0.1:0.2:cubic' is not KEY=LOW:HIGH"),
        ("--tune lr=0.1:0.2:log:log", "is not KEY=LOW:HIGH"),
        ("--tune batch_size=128:512.5:int", "the ends of :int are whole numbers"),
        ("--tune batch_size=128:512.5", "recipe: batch_size is 128.0"),
        ("--tune lr=0.1:0.2 --seeds 3", "--seeds is for --grid: a trial of --tune is one training"),
        ("--tune lr=0.1:0.2 --trials 0", "'0' is not a whole number from 1 to 100000"),
    ],
)
def test_what_cannot_be_searched_is_one_line(arguments, message, fake, call, tmp_path):
    status, _, error = call(*arguments.split())
    assert status == 2
    assert message in error
    assert error.startswith("tools.search: error: ")
    assert error.count("\n") == 1
    assert not fake.exists()


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("abc", 2, "--storage abc is no database that is known; give sqlite:///FILE.db or"),
        ("db2:///x", 2, "--storage db2:///x is no database that is known"),
        ("sqlite://", 2, "would be forgotten; give sqlite:///FILE.db"),
        ("postgresql://me:hush@127.0.0.1:9/x", 1, "://me:***@127.0.0.1:9/x cannot be used: conn"),
        ("postgresql://me:hush@127.0.0.1:none/x", 2, "is no database that is known"),
        ("postgresql://me:hush@127.0.0.1:99999/x", 2, "is no database that is known"),
        ("sqlite:///{tmp}/art.db", 2, "art.db holds another program's tables (studies, views)"),
        ("sqlite:///{tmp}/other.db", 2, "other.db holds another program's tables (cats, dogs)"),
        ("mysql+pymysql://me:hush@host/x", 2, "needs pymysql; pip install"),
        ("sqlite:///{tmp}/text.db", 1, "text.db cannot be used: file is not a database"),
        ("sqlite:///{tmp}/text.db/x.db", 1, "text.db"),
        ("sqlite:///{tmp}/x.db?mode=ro", 2, "give sqlite:///FILE.db, without options"),
        ("", 2, "is no database that is known"),  # a variable that is not set
    ],
)
def test_a_storage_out_of_reach_is_one_line(url, status, message, fake, call, tmp_path):
    (tmp_path / "text.db").write_text("no database at all " * 100)
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.executescript("CREATE TABLE cats (name); CREATE TABLE dogs (name)")
    before = other.read_bytes()
    with contextlib.closing(sqlite3.connect(tmp_path / "art.db")) as connection:
        connection.executescript("CREATE TABLE studies (art); CREATE VIEW views AS SELECT 1")
    found, _, error = call("--grid", "lr=0.1", "--storage", url.replace("{tmp}", str(tmp_path)))
    assert message in error
    assert found == status
    assert error.count("\n") == 1
    assert "hush" not in error
    assert other.read_bytes() == before
    assert starts_of(fake) == []


def test_an_unwritable_folder_is_one_line(fake, call, network):
    fake.write_text("a file where the folder would be")
    status, _, error = call("--grid", "lr=0.1")
    assert (status, error.count("\n")) == (1, 1)
    assert str(fake) in error


def test_what_is_missing_is_said_in_a_line(fake, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    status, _, error = call("--grid", "lr=0.1")
    wanted = "a search needs optuna; pip install -r requirements-search.txt"
    assert (status, error) == (2, f"tools.search: error: {wanted}\n")


def name(network: str = "net", kind: str = "grid", entries: str = "lr=1,2", **about) -> str:
    read = studies.grid_entry if kind == "grid" else studies.tune_entry
    about = {"epochs": 2, "seeds": 3} | about
    return studies.name_of(network, kind, list(map(read, entries.split())), about)


def test_a_study_s_name_follows_from_what_is_searched():
    assert re.fullmatch(r"net-grid-lr-[0-9a-f]{8}", name())
    assert name() == name(entries="lr=2,1")
    assert name(entries="lr=1,2 dropout=0,1") == name(entries="dropout=1,0 lr=1,2")
    different = [
        name(), name(epochs=3), name(seeds=2), name(entries="lr=1,2,3"), name(kind="tune"),
        name(entries="lr=1:2", kind="tune"), name(entries="lr=1:2:log", kind="tune"),
        name(entries="dropout=1,2"), name(entries="lr=1:2:int", kind="tune"), name("other"),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


# ---------------------------------------------------------------- statistics


def trial_of(
    number: int, value: float | None, state: str = "COMPLETE", **params
) -> SimpleNamespace:
    return SimpleNamespace(
        number=number, value=value, state=SimpleNamespace(name=state), params=params,
        system_attrs={}, user_attrs={"seconds": 10.0 * number}, intermediate_values={},
    )  # fmt: skip


FIRST, SECOND = [86.1, 85.7, 86.4, 86.0], [86.6, 86.1, 86.7, 86.9]


def rows_of(*groups: list[float]) -> list[dict]:
    number, found = 0, []
    for lr, group in enumerate(groups):
        for seed, value in enumerate(group):
            found.append(trial_of(number, value, lr=lr, seed=seed))
            number += 1
    return findings.rows_of([{"lr": lr} for lr in range(len(groups))], found)


def test_mean_deviation_and_paired_difference_are_numpy_s_and_scipy_s():
    first, second = rows_of(FIRST, SECOND)
    for row, values in ((first, FIRST), (second, SECOND)):
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["deviation"] == pytest.approx(np.std(values, ddof=1))
    paired = stats.ttest_rel(SECOND, FIRST)
    assert second["difference"] / second["error"] == pytest.approx(paired.statistic)
    assert second["difference"] == pytest.approx(np.mean(SECOND) - np.mean(FIRST))
    assert second["seconds"] == pytest.approx(55.0)
    assert second["pairs"] == 4


def test_only_seeds_that_both_have_are_compared():
    found = [trial_of(0, 80.0, lr=0, seed=0), trial_of(1, 81.0, lr=0, seed=1)]
    found += [trial_of(2, 90.0, lr=1, seed=1), trial_of(3, 70.0, lr=1, seed=2)]
    found += [trial_of(4, None, "PRUNED", lr=1, seed=0), trial_of(5, 99.0, lr=1, seed=1)]
    found[4].user_attrs["diverged"] = "nan"
    row = findings.rows_of([{"lr": 0}, {"lr": 1}], found)[1]
    assert (row["seeds"], row["pairs"], row["difference"], row["error"]) == (2, 1, 9.0, None)
    assert row["mean"] == 80.0  # of two trials of a point the first counts
    assert row["diverged"] == 1


def test_the_verdict_names_what_is_beyond_twice_the_error():
    near = [value + step for value, step in zip(FIRST, [0.3, 0.1, -0.05, 0.2], strict=True)]
    far = [value - 2 - step for value, step in zip(FIRST, [0.1, 0.2, 0.3, 0.1], strict=True)]
    told = findings.verdict(rows_of(FIRST, SECOND, near, far))
    assert "lr=1: more than twice the standard error better than lr=0." in told
    assert "lr=3: more than twice the standard error worse than lr=0." in told
    assert "lr=2: cannot be told from lr=0, it may be chance." in told
    assert f"in {100 * 2 * stats.t.cdf(-2, 3):.0f} % of comparisons (3 here)" in told


def test_one_seed_tells_nothing():
    told = findings.verdict(rows_of([80.0], [85.0]))
    assert told.startswith("lr=1: one seed tells nothing")
    assert "better" not in told
    assert findings.verdict(rows_of([80.0])) == "Nothing to compare yet."


# ---------------------------------------------------------------- whole searches


def test_a_grid_is_trained_counted_and_told(fake, call):
    status, out, error = call("--grid", "lr=0.1,0.05", "--seeds", 3, "--jobs", 2)
    assert (status, error) == (0, "")
    rows = table_of(fake, "results.csv")
    assert [row["lr"] for row in rows] == ["0.1", "0.05"]
    for row in rows:
        values = [accuracy(float(row["lr"]), seed, 2) for seed in range(3)]
        assert float(row["mean"]) == pytest.approx(np.mean(values))
        assert float(row["deviation"]) == pytest.approx(np.std(values, ddof=1))
        assert (row["seeds"], row["seconds"]) == ("3", "6.0")
    assert "lr=0.05      3           65.50 ± 0.50             -5.50 ± 0.29         6s" in out
    assert "lr=0.05: more than twice the standard error worse than lr=0.1." in out
    found = table_of(fake)
    points = Counter((row["lr"], row["seed"], row["state"], row["epochs"]) for row in found)
    wanted = [(lr, str(seed), "COMPLETE", "2") for lr in ("0.1", "0.05") for seed in range(3)]
    assert points == Counter(wanted)
    for row in found:
        told = json.loads(Path(row["folder"], "settings.json").read_text())
        assert (told["set"], told["seed"]) == ([f"lr={row['lr']}"], row["seed"])
        assert (told["no_test"], told["val_split"], told["epochs"]) == (True, "200", "2")
        assert runs.is_finished(Path(row["folder"]))
    (folder,) = study_folders(fake)
    assert (folder / "results.txt").read_text() in out


def test_the_same_command_goes_on_and_another_begins_anew(fake, call):
    assert call("--grid", "lr=0.1,0.05", "--seeds", 1)[0] == 0
    before = starts_of(fake)
    status, out, _ = call("--grid", "lr=0.05,0.1", "--seeds", 1)  # another order: another first row
    assert status == 0
    assert starts_of(fake) == before == [["began"], ["began"]]
    assert "lr=0.1       1                  70.00                    +5.00" in out
    assert call("--grid", "lr=0.1,0.05", "--seeds", 1, "--set", "momentum=0.8")[0] == 0
    assert len(study_folders(fake)) == 2
    assert len(starts_of(fake)) == 4
    storage = f"sqlite:///{fake}/search/small.db"
    assert len(optuna.get_all_study_names(storage)) == 2


@pytest.mark.parametrize(("jobs", "given", "threads"), [(1, None, 6), (4, None, 1), (2, "5", 5)])
def test_jobs_share_the_cores(jobs, given, threads, fake, call, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert call("--grid", "lr=0.1", "--seeds", 1, "--jobs", jobs)[0] == 0
    (file,) = fake.glob("search/*/*/*/settings.json")
    assert json.loads(file.read_text())["threads"] == str(threads)


def test_a_hopeless_trial_is_pruned_and_a_good_one_is_not(fake, call, monkeypatch):
    """Below the median of five that were trained to their end, in the second half of its epochs."""
    arguments = ("--tune", "lr=0.001:0.2:log", "--epochs", 4)
    assert call(*arguments, "--trials", 5)[0] == 0
    assert {row["state"] for row in table_of(fake)} == {"COMPLETE"}
    (folder,), url = study_folders(fake), f"sqlite:///{fake}/search/small.db"
    study = optuna.load_study(study_name=folder.name, storage=url)
    for lr in (0.002, 0.1):
        study.enqueue_trial({"lr": lr})
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    status, out, _ = call(*arguments, "--trials", 7, "--jobs", 2)
    assert status == 0
    *five, hopeless, good = table_of(fake)
    median = np.median([accuracy(float(row["lr"]), 0, 2) for row in five])
    assert accuracy(0.002, 0, 2) < median < accuracy(0.1, 0, 2)
    assert (hopeless["state"], hopeless["accuracy"]) == ("PRUNED", "")
    assert hopeless["epochs"] in ("2", "3")
    assert not (Path(hopeless["folder"]) / "results.json").exists()
    assert (good["state"], good["epochs"]) == ("COMPLETE", "4")
    assert "6 trained to the end, 1 pruned\n" in out
    first = out.split("setting\n")[1].splitlines()[0].split()
    assert first[:2] == ["6", "80.00"]
    assert first[-1] == "lr=0.1"


def test_without_pruning_every_trial_is_trained_and_trials_is_kept_exactly(fake, call, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    arguments = ("--tune", "lr=0.001:0.2", "--no-pruning", "--jobs", 3)
    assert call(*arguments, "--trials", 8)[0] == 0
    assert len(table_of(fake)) == 8
    assert call(*arguments, "--trials", 10)[0] == 0  # goes on with the same study
    assert len(table_of(fake)) == len(starts_of(fake)) == 10
    assert {(row["state"], row["epochs"]) for row in table_of(fake)} == {("COMPLETE", "2")}


def test_who_begins_a_study_repeats_itself_and_others_draw_differently(fake, call, tmp_path):
    drawn = []
    for storage in ("a", "b"):
        url = f"sqlite:///{tmp_path}/{storage}.db"
        assert call("--tune", "lr=0.001:0.2", "--trials", 2, "--storage", url)[0] == 0
        drawn.append([row["lr"] for row in table_of(fake)])
    assert drawn[0] == drawn[1]
    assert call("--tune", "lr=0.001:0.2", "--trials", 4, "--storage", url)[0] == 0
    later = [row["lr"] for row in table_of(fake)]
    assert later[:2] == drawn[0]
    assert not set(later[2:]) & set(later[:2])


def test_a_diverged_training_is_told_and_not_repeated(fake, call):
    for _ in range(2):
        status, out, _ = call("--grid", "lr=0.1,13", "--seeds", 2)
        assert status == 0
        assert re.search(r"^lr=13    0 \(2 diverged\)$", out, re.MULTILINE)
    assert len(starts_of(fake)) == 4
    assert Counter(row["state"] for row in table_of(fake)) == {"COMPLETE": 2, "DIVERGED": 2}


def test_a_training_s_error_ends_the_search_until_it_is_mended(fake, call, tmp_path):
    status, out, error = call("--grid", "lr=0.1,7", "--seeds", 1)
    assert status == 1
    assert re.fullmatch(r"tools.search: error: trial 1 in .*: the disk is full\n", error)
    assert "lr=0.1       1                  70.00" in out
    (tmp_path / "mended").touch()
    status, _, error = call("--grid", "lr=0.1,7", "--seeds", 1)
    assert (status, error) == (0, "")
    assert starts_of(fake) == [["began"], ["began", "resumed"]]
    assert [row["state"] for row in table_of(fake)] == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_goes_on_at_once(number, fake, call, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")

    def interrupt() -> None:
        while len(list(fake.glob("search/*/*/*/log.csv"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, out, error = call("--grid", "lr=0.1,0.05", "--seeds", 1, "--jobs", 2, "--epochs", 4)
    thread.join()
    assert status == 128 + number
    assert error == "\ntools.search: interrupted\n"
    assert out.count("stopped; it will be gone on with") == 2
    assert "The same command goes on." in out
    assert [len(starts) for starts in starts_of(fake)] == [1, 1]  # none is left behind
    assert {row["state"] for row in table_of(fake)} == {"WAITING"}
    monkeypatch.setenv("FAKE_SECONDS", "0")
    monkeypatch.setattr(studies, "GRACE", 1000)
    assert call("--grid", "lr=0.1,0.05", "--seeds", 1, "--jobs", 2, "--epochs", 4)[0] == 0
    assert starts_of(fake) == [["began", "resumed"], ["began", "resumed"]]
    rows = table_of(fake)
    assert sorted(row["lr"] for row in rows) == ["0.05", "0.1"]
    assert {(row["state"], row["epochs"]) for row in rows} == {("COMPLETE", "4")}


@pytest.mark.usefixtures("no_findings")
def test_a_real_training_is_an_ordinary_run(network, tmp_path, capsys, sample):
    """Its held-out accuracy is that of its weights on those images."""
    arguments = ["--model", network, "--dry-run", "--epochs", 1, "--output-dir", tmp_path]
    arguments += ["--grid", "lr=0.04", "--seeds", 1]
    status, _, error = call_main(search.main, capsys, arguments)
    assert (status, error) == (0, "")
    (row,) = table_of(tmp_path)
    assert (row["lr"], row["seed"], row["state"], row["epochs"]) == ("0.04", "0", "COMPLETE", "1")
    trained = networks.load_trained(row["folder"], str(network))
    _, held_out = utils.validation_split(1000, 200)
    images = [trained.transform(image=image)["image"] for image in sample.train_images[held_out]]
    with torch.inference_mode():
        found = trained.network(torch.stack(images)).argmax(dim=1).numpy()
    right = (found == sample.train_labels[held_out]).sum()
    assert right / 2 == pytest.approx(float(row["accuracy"]), abs=0.5)  # two, in bfloat16
    settings = json.loads((Path(row["folder"]) / "settings.json").read_text())
    assert (settings["seed"], settings["recipe"]["lr"], settings["val_split"]) == (0, 0.04, 200)
    assert json.loads((Path(row["folder"]) / "results.json").read_text())["evaluated"] == "val"


@pytest.mark.usefixtures("no_pictures")
def test_a_real_training_that_diverges_says_what_a_search_looks_for(network, tmp_path, capsys):
    arguments = ["--model", network, "--dry-run", "--epochs", 1, "--output-dir", tmp_path]
    status, _, error = call_main(train.main, capsys, [*arguments, "--set", "lr=1e14"])
    assert status == 1
    assert trials.DIVERGED in error.splitlines()[-1].partition("error: ")[2]


def test_a_training_that_somebody_stops_goes_on(fake, call, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")

    def stop() -> None:
        while not (found := list(fake.glob("search/*/*/*/log.csv"))):
            time.sleep(0.01)
        told = json.loads(found[0].with_name("settings.json").read_text())
        os.kill(told["pid"], signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    status, out, _ = call("--grid", "lr=0.1", "--seeds", 1, "--epochs", 3)
    thread.join()
    assert status == 0
    assert "trial 0 (lr=0.1, seed 0): 75.00 %" in out
    assert starts_of(fake) == [["began", "resumed"]]


@pytest.mark.filterwarnings("ignore")
def test_the_bar_counts_epochs_and_trials_of_all_workers():
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study, state = optuna.create_study(direction="maximize"), optuna.trial.TrialState
    complete, pruned, failed, running, _running = (study.ask() for _ in range(5))
    study.enqueue_trial({"lr": 0.1})
    for trial, epochs in ((complete, 4), (pruned, 2), (failed, 3), (running, 1)):
        for epoch in range(1, epochs + 1):
            trial.report(80.0, epoch)
    study.tell(complete, 80.0)
    study.tell(pruned, state=state.PRUNED)
    study.tell(failed, state=state.FAIL)
    args = SimpleNamespace(epochs=4, trials=10, jobs=1)
    found = trials.Search(args, None, study, None, Path(), [])._progress()
    assert found == (4 + 4 + 1, "2 of 10 trials done, 2 running, 1 pruned")


# ---------------------------------------------------------------- several workers


def fork(work: Callable[[], object]) -> int:
    """Does the work in a child of this process, which has imported everything already."""
    child = os.fork()
    if not child:
        status = 1
        try:
            forked.end_in_time()
            status = work() or 0
        finally:
            os._exit(status)
    return child


def two_workers_one_killed(network: Path, outs: list[Path], url: list, monkeypatch) -> list[dict]:
    """The first worker is killed in its second training; the second ends the grid.

    Where each has a folder of its own, the first one's is out of reach then, as on another machine.
    """
    monkeypatch.setenv("FAKE_SECONDS", "0.15")
    arguments = ["--model", network, "--dry-run", "--epochs", 2, *url]
    arguments += ["--grid", "lr=0.1,0.05,0.02", "--seeds", 2, "--output-dir"]

    def begin(out: Path) -> int:
        return fork(lambda: search.main(list(map(str, [*arguments, out]))))

    workers = [begin(outs[0]), begin(outs[-1])]
    while sum(len(list(out.glob("search/*/*/*/results.json"))) for out in set(outs)) < 2:
        time.sleep(0.01)
        assert os.waitpid(workers[0], os.WNOHANG) == (0, 0), "it ended by itself"
    os.kill(workers[0], signal.SIGKILL)
    if len(outs) > 1:
        outs[0].rename(outs[0].with_name("out-of-reach"))
    assert [os.waitstatus_to_exitcode(os.waitpid(w, 0)[1]) for w in workers] == [-9, 0]
    return table_of(outs[-1])


def each_once(rows: list[dict]) -> None:
    """Every point of that grid is there once, trained to its end."""
    wanted = {(lr, seed) for lr in ("0.1", "0.05", "0.02") for seed in ("0", "1")}
    complete = [(row["lr"], row["seed"]) for row in rows if row["state"] == "COMPLETE"]
    assert sorted(complete) == sorted(wanted)
    assert len(rows) == 6
    for row in rows:
        lr, seed = float(row["lr"]), int(row["seed"])
        assert float(row["accuracy"]) == pytest.approx(accuracy(lr, seed, 2))
        assert row["epochs"] == "2"


@pytest.fixture
def no_findings(monkeypatch) -> None:
    for each in ("parameters_picture", "epochs_picture", "importance_picture"):
        monkeypatch.setattr(findings, each, lambda *_: b"")


@pytest.mark.usefixtures("no_findings")
def test_two_workers_on_sqlite_one_of_them_killed(network, fake, monkeypatch):
    each_once(two_workers_one_killed(network, [fake], [], monkeypatch))
    assert len(list(fake.glob("search/*/*/*/results.json"))) == 6  # none was trained twice


SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, which listens on a socket alone."""
    if not SERVERS:
        pytest.skip("PostgreSQL is not there (apt-get install postgresql)")
    tools = SERVERS[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # the path of a socket has to be short
    user = []
    if os.geteuid() == 0:  # it does not run as root
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [*user, str(tools / program), "-D", str(folder / "data"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    begun = run("initdb", "-A", "trust", "-U", "me", "--no-sync", "--locale=C", "-E", "UTF8")
    try:
        if begun.returncode == 0:
            begun = run("pg_ctl", "-o", options, "-l", f"{folder}/log", "-w", "start")
        if begun.returncode:
            pytest.skip(f"PostgreSQL cannot be started: {begun.stderr.strip()[-200:]}")
        yield f"postgresql://me@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.mark.usefixtures("no_findings")
def test_two_workers_on_postgresql_one_of_them_killed(network, fake, postgres, monkeypatch):
    """They share nothing else, as on two machines."""
    outs = [fake / "first", fake / "second"]
    each_once(two_workers_one_killed(network, outs, ["--storage", postgres], monkeypatch))
    assert not list(fake.glob("*/search/*.db"))


def quiet_study(url: str, name: str = "a") -> tuple:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    storage = studies.open_storage(url)
    return storage, studies.open_study(storage, name, optuna.pruners.NopPruner(), {})


POINTS = [{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in range(15)]
quiet = pytest.mark.filterwarnings("ignore")


@quiet
def test_many_workers_take_each_waiting_trial_once(tmp_path):
    """Without BEGIN IMMEDIATE two take the same one, now and then."""
    url = f"sqlite:///{tmp_path}/a.db"
    storage, study = quiet_study(url)
    for point in POINTS:
        study.enqueue_trial(point)
    storage.engine.dispose()

    def take(number: int) -> None:
        _, study = quiet_study(url)
        taken = []
        while any(t.state.name == "WAITING" for t in study.get_trials(deepcopy=False)):
            taken.append(study.ask().number)
        (tmp_path / f"{number}.txt").write_text("\n".join(map(str, taken)))

    for child in [fork(lambda number=number: take(number)) for number in range(4)]:
        os.waitpid(child, 0)
    taken = [int(n) for path in tmp_path.glob("*.txt") for n in path.read_text().split()]
    assert len(list(tmp_path.glob("*.txt"))) == 4
    assert sorted(taken)[: len(POINTS)] == list(range(len(POINTS)))
    assert len(taken) == len(set(taken))


@quiet
def test_what_waits_for_a_point_that_another_stands_for_is_not_counted(tmp_path):
    """As two workers leave it that fill the queue at the same moment."""
    storage, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    for lr in (0.1, 0.2, 0.1, 0.3, 0.3):
        study.enqueue_trial({"lr": lr})
    for _ in range(2):
        trial = study.ask()
        trial.suggest_float("lr", 0, 1)
        study.tell(trial, 80.0)
    found = studies.counted(study.get_trials())
    assert [(trial.number, trial.state.name) for trial in found] == [
        (0, "COMPLETE"), (1, "COMPLETE"), (3, "WAITING"),
    ]  # fmt: skip
    storage.engine.dispose()


@quiet
def test_of_two_trials_of_a_point_the_first_counts(tmp_path):
    """Two that begin at the same moment may both enqueue the grid."""
    _, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    for point in [*POINTS[:2], *POINTS[:2]]:
        study.enqueue_trial(point)
    parameters = [P("lr", (0.1, 0.2), 0.1, 0.2), P("seed", (), 0, 14)]
    judged = []
    for _ in range(4):
        trial = study.ask()
        for parameter in parameters:
            parameter.suggest(trial)
        judged.append(studies.superfluous(study, trial.number, POINTS, None))
    assert judged == [False, False, True, True]
    study.tell(0, state=optuna.trial.TrialState.FAIL)  # now the second of its point is the first
    assert not studies.superfluous(study, 2, POINTS, None)
    assert studies.superfluous(study, 3, POINTS, None)
    stray = study.ask()
    assert studies.superfluous(study, stray.number, POINTS, None)


@quiet
def test_a_trial_beyond_the_last_is_superfluous(tmp_path):
    _, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    numbers = [study.ask().number for _ in range(4)]
    assert [studies.superfluous(study, n, [], 3) for n in numbers] == [False, False, False, True]
    studies.give_back(study, 0)  # it waits as number 4
    assert not studies.superfluous(study, 3, [], 3)
    assert study.ask().number == 4
    assert studies.superfluous(study, 4, [], 3)


@quiet
def test_what_is_given_back_waits_with_its_folder_once(tmp_path):
    _, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    studies.fill(study, POINTS[:1])
    trial = study.ask()
    trial.suggest_float("lr", 0.1, 0.2)
    trial.set_user_attr("place", "there")
    studies.give_back(study, trial.number)
    studies.give_back(study, trial.number)  # others did so already
    again = study.get_trials()
    assert [each.state.name for each in again] == ["FAIL", "WAITING"]
    assert again[1].user_attrs["place"] == "there"
    assert studies.point(again[1]) == tuple(sorted(POINTS[0].items()))
    studies.fill(study, POINTS[:1])
    assert len(study.get_trials()) == 2


@quiet
def test_what_is_given_back_is_gone_on_with_before_others_begin(tmp_path):
    _, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    taken = []

    def take() -> int:
        studies.fill(study, POINTS[:3])
        trial = study.ask()
        for name in ("lr", "seed"):
            trial.suggest_float(name, 0, 20)
        taken.append(trial.params)
        return trial.number

    studies.give_back(study, take())
    for _ in range(3):
        take()
    first, second, third = ({key: float(n) for key, n in each.items()} for each in POINTS[:3])
    assert taken == [first, first, second, third]
    studies.fill(study, POINTS[:3])
    assert {each.state.name for each in study.get_trials()} == {"FAIL", "RUNNING"}


@quiet
def test_a_worker_that_died_before_its_first_sign_of_life_is_noticed(tmp_path, monkeypatch):
    _, study = quiet_study(f"sqlite:///{tmp_path}/a.db")
    for point in POINTS[:2]:
        study.enqueue_trial(point)
    study.ask()
    alive = study.ask()
    alive.set_user_attr("taken", alive.number)
    studies.revive(study)
    assert [each.state.name for each in study.get_trials()] == ["RUNNING"] * 2
    monkeypatch.setattr(studies, "GRACE", -1)
    studies.revive(study)
    assert [each.state.name for each in study.get_trials()] == ["FAIL", "RUNNING", "WAITING"]


def test_a_training_that_outlived_its_search_is_waited_for(fake, call, monkeypatch):
    """The search was killed, its training was not: nobody trains beside it in its folder."""
    monkeypatch.setenv("FAKE_SECONDS", "1.2")
    monkeypatch.setattr(studies, "GRACE", 1)
    command = ("--grid", "lr=0.1", "--seeds", 1, "--epochs", 4)
    child = fork(lambda: call(*command)[0])
    while not (logs := list(fake.glob("search/*/*/*/log.csv"))):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert call(*command)[0] == 0
    assert starts_of(fake) == [["began"]]
    assert logs[0].with_name("results.json").exists()
    (row,) = table_of(fake)
    assert (row["state"], row["epochs"]) == ("COMPLETE", "4")


# ---------------------------------------------------------------- pictures


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, which `plots.png` hands on instead of PNG."""
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or figure)
    return figures


def tuned(count: int = 12) -> list[SimpleNamespace]:
    """Trials of --tune: every third was pruned after the second of four epochs."""
    found = []
    for number in range(count):
        lr, pruned = 0.001 * 1.5**number, number % 3 == 2
        state, optimizer = "PRUNED" if pruned else "COMPLETE", ("sgd", "muon")[number % 2]
        trial = trial_of(number, accuracy(lr, 0, 4), state, lr=lr, optimizer=optimizer)
        epochs = range(1, 3 if pruned else 5)
        trial.intermediate_values = {epoch: accuracy(lr, 0, epoch) for epoch in epochs}
        found.append(trial)
    return found


SPACE = [P("lr", (), 0.001, 0.2, True), P("optimizer", ("muon", "sgd"))]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_panel_for_each_parameter(drawn):
    findings.parameters_picture(SPACE, tuned())
    left, right = drawn[0].axes[:2]
    assert [axes.get_xlabel() for axes in (left, right)] == ["lr", "optimizer"]
    assert left.get_xscale() == "log"
    ended = [trial for trial in tuned() if trial.state.name == "COMPLETE"]
    points, best, pruned = left.get_lines()
    assert list(points.get_xdata()) == [trial.params["lr"] for trial in ended]
    assert list(points.get_ydata()) == [trial.value for trial in ended]
    top = max(ended, key=lambda trial: trial.value)
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([top.params["lr"]], [top.value])
    wanted = [trial.params["lr"] for trial in tuned() if trial.state.name == "PRUNED"]
    assert list(pruned.get_xdata()) == wanted
    assert [text.get_text() for text in right.get_xticklabels()] == ["muon", "sgd"]
    values = dict(zip(("muon", "sgd"), right.lines[1].get_ydata(), strict=True))
    for name, mean in values.items():
        group = [trial.value for trial in ended if trial.params["optimizer"] == name]
        assert mean == pytest.approx(np.mean(group))
    shown = ["a training", "the best", "pruned (4)", "mean ± deviation"]
    assert sorted(legend_of(drawn[0])) == sorted(shown)


def test_all_epochs_of_all_trials_with_the_pruned_ones_faint(drawn):
    findings.epochs_picture(tuned(), [])
    lines = drawn[0].axes[0].get_lines()
    wanted = sorted(list(trial.intermediate_values.items()) for trial in tuned())
    assert sorted(list(zip(*line.get_data(), strict=True)) for line in lines) == wanted
    for line in lines:
        pruned = len(line.get_xdata()) == 2
        assert (line.get_alpha() == 0.3) == (line.get_color() == "grey") == pruned
    legend = legend_of(drawn[0])
    assert len(legend) == 8 + 1
    best = max((t for t in tuned() if t.number % 3 != 2), key=lambda trial: trial.value)
    assert legend[0] == f"{studies.label(best.params)}: {best.value:.2f}"
    assert legend[-1] == "pruned"


def test_seeds_of_a_setting_share_a_colour(drawn):
    found = [
        trial_of(n, 80.0 + n % 3 + n // 6, lr=(0.1, 0.2)[n // 3], seed=n % 3) for n in range(6)
    ]
    for trial in found:
        trial.intermediate_values = {1: trial.value}
    findings.epochs_picture(found, [{"lr": 0.1}, {"lr": 0.2}])
    colours = [line.get_color() for line in drawn[0].axes[0].get_lines()]
    assert [len(set(colours[:3])), len(set(colours[3:])), len(set(colours))] == [1, 1, 2]
    assert sorted(legend_of(drawn[0])) == ["lr=0.1", "lr=0.2"]


@quiet
def test_importance_is_the_share_of_the_variance_or_a_reason(drawn):
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    study = optuna.create_study(direction="maximize")
    space = [P("lr", (), 0.0, 1.0), P("dropout", (), 0.0, 1.0)]
    assert findings.importance(study, space[:1]) == "it takes two parameters"
    for number in range(40):
        if number == 9:
            wanted = "it takes 10 trials that were trained to the end, there are 9"
            assert findings.importance(study, space) == wanted
        trial = study.ask()
        lr, dropout = (parameter.suggest(trial) for parameter in space)
        study.tell(trial, 80 + 10 * lr + 0.1 * dropout)
    shares = findings.importance(study, space)
    assert shares["lr"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    findings.importance_picture(shares, 40)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dropout", "lr"]
    assert [bar.get_width() for bar in axes.patches] == [
        100 * shares["dropout"],
        100 * shares["lr"],
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: findings.parameters_picture(SPACE, tuned()),
        lambda: findings.parameters_picture(SPACE[:1], tuned(1)),
        lambda: findings.epochs_picture(tuned(), []),
        lambda: findings.epochs_picture(tuned(1), []),
        lambda: findings.importance_picture({"a_long_parameter": 1.0, "b": 0.0}, 10),
    ],
)
def test_nothing_is_clipped(draw):
    pixels = np.asarray(Image.open(io.BytesIO(draw())).convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert min(pixels.shape[:2]) > 150
    assert (edge == 255).all()
