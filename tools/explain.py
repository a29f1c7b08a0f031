"""Where a network looks, for the tools that take --explain: Grad-CAM, computed by captum.

    look = explain.GradCam(trained, utils.Device.pick())
    maps = look(images, classes, transform)

Selvaraju et al. (2017, https://arxiv.org/abs/1610.02391): each channel of the last convolution is
weighted with the mean gradient of the class's logit in it; where the sum of the weighted channels
is positive, it speaks for the class.
"""

import functools
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor, nn

import networks
import plots
import utils
from cifar10 import CLASSES
from errors import UsageError
from fast.batched import A
from support.needed import needed
from tools.exported import Exported

FILE, TITLE = "grad_cam.png", "Where it looks"
MISTAKES, MOST = 10, 100  # shown at most: of an evaluation, and of one's own pictures
COLUMNS = 5  # side by side
COLOURS, OPACITY = "inferno", 0.6
SIDE, GAP = 32, 2  # pixels of an image, and between it and its map


class GradCam:
    """Grad-CAM of a trained network, which goes to the device, but is not changed.

    The feature map is the last one of more than one pixel, behind a convolution, that a module is
    given or gives. In our networks the pooling is given it, after BatchNorm and ReLU; as then only
    an average and a linear layer follow, this is CAM (Zhou et al., 2016,
    https://arxiv.org/abs/1512.04150).

    Fields: `place`, as "before pool"; `size`, the feature map's height and width.

    Raises:
        UsageError: an .onnx file, no such layer, or no gradients.
        NotInstalledError: captum is not there.
    """

    def __init__(self, trained: networks.Trained | Exported, device: utils.Device) -> None:
        if isinstance(trained, Exported):
            raise UsageError(
                f"{trained.file} gives no gradients, which --explain needs; give the folder of the "
                "run that it was exported from"
            )
        with needed("--explain", "requirements-explain.txt"):
            from captum.attr import LayerGradCam  # here: nothing else needs it
        self.name, self.device = trained.name, trained.source.fitting(device).exact
        network = trained.network.to(self.device.where, memory_format=self.device.layout)
        # Two images, since some networks squeeze the answer to a single one.
        blank = self.device.take(torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, dtype=torch.int64))
        maps = feature_maps(network, blank[0])
        if not maps:
            raise UsageError(
                f"{self.name} has no convolution with a feature map of more than one pixel, so "
                "--explain has nothing to show; leave it out"
            )
        reasons = []
        for (layer, enters), size in reversed(maps.items()):
            self.size, self._enters = size, enters
            self.place = f"{'before' if enters else 'after'} {layer}"
            self._cam = LayerGradCam(network, network.get_submodule(layer))
            try:
                self._attribute(*blank)  # what fails had better fail before a whole test set
                return
            except UsageError as error:  # a side branch, which the answer does not come from
                reasons.append(error)
        raise reasons[0]

    def __call__(self, images: np.ndarray, classes: np.ndarray, transform: A.Compose) -> np.ndarray:
        """Where something speaks for a class: float32 (N, 32, 32), 1 at each map's maximum.

        Enlarged bilinearly; 0 all over where nothing speaks for it.

        Args:
            images: uint8 (N, 32, 32, 3).
            classes: int (N,), one for each image.
            transform: the test transform.

        Raises:
            UsageError: no gradients.
        """
        two = [*range(len(images)), 0] if len(images) == 1 else range(len(images))  # as above
        tensors = torch.stack([transform(image=images[at])["image"] for at in two])
        numbers = torch.from_numpy(classes[list(two)]).long()
        found = self._attribute(*self.device.take(tensors, numbers))[: len(images)]
        maps = F.interpolate(found, (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
        most = maps.amax(dim=(1, 2), keepdim=True)
        return (maps / most.clamp(min=torch.finfo(maps.dtype).tiny)).numpy()

    def _attribute(self, images: Tensor, classes: Tensor) -> Tensor:
        """As small as the feature map, float32 (N, 1, H, W), from 0 up, on the CPU."""
        try:
            found = self._cam.attribute(
                images,
                classes,
                attribute_to_layer_input=self._enters,
                relu_attributions=True,
            )
            if not found.isfinite().all():
                raise ValueError("they are NaN or infinite")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever somebody's network may do
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"--explain needs gradients, which {self.name} does not give ({reason}); leave it "
                "out"
            ) from None
        return found.detach().float().cpu()


def feature_maps(network: nn.Module, images: Tensor) -> dict[tuple[str, bool], tuple[int, int]]:
    """Height and width of what passes from module to module behind a convolution, in that order.

    Without single pixels. By the module's name and whether it is given the map or gives it.
    A convolution is a module with a weight of four dimensions; `images` (N, 3, 32, 32) are
    normalised.
    """
    convolved, found = False, {}

    def note(name: str, enters: bool, value: object) -> None:
        found.pop((name, enters), None)  # of a module that is called again, the last time counts
        if convolved and isinstance(value, Tensor) and value.dim() == 4 and value[0, 0].numel() > 1:
            found[name, enters] = tuple(value.shape[2:])

    def enter(name: str, _module: nn.Module, inputs: tuple) -> None:
        note(name, True, inputs[0] if len(inputs) == 1 else None)

    def leave(name: str, module: nn.Module, _inputs: tuple, output: object) -> None:
        nonlocal convolved
        convolved |= any(parameter.dim() == 4 for parameter in module.parameters())
        note(name, False, output)

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(functools.partial(enter, name)))
        hooks.append(module.register_forward_hook(functools.partial(leave, name)))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Part(NamedTuple):
    """Some images of a picture: uint8 (N, 32, 32, 3), predicted classes int (N,), a text each."""

    heading: str
    images: np.ndarray
    classes: np.ndarray
    texts: list[str]


def of_answers(
    look: GradCam,
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    answers: np.ndarray,
    transform: A.Compose,
) -> bytes:
    """The most confident mistakes, and the most confident right answer of each class, as PNG.

    Args:
        images, labels: uint8 (N, 32, 32, 3), int (N,).
        answers: log-probabilities, float32 (N, 10).
    """
    sure, found = np.exp(answers.max(axis=1)), answers.argmax(axis=1)
    surest = np.argsort(-sure, kind="stable")
    wrong, right = (surest[chosen[surest]] for chosen in (found != labels, found == labels))
    shown = wrong[:MISTAKES]
    right = right[np.unique(labels[right], return_index=True)[1]]
    mistakes = [
        f"true {CLASSES[labels[at]]},\npredicted {CLASSES[found[at]]}, {100 * sure[at]:.1f} %"
        for at in shown
    ]
    each = [f"{CLASSES[found[at]]}, {100 * sure[at]:.1f} %" for at in right]
    most = f"The {len(shown)} most confident of {len(wrong):,} mistakes"
    parts = [
        Part(heading, images[chosen], found[chosen], texts)
        for heading, chosen, texts in (
            (most if len(wrong) > 1 else "The only mistake", shown, mistakes),
            ("The most confident right answer of each class", right, each),
        )
        if texts
    ]
    return draw(look, title, parts, transform)


def of_pictures(
    look: GradCam,
    paths: Sequence[Path],
    images: np.ndarray,
    probabilities: np.ndarray,
    transform: A.Compose,
) -> bytes:
    """The first 100 of somebody's pictures with their likeliest classes, as PNG.

    Args:
        images: uint8 (N, 32, 32, 3).
        probabilities: float32 (N, 10).
    """
    names = [path.name if len(path.name) <= 19 else f"{path.name[:18]}…" for path in paths[:MOST]]
    texts = [
        f"{_printable(name)}\n{CLASSES[row.argmax()]}, {100 * row.max():.1f} %"
        for name, row in zip(names, probabilities, strict=False)
    ]
    heading = f"{len(texts)} pictures" if len(texts) > 1 else "One picture"
    if len(paths) > MOST:
        heading = f"The first {MOST} of {len(paths):,} pictures"
    classes = probabilities.argmax(axis=1)[:MOST]
    return draw(look, look.name, [Part(heading, images[:MOST], classes, texts)], transform)


def draw(look: GradCam, title: str, parts: list[Part], transform: A.Compose) -> bytes:
    """Each image beside its map, as PNG that says in words what it shows."""
    columns = min(COLUMNS, max(2, *(len(part.texts) for part in parts)))
    rows = [math.ceil(len(part.texts) / columns) for part in parts]
    height, width = look.size
    across = 3.1 * columns + 1  # inches, of some ten letters each
    titles = [_printable(title), f"Where it looks: Grad-CAM, {height}x{width} values {look.place}"]
    lines = [line for each in titles for line in textwrap.wrap(each, int(10 * across))]
    figure = Figure(
        figsize=(across, 2.05 * sum(rows) + 0.6 + 0.2 * len(lines)), layout="constrained"
    )
    figure.suptitle("\n".join(lines), parse_math=False)
    panels = figure.subfigures(len(parts), 1, height_ratios=rows, squeeze=False)[:, 0]
    for panel, part, count in zip(panels, parts, rows, strict=True):
        panel.suptitle(part.heading, fontsize="medium")
        grid = panel.subplots(count, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        maps = look(part.images, part.classes, transform)
        for axes, image, seen, text in zip(grid, part.images, maps, part.texts, strict=False):
            beside = (SIDE + GAP, 2 * SIDE + GAP, SIDE, 0)
            axes.imshow(image, extent=(0, SIDE, SIDE, 0))
            axes.imshow(image, extent=beside)
            axes.imshow(seen, COLOURS, alpha=OPACITY, vmin=0, vmax=1, extent=beside)
            axes.set(xlim=(0, 2 * SIDE + GAP), ylim=(SIDE, 0))
            axes.set_title(text, fontsize=10, parse_math=False)
        scale, first_two = ScalarMappable(cmap=COLOURS), grid[: 2 * columns]
        bar = panel.colorbar(scale, ax=first_two, alpha=OPACITY, ticks=[0, 1], fraction=0.05)
        bar.set_ticklabels(["not at all", "most"])
        bar.set_label("speaks for the predicted class", fontsize=9)
    shown = [f"{part.heading}: {'; '.join(part.texts)}." for part in parts]
    told = "Grad-CAM, bright where something speaks for the predicted class. " + " ".join(shown)
    figure.set_label(" ".join(told.split()))
    with warnings.catch_warnings(action="ignore"):  # of signs in names that the font has not
        return plots.png(figure, TITLE)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
