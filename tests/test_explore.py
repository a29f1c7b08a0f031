"""tools.explore against plain counting, planted duplicates, and its notebook."""

import importlib
import os
import sys
from pathlib import Path

import nbformat
import numpy as np

import cifar10
import plots
from tests import forked
from tests.conftest import PIXEL
from tools import explore

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "cifar10_eda.ipynb"


def test_counts_means_and_histograms_by_plain_loops(sample):
    images, labels = sample.train_images[:300], sample.train_labels[:300]
    part = sample._replace(train_images=images, train_labels=labels)
    report = explore.report(part, explore.Pairs(*np.empty((3, 0), dtype=int)))
    means, histograms = explore.mean_images(images, labels), explore.histograms(images)
    for label in range(10):
        chosen = [image for image, other in zip(images, labels, strict=True) if other == label]
        assert f"| {cifar10.CLASSES[label]} | {len(chosen)} | 20 |" in report
        wanted = sum(image.astype(float) for image in chosen) / len(chosen)
        assert np.abs(means[label] - wanted).max() <= 0.5
    for channel in range(3):
        wanted, _ = np.histogram(images[..., channel], bins=np.arange(257))
        assert (histograms[channel] == wanted).all()


def test_samples_are_of_their_class_and_no_two_are_the_same(sample):
    chosen = explore.samples(sample.train_images, sample.train_labels, 8)
    assert chosen.shape == (10, 8, 32, 32, 3)
    for label in range(10):
        known = {image.tobytes() for image in sample.train_images[sample.train_labels == label]}
        found = {image.tobytes() for image in chosen[label]}
        assert len(found) == 8
        assert found <= known


def test_planted_duplicates_are_found(sample):
    """Copies, brighter, mirrored and noisy ones; and the sample's own images are no duplicates."""
    train, test = sample.train_images, sample.test_images[:40].copy()
    assert explore.exact_duplicates(test, train) == 0
    assert len(explore.near_duplicates(test, train).test) == 0
    noise = np.random.default_rng(0).normal(0, 6, (32, 32, 3))
    test[3] = train[500]
    test[8] = train[501, :, ::-1]
    test[21] = (train[502] * 0.7 + 20).astype(np.uint8)
    test[30] = (train[503] + noise).clip(0, 255).astype(np.uint8)
    pairs = explore.near_duplicates(test, train)
    found = dict(zip(pairs.test.tolist(), pairs.train.tolist(), strict=True))
    assert found == {3: 500, 8: 501, 21: 502, 30: 503}
    assert (np.diff(pairs.similarity) <= 0).all()
    assert explore.exact_duplicates(test, train) == 1


def test_similarity_is_numpys_correlation(sample):
    test, train = sample.test_images[:3], sample.train_images[:50]
    pairs = explore.near_duplicates(test, train, least=-1.0)

    def small(image: np.ndarray) -> np.ndarray:
        return image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).ravel()

    for index, partner, similarity in zip(*pairs, strict=True):
        both = [
            [np.corrcoef(small(test[index]), small(image))[0, 1] for image in images]
            for images in (train, train[:, :, ::-1])
        ]
        best = np.max(both, axis=0)
        assert np.isclose(similarity, best.max(), atol=1e-5)
        assert partner == best.argmax()


def test_the_command_writes_pictures_and_a_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda *_: PIXEL)  # see test_tool_pictures.py
    assert explore.main(["--dry-run", "--output-dir", str(tmp_path)]) == 0
    folder = tmp_path / "explore"
    report = (folder / "report.md").read_text()
    assert "| frog | 100 | 20 |" in report
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["class_counts.png", "histograms.png", "mean_images.png", "samples.png"]
    for name in pictures:
        assert f"]({name})" in report


def test_the_notebook_runs_on_the_sample_and_was_saved_with_its_outputs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:])  # the first imports
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)

    def work() -> None:
        """The cells in a shell of IPython's, which a kernel would have as well."""
        from IPython.core.interactiveshell import InteractiveShell

        os.environ |= {"DRY_RUN": "1", "IPYTHONDIR": str(tmp_path)}
        os.chdir(NOTEBOOK.parent)
        forked.forget(*forked.OURS)
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
        shell = InteractiveShell.instance()
        for number, cell in enumerate(code):
            ran = shell.run_cell(cell.source)
            ran.raise_error()
            print("shown", *shell.display_formatter.format(ran.result)[0])
            if number == 0:  # drawing would take longest; test_tool_pictures.py looks at figures
                importlib.import_module("plots").png = lambda _: PIXEL

    ended = forked.run(work)
    assert ended.status == 0, ended.err
    shown = [line for line in ended.out.splitlines() if line.startswith("shown ")]
    assert sum("image/png" in line for line in shown) == 6
