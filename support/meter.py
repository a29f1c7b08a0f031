"""An epoch's loss and accuracy, added up on the device, and its progress bar."""

import math
import time
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from errors import Error
from parallel import ALONE, Team


class DivergedError(Error, RuntimeError):
    """The loss became NaN or infinite."""


class Metrics(NamedTuple):
    """Means over all images of an epoch: loss in nats, accuracy in percent."""

    loss: float
    accuracy: float


class Meter:
    """Adds up an epoch's loss and hits, image by image, and shows them on a progress bar.

    The sums stay on the device: reading them makes a GPU wait, so that is done twice a second; in a
    team, which would have to read them together, at the end alone.
    """

    READ_EVERY = 0.5  # seconds

    def __init__(
        self,
        title: str,
        images: int,
        device: torch.device,
        team: Team = ALONE,
        show: bool = True,
    ) -> None:
        self.title, self.team = title, team
        self.images = self.steps = 0
        self.last_read = time.monotonic()
        # float32 sums of 50,000 losses would lose digits, and MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=dtype, device=device)  # loss, hits
        quiet = None if team.first and show else True  # None: where there is no terminal
        self.bar = tqdm(total=images, desc=title, unit="img", leave=False, disable=quiet)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch's mean loss, and its logits' hits."""
        hits = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), hits])
        self.images += len(labels)
        self.steps += 1
        self.bar.update(len(labels))
        if self.team.size == 1 and time.monotonic() - self.last_read > self.READ_EVERY:
            loss, accuracy = self.read()
            self.last_read = time.monotonic()
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}%", refresh=False)

    def read(self) -> Metrics:
        """The means so far, over all processes of the team."""
        together = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        loss, hits, images = self.team.sum(together).tolist()
        loss, hits = loss / images, hits / images
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} within the first {self.steps} steps of {self.title!r}: "
                "the training diverged; try a lower learning rate (train.py --lr)"
            )
        return Metrics(loss, 100 * hits)


def progress(loader: Collection, title: str, team: Team = ALONE) -> tqdm:
    """The loader, with a bar of its batches while it is gone through."""
    quiet = None if team.first else True
    return tqdm(loader, desc=title, unit="batch", leave=False, disable=quiet)
