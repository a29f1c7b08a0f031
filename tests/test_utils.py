"""Stats, transforms, batches, recipe and loops against second computations of the same thing."""

import dataclasses
import math

import albumentations as A
import numpy as np
import pytest
import torch
from torch import nn

import networks
import recipes
import utils
from model_2 import CNN_Model_2
from support import files, meter, teachers
from tests.conftest import rate_is

FULL = utils.Device(torch.device("cpu"))
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
FILL = (125, 122, 115)  # 255 * MEAN, rounded


# ---------------------------------------------------------------- stats


def test_channel_stats_against_numpy(sample):
    mean, std = utils.channel_stats(sample.train_images)
    pixels = sample.train_images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9)


def test_channel_stats_of_the_sample_are_near_the_known_ones_of_all_of_cifar10(sample):
    mean, std = utils.channel_stats(sample.train_images)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.02)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=0.02)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)],
)
def test_channel_stats_refuses_other_arrays(images):
    with pytest.raises(ValueError, match="uint8 images"):
        utils.channel_stats(images)


# ---------------------------------------------------------------- transforms


def alone(name: str) -> A.Compose:
    """One transform of the training pipeline, by itself, seeded."""
    pipeline = utils.train_transform(MEAN, STD)
    (transform,) = [step for step in pipeline.transforms if type(step).__name__ == name]
    return A.Compose([transform], seed=1)


def test_pipeline_output(sample):
    tensor = utils.train_transform(MEAN, STD)(image=sample.train_images[0])["image"]
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.float32


def test_test_transform_is_normalisation_only(sample):
    image = sample.test_images[0]
    tensor = utils.test_transform(MEAN, STD)(image=image)["image"]
    wanted = (image / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def test_flip_mirrors_half_of_the_images(sample):
    flip, image = alone("HorizontalFlip"), sample.train_images[0]
    outputs = [flip(image=image)["image"] for _ in range(2000)]
    flipped = sum(np.array_equal(output, image[:, ::-1]) for output in outputs)
    untouched = sum(np.array_equal(output, image) for output in outputs)
    assert flipped + untouched == 2000
    assert rate_is(flipped, 2000, 0.5)


def test_hole_is_one_16x16_square_of_the_mean_colour(sample):
    dropout, image = alone("CoarseDropout"), np.full((32, 32, 3), 255, np.uint8)
    corners = []
    for _ in range(2000):
        output = dropout(image=image)["image"]
        changed = (output != 255).all(axis=2)
        if not changed.any():
            continue
        rows, columns = np.nonzero(changed)
        assert changed.sum() == 256
        assert rows.max() - rows.min() == columns.max() - columns.min() == 15
        assert (output[changed] == FILL).all()
        corners.append((rows.min(), columns.min()))
    assert rate_is(len(corners), 2000, 0.5)
    assert np.min(corners, axis=0).tolist() == [0, 0]
    assert np.max(corners, axis=0).tolist() == [16, 16]


def test_affine_stays_in_its_bounds_and_fills_with_the_mean_colour():
    """Red and green hold x and y, so that the map that was drawn can be read off the output."""
    affine = alone("Affine")
    y, x = np.mgrid[0:32, 0:32]
    image = np.stack([8 * x, 8 * y, np.full_like(x, 255)], axis=2).astype(np.uint8)
    angles, scales, shifts, filled = [], [], [], 0
    for _ in range(600):
        output = affine(image=image)["image"]
        if np.array_equal(output, image):
            continue
        inside = output[..., 2] == 255  # elsewhere the fill is mixed in
        filled += ((output == FILL).all(axis=2) & ~inside).sum()
        places = np.stack([x[inside], y[inside], np.ones(inside.sum())], axis=1)
        inverse = np.linalg.lstsq(places, output[inside][:, :2] / 8.0, rcond=None)[0].T
        matrix = np.linalg.inv(inverse[:, :2])
        u, singular, vt = np.linalg.svd(matrix)
        rotation = u @ vt
        angles.append(math.degrees(math.atan2(rotation[1, 0], rotation[0, 0])))
        scales.extend(singular)
        middle = np.array([15.5, 15.5])
        shifts.extend(matrix @ (middle - inverse[:, 2]) - middle)
    assert rate_is(len(angles), 600, 0.5)
    for values, low, high, slack in (
        (angles, -15, 15, 0.3),
        (scales, 0.9, 1.1, 0.005),
        (shifts, -3.2, 3.2, 0.1),
    ):
        assert low - slack <= min(values) <= low + 0.15 * (high - low)
        assert high - 0.15 * (high - low) <= max(values) <= high + slack
    assert filled > 1000


# ---------------------------------------------------------------- batches


def batches(
    images, labels, *, epoch=1, seed=0, workers=0, transform=None, batch_size=64, batched=False
):
    loader = utils.make_loader(
        images,
        labels,
        transform or utils.train_transform(MEAN, STD),
        batch_size,
        FULL,
        shuffle=True,
        seed=seed,
        workers=None if batched else workers,
    )
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(some, others) -> bool:
    return all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_seed_gives_the_same_batches_for_any_number_of_workers(sample, workers):
    images, labels = sample.train_images[:300], sample.train_labels[:300]
    wanted = batches(images, labels)
    assert [len(batch[1]) for batch in wanted] == [64, 64, 64, 64, 44]
    assert wanted[0][0].shape == (64, 3, 32, 32)
    assert wanted[0][1].dtype == torch.int64
    assert equal(wanted, batches(images, labels, workers=workers))


def test_another_seed_or_epoch_gives_other_batches(sample):
    images, labels = sample.train_images[:128], sample.train_labels[:128]
    first = batches(images, labels)
    assert equal(first, batches(images, labels))
    assert not equal(first, batches(images, labels, epoch=2))
    assert not equal(first, batches(images, labels, seed=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_worker_or_epoch_repeats_the_augmentations_of_another(sample, workers):
    """All images the same: a repeated draw shows as a repeated tensor."""
    images = np.repeat(sample.train_images[:1], 256, axis=0)
    labels = np.zeros(256, np.uint8)
    pipeline = utils.train_transform(MEAN, STD)
    for step in pipeline.transforms:
        step.p = 1.0 if type(step).__name__ != "HorizontalFlip" else 0.5
    drawn = [
        image.numpy().tobytes()
        for epoch in (1, 2)
        for batch, _ in batches(
            images, labels, epoch=epoch, workers=workers, transform=pipeline, batch_size=32
        )
        for image in batch
    ]
    assert len(set(drawn)) == len(drawn) == 512


def test_the_steps_are_drawn_apart_for_the_first_image_of_a_batch_too(sample):
    """Batches of one image: each step is applied or not, whatever the others do."""
    images = np.repeat(sample.train_images[:1], 400, axis=0)
    image, white = images[0], (255, 255, 255)
    hole = A.CoarseDropout((1, 1), (32, 32), (32, 32), fill=white, p=0.5)
    steps = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), hole, A.ToTensorV2()]
    drawn = batches(images, np.zeros(400, np.uint8), transform=A.Compose(steps), batch_size=1)
    found = [batch[0].permute(1, 2, 0).numpy() for batch, _ in drawn]
    kinds = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    holes = sum((each == 255).all() for each in found)
    assert rate_is(holes, 400, 0.5)
    for kind in kinds:
        assert rate_is(sum((each == kind).all() for each in found), 400, 0.125)


@pytest.mark.parametrize("batched", [False, True])
def test_an_epoch_holds_every_image_once(sample, batched):
    plain = utils.test_transform(MEAN, STD)
    images, labels = sample.train_images[:100], sample.train_labels[:100]
    got = torch.cat(
        [batch for batch, _ in batches(images, labels, transform=plain, batched=batched)]
    )
    wanted = torch.stack([plain(image=image)["image"] for image in images])
    nearest = torch.cdist(got.flatten(1).double(), wanted.flatten(1).double()).min(dim=1)
    assert nearest.values.max() < 1e-2
    assert sorted(nearest.indices.tolist()) == list(range(100))


def test_both_loaders_give_the_same_images_in_the_same_order(sample):
    plain = utils.test_transform(MEAN, STD)
    images, labels = sample.train_images[:100], sample.train_labels[:100]
    for epoch in (1, 2):
        for (ours, our_labels), (theirs, their_labels) in zip(
            batches(images, labels, epoch=epoch, transform=plain, batched=True),
            batches(images, labels, epoch=epoch, transform=plain),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert torch.equal(our_labels, their_labels)


def test_batched_loader_repeats_an_epoch_and_no_other(sample):
    images, labels = sample.train_images[:128], sample.train_labels[:128]
    first = batches(images, labels, batched=True)
    assert equal(first, batches(images, labels, batched=True))
    assert not equal(first, batches(images, labels, batched=True, epoch=2))
    assert not equal(first, batches(images, labels, batched=True, seed=1))


def test_validation_split_is_a_fixed_partition():
    kept, held_out = utils.validation_split(50_000, 5_000)
    assert len(held_out) == 5_000
    assert sorted([*kept, *held_out]) == list(range(50_000))
    assert np.array_equal(held_out, utils.validation_split(50_000, 5_000)[1])


# ---------------------------------------------------------------- device


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(utils.DeviceError, match=r"this machine has: .*cpu"):
        utils.Device.pick("cuda:77")
    assert utils.Device.pick("cpu").where == torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_cpu_computes_in_bf16_only_where_that_is_faster(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert utils.Device.pick("cpu").dtype == dtype


# ---------------------------------------------------------------- weights


def test_weights_come_back_from_every_kind_of_file(tmp_path):
    model, other = CNN_Model_2(), CNN_Model_2()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    for name in ("weights.pt", "last.pt"):
        files.load_weights(other, tmp_path / name)
        for key, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
        nn.init.zeros_(other.linear.weight)


class Stranger:
    def __reduce__(self):
        return print, ("run!",)


def test_files_that_are_not_these_weights_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pt"
    weights = CNN_Model_2().state_dict()
    torch.save(weights, path)
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(files.CheckpointError, match=message) as caught:
            files.load_weights(CNN_Model_2(), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    torch.save(nn.Linear(2, 2).state_dict(), path)
    refused("conv1.0.weight is missing there")
    torch.save(weights | {"linear.bias": torch.zeros(11)}, path)
    refused(r"linear.bias is \(11,\) there, \(10,\) here")
    torch.save(weights | {"more": torch.zeros(1)}, path)
    refused("more is .* missing here")
    torch.save([1, 2], path)
    refused("it holds a list")
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a whole checkpoint")
    path.write_bytes(b"")
    refused("not a whole checkpoint")
    torch.save({"model": Stranger()}, path)
    refused("not a whole checkpoint")
    assert "run!" not in capsys.readouterr().out
    with pytest.raises(OSError, match="absent"):
        files.load_weights(CNN_Model_2(), tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["model_4", "2", "", "os", "model_../model_2"])
def test_a_pretrained_network_that_there_is_not(name):
    with pytest.raises(ValueError, match=r"or a name out of .* model_1, .*model_2_distilled"):
        networks.load_trained(name)


# ---------------------------------------------------------------- loops


class OneWeight(nn.Module):
    """Logits (w * x, 0), x being the mean of the image: small enough to compute by hand."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.mean(dim=(1, 2, 3))
        return torch.stack([self.weight * x, torch.zeros_like(x)], dim=1)


@pytest.fixture(params=["tf32", "ieee"])
def convolutions(request):
    """What cuDNN takes float32 for, which is the process's own setting: TF32 unless told."""
    kept = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = kept


def test_convolutions_are_evaluated_in_float32_and_not_in_tf32(convolutions):
    """And the setting is as before afterwards, also after an error."""
    seen = []

    class Watching(OneWeight):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            if len(seen) == 4:
                raise ZeroDivisionError
            return super().forward(images)

    utils.evaluate(Watching(1.0), grey_loader(2), FULL)
    assert seen == ["ieee"] * 3  # batches of 2, 2 and 1
    assert torch.backends.cudnn.conv.fp32_precision == convolutions
    with pytest.raises(ZeroDivisionError):
        utils.evaluate(Watching(1.0), grey_loader(2), FULL)
    assert torch.backends.cudnn.conv.fp32_precision == convolutions


LEVELS = [0, 51, 102, 153, 255]  # x = 0, 0.2, 0.4, 0.6, 1
LABELS = [1, 0, 1, 0, 1]


def grey_loader(batch_size: int):
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in LEVELS])
    transform = utils.test_transform((0.0,) * 3, (1.0,) * 3)
    return utils.make_loader(images, np.array(LABELS), transform, batch_size, FULL)


def by_hand(weight: float) -> tuple[float, float, float]:
    """Mean loss, accuracy in percent and mean gradient of OneWeight over the five images."""
    losses, hits, gradients = [], 0, []
    for level, label in zip(LEVELS, LABELS, strict=True):
        x = level / 255
        probability = 1 / (1 + math.exp(-weight * x))  # of class 0
        losses.append(-math.log(probability if label == 0 else 1 - probability))
        gradients.append((probability - (label == 0)) * x)
        hits += (0 if weight * x >= 0 else 1) == label
    return sum(losses) / 5, 100 * hits / 5, sum(gradients) / 5


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_test_loop_against_hand_computation(batch_size, capsys):
    loss, accuracy, _ = by_hand(2.0)
    result = utils.evaluate(OneWeight(2.0), grey_loader(batch_size), FULL)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.labels.tolist() == LABELS
    assert result.logits[:, 0].tolist() == pytest.approx([0, 0.4, 0.8, 1.2, 2.0], rel=1e-6)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")  # no terminal, no progress bar


def train_once(model, loader, lr, device=FULL, criterion=None, clip_norm=0.0, teacher=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=device.dtype == torch.float16)
    criterion = criterion or nn.CrossEntropyLoss()
    return utils.train(
        model, loader, criterion, optimizer, scheduler, scaler, device, clip_norm, teacher
    )


def test_train_loop_against_hand_computation():
    model = OneWeight(2.0)
    loss, accuracy, gradient = by_hand(2.0)
    result = train_once(model, grey_loader(5), lr=0.5)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == pytest.approx(accuracy)
    assert model.weight.item() == pytest.approx(2.0 - 0.5 * gradient, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # with a gradient scaler
def test_long_gradients_are_clipped_and_short_ones_left(dtype):
    _, _, gradient = by_hand(2.0)
    device = dataclasses.replace(FULL, dtype=dtype)
    for longest, wanted in ((abs(gradient) / 3, gradient / 3), (abs(gradient) * 3, gradient)):
        model = OneWeight(2.0)
        train_once(model, grey_loader(5), lr=0.5, device=device, clip_norm=longest)
        assert model.weight.item() == pytest.approx(2.0 - 0.5 * wanted, abs=2e-3)
        assert abs(model.weight.item() - (2.0 - 0.5 * wanted)) < abs(gradient) / 20


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teacher_s_answers_are_mixed_with_the_labels(share, temperature):
    """The gradient of the cross-entropy is (probability - target) * x for class 0."""
    teacher, t = OneWeight(-3.0), temperature
    losses, gradients = [], []
    for level, label in zip(LEVELS, LABELS, strict=True):
        x = level / 255
        probability = 1 / (1 + math.exp(-2.0 * x))
        loss = -math.log(probability if label == 0 else 1 - probability)
        soft, answer = (1 / (1 + math.exp(-weight * x / t)) for weight in (2.0, -3.0))
        taught = -answer * math.log(soft) - (1 - answer) * math.log(1 - soft)
        losses.append((1 - share) * loss + share * t**2 * taught)
        gradients.append((1 - share) * (probability - (label == 0)) * x)
        gradients[-1] += share * t * (soft - answer) * x
    model = OneWeight(2.0)
    asked = teachers.Teacher(teacher, FULL, 0)
    mixed = teachers.Distillation(nn.CrossEntropyLoss(), share, temperature)
    result = train_once(model, grey_loader(5), lr=0.5, criterion=mixed, teacher=asked)
    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert result.accuracy == by_hand(2.0)[1]  # on the labels, whatever the teacher says
    assert model.weight.item() == pytest.approx(2.0 - 0.5 * sum(gradients) / 5, rel=1e-6)
    assert teacher.weight.grad is None


def test_train_loop_weights_unequal_batches_by_their_images():
    result = train_once(OneWeight(2.0), grey_loader(3), lr=0.0)
    loss, accuracy, _ = by_hand(2.0)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_train_loop_in_reduced_precision_takes_nearly_the_same_step(dtype):
    model = OneWeight(2.0)
    device = utils.Device(torch.device("cpu"), dtype, torch.channels_last)
    train_once(model, grey_loader(5), 0.5, device)
    assert model.weight.item() == pytest.approx(2.0 - 0.5 * by_hand(2.0)[2], rel=0.02)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_both_loops(weight):
    with pytest.raises(meter.DivergedError, match="try a lower learning rate"):
        train_once(OneWeight(weight), grey_loader(2), lr=0.1)
    with pytest.raises(meter.DivergedError, match="the loss became"):
        utils.evaluate(OneWeight(weight), grey_loader(2), FULL)


def test_loops_set_the_mode_and_testing_leaves_batchnorm_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 2))
    loader = grey_loader(5)
    train_once(model, loader, lr=0.0)
    assert model.training
    before = model[1].running_mean.clone()
    assert before.abs().sum() > 0
    utils.evaluate(model, loader, FULL)
    assert not model.training
    assert torch.equal(model[1].running_mean, before)


def test_training_learns_the_sample(sample):
    """200 images by heart: the loop, the optimizer and the schedule work together."""
    images, labels = sample.train_images[:200], sample.train_labels[:200]
    mean, std = utils.channel_stats(images)
    loader = utils.make_loader(
        images,
        labels,
        utils.test_transform(mean, std),
        50,
        FULL,
        shuffle=True,
    )
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(3600, 10),
    )  # fmt: skip
    recipe = recipes.Recipe("sgd", 0.02, 5e-4, "onecycle", 256, 85.0, 60)
    optimizer = recipes.make_optimizer(model, recipe)
    scheduler = recipes.make_scheduler(optimizer, recipe, 15 * len(loader))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for epoch in range(15):
        loader.sampler.set_epoch(epoch)
        utils.train(model, loader, nn.CrossEntropyLoss(), optimizer, scheduler, scaler, FULL)
    assert utils.evaluate(model, loader, FULL).accuracy > 95
