"""Does the augmentation do what it says? Checks with figures; exit status 1 if one fails.

    python -m tools.validate_transforms                         # on CIFAR-10
    python -m tools.validate_transforms --dry-run               # on data/sample
    python -m tools.validate_transforms --transform crop_cutout # one training transform alone

It checks whatever the training transforms of RATES (`utils.train_transform` is "standard") and
`utils.test_transform` return, against what this repository promises of them (RATES, RANGES):
after an edit it tells at once what changed or broke. If a change was meant, change the promise with
it.

Rates and ranges come from the parameters that Albumentations reports of each image; what lies in
the pixels (fill, hole, normalisation, agreement of the batched form) is measured there. A step that
no promise names, or that has no batched form to compare, is listed as unchecked.
"""

import argparse
import copy
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import cifar10
import cli
import plots
import utils
from fast.batched import A, UnknownTransformError, read
from support import workers

RATES = {  # of each transform's steps, when its probability is left at 0.5
    "standard": {"HorizontalFlip": 0.5, "Affine": 0.5, "CoarseDropout": 0.5},
    "crop_cutout": {"RandomCrop": 1.0, "HorizontalFlip": 0.5, "CoarseDropout": 0.5},
    "crop_affine_jitter": {
        "HorizontalFlip": 0.5,
        "Affine": 0.5,
        "CoarseDropout": 0.5,
        "ColorJitter": 0.5,
        "RandomCrop": 1.0,
    },
}
RANGES = {  # of what the steps draw
    "angle": (-15.0, 15.0),  # degrees
    "scale": (0.9, 1.1),
    "shift": (-0.1, 0.1),  # of the width or height
    "holes": (1, 1),
    "hole area": (16 * 16, 16 * 16),  # pixels
    "brightness": (0.8, 1.2),  # factors
    "contrast": (0.8, 1.2),
    "saturation": (0.8, 1.2),
    "hue": (-0.02, 0.02),  # of a full turn
}
SHIFTS = 9  # of a crop, whole pixels from -4 to 4, to the sides as up and down
ENDING = ("Normalize", "ToTensorV2")
JITTER = ("brightness", "contrast", "saturation", "hue")
MOST_IMAGES = 4000  # for what takes Albumentations, image by image
STATUS = {True: "ok", False: "FAIL", None: "unchecked"}
# Shares of the values that may differ from Albumentations', and by more than one grey level: a
# level off in one of the jitter's adjustments, or in JPEG's coefficients, is more at the end.
TOLERATED = {"ColorJitter": (0.005, 1e-4), "ImageCompression": (0.05, 0.01)}
SIGMAS = 4.5  # an honest rate strays further once in 150,000 checks


class Check(NamedTuple):
    """A line of the table."""

    name: str
    wanted: str
    found: str
    good: bool | None  # None: nothing here can tell


def within(name: str, values: object, low: float, high: float, reach: float = math.inf) -> Check:
    """All values lie from low to high, and come as close as `reach` to both."""
    least, most = np.min(values), np.max(values)
    good = low <= least and most <= high and max(least - low, high - most) <= reach
    ends = [f"{end:,.9g}" for end in np.round([low, high, least, most], 4) + 0.0]  # no -0
    wanted, found = (" to ".join(dict.fromkeys(pair)) for pair in (ends[:2], ends[2:]))
    return Check(name, wanted, found, bool(good))


def near(name: str, shares: object, wanted: float, count: int) -> Check:
    """The shares are what a chance of `wanted` gives in so many draws (binomial distribution)."""
    tolerance = SIGMAS * math.sqrt(wanted * (1 - wanted) / count)
    return within(name, shares, wanted - tolerance, wanted + tolerance)


def apply(pipeline: A.Compose, images: Iterable, seed: int = 0) -> tuple[list, list[dict]]:
    """The pipeline's output of each image, and what its steps drew for it, by the step's name."""
    options = {"save_applied_params": True, "strict": True, "seed": seed}
    telling = A.Compose(pipeline.transforms, p=pipeline.p, **options)
    results = [telling(image=image) for image in images]
    drawn = [dict(result["applied_transforms"]) for result in results]
    return [result["image"] for result in results], drawn


def always(step: A.BasicTransform) -> A.BasicTransform:
    """The same step, applied to every image."""
    step = copy.deepcopy(step)
    step.p = 1.0
    return step


def check_output(outputs: list[object]) -> Iterator[Check]:
    """Shape, type and values of what a pipeline returned."""
    shapes = {str(tuple(output.shape)) for output in outputs}
    types = {str(output.dtype) for output in outputs}
    for name, found, wanted in (("shape", shapes, "(3, 32, 32)"), ("type", types, "torch.float32")):
        yield Check(name, wanted, ", ".join(sorted(found)[:4]), found == {wanted})
    broken = sum(not bool(torch.as_tensor(output).isfinite().all()) for output in outputs)
    yield within("images with NaN or infinity", broken, 0, 0)


def check_test(pipeline: A.Compose, images: np.ndarray) -> Iterator[Check]:
    """The test transform normalises, and does nothing by chance."""
    own = utils.test_transform(*utils.channel_stats(images))
    pixels = torch.stack(apply(own, images)[0]).double().numpy()
    yield within("mean of each channel", pixels.mean(axis=(0, 2, 3)), -0.001, 0.001)
    yield within("std of each channel", pixels.std(axis=(0, 2, 3)), 0.999, 1.001)
    once, again = (torch.stack(apply(pipeline, images[:100], seed)[0]) for seed in (0, 1))
    yield within("the same twice", _equal([once], [again]), 1, 1)


def check_steps(rates: dict[str, float], drawn: list[dict[str, dict]]) -> Iterator[Check]:
    """How often each step was applied, and with what; never applied, it fails by its rate."""
    for step, wanted in rates.items():
        parameters = [each[step] for each in drawn if step in each]
        yield near(f"{step}: rate", len(parameters) / len(drawn), wanted, len(drawn))
        if parameters:
            yield from _all_of(step, check_parameters(step, parameters))


def check_parameters(step: str, drawn: list[dict]) -> Iterator[Check]:
    """What one step drew lies in RANGES, and fills them; the shifts of a crop are equally often."""
    values = {}
    if step == "Affine":
        matrices = np.array([each["matrix"] for each in drawn])
        # [[s cos a, -s sin a], [s sin a, s cos a]] up to the sense of rotation
        values["angle"] = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
        values["scale"] = np.sqrt(np.abs(np.linalg.det(matrices[:, :2, :2])))
        values["shift"] = (matrices[:, :2] @ [15.5, 15.5, 1] - 15.5) / 32
    elif step == "CoarseDropout":
        holes = np.concatenate([each["holes"] for each in drawn])  # x_min, y_min, x_max, y_max
        values["holes"] = np.array([len(each["holes"]) for each in drawn])
        values["hole area"] = (holes[:, 2:] - holes[:, :2]).prod(axis=1)
    elif step == "RandomCrop":
        corners = np.array([each["crop_coords"][:2] for each in drawn]).clip(max=SHIFTS - 1)
        for way, starts in zip(("sideways", "up and down"), corners.T, strict=True):
            shares = np.bincount(starts, minlength=SHIFTS) / len(drawn)
            yield near(f"RandomCrop: each shift {way}", shares, 1 / SHIFTS, len(drawn))
    elif step == "ColorJitter":
        for kind in JITTER:
            values[kind] = np.array([each[kind] for each in drawn])
    for name, found in values.items():
        low, high = RANGES[name]
        # A range that is never used is as wrong as one that is left.
        yield within(f"{step}: {name}", found.round(3), low, high, reach=0.1 * (high - low))


def check_fill(pipeline: A.Compose, mean: utils.RGB, std: utils.RGB) -> Iterator[Check]:
    """White images come out white but for the fill, which is the mean colour: about zero."""
    fill = tuple(round(255 * value) for value in mean)
    hole, wrong, seen = RANGES["hole area"][0], 0, 0
    white = np.full((400, 32, 32, 3), 255, dtype=np.uint8)
    # A jitter would colour the fill, too; a crop behind the hole cuts some of it off.
    steps = [step for step in pipeline.transforms if type(step).__name__ != "ColorJitter"]
    order = " ".join(type(step).__name__ for step in steps)
    cut = "RandomCrop" in order.partition("CoarseDropout")[2]
    for output, drawn in zip(*apply(A.Compose(steps, p=pipeline.p), white, seed=1), strict=True):
        pixels = plots.to_pixels(output, mean, std).astype(int)
        filled = (pixels == fill).all(axis=2)
        others = pixels[~filled & (pixels < 255).any(axis=2)]
        seen += filled.sum()
        if "Affine" in drawn:  # it interpolates between fill and image
            wrong += (others < np.array(fill) - 1).any(axis=1).sum()
        else:
            whole = cut or filled.sum() == hole * ("CoarseDropout" in drawn)
            wrong += len(others) + (not whole)
    yield within("fill: pixels of the mean colour", seen, 1, white[..., 0].size)
    yield within("pixels neither image nor fill", wrong, 0, 0)


def check_draws(pipeline: A.Compose, images: np.ndarray, labels: np.ndarray) -> Iterator[Check]:
    """The same seed gives the same batches; other seeds, epochs and workers give others."""
    images, labels = images[:512], labels[:512]

    def batches(
        images: np.ndarray = images, epoch: int = 1, **options: int | None
    ) -> list[torch.Tensor]:
        cpu = utils.Device(torch.device("cpu"))
        loader = utils.make_loader(images, labels, pipeline, 64, cpu, **options)
        loader.sampler.set_epoch(epoch)
        return [batch for batch, _ in loader]

    # Flip or not, and often nothing else: many images are equal by chance.
    for form in dict.fromkeys((0, workers.choose(pipeline, workers=0)[0])):
        base, again = batches(workers=form), batches(workers=form)
        seed, epoch = batches(workers=form, seed=1), batches(workers=form, epoch=2)
        name = "batched, " * (form is None)
        yield within(f"{name}same seed: equal images", _equal(base, again), 1, 1)
        yield within(f"{name}another seed: equal images", _equal(base, seed), 0, 0.5)
        yield within(f"{name}another epoch: equal images", _equal(base, epoch), 0, 0.5)
    alone, two = batches(workers=0), batches(workers=2)
    yield within("two workers: images equal to those of none", _equal(alone, two), 1, 1)
    copies = np.repeat(images[:1], len(images), axis=0)  # only the draws tell them apart
    made = batches(copies, workers=2)  # the workers take turns
    yield within("two workers: draws that both make", _equal(made[0::2], made[1::2]), 0, 0.5)


def check_agreement(pipeline: A.Compose, images: np.ndarray) -> Iterator[Check]:
    """Each step's batched form against Albumentations, applied always, with the same parameters.

    Args:
        images: uint8 (N, H, W, 3); steps behind one that changes the size get its outputs.
    """
    for step in pipeline.transforms:
        name = type(step).__name__
        if name in ENDING:
            continue
        outputs, drawn = apply(A.Compose([always(step)]), images, seed=2)
        before = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        theirs = np.stack(outputs)
        images = images if theirs.shape == images.shape else theirs
        try:
            batched = read(step)
        except UnknownTransformError as error:
            yield Check(f"batched {name}", "a batched form", f"none of {error}", None)
            continue
        parameters = _batched_parameters(name, [each[name] for each in drawn])
        ours = batched.apply(before, *parameters).permute(0, 2, 3, 1).numpy()
        difference = np.abs(ours.astype(int) - theirs)
        share, most = (difference > 0).mean(), difference.max()
        few, rare = TOLERATED.get(name, (0.005, 0.0))
        good = share < few and (difference > 1).mean() <= rare and ours.dtype == theirs.dtype
        wanted, found = f"under {few:.1%}, by one grey level", f"{share:.4%}, by {most}"
        yield Check(f"batched {name}: values that differ", wanted, found, bool(good))


def _batched_parameters(name: str, drawn: list[dict]) -> tuple[torch.Tensor, ...]:
    """What Albumentations drew, in the form that the batched step of that name takes."""
    if name == "Affine":
        return (torch.tensor(np.stack([each["matrix"][:2] for each in drawn])).float(),)
    if name == "CoarseDropout":  # an empty hole where there are fewer
        return (pad_sequence([torch.tensor(each["holes"]) for each in drawn], batch_first=True),)
    if name == "RandomCrop":
        return torch.tensor([each["crop_coords"][:2] for each in drawn]).unbind(1)
    if name == "ColorJitter":
        factors = torch.tensor([[each[kind] for kind in JITTER] for each in drawn])
        return factors, torch.tensor([list(each["order"]) for each in drawn])
    if name == "ImageCompression":
        return (torch.tensor([each["quality"] for each in drawn]),)
    if name == "GaussNoise":
        maps = np.stack([np.atleast_3d(each["noise_map"]) for each in drawn])
        return (torch.from_numpy(maps).permute(0, 3, 1, 2),)
    return ()


def validate(data: cifar10.CIFAR10, *transforms: str) -> dict[str, list[Check]]:
    """All checks of these training transforms, and of the test transform, by name."""
    names = (*transforms, "test")
    return {name: list(_all_of("transform", check_transform(name, data))) for name in names}


def check_transform(name: str, data: cifar10.CIFAR10) -> Iterator[Check]:
    """One transform's checks. What an unforeseen step breaks fails; the other checks go on."""
    images, rates = data.train_images[:MOST_IMAGES], RATES.get(name, {})
    stats = utils.channel_stats(data.train_images)
    pipeline = (utils.TRANSFORMS | {"test": utils.test_transform})[name](*stats)
    outputs, drawn = apply(pipeline, images)
    checks = list(check_output(outputs))
    yield from checks
    if not all(check.good for check in checks):
        pass  # what follows needs such outputs
    elif name == "test":
        yield from _all_of("test", check_test(pipeline, images))
    else:
        yield from check_steps(rates, drawn)
        yield from _all_of("fill", check_fill(pipeline, *stats))
        yield from _all_of("draws", check_draws(pipeline, data.train_images, data.train_labels))
        yield from _all_of("batched form", check_agreement(pipeline, images[:500]))
    for step in dict.fromkeys(type(step).__name__ for step in pipeline.transforms):
        # A pad belongs to its crop, and is checked with it.
        if step not in (*rates, "PadIfNeeded", *ENDING):
            yield Check(f"{step}: what it does", "a promise in RATES", "none", None)


def _all_of(name: str, checks: Iterable[Check]) -> Iterator[Check]:
    """These checks, and where they break off, one that failed."""
    try:
        yield from checks
    except Exception as error:  # whatever an edit may have broken
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield Check(f"{name}: runs", "yes", reason, False)


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The share of the images that are equal in both."""
    return (torch.cat(some) == torch.cat(others)).flatten(1).all(dim=1).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.validate_transforms",
        description="Checks what the transforms do; exit status 1 if a check fails.",
    )
    help = "a training transform, by the name that recipes know it by (default: all of these)"
    add = parser.add_argument
    add("--transform", choices=list(RATES), help=help)
    add("--data-dir", default="data", help="where CIFAR-10 lies or is put (data)")
    add("--dry-run", action="store_true", help="on the images in data/sample, without network")
    return cli.run(parser, work, arguments)


def work(args: argparse.Namespace) -> int:
    """Prints the table of checks; returns 1 if one failed."""
    checks = validate(cli.load_data(args), *([args.transform] if args.transform else RATES))
    rows = [("transform", "check", "wanted", "found", "")]
    for name, each in checks.items():
        rows += [(name, *check[:3], STATUS[check.good]) for check in each]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    counts = Counter(row[-1] for row in rows[1:])
    things = f", {counts['unchecked']} unchecked" * bool(counts["unchecked"])
    print(f"\n{counts['ok']} of {len(rows) - 1} checks passed{things}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
