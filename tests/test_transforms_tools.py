"""tools.validate_transforms notices what an edit breaks; tools.demo_transforms shows the steps."""

import os

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image, ImageSequence

import cifar10
import cli
import utils
from fast import batched
from fast.batched import Random
from tests.conftest import PIXEL, call_main
from tools import demo_transforms, pictures, validate_transforms

FILL = "fill: pixels of the mean colour"


def call(tool, capsys, *arguments: object) -> tuple[int, str, str]:
    return call_main(tool.main, capsys, arguments)


# ---------------------------------------------------------------- validate


def test_what_the_repository_ships_passes(capsys):
    status, out, error = call(validate_transforms, capsys, "--dry-run")
    assert status == 0, out + error
    assert "89 of 89 checks passed" in out
    assert "FAIL" not in out


def names(checks, good: bool | None = False) -> set[str]:
    """Of the checks that failed; or passed, or could not be made (None)."""
    return {check.name for check in checks if check.good is good}


def checks_of(transform: str, data) -> list[validate_transforms.Check]:
    """Of this one transform; `validate` checks the test transform as well."""
    return list(validate_transforms.check_transform(transform, data))


def edit(monkeypatch, build, transform: str = "standard") -> None:
    monkeypatch.setitem(utils.TRANSFORMS, transform, build)


def pipeline(mean, std, /, **changes: object) -> A.Compose:
    """utils.train_transform's steps with other settings; None leaves one out."""
    grey = tuple(round(255 * value) for value in mean)
    affine = {
        "translate_percent": (-0.1, 0.1),
        "scale": (0.9, 1.1),
        "rotate": (-15, 15),
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": changes.get("fill", grey),
        "p": changes.get("affine_p", 0.5),
    }
    side = changes.get("side", 16)
    count = changes.get("holes", 1)
    steps = [
        A.HorizontalFlip(p=changes.get("flip", 0.5)),
        A.Affine(**affine | changes.get("affine", {})),
        A.CoarseDropout(
            num_holes_range=(count, count),
            hole_height_range=(side, side),
            hole_width_range=(side, side),
            fill=changes.get("fill", grey),
            p=changes.get("hole_p", 0.5),
        ),
        A.Normalize(mean=mean, std=changes.get("std", std), max_pixel_value=255.0),
        ToTensorV2(),
    ]
    return A.Compose([*changes.get("more", ()), *steps[: changes.get("end", 5)]], strict=True)


@pytest.fixture
def half(sample) -> cifar10.CIFAR10:
    """The sample with 500 of its training images: enough to tell a rate of 0.5 from others."""
    images, labels = sample.train_images[:500], sample.train_labels[:500]
    return sample._replace(train_images=images, train_labels=labels)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, set()),
        ({"flip": 0.0}, {"HorizontalFlip: rate"}),
        ({"affine_p": 0.9}, {"Affine: rate"}),
        ({"affine": {"rotate": (-30, 30)}}, {"Affine: angle"}),
        ({"affine": {"rotate": (0, 15)}}, {"Affine: angle"}),
        ({"affine": {"scale": (0.5, 1.1)}}, {"Affine: scale"}),
        ({"affine": {"translate_percent": (-0.3, 0.3)}}, {"Affine: shift"}),
        ({"hole_p": 1.0}, {"CoarseDropout: rate"}),
        ({"side": 8}, {"CoarseDropout: hole area", "pixels neither image nor fill"}),
        ({"holes": 2}, {"CoarseDropout: holes", "pixels neither image nor fill"}),
        ({"fill": (0, 0, 0)}, {FILL, "pixels neither image nor fill"}),
        ({"end": 4}, {"shape", "type"}),
        pytest.param(
            {"std": (0.0, 0.25, 0.25)},
            {"images with NaN or infinity"},
            marks=pytest.mark.filterwarnings("ignore:divide by zero"),
        ),
        ({"more": [A.GaussianBlur(blur_limit=(3, 3), p=0.5)]}, set()),
    ],
)
def test_an_edit_fails_the_checks_that_it_breaks_and_no_other(changes, failing, half, monkeypatch):
    edit(monkeypatch, lambda mean, std: pipeline(mean, std, **changes))
    # Its batches and workers take longest, and none of these edits touches what it checks.
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    assert names(checks_of("standard", half)) == failing


@pytest.mark.parametrize(
    ("crop", "failing"),
    [
        ([], {"RandomCrop: rate"}),
        (
            [A.PadIfNeeded(32, 40, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)],
            {"RandomCrop: each shift up and down"},
        ),
        (
            [A.PadIfNeeded(36, 36, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)],
            {"RandomCrop: each shift sideways", "RandomCrop: each shift up and down"},
        ),
        (
            [A.PadIfNeeded(40, 32, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)],
            {"RandomCrop: each shift sideways"},
        ),
        (
            [A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_CONSTANT), A.RandomCrop(32, 32)],
            {"pixels neither image nor fill"},
        ),
    ],
)
def test_an_edited_crop_is_noticed(crop, failing, half, monkeypatch):
    def edited(mean, std):
        _, _, *others = utils.train_transform(mean, std, name="crop_cutout").transforms
        return A.Compose([*crop, *others], strict=True)

    edit(monkeypatch, edited, "crop_cutout")
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    assert names(checks_of("crop_cutout", half)) == failing


def test_a_failing_check_fails_the_command(sample, monkeypatch, capsys):
    edit(monkeypatch, lambda mean, std: pipeline(mean, std, flip=0.1))
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    flags = ("--dry-run", "--transform", "standard")
    status, out, error = call(validate_transforms, capsys, *flags)
    assert status == 1
    assert out.count("FAIL") == 1
    assert "21 of 22 checks passed" in out
    assert error == ""


def middle(mean, std, *steps: A.BasicTransform) -> A.Compose:
    """A pipeline of these steps and its ending."""
    ending = [A.Normalize(mean=mean, std=std, max_pixel_value=255.0), ToTensorV2()]
    return A.Compose([*steps, *ending], strict=True)


HOLE = {"num_holes_range": (1, 1), "hole_height_range": (16, 16), "hole_width_range": (16, 16)}
# Builders of steps by what they try; what fails of them; and what nothing can tell of them.
ODD = {
    "unknown steps": (
        lambda: [
            A.HorizontalFlip(p=0.5),
            A.Rotate((-15, 15), p=0.5),
            A.GaussianBlur(blur_limit=(3, 3), p=0.5),
            A.ToGray(p=0.5),
            A.RandomResizedCrop((32, 32), p=1.0),
        ],
        {
            "Affine: rate", "CoarseDropout: rate", FILL, "pixels neither image nor fill",
        },
        {
            f"{prefix}{name}{suffix}"
            for name in ("Rotate", "GaussianBlur", "ToGray", "RandomResizedCrop")
            for prefix, suffix in (("", ": what it does"), ("batched ", ""))
        },
    ),
    "a reflecting border": (
        lambda: [A.Affine(rotate=(-15, 15), border_mode=cv2.BORDER_REFLECT_101, p=0.5)],
        {
            "HorizontalFlip: rate", "Affine: scale", "Affine: shift", "CoarseDropout: rate",
           FILL,
        },
        {"batched Affine"},
    ),
    "a black hole": (
        lambda: [A.CoarseDropout(**HOLE, fill=0, p=0.5)],
        {
            "HorizontalFlip: rate", "Affine: rate", FILL,
            "pixels neither image nor fill",
        },
        set(),
    ),
    "a hole of noise": (
        lambda: [A.CoarseDropout(**HOLE, fill="random", p=0.5)],
        {
            "HorizontalFlip: rate", "Affine: rate", FILL,
            "pixels neither image nor fill",
        },
        {"batched CoarseDropout"},
    ),
    "a choice": (
        lambda: [A.OneOf([A.HorizontalFlip(), A.Affine()], p=0.5)],
        {
            "HorizontalFlip: rate", "Affine: rate", "Affine: angle", "Affine: scale",
            "Affine: shift", "CoarseDropout: rate", FILL,
        },
        {"OneOf: what it does", "batched OneOf"},
    ),
}  # fmt: skip
odd = pytest.mark.parametrize(("steps", "failing", "unchecked"), ODD.values(), ids=ODD)


@odd
def test_what_no_check_covers_is_named_and_nothing_ends_in_a_traceback(
    steps, failing, unchecked, half, monkeypatch
):
    edit(monkeypatch, lambda mean, std: middle(mean, std, *steps()))
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    checks = checks_of("standard", half)
    assert names(checks) == failing
    assert names(checks, None) == unchecked


def test_things_unchecked_are_counted_apart_and_fail_nothing(sample, monkeypatch, capsys):
    blur = A.GaussianBlur(blur_limit=(3, 3), p=0.5)
    edit(monkeypatch, lambda mean, std: pipeline(mean, std, more=[blur]))
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    status, out, error = call(validate_transforms, capsys, "--dry-run", "--transform", "standard")
    assert (status, error) == (0, "")
    rows = [line for line in out.splitlines() if line.endswith("unchecked")]
    assert len(rows) == 3
    assert "GaussianBlur: what it does" in out
    assert "22 of 24 checks passed, 2 unchecked" in out


def test_a_step_added_to_the_test_transform_is_named_and_its_chance_noticed(sample, monkeypatch):
    flipped = middle(*utils.channel_stats(sample.train_images), A.HorizontalFlip(p=0.5))
    monkeypatch.setattr(utils, "test_transform", lambda mean, std: flipped)
    checks = validate_transforms.validate(sample)["test"]
    assert names(checks) == {"the same twice"}
    assert names(checks, None) == {"HorizontalFlip: what it does"}


def test_a_check_that_breaks_off_fails_and_the_others_go_on(half, monkeypatch):
    def broken(*_arguments: object):
        yield validate_transforms.Check("first", "", "", True)
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(validate_transforms, "check_fill", broken)
    monkeypatch.setattr(validate_transforms, "check_draws", lambda *_: [])
    checks = checks_of("standard", half)
    (failed,) = (check for check in checks if check.good is False)
    assert failed.found == "RuntimeError: two lines"
    assert "batched Affine: values that differ" in {check.name for check in checks}


class Stubborn(A.Compose):
    """Ignores the seed: every batch, epoch and worker makes the same."""

    def set_random_state(self, *_: object) -> None:
        self.set_random_seed(0)


class Restless(A.Compose):
    """Ignores the seed: nothing can be repeated."""

    def set_random_state(self, *_: object) -> None:
        self.set_random_seed(int.from_bytes(os.urandom(4), "big"))


@pytest.mark.parametrize(
    ("kind", "failing"),
    [
        (
            Stubborn,
            {
                "another seed: equal images",
                "another epoch: equal images",
                "two workers: draws that both make",
            },
        ),
        (Restless, {"same seed: equal images", "two workers: images equal to those of none"}),
    ],
)
def test_transforms_that_ignore_the_seed_are_noticed(kind, failing, sample):
    steps = utils.train_transform((0.5,) * 3, (0.2,) * 3).transforms
    found = validate_transforms.check_draws(
        kind(steps, strict=True), sample.train_images[:256], sample.train_labels[:256]
    )
    assert names(found) == failing


class ByWorker(A.Compose):
    """Draws otherwise in a worker process than without."""

    def set_random_state(self, *drawn: object) -> None:
        super().set_random_state(*drawn)
        if (worker := torch.utils.data.get_worker_info()) is not None:
            self.py_random.seed(worker.id)


def draw_of(change):
    """BatchSampler.draw, of a sampler that is changed, or with its seeds changed."""
    draw = utils.BatchSampler.draw

    def changed(sampler: utils.BatchSampler) -> tuple[list[np.ndarray], list[int]]:
        before = sampler.seed, sampler.epoch
        seeds = change(sampler)
        batches, drawn = draw(sampler)
        sampler.seed, sampler.epoch = before
        return batches, drawn if seeds is None else [drawn[place] for place in seeds]

    return changed


@pytest.mark.parametrize(
    ("kind", "change", "failing"),
    [
        (A.Compose, lambda sampler: None, set()),
        (
            A.Compose,
            lambda sampler: setattr(sampler, "seed", 0),
            {"another seed: equal images", "batched, another seed: equal images"},
        ),
        (
            A.Compose,
            lambda sampler: setattr(sampler, "epoch", 1),
            {"another epoch: equal images", "batched, another epoch: equal images"},
        ),
        # Two batches in a row with one seed: of two workers, each makes one.
        (A.Compose, lambda _: [0, 0, 2, 2], {"two workers: draws that both make"}),
        (ByWorker, lambda _: None, {"two workers: images equal to those of none"}),
    ],
)
def test_draws_that_do_not_follow_from_seed_and_epoch_alone(
    kind, change, failing, sample, monkeypatch
):
    monkeypatch.setattr(utils.BatchSampler, "draw", draw_of(change))
    steps = utils.train_transform((0.5,) * 3, (0.2,) * 3).transforms
    images, labels = sample.train_images[:256], sample.train_labels[:256]
    checks = list(validate_transforms.check_draws(kind(steps, strict=True), images, labels))
    assert names(checks) == failing
    assert len(checks) == 8 if kind is A.Compose else 5


@pytest.mark.parametrize(
    ("reseed", "failing"),
    [
        (lambda generator: generator.manual_seed(0), {"another seed", "another epoch"}),
        (lambda generator: generator.seed(), {"same seed"}),
    ],
)
def test_a_batched_form_that_ignores_the_seed_is_noticed(reseed, failing, sample, monkeypatch):
    def ignorant(_generator):
        own = torch.Generator()
        reseed(own)
        return Random(own)

    monkeypatch.setattr(batched, "Random", ignorant)
    found = validate_transforms.check_draws(
        utils.train_transform((0.5,) * 3, (0.2,) * 3),
        sample.train_images[:256],
        sample.train_labels[:256],
    )
    assert names(found) == {f"batched, {each}: equal images" for each in failing}


def test_a_transform_that_cannot_be_built_fails_in_one_line(sample, monkeypatch):
    def misspelt(mean, std):
        return A.Compose([A.HorizontalFlip(probability=0.5)], strict=True)

    edit(monkeypatch, misspelt)
    with pytest.warns(UserWarning, match="probability"):
        checks = validate_transforms.validate(sample, "standard")
    assert names(checks["standard"]) == {"transform: runs"}
    assert names(checks["test"]) == set()


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("which", ["mean", "std"])
def test_stats_that_are_not_the_images_fail(which, channel, sample, monkeypatch):
    """Of two channels, a little off, so that all together are right."""
    stats = dict(zip(("mean", "std"), utils.channel_stats(sample.train_images), strict=True))
    wrong = list(stats[which])
    for place, share in ((channel, 0.01), (channel - 1, -0.01)):
        wrong[place] += share * stats["std"][place]
    monkeypatch.setattr(utils, "channel_stats", lambda _: (*(stats | {which: wrong}).values(),))
    pipeline = utils.test_transform(*stats.values())
    checks = list(validate_transforms.check_test(pipeline, sample.train_images))
    assert len(checks) == 3
    assert names(checks) == {f"{which} of each channel"}


def test_the_checks_of_the_test_transform_pass_and_notice_chance(sample):
    images = sample.train_images[:200]
    stats = utils.channel_stats(images)
    for steps, failing in (([], set()), ([A.HorizontalFlip(p=0.1)], {"the same twice"})):
        assert names(validate_transforms.check_test(middle(*stats, *steps), images)) == failing


@pytest.mark.parametrize(
    ("output", "failing"),
    [
        (torch.zeros(3, 32, 32), set()),
        (torch.zeros(3, 32, 31), {"shape"}),
        (torch.zeros(32, 32, 3), {"shape"}),
        (torch.zeros(3, 32, 32, dtype=torch.float64), {"type"}),
        (torch.full((3, 32, 32), torch.nan), {"images with NaN or infinity"}),
        (torch.full((3, 32, 32), -torch.inf), {"images with NaN or infinity"}),
    ],
)
def test_one_output_that_is_not_like_the_others_fails(output, failing):
    outputs = [torch.zeros(3, 32, 32)] * 5 + [output]
    assert names(validate_transforms.check_output(outputs)) == failing


@pytest.mark.parametrize(
    ("steps", "failing"),
    [
        ([A.CoarseDropout(**HOLE, fill=(128, 102, 76), p=0.5)], set()),
        ([A.HorizontalFlip(p=0.5)], {FILL}),
        ([A.CoarseDropout(**HOLE, fill=(128, 102, 76)), A.Crop(0, 0, 31, 32), A.Resize(32, 32)],
         {"pixels neither image nor fill"}),
    ],
)  # fmt: skip
def test_the_fill_is_looked_for_and_nothing_else_is_there(steps, failing):
    stats = (0.502, 0.4, 0.298), (0.2, 0.25, 0.3)
    checks = list(validate_transforms.check_fill(middle(*stats, *steps), *stats))
    assert len(checks) == 2
    assert names(checks) == failing


@pytest.mark.parametrize("step", ["HorizontalFlip", "CoarseDropout"])
def test_a_rate_of_the_crops_is_noticed(step, sample):
    stats = (0.5,) * 3, (0.2,) * 3
    steps = utils.train_transform(*stats, name="crop_cutout")
    drawn = validate_transforms.apply(steps, sample.train_images[:400])[1]
    rates = validate_transforms.RATES["crop_cutout"]
    assert names(validate_transforms.check_steps(rates, drawn)) == set()
    for each in drawn[:150]:
        each.pop(step, None)
    assert names(validate_transforms.check_steps(rates, drawn)) == {f"{step}: rate"}


def test_cifarnet_s_augmentation_keeps_its_promises(sample):
    stats = (0.5,) * 3, (0.2,) * 3
    pipeline = utils.train_transform(*stats, name="crop_affine_jitter")
    assert names(validate_transforms.check_fill(pipeline, *stats)) == set()
    rates = validate_transforms.RATES["crop_affine_jitter"]
    drawn = validate_transforms.apply(pipeline, sample.train_images[:400])[1]
    assert names(validate_transforms.check_steps(rates, drawn)) == set()
    for each in drawn:
        each.get("ColorJitter", {"hue": 0.0})["hue"] /= 2
    assert names(validate_transforms.check_steps(rates, drawn)) == {"ColorJitter: hue"}
    for step in pipeline.transforms:
        if isinstance(step, A.CoarseDropout):
            step.fill = 0
    wrong = names(validate_transforms.check_fill(pipeline, *stats))
    assert wrong == {"pixels neither image nor fill"}


class Off:
    """A batched step whose output is changed behind it."""

    def __init__(self, step, change) -> None:
        self.step, self.change = step, change

    def apply(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.change(self.step.apply(*arguments).clone())


def few(images: torch.Tensor) -> torch.Tensor:
    """In 0.6 % of the values, by one level."""
    images.view(-1)[::166] ^= 1
    return images


def two_levels(images: torch.Tensor) -> torch.Tensor:
    """In one value, by two levels."""
    images[0, 0, 0, 0] ^= 2
    return images


@pytest.mark.parametrize("change", [few, two_levels, torch.Tensor.float])
@pytest.mark.parametrize("step", ["HorizontalFlip", "Affine", "CoarseDropout", "RandomCrop"])
def test_a_batched_step_that_does_not_agree_is_noticed(step, change, sample, monkeypatch):
    read = validate_transforms.read

    def reads(found: A.BasicTransform) -> object:
        return Off(read(found), change) if type(found).__name__ == step else read(found)

    monkeypatch.setattr(validate_transforms, "read", reads)
    name = "crop_cutout" if step == "RandomCrop" else "standard"
    pipeline = utils.train_transform((0.5,) * 3, (0.2,) * 3, name=name)
    checks = list(validate_transforms.check_agreement(pipeline, sample.train_images[:30]))
    assert names(checks) == {f"batched {step}: values that differ"}
    assert len(checks) >= 3


def test_all_batched_steps_agree(sample):
    pipeline = utils.train_transform((0.5,) * 3, (0.2,) * 3, name="crop_affine_jitter")
    checks = list(validate_transforms.check_agreement(pipeline, sample.train_images[:60]))
    assert len(checks) == 6
    assert names(checks) == names(checks, None) == set()


@pytest.mark.parametrize(
    ("values", "good"),
    [
        ([1, 3], True),
        ([0.99, 3], False),
        ([1, 3.01], False),
        ([1.2, 2.8], True),  # as far from the ends as may be
        ([1.3, 3], False),
        ([1, 2.7], False),
        ([1, np.nan], False),
    ],
)
def test_values_are_within_their_range_and_fill_it(values, good):
    assert validate_transforms.within("x", values, 1, 3, reach=0.2001).good is good


def test_a_share_is_near_its_chance_by_the_binomial_distribution():
    """Of 100 draws at a half: 4.5 times a deviation of 5."""
    for share, good in ((0.28, True), (0.27, False), (0.72, True), (0.73, False)):
        assert validate_transforms.near("x", share, 0.5, 100).good is good
    assert validate_transforms.near("x", 1.0, 1.0, 100).good is True
    assert validate_transforms.near("x", 0.99, 1.0, 100).good is False


# ---------------------------------------------------------------- demo


@pytest.fixture
def sheets(monkeypatch) -> list:
    """The sheets as figures instead of PNG; test_tool_pictures.py looks at what they show."""
    drawn = []
    monkeypatch.setattr(demo_transforms.plots, "png", lambda sheet: drawn.append(sheet) or PIXEL)
    return drawn


def rows_of(sheets: list) -> list[str]:
    """The names of the rows of the one sheet."""
    (figure,) = sheets
    return [axes.get_ylabel() for axes in figure.axes[:: demo_transforms.DRAWS]]


def test_demo_writes_a_sheet_and_a_film(capsys, tmp_path, sheets):
    status, out, error = call(demo_transforms, capsys, "--dry-run", "--output-dir", tmp_path)
    assert status == 0, error
    assert len(rows_of(sheets)) == 5
    assert (tmp_path / "transforms" / "standard.png").read_bytes() == PIXEL
    film = Image.open(tmp_path / "transforms" / "standard.gif")
    assert film.size == (256, 256)
    # Frames in a row that are equal are stored as one, which is shown for longer.
    shown = sum(frame.info["duration"] for frame in ImageSequence.Iterator(film))
    assert shown == 30 * 200
    assert str(tmp_path / "transforms" / "standard.gif") in out


def test_a_step_alone_is_always_applied_and_nothing_else_is(sample):
    mean, std = utils.channel_stats(sample.train_images)
    image = sample.train_images[0]
    alone = demo_transforms.steps_alone(utils.train_transform(mean, std))
    assert list(alone) == ["HorizontalFlip", "Affine", "CoarseDropout"]
    flips = demo_transforms.draws(alone["HorizontalFlip"], image, 5, mean, std)
    assert (flips == image[:, ::-1]).all()
    for dropped in demo_transforms.draws(alone["CoarseDropout"], image, 5, mean, std):
        assert 200 < (dropped != image).any(axis=2).sum() <= 256


def test_a_pad_is_shown_with_its_crop(sample, capsys, tmp_path, sheets):
    mean, std = utils.channel_stats(sample.train_images)
    alone = demo_transforms.steps_alone(utils.train_transform(mean, std, name="crop_cutout"))
    assert list(alone) == ["RandomCrop", "HorizontalFlip", "CoarseDropout"]
    image = sample.train_images[0]
    for crop in demo_transforms.draws(alone["RandomCrop"], image, 5, mean, std):
        offsets = range(-4, 5)  # the overlap of image and crop, somewhere among these
        middles = [image[8 + y : 24 + y, 8 + x : 24 + x] for y in offsets for x in offsets]
        assert any((middle == crop[8:24, 8:24]).all() for middle in middles)
    flags = ("--dry-run", "--transform", "crop_cutout", "--output-dir", tmp_path)
    assert call(demo_transforms, capsys, *flags)[0] == 0
    assert rows_of(sheets) == ["raw", *alone, "all together"]


@odd
def test_demo_shows_steps_that_nobody_foresaw(
    steps, failing, unchecked, sample, monkeypatch, capsys, tmp_path, sheets
):
    edit(monkeypatch, lambda mean, std: middle(mean, std, *steps()))
    status, _, error = call(demo_transforms, capsys, "--dry-run", "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    alone = [type(step).__name__ for step in steps()]
    assert rows_of(sheets) == ["raw", *alone, "all together"]


def test_demo_shows_every_step_of_a_class_and_sizes_go_with_what_restores_them(sample):
    mean, std = utils.channel_stats(sample.train_images)
    flip, blur = A.HorizontalFlip(p=0.5), A.GaussianBlur(blur_limit=(3, 3), p=0.5)
    steps = [flip, A.Resize(48, 48), blur, A.RandomCrop(32, 32), flip, A.Pad(4)]
    alone = demo_transforms.steps_alone(middle(mean, std, *steps))
    assert list(alone) == ["HorizontalFlip", "RandomCrop", "HorizontalFlip 2", "Pad"]
    assert [type(step).__name__ for step in alone["RandomCrop"].transforms[:-2]] == [
        "Resize",
        "GaussianBlur",
        "RandomCrop",
    ]


def test_demo_of_a_pipeline_that_cannot_run_is_one_line(monkeypatch, capsys, tmp_path):
    edit(monkeypatch, lambda mean, std: middle(mean, std, A.RandomCrop(64, 64)))
    status, _, error = call(demo_transforms, capsys, "--dry-run", "--output-dir", tmp_path)
    assert status == 2
    assert "standard cannot be shown: CropSizeError" in error
    assert error.count("\n") == 1


def test_a_picture_of_ones_own_is_cropped_to_its_middle(tmp_path):
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:, 32:96] = 200
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = pictures.read_picture(tmp_path / "wide.png")
    assert image.shape == (32, 32, 3)
    assert (image == 200).all()


def test_a_picture_that_is_none_is_refused(capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "absent.png"):
        status, _, error = call(demo_transforms, capsys, "--dry-run", "--image", path)
        assert status == 2
        assert f"{path} cannot be read as a picture" in error
        assert error.count("\n") == 1


def test_a_picture_is_turned_upright_as_its_exif_entry_says(tmp_path):
    upright = np.zeros((64, 64, 3), dtype=np.uint8)
    upright[:32], upright[:, :32, 2] = (200, 60, 0), 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned a quarter, clockwise, when shown
    Image.fromarray(upright).save(tmp_path / "upright.png")
    Image.fromarray(np.rot90(upright)).save(tmp_path / "lying.png", exif=exif)
    wanted = pictures.read_picture(tmp_path / "upright.png")
    assert (pictures.read_picture(tmp_path / "lying.png") == wanted).all()
    assert not (wanted == np.rot90(wanted)).all()


def test_a_damaged_exif_entry_does_not_cost_the_picture(tmp_path):
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
    assert (pictures.read_picture(tmp_path / "a.png") == (10, 200, 30)).all()


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("a.png", 257), ("a.pgm", 257), ("little.tif", 257), ("big.tif", 257), ("float.tif", 1 / 255)],
)
def test_grey_of_more_than_8_bits_is_that_of_8(kind, factor, sample, tmp_path):
    grey = np.array(Image.fromarray(sample.train_images[0]).convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    types = {"little.tif": "<u2", "big.tif": ">u2", "float.tif": "<f4"}
    deep = Image.fromarray((grey * np.float64(factor)).astype(types.get(kind, "<u2")))
    deep.save(tmp_path / kind)
    assert Image.open(tmp_path / kind).mode in ("I;16", "I;16B", "I", "F")
    wanted = pictures.read_picture(tmp_path / "8.png").astype(int)
    assert np.abs(pictures.read_picture(tmp_path / kind) - wanted).max() <= 1
    assert wanted.max() - wanted.min() > 100


@pytest.mark.parametrize(
    ("low", "high", "mode"), [(-70_000, 70_000, "I"), (0, 1_000_000, "I"), (0, 255, "F")]
)
def test_greys_beyond_16_bits_are_stretched(low, high, mode, tmp_path):
    values = np.full((32, 32), low, dtype="<i4" if mode == "I" else "<f4")
    values[:, 16:] = high
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == mode
    picture = pictures.read_picture(tmp_path / "a.tif")
    assert (picture[:, :16] == 0).all()
    assert (picture[:, 16:] == 255).all()


def test_floats_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), np.nan, dtype="<f4")).save(tmp_path / "a.tif")
    with pytest.raises(cli.UsageError, match=r"a\.tif cannot be read as a picture: .*NaN"):
        pictures.read_picture(tmp_path / "a.tif")


FORMATS = "PNG JPEG TIFF WEBP GIF PPM ICO PCX SGI TGA BMP DDS JPEG2000 AVIF QOI SPIDER BLP"


@pytest.mark.parametrize("kind", FORMATS.split())
def test_a_damaged_picture_of_any_format_is_refused_in_one_line(kind, sample, tmp_path):
    """Whatever Pillow raises: of these AVIF a SyntaxError, BLP a NotImplementedError."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    image = Image.fromarray(sample.train_images[0])
    image = image.convert({"SPIDER": "F", "BLP": "P"}.get(kind, "RGB"))
    path = tmp_path / "a.picture"
    image.save(path, kind)
    whole = path.read_bytes()
    pictures.read_picture(path)
    cuts = {f"cut at {end}": whole[:end] for end in (len(whole) // 2, len(whole) - 30)}
    if kind == "BLP":
        cuts["of unknown compression"] = whole[:4] + b"\x09" + whole[5:]
    for what, content in cuts.items():
        path.write_bytes(content)
        with pytest.raises(cli.UsageError) as caught:
            pictures.read_picture(path)
        assert str(caught.value).startswith(f"{path} cannot be read as a picture: "), what
        assert "\n" not in str(caught.value)


def test_ctrl_c_while_a_picture_is_read_is_no_damage(tmp_path, monkeypatch):
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures.read_picture(tmp_path / "a.png")
