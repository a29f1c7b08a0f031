"""Does the augmentation do what it says? Checks with figures; exit status 1 if one fails.

    python -m tools.validate_transforms            # on CIFAR-10
    python -m tools.validate_transforms --dry-run  # on data/sample

It checks whatever `utils.train_transform` and `utils.test_transform` return, against what this
repository promises of them (PROMISES): after an edit it tells at once what changed or broke. If a
change was meant, change the promise with it.

Rates and ranges come from the parameters that Albumentations reports of each image; what lies in
the pixels (fill, hole, normalisation, agreement of the batched form) is measured there.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import albumentations as A
import numpy as np
import torch

import cifar10
import cli
import utils
from batched import READERS, BatchedTransform, UnknownTransformError

PROMISES = {
    "flip rate": 0.5,
    "affine rate": 0.5,
    "hole rate": 0.5,
    "angle": 15.0,  # degrees, either way
    "scale": 0.1,  # more or less than 1
    "shift": 0.1,  # of the width or height, either way
    "holes": 1,
    "hole area": 16 * 16,  # pixels
}
MOST_IMAGES = 4000  # for what takes Albumentations, image by image
SIGMAS = 4.5  # an honest rate strays further once in 150,000 checks
CPU = torch.device("cpu")
FULL = utils.Precision(torch.float32, torch.contiguous_format)


class Check(NamedTuple):
    """A line of the table."""

    name: str
    wanted: str
    found: str
    good: bool


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


def check_output(name: str, tensors: list[object]) -> Iterator[Check]:
    """Shape, type and values of a pipeline's output."""
    shapes = {tuple(getattr(tensor, "shape", ())) for tensor in tensors}
    types = {str(getattr(tensor, "dtype", type(tensor).__name__)) for tensor in tensors}
    yield Check(f"{name}: shape", "(3, 32, 32)", _list(shapes), shapes == {(3, 32, 32)})
    yield Check(f"{name}: type", "torch.float32", _list(types), types == {"torch.float32"})
    if types == {"torch.float32"} and len(shapes) == 1:
        broken = sum(not bool(torch.isfinite(tensor).all()) for tensor in tensors)
        yield Check(f"{name}: images with NaN or infinity", "0", str(broken), broken == 0)


def check_normalisation(tensors: list[torch.Tensor]) -> Iterator[Check]:
    """Outputs of the test transform for the very images whose stats it has."""
    pixels = torch.stack(tensors).double()
    means = pixels.mean(dim=(0, 2, 3))
    stds = pixels.std(dim=(0, 2, 3), unbiased=False)
    yield Check(
        "test: mean of each channel", "0 ± 0.001", _numbers(means), means.abs().max() < 1e-3
    )
    good = (stds - 1).abs().max() < 1e-3
    yield Check("test: std of each channel", "1 ± 0.001", _numbers(stds), bool(good))


def check_rate(name: str, transform: str, applied: list[Applied]) -> Check:
    """How often the transform was applied."""
    wanted, count = PROMISES[name], len(applied)
    found = sum(transform in each.parameters for each in applied) / count
    tolerance = SIGMAS * math.sqrt(wanted * (1 - wanted) / count)
    return Check(
        name, f"{wanted:g} ± {tolerance:.3f}", f"{found:.3f}", abs(found - wanted) <= tolerance
    )


def check_affine(applied: list[Applied], size: int) -> Iterator[Check]:
    """Angle, scale and shift, out of the matrices that were applied."""
    matrices = [
        each.parameters["Affine"]["matrix"] for each in applied if "Affine" in each.parameters
    ]
    if not matrices:
        yield Check("affine", "applied to some images", "to none", False)
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
        yield Check(f"affine: {name}", wanted, f"{low:.3f} to {high:.3f}", bool(good))


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
        yield Check(name, str(PROMISES[name]), _list(found), found == {PROMISES[name]})


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
    images = images[:500]
    for step in pipeline.transforms:
        name = type(step).__name__
        if name in ("Normalize", "ToTensorV2"):
            continue
        reader = READERS.get(type(step))
        if reader is None:
            yield Check(f"batched {name}", "a batched form", "none: runs image by image", True)
            continue
        telling = A.Compose([step], save_applied_params=True, strict=True, seed=2)
        outputs, drawn, touched = [], [], []
        for index, image in enumerate(images):
            result = telling(image=image)
            if result["applied_transforms"]:
                touched.append(index)
                outputs.append(result["image"])
                drawn.append(result["applied_transforms"][0][1])
        if not touched:
            yield Check(f"batched {name}", "applied to some images", "to none", False)
            continue
        planar = torch.from_numpy(images[touched]).permute(0, 3, 1, 2).contiguous()
        ours = reader(step).apply(planar, *batched_parameters(name, drawn))
        difference = np.abs(
            ours.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(outputs).astype(int)
        )
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


def validate(data: cifar10.CIFAR10) -> Iterator[Check]:
    """All checks, of the transforms that training on these images would use."""
    images = data.train_images[:MOST_IMAGES]
    mean, std = utils.channel_stats(data.train_images)
    for name, check, build in (
        ("train", check_train, utils.train_transform),
        ("test", check_test, utils.test_transform),
    ):
        try:
            pipeline = build(mean, std)
            outputs = list(check_output(name, [pipeline(image=image)["image"] for image in images]))
        except Exception as error:  # whatever an edit may have broken
            yield Check(f"{name}: runs", "yes", f"{type(error).__name__}: {error}", False)
            continue
        yield from outputs
        if all(each.good for each in outputs):
            yield from check(pipeline, data, images, mean, std)


def check_train(
    pipeline: A.Compose,
    data: cifar10.CIFAR10,
    images: np.ndarray,
    mean: utils.RGB,
    std: utils.RGB,
) -> Iterator[Check]:
    """What the training transform draws, and what that does to the pixels."""
    applied = apply(pipeline, images)
    yield check_rate("flip rate", "HorizontalFlip", applied)
    yield check_rate("affine rate", "Affine", applied)
    yield from check_affine(applied, images.shape[1])
    yield check_rate("hole rate", "CoarseDropout", applied)
    yield from check_holes(applied)
    yield from check_fill(pipeline, mean, std)
    yield from check_draws(pipeline, data.train_images, data.train_labels)
    yield from check_agreement(pipeline, images)


def check_test(
    pipeline: A.Compose,
    data: cifar10.CIFAR10,
    images: np.ndarray,
    mean: utils.RGB,
    std: utils.RGB,
) -> Iterator[Check]:
    """The test transform normalises, and does nothing by chance."""
    own = utils.test_transform(*utils.channel_stats(images))
    yield from check_normalisation([own(image=image)["image"] for image in images])
    first, second = ([pipeline(image=image)["image"] for image in images[:100]] for _ in range(2))
    equal = sum(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    yield Check("test: the same twice", "all", f"{equal} of {len(first)}", equal == len(first))


def table(checks: list[Check]) -> str:
    """The checks as aligned columns."""
    rows = [
        ("check", "wanted", "found", ""),
        *((*c[:3], "ok" if c.good else "FAIL") for c in checks),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


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
    cli.add_data_flags(parser)
    args = parser.parse_args(arguments)
    failed = 0

    def work() -> None:
        nonlocal failed
        checks = list(validate(cli.load_data(args)))
        failed = sum(not check.good for check in checks)
        print(table(checks))
        print(f"\n{len(checks) - failed} of {len(checks)} checks passed")

    return cli.run("tools.validate_transforms", work) or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
