"""Four ways to write the same training; tools/bench.py says what each is and measures them.

A way is a function of a network, a device and a number of images; it returns a loader of them, and
a function that trains an epoch on it. Of ours the first three have the network with the recipe's
share of its dropout, the images, the batch size and the smoothing of the labels; the usual way also
the recipe's augmentation, and the whole batches our device's number format and layout.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision import transforms

import cifar10
import networks
import recipes
import utils
from fast import cpu
from networks import Network
from support import model_files, workers
from tools import usual

EPOCHS = 20  # of the run whose augmentation is measured
PARTS = ("batched loader", "reduced precision", "channels_last", "kept memory", "faster layers")
Way = tuple[Iterable, Callable[[], object]]


def repeated_sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, uint8 (count, 32, 32, 3), and labels, uint8 (count,), of the sample."""
    sample = cifar10.load_sample()
    index = np.arange(count) % len(sample.train_images)
    return sample.train_images[index], sample.train_labels[index]


def built(network: Network) -> nn.Module:
    """The network as its recipe has it, with so much of its dropout, and nothing else of ours."""
    model = network.build()
    model_files.scale_dropout(model, network.recipe.dropout)
    return model


def textbook(network: Network, device: utils.Device, count: int, popular: bool = False) -> Way:
    """The usual way; `popular`: with the pictures and workers of the loop on torchvision."""
    images, labels = repeated_sample(count)
    mean, std = utils.channel_stats(images)
    if popular:
        moves = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        ending = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        augment, options = transforms.Compose(moves + ending), {"num_workers": 2}
    else:
        augment = partial(usual.albumented, network.recipe.train_transform(mean, std, EPOCHS))
        options = {
            "num_workers": workers.default_workers(),
            "pin_memory": device.where.type == "cuda",
        }
    torch.backends.cudnn.benchmark = popular  # as that loop has it
    dataset = usual.UsualDataset(images, labels, augment)
    loader = DataLoader(dataset, network.recipe.batch_size, shuffle=True, **options)
    model = built(network).to(device.where)
    criterion = nn.CrossEntropyLoss(label_smoothing=network.recipe.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return loader, lambda: usual.run_epoch(model, loader, criterion, optimizer, scheduler)


def whole_batches(padded: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of shuffled batches out of images (N, 40, 40, 3), each batch cropped and flipped.

    Yields images (n, 3, 32, 32), channels_last, and labels (n,).
    """
    window = torch.arange(32, device=labels.device)
    for index in torch.randperm(len(labels), device=labels.device).split(size):
        rows, columns = torch.randint(9, (2, len(index), 1), device=labels.device) + window
        images = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        flip = torch.rand(len(index), 1, 1, 1, device=labels.device) < 0.5
        yield torch.where(flip, images.flip(2), images).permute(0, 3, 1, 2), labels[index]


def whole_batch(network: Network, device: utils.Device, count: int) -> Way:
    """The data set as one normalised tensor on the device, and a plain loop."""
    recipe = network.recipe
    torch.backends.cudnn.benchmark = True
    images, labels = (torch.from_numpy(part).to(device.where) for part in repeated_sample(count))
    std, mean = torch.std_mean(images / 255, dim=(0, 1, 2), correction=0)
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    padded = F.pad(pixels, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    padded = padded.to(device.dtype).contiguous()
    loader = whole_batches(padded, labels.long(), recipe.batch_size)
    model = built(network).to(device.where, memory_format=device.layout)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def epoch() -> float:
        model.train()
        total = torch.zeros((), device=device.where)
        for images, labels in loader:
            images = images.contiguous(memory_format=device.layout)
            optimizer.zero_grad(set_to_none=True)
            with device.autocast():
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item()

    return loader, epoch


def ours(network: Network, device: utils.Device, count: int, without: str = "") -> Way:
    """As train.py assembles it; `without` leaves one of PARTS out.

    What `cpu` does is left out for the whole process, so that such a way wants one of its own.
    """
    recipe = network.recipe
    if without == "reduced precision":
        device = device.exact
    elif without == "channels_last":
        device = replace(device, layout=torch.contiguous_format)
    elif without == "kept memory":
        cpu.keep_freed_memory = lambda: None
    elif without == "faster layers":
        cpu.speed_up = lambda model: model
    torch.backends.cudnn.benchmark = True
    images, labels = repeated_sample(count)
    transform = recipe.train_transform(*utils.channel_stats(images), EPOCHS)
    wanted = "albumentations" if without == "batched loader" else "batched"
    options = {"shuffle": True, "workers": workers.choose(transform, wanted)[0]}
    loader = utils.make_loader(images, labels, transform, recipe.batch_size, device, **options)
    model = networks.prepare(network.build(), device, recipe)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = recipes.make_optimizer(model, recipe, device.dtype)
    # A small constant rate: the time of a step does not depend on it.
    scheduler = LambdaLR(optimizer, lambda step: 1e-3)
    scaler = torch.amp.GradScaler(device.where.type, enabled=device.dtype == torch.float16)
    rest = (criterion, optimizer, scheduler, scaler, device, recipe.clip_norm)
    return loader, lambda: utils.train(model, loader, *rest)


WAYS = {
    "usual": textbook,
    "torchvision": partial(textbook, popular=True),
    "whole_batch": whole_batch,
    "ours": ours,
}
KINDS = WAYS | {part: partial(ours, without=part) for part in PARTS}
