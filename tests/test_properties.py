"""Rules that hold for all inputs, tried on inputs that hypothesis draws (the same ones each time).

What is compared against is a second computation: NumPy's in float64, Albumentations' image by
image, an undisturbed run; or the rule itself, written down a second time.
"""

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cifar10
import cli
import networks
import plots
import recipes
import runs
import train
import utils
from errors import UsageError
from fast import cpu, muon
from fast.batched import A, BatchedTransform, Random, read
from parallel import Team
from support import files, flags
from support.history import History, duration
from support.meter import Meter, Metrics
from tests import torture
from tests.conftest import draw_nothing, run_in
from tests.test_recipes import GOOD

CPU = utils.Device(torch.device("cpu"))
SEEDS = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------- recipes

# The ranges once more: lowest, highest, and which of the two are left out.
REAL = {
    "lr": (0, 1e15, "low"),
    "weight_decay": (0, 1e15, ""),
    "target_accuracy": (0, 100, "low"),
    "momentum": (0, 1, "low high"),
    "other_lr": (0, 1e15, "low"),
    "muon_momentum": (0, 1, "low high"),
    "warmup": (0, 1, "low high"),
    "div_factor": (1, 1e15, ""),
    "final_lr": (0, 1e15, ""),
    "clip_norm": (0, 1e15, ""),
    "label_smoothing": (0, 1, "high"),
    "teacher_weight": (0, 1, "low"),
    "teacher_temperature": (0.1, 100, ""),
    "dropout": (0, 1e15, ""),
    "augment": (0, 1, ""),
    "robust": (0, 1, ""),
}
WHOLE = ("batch_size", "target_epochs", "augment_epochs")  # from 1 to 10**15
WORDS = {
    "optimizer": ("muon", "sgd", "adamw"),
    "schedule": ("onecycle", "cosine"),
    "transform": ("standard", "crop_cutout", "crop_affine_jitter"),
}
HUGE = 16**5000  # more digits than Python writes
NO_NUMBER = st.one_of(
    st.none(), st.booleans(), st.text(), st.binary(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.none()), st.complex_numbers(),
)  # fmt: skip
NO_TEXT = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.tuples())


def real(low: float, high: float, without: str) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min="low" in without, exclude_max="high" in without)


def beyond(low: float, high: float, without: str) -> st.SearchStrategy[float]:
    """Numbers outside, and those ends that are left out."""
    below = st.floats(max_value=low, exclude_max="low" not in without)
    above = st.floats(min_value=high, exclude_min="high" not in without)
    return st.one_of(below, above, st.sampled_from((math.nan, HUGE, -HUGE)))


GOOD_VALUES = (
    {key: real(*values) for key, values in REAL.items()}
    | {key: st.integers(1, 10**15) for key in WHOLE}
    | {key: st.sampled_from(words) for key, words in WORDS.items()}
    | {"nesterov": st.booleans(), "teacher": st.text()}
)
BAD_VALUES = (
    {key: st.one_of(beyond(*values), NO_NUMBER) for key, values in REAL.items()}
    | {
        key: st.one_of(
            st.integers(max_value=0), st.integers(10**15 + 1), st.just(HUGE), st.floats(), NO_NUMBER
        )
        for key in WHOLE
    }
    | {key: st.one_of(st.text(max_size=9), NO_TEXT) for key in WORDS}
    | {"nesterov": st.one_of(st.integers(), st.none(), st.text()), "teacher": NO_TEXT}
)


def recipes_of(**fixed: object) -> st.SearchStrategy[dict]:
    """RECIPE dictionaries with any of the keys that may be left out, and these values."""
    values = GOOD_VALUES | {key: st.just(value) for key, value in fixed.items()}
    needed = {key: value for key, value in values.items() if key in {*GOOD, *fixed}}
    return st.fixed_dictionaries(
        needed, optional={key: values[key] for key in values if key not in needed}
    )


def test_the_keys_of_this_file_are_those_of_a_recipe():
    assert set(GOOD_VALUES) == set(BAD_VALUES) == set(recipes.Recipe.__dataclass_fields__)


@given(recipes_of())
def test_a_recipe_comes_back_from_json(given):
    recipe = recipes.Recipe.read(given)
    assert {key: getattr(recipe, key) for key in given} == given
    assert recipes.Recipe.read(json.loads(json.dumps(asdict(recipe)))) == recipe


@given(st.data())
@settings(max_examples=120)
def test_a_single_bad_value_is_refused_by_its_key_in_one_line(data):
    key = data.draw(st.sampled_from(sorted(BAD_VALUES)))
    bad = data.draw(BAD_VALUES[key].filter(lambda value: value not in WORDS.get(key, ())))
    with pytest.raises(ValueError, match=rf"\A{key} is .+: Input should .+\Z") as caught:
        recipes.Recipe.read(GOOD | {key: bad})
    assert len(str(caught.value).splitlines()) == 1


@given(st.text().filter(lambda key: key not in GOOD_VALUES))
@example("self")
@example("__dataclass_self__")
@example("\udcff")
def test_an_unknown_key_is_refused_by_its_name(key):
    with pytest.raises(ValueError, match="is unknown; known are optimizer, lr, ") as caught:
        recipes.Recipe.read(GOOD | {key: 1})
    assert str(caught.value).startswith(" ".join(key.splitlines()))
    assert len(str(caught.value).splitlines()) == 1


@given(st.sets(st.sampled_from(sorted(GOOD)), min_size=1))
def test_a_missing_key_is_told(missing):
    with pytest.raises(ValueError, match=" is missing") as caught:
        recipes.Recipe.read({key: GOOD[key] for key in GOOD if key not in missing})
    assert str(caught.value).split()[0] in missing


RATES = st.floats(1e-6, 1e3)


def scheduled(recipe: recipes.Recipe, steps: int, rates: list[float]) -> np.ndarray:
    """The learning rates (steps + 1, groups) of an optimizer with groups that begin at `rates`."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    scheduler = recipes.make_scheduler(optimizer, recipe, steps)
    found = []
    for step in range(steps + 1):
        if step:
            optimizer.step()
            scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return np.array(found)


@given(
    epochs=st.integers(1, 12),
    batches=st.integers(1, 20),
    warmup=st.floats(0, 1, exclude_min=True, exclude_max=True),
    div_factor=st.floats(1, 1e6),
    rates=st.tuples(RATES, RATES),
)
def test_onecycle_begins_at_its_part_of_the_peak_goes_straight_up_and_straight_down(
    epochs, batches, warmup, div_factor, rates
):
    steps = epochs * batches
    recipe = recipes.Recipe.read(GOOD | {"warmup": warmup, "div_factor": div_factor})
    for values, peak in zip(scheduled(recipe, steps, rates).T, rates, strict=True):
        values = values / peak
        assert values[0] == pytest.approx(1 / div_factor)
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-9
        assert values[-1] == pytest.approx(0, abs=1.01e-4 / div_factor + 1e-9)
        top = int(values.argmax())
        assert (np.diff(values[: top + 1]) > -1e-12).all()
        assert (np.diff(values[top:]) < 1e-12).all()
        if warmup * (steps + 1) < 1.5:  # too short for a way up of its own length
            continue
        summit = warmup * (steps + 1) - 1
        line = np.interp(np.arange(steps + 1), [0, summit, steps], [1 / div_factor, 1, values[-1]])
        np.testing.assert_allclose(values, line, rtol=0, atol=1e-6)


@given(
    epochs=st.integers(1, 12),
    batches=st.integers(1, 20),
    rate=RATES,
    share=st.floats(0, 1),
)
def test_cosine_goes_from_the_peak_to_its_end_along_half_a_wave(epochs, batches, rate, share):
    steps = epochs * batches
    recipe = recipes.Recipe.read(GOOD | {"schedule": "cosine", "final_lr": share * rate})
    values = scheduled(recipe, steps, [rate])[:, 0] / rate
    wave = (1 + np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    np.testing.assert_allclose(values, share + (1 - share) * wave, rtol=0, atol=1e-9)
    assert (np.diff(values) < 1e-12).all()


@given(
    GOOD_VALUES["augment"],
    st.integers(1, 10_000),
    st.lists(st.integers(1, 20_000), min_size=2, max_size=20),
)
def test_augmentation_grows_with_the_epochs_and_never_above_its_full_strength(
    augment, augment_epochs, epochs
):
    changes = {"augment": augment, "augment_epochs": augment_epochs}
    recipe = recipes.Recipe.read(GOOD | changes)
    values = [recipe.augmentation(number) for number in sorted(epochs)]
    assert values == sorted(values)
    assert 0 <= values[0] <= values[-1] <= augment
    assert recipe.augmentation(augment_epochs) == augment


# ---------------------------------------------------------------- samplers


def sizes_of(images: int, batch_size: int) -> list[int]:
    """Full batches and the rest; an image alone joins the batch before it."""
    sizes = [batch_size] * (images // batch_size)
    rest = images % batch_size
    if rest == 1 and sizes:
        return [*sizes[:-1], batch_size + 1]
    return [*sizes, rest] if rest else sizes


@given(st.integers(1, 400), st.integers(1, 450), SEEDS, st.integers(0, 10_000), st.booleans())
@example(1, 1, 0, 1, True)
@example(9, 4, 0, 1, True)
@example(3, 1, 0, 1, True)
def test_an_epoch_is_every_image_once_and_follows_from_seed_and_epoch(
    images, batch_size, seed, epoch, shuffle
):
    def drawn(seed: int, *epochs: int) -> tuple[list[int], list[np.ndarray]]:
        sampler = utils.BatchSampler(images, batch_size, shuffle=shuffle, seed=seed)
        for number in epochs:
            sampler.set_epoch(number)
            pairs = list(sampler)
        assert len(sampler) == len(pairs)
        return [int(seed) for seed, _ in pairs], [batch for _, batch in pairs]

    seeds, batches = drawn(seed, epoch)
    assert [len(batch) for batch in batches] == sizes_of(images, batch_size)
    order = np.concatenate(batches)
    assert np.array_equal(np.sort(order), np.arange(images))
    again, through = drawn(seed, epoch), drawn(seed, *range(max(0, epoch - 5), epoch + 1))
    for other_seeds, others in (again, through):
        assert other_seeds == seeds
        assert np.array_equal(np.concatenate(others), order)
    others = [drawn(seed, epoch + 1), drawn((seed + 1) % 2**32, epoch)]
    for other_seeds, other in others:
        assert other_seeds != seeds
        if not shuffle:
            assert np.array_equal(np.concatenate(other), np.arange(images))
        elif images >= 20:
            assert not np.array_equal(np.concatenate(other), order)


@given(
    st.integers(1, 60), st.integers(1, 30), SEEDS, st.integers(1, 50), st.booleans(),
    st.sampled_from((None, 0)),
)  # fmt: skip
def test_a_loader_brings_the_images_of_its_sampler_with_their_labels(
    count, batch_size, seed, epoch, shuffle, workers
):
    """Image k is k grey levels throughout, and its label is k."""
    labels = np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(labels[:, None, None, None], (count, 32, 32, 3)).copy()
    plain = utils.test_transform((0.0,) * 3, (1.0,) * 3)
    options = {"shuffle": shuffle, "seed": seed, "workers": workers}
    loader = utils.make_loader(images, labels, plain, batch_size, CPU, **options)
    loader.sampler.set_epoch(epoch)
    batches, (wanted, _) = list(loader), loader.sampler.draw()
    assert len(loader) == len(batches) == len(wanted)
    for (pixels, numbers), indices in zip(batches, wanted, strict=True):
        assert numbers.tolist() == indices.tolist()
        assert pixels.shape == (len(indices), 3, 32, 32)
        levels = (255 * pixels).round().flatten(1)
        assert torch.equal(levels, numbers[:, None].expand_as(levels))


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_validation_split_keeps_what_it_does_not_hold_out(size, held_out):
    if held_out >= size:
        with pytest.raises(UsageError, match=f"--val-split {held_out} is too large"):
            utils.validation_split(size, held_out)
        return
    kept, out = utils.validation_split(size, held_out)
    assert len(out) == held_out
    assert sorted([*kept, *out]) == list(range(size))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(out) > 0).all()


# ---------------------------------------------------------------- the batched transforms

LEVELS = st.integers(0, 255)
FILLS = st.one_of(LEVELS, st.tuples(LEVELS, LEVELS, LEVELS))


def ordered(numbers: st.SearchStrategy) -> st.SearchStrategy[tuple]:
    return st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))


def in_both_ways(numbers: st.SearchStrategy) -> st.SearchStrategy[dict[str, tuple]]:
    return st.fixed_dictionaries({"x": ordered(numbers), "y": ordered(numbers)})


@st.composite
def affines(draw: st.DrawFn) -> A.Affine:
    shift = draw(
        st.one_of(
            st.fixed_dictionaries({"translate_px": in_both_ways(st.integers(-12, 12))}),
            st.fixed_dictionaries({"translate_percent": in_both_ways(st.floats(-0.4, 0.4))}),
        )
    )
    scale, keep_ratio = draw(in_both_ways(st.floats(0.4, 2.5))), draw(st.booleans())
    return A.Affine(
        scale=scale | {"y": scale["x"]} if keep_ratio else scale,
        keep_ratio=keep_ratio,
        balanced_scale=draw(st.booleans()),
        rotate=draw(ordered(st.floats(-180, 180))),
        shear=draw(in_both_ways(st.floats(-30, 30))),
        fill=draw(FILLS),
        p=1,
        **shift,
    )


@st.composite
def dropouts(draw: st.DrawFn) -> A.CoarseDropout:
    sides = draw(st.sampled_from((st.integers(1, 40), st.floats(0.05, 0.9))))
    return A.CoarseDropout(
        num_holes_range=draw(ordered(st.integers(1, 5))),
        hole_height_range=draw(ordered(sides)),
        hole_width_range=draw(ordered(sides)),
        fill=draw(FILLS),
        p=1,
    )


CROPS = st.builds(A.RandomCrop, height=st.integers(1, 32), width=st.integers(1, 32))
# Ranges with something between their ends: a factor such as exactly 0.3 leaves a tenth of all
# values halfway between two grey levels, where the last bit decides.
FACTORS, TURNS = (
    st.tuples(st.integers(low, high), st.integers(5, 50)).map(
        lambda pair: (pair[0] / 100, sum(pair) / 100)
    )
    for low, high in ((30, 150), (-50, 0))
)
JITTERS = st.builds(A.ColorJitter, FACTORS, FACTORS, FACTORS, TURNS)


def one_by_one(transform: A.BasicTransform, images: np.ndarray, drawn: list[Tensor]) -> np.ndarray:
    """Albumentations' pictures with the parameters that the batched step has drawn."""
    outputs = []
    for number, image in enumerate(images):
        parameters = [each[number].numpy() for each in drawn]
        match type(transform).__name__:
            case "Affine":
                matrix = np.vstack([parameters[0].astype(np.float64), [0, 0, 1]])
                output = transform.apply(image, matrix, image.shape[:2])
            case "CoarseDropout":
                output = transform.apply(image, parameters[0], seed=0)
            case "RandomCrop":
                x, y = (int(value) for value in parameters)
                box = (x, y, x + transform.width, y + transform.height)
                output = transform.apply(image, box)
            case "ColorJitter":
                output = transform.apply(image, *parameters[0].tolist(), parameters[1].tolist())
            case "HorizontalFlip":
                output = transform.apply(image)
            case _:
                output = transform(image=image)["image"]
        outputs.append(output)
    return np.stack(outputs)


def noise(seed: int, *shape: int) -> np.ndarray:
    """uint8 (*shape, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def planar(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def difference(ours: Tensor, theirs: np.ndarray) -> np.ndarray:
    assert ours.dtype == torch.uint8
    assert tuple(ours.permute(0, 2, 3, 1).shape) == theirs.shape
    return np.abs(ours.permute(0, 2, 3, 1).numpy().astype(int) - theirs)


@given(
    st.one_of(affines(), dropouts(), CROPS, JITTERS, st.just(A.HorizontalFlip(p=1))),
    st.integers(1, 8), SEEDS,
)  # fmt: skip
@settings(max_examples=150)
def test_a_batched_step_is_albumentations_with_the_same_parameters(transform, count, seed):
    images, step = noise(seed, count, 32, 32), read(transform)
    drawn = step.draw(count, (32, 32), Random(torch.Generator().manual_seed(seed)))
    off = difference(step.apply(planar(images), *drawn), one_by_one(transform, images, drawn))
    if isinstance(transform, A.Affine | A.ColorJitter):
        assert (off > 0).mean() < 0.05  # by the rounding of a float32: a column of exact halves
        # A level off in one of the jitter's adjustments is more after those behind it.
        assert (off > 1).mean() <= 1e-3 * isinstance(transform, A.ColorJitter)
    else:
        assert off.max() == 0


SIDES, WANTED = st.integers(1, 40), st.integers(1, 80)
POSITIONS = ("center", "top_left", "top_right", "bottom_left", "bottom_right")


@pytest.mark.parametrize("border", ["CONSTANT", "REPLICATE", "REFLECT", "REFLECT_101", "WRAP"])
@given(WANTED, WANTED, st.sampled_from(POSITIONS), FILLS, SIDES, SIDES, SEEDS)
@settings(max_examples=20)
def test_a_batched_pad_is_albumentations_for_images_of_any_size(
    border, min_height, min_width, position, fill, height, width, seed
):
    border_mode = getattr(cv2, f"BORDER_{border}")
    options = {"position": position, "border_mode": border_mode, "fill": fill}
    transform, images = (
        A.PadIfNeeded(min_height, min_width, **options),
        noise(seed, 2, height, width),
    )
    ours = read(transform).apply(planar(images))
    assert difference(ours, one_by_one(transform, images, [])).max() == 0


PROBABILITIES = st.one_of(st.floats(0, 1), st.sampled_from((0.0, 1.0)))


@given(
    st.lists(
        st.tuples(st.one_of(affines(), dropouts(), st.just(A.HorizontalFlip())), PROBABILITIES),
        max_size=3,
    ),
    st.integers(1, 8), SEEDS,
)  # fmt: skip
def test_each_image_of_a_batch_went_through_some_of_the_steps_with_its_own_parameters(
    chosen, count, seed
):
    images = noise(seed, count, 32, 32)
    transforms = []
    for transform, probability in chosen:
        transforms.append(copy.deepcopy(transform))
        transforms[-1].p = probability
    ending = (A.Normalize(mean=(0.0,) * 3, std=(1.0,) * 3), ToTensorV2())
    batched = BatchedTransform.from_compose(A.Compose([*transforms, *ending]))
    drawn = []
    for step in batched.steps:
        step.draw = functools.partial(remembered, drawn, step.draw)
    output = 255 * batched(planar(images), torch.Generator().manual_seed(seed))
    assert (output - output.round()).abs().max() < 1e-3
    pixels = output.round().permute(0, 2, 3, 1).numpy()
    candidates = [images]
    for transform, parameters in zip(transforms, drawn, strict=True):
        applied = [one_by_one(transform, before, parameters) for before in candidates]
        candidates = {0.0: candidates, 1.0: applied}.get(transform.p, candidates + applied)
    off = np.stack([np.abs(pixels - candidate) for candidate in candidates])
    off = off.reshape(len(candidates), count, -1)
    # Affine's rounding, and what a second Affine makes of it.
    assert ((off > 0).mean(axis=2).min(axis=0) < 0.01).all()


def remembered(drawn: list, draw: Callable, *arguments: object) -> tuple[Tensor, ...]:
    drawn.append(draw(*arguments))
    return drawn[-1]


# ---------------------------------------------------------------- normalisation

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))


@given(SHAPES, SEEDS, ordered(LEVELS))
def test_channel_stats_are_numpy_s_however_the_pixels_are_divided(shape, seed, levels):
    generator = np.random.default_rng(seed)
    images = generator.integers(levels[0], levels[1] + 1, (*shape, 3), dtype=np.uint8)
    mean, std = utils.channel_stats(images)
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12, atol=0)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9, atol=1e-7)
    cuts = np.sort(generator.integers(0, len(images) + 1, 3))
    parts = [part for part in np.split(generator.permutation(images), cuts) if len(part)]
    weights = [len(part) / len(images) for part in parts]
    means, stds = (np.array(each) for each in zip(*map(utils.channel_stats, parts), strict=True))
    np.testing.assert_allclose(np.average(means, axis=0, weights=weights), mean, rtol=1e-12)
    squares = np.average(means**2 + stds**2, axis=0, weights=weights)
    np.testing.assert_allclose(squares - np.square(mean), np.square(std), rtol=0, atol=1e-12)


STATS = st.tuples(*[st.floats(0, 1)] * 3), st.tuples(*[st.floats(0.01, 1)] * 3)


@given(st.integers(1, 4), SEEDS, *STATS)
def test_normalised_images_come_back(count, seed, mean, std):
    images, transform = noise(seed, count, 32, 32), utils.test_transform(mean, std)
    theirs = torch.stack([transform(image=image)["image"] for image in images])
    batched = BatchedTransform.from_compose(transform)
    ours = batched(planar(images), torch.Generator())
    wanted = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    for normalised in (theirs, ours):
        assert normalised.dtype == torch.float32
        np.testing.assert_allclose(normalised.numpy(), wanted, rtol=1e-5, atol=1e-4)
        assert np.array_equal(plots.to_pixels(normalised, mean, std), images)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), SEEDS)
def test_metrics_are_those_of_all_images_however_they_are_divided(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (sum(sizes),), generator=generator)
    with Meter("train", sum(sizes), CPU.where) as meter:
        for part, answers in zip(logits.split(sizes), labels.split(sizes), strict=True):
            meter.update(nn.functional.cross_entropy(part, answers), part, answers)
        loss, accuracy = meter.read()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    hits = np.argmax(logits.numpy(), axis=1) == labels.numpy()
    assert accuracy == pytest.approx(100 * hits.mean())


# ---------------------------------------------------------------- muon, and the CPU's layers


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """float32 (N, rows, columns): wide, tall, of low rank, with rows and whole matrices of zeros.

    Those that are not zero have lengths from 0.01 to 10,000.
    """
    count, rows, columns = (draw(st.integers(1, most)) for most in (3, 24, 40))
    rank = draw(st.integers(1, min(rows, columns)))
    generator = np.random.default_rng(draw(SEEDS))
    values = generator.normal(size=(count, rows, rank)) @ generator.normal(
        size=(count, rank, columns)
    )
    if draw(st.booleans()):
        values[:, generator.random(rows) < 0.3] = 0
    lengths = np.linalg.norm(values, axis=(1, 2), keepdims=True)
    scale = 10.0 ** draw(st.integers(-2, 4))
    values = scale * np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    if draw(st.booleans()):
        values[0] = 0
    return torch.from_numpy(values).float()


def orthogonal(generator: np.random.Generator, size: int) -> Tensor:
    return torch.from_numpy(np.linalg.qr(generator.normal(size=(size, size)))[0]).float()


@given(matrices(), SEEDS, st.sampled_from((3, 5)))
@settings(max_examples=100)
def test_orthogonalize_bends_the_singular_values_and_nothing_else(given, seed, steps):
    found = muon.orthogonalize(given, steps)
    assert found.shape == given.shape
    assert found.dtype == given.dtype
    u, values, v = np.linalg.svd(given.double().numpy(), full_matrices=False)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    shares = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    bent = shares
    for _ in range(steps):
        bent = 3.4445 * bent - 4.7750 * bent**3 + 2.0315 * bent**5
    if min(given.shape[1:]) == 1:  # a length alone
        bent = np.ceil(shares)
    assert bent.max() < 1.21
    assert (bent[shares > (0.02 if steps == 3 else 0.005)] > 0.68).all()  # "about 0.7"
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=2e-3)
    close(found, torch.from_numpy(u * bent[:, None] @ v).float())
    # Whatever the length, however the matrix lies in space, alone or among others.
    close(muon.orthogonalize(10 * given, steps), found)
    close(muon.orthogonalize(given.mT, steps), found.mT)
    close(torch.cat([muon.orthogonalize(each[None], steps) for each in given]), found)
    generator = np.random.default_rng(seed)
    left, right = (orthogonal(generator, size) for size in given.shape[1:])
    close(muon.orthogonalize(left @ given @ right, steps), left @ found @ right)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12),
    st.sampled_from(((1, 3, 4), (2, 3, 2), (12, 1, 1), (1, 12, 1))),
)
def test_orthogonalize_of_whatever_is_finite_is_finite(values, shape):
    found = muon.orthogonalize(torch.tensor(values).view(shape))
    assert found.isfinite().all()
    assert found.abs().max() < 1.21


@given(
    groups=st.sampled_from((1, 2, 4)),
    rows=st.integers(1, 5),
    inputs=st.integers(1, 4),
    size=st.integers(1, 3),
    lr=st.floats(1e-4, 0.3),
    scale=st.sampled_from((1e-2, 1.0, 1e3)),
    seed=SEEDS,
)
def test_muon_keeps_the_filters_lengths_and_looks_at_the_gradients_directions_alone(
    groups, rows, inputs, size, lr, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(inputs * groups, rows * groups, size, groups=groups, bias=False)
    gradient = torch.randn(layer.weight.shape, generator=generator)
    gradient /= gradient.norm()
    weights = []
    for factor in (1, scale):
        twin = copy.deepcopy(layer)
        twin.weight.grad = factor * gradient
        muon.Muon(twin, lr=lr, other_lr=1.0).step()
        weights.append(twin.weight.detach())
        lengths = twin.weight.detach().view(groups, -1).norm(dim=1)
        wanted = torch.full((groups,), math.sqrt(rows))
        torch.testing.assert_close(lengths, wanted, rtol=1e-3, atol=0)
    # A group of almost no gradient, where the EPSILON counts, may differ a little.
    torch.testing.assert_close(*weights, rtol=0, atol=1e-2 * lr + 1e-5)


@st.composite
def slow_convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """Depthwise with stride or dilation, or in pairs of channels; float64."""
    kind = draw(st.sampled_from(("strided", "dilated", "paired")))
    channels, bias = 2 * draw(st.integers(2, 4)), draw(st.booleans())
    small = functools.partial(st.integers, 1)
    if kind == "dilated":
        d = draw(st.integers(2, 4))
        return nn.Conv2d(channels, channels, 3, 1, d, d, channels, bias).double()
    stride = (draw(small(3)), draw(small(3)))
    kernel = (draw(small(3)), draw(small(3)))
    groups = channels if kind == "strided" else channels // 2
    around = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    dilation = (draw(small(2)), draw(small(2)))
    return nn.Conv2d(channels, channels, kernel, stride, around, dilation, groups, bias).double()


LENGTHS = st.sampled_from((8, 9, 12, 16))  # with and without what a dilation divides


@given(slow_convolutions(), st.integers(1, 3), LENGTHS, LENGTHS, SEEDS)
@settings(max_examples=60)
def test_the_cpu_s_faster_convolutions_compute_the_same(layer, images, height, width, seed):
    faster = cpu.speed_up(nn.Sequential(copy.deepcopy(layer)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        images, layer.in_channels, height, width, dtype=torch.float64, generator=generator
    ).requires_grad_()
    results = []
    for model in (layer, faster):
        output = model(x)
        parameters = list(model.parameters())
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *parameters])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(faster.eval()(x), results[0][0])


# ---------------------------------------------------------------- a run that is stopped anywhere


@pytest.fixture(scope="module")
def few_images() -> Iterator[None]:
    """Dry runs of 130 images, and no pictures: a run in a fraction of a second."""
    whole = cifar10.load_sample()
    few = cifar10.CIFAR10(
        whole.train_images[:130], whole.train_labels[:130],
        whole.test_images[:40], whole.test_labels[:40],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as context:
        draw_nothing(context)
        context.setattr(cifar10, "load_sample", lambda: few)
        context.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug
        yield


EPOCHS = 3
TRAINING_IMAGES = 100  # and 30 held out


@contextlib.contextmanager
def stopped_at(batch: int) -> Iterator[None]:
    """Ctrl-C when that many batches, of training or evaluation, have gone by."""
    seen, update = [], Meter.update

    def counted(*arguments: object) -> None:
        seen.append(1)
        if len(seen) == batch:
            raise KeyboardInterrupt
        update(*arguments)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Meter, "update", counted)
        yield


def trained(arguments: list[object]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train.main([str(argument) for argument in arguments])


def contents(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The bytes of every weight, and the table without its seconds."""
    weights = files.read_checkpoint(folder / "weights.pt")
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    timeless = [{key: row[key] for key in row if not key.endswith("seconds")} for row in rows]
    return {name: value.numpy().tobytes() for name, value in weights.items()}, timeless


@given(
    seed=st.integers(0, 2),
    batch_size=st.sampled_from((20, 33, 50)),
    optimizer=st.sampled_from(("muon", "sgd", "adamw")),
    loader=st.sampled_from(((), ("--loader", "albumentations", "--workers", 0))),
    data=st.data(),
)
@settings(max_examples=5)
def test_a_run_that_was_stopped_anywhere_ends_as_if_it_had_not_been(
    few_images, seed, batch_size, optimizer, loader, data
):
    steps = EPOCHS * (len(sizes_of(TRAINING_IMAGES, batch_size)) + 1)  # and an evaluation each
    stops = data.draw(st.lists(st.integers(1, steps), min_size=1, max_size=2))
    with tempfile.TemporaryDirectory() as root:
        network = Path(root) / "small.py"
        network.write_text(torture.NETWORK)
        common = [
            "--dry-run", "--model", network, "--epochs", EPOCHS, "--val-split", 30, "--seed", seed,
            "--batch-size", batch_size, "--set", f"optimizer={optimizer}", *loader,
        ]  # fmt: skip
        outputs = [Path(root) / name for name in ("whole", "stopped")]
        assert trained([*common, "--output-dir", outputs[0]]) == 0
        arguments = [*common, "--output-dir", outputs[1]]
        for batch in stops:
            with stopped_at(batch):
                status = trained(arguments)
            if status == 0:  # the second stop lay behind what was left to do
                break
            assert status == 130
            arguments = ["--resume", "--output-dir", outputs[1], "--model", network]
        else:
            assert trained(arguments) == 0
        whole, stopped = map(run_in, outputs)
        assert contents(stopped) == contents(whole)
        assert runs.is_finished(stopped)


# ---------------------------------------------------------------- command lines

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from((HUGE - 1, 10**400))).map(
    lambda value: hex(value) if value == HUGE - 1 else str(value)
)
TEXTS = st.one_of(st.text(), st.text("0123456789.eE+-_ \u0663"), NUMBERS)


def parsed(parse: Callable[[str], float], text: str) -> float | str:
    """The number, or in one line why it is none."""
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        return str(error)


def as_python_does(kind: Callable[[str], float], text: str) -> float:
    """NaN where Python takes it for no number."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


@given(TEXTS, st.integers(-5, 5), st.one_of(st.none(), st.integers(6, 2**32)))
@settings(max_examples=100)
def test_a_whole_number_is_read_or_refused_in_one_line(text, lowest, highest):
    value, wanted = parsed(cli.whole_number(lowest, highest), text), as_python_does(int, text)
    if lowest <= wanted <= (math.inf if highest is None else highest):
        assert type(value) is int
        assert value == wanted
    else:
        assert " is not a whole number from " in value
        assert len(value.splitlines()) == 1


@given(TEXTS, st.booleans())
@settings(max_examples=100)
def test_a_real_number_is_read_or_refused_in_one_line(text, positive):
    value, wanted = parsed(cli.real_number(positive), text), as_python_does(float, text)
    if wanted <= 1e15 and (wanted > 0 if positive else wanted >= 0):
        assert value == wanted
    else:
        assert " is not a number " in value
        assert len(value.splitlines()) == 1


OPTIONS = sorted(
    {text for action in flags.parser()._actions for text in action.option_strings} - {"-h"}
)
ENTRIES = st.builds(
    "{}={}".format,
    st.one_of(st.sampled_from(sorted(GOOD_VALUES)), st.text()),
    st.one_of(TEXTS, st.sampled_from(("True", "{[]: 1}", "1if 1else 2", "'\\d'", "[" * 300))),
)
WORDS_OF_A_LINE = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from([option[:-2] for option in OPTIONS]),
    st.builds("{}={}".format, st.sampled_from(OPTIONS), TEXTS),
    st.builds("--set={}".format, ENTRIES),
    TEXTS,
)


@functools.cache
def model_2() -> networks.Network:
    return networks.load_network("2")


@given(st.lists(WORDS_OF_A_LINE, max_size=6))
@example(["two\nlines"])
@example([f"--set=lr={HUGE - 1:#x}"])
@example(["--set=__dataclass_self__=1"])
@example(["--set=a\nb=1"])
@example(["--set=lr=1if 1else 2"])
@settings(max_examples=200)
def test_any_command_line_is_taken_or_refused_in_one_line(words):
    """And what is taken lies in its range; no warning is printed either."""
    taken = []

    def work(args: argparse.Namespace, _words: list[str], _team: Team) -> None:
        taken.append((args, flags.recipe_of(args, model_2())))

    screen, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as context,
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(record=True, action="always") as warned,
    ):
        context.setattr(train, "train", work)
        try:
            status = train.main(words)
        except SystemExit as end:  # --help
            assert "usage: train.py" in screen.getvalue()
            status = end.code
    assert not warned
    if status == 0:
        assert errors.getvalue() == ""
    else:
        assert status == 2
        assert errors.getvalue().startswith("train.py: error: ")
        assert errors.getvalue().endswith("\n")
        assert len(errors.getvalue().splitlines()) == 1
    for args, recipe in taken:
        assert args.epochs is None or 1 <= args.epochs <= 10_000
        assert 0 <= args.seed < 2**32
        assert args.workers is None or 0 <= args.workers <= 256
        assert args.val_split is None or args.val_split >= 1
        assert 0 <= args.download_timeout <= 86_400
        for key, (low, high, _) in REAL.items():
            assert low <= getattr(recipe, key) <= high


PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
FLAGS = {
    "seed": SEEDS,
    "lr": GOOD_VALUES["lr"],
    "weight-decay": GOOD_VALUES["weight_decay"],
    "batch-size": st.integers(1, 10**15),
    "workers": st.integers(0, 256),
    "val-split": st.integers(1),
    "download-timeout": st.floats(0, 86_400),
    "recipe": st.sampled_from(("tuned", "published", "ours")),
    "loader": st.sampled_from(("batched", "albumentations")),
    "device": st.text(),
    "data-dir": PATHS,
    "output-dir": PATHS,
}
SETS = st.one_of(
    [
        st.builds(f"--set={key}={{}}".format, values)
        for key, values in GOOD_VALUES.items()
        if key != "teacher"
    ]
    + [st.builds("--set=teacher={}".format, PATHS)]
)


@given(
    st.integers(1, 10_000),
    st.fixed_dictionaries({}, optional=FLAGS),
    st.lists(SETS, max_size=3),
    st.booleans(),
)
def test_a_command_line_comes_back_from_settings_json(epochs, given, sets, dry):
    words = [f"--epochs={epochs}", *(f"--{name}={value}" for name, value in given.items())]
    words += [*sets, *(["--dry-run"] if dry else [])]
    args = flags.parser().parse_args(words)
    stored = json.loads(json.dumps(flags.to_store(args)))
    for again in ([], words):
        before = vars(flags.resumed(Path("run"), stored, again))
        for name, value in vars(args).items():
            if name in ("data_dir", "output_dir"):
                assert Path(before[name]).resolve() == Path(value).resolve()
            else:
                assert before[name] == value or dict(before[name]) == dict(value)


# ---------------------------------------------------------------- a run's files

FINITE = st.floats(allow_nan=False, allow_infinity=False)
PERCENT = st.floats(0, 100)
ROWS = st.lists(
    st.tuples(FINITE, FINITE, PERCENT, FINITE, PERCENT, st.tuples(FINITE, FINITE)),
    min_size=1, max_size=8,
)  # fmt: skip


@given(ROWS, st.sampled_from(("test", "val")), PERCENT)
@settings(max_examples=25)
def test_a_history_comes_back_from_the_files_to_the_last_bit(rows, split, target):
    history = History(split, epochs=20, target=target, target_epochs=70)
    for lr, loss, accuracy, test_loss, test_accuracy, seconds in rows:
        history.add(lr, Metrics(loss, accuracy), Metrics(test_loss, test_accuracy), seconds)
    with tempfile.TemporaryDirectory() as folder, runs.Run(Path(folder)) as run:
        path = run.write_csv("log.csv", history.rows)
        with open(path, newline="") as file:
            table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        saved = files.read_checkpoint(run.save_checkpoint("last.pt", {"history": history.rows}))
    for rows_read in (table, saved["history"]):
        assert [list(row) for row in rows_read] == [list(row) for row in history.rows]
        assert [bits(row) for row in rows_read] == [bits(row) for row in history.rows]
    accuracies = np.array([row[4] for row in rows])
    summary = history.summary()
    assert summary["epochs_done"] == len(rows)
    assert summary["last_accuracy"] == accuracies[-1]
    assert summary["best_epoch"] == np.argmax(accuracies) + 1
    reached = np.flatnonzero(accuracies >= target)
    assert summary["target_reached_at"] == (reached[0] + 1 if len(reached) else None)


def bits(row: dict[str, float]) -> list[bytes]:
    return [struct.pack("d", value) for value in row.values()]


@given(st.floats(0, 1e7))
@example(59.6)
@example(3599.7)
@example(3660.0)
def test_a_duration_is_the_seconds_or_minutes_that_it_says(seconds):
    text, parts = duration(seconds), {}
    for unit in "hms":
        if unit in text:
            number, text = text.split(unit)
            parts[unit] = int(number)
    assert text == ""
    told = 3600 * parts.get("h", 0) + 60 * parts.get("m", 0) + parts.get("s", 0)
    assert -0.5 <= seconds - told <= (0.5 if "s" in parts else 59.5)
    assert list(parts) in (["h", "m"], ["m", "s"], ["s"])
    assert all(parts[unit] < 60 for unit in parts if unit != "h")
