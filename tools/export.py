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
import copy
import functools
import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from tqdm import tqdm

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
MUCH = 1.0  # points lost in int8
KINDS = ("float32", "int8")
SUFFIXES = {"float32": "", "int8": "_int8"}


def name_of(trained: networks.Trained) -> str:
    """The files' name: that of the committed run, else of the model file."""
    folder = trained.file.resolve().parent
    return folder.name if folder.parent == networks.REFERENCE else trained.source.name


def calibration_images(trained: networks.Trained, data: cifar10.CIFAR10, count: int) -> np.ndarray:
    """Training images that the activations' ranges come from, uint8 (count, 32, 32, 3).

    Drawn with seed 0; none that the run held out of this data.
    """
    images, held_out = data.train_images, trained.settings.get("val_split")
    if held_out and cifar10.digests(data) == trained.settings.get("data_sha256"):
        images = images[utils.validation_split(len(images), held_out)[0]]
    return images[np.random.default_rng(0).permutation(len(images))[:count]]


def normalised(images: np.ndarray, mean: utils.RGB, std: utils.RGB) -> torch.Tensor:
    """What the network itself takes, float32 (N, 3, 32, 32)."""
    transform = utils.test_transform(mean, std)
    return torch.stack([transform(image=image)["image"] for image in images])


def by_pytorch(network: nn.Module, images: np.ndarray, stats: tuple) -> np.ndarray:
    """The probabilities by PyTorch in float32, (N, 10), of uint8 images (N, 32, 32, 3)."""
    batches = range(0, len(images), MANY)
    with torch.inference_mode():
        found = [
            network(normalised(images[start : start + MANY], *stats)).softmax(dim=1)
            for start in tqdm(batches, desc="PyTorch", unit="batch", leave=False, disable=None)
        ]
    return torch.cat(found).numpy()


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

    PyTorch gets images that have been normalised, and gives logits: less work than the files do;
    in the faster of its two layouts.
    """
    threads, found = torch.get_num_threads(), []
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    torch.set_num_threads(1)
    try:
        sessions = [Exported(content, threads=1) for content in contents]
        with torch.inference_mode():
            for batch in (images[:1], images[:MANY]):
                tensor = torch.randn(len(batch), 3, 32, 32)
                tensor_last = tensor.to(memory_format=torch.channels_last)
                ways = [functools.partial(network, tensor), functools.partial(last, tensor_last)]
                ways += [functools.partial(session, batch) for session in sessions]
                one, other, *files = (each / len(batch) for each in milliseconds(ways))
                found.append([min(one, other), *files])
    finally:
        torch.set_num_threads(threads)
    return [(latency, 1000 / each) for latency, each in zip(*found, strict=True)]


def accuracy_of(answers: np.ndarray, labels: np.ndarray) -> float:
    """In percent, of probabilities (N, 10) and labels (N,)."""
    return 100 * int((answers.argmax(axis=1) == labels).sum()) / len(labels)


def graphs_of(
    trained: networks.Trained, data: cifar10.CIFAR10, args: argparse.Namespace
) -> tuple[dict, str]:
    """The network's graphs by KINDS; where there is none in int8, the reason as well.

    Raises:
        to_onnx.ExportError: it cannot be exported.
    """
    from tools import to_onnx  # here: what it needs may not be installed

    images = calibration_images(trained, data, args.calibration_images)
    stats, missing = evaluate.stats_of(trained, data), ""
    graphs = {"float32": to_onnx.export(trained.network)}
    try:
        graphs["int8"] = to_onnx.quantise(
            graphs["float32"], images, *stats, args.calibration, args.reduce_range
        )
    except to_onnx.ExportError as error:
        missing = str(error)
    return {kind: to_onnx.complete(graph, *stats) for kind, graph in graphs.items()}, missing


def export_one(
    trained: networks.Trained, data: cifar10.CIFAR10, args: argparse.Namespace
) -> tuple[dict[str, bytes], dict]:
    """The content of the files by KINDS, and what export.json says of them.

    Raises:
        to_onnx.ExportError: it cannot be exported, or the file answers otherwise than PyTorch.
    """
    from tools import to_onnx

    of, images, labels = evaluate.split_of(data, args.split, trained)
    if args.dry_run:
        of = f"{len(images):,} sample images"
    stats = evaluate.stats_of(trained, data)
    try:
        graphs, missing = graphs_of(trained, data, args)
    except to_onnx.ExportError as error:
        raise to_onnx.ExportError(f"{trained.name}: {error}") from None
    wanted = by_pytorch(trained.network, images, stats)
    if not np.isfinite(wanted).all():
        raise to_onnx.ExportError(f"{trained.file} answers with NaN; nothing was exported")
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
        "training_images": len(calibration_images(trained, data, args.calibration_images)),
        "reduce_range": args.reduce_range,
    }
    contents, results = {}, {"PyTorch": {"accuracy": accuracy_of(wanted, labels)}}
    for kind, graph in graphs.items():
        answers = Exported(to_onnx.with_metadata(graph, about))(images, kind)
        apart = float(np.abs(answers - wanted)[:COMPARED].max())
        if kind == "float32" and not apart <= TOLERANCE:
            raise to_onnx.ExportError(
                f"{trained.name} answers otherwise as an .onnx file, by up to {apart:.2g} of a "
                "probability, so it was not written: it draws random numbers, or PyTorch's "
                "exporter is wrong about one of its layers; write that in other terms"
            )
        more = {
            "accuracy": accuracy_of(answers, labels),
            "quantised": calibration if kind == "int8" else None,
        }
        contents[kind] = to_onnx.with_metadata(graph, about | more)
        results[kind] = {
            "bytes": len(contents[kind]),
            "sha256": hashlib.sha256(contents[kind]).hexdigest(),
            "largest_difference": apart,
        } | more
    speeds = measure(trained.network, list(contents.values()), images)
    for row, (latency, throughput) in zip(results.values(), speeds, strict=True):
        row |= {"milliseconds_for_one": latency, "images_a_second": throughput}
    return contents, about | {"results": results, "no_int8": missing}


def warning(network: dict) -> str:
    """What a user should know of the int8 file, if anything; of what export.json says."""
    results = network["results"]
    if network["no_int8"]:
        return f"no int8 file: {network['no_int8']}"
    lost = results["float32"]["accuracy"] - results["int8"]["accuracy"]
    if lost <= MUCH:
        return ""
    return f"int8 loses {lost:.1f} points; try --calibration-images 5000, or take float32"


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
    axes, widest = figure.subplots(), 0.0
    for name, network in exported.items():
        rows = [row for kind, row in network["results"].items() if kind in KINDS]
        sizes = [row["bytes"] / 1024 for row in rows]
        accuracies = [row["accuracy"] for row in rows]
        (line,) = axes.plot(sizes, accuracies, alpha=0.5)
        for marker, *point in zip("os", sizes, accuracies, strict=False):
            axes.plot(*point, marker, color=line.get_color(), ms=8)
        text = f"{name}: {', '.join(f'{each:.2f}' for each in accuracies)} %"
        end = sizes[0], accuracies[0]
        axes.annotate(text, end, (9, 0), textcoords="offset points", va="center")
        widest = max(widest, sizes[0])
    for kind, marker in zip(KINDS, "os", strict=True):
        axes.plot([], [], marker, color="grey", label=kind)
    low, high = axes.get_ylim()
    axes.set(xscale="log", xlabel="size of the file (KiB)", ylabel="accuracy (%)", title=title)
    axes.set_ylim(min(low, high - 1) - 0.3, high + 0.3)  # a tenth of a point is to look like one
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(right=8 * widest)  # room for the text
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
        if weights.lower().endswith(".onnx"):
            raise cli.UsageError(f"{weights} is an .onnx file already; give the run that it is of")
        trained = networks.load_trained(weights, args.model)
        if (name := name_of(trained)) in every:
            raise cli.UsageError(f"two networks would be written as {name}.onnx; export each alone")
        every[name] = trained
    data = cli.load_data(args)
    for trained in every.values():
        evaluate.split_of(data, args.split, trained)  # refused before a folder is made
    what = next(iter(every)) if len(every) == 1 else "networks"
    with runs.Run.create(args.output_dir, f"export-{what}") as run:
        done = {}
        for name, trained in every.items():
            run.log(f"{name}: {trained.name}, {trained.source.parameters:,} parameters")
            contents, done[name] = export_one(trained, data, args)
            if word := warning(done[name]):
                run.log(f"{name}: {word}")
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
        default="Percentile",
        help="how activations' ranges are found (Percentile; docs/export.md compares them)",
    )
    add(
        "--calibration-images",
        type=cli.whole_number(1, 5000),
        default=1000,
        metavar="N",
        help="training images to take them from, 5000 at most (1000)",
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
