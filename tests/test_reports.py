"""The page of a run and the index of all: read back with Python's parser, and by a browser."""

import base64
import csv
import io
import json
import os
import re
import shutil
import threading
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import plots
import reports
import runs
import train
import utils
from support import figures
from tests import browser
from tests.conftest import PIXEL, SMALL_NETWORK, call_main, run_in
from tools import report

ROOT = Path(__file__).parents[1]
WHOLE = ROOT / "output" / "reference" / "model_2"


class Page(HTMLParser):
    """What lies in a page: elements with attributes and text, in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.source = path.read_bytes().decode()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "img", "wbr"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag) -> None:
        if tag not in ("polyline", "circle"):
            assert self._open[-1][0] == tag, f"<{self._open[-1][0]}> is closed by </{tag}>"
        self._open.pop()

    def handle_data(self, data) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict, str]]:
        """Attributes and text of the elements."""
        return [
            (given, "".join(texts))
            for name, given, texts in self.elements
            if name == tag and wanted.items() <= given.items()
        ]

    def texts(self, tag: str, **wanted: str) -> list[str]:
        return [text.strip() for _, text in self.all(tag, **wanted)]


def tiles(page: Page) -> dict[str, str]:
    """The headline: figure by name, without the remarks behind it."""
    found, name = {}, ""
    for tag, _, texts in page.elements:
        if tag == "dt":
            name = "".join(texts)
        elif tag == "dd":
            found.setdefault(name, "".join(texts).strip())
    return found


def rows_of(page: Page) -> list[dict[str, str]]:
    """The index's rows: what its cells sort by, by the heading."""
    headings = page.texts("th")
    cells = [given.get("data-value", "curve") for given, _ in page.all("td")]
    width = len(headings)
    assert len(cells) % width == 0
    return [
        dict(zip(headings, cells[at : at + width], strict=True))
        for at in range(0, len(cells), width)
    ]


def make(output: Path, name: str, accuracy: float | None = 80.0, **changed: object) -> Path:
    """A small run, finished unless `accuracy` is None."""
    folder = output / name
    folder.mkdir(parents=True)
    settings = {"network": "Net", "parameters": 1000, "epochs": 2, "seed": 0, "recipe": {"lr": 0.1}}
    (folder / "settings.json").write_text(json.dumps(settings | changed))
    history = runs.History("test", 2, 85.0, 60)
    for share in (0.5, 1.0):
        metrics = utils.Metrics(2.0 - share, share * (accuracy or 60))
        history.add(0.1, metrics, metrics, (60.0, 6.0))
    runs.Run(folder).write_csv("log.csv", history.rows)
    if accuracy is not None:
        results = history.results("test", utils.Metrics(1.0, accuracy), completed=True)
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def paged(folder: Path) -> Page:
    (folder / "report.html").write_bytes(reports.page(folder))
    return Page(folder / "report.html")


def indexed(output: Path) -> Page:
    return Page(reports.update_index(output))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The reference run in an output folder of its own, with a page that tools.report made."""
    folder = tmp_path_factory.mktemp("output") / "model_2"
    shutil.copytree(WHOLE, folder, ignore=shutil.ignore_patterns("*.pt", "*.html"))
    assert report.main([str(folder)]) == 0
    return folder


# ---------------------------------------------------------------- a run's page


def test_the_page_tells_the_run_s_figures(whole):
    page, results = Page(whole / "report.html"), json.loads((whole / "results.json").read_text())
    found = tiles(page)
    assert found == {
        "accuracy, test set": "89.98 %",
        "loss": f"{results['final_loss']:.4f}",
        "best test accuracy": "89.98 %",
        "target 85 %": f"epoch {results['target_reached_at']}",
        "train/test gap": "+1.53 points",
        "parameters": "222,058",
        "epochs": "70",
        "time": "1h03m",
        "seed": "0",
        "device": "cpu (AMD EPYC, 1 threads)",
    }
    headings = ["Curves", "Confusion matrix", "Accuracy by class", "Most confident mistakes"]
    headings += ["Augmentations", "Recipe", "Settings", "Layers", "Log"]
    assert page.texts("h2") == headings
    assert page.texts("p", **{"class": "note"}) == []


def test_recipe_settings_command_summary_and_log_are_the_files_(whole):
    page, settings = Page(whole / "report.html"), json.loads((whole / "settings.json").read_text())
    told = dict(zip(page.texts("th"), page.texts("td"), strict=True))
    for key, value in settings["recipe"].items():
        assert told.pop(key) == str(value)
    shown = set(settings) - {"recipe", "mean", "std", "command"}
    assert set(told) == shown
    for key in ("packages", "data_sha256", "train_transform"):
        assert json.loads(told[key].removeprefix("show")) == settings[key]
    assert told["git_commit"] == settings["git_commit"]
    pres = [text for _, text in page.all("pre")]
    assert pres[0] == settings["command"]
    assert pres[-2:] == [(whole / name).read_text() for name in ("summary.txt", "train.log")]
    folded = [text for given, text in page.all("details") if "Epoch [70/70]" in text]
    assert len(folded) == 1
    assert "open" not in page.all("details")[-1][0]


def test_every_picture_lies_in_the_page_and_is_told_in_words(whole):
    page = Page(whole / "report.html")
    names = ["curves", "confusion_matrix", "class_accuracy", "misclassified", "augmentations"]
    images = [given for given, _ in page.all("img")]
    for name, given in zip(names, images, strict=True):
        kind, _, data = given["src"].partition(",")
        assert kind == "data:image/png;base64"
        content = (whole / f"{name}.png").read_bytes()
        assert base64.b64decode(data, validate=True) == content
        size = int(given["width"]), int(given["height"])
        assert size == Image.open(io.BytesIO(content)).size
        assert len(given["alt"]) > 20
    with open(whole / "log.csv", newline="") as file:
        found = [float(row["test_acc"]) for row in csv.DictReader(file)]
    text = images[0]["alt"]
    for figure in (found[0], found[-1], max(found)):
        assert f"{figure:.2f} %" in text
    assert "reached at epoch 49" in text
    assert page.texts("figcaption") == [given["alt"] for given in images]


def test_a_page_loads_nothing(whole):
    for page in (Page(whole / "report.html"), indexed(whole.parent)):
        for _, given, _ in page.elements:
            for key in ("src", "href", "data", "action", "srcset", "poster", "xlink:href"):
                target = given.get(key, "data:")
                assert target.startswith("data:") or target == "model_2/report.html"
        (style,) = (text for _, text in page.all("style"))
        assert not re.search(r"https?:|url\(|@import|@font-face", style)
        policy = next(given["content"] for given, _ in page.all("meta") if "http-equiv" in given)
        assert policy.startswith("default-src 'none'; img-src data:;")
        drawn = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.source)
        assert not re.search(r"https?:|//\w+\.", drawn)


EVIL = "<script>alert(1)</script>&amp;\"'{{ 1 + 1 }}\n</pre></table>--><!--"


def test_names_and_texts_stay_texts(tmp_path):
    name = "a<b>&\"c' d#?%_\udcffx"
    try:
        folder = make(tmp_path, name, network=EVIL, command=EVIL, device=EVIL, recipe={EVIL: EVIL})
    except OSError:
        pytest.skip("a file system that takes no such names")
    for file in ("train.log", "summary.txt"):
        (folder / file).write_bytes(EVIL.encode() + b"\xff\x00")
    said = PngInfo()
    said.add_itxt("Title", EVIL)
    said.add_itxt("Description", EVIL)
    Image.new("RGB", (2, 2)).save(folder / "z.png", pnginfo=said)
    page, shown = paged(folder), indexed(tmp_path)
    assert page.all("script") == []
    assert len(shown.all("script")) == 1
    assert page.texts("h1") == [EVIL]
    assert tiles(page)["device"] == EVIL
    assert page.all("img")[0][0]["alt"] == EVIL
    assert page.texts("h2")[0] == EVIL
    pres = [text for _, text in page.all("pre")]
    assert pres[0] == EVIL
    assert [text.startswith(EVIL) for text in pres[-2:]] == [True, True]
    recipe = dict(zip(page.texts("th"), page.texts("td"), strict=True))
    assert recipe[EVIL] == EVIL
    (row,) = rows_of(shown)
    assert row["run"] == name.replace("\udcff", "?")
    assert (row["network"], row["device"]) == (EVIL, EVIL)
    ((link, text),) = shown.all("a")
    assert text == row["run"]
    assert (tmp_path / unquote(link["href"], errors="surrogateescape")).is_file()
    assert ":" not in link["href"]


def test_further_pictures_are_shown_behind_with_what_they_say_of_themselves(tmp_path):
    folder = make(tmp_path, "run")
    for name, title in (("curves", "No"), ("zeta", "A heading"), ("alpha", None)):
        said = PngInfo()
        said.add_text("Description", f"This is {name}.")
        if title:
            said.add_text("Title", title)
        Image.new("RGB", (3, 2)).save(folder / f"{name}.png", pnginfo=said)
    (folder / "cut.png").write_bytes(PIXEL[:40])
    for name, part, before in (("header", b"IHDR", -8), ("length", b"IDAT", 1)):
        flipped = bytearray((WHOLE / "curves.png").read_bytes())
        flipped[flipped.index(part) - before] ^= 1
        (folder / f"{name}.png").write_bytes(flipped)
    header = b"IHDR" + (1 << 30).to_bytes(4) * 2 + b"\x08\x02\0\0\0"
    large = PIXEL[:12] + header + zlib.crc32(header).to_bytes(4) + PIXEL[33:]
    (folder / "large.png").write_bytes(large)
    profile = b"iCCPa\0"  # nothing behind its name, and that behind the pixels
    chunk = (2).to_bytes(4) + profile + zlib.crc32(profile).to_bytes(4)
    (folder / "profile.png").write_bytes(PIXEL[:-12] + chunk + PIXEL[-12:])
    (folder / "confusion_matrix.png").mkdir()
    page = paged(folder)
    assert page.texts("h2")[:3] == ["Curves", "alpha", "A heading"]
    told = [given["alt"] for given, _ in page.all("img")]
    assert told == ["This is curves.", "This is alpha.", "This is zeta."]


def test_a_run_without_pictures_or_results_has_a_page(tmp_path):
    folder = make(tmp_path, "run", None, epochs=5, model_file="/elsewhere/my net.py")
    page = paged(folder)
    assert tiles(page) == {
        "accuracy, test set": "60.00 %",
        "best test accuracy": "60.00 %",
        "parameters": "1,000",
        "epochs": "2",
        "seed": "0",
    }
    (note,) = page.texts("p", **{"class": "note"})
    command = f"python train.py --resume {folder} --model '/elsewhere/my net.py'"
    assert note.startswith("Unfinished: ")
    assert note.endswith(command)
    assert "This run keeps no pictures." in page.texts("p")
    assert "Log" not in page.texts("h2")
    (folder / "log.csv").unlink()
    assert tiles(paged(folder))["epochs"] == "0"


def test_results_as_they_are_now_count_not_those_of_an_earlier_page(tmp_path):
    folder = make(tmp_path, "run", 80.0)
    paged(folder)
    now = json.loads((folder / "results.json").read_text()) | {"final_accuracy": 81.0}
    (folder / "results.json").write_text(json.dumps(now))
    assert tiles(paged(folder))["accuracy, test set"] == "81.00 %"


@pytest.mark.parametrize(
    ("given", "settings", "command"),
    [
        ("python train.py --model 2 --epochs 3", {}, "python train.py --model 2 --epochs 3"),
        ("python train.py --mod=2 --ep 3", {}, "python train.py --mod=2 --ep 3"),
        ("python train.py", {}, "python train.py --model model_2.py --epochs 7"),
        (
            "python train.py --dry-run",
            {"model_file": "/x/a b.py"},
            "python train.py --dry-run --model '/x/a b.py' --epochs 7",
        ),
        (
            "python3 train.py --model 2 --epochs 3",
            {"processes": 2},
            "torchrun --standalone --nproc-per-node 2 train.py --model 2 --epochs 3",
        ),
        ("python 'train.py", {}, "python 'train.py"),
        ("", {}, None),
        (None, {}, None),
    ],
)
def test_the_command_repeats_what_was_answered(given, settings, command):
    known = {"command": given, "epochs": 7, "model_file": "model_2.py"}
    assert figures.command(known | settings) == command


# ---------------------------------------------------------------- of a training


@pytest.fixture
def small(tmp_path, no_pictures) -> list[object]:
    """The flags of a dry run of two epochs."""
    (tmp_path / "small.py").write_text(SMALL_NETWORK)
    flags = ["--dry-run", "--model", tmp_path / "small.py", "--epochs", 2]
    return [*flags, "--output-dir", tmp_path / "out"]


def test_a_training_ends_with_its_page_and_the_index(small, capsys, tmp_path):
    damaged = tmp_path / "out" / "20200101-000000-damaged"
    damaged.mkdir(parents=True)
    (damaged / "settings.json").write_text("[")
    status, out, error = call_main(train.main, capsys, small)
    assert (status, error) == (0, "")
    (folder,) = (tmp_path / "out").glob("*-small")
    assert out.splitlines()[-1] == f"Page: {folder / 'report.html'}"
    page, results = Page(folder / "report.html"), json.loads((folder / "results.json").read_text())
    shown = tiles(page)
    assert shown["accuracy, test set"] == f"{results['final_accuracy']:.2f} %"
    assert shown["loss"] == f"{results['final_loss']:.4f}"
    assert len(page.all("img")) == 5
    log = (folder / "train.log").read_text()
    assert log == page.all("pre")[-1][1] + f"Page: {folder / 'report.html'}\n"
    (note,) = page.texts("p", **{"class": "note"})
    assert note.startswith("A dry run")
    new, old = rows_of(Page(tmp_path / "out" / "index.html"))
    assert (new["run"], new["state"]) == (folder.name, "finished, dry run")
    assert float(new["accuracy (%)"]) == results["final_accuracy"]
    assert old["run"] == damaged.name
    assert old["state"].startswith("settings.json cannot be read")


def test_an_interrupted_run_has_its_page_and_a_new_one_when_it_went_on(
    small, capsys, tmp_path, monkeypatch
):
    real, calls = utils.train, []

    def stopped(*arguments: object) -> utils.Metrics:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(utils, "train", stopped)
    assert call_main(train.main, capsys, small)[0] == 130
    folder = run_in(tmp_path / "out")
    page = Page(folder / "report.html")
    resume = f"python train.py --resume {folder} --model {tmp_path / 'small.py'}"
    note = page.texts("p", **{"class": "note"})[0]
    assert note.startswith("Interrupted: ")
    assert note.endswith(resume)
    assert "Stopped in epoch 2" in page.all("pre")[-1][1]
    assert tiles(page)["epochs"] == "1"
    assert rows_of(Page(tmp_path / "out" / "index.html"))[0]["state"] == "interrupted, dry run"
    arguments = ["--resume", folder, "--model", tmp_path / "small.py"]
    assert call_main(train.main, capsys, arguments)[0] == 0
    page = Page(folder / "report.html")
    assert not page.texts("p", **{"class": "note"})[0].startswith("Interrupted")
    assert tiles(page)["epochs"] == "2"
    assert rows_of(Page(tmp_path / "out" / "index.html"))[0]["state"] == "finished, dry run"


@pytest.mark.parametrize("name", ["page", "index"])
@pytest.mark.parametrize("error", [OSError(28, "No space left\non device"), ZeroDivisionError()])
def test_a_page_that_fails_costs_a_line_and_no_run(
    name, error, small, capsys, tmp_path, monkeypatch
):
    def fails(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(reports, name, fails)
    status, out, said = call_main(train.main, capsys, small)
    assert (status, said) == (0, "")
    folder = run_in(tmp_path / "out")
    assert runs.is_finished(folder)
    file = {"page": "report.html", "index": "index.html"}[name]
    reason = "[Errno 28] No space left" if error.args else "ZeroDivisionError"
    line = f"No {file}: {reason}; for one later: python -m tools.report {folder}"
    assert out.splitlines()[-1] == line
    assert (folder / "report.html").exists() == (name == "index")
    assert (tmp_path / "out" / "index.html").exists() == (name == "page")


def test_even_where_the_log_takes_no_line_more(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path, "run")
    run = runs.Run(folder)
    (folder / "train.log").mkdir()
    with run:
        reports.write_page(run)
        reports.write_index(run)
    assert "No report.html: [Errno 21]" in capsys.readouterr().out
    assert (tmp_path / "index.html").is_file()


def test_processes_beside_the_first_write_nothing(tmp_path):
    run = runs.Run(make(tmp_path, "run"), writes=False)
    before = sorted(tmp_path.rglob("*"))
    reports.write_page(run)
    reports.write_index(run)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the index


def test_the_index_has_the_newest_first_with_its_figures_and_links(tmp_path):
    make(tmp_path, "20260101-000000-b", 90.0, epochs=4, seed=3, device="cpu")
    paged(make(tmp_path, "20270101-000000-a", 70.0, recipe_name="published"))
    make(tmp_path, "20250101-000000-c", None)
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "a file").write_text("")
    page = indexed(tmp_path)
    rows = rows_of(page)
    assert [row["run"] for row in rows] == [
        "20270101-000000-a", "20260101-000000-b", "20250101-000000-c",
    ]  # fmt: skip
    assert rows[1] == {
        "run": "20260101-000000-b", "accuracy (%)": "90.0", "curve": "curve", "network": "Net",
        "set": "test", "best (%)": "90.0", "epochs": "2", "target at epoch": "2",
        "parameters": "1000", "minutes": "2.2", "seed": "3", "recipe": "", "state": "finished",
        "device": "cpu",
    }  # fmt: skip
    assert rows[0]["target at epoch"] == ""
    assert (rows[2]["state"], rows[2]["accuracy (%)"], rows[2]["minutes"]) == (
        "unfinished",
        "60.0",
        "",
    )
    assert [given["href"] for given, _ in page.all("a")] == ["20270101-000000-a/report.html"]
    curves = [given["points"].split() for given, _ in page.all("polyline")]
    places = [[tuple(map(float, point.split(","))) for point in points] for points in curves]
    # All to one scale (30 to 90 %, y downwards); b ends at the second of its four epochs.
    right, bottom = (length - 4 for length in reports.SPARK)
    for points, values in zip(places, ((35, 70), (45, 90), (30, 60)), strict=True):
        wanted = [bottom - (bottom - 4) * (value - 30) / 60 for value in values]
        assert [y for _, y in points] == pytest.approx(wanted, abs=0.06)
    ends = [points[-1][0] for points in places]
    assert ends == pytest.approx([right, 4 + (right - 4) / 3, right], abs=0.06)
    assert [given["aria-label"] for given, _ in page.all("svg")][1].endswith("from 45.0 to 90.0 %")


def test_an_empty_folder_has_an_index(tmp_path):
    page = indexed(tmp_path)
    assert page.texts("h1") == ["0 runs"]
    make(tmp_path, "a")
    assert indexed(tmp_path).texts("h1") == ["1 run"]
    assert page.all("table") == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("settings.json", "{", "settings.json cannot be read"),
        ("settings.json", '{"epochs": "7"}', "settings.json is damaged: epochs is '7'"),
        ("settings.json", '{"seed": NaN}', "settings.json is damaged: seed is nan"),
        ("settings.json", '{"command": 5}', "settings.json is damaged: command is 5"),
        ("results.json", "", "results.json cannot be read"),
        ("results.json", '{"final_accuracy": "high"}', "results.json is damaged: final_accuracy"),
        ("results.json", '{"total_seconds": Infinity}', "results.json is damaged: total_seconds"),
    ],
)
def test_a_damaged_neighbour_is_shown_as_such(name, content, said, tmp_path):
    make(tmp_path, "1-good")
    (make(tmp_path, "2-bad") / name).write_text(content)
    bad, good = rows_of(indexed(tmp_path))
    assert bad["state"].startswith(said)
    assert (bad["run"], bad["accuracy (%)"], good["state"]) == ("2-bad", "", "finished")
    with pytest.raises(figures.stored.UsageError, match=re.escape(said)):
        reports.page(tmp_path / "2-bad")


@pytest.mark.parametrize(
    "content",
    [b"", b"epoch,test_acc\n", b"epoch,test_acc\n1,50\n", b"\xff\x00\n1\n", b'"' + b"x" * 200_000,
     b"epoch,train_acc,train_loss,test_acc,test_loss\n1,2,3,nan,5\n",
     b"epoch,train_acc,train_loss,test_acc,test_loss\n1,2,3,4,5\n2,3\n"],
)  # fmt: skip
def test_a_damaged_table_leaves_the_curve_out(content, tmp_path):
    folder = make(tmp_path, "run")
    (folder / "log.csv").write_bytes(content)
    page = indexed(tmp_path)
    assert page.all("polyline") == []
    assert rows_of(page)[0]["accuracy (%)"] == "80.0"
    paged(folder)


def test_of_two_runs_that_end_at_once_the_index_has_both(tmp_path, monkeypatch):
    real, began, goes_on = reports.index, threading.Event(), threading.Event()

    def slow(folder: Path) -> bytes:
        content = real(folder)
        if not began.is_set():
            began.set()
            goes_on.wait(30)
        return content

    monkeypatch.setattr(reports, "index", slow)
    make(tmp_path, "first")
    first = threading.Thread(target=reports.update_index, args=[tmp_path])
    first.start()
    assert began.wait(30)
    make(tmp_path, "second")
    second = threading.Thread(target=reports.update_index, args=[tmp_path])
    second.start()
    second.join(0.3)  # it would be through, were there nothing to wait for
    goes_on.set()
    first.join()
    second.join()
    found = rows_of(Page(tmp_path / "index.html"))
    assert {row["run"] for row in found} == {"first", "second"}


# ---------------------------------------------------------------- tools.report


def test_the_tool_makes_the_pages_of_all_runs_of_a_folder(tmp_path, capsys, monkeypatch):
    for name in "ab":
        make(tmp_path / "output", name)
    monkeypatch.chdir(tmp_path)
    status, out, error = call_main(report.main, capsys, [])
    assert (status, error) == (0, "")
    pages = [f"output/{name}/report.html" for name in "ab"]
    assert out.splitlines() == [*pages, str(tmp_path / "output" / "index.html")]
    assert [given["href"] for given, _ in Page(Path("output/index.html")).all("a")] == [
        "b/report.html", "a/report.html",
    ]  # fmt: skip


def test_the_tool_tells_of_what_is_no_run_and_makes_the_others(tmp_path, capsys):
    good, bad = make(tmp_path, "good"), make(tmp_path, "bad")
    (bad / "settings.json").write_text("{")
    (tmp_path / "empty").mkdir()
    paths = [bad, tmp_path / "empty", tmp_path / "gone", good]
    status, _, error = call_main(report.main, capsys, paths)
    assert status == 2
    assert error.startswith(f"tools.report: error: {tmp_path / 'empty'} holds no run")
    assert f"{tmp_path / 'gone'} holds no run" in error
    assert f"{bad / 'settings.json'} cannot be read" in error
    assert error.count("\n") == 1
    assert (good / "report.html").is_file()
    assert not (bad / "report.html").exists()
    assert len(rows_of(Page(tmp_path / "index.html"))) == 2


# ---------------------------------------------------------------- what pictures say


def test_a_picture_carries_what_it_says():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.set_label("Zwölf % < 13")
    image = Image.open(io.BytesIO(plots.png(figure)))
    assert image.info["Description"] == "Zwölf % < 13"
    assert "Description" not in Image.open(io.BytesIO(plots.png(Figure(figsize=(1, 1))))).info


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.PROGRAM is None:
        pytest.skip("there is no Chromium here (Debian's package: chromium)")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
        assert opened.problems == []  # on the console


CONTRAST = """(() => {
  const part = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  let least = 99, size = 99;
  for (const element of document.querySelectorAll("main *")) {
    if (!element.closest("svg") && [...element.childNodes].some(
        (node) => node.nodeType === 3 && node.data.trim())) {
      const style = getComputedStyle(element);
      const both = [light(rgb(style.color)), light(ground(element))].sort((a, b) => a - b);
      least = Math.min(least, (both[1] + 0.05) / (both[0] + 0.05));
      size = Math.min(size, parseFloat(style.fontSize));
    }
  }
  const page = document.documentElement;
  return [least, size, page.scrollWidth - page.clientWidth, light(ground(document.body))];
})()"""


@pytest.mark.parametrize("night", [False, True])
@pytest.mark.parametrize("width", [360, 1400])
def test_pages_fit_a_phone_and_a_wide_screen_by_day_and_by_night(chromium, whole, width, night):
    """Contrast by WCAG 2.2, of at least 4.5; no text below 12 pixels; no scrolling sideways."""
    reports.update_index(whole.parent)
    for path in (whole / "report.html", whole.parent / "index.html"):
        assert chromium.open(path, width, night) == [path.as_uri()]  # nothing else was asked for
        contrast, size, over, light = chromium.ask(CONTRAST)
        assert contrast >= 4.5
        assert size >= 12
        assert over == 0
        assert (light < 0.1) == night
        assert chromium.ask("[...document.images].every((image) => image.naturalWidth > 600)")


def shown(chromium: browser.Browser) -> list[str]:
    return chromium.ask("[...document.querySelectorAll('.name')].map((cell) => cell.innerText)")


def click(chromium: browser.Browser, heading: str) -> str:
    """A click where the heading's words are seen; returns what it now says of the order."""
    found = f"[...document.querySelectorAll('th')].find((th) => th.innerText === '{heading}')"
    chromium.ask(f"{found}.scrollIntoView({{inline: 'center'}})")
    spot = "(({x, y, width, height}) => [x + width / 4, y + height / 2])"
    place = chromium.ask(f"{spot}({found}.firstChild.getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        chromium.call("Input.dispatchMouseEvent", type=kind, **where)
    return chromium.ask(f"{found}.ariaSort")


@pytest.mark.parametrize("width", [360, 1400])
def test_a_click_on_a_heading_sorts(chromium, tmp_path, width):
    for name, accuracy, seed, network in (
        ("4-a", 88.25, 7, "b"), ("3-b", 88.5, 30, "C"), ("2-c", 100.0, 200, "a"),
        ("1-d", 70.0, 1, "d"),
    ):  # fmt: skip
        folder = make(tmp_path, name, accuracy, seed=seed, network=network)
    (folder / "results.json").unlink()
    (folder / "log.csv").unlink()  # of 1-d no accuracy is known
    (make(tmp_path, "0-e") / "settings.json").write_text("{")
    path = reports.update_index(tmp_path)
    chromium.open(path, width)
    assert shown(chromium) == ["4-a", "3-b", "2-c", "1-d", "0-e"]
    assert click(chromium, "accuracy (%)") == "descending"
    assert shown(chromium) == ["2-c", "3-b", "4-a", "1-d", "0-e"]
    assert click(chromium, "accuracy (%)") == "ascending"
    assert shown(chromium) == ["4-a", "3-b", "2-c", "1-d", "0-e"]
    assert click(chromium, "seed") == "descending"
    assert shown(chromium) == ["2-c", "3-b", "4-a", "1-d", "0-e"]
    assert click(chromium, "network") == "ascending"
    assert shown(chromium) == ["2-c", "4-a", "3-b", "1-d", "0-e"]
    sorted_by = chromium.ask(
        "[...document.querySelectorAll('th')].filter((th) => !['none', null].includes(th.ariaSort))"
        ".map((th) => th.innerText)"
    )
    assert sorted_by == ["network"]
    assert click(chromium, "run") == "ascending"
    assert shown(chromium) == ["0-e", "1-d", "2-c", "3-b", "4-a"]


def test_the_table_is_there_without_scripts(chromium, tmp_path):
    make(tmp_path, "1-a")
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(reports.update_index(tmp_path))
        assert chromium.call("DOM.getDocument")
        found = chromium.call("DOMSnapshot.captureSnapshot", computedStyles=[])["strings"]
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    assert {"1-a", "80.00", "accuracy (%)"} <= set(found)
    assert "BUTTON" not in found


@pytest.mark.parametrize("name", ["log.csv", "curves.png", "train.log", "summary.txt"])
def test_a_pipe_among_a_run_s_files_is_not_waited_for(name, tmp_path):
    run = tmp_path / "20260101-000000-x"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    (run / "results.json").write_text("{}")
    os.mkfifo(run / name)
    assert b"20260101-000000-x" in reports.page(run)
    assert b"20260101-000000-x" in reports.index(tmp_path)


def test_the_end_of_a_long_log_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "LONGEST", 8)
    (tmp_path / "train.log").write_text("first\0\nla\0st\n")
    assert reports._text(tmp_path / "train.log") == "\nlast\n"
