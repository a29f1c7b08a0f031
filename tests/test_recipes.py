"""Recipes, optimizers and schedules against second computations of the same thing."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import cli
import recipes
import utils
from model_3 import CNN_Model_3
from support import model_files

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

GOOD = {
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "schedule": "onecycle",
    "batch_size": 256,
    "target_accuracy": 85.0,
    "target_epochs": 60,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adagrad"}, "optimizer is .adagrad.: Input should be 'muon', 'sgd' or"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"other_lr": 0}, "other_lr is 0"),
        ({"muon_momentum": 1}, "muon_momentum is 1"),
        ({"augment": 1.1}, "augment is 1.1: Input should be less than or equal to 1"),
        ({"clip_norm": -1}, "clip_norm is -1"),
        ({"div_factor": 0.5}, "div_factor is 0.5: Input should be greater than or equal to 1"),
        ({"final_lr": -1}, "final_lr is -1"),
        ({"nesterov": 1}, "nesterov is 1: Input should be a valid boolean"),
        ({"transform": "blur"}, "transform is 'blur': Input should be 'standard', 'crop"),
        ({"dropout": -1}, "dropout is -1"),
        ({"augment_epochs": 0}, "augment_epochs is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"teacher": None}, "teacher is None: Input should be a valid string"),
        ({"teacher_weight": 0}, "teacher_weight is 0: Input should be greater than 0"),
        ({"teacher_temperature": 0.09}, "teacher_temperature is 0.09: Input should be greater"),
        ({"teacher_temperature": 101}, "teacher_temperature is 101: Input should be less than"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"target_accuracy": 101}, "target_accuracy is 101"),
        ({"learning_rate": 0.1}, "learning_rate is unknown; known are optimizer, lr, "),
    ],
)
def test_a_bad_recipe_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        recipes.Recipe.read(GOOD | change)


def test_a_recipe_without_a_key_is_refused():
    with pytest.raises(ValueError, match="lr is missing"):
        recipes.Recipe.read({key: value for key, value in GOOD.items() if key != "lr"})


def test_augmentation_grows_with_the_root_of_the_epochs_up_to_its_full_strength():
    recipe = recipes.Recipe.read(GOOD | {"augment": 0.4, "augment_epochs": 64})
    for epochs, wanted in ((1, 0.05), (4, 0.1), (16, 0.2), (64, 0.4), (100, 0.4)):
        assert recipe.augmentation(epochs) == pytest.approx(wanted)
    constant = recipes.Recipe.read(GOOD | {"augment": 0.4})
    assert constant.augmentation(1) == constant.augmentation(100) == 0.4


def test_dropout_is_scaled_wherever_it_is():
    model = CNN_Model_3()
    model_files.scale_dropout(model, 0.5)
    probabilities = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert probabilities == [0.05, 0.075, 0.075, 0.075, 0.1, 0.1, 0.1]
    with pytest.raises(ValueError, match="dropout 10 makes a probability of 1"):
        model_files.scale_dropout(model, 10)


def test_the_augmentation_s_probability_is_affine_s_and_coarse_dropout_s():
    flip, affine, hole, *_ = utils.train_transform(MEAN, STD, 0.2).transforms
    assert (flip.p, affine.p, hole.p) == (0.5, 0.2, 0.2)


def test_muon_s_rates_are_the_recipe_s_and_follow_one_schedule():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    recipe = recipes.Recipe.read(GOOD | {"optimizer": "muon", "lr": 0.04, "other_lr": 0.08})
    optimizer = recipes.make_optimizer(model, recipe)
    scheduler = recipes.make_scheduler(optimizer, recipe, 100)
    peaks = [0.0] * 3
    for _ in range(100):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] == rates[2] == pytest.approx(2 * rates[0])
        peaks = [max(pair) for pair in zip(peaks, rates, strict=True)]
        optimizer.step()  # no gradients: nothing moves
        scheduler.step()
    assert peaks == pytest.approx([0.04, 0.08, 0.08], rel=0.05)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 5e-4, 0.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_for_weights_only(optimizer):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    recipe = recipes.Recipe.read(GOOD | {"optimizer": optimizer})
    decay, spared = recipes.make_optimizer(model, recipe).param_groups
    assert (decay["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    assert {id(p) for p in decay["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert len(spared["params"]) == 4


def rates(schedule: str, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    recipe = recipes.Recipe.read(GOOD | {"schedule": schedule})
    scheduler = recipes.make_scheduler(optimizer, recipe, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*used, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 3920])
def test_onecycle_goes_up_and_then_down_to_zero(steps):
    values = rates("onecycle", steps)
    assert all(0 <= value <= 0.1 for value in values)
    assert values[-1] == pytest.approx(0, abs=1e-5)
    if steps == 3920:
        peak = int(np.argmax(values))
        assert values[peak] == pytest.approx(0.1, rel=1e-3)
        assert peak == pytest.approx(0.3 * steps, abs=1)
        np.testing.assert_allclose(np.diff(values[:peak], 2), 0, atol=1e-9)  # straight lines
        np.testing.assert_allclose(np.diff(values[peak + 1 :], 2), 0, atol=1e-9)


@pytest.mark.parametrize("warmup", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9])
def test_onecycle_of_any_length(warmup):
    """Runs so short that the way up would be no step at all, in which OneCycleLR divides by it."""
    recipe = recipes.Recipe.read(GOOD | {"warmup": warmup})
    for steps in range(1, 60):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = recipes.make_scheduler(optimizer, recipe, steps)
        for _ in range(steps):
            assert 0 <= optimizer.param_groups[0]["lr"] <= 0.1 + 1e-9
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-5)


def test_cosine_follows_its_formula():
    wanted = [0.05 * (1 + math.cos(math.pi * step / 40)) for step in range(41)]
    np.testing.assert_allclose(rates("cosine", 40), wanted, atol=1e-9)


def test_cosine_ends_where_the_recipe_says_and_onecycle_begins_there():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    recipe = recipes.Recipe.read(GOOD | {"schedule": "cosine", "final_lr": 0.02})
    scheduler = recipes.make_scheduler(optimizer, recipe, 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    recipe = recipes.Recipe.read(GOOD | {"div_factor": 10.0})
    recipes.make_scheduler(optimizer, recipe, 10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_nesterov_s_or_not(nesterov):
    recipe = recipes.Recipe.read(GOOD | {"nesterov": nesterov})
    optimizer = recipes.make_optimizer(nn.Linear(3, 2), recipe)
    assert all(group["nesterov"] == nesterov for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("standard", ["HorizontalFlip", "Affine", "CoarseDropout"]),
        ("crop_cutout", ["PadIfNeeded", "RandomCrop", "HorizontalFlip", "CoarseDropout"]),
        (
            "crop_affine_jitter",
            [
                "HorizontalFlip",
                "Affine",
                "CoarseDropout",
                "ColorJitter",
                "PadIfNeeded",
                "RandomCrop",
            ],
        ),
    ],
)
def test_a_recipe_names_its_transform(name, steps, sample):
    recipe = recipes.Recipe.read(GOOD | {"transform": name, "augment": 0.4, "augment_epochs": 64})
    pipeline = recipe.train_transform(MEAN, STD, 16)
    found = [type(step).__name__ for step in pipeline.transforms]
    assert found == [*steps, "Normalize", "ToTensorV2"]
    hole = next(step for step in pipeline.transforms if type(step).__name__ == "CoarseDropout")
    assert hole.p == pytest.approx(0.2)
    assert pipeline(image=sample.train_images[0])["image"].shape == (3, 32, 32)


def test_a_wrong_answer_is_explained_and_asked_for_again(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("none\n7\n"))
    assert cli.ask("How many?", "20", cli.parse_epochs) == 7
    assert "\n  'none' is not a whole number from 1 to 10000\n" in capsys.readouterr().out
