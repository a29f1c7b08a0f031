"""Batches made on the device, where the data set lies as uint8: no workers, no copies.

support.workers.TransformedBatches in a DataLoader is the slow form: the same order of images, and
pictures of the same distribution.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, TensorDataset

from fast.batched import BatchedTransform

# What a GPU augments at once: whole batches of this many images together, at least one. Launching
# the operations takes longer than a single batch's arithmetic, and 16 batches take as many as one.
# The CPU has nothing to gain, and its caches would lose.
AT_ONCE = 4096


class BatchedLoader:
    """Yields (images `dtype` (N, 3, H, W), labels int64 (N,)) like a DataLoader.

    `dataset`, `sampler` and `len` mean the same. The draws come from `generator`, which every
    epoch is seeded from the sampler, for `together` batches at a time: 1 but on a GPU.

    Args:
        images, labels: uint8 (N, H, W, 3) and uint8 (N,).
        sampler: with `draw`, as utils.BatchSampler has it.
        device, dtype, layout: where and how the images come.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: BatchedTransform,
        sampler: Sampler,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
    ) -> None:
        planar = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        numbers = torch.from_numpy(labels.astype(np.int64))
        self.dataset = TensorDataset(planar.to(device), numbers.to(device))
        self.sampler, self.transform = sampler, transform
        self.dtype, self.layout = dtype, layout
        self.generator = torch.Generator(device)
        self.together = 1
        if device.type == "cuda":
            self.together = max(1, AT_ONCE // sampler.batch_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        batches, seeds = self.sampler.draw()
        self.generator.manual_seed(seeds[0])
        order = torch.from_numpy(np.concatenate(batches)).to(images.device)
        sizes = [len(batch) for batch in batches]
        runs = [sizes[i : i + self.together] for i in range(0, len(sizes), self.together)]
        for index, run in zip(order.split([sum(run) for run in runs]), runs, strict=True):
            made = self.transform(images[index], self.generator, self.dtype, self.layout)
            yield from zip(made.split(run), labels[index].split(run), strict=True)
