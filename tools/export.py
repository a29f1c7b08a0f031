"""Trained networks as .onnx files, in float32 and in 8-bit integers, checked and measured.

    pip install -r requirements-export.txt
    python -m tools.export output/reference/model_3     # model_3.onnx, model_3_int8.onnx, a table
    python -m tools.export model_1 model_2 model_3      # several, in one table and picture
    python -m tools.export weights.pt --model my_net.py

The files take pixels as any image library gives them, uint8 (N, 32, 32, 3), RGB, and give
probabilities, float32 (N, 10): normalisation and softmax are inside. docs/export.md tells how to
use them without PyTorch.
"""

import argparse
import functools
import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn

import cifar10
import cli
import networks
import plots
import runs
import utils
from support import provenance
from tools import evaluate
from tools.exported import Exported, needed

METHODS = ("MinMax", "Entropy", "Percentile")
COMPARED = 1000  # images, whose answers are compared with PyTorch's
TOLERANCE = 1e-4  # of a probability, in float32
MANY = 100  # images at once, for the throughput
ROUNDS, SECONDS = 7, 0.15  # of each way, in turns
KINDS = ("float32", "int8")
SUFFIXES = {"float32": "", "int8": "_int8"}


def name_of(trained: networks.Trained) -> str:
    """The files' name: that of the committed run, else of the model file."""
    folder = trained.file.resolve().parent
    return folder.name if folder.parent == networks.REFERENCE else trained.source.name


def calibration_images(trained: networks.Trained, data: cifar10.CIFAR10, count: int) -> np.ndarray:
    """Training images that the activations' ranges come from, uint8 (count, 32, 32, 3).

    Drawn with seed 0 out of those that the network was trained on.
    """
    images, held_out = data.train_images, trained.settings.get("val_split")
    if held_out:
        images = images[utils.validation_split(len(images), held_out)[0]]
    return images[np.random.default_rng(0).permutation(len(images))[:count]]


def normalised(images: np.ndarray, mean: utils.RGB, std: utils.RGB) -> torch.Tensor:
    """What the network itself takes, float32 (N, 3, 32, 32)."""
    transform = utils.test_transform(mean, std)
    return torch.stack([transform(image=image)["image"] for image in images])


def difference(exported: Exported, network: nn.Module, images: np.ndarray, *stats) -> float:
    """The largest difference of a probability from PyTorch's, on uint8 images (N, 32, 32, 3)."""
    parts = normalised(images, *stats).split(MANY)
    with torch.inference_mode():
        wanted = torch.cat([network(part) for part in parts]).softmax(dim=1)
    return float(np.abs(exported(images) - wanted.numpy()).max())


def milliseconds(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The time of one call of each way: the median of ROUNDS, taken in turns."""
    found = [[] for _ in ways]
    for turn in range(ROUNDS + 1):
        for way, times in zip(ways, found, strict=True):
            calls, started = 0, time.perf_counter()
            while calls < 3 or time.perf_counter() - started < SECONDS:
                way()
                calls += 1
            if turn:  # the first is for warming up
                times.append(1000 * (time.perf_counter() - started) / calls)
    return [float(np.median(times)) for times in found]


def measure(network: nn.Module, contents: Sequence[bytes], images: np.ndarray) -> list[tuple]:
    """Latency (ms) and throughput (images a second) of PyTorch and of each file, on one thread.

    PyTorch gets images that have been normalised, and gives logits: less work than the files do.
    """
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        sessions = [Exported(content, threads=1) for content in contents]
        with torch.inference_mode():
            for batch in (images[:1], images[:MANY]):
                tensor = torch.randn(len(batch), 3, 32, 32)
                ways = [functools.partial(network, tensor)]
                ways += [functools.partial(session, batch) for session in sessions]
                found.append([each / len(batch) for each in milliseconds(ways)])
    finally:
        torch.set_num_threads(threads)
    return [(latency, 1000 / each) for latency, each in zip(*found, strict=True)]


def export_one(
    trained: networks.Trained, data: cifar10.CIFAR10, args: argparse.Namespace
) -> tuple[dict[str, bytes], dict]:
    """The content of both files by KINDS, and what export.json says of them.

    Raises:
        to_onnx.ExportError: it cannot be exported, or the file answers otherwise than PyTorch.
    """
    from tools import to_onnx  # here: what it needs may not be installed

    of, images, labels = evaluate.split_of(data, args.split, trained)
    stats, network = evaluate.stats_of(trained, data), trained.network
    device = utils.Device(torch.device("cpu"))
    loader = utils.make_loader(images, labels, utils.test_transform(*stats), MANY, device)
    accuracy = utils.evaluate(network, loader, device, "PyTorch").accuracy
    calibrating = calibration_images(trained, data, args.calibration_images)
    graph = to_onnx.export(network)
    quantised = to_onnx.quantise(
        graph, normalised(calibrating, *stats).numpy(), args.calibration, args.reduce_range
    )
    about = {
        "network": trained.name,
        "model_file": trained.source.file.name,
        "parameters": trained.source.parameters,
        "classes": cifar10.CLASSES,
        "mean": stats[0],
        "std": stats[1],
        "val_split": trained.settings.get("val_split"),
        "data_sha256": trained.settings.get("data_sha256"),
        "weights_sha256": hashlib.sha256(trained.file.read_bytes()).hexdigest(),
        "commit_of_the_run": trained.settings.get("git_commit"),
        "evaluated": of,
    }
    calibration = {
        "method": args.calibration,
        "training_images": len(calibrating),
        "reduce_range": args.reduce_range,
    }
    contents, results = {}, {"PyTorch": {"accuracy": accuracy}}
    for kind, part in zip(KINDS, (graph, quantised), strict=True):
        whole = to_onnx.complete(part, *stats)
        exported = Exported(to_onnx.with_metadata(whole, about))
        apart = difference(exported, network, images[:COMPARED], *stats)
        if kind == "float32" and not apart <= TOLERANCE:
            raise to_onnx.ExportError(
                f"{trained.name} answers otherwise as an .onnx file: a probability differs by "
                f"{apart:.2g} on the first {COMPARED} images of the {of}; nothing was written"
            )
        answers = exported(images, kind)
        accuracy = 100 * float((answers.argmax(axis=1) == labels).mean())
        more = {"accuracy": accuracy, "quantised": calibration if kind == "int8" else None}
        contents[kind] = to_onnx.with_metadata(whole, about | more)
        results[kind] = {"bytes": len(contents[kind]), "largest_difference": apart} | more
    speeds = measure(network, list(contents.values()), images)
    for row, (latency, throughput) in zip(results.values(), speeds, strict=True):
        row |= {"milliseconds_for_one": latency, "images_a_second": throughput}
    return contents, about | {"results": results}


def table(exported: dict[str, dict]) -> str:
    """The results of each network by its name, as text."""
    lines = [
        f"{'':18}{'':9}{'KiB':>8}{'accuracy':>10}{'one image':>12}{f'{MANY} at once':>14}",
    ]
    for name, network in exported.items():
        for kind, row in network["results"].items():
            size = f"{row['bytes'] / 1024:,.0f}" if "bytes" in row else ""
            lines.append(
                f"{name:18}{kind:9}{size:>8}{row['accuracy']:>8.2f} %"
                f"{row['milliseconds_for_one']:>9.2f} ms{row['images_a_second']:>10,.0f} /s"
            )
            name = ""
    return "\n".join(lines)


def picture(exported: dict[str, dict], title: str) -> bytes:
    """Accuracy against the size of the file: from float32 to int8, a line for each network."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, network in exported.items():
        rows = [network["results"][kind] for kind in KINDS]
        sizes = [row["bytes"] / 1024 for row in rows]
        accuracies = [row["accuracy"] for row in rows]
        (line,) = axes.plot(sizes, accuracies, alpha=0.5)
        for marker, *point in zip("os", sizes, accuracies, strict=True):
            axes.plot(*point, marker, color=line.get_color(), ms=8)
        middle = float(np.sqrt(np.prod(sizes))), max(accuracies)
        text = f"{name}: {accuracies[0]:.2f}, {accuracies[1]:.2f} %"
        axes.annotate(text, middle, (0, 8), textcoords="offset points", ha="center")
    for kind, marker in zip(KINDS, "os", strict=True):
        axes.plot([], [], marker, color="grey", label=kind)
    low, high = axes.get_ylim()
    axes.set(xscale="log", xlabel="size of the file (KiB)", ylabel="accuracy (%)", title=title)
    axes.set_ylim(min(low, high - 1) - 0.3, high + 0.3)  # a tenth of a point is to look like one
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    return plots.png(figure)


def export(args: argparse.Namespace) -> None:
    """Exports each network in turn; what is finished is written at once."""
    with needed():
        import onnx  # noqa: F401  (before the work, not after it)
        import onnxruntime
        import onnxscript  # noqa: F401
    every = {}
    for weights in args.weights:
        trained = networks.load_trained(weights, args.model)
        if (name := name_of(trained)) in every:
            raise cli.UsageError(f"two networks would be written as {name}.onnx; export each alone")
        every[name] = trained
    data = cli.load_data(args)
    what = next(iter(every)) if len(every) == 1 else "networks"
    with runs.Run.create(args.output_dir, f"export-{what}") as run:
        done = {}
        for name, trained in every.items():
            run.log(f"{name}: {trained.name}, {trained.source.parameters:,} parameters")
            contents, done[name] = export_one(trained, data, args)
            for kind, content in contents.items():
                run.write(f"{name}{SUFFIXES[kind]}.onnx", content)
            found = {
                "networks": done,
                "onnxruntime": onnxruntime.__version__,
                "instructions": instructions(),
            }
            run.write_json("export.json", found | provenance.environment())
        of = next(iter(done.values()))["evaluated"]
        title = f"Accuracy on the {of}, ONNX Runtime"
        run.write("export.png", picture(done, title))
        run.log(f"\n{table(done)}\n")
        run.log(f"{title}; times on one thread of {provenance.processor()}")
        run.log(f"Results: {run.folder}")


def instructions() -> list[str]:
    """This processor's, that products of 8-bit integers can use."""
    known = torch.cpu.get_capabilities()
    return sorted(name for name, there in known.items() if there is True and "vnni" in name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.export", description="Trained networks as .onnx files, float32 and int8."
    )
    add = parser.add_argument
    add("weights", nargs="+", help="a run's folder, one of ours by name, or a file of weights")
    add("--model", help="1, 2, 3 or a model file (default: what the run says)")
    add("--split", choices=("test", "val"), default="test", help="test set, or what a run held out")
    add(
        "--calibration",
        choices=METHODS,
        default="MinMax",
        help="how ranges are taken from the activations (MinMax; docs/export.md compares them)",
    )
    add(
        "--calibration-images",
        type=cli.whole_number(1, 50_000),
        default=1000,
        metavar="N",
        help="training images to take them from (1000)",
    )
    add(
        "--reduce-range",
        action="store_true",
        help="weights in 7 bits: for x86 processors without VNNI",
    )
    cli.add_data_flags(parser)
    return cli.run(parser, export, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
