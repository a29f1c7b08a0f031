"""The well-known loader: Albumentations image by image, in worker processes.

For transforms that have no batched form, and to compare fast/loader.py with.
"""

import random
import signal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fast.batched import A, BatchedTransform, UnknownTransformError
from support.process import usable_cores


def seed_steps(transform: A.Compose, seed: int) -> None:
    """One generator for all steps of the pipeline.

    `Compose.set_random_seed` gives each step its own, all of one seed: of the first image, each
    step would draw the same numbers, so that all are applied or none.
    """
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))


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
        seed_steps(self.transform, seed)
        tensors = [self.transform(image=self.images[index])["image"] for index in indices]
        return torch.stack(tensors), self.labels[indices]


def worker_loader(
    images: np.ndarray,
    labels: np.ndarray,
    transform: A.Compose,
    sampler: Sampler,
    workers: int,
    device: torch.device,
) -> DataLoader:
    """Yields (images float32 (N, 3, H, W), labels int64 (N,)), on the CPU.

    Args:
        images, labels: uint8 (N, H, W, 3) and uint8 (N,).
        sampler: of (seed of the batch, indices of its images), such as utils.BatchSampler.
        workers: processes; 0: none but this one.
        device: where the batches will go.
    """
    cv2.setNumThreads(0)  # an image of 32x32 is no work to share; the threads only get in the way
    return DataLoader(
        TransformedBatches(images, labels, transform),
        batch_size=None,  # the sampler makes the batches
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_init_worker,
        # Of its own, or starting the workers would draw from the generator that dropout uses.
        generator=torch.Generator().manual_seed(0),
    )


def _init_worker(_worker: int) -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def choose(
    transform: A.Compose, wanted: str = "batched", workers: int | None = None
) -> tuple[int | None, str]:
    """How to run a transform: `workers` of utils.make_loader, and a line that says so.

    Args:
        wanted: "batched" (where there is such a form of the transform) or "albumentations".
        workers: processes of Albumentations' loader; None: one for each core that we may use, at
            most 8.
    """
    reason = "as --loader asks"
    if wanted == "batched":
        try:
            BatchedTransform.from_compose(transform)
        except UnknownTransformError as error:
            reason = f"because there is no batched form of {error}"
        else:
            idle = "" if workers is None else "; --workers is for --loader albumentations"
            return None, f"batched, on the device{idle}"
    workers = default_workers() if workers is None else workers
    return workers, f"albumentations in {workers} worker processes, {reason}"


def default_workers() -> int:
    """Worker processes for a DataLoader: one for each core that we may use, at most 8."""
    return min(usable_cores(), 8)
