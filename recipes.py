"""How a network is trained: a model file's RECIPE, checked, its optimizer and its schedule.

docs/recipes.md says why the recipes of this repository are what they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

import utils
from errors import UsageError
from fast.batched import A
from fast.muon import Muon

LARGEST = 1e15  # of any number in a recipe: far above all sense; squared, float32 still holds it


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: a model file's RECIPE, completed and checked.

    Raises:
        ValueError: a value out of its range, named.
    """

    optimizer: str  # "muon" (on convolutions, sgd on the rest), "sgd" (Nesterov) or "adamw"
    lr: float  # the schedule's peak; with muon, of the convolutions
    weight_decay: float  # on weights of convolutions and linear layers; with muon, of linear ones
    schedule: str  # "onecycle" (linear up, linear down) or "cosine" (down from lr)
    batch_size: int
    target_accuracy: float  # percent ...
    target_epochs: int  # ... within so many epochs
    momentum: float = 0.9  # of sgd
    other_lr: float = 0.06  # with muon: the peak of what sgd trains
    muon_momentum: float = 0.6
    nesterov: bool = True  # of sgd
    warmup: float = 0.3  # share of onecycle's steps on the way up
    div_factor: float = 25.0  # onecycle begins at lr / div_factor
    final_lr: float = 0.0  # where cosine ends
    clip_norm: float = 0.0  # longest gradient, all parameters as one vector; 0: any
    label_smoothing: float = 0.0
    teacher: str = ""  # folder of a run: distilled from its network
    teacher_weight: float = 0.8  # the teacher's share in the targets; the labels have the rest
    dropout: float = 1.0  # factor on the probabilities of the network's dropout layers
    transform: str = "standard"  # or crop_cutout, crop_affine_jitter; see utils.TRANSFORMS
    augment: float = 0.5  # probability of the transform's steps that are not for every image ...
    augment_epochs: int = 1  # ... in runs of so many epochs or more; see `augmentation`

    def __post_init__(self) -> None:
        checks = (
            (
                "optimizer",
                self.optimizer in ("muon", "sgd", "adamw"),
                "muon, sgd or adamw",
            ),
            ("schedule", self.schedule in ("onecycle", "cosine"), "onecycle or cosine"),
            (
                "lr",
                _number(self.lr) and 0 < self.lr <= LARGEST,
                f"a number above 0, {LARGEST:g} at most",
            ),
            (
                "weight_decay",
                _number(self.weight_decay) and 0 <= self.weight_decay <= LARGEST,
                f"a number from 0 up, {LARGEST:g} at most",
            ),
            ("momentum", _number(self.momentum) and 0 < self.momentum < 1, "between 0 and 1"),
            (
                "other_lr",
                _number(self.other_lr) and 0 < self.other_lr <= LARGEST,
                f"a number above 0, {LARGEST:g} at most",
            ),
            (
                "muon_momentum",
                _number(self.muon_momentum) and 0 < self.muon_momentum < 1,
                "between 0 and 1",
            ),
            (
                "dropout",
                _number(self.dropout) and 0 <= self.dropout <= LARGEST,
                f"a number from 0 up, {LARGEST:g} at most",
            ),
            ("augment", _number(self.augment) and 0 <= self.augment <= 1, "from 0 to 1"),
            (
                "augment_epochs",
                _count(self.augment_epochs),
                f"a whole number from 1 up, {LARGEST:g} at most",
            ),
            ("nesterov", isinstance(self.nesterov, bool), "True or False"),
            (
                "div_factor",
                _number(self.div_factor) and 1 <= self.div_factor <= LARGEST,
                f"a number from 1 up, {LARGEST:g} at most",
            ),
            (
                "final_lr",
                _number(self.final_lr) and 0 <= self.final_lr <= LARGEST,
                f"a number from 0 up, {LARGEST:g} at most",
            ),
            (
                "clip_norm",
                _number(self.clip_norm) and 0 <= self.clip_norm <= LARGEST,
                f"a number from 0 up, {LARGEST:g} at most",
            ),
            (
                "transform",
                isinstance(self.transform, str) and self.transform in utils.TRANSFORMS,
                f"one of {', '.join(utils.TRANSFORMS)}",
            ),
            ("warmup", _number(self.warmup) and 0 < self.warmup < 1, "between 0 and 1"),
            (
                "label_smoothing",
                _number(self.label_smoothing) and 0 <= self.label_smoothing < 1,
                "from 0 to below 1",
            ),
            ("teacher", isinstance(self.teacher, str), "the folder of a run, or '' for none"),
            (
                "teacher_weight",
                _number(self.teacher_weight) and 0 < self.teacher_weight <= 1,
                "above 0 and at most 1",
            ),
            (
                "batch_size",
                _count(self.batch_size),
                f"a whole number from 1 up, {LARGEST:g} at most",
            ),
            (
                "target_epochs",
                _count(self.target_epochs),
                f"a whole number from 1 up, {LARGEST:g} at most",
            ),
            (
                "target_accuracy",
                _number(self.target_accuracy) and 0 < self.target_accuracy <= 100,
                "a percentage, above 0 and at most 100",
            ),
        )
        for name, good, wanted in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; it must be {wanted}")

    @classmethod
    def from_dict(cls, recipe: Mapping) -> "Recipe":
        """The RECIPE dictionary of a model file, refused when a key is unknown or missing."""
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in recipe if key not in known]
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
        try:
            return cls(**recipe)
        except TypeError as error:  # names the missing keys
            raise ValueError(str(error).partition("() ")[2]) from None

    def augmentation(self, epochs: int) -> float:
        """The `probability` that the transform is built with, in a run of so many epochs.

        Of the hole, with "crop_cutout"; of Affine and the hole, each, with "standard"; see
        utils.TRANSFORMS. Short runs never come to overfit; there, augmentation only hides the
        images. So it grows with the square root of the epochs, up to `augment` at
        `augment_epochs`.
        """
        return self.augment * min(1.0, math.sqrt(epochs / self.augment_epochs))

    def train_transform(self, mean: utils.RGB, std: utils.RGB, epochs: int) -> A.Compose:
        """The pipeline that `transform` names, as strong as a run of so many epochs takes it."""
        return utils.TRANSFORMS[self.transform](mean, std, self.augmentation(epochs))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def scale_dropout(model: nn.Module, factor: float) -> None:
    """Multiplies the probability of every dropout of the model by the recipe's factor.

    Dropout layers of all kinds, and the `dropout` of attention and of recurrent layers.

    Raises:
        UsageError: a probability would be 1 or more.
    """
    if factor == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            name = "p"
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            name = "dropout"
        else:
            continue
        probability = getattr(module, name) * factor
        if probability >= 1:
            raise UsageError(f"dropout {factor:g} makes a probability of {probability:g}")
        setattr(module, name, probability)


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
    if recipe.optimizer == "muon":
        return Muon(
            model,
            recipe.lr,
            recipe.other_lr,
            recipe.muon_momentum,
            recipe.momentum,
            recipe.weight_decay,
            dtype,
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over all parameters instead of several over each.
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)
    return torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule over exactly `steps` optimizer steps; it ends at zero (nearly)."""
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=steps, eta_min=recipe.final_lr
        )
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        # One more than is trained: after the last step the scheduler moves on once, and past
        # its end OneCycleLR would go on along its line to a learning rate below zero.
        total_steps=steps + 1,
        # At least a step and a half of a very short run: OneCycleLR divides by the way up, which it
        # takes for pct_start * total_steps - 1 steps long.
        pct_start=max(recipe.warmup, min(1.5 / (steps + 1), 0.9)),
        div_factor=recipe.div_factor,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
