"""What the models share, as data flows: stats, transforms, device, batches, loops, metrics."""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from errors import UsageError
from fast.batched import A, BatchedTransform, ToTensorV2
from fast.loader import BatchedLoader
from parallel import ALONE, Team, device_index
from support.meter import Meter, Metrics, progress
from support.workers import worker_loader

RGB = tuple[float, float, float]
TEST_BATCH = 500

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


def train_transform(
    mean: RGB, std: RGB, probability: float = 0.5, name: str = "standard"
) -> A.Compose:
    """An augmentation, by the name that recipes know it by; edit it here.

    From a uint8 image (32, 32, 3) to a normalised float32 tensor (3, 32, 32). Pixels that Affine
    uncovers and the hole that CoarseDropout cuts take the mean colour, which Normalize turns into
    (almost) zero: they carry no signal. The crop is out of 40x40 pixels, 4 mirrored at each border.

    Args:
        mean, std: from `channel_stats`, in units of the full range 255.
        probability: with which each of Affine, CoarseDropout and ColorJitter touches an image;
            `recipes.Recipe.augmentation` chooses it.
    """
    fill = tuple(round(255 * value) for value in mean)
    flip = A.HorizontalFlip(p=0.5)
    affine = A.Affine(
        translate_percent=(-0.1, 0.1),
        scale=(0.9, 1.1),
        rotate=(-15, 15),
        border_mode=cv2.BORDER_CONSTANT,
        fill=fill,
        p=probability,
    )
    hole = A.CoarseDropout(
        num_holes_range=(1, 1),
        hole_height_range=(16, 16),
        hole_width_range=(16, 16),
        fill=fill,
        p=probability,
    )
    jitter = A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (-0.02, 0.02), p=probability)
    crop = A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)
    steps = {  # a new one needs its name in TRANSFORMS, too
        "standard": [flip, affine, hole],  # model 3
        "crop_cutout": [*crop, flip, hole],  # models 1 and 2, most baselines
        "crop_affine_jitter": [flip, affine, hole, jitter, *crop],  # CifarNet
    }
    return _pipeline(mean, std, *steps[name])


# What a recipe's `transform` may name; each is a function of mean, std and probability.
TRANSFORMS: dict[str, Callable[..., A.Compose]] = {
    name: functools.partial(train_transform, name=name)
    for name in ("standard", "crop_cutout", "crop_affine_jitter")
}


def test_transform(mean: RGB, std: RGB) -> A.Compose:
    """Normalisation only: a uint8 image (32, 32, 3) to a float32 tensor (3, 32, 32)."""
    return _pipeline(mean, std)


test_transform.__test__ = False  # pytest would take the name for a test's


def _pipeline(mean: RGB, std: RGB, *steps: A.BasicTransform) -> A.Compose:
    """The steps, then the normalised tensor; strict: a misspelt argument is an error."""
    ending = (A.Normalize(mean=mean, std=std, max_pixel_value=255.0), ToTensorV2())
    return A.Compose([*steps, *ending], strict=True)


# ---------------------------------------------------------------- device


class DeviceError(UsageError):
    """A device that this machine does not have."""


@dataclass(frozen=True)
class Device:
    """Where and how tensors are computed; as text "cuda (NVIDIA H200)", "cpu (EPYC, 2 threads)".

    Fields: the device itself, the number format that autocast computes in, and how batches of
    images lie in memory.
    """

    where: torch.device
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format

    @classmethod
    def pick(cls, name: str | None = None) -> "Device":
        """The device of that name; without one the accelerator if there is one, else the CPU.

        With the fastest safe number format: bf16 where it is native and fast (without AMX, Intel's
        has half of float32's rate: docs/speed.md), fp16 on older CUDA, else float32. channels_last
        is the faster layout on the CPU and the one that PyTorch recommends for tensor cores; other
        devices, which nobody here could measure, keep the plain defaults.

        Raises:
            DeviceError: no such device here.
        """
        present = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type
            count = torch.accelerator.device_count()
            present[:0] = [kind, *(f"{kind}:{index}" for index in range(count))]
        if name is not None and name not in present:
            raise DeviceError(f"no device {name!r} here; this machine has: {', '.join(present)}")
        where = torch.device(name or present[0])
        if where.type == "cuda" and (index := device_index(where, count)) is not None:
            where = torch.device("cuda", index)
        if where.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(where, torch.bfloat16 if native else torch.float16, torch.channels_last)
        if where.type == "cpu":
            features = torch.cpu.get_capabilities()
            fast = "Intel" not in features.get("cpu_name", "") and features.get("avx512_bf16")
            native = fast or features.get("amx_bf16")
            return cls(where, torch.bfloat16 if native else torch.float32, torch.channels_last)
        return cls(where)

    @property
    def exact(self) -> "Device":
        """The same in float32, for evaluation: accuracies are claims, equal on every machine."""
        return replace(self, dtype=torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager:
        """For the forward pass; weights, loss and optimizer stay float32."""
        if self.dtype == torch.float32:
            return torch.autocast(self.where.type, enabled=False)
        return torch.autocast(self.where.type, self.dtype)

    def take(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch, on the device and in its layout."""
        images = images.to(self.where, memory_format=self.layout, non_blocking=True)
        return images, labels.to(self.where, non_blocking=True)

    def __str__(self) -> str:
        if self.where.type == "cuda":
            return f"{self.where} ({torch.cuda.get_device_name(self.where)})"
        if self.where.type == "cpu":
            name = torch.cpu.get_capabilities().get("cpu_name", "unknown")
            return f"cpu ({name}, {torch.get_num_threads()} threads)"
        return str(self.where)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions in float32: on newer GPUs cuDNN rounds to TF32 unless told."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seeds Python, NumPy and torch, for the first weights (epoch 0) and anew for every epoch.

    So what an epoch draws (dropout) follows from (seed, epoch), as the loaders' draws do, and a run
    goes on as if it had never stopped. Processes that share a batch differ by their rank.
    """
    mixed = np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]
    state = int(mixed) if epoch else seed
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002  (a model file of somebody's own may draw from it)
    torch.manual_seed(state)


# ---------------------------------------------------------------- batches


def validation_split(size: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out) of `size` training images; the same split for every run and seed.

    Raises:
        UsageError: none would be kept.
    """
    if held_out >= size:
        raise UsageError(f"--val-split {held_out} is too large; give a number from 1 to {size - 1}")
    order = np.random.default_rng(0).permutation(size)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class BatchSampler(Sampler):
    """Yields (seed of the batch, indices of its images), an epoch at a time.

    The order and every batch's seed follow from (seed, epoch) alone, so the batches of an epoch
    are the same for any number of workers, and an epoch can be repeated without the ones before.
    The last batch holds what is left over; when shuffled, as for training, a single image joins
    the batch before it, since BatchNorm1d cannot be trained with one.
    """

    def __init__(
        self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0, team: Team = ALONE
    ) -> None:
        team.refuse(batch_size)
        self.size, self.batch_size = size, batch_size
        self.shuffle, self.seed, self.team = shuffle, seed, team
        self.epoch = 0
        self.views = 0  # the epochs repeat after so many (a teacher's stored views); 0: never

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration draws (as torch's DistributedSampler does)."""
        self.epoch = 1 + (epoch - 1) % self.views if self.views else epoch

    def __len__(self) -> int:
        alone = self.shuffle and self.size % self.batch_size == 1 and self.batch_size < self.size
        return math.ceil(self.size / self.batch_size) - alone

    def draw(self) -> tuple[list[np.ndarray], list[int]]:
        """The indices of each of the epoch's batches, int64 (N,), and a seed for each."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
        seeds = generator.integers(2**31, size=len(self)).tolist()
        ends = [number * self.batch_size for number in range(1, len(self))]
        return np.split(order, ends)[: len(self)], seeds

    def shares(self) -> list[tuple[slice, float]]:
        """This process's part of each batch, and the weight of its mean loss, as Team.share."""
        return [self.team.share(len(batch)) for batch in self.draw()[0]]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        batches, seeds = self.draw()
        for seed, batch, (part, _) in zip(seeds, batches, self.shares(), strict=True):
            yield seed + self.team.rank, batch[part]


Loader = DataLoader | BatchedLoader


def make_loader(
    images: np.ndarray,
    labels: np.ndarray,
    transform: A.Compose,
    batch_size: int,
    device: Device,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int | None = None,
    team: Team = ALONE,
) -> Loader:
    """Batches of (images (N, 3, 32, 32), labels int64 (N,)), augmented and normalised.

    Call `loader.sampler.set_epoch(epoch)` before each epoch: it decides the order and the draws.

    Args:
        images, labels: uint8 (N, 32, 32, 3) and uint8 (N,).
        transform: as `train_transform` returns it.
        device: the batched loader's images come in its number format and layout, the other's are
            float32.
        workers: None: the transform runs for whole batches on the device; a number: Albumentations
            runs it image by image, in so many processes; support.workers.choose chooses.
        team: each of its processes gets its part of every batch.

    Raises:
        fast.batched.UnknownTransformError: the transform has no batched form.
    """
    sampler = BatchSampler(len(images), batch_size, shuffle=shuffle, seed=seed, team=team)
    if workers is None:
        batched = BatchedTransform.from_compose(transform)
        how = (device.where, device.dtype, device.layout)
        return BatchedLoader(images, labels, batched, sampler, *how)
    return worker_loader(images, labels, transform, sampler, workers, device.where)


# ---------------------------------------------------------------- loops


class Evaluation(NamedTuple):
    """Metrics, and what they were computed from: logits float32 (N, classes), labels int64 (N,)."""

    loss: float
    accuracy: float
    logits: Tensor
    labels: Tensor


def train(
    model: nn.Module,
    loader: Loader,
    criterion: Callable[[Tensor, object], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    device: Device,
    clip_norm: float = 0.0,
    teacher: Callable[[Tensor, Tensor], object] | None = None,
) -> Metrics:
    """One epoch of training.

    Args:
        criterion: (logits float32 (N, classes), targets) to the mean loss.
        scheduler: moved on after every step.
        scaler: keeps small fp16 gradients from vanishing; a disabled one lets all pass through.
        clip_norm: longer gradients are shortened to this length; 0 leaves them.
        teacher: (images, labels) to the criterion's targets, as support.teachers; without one
            the labels are the targets.

    Returns:
        Means over the epoch's steps: augmented images, train mode, each step's own weights.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.train()
    team, shares = loader.sampler.team, loader.sampler.shares()
    with Meter("train", len(loader.dataset) // team.size, device.where, team) as meter:
        for (images, labels), (_, weight) in zip(loader, shares, strict=True):
            images, labels = device.take(images, labels)
            optimizer.zero_grad()
            with device.autocast():
                logits = model(images)
            targets = labels if teacher is None else teacher(images, labels)
            loss = criterion(logits.float(), targets)
            scaler.scale(loss * weight).backward()  # weight: 1 without torchrun (Team.share)
            if clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            meter.update(loss.detach(), logits.detach(), labels)
        team.agree(model)  # on BatchNorm's running statistics
        return meter.read()


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Loader, device: Device, title: str = "test", team: Team = ALONE
) -> Evaluation:
    """One pass over the loader in eval mode, in float32; the loss is plain cross-entropy.

    In a team each process passes over the batches whose turn it has, and gets the whole result.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    model.eval()
    all_logits, all_labels = [], []
    with device.exact.autocast(), without_tf32():
        for images, labels in progress(loader, title, team):
            images, labels = device.take(images, labels)
            all_logits.append(model(images).float())
            all_labels.append(labels)
    all_logits, all_labels = team.gather(all_logits), team.gather(all_labels)
    # Batch by batch, in order, on the CPU: the same to the last bit for any number of processes.
    with Meter(title, sum(map(len, all_labels)), torch.device("cpu"), show=team.first) as meter:
        for logits, labels in zip(all_logits, all_labels, strict=True):
            meter.update(F.cross_entropy(logits, labels), logits, labels)
        return Evaluation(*meter.read(), torch.cat(all_logits), torch.cat(all_labels))
