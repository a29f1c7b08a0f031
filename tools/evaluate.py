"""What trained weights can do: accuracy, every class's figures, mistakes, calibration.

    python -m tools.evaluate output/reference/model_2              # a run's folder
    python -m tools.evaluate weights.pt --model 2                  # weights alone
    python -m tools.evaluate model_2_int8.onnx                     # what tools.export wrote
    python -m tools.evaluate RUN --tta                             # also with flipped images
    python -m tools.evaluate RUN --corruptions                     # what JPEG, noise, blur cost
    python -m tools.evaluate RUN --split val                       # what a --val-split run held out
    python -m tools.evaluate RUN --images FOLDER                   # FOLDER/class/*.png|jpg
    python -m tools.evaluate RUN --explain                         # also where it looks

All in float32, but for an int8 .onnx file; what --tta finds stands apart. Pictures, the
classification report and evaluation.json go to a folder of their own in --output-dir.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn import calibration, metrics

import cifar10
import cli
import networks
import plots
import reports
import runs
import utils
from fast import cpu
from support import provenance
from tools import corruptions, explain, pictures
from tools.exported import Exported

BINS = 15  # of the calibration, as Guo et al. (2017, https://arxiv.org/abs/1706.04599) take
LABELS = range(len(cifar10.CLASSES))


def split_of(data: cifar10.CIFAR10, split: str, trained: networks.Trained | Exported) -> tuple:
    """The test set, or what the run held out: its name, images uint8 (N, 32, 32, 3), labels (N,).

    Raises:
        cli.UsageError: nothing says which training images the network has not seen.
    """
    if split == "test":
        return "test set", data.test_images, data.test_labels
    held_out = trained.settings.get("val_split")
    if not held_out:
        raise cli.UsageError(
            f"{trained.file} comes from no run with --val-split: it has seen all training images"
        )
    if cifar10.digests(data) != trained.settings.get("data_sha256"):
        raise cli.UsageError(
            f"{trained.file} was trained on other images than these, so nothing says which of them "
            "it has not seen; add --dry-run if that run had it, else leave it out"
        )
    _, out = utils.validation_split(len(data.train_images), held_out)
    return f"{held_out:,} held-out images", data.train_images[out], data.train_labels[out]


def images_of(args: argparse.Namespace, trained: networks.Trained | Exported) -> tuple:
    """What is evaluated, as `split_of`; or the user's own pictures."""
    if args.images is not None:
        if args.split != "test":
            raise cli.UsageError("--images are pictures of your own; leave out --split")
        return f"pictures of {args.images}", *pictures.read_folder(args.images)
    return split_of(cli.load_data(args), args.split, trained)


def stats_of(trained: networks.Trained, data: cifar10.CIFAR10) -> tuple[utils.RGB, utils.RGB]:
    """Mean and standard deviation of the run's images, or else of all training images."""
    if trained.transform is not None:
        return trained.settings["mean"], trained.settings["std"]
    return utils.channel_stats(data.train_images)


def transform_of(trained: networks.Trained, data_dir: str, dry_run: bool = False) -> object:
    """The test transform with the stats of the run, or else of all training images there are."""
    if trained.transform is not None:
        return trained.transform
    data = cifar10.load_sample() if dry_run else cifar10.load_cifar10(data_dir)
    return utils.test_transform(*stats_of(trained, data))


def load(weights: str | Path, model: str | None) -> networks.Trained | Exported:
    """A trained network, as networks.load_trained finds it, or an .onnx file's.

    Raises:
        cli.UsageError: no such network, or it is damaged.
    """
    if Path(weights).suffix.lower() != ".onnx":
        return networks.load_trained(weights, model)
    if model is not None:
        raise cli.UsageError(f"{weights} holds its network; leave out --model")
    return Exported(Path(weights))


def answers_of(
    trained: networks.Trained | Exported,
    images: np.ndarray,
    labels: np.ndarray,
    args: argparse.Namespace,
    title: str = "test",
) -> np.ndarray:
    """The log-probability of each class, float32 (N, 10); `title` stands beside the progress.

    Raises:
        support.meter.DivergedError: the network answers with NaN.
    """
    if isinstance(trained, Exported):
        probabilities = trained(images, title)
        return np.log(probabilities.clip(np.finfo(np.float32).tiny, 1))
    device = trained.source.fitting(utils.Device.pick(args.device)).exact
    loader = utils.make_loader(images, labels, trained.transform, utils.TEST_BATCH, device)
    network = trained.network.to(device.where, memory_format=device.layout)
    logits = utils.evaluate(network, loader, device, title).logits
    return logits.log_softmax(dim=1).clamp(max=0).numpy()


def report(answers: np.ndarray, labels: np.ndarray, **options: object) -> str | dict:
    """scikit-learn's classification report of all ten classes, those without images too."""
    options |= {"target_names": cifar10.CLASSES, "digits": 4, "zero_division": 0}
    return metrics.classification_report(labels, answers.argmax(axis=1), labels=LABELS, **options)


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error, 0 to 1, of the answers' probabilities and hits, both (N,)."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, right - sure)).sum() / len(sure))


def figures(answers: np.ndarray, labels: np.ndarray) -> dict:
    """Loss in nats, top-k and calibration in percent, and the rows of `report`.

    Of log-probabilities, float32 (N, 10), and labels, int (N,).
    """
    table = report(answers, labels, output_dict=True)
    top = [metrics.top_k_accuracy_score(labels, answers, k=k, labels=LABELS) for k in (1, 3, 5)]
    error = calibration_error(np.exp(answers.max(axis=1)), answers.argmax(axis=1) == labels)
    return {
        "images": len(labels),
        **{f"top{k}": 100 * float(share) for k, share in zip((1, 3, 5), top, strict=True)},
        "loss": float(-np.take_along_axis(answers, labels[:, None], axis=1).mean()),
        "expected_calibration_error": 100 * error,
        "classes": {name: table[name] for name in cifar10.CLASSES},
        "macro": table["macro avg"],
        "weighted": table["weighted avg"],
    }


def class_metrics(classes: dict[str, dict], title: str) -> bytes:
    """Precision, recall and F1 of each class, in percent; `classes` as in `figures`."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    axes = figure.subplots()
    kinds = ("precision", "recall", "f1-score")
    heights = {kind: [100 * row[kind] for row in classes.values()] for kind in kinds}
    names = [f"{name}\n({row['support']:,.0f})" for name, row in classes.items()]
    for bars in axes.grouped_bar(heights, tick_labels=names, group_spacing=0.7).bar_containers:
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set(ylabel="%", title=f"{title} (in brackets: images)", ylim=(0, 105), axisbelow=True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=3)
    return plots.png(figure)


def reliability(sure: np.ndarray, right: np.ndarray, title: str) -> bytes:
    """Accuracy against confidence, and how many images lie where, as in `calibration_error`."""
    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    figure.suptitle(f"{title}\nExpected calibration error {calibration_error(sure, right):.2%}")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    accuracy, confidence = calibration.calibration_curve(right, sure, n_bins=BINS)
    top.plot([0, 1], [0, 100], "k--", label="as right as it is sure")
    top.plot(confidence, 100 * accuracy, "o-", color=plots.TEST, label="mean of a bin")
    top.set_ylabel("accuracy (%)")
    top.legend(loc="lower right")
    bottom.hist(sure, BINS, range=(0, 1), weights=np.full_like(sure, 100 / len(sure)), ec="white")
    bottom.set(xlabel="confidence", ylabel="images (%)", xlim=(0, 1))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    return plots.png(figure)


def draw(
    title: str, images: np.ndarray, labels: np.ndarray, answers: np.ndarray, results: dict
) -> dict[str, bytes]:
    """The pictures of an evaluation by file name; `results` as `figures` returns them."""
    sure, predictions = np.exp(answers.max(axis=1)), answers.argmax(axis=1)
    right, by_confidence = predictions == labels, np.argsort(-sure, kind="stable")
    matrix = metrics.confusion_matrix(labels, predictions, labels=LABELS)
    correct = f"{title}: {results['top1']:.2f} % correct"
    drawn = {
        "confusion_matrix.png": plots.confusion_matrix(matrix, correct),
        "class_metrics.png": class_metrics(results["classes"], title),
        "calibration.png": reliability(sure, right, title),
    }
    for name, chosen in (("mistakes", ~right), ("correct", right)):
        found = by_confidence[chosen[by_confidence]]
        rows = [column[found[:30]] for column in (images, labels, predictions, sure)]
        most = f"{title}: the most confident of {len(found):,} {name}"
        drawn[f"most_confident_{name}.png"] = plots.misclassified(*rows, most, name.capitalize())
    return drawn


def evaluate(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    cpu.keep_freed_memory()
    trained = load(args.weights, args.model)
    how = f"float32 on {utils.Device.pick(args.device)}"
    if isinstance(trained, Exported):
        if args.device is not None:
            raise cli.UsageError("ONNX Runtime computes on the CPU here; leave out --device")
        how = f"{trained.precision}, ONNX Runtime on {provenance.processor()}"
    look = explain.GradCam(trained, utils.Device.pick(args.device)) if args.explain else None
    name, images, labels = images_of(args, trained)
    if not isinstance(trained, Exported):
        trained = trained._replace(transform=transform_of(trained, args.data_dir, args.dry_run))
    title = f"{trained.name}, {name}"
    answers = answers_of(trained, images, labels, args)
    results = {"weights": str(trained.file), "of": name, **figures(answers, labels)}
    hits = int((answers.argmax(axis=1) == labels).sum())
    with runs.Run.create(args.output_dir, f"evaluate-{trained.name}") as run:
        run.log(
            f"{trained.name}, {trained.file}: {results['top1']:.2f} % of the {name} "
            f"({hits:,} of {len(labels):,}), {how}\n"
            f"top-3 {results['top3']:.2f} %, top-5 {results['top5']:.2f} %, loss "
            f"{results['loss']:.4f}, calibration error "
            f"{results['expected_calibration_error']:.2f} %"
        )
        if args.tta:
            mirrored = np.ascontiguousarray(images[:, :, ::-1])
            both = answers + answers_of(trained, mirrored, labels, args)
            results["top1_with_flip"] = 100 * float((both.argmax(axis=1) == labels).mean())
            run.log(f"with flip test-time augmentation {results['top1_with_flip']:.2f} %")
        plain = title.replace("$", r"\$")  # a folder's name, and no formula
        drawn, for_page = draw(plain, images, labels, answers, results), {}
        if args.corruptions:

            def answer(damaged: np.ndarray, title: str) -> np.ndarray:
                return answers_of(trained, damaged, labels, args, title)

            found = corruptions.measure(answer, images, labels, results["top1"])
            results["corruptions"] = found
            run.log(f"\n{corruptions.table(found)}")
            picture = corruptions.picture(found, images[0], results["top1"], title)
            for_page[corruptions.FILE] = picture
        table = report(answers, labels)
        run.log(f"\n{table}")
        run.write("classification_report.txt", table)
        run.write_json("evaluation.json", results)
        if look:
            picture = explain.of_answers(look, title, images, labels, answers, trained.transform)
            for_page[explain.FILE] = picture
        for file, picture in (drawn | for_page).items():
            run.write(file, picture)
        # A run's page shows the run's own data: of a dry run the sample, else all.
        own = args.images is None and args.dry_run == bool(trained.settings.get("dry_run"))
        if own and (told := reports.add_pictures(args.weights, for_page)):
            run.log(told)
        run.log(f"Results: {run.folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.evaluate", description="What trained weights can do.")
    add = parser.add_argument
    add("weights", type=Path, help="a run's folder, a weights.pt, a checkpoint or an .onnx")
    add("--model", help="1, 2, 3 or a model file (default: what the run says)")
    add("--split", choices=("test", "val"), default="test", help="test set, or what a run held out")
    add("--images", type=Path, metavar="FOLDER", help="your own pictures: FOLDER/class/*.png|jpg")
    add("--tta", action="store_true", help="also average each image with its mirror image")
    add("--corruptions", action="store_true", help="also damaged by JPEG, noise, blur and so on")
    add("--explain", action="store_true", help="also show where the network looks (Grad-CAM)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    cli.add_data_flags(parser)
    return cli.run(parser, evaluate, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
