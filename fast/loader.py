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


class BatchedLoader:
    """Yields (images `dtype` (N, 3, H, W), labels int64 (N,)) like a DataLoader.

    `dataset`, `sampler` and `len` mean the same. Of each batch come the images that are this
    process's (utils.BatchSampler.shares). The draws come from `generator`, which every
    epoch is seeded from the sampler.

    Args:
        images, labels: uint8 (N, H, W, 3) and uint8 (N,).
        sampler: with `draw` and `shares`, as utils.BatchSampler has them.
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

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        batches, seeds = self.sampler.draw()
        if not seeds:  # a process of many, that has nothing to evaluate
            return
        self.generator.manual_seed(seeds[0])
        order = torch.from_numpy(np.concatenate(batches)).to(images.device)
        parts = [part for part, _ in self.sampler.shares()]
        for index, part in zip(order.split([len(each) for each in batches]), parts, strict=True):
            numbers = torch.arange(len(index), device=index.device)[part]
            mine, of = index[part], (len(index), numbers)
            yield (
                self.transform(images[mine], self.generator, self.dtype, self.layout, of),
                labels[mine],
            )
