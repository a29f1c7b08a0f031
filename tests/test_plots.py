"""The pictures of a run, caught as figures before they become PNG: what they show, and where."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import plots
import utils
from cifar10 import CLASSES


@pytest.fixture(autouse=True)
def _figures(monkeypatch) -> None:
    monkeypatch.setattr(plots, "png", lambda figure: figure)


ROWS = [
    {
        "epoch": epoch,
        "lr": 0.1 / epoch,
        "train_loss": 2.0 / epoch,
        "train_acc": 30.0 * epoch,
        "val_loss": 1.5 / epoch,
        "val_acc": 25.0 * epoch,
    }
    for epoch in (1, 2, 3)
]


def lines_of(axes) -> dict[str, tuple[list, list]]:
    """x and y of each line, by its label."""
    return {line.get_label(): (*map(list, line.get_data()),) for line in axes.get_lines()}


def test_curves_show_each_column_against_the_epoch():
    figure = plots.curves(ROWS, "val", 60.0, "a title")
    loss, accuracy, rate = figure.axes
    epochs = [1, 2, 3]
    assert lines_of(loss) == {
        "train": (epochs, [2.0, 1.0, 2.0 / 3]),
        "val": (epochs, [1.5, 0.75, 0.5]),
    }
    shown = lines_of(accuracy)
    assert shown["train"] == (epochs, [30.0, 60.0, 90.0])
    assert shown["val"] == (epochs, [25.0, 50.0, 75.0])
    assert shown["target 60 %"][1] == [60.0, 60.0]
    ((_, rates),) = lines_of(rate).values()
    assert rates == [0.1, 0.05, 0.1 / 3]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch"] * 3
    assert loss.get_ylabel().startswith("cross-entropy")
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert rate.get_ylabel() == "learning rate"
    assert figure.get_suptitle() == "a title"
    for axes in (loss, accuracy):  # what the legend calls train has train's colour
        colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
        assert (colours["train"], colours["val"]) == (plots.TRAIN, plots.TEST)


def test_curves_are_told_in_words():
    text = plots.curves(ROWS, "val", 60.0, "a title").get_label()
    assert text == (
        "Curves over 3 epochs. Val accuracy: 25.00 % after the first, 75.00 % after the last, at "
        "best 75.00 % (epoch 3); in training 90.00 % at last. Loss at last: 0.500, in training "
        "0.667. The target of 60 % was reached at epoch 3."
    )
    assert plots.told_curves(ROWS, "val", 75.1).endswith("The target of 75.1 % was not reached.")
    assert "target" not in plots.told_curves(ROWS, "val", None)
    text = plots.told_curves([*ROWS, ROWS[1] | {"epoch": 4}], "val", None)
    assert "50.00 % after the last, at best 75.00 % (epoch 3)" in text


MATRIX = np.arange(100).reshape(10, 10) + np.diag(np.arange(100, 1000, 90))


def test_the_confusion_matrix_has_true_classes_as_rows():
    axes, _ = plots.confusion_matrix(MATRIX, "a title").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(CLASSES)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(CLASSES)
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first row is above, as an image has it
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array(), MATRIX / MATRIX.sum(axis=1, keepdims=True))
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(shown) == 100
    for row in range(10):
        for column in range(10):
            assert shown[column, row] == str(MATRIX[row, column])


def test_class_accuracy_is_the_diagonal_s_share_of_its_row_best_on_top():
    figure = plots.class_accuracy(MATRIX, "a title")
    (axes,) = figure.axes
    accuracy = 100 * MATRIX.diagonal() / MATRIX.sum(axis=1)
    order = np.argsort(accuracy)
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == [CLASSES[index] for index in order]
    bars = sorted(axes.patches, key=lambda bar: bar.get_y())
    assert [bar.get_width() for bar in bars] == pytest.approx(accuracy[order])
    (mean,) = axes.get_lines()
    assert mean.get_xdata()[0] == pytest.approx(100 * MATRIX.trace() / MATRIX.sum())
    assert axes.get_xlabel() == "accuracy (%)"


def test_matrices_are_told_in_words():
    matrix = np.diag([5, 6, 7, 8, 9, 10, 11, 12, 13, 0])
    text = plots.confusion_matrix(matrix, "t").get_label()
    assert text.endswith(": 81 of 81 images are right.")
    matrix[3, 5], matrix[5, 3], matrix[0, 8], matrix[1, 9] = 4, 3, 2, 1
    text = plots.confusion_matrix(matrix, "t").get_label()
    assert text.endswith(
        "81 of 91 images are right. Most often taken for another: cat for dog (4), dog for cat "
        "(3), airplane for ship (2)."
    )
    told = plots.class_accuracy(matrix, "t").get_label()
    beginning, _, classes = told.removesuffix(".").partition(": ")
    assert beginning == "Accuracy by class, best first"
    found = [each.rsplit(" ", 2)[:2] for each in classes.split(", ")]
    sums = dict(zip(CLASSES, zip(matrix.diagonal(), matrix.sum(axis=1), strict=True), strict=True))
    assert {name for name, _ in found} == set(CLASSES)
    for name, value in found:
        right, total = sums[name]
        assert value == f"{100 * right / max(total, 1):.1f}"
    values = [float(value) for _, value in found]
    assert values == sorted(values, reverse=True)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_mistakes_say_what_is_true_and_what_was_predicted(sample):
    images = sample.train_images[:3]
    labels, predictions = np.array([3, 5, 0]), np.array([5, 3, 8])
    figure = plots.misclassified(images, labels, predictions, np.array([0.99, 0.5, 0.301]), "t")
    assert titles(figure) == [
        "true: cat\npredicted: dog (99.0%)",
        "true: dog\npredicted: cat (50.0%)",
        "true: airplane\npredicted: ship (30.1%)",
    ]
    assert figure.get_label() == (
        "Mistakes, surest first: 3 images; cat taken for dog (99.0%); dog taken for cat (50.0%); "
        "airplane taken for ship (30.1%)"
    )
    for axes, image in zip(figure.axes, images, strict=False):
        assert np.array_equal(axes.get_images()[0].get_array(), image)


def test_an_evaluation_s_pictures_count_and_sort_its_mistakes(sample):
    """Five images: two right; of the three wrong ones the surest comes first."""
    labels = torch.tensor([0, 1, 2, 3, 4])
    predictions, sureness = [0, 1, 5, 6, 7], [4.0, 4.0, 1.0, 3.0, 2.0]
    logits = torch.zeros(5, 10)
    for row, (prediction, height) in enumerate(zip(predictions, sureness, strict=True)):
        logits[row, prediction] = height
    images = sample.test_images[:5]
    drawn = plots.of_evaluation(utils.Evaluation(1.0, 40.0, logits, labels), images, "where")
    assert set(drawn) == {"confusion_matrix.png", "class_accuracy.png", "misclassified.png"}
    axes, _ = drawn["confusion_matrix.png"].axes
    assert axes.get_title() == "where: 40.00 % correct"
    ones = {text.get_position() for text in axes.texts if text.get_text() == "1"}
    assert ones == {(0, 0), (1, 1), (5, 2), (6, 3), (7, 4)}
    mistakes = drawn["misclassified.png"]
    assert mistakes.get_suptitle() == "where: the 3 most confident of 3 mistakes"
    found = [title.split("\n") for title in titles(mistakes)]
    assert [first for first, _ in found] == ["true: cat", "true: deer", "true: bird"]
    sure = [np.exp(height) / (np.exp(height) + 9) for height in (3.0, 2.0, 1.0)]
    for (_, second), name, share in zip(found, ("frog", "horse", "dog"), sure, strict=True):
        assert second == f"predicted: {name} ({share:.1%})"
    for axes, index in zip(mistakes.axes, (3, 4, 2), strict=False):
        assert np.array_equal(axes.get_images()[0].get_array(), images[index])


def test_augmentations_stand_below_their_image(sample):
    stats = (0.5,) * 3, (0.2,) * 3
    mirror = utils.test_transform(*stats)
    figure = plots.augmentations(sample.train_images, sample.train_labels, mirror, *stats)
    grid = np.array(figure.axes).reshape(6, 10)
    assert [axes.get_title() for axes in grid[0]] == list(CLASSES)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == [
        "raw",
        *(f"draw {n}" for n in range(1, 6)),
    ]
    assert f"of each class ({', '.join(CLASSES)}), raw on top" in figure.get_label()
    for label, column in enumerate(grid.T):
        first = sample.train_images[np.argmax(sample.train_labels == label)]
        for axes in column:  # nothing was drawn but what the transform leaves
            assert np.array_equal(axes.get_images()[0].get_array(), first)
