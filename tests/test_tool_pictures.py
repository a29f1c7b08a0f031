"""The pictures of the tools, caught as figures before they become PNG: what they say is so."""

import io
from collections import Counter

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

import plots
import utils
from cifar10 import CLASSES
from tests.conftest import call_main
from tools import bench, compare, demo_transforms, evaluate, explore, find_lr, minutes


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, which `plots.png` hands on instead of PNG, in the order they were drawn."""
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or figure)
    return figures


def colour(artist) -> str:
    """Of a line, a bar or a legend's handle."""
    shown = artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()
    return colors.to_hex(shown)


def legend_of(owner) -> dict[str, str]:
    """Colour by label, of the one legend of a figure or of axes."""
    legend = owner.legends[0] if hasattr(owner, "legends") else owner.get_legend()
    texts = (text.get_text() for text in legend.get_texts())
    return {text: colour(handle) for text, handle in zip(texts, legend.legend_handles, strict=True)}


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (*map(list, line.get_data()),) for line in axes.get_lines()}


def images_of(figure: Figure) -> list[np.ndarray]:
    """The pictures in it, panel after panel."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def titles_of(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def ticks(labels) -> list[str]:
    return [label.get_text() for label in labels]


# ---------------------------------------------------------------- evaluate

TRUE = np.array([0, 0, 1, 2, 3, 3, 4, 5])
FOUND = [0, 1, 1, 0, 3, 5, 3, 5]
SURE = [0.5, 0.9, 0.71, 0.65, 0.86, 0.79, 0.99, 0.41]
ANSWERS = np.full((8, 10), (1 - np.array(SURE)[:, None]) / 9)
ANSWERS[range(8), FOUND] = SURE
ANSWERS = np.log(ANSWERS).astype(np.float32)


@pytest.fixture(scope="module")
def evaluation(sample) -> dict[str, Figure]:
    results = evaluate.figures(ANSWERS, TRUE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: figure)
        return evaluate.draw("Net, test set", sample.test_images[:8], TRUE, ANSWERS, results)


def test_evaluation_s_confusion_has_true_classes_as_rows(evaluation):
    axes, _ = evaluation["confusion_matrix.png"].axes
    assert axes.get_title() == "Net, test set: 50.00 % correct"
    found = {text.get_position(): text.get_text() for text in axes.texts if text.get_text() != "0"}
    assert found == {(column, row): "1" for row, column in zip(TRUE, FOUND, strict=True)}


def test_evaluation_s_bars_are_each_class_s_precision_recall_and_f1(evaluation):
    figure = evaluation["class_metrics.png"]
    (axes,) = figure.axes
    heights = {colour(bars[0]): [bar.get_height() for bar in bars] for bars in axes.containers}
    shown = {name: heights[hue] for name, hue in legend_of(figure).items()}
    precision = [50, 50, 0, 50, 0, 50]  # of what was said to be of the class
    recall = [50, 100, 0, 50, 0, 100]  # of what is
    f1 = [2 * p * r / max(p + r, 1) for p, r in zip(precision, recall, strict=True)]
    assert list(shown) == ["precision", "recall", "f1-score"]
    for values, wanted in zip(shown.values(), (precision, recall, f1), strict=True):
        assert values == pytest.approx([*wanted, 0, 0, 0, 0])
    counts = np.bincount(TRUE, minlength=10)
    wanted = [f"{name}\n({count})" for name, count in zip(CLASSES, counts, strict=True)]
    assert ticks(axes.get_xticklabels()) == wanted
    assert (axes.get_ylabel(), axes.get_title()) == ("%", "Net, test set (in brackets: images)")
    for bars in axes.containers:  # each over its class
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        assert np.abs(np.subtract(middles, axes.get_xticks())).max() < 0.5


def test_evaluation_s_calibration_says_which_line_is_which(evaluation):
    figure = evaluation["calibration.png"]
    top, bottom = figure.axes
    # Each answer is alone in its bin, which misses by 1 - sure or, of a mistake, by sure.
    error = np.mean([abs((t == f) - s) for t, f, s in zip(TRUE, FOUND, SURE, strict=True)])
    title, share = figure.get_suptitle().split(" error ")
    assert title == "Net, test set\nExpected calibration"
    assert float(share.removesuffix("%")) == pytest.approx(100 * error, abs=0.006)
    lines = lines_of(top)
    assert lines["as right as it is sure"] == ([0, 1], [0, 100])
    order = np.argsort(SURE)
    sure, right = lines["mean of a bin"]
    assert sure == pytest.approx(np.array(SURE)[order])
    assert right == pytest.approx(100 * (np.array(FOUND) == TRUE)[order])
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("accuracy (%)", "images (%)")
    assert bottom.get_xlabel() == "confidence"
    assert {line.get_label(): colour(line) for line in top.get_lines()} == legend_of(top)


@pytest.mark.parametrize(("name", "order"), [("mistakes", [6, 1, 5, 3]), ("correct", [4, 2, 0, 7])])
def test_evaluation_s_surest_answers_come_first(name, order, evaluation, sample):
    figure = evaluation[f"most_confident_{name}.png"]
    assert figure.get_suptitle() == f"Net, test set: the most confident of 4 {name}"
    assert titles_of(figure) == [
        f"true: {CLASSES[TRUE[i]]}\npredicted: {CLASSES[FOUND[i]]} ({SURE[i]:.1%})" for i in order
    ]
    for image, index in zip(images_of(figure), order, strict=True):
        assert np.array_equal(image, sample.test_images[index])
    assert figure.get_label().startswith(
        f"{name.capitalize()}, surest first: 4 images; {CLASSES[TRUE[order[0]]]}"
    )
    assert ("taken for" in figure.get_label()) == (name == "mistakes")


# ---------------------------------------------------------------- explore


@pytest.fixture
def uneven(sample):
    """Images of which every class has another number, and the test images are darker."""
    kept = np.concatenate(
        [np.flatnonzero(sample.train_labels == k)[: 10 + 3 * k] for k in range(10)]
    )
    part = np.concatenate([np.flatnonzero(sample.test_labels == k)[: 1 + k] for k in range(10)])
    return sample._replace(
        train_images=sample.train_images[kept], train_labels=sample.train_labels[kept],
        test_images=sample.test_images[part] // 2, test_labels=sample.test_labels[part],
    )  # fmt: skip


PAIRS = explore.Pairs(np.array([3, 0, 40]), np.array([7, 5, 100]), np.array([0.999, 0.97, 0.951]))


def test_exploration_s_bars_are_the_counts_of_each_split(uneven, drawn):
    figure = explore.draw_counts(uneven)
    (axes,) = figure.axes
    assert ticks(axes.get_xticklabels()) == list(CLASSES)
    assert list(axes.get_xticks()) == list(range(10))
    assert axes.get_ylabel() == "images"
    found = {}
    for bars in axes.containers:
        middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        found[colour(bars[0])] = dict(
            zip(np.round(middles).astype(int).tolist(), (b.get_height() for b in bars), strict=True)
        )
    legend = legend_of(figure)
    assert list(legend) == ["train, 235 images", "test, 55 images"]
    splits = (uneven.train_labels, uneven.test_labels)
    for (label, hue), labels in zip(legend.items(), splits, strict=True):
        assert found[hue] == Counter(labels.tolist()), label


def channel_stats(images: np.ndarray) -> list[tuple[float, float]]:
    return [(channel.mean() / 255, channel.std() / 255) for channel in images.reshape(-1, 3).T]


def test_exploration_s_colours_are_the_training_images(uneven, drawn):
    panels = explore.draw_histograms(uneven.train_images).axes
    report = explore.report(uneven, PAIRS)
    stats = channel_stats(uneven.train_images)
    assert np.abs(np.subtract(stats, channel_stats(uneven.test_images))).min() > 0.01
    for number, (axes, name, (mean, std)) in enumerate(
        zip(panels, ("red", "green", "blue"), stats, strict=True)
    ):
        assert f"| {name} | {mean:.4f} | {std:.4f} |" in report
        assert (axes.get_title(), axes.get_xlabel()) == (name, "grey level")
        *bars, span = axes.patches
        assert {colour(bar) for bar in bars} == {colors.to_hex(f"tab:{name}")}
        wanted, _ = np.histogram(uneven.train_images[..., number], np.arange(257), density=True)
        assert [bar.get_height() for bar in bars] == pytest.approx(100 * wanted)
        assert lines_of(axes)[f"mean {mean:.4f}"][0] == pytest.approx([255 * mean] * 2)
        assert span.get_label() == f"± std {std:.4f}"
        ends = (span.get_x(), span.get_x() + span.get_width())
        assert ends == pytest.approx((255 * (mean - std), 255 * (mean + std)))
    assert panels[0].get_ylabel() == "share of the pixels (%)"


def test_exploration_s_report_counts_each_split(uneven):
    report = explore.report(uneven, PAIRS)
    for label, name in enumerate(CLASSES):
        assert f"| {name} | {10 + 3 * label} | {1 + label} |" in report
    assert "235 training and 55 test images" in report
    other = sum(uneven.test_labels[PAIRS.test] != uneven.train_labels[PAIRS.train])
    assert 0 < other < 3
    assert f"- 3 ({3 / 55:.2%}) have a training image" in report
    assert f"at half size; {other} of these pairs have different labels" in report


def test_exploration_s_pictures_stand_at_the_name_of_their_class(uneven, drawn, monkeypatch):
    for name in ("draw_counts", "draw_histograms"):  # see above
        monkeypatch.setattr(explore, name, lambda _: None)
    figures = explore.pictures(uneven, PAIRS)
    assert set(figures) == {
        f"{name}.png"
        for name in ("class_counts", "samples", "histograms", "mean_images", "near_duplicates")
    }
    images, labels = uneven.train_images, uneven.train_labels
    grid = np.array(figures["samples.png"].axes).reshape(10, 8)
    for label, row in enumerate(grid):
        assert row[0].get_ylabel() == CLASSES[label]
        known = {image.tobytes() for image in images[labels == label]}
        shown = {axes.get_images()[0].get_array().tobytes() for axes in row}
        assert shown <= known
        assert len(shown) == 8
    means = figures["mean_images.png"]
    assert titles_of(means) == list(CLASSES)
    for label, image in enumerate(images_of(means)):
        wanted = images[labels == label].astype(float).mean(axis=0)
        assert np.abs(image - wanted).max() <= 0.5


def test_exploration_s_pairs_have_the_test_image_first(uneven, drawn):
    figure = explore.draw_pairs(uneven, PAIRS)
    assert figure.get_suptitle() == "Test image | training image: 3 pairs"
    shown = zip(images_of(figure), titles_of(figure), *PAIRS, strict=True)
    for image, title, test, train, similarity in shown:
        one, other = uneven.test_labels[test], uneven.train_labels[train]
        assert title == f"{CLASSES[one]} | {CLASSES[other]}  {similarity:.3f}"
        assert np.array_equal(image[:, :32], uneven.test_images[test])
        assert np.array_equal(image[:, -32:], uneven.train_images[train])
        assert (image[:, 32:-32] == 255).all()
    similarity = np.linspace(1, 0.95, 50)
    many = explore.Pairs(np.arange(50), np.arange(50, 100), similarity)
    figure = explore.draw_pairs(uneven, many)
    assert figure.get_suptitle().endswith("50 pairs, the 12 most and the 12 least alike of them")
    wanted = [*similarity[:12], *similarity[-12:]]
    assert [title.split()[-1] for title in titles_of(figure)] == [f"{s:.3f}" for s in wanted]


# ---------------------------------------------------------------- demo_transforms


def test_demonstration_s_rows_are_what_their_names_say(sample, drawn):
    stats = utils.channel_stats(sample.train_images)
    image = sample.train_images[4]
    figure = demo_transforms.sheet(utils.train_transform(*stats), image, *stats)
    rows = np.array(figure.axes).reshape(-1, demo_transforms.DRAWS)
    names = [row[0].get_ylabel() for row in rows]
    assert names == ["raw", "HorizontalFlip", "Affine", "CoarseDropout", "all together"]
    raw, flip, affine, hole, together = (
        [np.asarray(axes.get_images()[0].get_array()) for axes in row] for row in rows
    )
    assert all(np.array_equal(each, image) for each in raw)
    assert all(np.array_equal(each, image[:, ::-1]) for each in flip)
    assert all(200 < (each != image).any(axis=2).sum() <= 256 for each in hole)
    assert all((each != image).mean() > 0.5 for each in affine)
    assert len({each.tobytes() for each in affine}) == len(affine)
    # Each step as often as not: among the draws are some with a step more than others.
    assert len({each.tobytes() for each in together}) > 4
    assert min((each != image[:, ::way]).mean() for each in together for way in (1, -1)) < 0.3
    numbers = (" ".join(f"{value:.4f}" for value in values) for values in stats)
    assert figure.get_suptitle().endswith("\nmean {}, std {}".format(*numbers))


# ---------------------------------------------------------------- compare


def test_comparison_s_points_names_and_front(drawn):
    def row(network: str, source: str, parameters: int, final: float, std: float | None = None):
        return {
            "network": network, "source": source, "parameters": parameters, "final": final,
            "final_std": std, "changes": "", "epochs": 20,
        }  # fmt: skip

    rows = [
        row("A", "published", 50_000, 80.0),
        row("B", "published", 900_000, 90.0),
        row("C", "a run", 200_000, 85.0, 0.5),
        row("D", "a run", 300_000, 70.0),
    ]
    axes = compare.comparison(rows).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters", "accuracy (%)")
    assert axes.get_xscale() == "log"
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    front, reports, own = legend
    assert front == "Pareto front: nothing smaller is more accurate"
    assert (reports, own) == ("published", "measured here")
    assert lines_of(axes)[front] == ([50_000, 200_000, 900_000], [80.0, 85.0, 90.0])
    points = {bars.get_label(): bars for bars in axes.containers}
    for label, part, hue in ((reports, rows[:2], plots.TEST), (own, rows[2:], plots.TRAIN)):
        line, _, (whiskers,) = points[label].lines
        assert line.get_xydata().tolist() == [[each["parameters"], each["final"]] for each in part]
        assert colour(line) == colors.to_hex(hue)
        lengths = [end[1] - start[1] for start, end in whiskers.get_segments()]
        assert lengths == [2 * (each["final_std"] or 0) for each in part]
    shown = {text.get_text(): text.xy for text in axes.texts}
    assert shown == {
        f"{each['network']}, 20 epochs": (each["parameters"], each["final"]) for each in rows
    }


# ---------------------------------------------------------------- find_lr

RANGE = np.array([(0.001, 2.3, 10.0), (0.01, 2.0, 25.0), (0.1, 1.5, 45.0), (1.0, 4.0, 12.0)])


def test_range_test_s_panels_are_loss_and_accuracy(drawn):
    figure = find_lr.picture(RANGE, 0.02, 0.06, "Net, sgd")
    assert figure.get_suptitle() == "Learning rate range test: Net, sgd"
    loss, accuracy = figure.axes
    for axes, values, name in ((loss, RANGE[:, 1], "nats"), (accuracy, RANGE[:, 2], "%")):
        curve, *marks = axes.get_lines()
        assert (list(curve.get_xdata()), list(curve.get_ydata())) == (
            RANGE[:, 0].tolist(), values.tolist(),
        )  # fmt: skip
        assert (axes.get_xlabel(), axes.get_xscale()) == ("learning rate", "log")
        assert f"({name})" in axes.get_ylabel()
        assert {mark.get_label(): mark.get_xdata()[0] for mark in marks} == {
            "steepest fall of the loss: 0.02": 0.02, "peak of the recipe: 0.06": 0.06,
        }  # fmt: skip
        assert {mark.get_label(): colour(mark) for mark in marks} == legend_of(figure)
    assert "cross-entropy" in loss.get_ylabel()
    assert "accuracy" in accuracy.get_ylabel()


# ---------------------------------------------------------------- minutes


def test_minutes_are_drawn_against_the_accuracies_of_their_way(drawn, tmp_path, capsys):
    for name, seconds, accuracies in (("slow", 120, (50, 84, 86)), ("fast", 30, (60, 85, 88, 87))):
        (tmp_path / name).mkdir()
        rows = [f"{accuracy},{seconds},9" for accuracy in accuracies]
        text = "\n".join(["test_acc,train_seconds,test_seconds", *rows])
        (tmp_path / name / "log.csv").write_text(text)
    with pytest.MonkeyPatch.context() as patch:  # nothing to write
        patch.setattr(minutes.files, "write_file", lambda path, content: path)
        status, out, error = call_main(minutes.main, capsys, [tmp_path / "slow", tmp_path / "fast"])
    assert (status, error) == (0, "")
    assert out.splitlines()[2] == "ratio 6.00"  # the usual way's minutes over ours
    (figure,) = drawn
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xscale()) == ("test accuracy (%)", "log")
    assert axes.get_xlabel() == "minutes of training (logarithmic)"
    shown = {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert list(shown) == list(legend_of(figure)) == [
        "usual: slow\n85 %: 6.00 minutes", "ours: fast\n85 %: 1.00 minutes", "85 %",
    ]  # fmt: skip
    for label, hue in legend_of(figure).items():
        assert colour(shown[label]) == hue
    slow, fast, target = shown.values()
    assert slow.get_xydata().tolist() == [[2, 50], [4, 84], [6, 86]]
    assert fast.get_xydata().tolist() == [[0.5, 60], [1.0, 85], [1.5, 88], [2.0, 87]]
    assert set(target.get_ydata()) == {85}
    reached = [line for line in axes.get_lines() if line.get_label()[0] == "_"]
    marks = {colour(line): line.get_xdata()[0] for line in reached}
    assert marks == {colour(slow): 6, colour(fast): 1}


# ---------------------------------------------------------------- bench


def test_bench_s_bars_are_the_tables(drawn):
    def row(*values: float) -> dict[str, float]:
        return dict(zip(("min", "median", "max"), values, strict=True))

    results = {
        "images": 5000,
        "images_per_second": {"usual": row(90, 100, 150), "ours": row(900, 1000, 1200)},
        "start_seconds": {"usual": row(2, 3, 7), "ours": row(0.1, 0.2, 0.4)},
        "times_faster": {"usual": row(8, 10, 11)},
        "matmul_gflops": row(380, 400, 410),
        "mflop_per_image": 50.0,
        "share_percent": row(11, 12.5, 15),
        "transform": {"p=1": {"albumentations": row(200, 240, 250), "batched": row(9, 16, 17)}},
        "parts": {"kept memory": row(1, 2, 3)},
    }
    figure = bench.picture(results, "Net on cpu")
    assert figure.get_suptitle() == "Net on cpu"
    wanted = {
        "Training, epochs of 5,000\nimages/s": results["images_per_second"],
        "Until the first batch is there\ns": results["start_seconds"],
        "Ours is faster than\ntimes": results["times_faster"],
        "Rate, at 50.0 MFLOP an image\nGFLOP/s": {
            "product\nof\nmatrices": results["matmul_gflops"],
            "training,\nours": row(45, 50, 60),  # 900, 1,000 and 1,200 images of 50 MFLOP
        },
        "Share of the matrix product's rate\n%": {"ours": results["share_percent"]},
        "Standard transform alone, p=1\nµs an image on one core (batched: or the GPU)": results[
            "transform"
        ]["p=1"],
        "Ours is faster than without its\ntimes": {"kept\nmemory": results["parts"]["kept memory"]},
    }
    assert titles_of(figure) == list(wanted)
    for axes, rows in zip(figure.axes, wanted.values(), strict=True):
        assert ticks(axes.get_xticklabels()) == list(rows)
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [each["median"] for each in rows.values()]
        (whiskers,) = axes.collections
        ends = [(low[1], high[1]) for low, high in whiskers.get_segments()]
        assert ends == [pytest.approx((each["min"], each["max"])) for each in rows.values()]
        hues = [plots.TEST if "ours" in name else plots.TRAIN for name in rows]
        assert [colour(bar) for bar in axes.patches] == [colors.to_hex(hue) for hue in hues]
    assert ticks(figure.axes[0].texts) == ["100", "1,000"]


# ---------------------------------------------------------------- as PNG


def test_a_figure_becomes_png_of_its_size():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    image = Image.open(io.BytesIO(plots.png(figure)))
    assert (image.format, image.size) == ("PNG", (220, 110))


@pytest.mark.parametrize(
    "draw",
    [
        lambda data: evaluate.class_metrics(
            evaluate.figures(ANSWERS, TRUE)["classes"], "Net, test set"
        ),
        lambda data: evaluate.reliability(np.array(SURE), np.array(FOUND) == TRUE, "Net, test set"),
        explore.draw_counts,
        lambda data: find_lr.picture(RANGE, 0.02, 0.06, "Net, sgd"),
    ],
    ids=["class_metrics", "calibration", "class_counts", "find_lr"],
)
def test_nothing_is_clipped(draw, uneven):
    pixels = np.asarray(Image.open(io.BytesIO(draw(uneven))).convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert min(pixels.shape[:2]) > 150
    assert (edge == 255).all()
