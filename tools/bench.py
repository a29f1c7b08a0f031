"""How fast training is, in turns with three other ways to write it, and how near the hardware.

    python -m tools.bench                      # model 2, the device that train.py would take
    python -m tools.bench --model 1 --device cpu --parts

tools/ways.py holds the ways, which train the same network in the batches of its recipe. Each epoch
runs in a process of its own, started from the command line as its user would start it, after a few
batches to warm up. It counts whole; the seconds until a first batch is there are given apart, too.
Then: the share of the device's own matrix-product rate that ours reaches; the operations that a
step of ours launches on a GPU, counted without one; the standard transform alone, on one core; and
with --parts what each part of ours is worth, by leaving it out. The images are those of
data/sample, repeated: speed does not depend on them.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import cli
import networks
import plots
import runs
import utils
from fast.batched import BatchedTransform, UnknownTransformError
from networks import Network
from support import launches, provenance
from support.files import HERE
from tools.ways import KINDS, PARTS, WAYS, repeated_sample

FEWEST_IMAGES, WARM_UP_BATCHES = 256, 4
TRANSFORM_IMAGES = 1000
MATRIX_SIDE = 2048


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of repetitions."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def now() -> float:
    """Seconds, once a GPU has done what it was asked for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = now()
    function()
    return now() - start


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of the product of two square matrices, as fast as the device's library has it."""
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype)
    products = timeit.Timer("a @ b", setup="a @ b", timer=now, globals={"a": a, "b": b})
    count, seconds = products.autorange()
    return 2 * MATRIX_SIDE**3 * count / seconds / 1e9


def mflop_per_image(network: Network) -> float:
    """Of a training step, forward and backward, by PyTorch's count: 2 for a multiply and add.

    Counted on the plain network: the faster layers of `cpu` do more arithmetic than they stand
    for, which would look like speed.
    """
    with FlopCounterMode(display=False) as counter:
        logits = network.build().train()(torch.zeros(2, 3, 32, 32))
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    return counter.get_total_flops() / 2 / 1e6


def bench_transform(device: torch.device, batch_size: int, repetitions: int) -> dict:
    """Microseconds an image on one core (the batched form on a GPU: on that GPU)."""
    images, _ = repeated_sample(TRANSFORM_IMAGES)
    planar = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    batches, generator = planar.split(batch_size), torch.Generator(device)
    threads, results = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for rate, probability in (("p=1", [1.0]), ("own p", [])):
        compose = utils.train_transform(*utils.channel_stats(images), *probability)
        forms = {"albumentations": lambda c=compose: [c(image=image) for image in images]}
        with contextlib.suppress(UnknownTransformError):  # of somebody's own edit
            batched = BatchedTransform.from_compose(compose)
            forms["batched"] = lambda b=batched: [b(batch, generator) for batch in batches]
        results[rate] = {}
        for form, run in forms.items():
            _, *turns = [1e6 * timed(run) / len(images) for _ in range(repetitions + 1)]
            results[rate][form] = spread(turns)
    torch.set_num_threads(threads)
    return results


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: prints an epoch's figures as JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a model file may print
    network = networks.load_network(args.model)
    device = network.fitting(utils.Device.pick(args.device))
    way, size, count = KINDS[args.way], network.recipe.batch_size, args.images
    # The last batch's size is warmed up, too.
    _, epoch = way(network, device, min(count, WARM_UP_BATCHES * size + count % size))
    epoch()
    loader, _ = way(network, device, count)
    first = timed(lambda: next(iter(loader)))
    _, epoch = way(network, device, count)
    answer = {"images_per_second": count / timed(epoch), "start_seconds": first}
    if args.way == "ours":
        answer["matmul_gflops"] = matmul_gflops(device.where, device.dtype)
    print(json.dumps(answer), file=answers)


def measure(kind: str, network: Network, device: utils.Device, images: int) -> dict[str, float]:
    """What `serve` prints of an epoch of one of WAYS, or of ours without one of PARTS.

    Raises:
        OSError: the process ended before its time.
    """
    command = [sys.executable, "-m", "tools.bench", "--way", kind, "--images", str(images)]
    command += ["--model", str(network.file), "--device", str(device.where)]
    # In a group of its own: Ctrl-C reaches this process alone, which ends the other, workers too.
    options = {"stdout": subprocess.PIPE, "cwd": HERE, "process_group": 0}
    with subprocess.Popen(command, **options) as process:
        try:
            return json.loads(process.communicate()[0])
        except ValueError:  # no answer, or half of one
            message = f"the process that measures {kind!r} ended; its error is above"
            raise OSError(message) from None
        finally:
            with contextlib.suppress(OSError, AttributeError):  # Windows has no process groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()


def figures(turns: list[dict[str, dict[str, float]]], mflop: float) -> dict:
    """What bench.json holds of the turns' figures by kind; ratios are taken in each turn."""
    speed, ours = "images_per_second", [turn["ours"] for turn in turns]

    def times_faster(kind: str) -> dict[str, float]:
        return spread([turn["ours"][speed] / turn[kind][speed] for turn in turns])

    parts = {part: times_faster(part) for part in PARTS if part in turns[0]}
    share = [turn[speed] * mflop / turn["matmul_gflops"] / 10 for turn in ours]
    results = {
        name: {way: spread([turn[way][name] for turn in turns]) for way in WAYS}
        for name in (speed, "start_seconds")
    }
    return results | {
        "times_faster": {way: times_faster(way) for way in WAYS if way != "ours"},
        "matmul_gflops": spread([turn["matmul_gflops"] for turn in ours]),
        "mflop_per_image": mflop,
        "share_percent": spread(share),
        **({"parts": parts} if parts else {}),
    }


def tables(results: dict) -> list[tuple[str, int, dict[str, dict[str, float]]]]:
    """Of bench.json: a title, the digits after the point, and the rows of each table."""
    speeds, mflop = results["images_per_second"], results["mflop_per_image"]
    ours = {key: value * mflop / 1e3 for key, value in speeds["ours"].items()}
    rates = {"product of matrices": results["matmul_gflops"], "training, ours": ours}
    found = [
        (f"Training, epochs of {results['images']:,}: images/s", 0, speeds),
        ("Until the first batch is there: s", 2, results["start_seconds"]),
        ("Ours is faster than: times", 2, results["times_faster"]),
        (f"Rate, at {mflop:,.1f} MFLOP an image: GFLOP/s", 0, rates),
        ("Share of the matrix product's rate: %", 1, {"ours": results["share_percent"]}),
    ]
    for rate, forms in results["transform"].items():
        title = f"Standard transform alone, {rate}: µs an image on one core (batched: or the GPU)"
        found.append((title, 1, forms))
    if "parts" in results:
        found.append(("Ours is faster than without its: times", 2, results["parts"]))
    return found


def report(results: dict) -> str:
    """The tables as text."""
    lines = []
    for title, digits, rows in tables(results):
        lines.append(title)
        for name, row in rows.items():
            median, low, high = (f"{row[key]:,.{digits}f}" for key in ("median", "min", "max"))
            lines.append(f"   {name:<22}{median:>9}  ({low} to {high})")
    counts = results.get("launches", {})  # none in older files
    if counts:
        lines.append(f"Operations that a step of {results['batch_size']:,} launches on a GPU")
        for part, count in (counts | {"together": sum(counts.values())}).items():
            lines.append(f"   {part:<22}{count:>9,.0f}")
    return "\n".join(lines)


def picture(results: dict, title: str) -> bytes:
    """The tables as bars: medians, with whiskers from least to greatest."""
    figure = Figure(figsize=(18, 9), layout="constrained")
    figure.suptitle(title)
    for place, (heading, digits, rows) in enumerate(tables(results), 1):
        axes = figure.add_subplot(2, 4, place)
        names = [name.replace(" ", "\n").replace("_", "\n") for name in rows]
        colors = [plots.TEST if "ours" in name else plots.TRAIN for name in rows]
        plots.bars(axes, names, list(rows.values()), f"{{:,.{digits}f}}", 0.7, color=colors)
        axes.set_title(heading.replace(": ", "\n", 1))
        axes.margins(x=0.3 / len(rows), y=0.12)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    return plots.png(figure)


def bench(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the folder.

    Raises:
        cli.UsageError, utils.DeviceError: no such network or device.
        OSError: a measured process ended, or the folder cannot be written.
    """
    network = networks.load_network(args.model)
    device = network.fitting(utils.Device.pick(args.device))
    title = f"{network.build.__name__} on {device}"
    with runs.Run.create(args.output_dir, f"bench-{network.name}") as run:
        run.log(f"{title}, medians of {args.repetitions} (least to greatest)")
        turns = [
            {kind: measure(kind, network, device, args.images) for kind in kinds}
            for kinds in [KINDS if args.parts else WAYS] * args.repetitions
        ]
        size = network.recipe.batch_size
        results = {
            "network": network.build.__name__,
            "device": str(device),
            "precision": str(device.dtype),
            "batch_size": size,
            "images": args.images,
            "repetitions": args.repetitions,
            **figures(turns, mflop_per_image(network)),
            "transform": bench_transform(device.where, size, args.repetitions),
            "launches": launches.of_a_step(network),
            **provenance.environment(),
        }
        run.log(report(results))
        run.write_json("bench.json", results)
        run.write("bench.png", picture(results, title))
        run.log(f"Results: {run.folder}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.bench", description="Measure the speed of training.")
    add = parser.add_argument
    add("--model", default="2", help="1, 2, 3 or a model file (2)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    count = cli.whole_number(FEWEST_IMAGES, 1_000_000)  # 3 GB
    add("--images", type=count, default=50_000, help="in an epoch (50000)")
    add("--repetitions", type=cli.whole_number(1, 100), default=3, help="of each figure (3)")
    add("--parts", action="store_true", help="measure what each part of ours is worth, too")
    add("--output-dir", default="output", help="where the folder of the results is made (output)")
    add("--way", choices=KINDS, help=argparse.SUPPRESS)  # this is a measured process
    return cli.run(parser, lambda args: (serve if args.way else bench)(args), arguments)


if __name__ == "__main__":
    sys.exit(main())
