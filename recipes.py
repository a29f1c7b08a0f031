"""How a network is trained: a model file's RECIPE, checked, its optimizer and its schedule.

docs/recipes.md says why the recipes of this repository are what they are.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn

import utils
from errors import UsageError, first_of
from fast.batched import A
from fast.muon import Muon
from support.damage import hardened

LARGEST = 1e15  # no sensible value is near it, and its square still fits into float32
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
FromZero = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Recipe:
    """How a network is trained: a model file's RECIPE, completed and checked.

    Raises:
        pydantic.ValidationError (a ValueError): a value out of its range, or an unknown key.
    """

    optimizer: Literal["muon", "sgd", "adamw"]  # muon: on convolutions, sgd on the rest
    lr: Positive  # the schedule's peak; with muon, of the convolutions
    weight_decay: FromZero  # on convolutions and linear layers; with muon, on linear layers
    schedule: Literal["onecycle", "cosine"]  # linear up, linear down; or down from lr
    batch_size: Count
    target_accuracy: Annotated[float, Field(gt=0, le=100)]  # percent ...
    target_epochs: Count  # ... within so many epochs
    momentum: Share = 0.9  # of sgd, also of what muon leaves to it
    other_lr: Positive = 0.06  # with muon: the peak of what sgd trains
    muon_momentum: Share = 0.6
    nesterov: bool = True  # of sgd; with muon always
    warmup: Share = 0.3  # share of onecycle's steps on the way up
    div_factor: Annotated[float, Field(ge=1, le=LARGEST)] = 25.0  # onecycle begins at lr / this
    final_lr: FromZero = 0.0  # where cosine ends
    clip_norm: FromZero = 0.0  # longest gradient, all parameters as one vector; 0: any
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    teacher: str = ""  # folder of a run, or of tools.answers: distilled from that network
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 0.8  # its share in the loss
    teacher_temperature: Annotated[float, Field(ge=0.1, le=100)] = 1.0  # above 1: softer
    dropout: FromZero = 1.0  # factor on the probabilities of the network's dropout layers
    transform: Literal[tuple(utils.TRANSFORMS)] = "standard"
    augment: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of the transform's steps ...
    augment_epochs: Count = 1  # ... in runs of so many epochs or more; see `augmentation`
    robust: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of images damaged by JPEG or noise

    @classmethod
    def read(cls, recipe: Mapping) -> "Recipe":
        """The RECIPE dictionary of a model file.

        Raises:
            ValueError: in one line, a key that is unknown or missing, or a value out of its range.
        """
        known = cls.__dataclass_fields__
        unknown = [str(key) for key in recipe if key not in known]
        if unknown:
            name = " ".join(unknown[0].splitlines())
            raise ValueError(f"{name} is unknown; known are {', '.join(known)}")
        try:
            return cls(**recipe)
        except ValidationError as error:
            raise ValueError(first_of(error)) from None

    def fitted(self, images: int, shrink: bool) -> "Recipe":
        """With a batch that is no larger than the training set.

        Raises:
            UsageError: it is larger, and may not `shrink`.
        """
        if self.batch_size > images and not shrink:
            raise UsageError(
                f"the batch size {self.batch_size} is above the number of training images; give "
                f"--batch-size a number from 1 to {images}"
            )
        return replace(self, batch_size=min(self.batch_size, images))

    def augmentation(self, epochs: int) -> float:
        """The `probability` of utils.train_transform, in a run of so many epochs.

        Short runs never come to overfit; there, augmentation only hides the images. So it grows
        with the square root of the epochs, up to `augment` at `augment_epochs`.
        """
        return self.augment * min(1.0, math.sqrt(epochs / self.augment_epochs))

    def train_transform(self, mean: utils.RGB, std: utils.RGB, epochs: int) -> A.Compose:
        """The pipeline that `transform` names, as strong as a run of so many epochs takes it."""
        transform = utils.TRANSFORMS[self.transform](mean, std, self.augmentation(epochs))
        return hardened(transform, self.robust)


def make_optimizer(
    model: nn.Module, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay on weights of two dimensions or more.

    Muon orthogonalises in `dtype`, and it keeps the filters' norm, so that they need no decay.
    BatchNorm's scales and the biases are spared: pulling them to zero regularises nothing, since
    the next layer can scale back (He et al., 2019, https://arxiv.org/abs/1812.01187, "no bias
    decay").

    Raises:
        UsageError: nothing to train.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing to train"
        )
    r = recipe
    if r.optimizer == "muon":
        momenta = {"momentum": r.muon_momentum, "other_momentum": r.momentum}
        return Muon(model, r.lr, r.other_lr, **momenta, weight_decay=r.weight_decay, dtype=dtype)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": r.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over all parameters instead of several over each.
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    if r.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=r.lr, fused=fused)
    return torch.optim.SGD(groups, r.lr, r.momentum, nesterov=r.nesterov, fused=fused)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule over exactly `steps` steps; onecycle ends at zero (nearly)."""
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, recipe.final_lr)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        # One more than is trained: after the last step the scheduler moves on once, and past
        # its end OneCycleLR would go on along its line to a learning rate below zero.
        total_steps=steps + 1,
        # At least a step and a half: OneCycleLR divides by the way up, pct_start * total_steps - 1.
        pct_start=max(recipe.warmup, min(1.5 / (steps + 1), 0.9)),
        div_factor=recipe.div_factor,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
