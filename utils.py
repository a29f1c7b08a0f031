"""What the three models share: channel stats, transforms, loaders, weights, train and test loops.

Data flows through this file from top to bottom: uint8 arrays -> stats -> transform -> batches ->
loop -> metrics.
"""

import contextlib
import copy
import io
import math
import os
import random
import signal
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from tqdm import tqdm

from errors import Error, UsageError
from fast.batched import A, BatchedTransform, ToTensorV2, UnknownTransformError

RGB = tuple[float, float, float]
HERE = Path(__file__).resolve().parent
TEST_BATCH = 500
# What `load_pretrained` finds in output/reference.
PRETRAINED = ("model_1", "model_2", "model_2_distilled", "model_3", "model_3_distilled")

# ---------------------------------------------------------------- stats and transforms


def channel_stats(images: np.ndarray) -> tuple[RGB, RGB]:
    """Mean and standard deviation of each channel over all pixels of all images.

    Args:
        images: uint8, (N, H, W, 3).

    Returns:
        (mean, std), three floats each, in units of the full range 255: 0 is black, 1 is white.
        std is the population's (divided by the number of pixels, not one less).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"wanted uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    mean, std = cv2.meanStdDev(images.reshape(-1, images.shape[2], 3))
    return tuple((mean.ravel() / 255).tolist()), tuple((std.ravel() / 255).tolist())


def train_transform(mean: RGB, std: RGB, probability: float = 0.5) -> A.Compose:
    """The augmentation: a uint8 image (32, 32, 3) to a normalised float32 tensor (3, 32, 32).

    A recipe's "standard", as model 3 takes it; models 1 and 2 name `crop_cutout_transform`. Edit
    it here, with the steps below. Pixels that Affine uncovers and the hole that CoarseDropout cuts
    take the mean colour, which Normalize turns into (almost) zero: they carry no signal.

    Args:
        mean, std: from `channel_stats`, in units of the full range 255.
        probability: with which Affine, and independently CoarseDropout, touches an image;
            `recipes.Recipe.augmentation` chooses it.
    """
    return _pipeline(
        [A.HorizontalFlip(p=0.5), _affine(mean, probability), _hole(mean, probability)], mean, std
    )


def crop_cutout_transform(mean: RGB, std: RGB, probability: float = 0.5) -> A.Compose:
    """The augmentation of models 1 and 2 and of the ResNet baseline: crop, flip, hole.

    The crop is out of 40x40 pixels, 4 of them mirrored at each border.

    Args:
        mean, std: from `channel_stats`, in units of the full range 255.
        probability: of the hole.
    """
    crop = [A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)]
    return _pipeline([*crop, A.HorizontalFlip(p=0.5), _hole(mean, probability)], mean, std)


def crop_affine_jitter_transform(mean: RGB, std: RGB, probability: float = 0.5) -> A.Compose:
    """The augmentation of the CifarNet baseline: flip, affine, hole, colours, crop out of 40x40.

    Args:
        mean, std: from `channel_stats`, in units of the full range 255.
        probability: of Affine, CoarseDropout and ColorJitter, each.
    """
    steps = [
        A.HorizontalFlip(p=0.5),
        _affine(mean, probability),
        _hole(mean, probability),
        A.ColorJitter(
            brightness=(0.8, 1.2),
            contrast=(0.8, 1.2),
            saturation=(0.8, 1.2),
            hue=(-0.02, 0.02),
            p=probability,
        ),
        A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(32, 32),
    ]
    return _pipeline(steps, mean, std)


# By the name that a recipe's `transform` gives.
TRANSFORMS: dict[str, Callable[..., A.Compose]] = {
    "standard": train_transform,
    "crop_cutout": crop_cutout_transform,
    "crop_affine_jitter": crop_affine_jitter_transform,
}


def _affine(mean: RGB, probability: float) -> A.Affine:
    return A.Affine(
        translate_percent=(-0.1, 0.1),
        scale=(0.9, 1.1),
        rotate=(-15, 15),
        border_mode=cv2.BORDER_CONSTANT,
        fill=_grey_levels(mean),
        p=probability,
    )


def _hole(mean: RGB, probability: float) -> A.CoarseDropout:
    return A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=(16, 16),
        hole_width_range=(16, 16),
        fill=_grey_levels(mean),
        p=probability,
    )


def _grey_levels(mean: RGB) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in mean)


def _pipeline(steps: list[A.BasicTransform], mean: RGB, std: RGB) -> A.Compose:
    """The steps, then the normalised tensor."""
    ending = [A.Normalize(mean=mean, std=std, max_pixel_value=255.0), ToTensorV2()]
    return A.Compose(
        [*steps, *ending],
        strict=True,  # without it, Albumentations ignores a misspelt argument
    )


def test_transform(mean: RGB, std: RGB) -> A.Compose:
    """Normalisation only: a uint8 image (32, 32, 3) to a float32 tensor (3, 32, 32)."""
    return _pipeline([], mean, std)


def to_pixels(tensors: Tensor, mean: RGB, std: RGB) -> np.ndarray:
    """Normalised images (..., 3, H, W) back to uint8 (..., H, W, 3), to be looked at."""
    values = tensors.movedim(-3, -1).float().cpu().numpy() * np.array(std) + np.array(mean)
    return (255 * values).round().clip(0, 255).astype(np.uint8)


test_transform.__test__ = False  # pytest would take the name for a test's

# ---------------------------------------------------------------- device and precision


class DeviceError(UsageError):
    """A device that this machine does not have."""


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without one CUDA if present, then MPS, then the CPU.

    Raises:
        DeviceError: no such device here.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name is not None and name not in present:
        raise DeviceError(f"no device {name!r} here; this machine has: {', '.join(present)}")
    return torch.device(name or present[0])


def describe(device: torch.device) -> str:
    """The device by name: "cuda (NVIDIA H200)", "cpu (AMD EPYC, 2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name", "unknown")
        return f"cpu ({name}, {torch.get_num_threads()} threads)"
    return str(device)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch; the loaders take the seed themselves."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (a model file of somebody's own may draw from it)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict:
    """The state of every generator that `seed_everything` seeds, for a checkpoint.

    The loaders' need not be kept: an epoch's draws follow from the seed and its number.
    """
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002  (seeded above)
    state = {
        "python": random.getstate(),
        "numpy": (numpy_name, numpy_keys.tolist(), *numpy_rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping, device: torch.device) -> None:
    """Sets the generators to what `random_state` returned; a device's only if it was of its kind.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: not such a state.
    """
    random.setstate(state["python"])
    numpy_name, numpy_keys, *numpy_rest = state["numpy"]
    np.random.set_state((numpy_name, np.array(numpy_keys, dtype=np.uint32), *numpy_rest))  # noqa: NPY002  (seeded above)
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


class Precision(NamedTuple):
    """The number format that autocast computes in, and how image batches lie in memory."""

    dtype: torch.dtype
    memory_format: torch.memory_format

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """For the forward pass; weights, loss and optimizer stay float32."""
        if self.dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, self.dtype)


def pick_precision(device: torch.device) -> Precision:
    """The fastest safe precision of a device: bf16 where native, fp16 on older CUDA, else fp32.

    channels_last is the faster layout on the CPU (docs/speed.md) and the one that PyTorch
    recommends for tensor cores; MPS, which nobody here could measure, keeps the plain defaults.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(torch.bfloat16 if native else torch.float16, torch.channels_last)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        native = features.get("avx512_bf16") or features.get("amx_bf16")
        return Precision(torch.bfloat16 if native else torch.float32, torch.channels_last)
    return Precision(torch.float32, torch.contiguous_format)


# ---------------------------------------------------------------- batches


class BatchSampler(Sampler):
    """Yields (seed of the batch, indices of its images), an epoch at a time.

    The order and every batch's seed follow from (seed, epoch) alone, so the batches of an epoch
    are the same for any number of workers, and an epoch can be repeated without the ones before.
    The last batch holds what is left over; a single image joins the batch before it, since
    BatchNorm1d cannot be trained with one.
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws (as torch's DistributedSampler does)."""
        self.epoch = epoch

    def __len__(self) -> int:
        alone = self.size % self.batch_size == 1 and self.batch_size < self.size
        return math.ceil(self.size / self.batch_size) - (alone and self.batch_size > 1)

    def draw(self) -> tuple[list[np.ndarray], list[int]]:
        """The indices of each of the epoch's batches, int64 (N,), and a seed for each."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
        seeds = generator.integers(2**31, size=len(self)).tolist()
        ends = [number * self.batch_size for number in range(1, len(self))]
        return np.split(order, ends), seeds

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        batches, seeds = self.draw()
        yield from zip(seeds, batches, strict=True)


class TransformedBatches(Dataset):
    """Item (seed, indices) is the batch of those images, each through the transform.

    A batch, not an image, is the item because Albumentations' generator is seeded once for each:
    left alone, every DataLoader worker would start from a copy of the same generator and all
    would repeat each other's augmentations.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: A.Compose) -> None:
        self.images = images
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.transform = transform

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        seed, indices = item
        self.transform.set_random_seed(seed)
        tensors = [self.transform(image=self.images[index])["image"] for index in indices]
        return torch.stack(tensors), self.labels[indices]


class BatchedLoader:
    """Batches made on the device, where the data set lies as uint8: no workers, no copies.

    Iterates like the DataLoader of `make_loader`, with the same order of images; `dataset`,
    `sampler` and `len` mean the same. The draws come from `generator`, which every epoch is
    seeded from (seed, epoch).
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: BatchedTransform,
        batch_size: int,
        *,
        shuffle: bool,
        device: torch.device,
        precision: Precision,
        seed: int = 0,
    ) -> None:
        planar = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.dataset = TensorDataset(
            planar.to(device), torch.from_numpy(labels.astype(np.int64)).to(device)
        )
        self.sampler = BatchSampler(len(images), batch_size, shuffle=shuffle, seed=seed)
        self.transform = transform
        self.precision = precision
        self.generator = torch.Generator(device)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        batches, seeds = self.sampler.draw()
        self.generator.manual_seed(seeds[0])
        order = torch.from_numpy(np.concatenate(batches)).to(images.device)
        for index in order.split([len(batch) for batch in batches]):
            batch = self.transform(images[index], self.generator, *self.precision)
            yield batch, labels[index]


Loader = DataLoader | BatchedLoader


def make_loader(
    images: np.ndarray,
    labels: np.ndarray,
    transform: A.Compose,
    batch_size: int,
    *,
    shuffle: bool,
    device: torch.device,
    precision: Precision,
    batched: bool = True,
    seed: int = 0,
    workers: int = 0,
) -> Loader:
    """Batches of (images (N, 3, 32, 32), labels int64 (N,)), augmented and normalised.

    Call `loader.sampler.set_epoch(epoch)` before each epoch: it decides the order and the draws.

    Args:
        images, labels: uint8 (N, 32, 32, 3) and uint8 (N,).
        transform: as `train_transform` returns it.
        precision: the number format and layout that the batched loader's images come in; the
            other's are float32.
        batched: run the transform for whole batches on the device; otherwise Albumentations
            runs it image by image, in `workers` processes.

    Raises:
        batched.UnknownTransformError: the transform has no batched form.
    """
    options = {"shuffle": shuffle, "seed": seed}
    if batched:
        return BatchedLoader(
            images,
            labels,
            BatchedTransform.from_compose(transform),
            batch_size,
            device=device,
            precision=precision,
            **options,
        )
    cv2.setNumThreads(0)  # an image of 32x32 is no work to share; the threads only get in the way
    return DataLoader(
        TransformedBatches(images, labels, transform),
        batch_size=None,  # the sampler makes the batches
        sampler=BatchSampler(len(images), batch_size, **options),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_init_worker,
        # Of its own, or starting the workers would draw from the generator that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )


class LoaderChoice(NamedTuple):
    """How a transform is run: arguments of `make_loader`, and a line that says so."""

    batched: bool
    workers: int
    line: str


def choose_loader(
    transform: A.Compose, wanted: str = "batched", workers: int | None = None
) -> LoaderChoice:
    """The batched loader where the transform has a batched form, Albumentations' elsewhere.

    Args:
        wanted: "batched" or "albumentations".
        workers: processes of Albumentations' loader; None: `default_workers`.
    """
    reason = "as --loader asks"
    if wanted == "batched":
        try:
            BatchedTransform.from_compose(transform)
        except UnknownTransformError as error:
            reason = f"because there is no batched form of {error}"
        else:
            idle = "" if workers is None else "; --workers is for --loader albumentations"
            return LoaderChoice(True, 0, f"Loader: batched, on the device{idle}")
    workers = default_workers() if workers is None else workers
    line = f"Loader: albumentations in {workers} worker processes, {reason}"
    return LoaderChoice(False, workers, line)


def _init_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def default_workers() -> int:
    """Worker processes for the training loader: one for each core that we may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, 8)


def validation_split(size: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out) of `size` training images; the same split for every run and seed."""
    order = np.random.default_rng(0).permutation(size)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


# ---------------------------------------------------------------- model


def summary_table(model: nn.Module) -> str:
    """torchsummary's table for an image (3, 32, 32); one line where it cannot make one.

    torchsummary prints, draws images at random, runs the model in train mode (which moves
    BatchNorm's statistics), and wants it on the CPU; so it gets a copy, and the generator is put
    back. It knows no recurrent layers, no attention, and no layers that return a dictionary: none
    of that keeps a network from being trained.
    """
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), torch.random.fork_rng(devices=[]):
            torchsummary.summary(copy.deepcopy(model).cpu(), (3, 32, 32), device="cpu")
    except Exception as error:  # whatever it stumbles over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"torchsummary can make no table of {type(model).__name__}: {reason}\n"
    return text.getvalue()


def stored_path(path: str | Path) -> str:
    """A path as files of a run hold it: from the repository if it lies in it, else absolute.

    `HERE / stored_path(path)` is the path again, from whichever folder, and for what lies in the
    repository on whichever machine.
    """
    path = Path(path).resolve()
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else str(path)


class CheckpointError(Error, ValueError):
    """A file that is damaged, or does not hold what is wanted of it."""


def read_checkpoint(path: str | Path) -> dict:
    """What torch.save wrote into the file, read as data, not code, its checksums compared.

    PyTorch's own reader passes over the checksums that its files carry: it would take flipped
    bits for weights.

    Raises:
        CheckpointError: damaged, or something else than a checkpoint; names the file.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} in it has a wrong checksum")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise many kinds of error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a whole checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Puts the weights of a file (weights.pt, last.pt or best.pt) into the model.

    Raises:
        CheckpointError: damaged, or another network's; names the file and the mismatch.
        OSError: it cannot be read.
    """
    weights = read_checkpoint(path)
    if isinstance(weights.get("model"), dict):
        weights = weights["model"]
    wanted = {name: _shape(value) for name, value in model.state_dict().items()}
    found = {name: _shape(value) for name, value in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} does not hold the weights of {type(model).__name__}: {name} is "
                f"{found.get(name, 'missing')} there, {wanted.get(name, 'missing')} here"
            )
    model.load_state_dict(weights)


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def load_pretrained(name: str) -> tuple[nn.Module, A.Compose]:
    """One of the trained networks that come with this repository, ready for inference.

        network, transform = utils.load_pretrained("model_2")
        logits = network(transform(image=image)["image"][None])  # image: uint8 (32, 32, 3)

    Args:
        name: "model_1", "model_2" or "model_3"; or "model_2_distilled" or "model_3_distilled",
            which learned from model 1.

    Returns:
        The network in eval mode on the CPU, and the transform that its images need.

    Raises:
        ValueError: no such network.
        OSError, CheckpointError: its weights are missing or damaged, or the network's code is no
            longer that which was trained.
    """
    if name not in PRETRAINED:
        raise ValueError(f"no pretrained network {name!r}; there are {', '.join(PRETRAINED)}")
    from networks import load_trained  # which needs this file itself

    trained = load_trained(HERE / "output" / "reference" / name)
    return trained.network, test_transform(trained.settings["mean"], trained.settings["std"])


# ---------------------------------------------------------------- loops


class DivergedError(Error, RuntimeError):
    """The loss became NaN or infinite."""


class Metrics(NamedTuple):
    """Means over all images of an epoch: loss in nats, accuracy in percent."""

    loss: float
    accuracy: float


class Evaluation(NamedTuple):
    """Metrics, and what they were computed from: logits float32 (N, classes), labels int64 (N,)."""

    loss: float
    accuracy: float
    logits: Tensor
    labels: Tensor


class Teacher:
    """A trained network whose answers take the place of labels: distillation.

    As Hinton et al. (2015, https://arxiv.org/abs/1503.02531) mix both, at temperature 1; asked anew
    for every augmented image, as Beyer et al. (2022, https://arxiv.org/abs/2106.05237) found best.

    Args:
        network: in eval mode, on the device of the training.
        weight: of its answers in the mixture, from 0 to 1.
        precision: of its forward pass, with the layout that it takes.
    """

    def __init__(self, network: nn.Module, weight: float, precision: Precision) -> None:
        self.network = network
        self.weight = weight
        self.precision = precision

    @torch.no_grad()
    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """The probability of each class, float32 (N, classes), for labels int64 (N,)."""
        images = images.to(memory_format=self.precision.memory_format)
        with self.precision.autocast(images.device):
            logits = self.network(images)
        answers = logits.float().softmax(dim=1)
        return torch.lerp(F.one_hot(labels, answers.shape[1]).float(), answers, self.weight)


def train(
    model: nn.Module,
    loader: Loader,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    precision: Precision,
    clip_norm: float = 0.0,
    teacher: Teacher | None = None,
    title: str = "train",
) -> Metrics:
    """One epoch of training.

    Args:
        criterion: (logits float32 (N, classes), labels int64 (N,)) to the mean loss; with a
            teacher, its targets float32 (N, classes) come instead of the labels.
        scheduler: moved on after every step.
        scaler: keeps small fp16 gradients from vanishing; a disabled one lets all pass through.
        clip_norm: longer gradients are shortened to this length; 0 leaves them.

    Returns:
        Metrics as the images came by, so augmented, in train mode, with the weights of that moment.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.train()
    with _Meter(title, loader, device) as meter:
        for images, labels in loader:
            images = images.to(device, memory_format=precision.memory_format, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            with precision.autocast(device):
                logits = model(images)
            targets = labels if teacher is None else teacher.targets(images, labels)
            loss = criterion(logits.float(), targets)
            scaler.scale(loss).backward()
            if clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            meter.update(loss.detach(), logits.detach(), labels)
        return meter.read()


@torch.inference_mode()
def test(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    precision: Precision,
    title: str = "test",
) -> Evaluation:
    """One pass over the loader in eval mode; the loss is plain cross-entropy.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    model.eval()
    all_logits, all_labels = [], []
    with _Meter(title, loader, device) as meter:
        for images, labels in loader:
            images = images.to(device, memory_format=precision.memory_format, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with precision.autocast(device):
                logits = model(images)
            logits = logits.float()
            meter.update(F.cross_entropy(logits, labels), logits, labels)
            all_logits.append(logits)
            all_labels.append(labels)
        metrics = meter.read()
    return Evaluation(*metrics, torch.cat(all_logits).cpu(), torch.cat(all_labels).cpu())


test.__test__ = False  # pytest would take the name for a test's


class _Meter:
    """Adds up an epoch's loss and hits, image by image, and shows them on a progress bar.

    The sums stay on the device: reading them makes a GPU wait, so that is done twice a second.
    """

    READ_EVERY = 0.5  # seconds

    def __init__(self, title: str, loader: Loader, device: torch.device) -> None:
        self.title = title
        self.images = 0
        self.steps = 0
        self.last_read = time.monotonic()
        # float32 sums of 50,000 losses would lose digits, and MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=dtype, device=device)  # loss, hits
        self.bar = tqdm(  # disable=None: quiet when there is no terminal
            total=len(loader.dataset), desc=title, unit="img", leave=False, disable=None
        )

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), hits])
        self.images += len(labels)
        self.steps += 1
        self.bar.update(len(labels))
        if time.monotonic() - self.last_read > self.READ_EVERY:
            metrics = self.read()
            self.last_read = time.monotonic()
            self.bar.set_postfix_str(
                f"loss {metrics.loss:.3f}, accuracy {metrics.accuracy:.2f}%", refresh=False
            )

    def read(self) -> Metrics:
        loss, hits = (self.sums / self.images).tolist()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} within the first {self.steps} steps of {self.title!r}: "
                "the training diverged; try a lower --lr"
            )
        return Metrics(loss, 100 * hits)
