"""Damage by JPEG and noise: the batched form against OpenCV, the share that training takes, and
what tools.evaluate --corruptions finds.
"""

import json

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import cifar10
import plots
import recipes
import utils
from errors import UsageError
from fast.batched import BatchedTransform, Random, read
from fast.jpeg import jpeg
from support.damage import NOISE, QUALITIES, hardened
from tests.conftest import PIXEL, call_main
from tests.test_recipes import GOOD
from tools import corruptions, evaluate
from tools.validate_transforms import check_agreement

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
DRAWS = 20_000


def opencv(images: np.ndarray, quality: int) -> np.ndarray:
    """The images, red first, through JPEG files."""
    files = [
        cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        for image in images
    ]
    return np.stack([cv2.imdecode(file, cv2.IMREAD_COLOR)[:, :, ::-1] for file in files])


def ours(images: np.ndarray, quality: int | torch.Tensor) -> np.ndarray:
    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    each = torch.full((len(images),), quality) if isinstance(quality, int) else quality
    found = jpeg(planes, each)
    assert found.dtype == torch.uint8
    return found.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(32, 32), (20, 28), (31, 17), (8, 12), (17, 1), (32, 4), (3, 3)])
@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_jpeg_is_what_opencv_reads_back(quality, size, sample):
    """The damage is a hundred times the difference."""
    images = np.stack([cv2.resize(image, size[::-1]) for image in sample.train_images[:100]])
    theirs, found = opencv(images, quality).astype(int), ours(images, quality).astype(int)
    difference, damage = np.abs(found - theirs), np.abs(theirs - images)
    assert (difference > 0).mean() < 0.05
    assert difference.mean() < 0.02 * damage.mean()


def test_a_setting_of_somebody_s_model_file_does_not_change_jpeg(sample):
    wanted = ours(sample.train_images[:50], 80)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(ours(sample.train_images[:50], 80), wanted)
    finally:
        torch.set_float32_matmul_precision(before)


def test_each_image_has_its_own_quality(sample):
    images, qualities = sample.train_images[:40], torch.arange(10, 90, 2)
    together = ours(images, qualities)
    for image, quality, found in zip(images, qualities.tolist(), together, strict=True):
        assert np.array_equal(ours(image[None], quality)[0], found)


def test_jpeg_of_one_colour_and_of_hard_edges():
    """Grey stays; black and white stripes of a pixel must not leave the range."""
    grey = np.full((1, 32, 32, 3), 77, np.uint8)
    assert np.array_equal(ours(grey, 90), grey)
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::2] = 255
    for quality in (10, 60, 95):
        assert np.array_equal(ours(stripes, quality), opencv(stripes, quality))


@pytest.mark.parametrize("quality", [(50, 50), (30, 95)])
def test_the_batched_step_takes_the_channels_as_albumentations_does(quality, sample):
    (check,) = check_agreement(
        A.Compose([A.ImageCompression(quality_range=quality)]), sample.train_images[:300]
    )
    assert check.good, check


def test_qualities_are_drawn_evenly():
    step = read(A.ImageCompression(quality_range=(40, 59), p=1))
    (drawn,) = step.draw(DRAWS, (32, 32), Random(torch.Generator().manual_seed(1)))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == list(range(40, 60))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("per_channel", [True, False])
def test_noise_has_the_deviation_and_mean_that_were_asked_for(per_channel):
    options = {"std_range": (0.05, 0.05), "mean_range": (0.1, 0.1), "per_channel": per_channel}
    step = read(A.GaussNoise(**options, p=1))
    (noise,) = step.draw(200, (8, 8), Random(torch.Generator().manual_seed(1)))
    assert noise.shape == (200, 3 if per_channel else 1, 8, 8)
    assert stats.kstest(noise.ravel(), stats.norm(25.5, 12.75).cdf).pvalue > 1e-3
    step = read(A.GaussNoise(std_range=(0.0, 0.2), p=1))
    (noise,) = step.draw(2000, (8, 8), Random(torch.Generator().manual_seed(1)))
    deviations = noise.std(dim=(1, 2, 3)) / 255
    assert stats.kstest(deviations, stats.uniform(0, 0.2).cdf).statistic < 0.05


# ---------------------------------------------------------------- training


def test_no_share_leaves_the_pipeline_as_it_is():
    recipe = recipes.Recipe.read(GOOD)
    assert recipe.robust == 0
    plain = utils.TRANSFORMS["standard"](MEAN, STD, recipe.augmentation(5))
    assert recipe.train_transform(MEAN, STD, 5).to_dict() == plain.to_dict()


@pytest.mark.parametrize("share", [0.2, 0.75, 1.0])
def test_so_large_a_share_of_the_images_is_damaged(share, sample):
    """In both ways of training."""
    compose = hardened(utils.test_transform(MEAN, STD), share)
    image = sample.train_images[3]
    plain = utils.test_transform(MEAN, STD)(image=image)["image"]
    planes = torch.from_numpy(image.transpose(2, 0, 1)).expand(2000, -1, -1, -1).contiguous()
    batched = BatchedTransform.from_compose(compose)(planes, torch.Generator().manual_seed(0))
    compose.set_random_seed(0)
    singly = torch.stack([compose(image=image)["image"] for _ in range(2000)])
    for found in (batched, singly):
        touched = int(((found - plain).abs() > 1e-4).flatten(1).any(dim=1).sum())
        assert stats.binomtest(touched, 2000, min(share, 1 - 1e-12)).pvalue > 1e-3
    steps = compose.transforms[:2]
    assert [type(step) for step in steps] == [A.ImageCompression, A.GaussNoise]
    jpegs, noises = (step.p for step in steps)
    assert 1 - (1 - jpegs) * (1 - noises) == pytest.approx(share)
    assert 1 - jpegs == pytest.approx((1 - noises) ** 3)
    assert (steps[0].quality_range, steps[1].std_range) == (QUALITIES, NOISE)


def test_damage_comes_last_of_what_works_on_grey_levels(sample):
    recipe = recipes.Recipe.read(GOOD | {"transform": "crop_cutout", "robust": 0.3})
    names = [type(step).__name__ for step in recipe.train_transform(MEAN, STD, 5).transforms]
    damage, ending = ["ImageCompression", "GaussNoise"], ["Normalize", "ToTensorV2"]
    assert names == ["PadIfNeeded", "RandomCrop", "HorizontalFlip", "CoarseDropout"] + (
        damage + ending
    )


def test_a_pipeline_without_normalize_cannot_be_hardened():
    with pytest.raises(UsageError, match=r"this transform has none; add it, or leave"):
        hardened(A.Compose([A.HorizontalFlip()]), 0.5)


# ---------------------------------------------------------------- what it costs


def test_corruptions_are_alike_at_each_call_and_each_of_its_kind(sample):
    images = sample.test_images[:20]
    for name in corruptions.CORRUPTIONS:
        found = corruptions.damaged(images, name)
        assert found.dtype == np.uint8
        assert found.shape == images.shape
        assert np.array_equal(found, corruptions.damaged(images, name))
        assert not np.array_equal(found, images)
    # OpenCV takes the channels that Albumentations gives it in the other order.
    jpegs = opencv(images[..., ::-1], 75)[..., ::-1]
    assert np.array_equal(corruptions.damaged(images, "JPEG, quality 75"), jpegs)
    grey = np.full((20, 32, 32, 3), 128, np.uint8)
    for levels in (4, 8, 16):
        noise = corruptions.damaged(grey, f"noise of {levels} grey levels") - 128.0
        whole = np.trunc(np.random.default_rng(0).normal(0, levels, 10**6))
        assert noise.std() == pytest.approx(whole.std(), rel=0.02)
    assert np.all(corruptions.damaged(grey, "brightness times 0.6") == int(128 * 0.6))
    bar = np.zeros((1, 32, 32, 3), np.uint8)
    bar[0, 10, 12] = 255
    assert np.argwhere(corruptions.damaged(bar, "shifted by 3 pixels")[0, ..., 0]).tolist() == [
        [13, 15]
    ]
    blurred = corruptions.damaged(bar, "blur, sigma 1 pixel")[0, ..., 0] / 255
    assert blurred[10, 12] == pytest.approx(1 / (2 * np.pi), rel=0.03)  # a Gaussian's top
    line = np.zeros((1, 32, 32, 3), np.uint8)
    line[0, :, 16] = 255
    rows, columns = np.nonzero(corruptions.damaged(line, "turned by 10 degrees")[0, ..., 0] > 100)
    slope = np.degrees(np.arctan(np.polyfit(rows, columns, 1)[0]))
    assert abs(slope) == pytest.approx(10, abs=1)


def test_measured_is_what_the_network_still_gets_right():
    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.array([0, 1] * 4)
    titles = []

    def answer(damaged: np.ndarray, title: str) -> np.ndarray:
        """Right for all but the first image; for none of the bright ones."""
        titles.append(title)
        assert damaged.shape == images.shape
        right = np.arange(8) > 0
        if title == "brightness times 1.4":
            right[:] = False
        return np.where(right, labels, 1 - labels)[:, None] == np.arange(2)

    found = corruptions.measure(answer, images, labels, clean=90.0)
    assert titles == list(found) == list(corruptions.CORRUPTIONS)
    assert found["brightness times 1.4"] == {"accuracy": 0.0, "lost": 90.0}
    assert found["JPEG, quality 50"] == {"accuracy": 87.5, "lost": 2.5}
    lines = corruptions.table(found).splitlines()
    assert "accuracy    lost" in lines[0]
    assert "JPEG, quality 50          87.50 %    2.50" in lines
    assert len({len(line) for line in lines}) == 1


def test_an_evaluation_tells_what_damage_costs(sample, monkeypatch, capsys, tmp_path):
    """Against a plain second evaluation of damaged images, of ours that lie in the repository."""
    monkeypatch.setattr(cifar10, "load_cifar10", lambda *_: sample)
    monkeypatch.setattr(plots, "png", lambda *_: PIXEL)
    two = {
        name: corruptions.CORRUPTIONS[name] for name in ("JPEG, quality 50", "contrast times 0.5")
    }
    monkeypatch.setattr(corruptions, "CORRUPTIONS", two)
    arguments = ["model_2", "--corruptions", "--device", "cpu", "--output-dir", tmp_path]
    status, out, error = call_main(evaluate.main, capsys, arguments)
    assert status == 0, error
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "evaluation.json").read_text())
    assert list(results["corruptions"]) == list(two)
    trained = evaluate.load("model_2", None)
    for name, row in results["corruptions"].items():
        images = corruptions.damaged(sample.test_images, name)
        tensors = torch.stack([trained.transform(image=image)["image"] for image in images])
        with torch.inference_mode():
            right = trained.network(tensors).argmax(dim=1).numpy() == sample.test_labels
        assert row["accuracy"] == pytest.approx(100 * right.mean())
        assert row["lost"] == pytest.approx(results["top1"] - row["accuracy"])
        assert f"{name:<18}  {row['accuracy']:6.2f} %  {row['lost']:6.2f}" in out
    assert (folder / "corruptions.png").read_bytes() == PIXEL


def test_the_picture_shows_every_corruption(sample, tmp_path):
    found = {
        name: {"accuracy": 90.0 - place, "lost": place - 1.01}
        for place, name in enumerate(corruptions.CORRUPTIONS)
    }
    path = tmp_path / "corruptions.png"
    path.write_bytes(corruptions.picture(found, sample.test_images[0], 89.0, r"Net, $\x$"))
    with Image.open(path) as image:
        assert min(image.size) > 600
        said = image.info["Description"]
    assert r"Net, $\x$: 89.00 %" in said  # no formula
    assert "JPEG, quality 90 -1.0, JPEG, quality 75 0.0" in said
    assert said.endswith("The worst is shifted by 3 pixels, with 78.00 % left.")
