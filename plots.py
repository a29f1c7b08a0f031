"""The pictures of a run: numbers in, PNG bytes out."""

import io
import textwrap
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

TRAIN, TEST, MARK = "tab:blue", "tab:orange", "tab:green"


def curves(history: list[dict], split: str, target: float, title: str) -> bytes:
    """Loss, accuracy with the target line, and learning rate, against the epoch.

    Args:
        history: a dict an epoch: epoch, lr, train_loss, train_acc (percent), {split}_loss,
            {split}_acc.
        split: "test" or "val", what was evaluated each epoch.
        target: accuracy in percent.
    """
    epochs = [row["epoch"] for row in history]
    # One epoch is a point; it needs a marker to be seen.
    style = {"marker": "o", "markersize": 3}
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "acc")):
        axes.plot(
            epochs, [row[f"train_{name}"] for row in history], color=TRAIN, label="train", **style
        )
        axes.plot(
            epochs, [row[f"{split}_{name}"] for row in history], color=TEST, label=split, **style
        )
    loss.set(title="Loss", ylabel="cross-entropy (nats)")
    loss.legend()
    accuracy.axhline(target, color=MARK, linestyle="--", label=f"target {target:g} %")
    accuracy.set(title="Accuracy", ylabel="accuracy (%)")
    accuracy.legend(loc="lower right")
    rate.plot(epochs, [row["lr"] for row in history], color="tab:red", **style)
    rate.set(title="Learning rate at the end of the epoch", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return png(figure)


def confusion_matrix(matrix: np.ndarray, classes: tuple[str, ...], title: str) -> bytes:
    """Counts in each cell; the colour is the share of the true class (the row).

    Args:
        matrix: int, (classes, classes); row true, column predicted.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    for row in range(len(classes)):
        for column in range(len(classes)):
            axes.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, classes)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return png(figure)


def class_accuracy(matrix: np.ndarray, classes: tuple[str, ...], title: str) -> bytes:
    """Accuracy of each class, best on top, with that of all images as a line.

    Args:
        matrix: int, (classes, classes); row true, column predicted.
    """
    accuracy = 100 * matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
    overall = 100 * matrix.trace() / max(matrix.sum(), 1)
    order = np.argsort(accuracy, kind="stable")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([classes[index] for index in order], accuracy[order], color=TRAIN)
    # On white, because the line of the mean runs through some of the labels.
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(drawn, fmt="%.1f", padding=4, bbox=ground, zorder=3)
    axes.axvline(overall, color=TEST, linestyle="--", label=f"all images {overall:.2f} %")
    axes.set_xlim(0, 108)  # room for the label of a full bar
    axes.set_xticks(range(0, 101, 10))
    axes.set(xlabel="accuracy (%)", title=title)
    figure.legend(loc="outside lower right")
    return png(figure)


def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    confidences: np.ndarray,
    classes: tuple[str, ...],
    title: str,
) -> bytes:
    """Up to 30 mistakes: the image, true and predicted class, and the confidence in it.

    Args:
        images: uint8 (N, 32, 32, 3); at most 30 are shown.
        labels, predictions: int (N,).
        confidences: float (N,), 0 to 1.
    """
    figure = Figure(figsize=(15, 10), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(5, 6).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label, prediction, confidence in zip(
        grid, images, labels, predictions, confidences, strict=False
    ):
        axes.imshow(image)
        axes.set_title(
            f"true: {classes[label]}\npredicted: {classes[prediction]} ({confidence:.1%})",
            fontsize=10,
        )
    return png(figure)


def augmentations(
    raw: np.ndarray, augmented: list[np.ndarray], classes: tuple[str, ...], title: str
) -> bytes:
    """A column a class: the raw image above draws of the training transform.

    Args:
        raw: uint8 (classes, 32, 32, 3).
        augmented: several arrays of the same shape, each one draw of all images.
    """
    rows = [raw, *augmented]
    figure = Figure(figsize=(1.5 * len(classes), 1.5 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), len(classes), squeeze=False)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            axes = grid[row, column]
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(classes[column])
        grid[row, 0].set_ylabel("raw" if row == 0 else f"draw {row}")
    return png(figure)


def class_counts(counts: dict[str, np.ndarray], classes: tuple[str, ...], title: str) -> bytes:
    """Bars of the number of images of each class, a group of bars a class.

    Args:
        counts: name of the split to int (classes,).
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for number, (split, values) in enumerate(counts.items()):
        places = np.arange(len(classes)) + (number - (len(counts) - 1) / 2) * width
        drawn = axes.bar(places, values, width, label=f"{split}, {values.sum():,} images")
        axes.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_xticks(range(len(classes)), classes)
    axes.set(ylabel="images", title=title)
    axes.margins(y=0.1)
    figure.legend(loc="outside lower right", ncols=len(counts))
    return png(figure)


def image_rows(rows: dict[str, np.ndarray], title: str) -> bytes:
    """A row of images under each other for every name.

    Args:
        rows: name to uint8 (N, 32, 32, 3), the same N for all.
    """
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 * columns + 1.6, 1.2 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
    return png(figure)


def labelled_images(images: np.ndarray, labels: list[str], columns: int, title: str) -> bytes:
    """Images in rows of `columns`, each under its label.

    Args:
        images: uint8 (N, height, width, 3).
    """
    rows = -(-len(images) // columns)
    wide = images.shape[2] / images.shape[1]
    figure = Figure(figsize=(1.5 * wide * columns + 0.2, 1.75 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label in zip(grid, images, labels, strict=False):
        axes.imshow(image)
        axes.set_title(label, fontsize=9)
    return png(figure)


def channel_histograms(
    counts: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], title: str
) -> bytes:
    """How often each grey level occurs in each channel, with its mean and standard deviation.

    Args:
        counts: int (3, 256), of red, green, blue.
        mean, std: of each channel, in units of the full range 255.
    """
    figure = Figure(figsize=(15, 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name, row, middle, spread in zip(
        panels, ("red", "green", "blue"), counts, mean, std, strict=True
    ):
        axes.bar(np.arange(256), 100 * row / row.sum(), width=1.0, color=f"tab:{name}", alpha=0.7)
        axes.axvline(255 * middle, color="black", label=f"mean {middle:.4f}")
        axes.axvspan(
            255 * (middle - spread),
            255 * (middle + spread),
            color="black",
            alpha=0.1,
            label=f"± std {spread:.4f}",
        )
        axes.set(title=name, xlabel="grey level", xlim=(-0.5, 255.5))
        axes.legend()
    panels[0].set_ylabel("share of the pixels (%)")
    return png(figure)


def class_metrics(classes: dict[str, dict], title: str) -> bytes:
    """Precision, recall and F1 of each class as bars, in percent.

    Args:
        classes: name to a dict with "precision", "recall", "f1-score" (0 to 1) and "support".
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    axes = figure.subplots()
    kinds = ("precision", "recall", "f1-score")
    for number, kind in enumerate(kinds):
        values = [100 * row[kind] for row in classes.values()]
        places = np.arange(len(classes)) + 0.27 * (number - 1)
        drawn = axes.bar(places, values, 0.27, label="F1" if kind == "f1-score" else kind)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
    names = [f"{name}\n({row['support']:,.0f})" for name, row in classes.items()]
    axes.set_xticks(range(len(classes)), names)
    axes.set(ylabel="%", title=f"{title} (in brackets: images)", ylim=(0, 105))
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=3)
    return png(figure)


def reliability(calibration: tuple, title: str) -> bytes:
    """Accuracy against confidence in bins, and how many images lie in each.

    Args:
        calibration: (confidence, accuracy, share), float (bins,) from 0 to 1, and the expected
            calibration error, 0 to 1.
    """
    confidence, accuracy, share, error = calibration
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    width = 1 / len(share)
    middles = (np.arange(len(share)) + 0.5) * width
    top.bar(middles, 100 * np.nan_to_num(accuracy), width, edgecolor="white", color=TRAIN)
    top.plot([0, 1], [0, 100], color="black", linestyle="--", label="as right as it is sure")
    top.plot(confidence, 100 * accuracy, "o", color=TEST, label="mean of the bin")
    top.set(ylabel="accuracy (%)", title=f"Expected calibration error {error:.2%}", ylim=(0, 100))
    top.legend(loc="upper left")
    bottom.bar(middles, 100 * share, width, edgecolor="white", color=TRAIN)
    bottom.set(xlabel="confidence", ylabel="images (%)", xlim=(0, 1))
    for axes in (top, bottom):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    return png(figure)


def comparison(rows: list, front: list, note: str = "") -> bytes:
    """Accuracy against parameters, published and measured, with the Pareto front.

    Args:
        rows: each with network, source ("published" or not), changes (to its recipe, for its
            name), epochs, parameters, final (percent), final_std.
        front: those that nothing smaller beats, by rising size.
        note: small print below the picture.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    _footnote(figure, note)
    axes = figure.subplots()
    steps = {"color": MARK, "linestyle": "--", "alpha": 0.7, "drawstyle": "steps-post"}
    axes.plot(
        [row.parameters for row in front],
        [row.final for row in front],
        label="Pareto front: nothing smaller is more accurate",
        **steps,
    )
    low, high = min(row.parameters for row in rows), max(row.parameters for row in rows)
    for name, color, marker in (("published", TEST, "s"), ("measured here", TRAIN, "o")):
        chosen = [row for row in rows if (row.source == "published") == (name == "published")]
        axes.errorbar(
            [row.parameters for row in chosen],
            [row.final for row in chosen],
            [row.final_std or 0 for row in chosen],
            fmt=marker,
            color=color,
            markerfacecolor="white" if name == "published" else color,
            capsize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlim(low / 3.2, high * 4)  # room for the names
    axes.margins(y=0.1)
    axes.set(
        title="Test accuracy against the size of the network",
        xlabel="parameters",
        ylabel="accuracy (%)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    _name_points(figure, axes, rows)
    return png(figure)


def _name_points(figure: Figure, axes: Axes, rows: list) -> None:
    """Names beside the points of `comparison`, each where it covers no other name or point."""
    figure.draw_without_rendering()  # settles the layout, so that places can be compared
    points = [axes.transData.transform((row.parameters, row.final)) for row in rows]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for row in sorted(rows, key=lambda row: row.source == "published"):
        text = axes.annotate(
            f"{row.network}{row.changes}, {row.epochs} epochs",
            (row.parameters, row.final),
            xytext=(0, 0),  # until its place is found below
            textcoords="offset points",
            zorder=3,  # the front may pass behind a name
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        ways = [(x, y) for x in (7, -7) for y in (5, -5)]
        if row.source == "published":
            ways.reverse()
        for x, y in [*ways, *((x, 3 * y) for x, y in ways)]:
            text.set(
                position=(x, y),
                horizontalalignment="left" if x > 0 else "right",
                verticalalignment="bottom" if y > 0 else "top",
            )
            box = text.get_window_extent()
            if box.count_overlaps(taken) == 0 and axes.bbox.containsx(box.x0):
                break
        taken.append(box)


def _footnote(figure: Figure, note: str) -> None:
    """Small print at the lower edge of a figure of constrained layout, which makes room for it."""
    if note:
        wide = int(figure.get_figwidth() * 17)  # letters of this size that a line holds
        text = "\n".join(textwrap.wrap(note, wide))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="dimgray")


def progress(curves: list, published: list, note: str = "") -> bytes:
    """Test accuracy by epoch: each network's best run as a labelled line, the others in faint grey.

    The published figures are diamonds at their epochs, in their network's colour.

    Args:
        curves: each with network, label and accuracies (percent, after every epoch); a network's
            best is that of the highest last accuracy.
        published: each with network, epochs and final (percent).
        note: small print below the picture.
    """
    networks = list(dict.fromkeys([row.network for row in published]))
    networks += [name for name in dict.fromkeys(c.network for c in curves) if name not in networks]
    colors = {name: f"C{number % 10}" for number, name in enumerate(networks)}
    ordered = sorted(curves, key=lambda curve: -curve.accuracies[-1])
    best = {}
    for curve in ordered:
        best.setdefault(curve.network, curve)
    figure = Figure(figsize=(15, 7), layout="constrained")  # the list of names is wide
    _footnote(figure, note)
    axes = figure.subplots()
    for curve in best.values():
        axes.plot(
            range(1, len(curve.accuracies) + 1),
            curve.accuracies,
            color=colors[curve.network],
            linewidth=2,
            marker="o",
            markevery=[-1],  # its end, where another line may go on
            label=f"{curve.label}: {curve.accuracies[-1]:.2f}",
        )
    others = [curve for curve in ordered if best[curve.network] is not curve]
    for number, curve in enumerate(others):
        axes.plot(
            range(1, len(curve.accuracies) + 1),
            curve.accuracies,
            color="grey",
            alpha=0.35,
            linewidth=0.8,
            zorder=1,  # behind the best
            label="_hidden" if number else f"other runs ({len(others)})",
        )
    reports = sorted(published, key=lambda row: -row.final)
    for number, row in enumerate(reports):
        place = (row.epochs, row.final)
        covered_by = sum((each.epochs, each.final) == place for each in reports[number + 1 :])
        axes.plot(
            *place,
            color=colors[row.network],
            marker="D",
            markersize=6 + 5 * covered_by,  # so that equal figures are all seen
            markeredgecolor="black",
            linestyle="none",
            zorder=3,
            label=f"{row.network}, published: {row.final:.2f} at {row.epochs}",
        )
    axes.set_xscale("log")
    axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], list(map(str, ticks)))
    axes.minorticks_off()
    axes.set(
        title="Test accuracy by epoch: each network's best run, and published figures as diamonds",
        xlabel="epoch (logarithmic)",
        ylabel="accuracy (%)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return png(figure)


def range_test(points: list, suggested: float, recipe: float, title: str) -> bytes:
    """Smoothed loss and accuracy against the learning rate, with two rates marked.

    Args:
        points: each with lr, loss (nats) and accuracy (percent).
        suggested, recipe: learning rates.
    """
    values = [point.lr for point in points]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"Learning rate range test: {title}")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(values, [point.loss for point in points], color=TRAIN)
    losses = np.array([point.loss for point in points])
    loss.set(title="Loss", ylabel="smoothed cross-entropy (nats)")
    loss.set_ylim(0.95 * losses.min(), min(losses.max(), 2 * losses[0]) * 1.05)
    accuracy.plot(values, [point.accuracy for point in points], color=TRAIN)
    accuracy.set(title="Accuracy on the training batches", ylabel="smoothed accuracy (%)")
    for axes in (loss, accuracy):
        axes.axvline(
            suggested,
            color=MARK,
            linestyle="--",
            label=f"steepest fall of the loss: {suggested:.3g}",
        )
        axes.axvline(recipe, color=TEST, linestyle=":", label=f"peak of the recipe: {recipe:g}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return png(figure)


def bench(results: dict, title: str) -> bytes:
    """The tables of tools/bench as bars: medians, with whiskers from least to greatest.

    Args:
        results: what tools/bench saves as bench.json.
    """
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    figure.suptitle(title)
    ways, device, transform = figure.subplots(1, 3, width_ratios=(4, 2.6, 3))

    speeds, times = results["images_per_second"], results["times_faster"]
    names = [
        f"{way}\n(ours is {times[way]['median']:.1f}x)" if way in times else way for way in speeds
    ]
    colors = [TEST if way == "ours" else TRAIN for way in speeds]
    bars(ways, range(len(speeds)), list(speeds.values()), "{:,.0f}", 0.7, color=colors)
    ways.set_xticks(range(len(speeds)), names)
    ways.set(title=f"Training, epochs of {results['images']:,} images", ylabel="images/s")

    gflop = {key: value * results["mflop_per_image"] / 1e3 for key, value in speeds["ours"].items()}
    share = results["share_percent"]["median"]
    bars(device, range(2), [results["matmul_gflops"], gflop], "{:,.0f}", 0.7, color=[TRAIN, TEST])
    device.set_xticks(range(2), ["product of\nlarge matrices", "training,\nours"])
    device.set(title=f"Ours reaches {share:.1f} % of the rate", ylabel="GFLOP/s")

    forms = list(results["transform"]["own p"])
    looks = ((-0.2, "dimgray"), (0.2, "silver"))
    for (shift, color), (rate, rows) in zip(looks, results["transform"].items(), strict=True):
        places = [place + shift for place in range(len(forms))]
        heights = [rows[form] for form in forms]
        bars(transform, places, heights, "{:,.1f}", 0.38, label=rate, color=color)
    transform.set_xticks(range(len(forms)), forms)
    transform.set(title="Standard transform alone", ylabel="µs an image (less is better)")
    transform.legend()
    for axes in (ways, device, transform):
        axes.margins(y=0.12)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    return png(figure)


def accuracy_over_minutes(curves: dict, target: float, title: str) -> bytes:
    """Test accuracy against minutes of training, and when each curve first reaches the target.

    Args:
        curves: by its name, the minutes until the end of every epoch, the accuracies there in
            percent, and the minutes until the target, None if it was not reached.
        target: accuracy in percent.
    """
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for (name, (minutes, accuracies, reached)), color in zip(
        curves.items(), (TRAIN, TEST), strict=True
    ):
        when = f"at {reached:,.1f} min" if reached else "not reached"
        axes.plot(
            *(minutes, accuracies),
            color=color,
            marker="o",
            markersize=3,
            label=f"{name}\n{target:g} % {when}",
        )
        if reached:
            axes.axvline(reached, color=color, linestyle=":")
    axes.axhline(target, color=MARK, linestyle="--", label=f"{target:g} %")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title=title, xlabel="minutes of training (logarithmic)", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3)
    return png(figure)


def bars(
    axes: Axes,
    places: Iterable[float],
    rows: list[dict],
    form: str,
    width: float,
    **options: object,
) -> None:
    """Bars of medians with their whiskers and values; rows hold median, min and max."""
    medians = [row["median"] for row in rows]
    below = [row["median"] - row["min"] for row in rows]
    above = [row["max"] - row["median"] for row in rows]
    drawn = axes.bar(places, medians, width, yerr=[below, above], capsize=3, **options)
    axes.bar_label(drawn, fmt=form, padding=2)


def png(figure: Figure) -> bytes:
    """The picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
