"""The pictures of a run: numbers in, PNG bytes out."""

import io
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import utils
from cifar10 import CLASSES
from fast.batched import A
from support.history import History
from support.workers import seed_steps

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
    figure.set_label(told_curves(history, split, target))
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


def told_curves(history: list[dict], split: str, target: float | None) -> str:
    """The curves in words; see `curves`."""
    values = [row[f"{split}_acc"] for row in history]
    last, best = history[-1], max(values)
    words = f"Curves over {len(values)} epochs. {split.capitalize()} accuracy: {values[0]:.2f} % "
    words += f"after the first, {values[-1]:.2f} % after the last, at best {best:.2f} % (epoch "
    words += f"{values.index(best) + 1}); in training {last['train_acc']:.2f} % at last. Loss at "
    words += f"last: {last[f'{split}_loss']:.3f}, in training {last['train_loss']:.3f}."
    if target is None:
        return words
    reached = next((epoch for epoch, value in enumerate(values, 1) if value >= target), None)
    when = f"reached at epoch {reached}" if reached else "not reached"
    return f"{words} The target of {target:g} % was {when}."


def confusion_matrix(matrix: np.ndarray, title: str) -> bytes:
    """Counts in each cell; the colour is the share of the true class (the row).

    Args:
        matrix: int, (classes, classes); row true, column predicted.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    figure.set_label(told_confusion(matrix))
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    for row in range(len(CLASSES)):
        for column in range(len(CLASSES)):
            axes.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )
    ticks = range(len(CLASSES))
    axes.set_xticks(ticks, CLASSES, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, CLASSES)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return png(figure)


def told_confusion(matrix: np.ndarray) -> str:
    """The matrix in words: how many are right, and what is most often taken for what."""
    right, total = matrix.trace(), matrix.sum()
    words = f"Confusion matrix, a row a true class, a column a predicted one: {right:,} of "
    words += f"{total:,} images are right."
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    pairs = [np.unravel_index(at, wrong.shape) for at in np.argsort(-wrong, axis=None)[:3]]
    told = [f"{CLASSES[i]} for {CLASSES[j]} ({wrong[i, j]:,})" for i, j in pairs if wrong[i, j]]
    return f"{words} Most often taken for another: {', '.join(told)}." if told else words


def class_accuracy(matrix: np.ndarray, title: str) -> bytes:
    """Accuracy of each class, best on top, with that of all images as a line.

    Args:
        matrix: int, (classes, classes); row true, column predicted.
    """
    accuracy = 100 * matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
    overall = 100 * matrix.trace() / max(matrix.sum(), 1)
    order = np.argsort(accuracy, kind="stable")
    figure = Figure(figsize=(9, 5), layout="constrained")
    told = [f"{CLASSES[at]} {accuracy[at]:.1f} %" for at in order[::-1]]
    figure.set_label(f"Accuracy by class, best first: {', '.join(told)}.")
    axes = figure.subplots()
    drawn = axes.barh([CLASSES[index] for index in order], accuracy[order], color=TRAIN)
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
    title: str,
    kind: str = "Mistakes",
) -> bytes:
    """Up to 30 mistakes: the image, true and predicted class, and the confidence in it.

    Args:
        images: uint8 (N, 32, 32, 3); at most 30 are shown.
        labels, predictions: int (N,).
        confidences: float (N,), 0 to 1.
        kind: what these are, as the description begins.
    """
    figure = Figure(figsize=(15, 10), layout="constrained")
    told = [
        f"{CLASSES[label]}{f' taken for {CLASSES[prediction]}' * bool(label != prediction)} "
        f"({confidence:.1%})"
        for label, prediction, confidence in zip(labels, predictions, confidences, strict=True)
    ]
    figure.set_label("; ".join([f"{kind}, surest first: {len(told)} images", *told[:5]]))
    figure.suptitle(title)
    grid = figure.subplots(5, 6).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label, prediction, confidence in zip(
        grid, images, labels, predictions, confidences, strict=False
    ):
        axes.imshow(image)
        axes.set_title(
            f"true: {CLASSES[label]}\npredicted: {CLASSES[prediction]} ({confidence:.1%})",
            fontsize=10,
        )
    return png(figure)


def of_evaluation(evaluation: utils.Evaluation, images: np.ndarray, title: str) -> dict[str, bytes]:
    """Confusion, classes and the most confident mistakes, by the name of the file."""
    labels = evaluation.labels.numpy()
    confidences, predictions = (
        tensor.numpy() for tensor in evaluation.logits.softmax(dim=1).max(dim=1)
    )
    matrix = np.zeros((len(CLASSES),) * 2, dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    wrong = np.flatnonzero(predictions != labels)
    shown = wrong[np.argsort(-confidences[wrong], kind="stable")][:30]
    mistakes = (images[shown], labels[shown], predictions[shown], confidences[shown])
    correct = f"{title}: {evaluation.accuracy:.2f} % correct"
    most = f"{title}: the {len(shown)} most confident of {len(wrong):,} mistakes"
    return {
        "confusion_matrix.png": confusion_matrix(matrix, correct),
        "class_accuracy.png": class_accuracy(matrix, f"Accuracy by class: {title}"),
        "misclassified.png": misclassified(*mistakes, most),
    }


def of_run(
    history: History, evaluation: utils.Evaluation, images: np.ndarray, title: str
) -> dict[str, bytes]:
    """The pictures at a run's end, by the name of the file."""
    shown = curves(history.rows, history.split, history.target, title)
    return {"curves.png": shown} | of_evaluation(evaluation, images, title)


def to_pixels(tensors: torch.Tensor, mean: utils.RGB, std: utils.RGB) -> np.ndarray:
    """Normalised images (..., 3, H, W) back to uint8 (..., H, W, 3), to be looked at."""
    values = tensors.movedim(-3, -1).float().cpu().numpy() * np.array(std) + np.array(mean)
    return (255 * values).round().clip(0, 255).astype(np.uint8)


def augmentations(
    images: np.ndarray, labels: np.ndarray, transform: A.Compose, mean: utils.RGB, std: utils.RGB
) -> bytes:
    """A column a class: its first image, above five draws of the training transform.

    Args:
        images, labels: uint8 (N, 32, 32, 3) and uint8 (N,).
    """
    present = [label for label in range(len(CLASSES)) if (labels == label).any()]
    rows = [np.stack([images[np.argmax(labels == label)] for label in present])]
    seed_steps(transform, 0)
    for _ in range(5):
        tensors = torch.stack([transform(image=image)["image"] for image in rows[0]])
        rows.append(to_pixels(tensors, mean, std))
    figure = Figure(figsize=(1.5 * len(present), 9.6), layout="constrained")
    names = ", ".join(CLASSES[label] for label in present)
    figure.set_label(
        f"What the network is shown: an image of each class ({names}), raw on top, "
        "below it five draws of the training augmentation."
    )
    figure.suptitle("What the network is shown in training")
    grid = figure.subplots(len(rows), len(present), squeeze=False)
    for row, shown in enumerate(rows):
        for column, image in enumerate(shown):
            axes = grid[row, column]
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(CLASSES[present[column]])
        grid[row, 0].set_ylabel("raw" if row == 0 else f"draw {row}")
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


def png(figure: Figure, title: str = "") -> bytes:
    """The picture as a PNG file's bytes, a title and the figure's label in it."""
    buffer, label = io.BytesIO(), figure.get_label()
    metadata = ({"Title": title} if title else {}) | ({"Description": label} if label else {})
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    return buffer.getvalue()
