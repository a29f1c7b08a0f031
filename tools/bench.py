"""How fast it is, and against what: every figure a median of repetitions in one run.

    python -m tools.bench                      # model 2, the device that train.py would take
    python -m tools.bench --model 1 --device cpu

The tables are printed, and saved as JSON and as a picture in a folder of the run's own:

1. the standard transform alone, on one core: Albumentations image by image, ours for whole
   batches, and the bare OpenCV calls as a floor; with Affine and CoarseDropout always applied and
   as often as the pipeline itself says;
2. an epoch of training end to end against the way such repositories are usually written:
   torchvision data set, the recipe's Albumentations pipeline image by image, a DataLoader with a
   worker for each core, float32, contiguous, the recipe's optimizer (SGD where that is Muon),
   `.item()` every step;
3. our epoch against its own limit: the same steps on one batch that lies ready on the device;
4. how time and memory grow with batch and data set, evaluation speed, latency of one image;
5. with --parts: what each part of ours is worth, by leaving it out (some minutes more).

What is compared runs in processes of its own, in turns, so that none inherits another's memory
settings. The images are those of data/sample, repeated: speed does not depend on them.
"""

import contextlib
import copy
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import VisionDataset

import cifar10
import cli
import cpu
import networks
import plots
import recipes
import runs
import train
import utils
from batched import BatchedTransform

TRANSFORM_IMAGES = 1000
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
FEWEST_IMAGES, WARM_UP_IMAGES = 256, 1024


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of repetitions."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(device: torch.device, function: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; the CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def repeated_sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images and labels: the sample, over and over."""
    sample = cifar10.load_sample()
    index = np.arange(count) % len(sample.train_images)
    return sample.train_images[index], sample.train_labels[index]


# ---------------------------------------------------------------- 1. the transform alone


def bench_transform(device: torch.device, batch_size: int, repetitions: int) -> dict:
    """Microseconds an image on one core (the batched form on a GPU: on that GPU)."""
    images, _ = repeated_sample(TRANSFORM_IMAGES)
    mean, std = utils.channel_stats(images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    planar = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    generator = torch.Generator(device)
    results = {}
    for name, always in (("p=1", True), ("own p", False)):
        compose = utils.train_transform(mean, std)
        if always:
            for step in compose.transforms:
                if isinstance(step, A.Affine | A.CoarseDropout):
                    step.p = 1.0
        batched = BatchedTransform.from_compose(compose)
        ways = {
            "albumentations": per_image(compose, images),
            "batched": lambda batched=batched: [
                batched(batch, generator) for batch in planar.split(batch_size)
            ],
            "opencv": bare_opencv(compose, images),
        }
        seconds = {way: [] for way in ways}
        for way, function in ways.items():
            where = device if way == "batched" else torch.device("cpu")
            timed(where, function)  # warm-up
            seconds[way] = [timed(where, function) for _ in range(repetitions)]
        results[name] = {
            way: spread([1e6 * value / len(images) for value in values])
            for way, values in seconds.items()
        }
    torch.set_num_threads(threads)
    return results


def per_image(compose: A.Compose, images: np.ndarray) -> Callable[[], object]:
    """Albumentations as a data set calls it."""
    return lambda: [compose(image=image) for image in images]


def bare_opencv(compose: A.Compose, images: np.ndarray) -> Callable[[], object]:
    """The same pixels' work in direct calls, with draws made before; without Normalize."""
    generator = np.random.default_rng(0)
    count = len(images)
    rates = {type(step).__name__: step.p for step in compose.transforms}
    (affine,) = [step for step in compose.transforms if isinstance(step, A.Affine)]
    flips, moves, holes = (
        (generator.random(count) < rates[name]).tolist()
        for name in ("HorizontalFlip", "Affine", "CoarseDropout")
    )
    shape = {"shape": images.shape[1:]}
    matrices = [affine.get_params_dependent_on_data(shape, {})["matrix"][:2] for _ in images]
    corners = generator.integers(0, 17, (count, 2)).tolist()

    def work() -> None:
        for image, flip, move, matrix, hole, (x, y) in zip(
            images, flips, moves, matrices, holes, corners, strict=True
        ):
            output = cv2.flip(image, 1) if flip else image
            if move:
                output = cv2.warpAffine(output, matrix, (32, 32), borderValue=affine.fill)
            if hole:
                output = output if flip or move else output.copy()
                output[y : y + 16, x : x + 16] = affine.fill

    return work


# ---------------------------------------------------------------- 2. and 3. an epoch


class UsualDataset(VisionDataset):
    """Item by item as torchvision's CIFAR10: from array to PIL image, array and tensor."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: A.Compose) -> None:
        super().__init__(root="")
        self.data, self.targets, self.augment = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.data[index])
        return self.augment(image=np.array(image))["image"], self.targets[index]


def usual_epoch(model_choice: str, device: torch.device) -> Callable[[int], None]:
    """Builds the usual training; the result runs an epoch of so many images."""
    network = networks.load_network(model_choice)
    mean, std = utils.channel_stats(cifar10.load_sample().train_images)
    model = network.build().to(device)
    recipe = network.recipe
    transform = recipe.train_transform(mean, std, train.DEFAULT_EPOCHS)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3 * recipe.lr)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), 1e-3 * recipe.lr, momentum=recipe.momentum, nesterov=True
        )

    def epoch(count: int) -> None:
        loader = DataLoader(
            UsualDataset(*repeated_sample(count), transform),
            batch_size=recipe.batch_size,
            shuffle=True,
            num_workers=utils.default_workers(),
            pin_memory=device.type == "cuda",
        )
        model.train()
        correct = total = 0
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            loss.item()
            correct += (outputs.argmax(dim=1) == targets).sum().item()
            total += len(targets)

    return epoch


class ReadyLoader:
    """The same augmented batch, lying on the device, as often as an epoch has batches."""

    def __init__(self, loader: utils.BatchedLoader) -> None:
        self.batch = next(iter(loader))
        self.dataset = loader.dataset
        self.steps = len(loader)

    def __iter__(self):
        size, left = len(self.batch[1]), len(self.dataset)
        for _ in range(self.steps):
            yield tuple(tensor[: min(size, left)] for tensor in self.batch)
            left -= size


class Ours:
    """Our training of a network, as train.py assembles it, on data sets of any size.

    `without` leaves one of PARTS out; "not compiled" compiles, which train.py does if asked.
    """

    def __init__(self, model_choice: str, device: torch.device, without: str = "") -> None:
        network = networks.load_network(model_choice)
        self.recipe, self.device, self.without = network.recipe, device, without
        self.precision = utils.pick_precision(device)
        if without == "reduced precision":
            self.precision = self.precision._replace(dtype=torch.float32)
        if without == "channels_last":
            self.precision = self.precision._replace(memory_format=torch.contiguous_format)
        model = network.build().to(device, memory_format=self.precision.memory_format)
        recipes.scale_dropout(model, self.recipe.dropout)
        if device.type == "cpu" and without != "kept memory":
            cpu.keep_freed_memory()
        if device.type == "cpu" and without != "faster layers":
            cpu.speed_up(model)
        torch.backends.cudnn.benchmark = True
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.recipe.label_smoothing)
        self.optimizer = recipes.make_optimizer(model, self.recipe, self.precision.dtype)
        # A small constant rate: the time of a step does not depend on it.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1e-3)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.precision.dtype == torch.float16
        )
        self.model = torch.compile(model) if without == "not compiled" else model

    def loader(self, count: int, batch_size: int | None = None) -> utils.Loader:
        images, labels = repeated_sample(count)
        return utils.make_loader(
            images,
            labels,
            self.recipe.train_transform(*utils.channel_stats(images), train.DEFAULT_EPOCHS),
            batch_size or self.recipe.batch_size,
            shuffle=True,
            device=self.device,
            precision=self.precision,
            batched=self.without != "batched loader",
            workers=utils.default_workers(),
        )

    def train(self, loader: utils.Loader | ReadyLoader) -> None:
        utils.train(
            self.model,
            loader,
            self.criterion,
            self.optimizer,
            self.scheduler,
            self.scaler,
            self.device,
            self.precision,
        )

    def test(self, loader: utils.Loader) -> None:
        utils.test(self.model, loader, self.device, self.precision)


PARTS = (
    "batched loader",
    "reduced precision",
    "channels_last",
    "kept memory",
    "faster layers",
)


def serve(kind: str, model_choice: str, device: torch.device, pipe: Connection) -> None:
    """In a process of its own: builds one kind of training, then times an epoch at each request.

    A kind is "usual", "ours", "limit" (ours with the batch lying ready), or what Ours leaves out.
    A request is a number of images, or None to end; the answer is the seconds of the epoch.
    """
    if kind == "usual":
        epoch = usual_epoch(model_choice, device)
    else:
        ours = Ours(model_choice, device, kind)

        def epoch(loader: utils.Loader | ReadyLoader) -> None:
            ours.train(loader)

    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the asking process has gone
        while (request := pipe.recv()) is not None:
            work = request
            if kind != "usual":
                loader = ours.loader(request)
                work = ReadyLoader(loader) if kind == "limit" else loader
            pipe.send(timed(device, epoch, work))


def time_epochs(
    kinds: tuple[str, ...], model_choice: str, device: torch.device, images: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of an epoch of each kind, measured in turns, each kind in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind in kinds:
        pipes[kind], far_end = context.Pipe()
        process = context.Process(target=serve, args=(kind, model_choice, device, far_end))
        process.start()
        far_end.close()  # so that recv fails, not waits, when the process dies
        processes.append(process)

    def ask(kind: str, count: int) -> float:
        pipes[kind].send(count)
        try:
            return pipes[kind].recv()
        except EOFError:
            raise OSError(f"the process that measures {kind!r} ended; its error is above") from None

    for kind in kinds:
        ask(kind, min(images, WARM_UP_IMAGES))
    seconds = {kind: [] for kind in kinds}
    for _ in range(repetitions):
        for kind in kinds:
            seconds[kind].append(ask(kind, images))
    for kind, process in zip(kinds, processes, strict=True):
        pipes[kind].send(None)
        process.join()
    return seconds


def bench_epoch(model_choice: str, device: torch.device, images: int, repetitions: int) -> dict:
    """Images a second of the usual way, ours, and the limit of ours; and what follows."""
    seconds = time_epochs(("usual", "ours", "limit"), model_choice, device, images, repetitions)
    turns = list(zip(seconds["usual"], seconds["ours"], seconds["limit"], strict=True))
    return {
        "images": images,
        "images_per_second": {
            kind: spread([images / value for value in values]) for kind, values in seconds.items()
        },
        "times_faster": spread([usual / ours for usual, ours, _ in turns]),
        "overhead_percent": spread([100 * (ours / limit - 1) for _, ours, limit in turns]),
    }


def bench_parts(
    model_choice: str, device: torch.device, images: int, repetitions: int
) -> dict[str, dict]:
    """How many times faster ours is with each of its parts than without it."""
    kinds = ("ours", *PARTS, "not compiled")
    seconds = time_epochs(kinds, model_choice, device, images, repetitions)
    return {
        part: spread(
            [left_out / ours for left_out, ours in zip(seconds[part], seconds["ours"], strict=True)]
        )
        for part in kinds[1:]
    }


# ---------------------------------------------------------------- 4. scaling


def peak_memory(device: torch.device) -> float:
    """MiB: of the tensors on a GPU since the last reset, of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def bench_scaling(
    model_choice: str, device: torch.device, images: int, repetitions: int
) -> dict[str, list[dict]]:
    """Training by batch size and by size of the data set, evaluation by batch size, latency."""
    ours = Ours(model_choice, device)
    by_batch, by_size, evaluation = [], [], []
    for batch_size in BATCH_SIZES:  # upwards: a process's peak memory never sinks
        loader = ours.loader(min(images, 4 * max(batch_size, 256)), batch_size)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ours.train(loader)  # warm-up
        seconds = [timed(device, ours.train, loader) for _ in range(repetitions)]
        speed = spread([len(loader.dataset) / value for value in seconds])
        by_batch.append(
            {"batch_size": batch_size, "images_per_second": speed, "peak_mib": peak_memory(device)}
        )
    for count in (images // 8, images // 4, images // 2, images):
        loader = ours.loader(count)
        seconds = [timed(device, ours.train, loader) for _ in range(repetitions)]
        by_size.append({"images": count, "seconds": spread(seconds)})
    for batch_size in (100, 500, 1000, 2000):
        loader = ours.loader(min(images, 2000), batch_size)
        ours.test(loader)  # warm-up
        seconds = [timed(device, ours.test, loader) for _ in range(repetitions)]
        speed = spread([len(loader.dataset) / value for value in seconds])
        evaluation.append({"batch_size": batch_size, "images_per_second": speed})
    model = copy.deepcopy(ours.model).eval()
    image = torch.randn(1, 3, 32, 32, device=device).to(memory_format=ours.precision.memory_format)
    latency = []
    formats = {torch.float32, ours.precision.dtype}
    for dtype in sorted(formats, key=str):
        precision = ours.precision._replace(dtype=dtype)
        with torch.inference_mode(), precision.autocast(device):
            for _ in range(10):
                model(image)
            seconds = [timed(device, model, image) for _ in range(50)]
        milliseconds = spread([1e3 * value for value in seconds])
        latency.append({"precision": str(dtype), "milliseconds": milliseconds})
    return {
        "by_batch_size": by_batch,
        "by_data_set_size": by_size,
        "evaluation": evaluation,
        "latency": latency,
    }


# ---------------------------------------------------------------- the report


def report(results: dict) -> str:
    """The tables as text."""

    def figure(values: dict, digits: int = 1) -> str:
        return (
            f"{values['median']:>10,.{digits}f}  "
            f"({values['min']:,.{digits}f} to {values['max']:,.{digits}f})"
        )

    lines = ["1. Transform alone, µs an image on one core: median (least to greatest)"]
    for rate, ways in results["transform"].items():
        base = ways["albumentations"]["median"]
        for way, values in ways.items():
            lines.append(f"   {rate:<6} {way:<15}{figure(values)}  {base / values['median']:.1f}x")
    epoch = results["epoch"]
    lines.append(f"2. Training epoch of {epoch['images']:,} images, end to end, images/s")
    for way, values in epoch["images_per_second"].items():
        lines.append(f"   {way:<22}{figure(values, 0)}")
    lines.append(f"   {'times faster':<22}{figure(epoch['times_faster'], 2)}")
    lines.append("3. Ours against its own limit (the batch lies ready), percent more time")
    lines.append(f"   {'overhead':<22}{figure(epoch['overhead_percent'])}")
    scaling = results["scaling"]
    lines.append("4. Training by batch size, images/s and peak memory")
    for row in scaling["by_batch_size"]:
        lines.append(
            f"   batch {row['batch_size']:<16}{figure(row['images_per_second'], 0)}"
            f"  {row['peak_mib']:,.0f} MiB"
        )
    lines.append("   Training by size of the data set, seconds")
    for row in scaling["by_data_set_size"]:
        lines.append(f"   {row['images']:<6,} images         {figure(row['seconds'], 2)}")
    lines.append("   Evaluation by batch size, images/s")
    for row in scaling["evaluation"]:
        lines.append(f"   batch {row['batch_size']:<16}{figure(row['images_per_second'], 0)}")
    lines.append("   Latency of one image, milliseconds")
    for row in scaling["latency"]:
        lines.append(f"   {row['precision']:<22}{figure(row['milliseconds'], 2)}")
    if "parts" in results:
        lines.append("5. Times faster with each part than without it")
        for part, values in results["parts"].items():
            lines.append(f"   {part:<22}{figure(values, 2)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.bench", description="Measure speed against the usual way and our own limit."
    )
    add = parser.add_argument
    add("--model", default=train.DEFAULT_MODEL, help="1, 2, 3 or a model file (2)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    add(
        "--images",
        type=cli.whole_number(FEWEST_IMAGES),
        help="in an epoch (default: 50,000 on a GPU, 5,000 on the CPU)",
    )
    add("--repetitions", type=cli.whole_number(1, 100), default=5, help="of each figure (5)")
    add("--parts", action="store_true", help="measure what each part is worth, too")
    add("--output-dir", default="output", help="where the folder of the results is made (output)")
    args = parser.parse_args(arguments)

    def work() -> None:
        device = utils.pick_device(args.device)
        network = networks.load_network(args.model)
        images = args.images or (5_000 if device.type == "cpu" else 50_000)
        results = {
            "network": network.build.__name__,
            "device": utils.describe(device),
            "precision": str(utils.pick_precision(device).dtype),
            "batch_size": network.recipe.batch_size,
            "repetitions": args.repetitions,
            **runs.environment(),
        }
        run = runs.Run.create(args.output_dir, f"bench-{network.name}")
        run.log(f"{network.build.__name__} on {results['device']}, medians of {args.repetitions}")
        results["transform"] = bench_transform(device, network.recipe.batch_size, args.repetitions)
        results["epoch"] = bench_epoch(args.model, device, images, args.repetitions)
        results["scaling"] = bench_scaling(args.model, device, images, args.repetitions)
        if args.parts:
            results["parts"] = bench_parts(args.model, device, images, args.repetitions)
        run.log(report(results))
        run.write_json("bench.json", results)
        title = f"{network.build.__name__} on {results['device']}"
        run.write("bench.png", plots.bench(results, title))
        run.log(f"Results: {run.folder}")

    return cli.run("tools.bench", work)


if __name__ == "__main__":
    sys.exit(main())
