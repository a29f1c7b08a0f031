"""How fast training is, in turns with three other ways to write it, and how near the hardware.

    python -m tools.bench                      # model 2, the device that train.py would take
    python -m tools.bench --model 1 --device cpu --parts

The ways (tools/ways.py) train the same network, in the batches of its recipe:

- usual: tools/usual.py's textbook loop; Albumentations makes the recipe's pictures image by image,
  in a DataLoader worker for each core; float32, SGD, `.item()` every step;
- torchvision: the loop that kuangliu/pytorch-cifar made popular: the same with torchvision's crop
  and flip in two workers;
- whole_batch: the data set as one tensor on the device, as airbench has it, cropped and flipped a
  batch at a time; reduced precision, channels_last, SGD, nothing read back before the epoch's end;
- ours: what train.py does, with the recipe's optimizer (without a teacher, if it has one).

Each runs in a process started from the command line, as its user would start it, so that workers
start as they would for him. An epoch counts whole; the seconds until its first batch was there are
given apart, too. Then: the share of the device's own matrix-product rate that ours reaches; the
standard transform alone, on one core; and with --parts what each part of ours is worth, by leaving
it out. The images are those of data/sample, repeated: speed does not depend on them.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cli
import networks
import plots
import runs
import utils
from fast.batched import A, BatchedTransform, UnknownTransformError
from networks import Network
from tools.ways import PARTS, WAYS, ours, repeated_sample

FEWEST_IMAGES, WARM_UP_BATCHES = 256, 4
TRANSFORM_IMAGES = 1000
MATRIX_SIDE = 2048


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of repetitions."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; the CPU has nothing outstanding."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def timed(device: torch.device, function: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------- the hardware, the transform


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of the product of two square matrices, as fast as the device's library has it."""
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype)

    def products(count: int) -> None:
        for _ in range(count):
            a @ b

    products(2)  # warm-up
    count = max(3, int(0.5 / timed(device, products, 1)))  # half a second of them
    return 2 * MATRIX_SIDE**3 * count / timed(device, products, count) / 1e9


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
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    batches, generator = batches.split(batch_size), torch.Generator(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {}
    for name in ("p=1", "own p"):
        compose = utils.train_transform(*utils.channel_stats(images))
        for step in compose.transforms:
            if name == "p=1" and isinstance(step, A.Affine | A.CoarseDropout):
                step.p = 1.0
        ways = {"albumentations": lambda c=compose: [c(image=image) for image in images]}
        with contextlib.suppress(UnknownTransformError):  # of somebody's own edit
            batched = BatchedTransform.from_compose(compose)
            ways["batched"] = lambda b=batched: [b(batch, generator) for batch in batches]
        seconds = [{way: timed(device, ways[way]) for way in ways} for _ in range(repetitions + 1)]
        results[name] = {
            way: spread([1e6 * turn[way] / len(images) for turn in seconds[1:]]) for way in ways
        }
    torch.set_num_threads(threads)
    return results


# ---------------------------------------------------------------- the processes


class TimedLoader:
    """A loader that notes the seconds until its first batch is there, as `start_seconds`."""

    def __init__(self, loader: object, device: torch.device) -> None:
        self.loader, self.dataset, self.device = loader, loader.dataset, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = time.perf_counter()
        batches = iter(self.loader)
        first = next(batches)
        synchronize(self.device)
        self.start_seconds = time.perf_counter() - start
        yield first
        yield from batches


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: reads numbers of images, answers each with an epoch's figures."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a model file may print
    kind, device = args.way, utils.pick_device(args.device)
    network = networks.load_network(args.model)
    way = WAYS[kind](network, device) if kind in WAYS else ours(network, device, kind)
    load = functools.cache(way.load)  # a training makes its loader once
    for line in sys.stdin:
        loader = TimedLoader(load(int(line)), device)
        speed = int(line) / timed(device, way.epoch, loader)
        answer = {"images_per_second": speed, "start_seconds": loader.start_seconds}
        if kind == "ours":
            answer["matmul_gflops"] = matmul_gflops(device, network.precision(device).dtype)
        print(json.dumps(answer), file=answers, flush=True)


class Measured:
    """A process that measures one of WAYS, or ours without one of PARTS."""

    def __init__(self, kind: str, network: Network, device: torch.device) -> None:
        self.kind = kind
        command = [sys.executable, "-m", "tools.bench", "--way", kind]
        self.process = subprocess.Popen(
            [*command, "--model", str(network.file), "--device", str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=utils.HERE,
            process_group=0,  # Ctrl-C reaches the asking process alone, which ends them all
        )

    def epoch(self, count: int) -> dict[str, float]:
        """The figures of an epoch of so many images, as `serve` answers.

        Raises:
            OSError: the process has ended.
        """
        try:
            print(count, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):  # ValueError: no answer, or half of one
            message = f"the process that measures {self.kind!r} ended; its error is above"
            raise OSError(message) from None

    def end(self) -> None:
        """Ends it and its workers."""
        with contextlib.suppress(OSError, AttributeError):  # Windows has no process groups
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def measure(
    kinds: list[str], network: Network, device: torch.device, images: int, turns: int
) -> list[dict[str, dict[str, float]]]:
    """For each turn, the figures of an epoch of each kind.

    Raises:
        OSError: a process ended before its time.
    """
    size = network.recipe.batch_size
    warm_up = min(images, WARM_UP_BATCHES * size + images % size)  # the last batch's size, too
    ways: list[Measured] = []
    try:
        for kind in kinds:
            ways.append(Measured(kind, network, device))
        for way in ways:
            way.epoch(warm_up)
        return [{way.kind: way.epoch(images) for way in ways} for _ in range(turns)]
    finally:
        for way in ways:
            way.end()


# ---------------------------------------------------------------- the report


def figures(turns: list[dict[str, dict[str, float]]], mflop: float) -> dict:
    """What bench.json holds of the turns that `measure` returns; ratios are taken in each turn."""

    def value(name: str, kind: str) -> dict[str, float]:
        return spread([turn[kind][name] for turn in turns])

    def times(kind: str) -> dict[str, float]:
        name = "images_per_second"
        return spread([turn["ours"][name] / turn[kind][name] for turn in turns])

    rates = [(turn["ours"]["images_per_second"], turn["ours"]["matmul_gflops"]) for turn in turns]
    results = {
        "images_per_second": {way: value("images_per_second", way) for way in WAYS},
        "start_seconds": {way: value("start_seconds", way) for way in WAYS},
        "times_faster": {way: times(way) for way in WAYS if way != "ours"},
        "matmul_gflops": value("matmul_gflops", "ours"),
        "mflop_per_image": mflop,
        "share_percent": spread([100 * speed * mflop / (1e3 * most) for speed, most in rates]),
    }
    if parts := [kind for kind in turns[0] if kind in PARTS]:
        results["parts"] = {part: times(part) for part in parts}
    return results


def report(results: dict) -> str:
    """The tables as text."""

    def line(name: str, values: dict, digits: int, unit: str = "") -> str:
        median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "min", "max"))
        return f"   {name:<22}{median:>9}  ({low} to {high}){unit}"

    lines = [f"Training, an epoch of {results['images']:,}, images/s: median (least to greatest)"]
    for way, values in results["images_per_second"].items():
        start = results["start_seconds"][way]["median"]
        lines.append(line(way, values, 0, f", first batch after {start:.2f} s"))
    lines.append("Times faster is ours than")
    lines += [line(way, values, 2) for way, values in results["times_faster"].items()]
    lines.append(f"A training step takes {results['mflop_per_image']:,.1f} MFLOP an image; GFLOP/s")
    lines.append(line("product of matrices", results["matmul_gflops"], 0))
    lines.append(line("of which ours reaches", results["share_percent"], 1, " %"))
    lines.append("Standard transform alone, one core (batched: that or the GPU), µs an image")
    for rate, ways in results["transform"].items():
        lines += [line(f"{way}, {rate}", values, 1) for way, values in ways.items()]
    if "parts" in results:
        lines.append("Times faster is ours with each part than without it")
        lines += [line(part, values, 2) for part, values in results["parts"].items()]
    return "\n".join(lines)


def bench(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the folder.

    Raises:
        cli.UsageError, utils.DeviceError: no such network or device.
        OSError: a measured process ended, or the folder cannot be written.
    """
    device = utils.pick_device(args.device)
    network = networks.load_network(args.model)
    images = args.images
    title = f"{network.build.__name__} on {utils.describe(device)}"
    with runs.Run.create(args.output_dir, f"bench-{network.name}") as run, runs.Interrupts():
        run.log(f"{title}, medians of {args.repetitions}")
        kinds = [*WAYS, *PARTS] if args.parts else list(WAYS)
        turns = measure(kinds, network, device, images, args.repetitions)
        results = {
            "network": network.build.__name__,
            "device": utils.describe(device),
            "precision": str(network.precision(device).dtype),
            "batch_size": network.recipe.batch_size,
            "images": images,
            "repetitions": args.repetitions,
            **figures(turns, mflop_per_image(network)),
            "transform": bench_transform(device, network.recipe.batch_size, args.repetitions),
            **runs.environment(),
        }
        run.log(report(results))
        run.write_json("bench.json", results)
        run.write("bench.png", plots.bench(results, title))
        run.log(f"Results: {run.folder}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.bench", description="Measure the speed of training.")
    add = parser.add_argument
    add("--model", default="2", help="1, 2, 3 or a model file (2)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    count = cli.whole_number(FEWEST_IMAGES)
    # All of CIFAR-10's: epochs of 10,000 cost the first two ways up to a quarter of their speed.
    add("--images", type=count, default=50_000, help="in an epoch (50000)")
    add("--repetitions", type=cli.whole_number(1, 100), default=3, help="of each figure (3)")
    add("--parts", action="store_true", help="measure what each part of ours is worth, too")
    add("--output-dir", default="output", help="where the folder of the results is made (output)")
    add("--way", choices=(*WAYS, *PARTS), help=argparse.SUPPRESS)  # this is a measured process
    return cli.run(parser, lambda args: (serve if args.way else bench)(args), arguments)


if __name__ == "__main__":
    sys.exit(main())
