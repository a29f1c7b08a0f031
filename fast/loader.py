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

    `dataset`, `sampler` and `len` mean the same. Of each batch come the images that are this
    process's (utils.BatchSampler.shares). The draws come from `generator`, which every epoch is
    seeded from the sampler, for `together` whole batches at a time: 1 but on a GPU.

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
        self.together = 1
        if device.type == "cuda":
            self.together = max(1, AT_ONCE // sampler.batch_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        batches, seeds = self.sampler.draw()
        if not seeds:  # a process of many, that has nothing to evaluate
            return
        self.generator.manual_seed(seeds[0])
        parts = [part for part, _ in self.sampler.shares()]
        mine = [batch[part] for batch, part in zip(batches, parts, strict=True)]
        order = torch.from_numpy(np.concatenate(mine)).to(images.device)
        for start in range(0, len(batches), self.together):
            run = slice(start, start + self.together)
            sizes, whole = ([len(each) for each in some[run]] for some in (mine, batches))
            of, index = None, order[: sum(sizes)]
            order = order[sum(sizes) :]
            if sum(sizes) < sum(whole):  # draws are for whole batches, so that all processes agree
                places = np.split(np.arange(sum(whole)), np.cumsum(whole)[:-1])
                rows = [place[part] for place, part in zip(places, parts[run], strict=True)]
                of = sum(whole), torch.from_numpy(np.concatenate(rows)).to(images.device)
            made = self.transform(images[index], self.generator, self.dtype, self.layout, of)
            yield from zip(made.split(sizes), labels[index].split(sizes), strict=True)
