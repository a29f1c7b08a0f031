"""Does the augmentation do what it says? Checks with figures; exit status 1 if one fails.

    python -m tools.validate_transforms                         # on CIFAR-10
    python -m tools.validate_transforms --dry-run               # on data/sample
    python -m tools.validate_transforms --transform crop_cutout # one training transform alone

It checks whatever the training transforms of RATES (`utils.train_transform` is "standard") and
`utils.test_transform` return, against what this repository promises of them (RATES, PROMISES):
after an edit it tells at once what changed or broke. If a change was meant, change the promise with
it.

Rates and ranges come from the parameters that Albumentations reports of each image; what lies in
the pixels (fill, hole, normalisation, agreement of the batched form) is measured there. A step that
no promise names, or that has no batched form to compare, is listed as unchecked.
"""

import argparse
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

import cifar10
import cli
import utils
from fast.batched import A, BatchedTransform, UnknownTransformError, read

RATES = {  # of each transform's steps, when its probability is left at 0.5
    "standard": {"HorizontalFlip": 0.5, "Affine": 0.5, "CoarseDropout": 0.5},
    "crop_cutout": {"RandomCrop": 1.0, "HorizontalFlip": 0.5, "CoarseDropout": 0.5},
}
PROMISES = {
    "crop": 4,  # pixels, either way
    "angle": 15.0,  # degrees, either way
    "scale": 0.1,  # more or less than 1
    "shift": 0.1,  # of the width or height, either way
    "holes": 1,
    "hole area": 16 * 16,  # pixels
}
# They end every pipeline or belong to a crop, and are checked with it, by its outputs.
NEED_NO_PROMISE = ("PadIfNeeded", "Normalize", "ToTensorV2")
MOST_IMAGES = 4000  # for what takes Albumentations, image by image
SIGMAS = 4.5  # an honest rate strays further once in 150,000 checks
CPU = torch.device("cpu")
FULL = utils.Precision(torch.float32, torch.contiguous_format)


class Check(NamedTuple):
    """A line of the table."""

    name: str
    wanted: str
    found: str
    good: bool | None  # None: nothing here can tell

    @property
    def status(self) -> str:
        """ "ok", "FAIL" or "unchecked"."""
        return "unchecked" if self.good is None else "ok" if self.good else "FAIL"


class Applied(NamedTuple):
    """What the training transform did to one image: its parameters by the transform's name."""

    tensor: torch.Tensor
    parameters: dict[str, dict]


def apply(pipeline: A.Compose, images: np.ndarray, seed: int = 0) -> list[Applied]:
    """The pipeline on each image, with the parameters that it drew."""
    telling = A.Compose(pipeline.transforms, save_applied_params=True, strict=True, seed=seed)
    results = []
    for image in images:
        result = telling(image=image)
        results.append(Applied(result["image"], dict(result["applied_transforms"])))
    return results


def check_output(tensors: list[object]) -> Iterator[Check]:
    """Shape, type and values of a pipeline's output."""
    shapes = {tuple(getattr(tensor, "shape", ())) for tensor in tensors}
    types = {str(getattr(tensor, "dtype", type(tensor).__name__)) for tensor in tensors}
    yield Check("shape", "(3, 32, 32)", _list(shapes), shapes == {(3, 32, 32)})
    yield Check("type", "torch.float32", _list(types), types == {"torch.float32"})
    if types == {"torch.float32"} and len(shapes) == 1:
        broken = sum(not bool(torch.isfinite(tensor).all()) for tensor in tensors)
        yield Check("images with NaN or infinity", "0", str(broken), broken == 0)


def check_normalisation(tensors: list[torch.Tensor]) -> Iterator[Check]:
    """Outputs of the test transform for the very images whose stats it has."""
    pixels = torch.stack(tensors).double()
    means = pixels.mean(dim=(0, 2, 3))
    stds = pixels.std(dim=(0, 2, 3), unbiased=False)
    good = means.abs().max() < 1e-3
    yield Check("mean of each channel", "0 ± 0.001", _numbers(means), bool(good))
    good = (stds - 1).abs().max() < 1e-3
    yield Check("std of each channel", "1 ± 0.001", _numbers(stds), bool(good))


def check_rates(rates: dict[str, float], applied: list[Applied]) -> Iterator[Check]:
    """How often each step was applied."""
    count = len(applied)
    for step, wanted in rates.items():
        found = sum(step in each.parameters for each in applied) / count
        tolerance = _tolerance(wanted, count)
        good = abs(found - wanted) <= tolerance
        yield Check(f"{step}: rate", f"{wanted:g} ± {tolerance:.3f}", f"{found:.3f}", good)


def check_promised(pipeline: A.Compose, promised: Collection[str]) -> Iterator[Check]:
    """Names the steps of which nothing was promised."""
    for name in dict.fromkeys(type(step).__name__ for step in pipeline.transforms):
        if name not in promised and name not in NEED_NO_PROMISE:
            yield Check(f"{name}: what it does", "a promise in RATES", "none", None)


def check_crop(applied: list[Applied]) -> Iterator[Check]:
    """Every shift in whole pixels equally often, to the sides as up and down."""
    corners = [
        each.parameters["RandomCrop"]["crop_coords"][:2]
        for each in applied
        if "RandomCrop" in each.parameters
    ]
    if not corners:
        yield Check("RandomCrop: shift", "applied to some images", "to none", False)
        return
    most = PROMISES["crop"]
    shifts = 2 * most + 1
    tolerance = _tolerance(1 / shifts, len(corners))
    for way, starts in zip(("sideways", "up and down"), np.array(corners).T, strict=True):
        low, high = starts.min() - most, starts.max() - most
        shares = np.bincount(starts, minlength=shifts) / len(corners)
        good = len(shares) == shifts and np.abs(shares - 1 / shifts).max() <= tolerance
        yield Check(
            f"RandomCrop: {way}",
            f"-{most} to {most} pixels, each {1 / shifts:.3f} ± {tolerance:.3f}",
            f"{low} to {high}, {shares.min():.3f} to {shares.max():.3f}",
            bool(good),
        )


def check_affine(applied: list[Applied], size: int) -> Iterator[Check]:
    """Angle, scale and shift, out of the matrices that were applied."""
    matrices = [
        each.parameters["Affine"]["matrix"] for each in applied if "Affine" in each.parameters
    ]
    if not matrices:
        yield Check("Affine: matrix", "applied to some images", "to none", False)
        return
    matrices = np.array(matrices)
    # [[s cos a, -s sin a], [s sin a, s cos a]] up to the sense of rotation
    scales = np.sqrt(np.abs(np.linalg.det(matrices[:, :2, :2])))
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    middle = np.array([(size - 1) / 2, (size - 1) / 2, 1.0])
    shifts = (matrices[:, :2] @ middle - middle[:2]).ravel() / size
    for name, values, unit in (
        ("angle", angles, " degrees"),
        ("scale", scales - 1, ""),
        ("shift", shifts, " of the side"),
    ):
        bound = PROMISES[name]
        low, high = values.min(), values.max()
        # A range that is never used is as wrong as one that is left.
        good = -1.001 * bound <= low <= -0.8 * bound and 0.8 * bound <= high <= 1.001 * bound
        wanted = f"fills -{bound:g} to {bound:g}{unit}"
        yield Check(f"Affine: {name}", wanted, f"{low:.3f} to {high:.3f}", bool(good))


def check_holes(applied: list[Applied]) -> Iterator[Check]:
    """Number and area of the holes."""
    drawn = [
        each.parameters["CoarseDropout"]["holes"]
        for each in applied
        if "CoarseDropout" in each.parameters
    ]
    counts = {len(holes) for holes in drawn}
    areas = {int((x2 - x1) * (y2 - y1)) for holes in drawn for x1, y1, x2, y2 in holes}
    for name, found in (("holes", counts), ("hole area", areas)):
        wanted = PROMISES[name]
        yield Check(f"CoarseDropout: {name}", str(wanted), _list(found), found == {wanted})


def check_fill(pipeline: A.Compose, mean: utils.RGB, std: utils.RGB) -> Iterator[Check]:
    """White images come out white but for the fill, which is the mean colour: about zero."""
    white = np.full((400, 32, 32, 3), 255, dtype=np.uint8)
    fill = tuple(round(255 * value) for value in mean)
    wrong, seen = 0, 0
    for tensor, parameters in apply(pipeline, white, seed=1):
        pixels = utils.to_pixels(tensor, mean, std)
        is_fill = (pixels == fill).all(axis=2)
        is_white = (pixels == 255).all(axis=2)
        seen += int(is_fill.sum())
        between = ~(is_fill | is_white)  # on the edge that Affine interpolates across
        if "Affine" not in parameters:
            wrong += int(between.sum())
            holes = "CoarseDropout" in parameters
            wrong += int(is_fill.sum()) != holes * PROMISES["holes"] * PROMISES["hole area"]
        elif between.any():
            colours = pixels[between].astype(int)
            wrong += int(((colours < np.array(fill) - 1) | (colours > 255)).any(axis=1).sum())
    yield Check("fill", f"the mean colour {fill}", f"{seen:,} pixels of it", seen > 0)
    yield Check("pixels neither image nor fill", "0", str(wrong), wrong == 0)


def check_draws(pipeline: A.Compose, images: np.ndarray, labels: np.ndarray) -> Iterator[Check]:
    """The same seed gives the same batches; other seeds, epochs and workers give others."""
    images, labels = images[:512], labels[:512]

    def batches(seed: int = 0, epoch: int = 1, workers: int = 0, batched: bool = False) -> list:
        loader = utils.make_loader(
            images,
            labels,
            pipeline,
            64,
            shuffle=False,
            device=CPU,
            precision=FULL,
            batched=batched,
            seed=seed,
            workers=workers,
        )
        loader.sampler.set_epoch(epoch)
        return [batch for batch, _ in loader]

    def same(first: list, second: list) -> float:
        """Share of the images that are equal in both."""
        pairs = zip(torch.cat(first), torch.cat(second), strict=True)
        return sum(torch.equal(one, other) for one, other in pairs) / len(images)

    forms = {"": False}
    try:
        BatchedTransform.from_compose(pipeline)
        forms["batched, "] = True
    except UnknownTransformError:
        pass
    for form, batched in forms.items():
        base = batches(batched=batched)
        share = same(base, batches(batched=batched))
        yield Check(f"{form}same seed: equal images", "all", f"{share:.1%}", share == 1)
        for what, other in (("seed", {"seed": 1}), ("epoch", {"epoch": 2})):
            share = same(base, batches(batched=batched, **other))
            # Flip or not, and often nothing else: many images are equal by chance.
            good = share < 0.5
            yield Check(f"{form}another {what}: equal images", "under 50 %", f"{share:.1%}", good)
    share = same(batches(), batches(workers=2))
    yield Check("two workers: images equal to those of none", "all", f"{share:.1%}", share == 1)
    images = np.repeat(images[:1], len(images), axis=0)  # only the draws tell them apart
    made = batches(workers=2)
    share = same(made[0::2] * 2, made[1::2] * 2)  # the workers take turns
    good = share < 0.5
    yield Check("two workers: draws that both make", "under 50 %", f"{share:.1%}", good)


def check_agreement(pipeline: A.Compose, images: np.ndarray) -> Iterator[Check]:
    """Each step's batched form against Albumentations, with the same parameters."""
    images = images[:500]  # as the step gets them: padded ones, for a crop
    for step in pipeline.transforms:
        name = type(step).__name__
        if name in ("Normalize", "ToTensorV2"):
            continue
        telling = A.Compose([step], save_applied_params=True, strict=True, seed=2)
        outputs, drawn, touched = [], [], []
        for index, image in enumerate(images):
            result = telling(image=image)
            if result["applied_transforms"]:
                touched.append(index)
                outputs.append(result["image"])
                drawn.append(result["applied_transforms"][0][1])
        before = images[touched]
        if touched and outputs[0].shape != images[0].shape:  # the next step's images are larger
            images = np.stack(outputs)
        try:
            ours = read(step)
        except UnknownTransformError as error:
            yield Check(f"batched {name}", "a batched form", f"none of {error}", None)
            continue
        if not touched:
            yield Check(f"batched {name}", "applied to some images", "to none", False)
            continue
        planar = torch.from_numpy(before).permute(0, 3, 1, 2).contiguous()
        pixels = ours.apply(planar, *batched_parameters(name, drawn)).permute(0, 2, 3, 1)
        difference = np.abs(pixels.numpy().astype(int) - np.stack(outputs).astype(int))
        share, most = (difference > 0).mean(), difference.max()
        yield Check(
            f"batched {name}: values that differ",
            "under 0.5 %, by one grey level",
            f"{share:.4%}, by {most}",
            bool(share < 0.005 and most <= 1),
        )


def batched_parameters(name: str, drawn: list[dict]) -> tuple[torch.Tensor, ...]:
    """What Albumentations drew, in the form that the batched step of that name takes."""
    if name == "Affine":
        return (torch.tensor(np.stack([each["matrix"][:2] for each in drawn])).float(),)
    if name == "CoarseDropout":
        most = max(len(each["holes"]) for each in drawn)
        holes = np.zeros((len(drawn), most, 4), dtype=np.int64)
        for row, each in zip(holes, drawn, strict=True):
            row[: len(each["holes"])] = each["holes"]
        return (torch.from_numpy(holes),)
    if name == "RandomCrop":
        corners = np.array([each["crop_coords"][:2] for each in drawn])
        return torch.from_numpy(corners[:, 0]), torch.from_numpy(corners[:, 1])
    if name == "ColorJitter":
        names = ("brightness", "contrast", "saturation", "hue")
        factors = torch.tensor([[each[name] for name in names] for each in drawn])
        return factors, torch.tensor([list(each["order"]) for each in drawn])
    return ()


def validate(
    data: cifar10.CIFAR10, transforms: Sequence[str] = tuple(RATES)
) -> dict[str, list[Check]]:
    """All checks of the training transforms of these names, and of the test transform, by name."""
    images = data.train_images[:MOST_IMAGES]
    mean, std = utils.channel_stats(data.train_images)
    checks = {}
    for name in (*transforms, "test"):
        build = utils.test_transform if name == "test" else utils.TRANSFORMS[name]
        try:
            pipeline = build(mean, std)
            outputs = [pipeline(image=image)["image"] for image in images]
            unchecked = list(check_promised(pipeline, RATES.get(name, ())))
        except Exception as error:  # whatever an edit may have broken
            checks[name] = [Check("runs", "yes", _one_line(error), False)]
            continue
        checks[name] = list(check_output(outputs))
        if all(each.good for each in checks[name]):
            if name == "test":
                more = check_test(pipeline, images)
            else:
                more = check_train(pipeline, RATES[name], data, images, mean, std)
            checks[name] += _all_of("runs", more)
        checks[name] += unchecked
    return checks


def check_train(
    pipeline: A.Compose,
    rates: dict[str, float],
    data: cifar10.CIFAR10,
    images: np.ndarray,
    mean: utils.RGB,
    std: utils.RGB,
) -> Iterator[Check]:
    """What a training transform draws, and what that does to the pixels.

    A check that an unforeseen step breaks is one that fails; the others go on.
    """
    applied = apply(pipeline, images)
    yield from _all_of("rates", check_rates(rates, applied))
    if "Affine" in rates:
        yield from _all_of("Affine", check_affine(applied, images.shape[1]))
    if "RandomCrop" in rates:
        yield from _all_of("RandomCrop", check_crop(applied))
    yield from _all_of("CoarseDropout", check_holes(applied))
    yield from _all_of("fill", check_fill(pipeline, mean, std))
    yield from _all_of("draws", check_draws(pipeline, data.train_images, data.train_labels))
    yield from _all_of("batched form", check_agreement(pipeline, images))


def _all_of(name: str, checks: Iterable[Check]) -> Iterator[Check]:
    """These checks, and where they break off, one that failed."""
    try:
        yield from checks
    except Exception as error:
        yield Check(f"{name}: can be checked", "yes", _one_line(error), False)


def check_test(pipeline: A.Compose, images: np.ndarray) -> Iterator[Check]:
    """The test transform normalises, and does nothing by chance."""
    own = utils.test_transform(*utils.channel_stats(images))
    yield from check_normalisation([own(image=image)["image"] for image in images])
    first, second = ([pipeline(image=image)["image"] for image in images[:100]] for _ in range(2))
    equal = sum(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    yield Check("the same twice", "all", f"{equal} of {len(first)}", equal == len(first))


def table(checks: dict[str, list[Check]]) -> str:
    """The checks as aligned columns."""
    rows = [("transform", "check", "wanted", "found", "")]
    for name, each in checks.items():
        rows += [(name, *check[:3], check.status) for check in each]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _tolerance(rate: float, count: int) -> float:
    """How far an honest rate may be off in so many draws: the binomial distribution's deviation."""
    return SIGMAS * math.sqrt(rate * (1 - rate) / count)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _list(values: set) -> str:
    return ", ".join(str(value) for value in sorted(values, key=str)[:4]) or "none"


def _numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:.5f}" for value in values.tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(
        prog="tools.validate_transforms",
        description="Checks what the transforms do; exit status 1 if a check fails.",
    )
    parser.add_argument(
        "--transform",
        choices=list(RATES),
        help="a training transform, by the name that recipes know it by (default: all of these)",
    )
    cli.add_data_flags(parser)

    def work(args: argparse.Namespace) -> int:
        checks = validate(cli.load_data(args), [args.transform] if args.transform else list(RATES))
        results = [check.status for each in checks.values() for check in each]
        failed, unchecked = results.count("FAIL"), results.count("unchecked")
        print(table(checks))
        line = f"{results.count('ok')} of {len(results)} checks passed"
        if unchecked:
            line += f", {unchecked} {'thing' if unchecked == 1 else 'things'} unchecked"
        print(f"\n{line}")
        return 1 if failed else 0

    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
