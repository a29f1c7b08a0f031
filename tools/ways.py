"""Four ways to write the same training; tools/bench.py says what each is and measures them.

A way is a function of a network and a device. Nothing of ours is in the first three but the
network, the images, the batch size and the smoothing of the labels.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

import cifar10
import recipes
import utils
from fast import cpu
from networks import Network
from tools import usual

EPOCHS = 20  # of the run whose augmentation is measured
PARTS = ("batched loader", "reduced precision", "channels_last", "kept memory", "faster layers")


def repeated_sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, uint8 (count, 32, 32, 3), and labels, uint8 (count,), of the sample."""
    sample = cifar10.load_sample()
    index = np.arange(count) % len(sample.train_images)
    return sample.train_images[index], sample.train_labels[index]


class Way(NamedTuple):
    """A way to train: makes a loader of so many images, and trains an epoch on one."""

    load: Callable[[int], object]
    epoch: Callable[[object], object]


def textbook(network: Network, device: torch.device, popular: bool) -> Way:
    """The usual way; `popular`: with the pictures and workers of the loop on torchvision."""
    mean, std = utils.channel_stats(cifar10.load_sample().train_images)
    if popular:
        moves = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        ending = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        transform, options = transforms.Compose(moves + ending), {"num_workers": 2}
    else:
        transform = usual.FromPIL(network.recipe.train_transform(mean, std, EPOCHS))
        options = {"num_workers": utils.default_workers(), "pin_memory": device.type == "cuda"}
    torch.backends.cudnn.benchmark = popular  # as that loop has it
    model = network.build().to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=network.recipe.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def load(count: int) -> DataLoader:
        dataset = usual.UsualDataset(*repeated_sample(count), transform)
        return DataLoader(dataset, network.recipe.batch_size, shuffle=True, **options)

    def epoch(loader: DataLoader) -> None:
        usual.train_epoch(model, loader, criterion, optimizer, scheduler, device)

    return Way(load, epoch)


class WholeBatchLoader:
    """The data set as one normalised tensor on the device; a crop and a flip for a whole batch.

    Yields images (N, 3, 32, 32) of `dtype`, channels_last, and labels int64 (N,).
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        mean, std = (torch.tensor(value, device=device) for value in utils.channel_stats(images))
        pixels = (torch.from_numpy(images).to(device) / 255 - mean) / std
        padded = F.pad(pixels.permute(0, 3, 1, 2), (4, 4, 4, 4), mode="reflect")
        self.padded = padded.permute(0, 2, 3, 1).to(dtype).contiguous()  # (N, 40, 40, 3)
        self.labels = torch.from_numpy(labels).to(device, torch.int64)
        self.dataset, self.batch_size = images, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.labels.device
        window = torch.arange(32, device=device)
        for index in torch.randperm(len(self.labels), device=device).split(self.batch_size):
            rows, columns = torch.randint(9, (2, len(index), 1), device=device) + window
            images = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            flip = torch.rand(len(index), 1, 1, 1, device=device) < 0.5
            images = torch.where(flip, images.flip(2), images)
            yield images.permute(0, 3, 1, 2), self.labels[index]


def whole_batch(network: Network, device: torch.device) -> Way:
    """A plain loop over WholeBatchLoader."""
    recipe, precision = network.recipe, network.precision(device)
    torch.backends.cudnn.benchmark = True
    model = network.build().to(device, memory_format=precision.memory_format)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def load(count: int) -> WholeBatchLoader:
        images, labels = repeated_sample(count)
        return WholeBatchLoader(images, labels, recipe.batch_size, device, precision.dtype)

    def epoch(loader: WholeBatchLoader) -> float:
        model.train()
        total = torch.zeros((), device=device)
        for images, labels in loader:
            images = images.contiguous(memory_format=precision.memory_format)
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast(device):
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item()

    return Way(load, epoch)


def ours(network: Network, device: torch.device, without: str = "") -> Way:
    """As train.py assembles it; `without` leaves one of PARTS out.

    What `cpu` does is left out for the whole process, so that such a way wants one of its own.
    """
    recipe, precision = network.recipe, network.precision(device)
    if without == "reduced precision":
        precision = precision._replace(dtype=torch.float32)
    elif without == "channels_last":
        precision = precision._replace(memory_format=torch.contiguous_format)
    elif without == "kept memory":
        cpu.keep_freed_memory = lambda: None
    elif without == "faster layers":
        cpu.speed_up = lambda model: model
    torch.backends.cudnn.benchmark = True
    model = network.ready(recipe, device, precision)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = recipes.make_optimizer(model, recipe, precision.dtype)
    # A small constant rate: the time of a step does not depend on it.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
    rest = (criterion, optimizer, scheduler, scaler, device, precision, recipe.clip_norm)

    def load(count: int) -> utils.Loader:
        images, labels = repeated_sample(count)
        transform = recipe.train_transform(*utils.channel_stats(images), EPOCHS)
        wanted = "albumentations" if without == "batched loader" else "batched"
        chosen = utils.choose_loader(transform, wanted)
        return utils.make_loader(
            images,
            labels,
            transform,
            recipe.batch_size,
            shuffle=True,
            device=device,
            precision=precision,
            batched=chosen.batched,
            workers=chosen.workers,
        )

    return Way(load, lambda loader: utils.train(model, loader, *rest))


WAYS: dict[str, Callable[[Network, torch.device], Way]] = {
    "usual": functools.partial(textbook, popular=False),
    "torchvision": functools.partial(textbook, popular=True),
    "whole_batch": whole_batch,
    "ours": ours,
}
