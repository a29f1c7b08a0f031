"""The batched transforms against Albumentations itself, on the sample images."""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from scipy import stats

import utils
from fast.batched import BatchedTransform, Random, UnknownTransformError, read
from fast.loader import BatchedLoader
from support import launches
from tools.validate_transforms import check_agreement

FILL = (125, 122, 115)
ENDING = (A.Normalize(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26)), ToTensorV2())


def planar(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) as CIFAR-10 has it to (N, 3, H, W) as the network wants it."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


OWN_AFFINE, OWN_DROPOUT = (
    step
    for step in utils.train_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)).transforms
    if isinstance(step, A.Affine | A.CoarseDropout)
)


TRANSFORMS = {
    "flip": A.HorizontalFlip(p=1),
    "our affine": OWN_AFFINE,
    "our dropout": OWN_DROPOUT,
    "strong affine": A.Affine(
        scale={"x": (0.5, 2.0), "y": (0.7, 1.1)},
        translate_px={"x": (-9, 9), "y": (-4, 12)},
        rotate=(-180, 180),
        shear={"x": (-25, 25), "y": (-15, 15)},
        fill=(0, 255, 17),
        p=1,
    ),
    "affine that shifts": A.Affine(translate_percent=(-0.4, 0.4), fill=9, p=1),
    "several holes": A.CoarseDropout(
        num_holes_range=(1, 5), hole_height_range=(2, 20), hole_width_range=(1, 9), fill=7, p=1
    ),
    "holes in shares": A.CoarseDropout(
        num_holes_range=(1, 3), hole_height_range=(0.1, 0.4), hole_width_range=(0.2, 0.9), p=1
    ),
    "pad reflect": A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
    "pad mirror": A.PadIfNeeded(41, 38, border_mode=cv2.BORDER_REFLECT, position="top_left"),
    "pad replicate": A.PadIfNeeded(41, 41, border_mode=cv2.BORDER_REPLICATE, position="top_right"),
    "pad wrap": A.PadIfNeeded(44, 33, border_mode=cv2.BORDER_WRAP, position="bottom_left"),
    "pad constant": A.PadIfNeeded(
        40, 37, border_mode=cv2.BORDER_CONSTANT, fill=FILL, position="bottom_right"
    ),
    "crop": A.RandomCrop(24, 20, p=1),
    "jitter": A.ColorJitter(0.2, 0.2, 0.2, 0.02, p=1),
    "strong jitter": A.ColorJitter((0.3, 2), (0.3, 2), (0, 3), (-0.5, 0.5), p=1),
    "brightness": A.ColorJitter((0.2, 2), (1, 1), (1, 1), (0, 0), p=1),
    "contrast": A.ColorJitter((1, 1), (0.2, 2), (1, 1), (0, 0), p=1),
    "saturation": A.ColorJitter((1, 1), (1, 1), (0.2, 2), (0, 0), p=1),
    "noise": A.GaussNoise(std_range=(0.01, 0.3), mean_range=(-0.1, 0.1), p=1),
    "grey noise": A.GaussNoise(std_range=(0.1, 0.1), per_channel=False, p=1),
    "hue": A.ColorJitter((1, 1), (1, 1), (1, 1), (-0.5, 0.5), p=1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_same_parameters_give_the_same_pixels(name, sample, monkeypatch):
    """And would be noticed if they did not: a few pixels two grey levels off."""
    pipeline = A.Compose([TRANSFORMS[name]])
    (check,) = check_agreement(pipeline, sample.train_images[:300])
    assert check.good, check

    kind = type(read(TRANSFORMS[name]))
    apply = kind.apply

    def off(*arguments: object) -> torch.Tensor:
        pixels = apply(*arguments)
        pixels[:, :, 3, 7] ^= 2
        return pixels

    monkeypatch.setattr(kind, "apply", off)
    (check,) = check_agreement(pipeline, sample.train_images[:300])
    assert check.good is False, check


# ---------------------------------------------------------------- draws

DRAWS = 20_000


def theirs_and_ours(transform: A.BasicTransform, name: str) -> tuple[np.ndarray, np.ndarray]:
    """20,000 draws of Albumentations' parameter of that name, and of the batched step's."""
    transform.set_random_seed(5)
    shape = {"shape": (32, 32, 3)}
    theirs = np.stack(
        [transform.get_params_dependent_on_data(shape, {})[name] for _ in range(DRAWS)]
    )
    step = read(transform)
    random = Random(torch.Generator().manual_seed(5))
    return theirs, step.draw(DRAWS, (32, 32), random)[0].numpy()


def figures(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Angle, scales and shifts of the centre that affine matrices without shear stand for."""
    middle = np.array([15.5, 15.5])
    shift = matrices[:, :2, :2] @ middle + matrices[:, :2, 2] - middle
    found = {
        "angle": np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])),
        "scale x": np.hypot(matrices[:, 0, 0], matrices[:, 1, 0]),
        "scale y": np.hypot(matrices[:, 0, 1], matrices[:, 1, 1]),
        "shift x": shift[:, 0],
        "shift y": shift[:, 1],
    }
    # What is a single value in double precision is several in ours.
    return {name: values.astype(np.float64).round(4) for name, values in found.items()}


def same_distribution(some: np.ndarray, others: np.ndarray) -> bool:
    """Kolmogorov and Smirnov's test of two samples does not tell them apart."""
    return stats.ks_2samp(some, others).pvalue > 1e-3


@pytest.mark.parametrize(
    "transform",
    [
        OWN_AFFINE,
        A.Affine(scale=(0.5, 1.5), keep_ratio=True, translate_px=(-4, 9), rotate=(-170, 30)),
        A.Affine(scale={"x": (0.5, 1.1), "y": (0.9, 3)}, balanced_scale=True, rotate=5),
    ],
)
def test_affine_draws_match_in_distribution(transform):
    theirs, ours = (figures(matrices) for matrices in theirs_and_ours(transform, "matrix"))
    for name in theirs:
        assert same_distribution(theirs[name], ours[name]), name
    if transform.keep_ratio:
        np.testing.assert_allclose(ours["scale x"], ours["scale y"], rtol=1e-4)


def test_shear_draws_match_in_distribution():
    transform = A.Affine(shear={"x": (-20, 5), "y": (0, 0)}, rotate=0, scale=1.0)
    theirs, ours = theirs_and_ours(transform, "matrix")
    assert same_distribution(theirs[:, 0, 1], ours[:, 0, 1])
    np.testing.assert_allclose(ours[:, 1, 0], 0, atol=1e-7)


@pytest.mark.parametrize(
    "transform",
    [
        OWN_DROPOUT,
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(3, 9), hole_width_range=(8, 20)),
        A.CoarseDropout(
            num_holes_range=(1, 1), hole_height_range=(0.1, 0.5), hole_width_range=(0.3, 0.4)
        ),
    ],
)
def test_hole_draws_match_in_distribution(transform):
    theirs, ours = theirs_and_ours(transform, "holes")
    for corner in range(4):
        assert same_distribution(theirs[:, 0, corner], ours[:, 0, corner]), corner
    assert ours.min() >= 0
    assert ours.max() <= 32


def test_number_of_holes_matches_in_distribution():
    step = read(
        A.CoarseDropout(
            num_holes_range=(2, 5), hole_height_range=(1, 1), hole_width_range=(1, 1), p=1
        )
    )
    (holes,) = step.draw(DRAWS, (32, 32), Random(torch.Generator().manual_seed(1)))
    numbers = ((holes[..., 2] > holes[..., 0]) & (holes[..., 3] > holes[..., 1])).sum(dim=1)
    counts = torch.bincount(numbers, minlength=7).tolist()
    assert counts[:2] == [0, 0]
    assert stats.chisquare(counts[2:6]).pvalue > 1e-3


def test_crop_draws_match_in_distribution():
    transform = A.RandomCrop(32, 32)
    transform.set_random_seed(5)
    theirs = np.array(
        [
            transform.get_params_dependent_on_data({"shape": (40, 40, 3)}, {})["crop_coords"][:2]
            for _ in range(DRAWS)
        ]
    )
    step = read(transform)
    ours = step.draw(DRAWS, (40, 40), Random(torch.Generator().manual_seed(5)))
    for axis in range(2):
        assert same_distribution(theirs[:, axis], ours[axis].numpy())


def test_jitter_draws_cover_their_ranges_and_every_order():
    step = read(A.ColorJitter((0.5, 1.5), (0.9, 1), (0, 2), (-0.1, 0.3), p=1))
    factors, order = step.draw(DRAWS, (32, 32), Random(torch.Generator().manual_seed(1)))
    for column, (low, high) in enumerate([(0.5, 1.5), (0.9, 1), (0, 2), (-0.1, 0.3)]):
        drawn = factors[:, column].numpy()
        assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    _, counts = order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_probabilities_are_those_of_the_compose(p):
    """One white pixel in the corner: flipped, it is elsewhere; dropped, it is gone."""
    pipeline = A.Compose(
        [
            A.HorizontalFlip(p=p),
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(32, 32), hole_width_range=(32, 32), p=p
            ),
            *ENDING,
        ]
    )
    images = torch.zeros(DRAWS, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    output = BatchedTransform.from_compose(pipeline)(images, torch.Generator().manual_seed(2))
    bright = output[:, 0] > 0
    gone = ~bright.any(dim=2).any(dim=1)
    flipped = bright[:, 0, 31]
    assert stats.binomtest(int(gone.sum()), DRAWS, p).pvalue > 1e-3
    assert stats.binomtest(int(flipped.sum()), int((~gone).sum()), p).pvalue > 1e-3


# ---------------------------------------------------------------- the pipeline


def whole(compose: A.Compose, images: np.ndarray, seed: int = 0, **options) -> torch.Tensor:
    transform = BatchedTransform.from_compose(compose)
    return transform(planar(images), torch.Generator().manual_seed(seed), **options)


def test_without_augmentation_it_is_albumentations_normalize(sample):
    compose = utils.test_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    wanted = torch.stack([compose(image=image)["image"] for image in sample.test_images])
    torch.testing.assert_close(whole(compose, sample.test_images), wanted, rtol=0, atol=1e-5)


def test_the_other_published_pipelines_run(sample):
    padded_crop = A.Compose(
        [
            A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(32, 32),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(0.2, 0.2, 0.2, 0.02, p=0.5),
            *ENDING,
        ]
    )
    output = whole(padded_crop, sample.train_images[:50])
    assert output.shape == (50, 3, 32, 32)
    assert output.isfinite().all()


def test_the_mean_image_of_many_draws_is_albumentations(sample):
    """The pipeline as a whole: 4,000 draws of one image each way, compared pixel by pixel."""
    compose = utils.train_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    compose.set_random_seed(0)
    image = sample.train_images[7]
    theirs = torch.stack([compose(image=image)["image"] for _ in range(4000)])
    ours = whole(compose, np.repeat(image[None], 4000, axis=0))
    error = (theirs.var(dim=0) / 4000 + ours.var(dim=0) / 4000).sqrt()
    distance = (theirs.mean(dim=0) - ours.mean(dim=0)) / error
    # Neighbouring pixels move together, so one large distance among 3,072 is no surprise.
    assert distance.abs().mean() < 1.6
    assert distance.abs().max() < 6


def test_the_generator_decides_the_draws(sample):
    compose = utils.train_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    images = sample.train_images[:20]
    assert torch.equal(whole(compose, images), whole(compose, images))
    assert not torch.equal(whole(compose, images), whole(compose, images, seed=1))


def test_number_format_and_layout_of_the_result(sample):
    compose = utils.train_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    images = sample.train_images[:20]
    output = whole(compose, images, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, whole(compose, images).bfloat16())


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        ([A.GaussianBlur(), *ENDING], "GaussianBlur"),
        ([A.SafeRotate(), *ENDING], "SafeRotate"),
        ([A.OneOf([A.HorizontalFlip(p=1)]), *ENDING], "OneOf"),
        ([A.Affine(interpolation=cv2.INTER_CUBIC), *ENDING], "Affine with interpolation=2"),
        ([A.Affine(border_mode=cv2.BORDER_REFLECT_101), *ENDING], "Affine with border_mode"),
        ([A.Affine(fit_output=True), *ENDING], "Affine with fit_output=True"),
        ([A.CoarseDropout(fill="random"), *ENDING], "CoarseDropout with fill='random'"),
        ([A.ImageCompression("webp"), *ENDING], "ImageCompression with compression_type='webp'"),
        ([A.GaussNoise(noise_scale_factor=0.5), *ENDING], "GaussNoise with noise_scale_factor"),
        ([A.RandomCrop(32, 32, p=0.5), *ENDING], r"RandomCrop with p=0\.5"),
        ([A.PadIfNeeded(40, 40, position="random"), *ENDING], "PadIfNeeded with this position"),
        ([A.HorizontalFlip()], "does not end in Normalize"),
        ([], "does not end in Normalize"),
        ([A.Normalize(normalization="image"), ToTensorV2()], "Normalize with normalization"),
    ],
)
def test_what_has_no_batched_form_is_named(steps, cause):
    with pytest.raises(UnknownTransformError, match=cause):
        BatchedTransform.from_compose(A.Compose(steps))


# ---------------------------------------------------------------- the loader


def loader_of(sample, transform: A.Compose, images: int, batch_size: int) -> BatchedLoader:
    """Shuffled batches on the CPU, in float32."""
    device = utils.Device(torch.device("cpu"))
    data = sample.train_images[:images], sample.train_labels[:images]
    return utils.make_loader(*data, transform, batch_size, device, shuffle=True, seed=3)


OWN = utils.train_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
PLAIN = utils.test_transform((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


@pytest.mark.parametrize("together", [1, 3])
def test_batches_are_drawn_one_after_the_other_from_the_epoch_s_seed(together, sample):
    """On the CPU singly, on a GPU several at once: what is drawn together says this reference."""
    loader = loader_of(sample, OWN, 90, 20)
    assert loader.together == 1
    loader.together = together
    for epoch in (1, 2):
        loader.sampler.set_epoch(epoch)
        batches, seeds = loader.sampler.draw()
        generator = torch.Generator().manual_seed(seeds[0])
        transform = BatchedTransform.from_compose(OWN)
        wanted = []
        for first in range(0, 5, together):
            index = np.concatenate(batches[first : first + together])
            wanted.append(transform(planar(sample.train_images[index]), generator))
        images, labels = zip(*loader, strict=True)
        assert [len(each) for each in images] == [len(each) for each in labels] == [20] * 4 + [10]
        assert torch.equal(torch.cat(images), torch.cat(wanted))
        order = np.concatenate(batches)
        np.testing.assert_array_equal(torch.cat(labels), sample.train_labels[order])


@pytest.mark.parametrize("together", [2, 5, 100])
@pytest.mark.parametrize(("images", "sizes"), [(60, [20] * 3), (61, [20, 20, 21]), (7, [7])])
def test_batches_made_together_are_those_made_singly(images, sizes, together, sample):
    """Where nothing is drawn; last batches of every kind: whole, of one more, alone."""
    loader = loader_of(sample, PLAIN, images, 20)
    singly = list(loader)
    loader.together = together
    at_once = list(loader)
    assert [len(labels) for _, labels in at_once] == sizes
    torch.testing.assert_close(at_once, singly, rtol=0, atol=0)


@pytest.mark.parametrize(("batch_size", "together"), [(256, 16), (2048, 2), (5000, 1)])
def test_a_gpu_makes_batches_of_4096_images_together(batch_size, together, sample):
    with launches.imagined_gpu() as device:
        data = sample.train_images, sample.train_labels
        loader = utils.make_loader(*data, OWN, batch_size, device, shuffle=True)
        assert loader.together == together
