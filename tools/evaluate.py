"""What trained weights can do: accuracy, every class's figures, mistakes, calibration.

    python -m tools.evaluate output/reference/model_2              # a run's folder
    python -m tools.evaluate weights.pt --model 2                  # weights alone
    python -m tools.evaluate RUN --tta                             # also with flipped images
    python -m tools.evaluate RUN --split val                       # what a --val-split run held out
    python -m tools.evaluate RUN --images FOLDER                   # FOLDER/class/*.png|jpg

All in float32. The accuracy is without test-time augmentation; with it stands apart. Pictures, the
classification report and evaluation.json go to a folder of their own in --output-dir.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn import metrics
from torch import nn

import cifar10
import cli
import networks
import plots
import runs
import utils
from tools import pictures

BINS = 15  # of the calibration, as Guo et al. (2017, https://arxiv.org/abs/1706.04599) take
SHOWN = 30


class Calibration(NamedTuple):
    """Images in bins by confidence, each row float (bins,); NaN where a bin is empty."""

    confidence: np.ndarray  # mean of the bin, 0 to 1
    accuracy: np.ndarray  # of the bin, 0 to 1
    share: np.ndarray  # of all images
    error: float  # expected calibration error: |accuracy - confidence|, weighted by the share


def transform_of(trained: networks.Trained, data_dir: str) -> object:
    """The test transform with the stats that the network was trained with.

    Weights without a run are taken to have been trained on all training images.
    """
    if "mean" in trained.settings:
        return utils.test_transform(trained.settings["mean"], trained.settings["std"])
    data = cifar10.load_cifar10(data_dir)
    return utils.test_transform(*utils.channel_stats(data.train_images))


def logits_of(
    trained: networks.Trained,
    images: np.ndarray,
    labels: np.ndarray,
    transform: object,
    device: torch.device,
) -> np.ndarray:
    """What the network answers, float32 (N, 10)."""
    precision = trained.source.precision(device)._replace(dtype=torch.float32)
    loader = utils.make_loader(
        images,
        labels,
        transform,
        utils.TEST_BATCH,
        shuffle=False,
        device=device,
        precision=precision,
    )
    network = trained.network.to(device, memory_format=precision.memory_format)
    return utils.test(network, loader, device, precision).logits.numpy()


def figures(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Loss in nats, shares in percent: top-1, 3 and 5, classes, averages, calibration."""
    classes = range(logits.shape[1])
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    report = metrics.classification_report(
        labels,
        logits.argmax(axis=1),
        labels=classes,
        target_names=cifar10.CLASSES,
        output_dict=True,
        zero_division=0,
    )
    top = {
        f"top{count}": 100
        * float(metrics.top_k_accuracy_score(labels, logits, k=count, labels=classes))
        for count in (1, 3, 5)
    }
    loss = nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels).long())
    return {
        "images": len(labels),
        **top,
        "loss": loss.item(),
        "expected_calibration_error": 100 * calibration(probabilities, labels).error,
        "classes": {name: report[name] for name in cifar10.CLASSES},
        "macro": report["macro avg"],
        "weighted": report["weighted avg"],
    }


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """How often the network is right, against how sure it is, in bins of equal width.

    Args:
        probabilities: float (N, classes).
        labels: int (N,).
    """
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((sure * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, sure, minlength=bins) / counts
        accuracy = np.bincount(which, right, minlength=bins) / counts
    share = counts / len(labels)
    error = float(np.nansum(share * np.abs(accuracy - confidence)))
    return Calibration(confidence, accuracy, share, error)


def images_of(
    args: argparse.Namespace, trained: networks.Trained
) -> tuple[str, np.ndarray, np.ndarray]:
    """What is evaluated: its name, images and labels."""
    if args.images is not None:
        return f"pictures of {args.images}", *pictures.read_folder(args.images)
    data = cli.load_data(args)
    if args.split == "test":
        return "test set", data.test_images, data.test_labels
    held_out = trained.settings.get("val_split")
    if not held_out:
        raise cli.UsageError(
            f"{trained.file} comes from no run with --val-split: it has seen all training images"
        )
    if cifar10.digests(data) != trained.settings.get("data_sha256"):
        raise cli.UsageError(
            f"{trained.file} was trained on other images than these (a run with --dry-run on "
            "data/sample, all others on CIFAR-10), so nothing says which of these it has not seen; "
            "add or leave out --dry-run"
        )
    _, out = utils.validation_split(len(data.train_images), held_out)
    return f"{held_out:,} held-out images", data.train_images[out], data.train_labels[out]


def evaluate(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    trained = networks.load_trained(args.weights, args.model)
    device = utils.pick_device(args.device)
    name, images, labels = images_of(args, trained)
    transform = transform_of(trained, args.data_dir)
    started = time.perf_counter()
    logits = logits_of(trained, images, labels, transform, device)
    seconds = time.perf_counter() - started
    results = figures(logits, labels)
    hits = int((logits.argmax(axis=1) == labels).sum())
    with runs.Run.create(args.output_dir, f"evaluate-{trained.name}") as run:
        run.log(
            f"{trained.name}, {trained.file}: {results['top1']:.2f} % of the {name} "
            f"({hits:,} of {len(labels):,}), float32 on {utils.describe(device)}, {seconds:.1f} s"
        )
        run.log(
            f"top-3 {results['top3']:.2f} %, top-5 {results['top5']:.2f} %, "
            f"loss {results['loss']:.4f}, "
            f"calibration error {results['expected_calibration_error']:.2f} %"
        )
        if args.tta:
            mirrored = np.ascontiguousarray(images[:, :, ::-1])
            both = logits + logits_of(trained, mirrored, labels, transform, device)
            results["top1_with_flip"] = 100 * float((both.argmax(axis=1) == labels).mean())
            run.log(f"with flip test-time augmentation {results['top1_with_flip']:.2f} %")
        report = metrics.classification_report(
            labels,
            logits.argmax(axis=1),
            labels=range(len(cifar10.CLASSES)),
            target_names=cifar10.CLASSES,
            digits=4,
            zero_division=0,
        )
        run.log(f"\n{report}")
        run.write("classification_report.txt", report)
        run.write_json("evaluation.json", {"weights": str(trained.file), "of": name, **results})
        draw(run, f"{trained.name}, {name}", images, labels, logits, results)
        run.log(f"Results: {run.folder}")


def draw(
    run: runs.Run,
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    results: dict,
) -> None:
    """The pictures of an evaluation."""
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    sure, predictions = probabilities.max(axis=1), probabilities.argmax(axis=1)
    classes = cifar10.CLASSES
    matrix = metrics.confusion_matrix(labels, predictions, labels=range(len(classes)))
    run.write(
        "confusion_matrix.png",
        plots.confusion_matrix(matrix, classes, f"{title}: {results['top1']:.2f} % correct"),
    )
    run.write("class_metrics.png", plots.class_metrics(results["classes"], title))
    run.write("calibration.png", plots.reliability(calibration(probabilities, labels), title))
    for name, chosen in (("mistakes", predictions != labels), ("correct", predictions == labels)):
        found = np.flatnonzero(chosen)
        shown = found[np.argsort(-sure[found], kind="stable")][:SHOWN]
        what = "mistakes" if name == "mistakes" else "correct answers"
        run.write(
            f"most_confident_{name}.png",
            plots.misclassified(
                images[shown],
                labels[shown],
                predictions[shown],
                sure[shown],
                classes,
                f"{title}: the {len(shown)} most confident of {len(found):,} {what}",
            ),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.evaluate", description="Accuracy, classes, mistakes and calibration of weights."
    )
    add = parser.add_argument
    add("weights", type=Path, help="a run's folder, a weights.pt or a checkpoint")
    add("--model", help="1, 2, 3 or a model file (default: what the run says)")
    add("--split", choices=("test", "val"), default="test", help="test set, or what a run held out")
    add(
        "--images", type=Path, metavar="FOLDER", help="pictures of your own: FOLDER/class/*.png|jpg"
    )
    add("--tta", action="store_true", help="also average each image with its mirror image")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    cli.add_data_flags(parser)
    return cli.run(parser, evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
