"""Distillation: a teacher's answers beside the labels, asked for at every step or replayed.

    teacher, about = networks.load_teacher(recipe.teacher, ...)  # a Teacher, a Replay, None
    teacher.attend(loader.sampler, circumstances(...))          # the batches that it answers
    lesson = teacher.begin(loader.sampler)(images, labels)      # once an epoch; once a batch
    loss = make_criterion(recipe)(logits, lesson)

A Replay reads what `python -m tools.answers` has stored of a few augmented epochs, and goes through
the very same batches again and again: a student then trains as fast as without a teacher.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

import cifar10
from errors import UsageError
from fast.batched import A
from parallel import ALONE, Team
from recipes import Recipe
from support.files import CheckpointError, read_checkpoint, read_json, write_file
from support.settings import validated
from utils import BatchSampler, Device

NAME = "answers.json"  # in a folder of answers
MOST_VIEWS = 9999
# Of fingerprints, in standard deviations of pixels: what another machine rounds differently stays
# far below, what another version draws differently far above.
TOLERANCE = 0.02


def batch_seed(weights: str) -> int:
    """Of batches that a network was not trained on, from its weights' SHA-256 (or several).

    It remembers the very crops and flips it has seen (a ResNet was right on 96 % of the images of
    its first epoch, on 99.2 % of those of its 13th of 16), and what it takes those for tells little
    more than their labels. No --seed is as large, and none could be made of weights to come.
    """
    return 2**32 + int(hashlib.sha256(weights.encode()).hexdigest()[:12], 16)


class Lesson(NamedTuple):
    """Labels int64 (N,), and a teacher's log-probabilities float32 (N, classes)."""

    labels: Tensor
    answers: Tensor


class Distillation(nn.Module):
    """The loss of Hinton et al. (2015, https://arxiv.org/abs/1503.02531), of logits and a Lesson.

    (1 - weight) criterion(logits, labels) + weight T^2 H(answers^(1/T), softmax(logits / T)), with
    H the cross-entropy and the first distribution made to sum to 1; T^2 keeps the size of the
    gradients.

    Args:
        criterion: (logits float32 (N, classes), labels) to the mean loss.
        weight: of the teacher's answers, from 0 to 1.
        temperature: T.
    """

    def __init__(self, criterion: nn.Module, weight: float, temperature: float = 1.0) -> None:
        super().__init__()
        self.criterion, self.weight, self.temperature = criterion, weight, temperature

    def forward(self, logits: Tensor, lesson: Lesson) -> Tensor:
        t = self.temperature
        taught = t * t * F.cross_entropy(logits / t, (lesson.answers / t).softmax(dim=1))
        return torch.lerp(self.criterion(logits, lesson.labels), taught, self.weight)


def make_criterion(recipe: Recipe) -> nn.Module:
    """(logits float32 (N, classes), labels or a Lesson, as the recipe is) to the mean loss."""
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if not recipe.teacher:
        return criterion
    return Distillation(criterion, recipe.teacher_weight, recipe.teacher_temperature)


class Teacher:
    """A trained network that is asked anew for every augmented image.

    As Beyer et al. (2022, https://arxiv.org/abs/2106.05237) found best: it sees the student's view.

    Args:
        network: in eval mode, on the device of the training.
        device: with the layout that the network takes.
        seed: batch_seed of its weights.
    """

    def __init__(self, network: nn.Module, device: Device, seed: int) -> None:
        self.network, self.device, self.seed = network, device, seed

    def attend(self, sampler: BatchSampler, now: dict) -> None:
        """Lets the sampler draw batches that the teacher was not trained on."""
        sampler.seed += self.seed

    def begin(self, sampler: BatchSampler) -> "Teacher":
        """What answers an epoch's batches."""
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Lesson:
        with self.device.autocast():
            logits = self.network(images.to(memory_format=self.device.layout))
        return Lesson(labels, logits.float().log_softmax(dim=1))


# ---------------------------------------------------------------- stored answers


def circumstances(
    data: cifar10.CIFAR10,
    held_out: int | None,
    transform: A.Compose,
    recipe: Recipe,
    workers: int | None,
    device: Device,
    team: Team = ALONE,
) -> dict:
    """All that the batches of an epoch follow from, but for its number, as JSON holds it.

    Albumentations' loader draws for each of a team's processes anew, the batched one on the device,
    where a GPU draws other numbers than a CPU.
    """
    batched = workers is None
    about = {
        "data_sha256": cifar10.digests(data),
        "val_split": held_out,
        "train_transform": transform.to_dict(),
        "batch_size": recipe.batch_size,
        "loader": "batched" if batched else "albumentations",
        "device": device.where.type if batched else "any",
        "processes": "any" if batched else team.size,
    }
    return json.loads(json.dumps(about))


def fingerprint(images: Tensor) -> Tensor:
    """The mean colour of each image's left half, float32 (N, 3), of images (N, 3, H, W)."""
    return images[..., : images.shape[3] // 2].float().mean(dim=(2, 3)).cpu()


def same(then: Tensor, now: Tensor) -> bool:
    """Whether two fingerprints are of the same images."""
    return then.shape == now.shape and bool((now - then).abs().max() <= TOLERANCE)


class About(BaseModel, strict=True):
    """What answers.json holds."""

    network: str
    weights_sha256: str
    seed: PositiveInt
    views: int = Field(ge=1, le=MOST_VIEWS)
    circumstances: dict
    command: str = ""  # which asked for them; older versions did not note it


def view_file(folder: Path, view: int) -> Path:
    """Where the answers of a view lie, counted from 1."""
    return folder / f"view_{view:04}.pt"


def write_view(folder: Path, view: int, answers: Tensor, first: Tensor) -> None:
    """Stores log-probabilities (images, classes), and the fingerprint of the first batch."""
    buffer = io.BytesIO()
    torch.save({"answers": answers.half(), "first": first}, buffer)
    write_file(view_file(folder, view), buffer.getvalue())


def read_view(path: Path) -> tuple[Tensor, Tensor]:
    """Log-probabilities float16 (images, classes), and the fingerprint of the first batch.

    Raises:
        CheckpointError: they are damaged, or something else.
        OSError: they cannot be read.
    """
    stored = read_checkpoint(path)
    found = [stored.get(name) for name in ("answers", "first")]
    wanted = (torch.float16, len(cifar10.CLASSES)), (torch.float32, 3)
    for each, (dtype, columns) in zip(found, wanted, strict=True):
        if not (
            isinstance(each, Tensor)
            and each.layout == torch.strided
            and each.device.type == "cpu"
            and each.is_contiguous()
            and not each.requires_grad
            and each.dtype == dtype
            and each.ndim == 2
            and each.shape[1] == columns
            and each.isfinite().all()
        ):
            raise CheckpointError(f"{path} does not hold a teacher's answers")
    if (found[0] > 0).any():
        raise CheckpointError(f"{path} does not hold a teacher's answers: no log-probabilities")
    return tuple(found)


def read_about(folder: Path) -> dict:
    """What answers.json holds, as About has it.

    Raises:
        UsageError: an older version wrote it.
        RunError: it is damaged.
    """
    about = read_json(folder / NAME)
    if "views" in about and "seed" not in about:
        raise UsageError(
            f"the answers in {folder} are an older version's, maybe to the very images that the "
            "teacher was trained on; ask anew with tools.answers"
        )
    return validated(folder / NAME, about, About)


class Replay:
    """A teacher whose answers to a few augmented epochs were stored; they are gone through in turn.

    All are read at once (1 MB a view of 50,000 images), so that no epoch finds them damaged.

    Args:
        folder: as tools.answers has written it.
        began: what a run that goes on was told by `describe`; it keeps to the views of then, though
            there may be more by now.

    Raises:
        UsageError: it is not finished, or damaged.
        CheckpointError: a view is damaged.
    """

    def __init__(self, folder: Path, began: dict | None = None) -> None:
        self.folder = folder
        self.about = read_about(folder)
        views, before = self.about["views"], (began or {}).get("views")
        if before in map(str, range(1, views)):
            views = int(before)
        files = [view_file(folder, view + 1) for view in range(views)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UsageError(
                f"{folder} does not hold all answers: {missing[0]} is not there; the command of "
                "tools.answers that began it goes on"
            )
        try:
            self.views = [read_view(path) for path in files]
        except CheckpointError as error:
            again = "the command of tools.answers that began them asks for it anew"
            raise CheckpointError(f"{error}; {again}") from None

    def describe(self) -> dict[str, str]:
        """What settings.json says of it."""
        digest = hashlib.sha256()
        for answers, _ in self.views:
            digest.update(answers.numpy().tobytes())
        of = {key: self.about[key] for key in ("network", "weights_sha256")}
        return of | {"views": str(len(self.views)), "answers_sha256": digest.hexdigest()}

    def attend(self, sampler: BatchSampler, now: dict) -> None:
        """Lets the sampler draw the batches that were answered, instead of the run's own.

        Args:
            now: the circumstances of this run.

        Raises:
            UsageError: they are others than those of the answers.
        """
        then, command = self.about["circumstances"], self.about.get("command", "")
        asked = f"train as they were asked for{command and f' ({command:.200})'}, or ask anew with "
        asked += "tools.answers and the flags of this run"
        for key, value in now.items():
            if then.get(key) != value:
                said = ""
                if not isinstance(value, dict):
                    said = f" ({then.get(key)!r:.60} then, {value!r:.60} now)"
                raise UsageError(
                    f"the answers in {self.folder} were given to other batches: their {key} was "
                    f"another{said}; {'train in one process' if key == 'processes' else asked}"
                )
        if any(len(answers) != sampler.size for answers, _ in self.views):
            raise UsageError(f"{self.folder} is damaged: it has not an answer for each image")
        sampler.seed, sampler.views = self.about["seed"], len(self.views)

    def begin(self, sampler: BatchSampler) -> Callable[[Tensor, Tensor], Lesson]:
        """What answers this process's parts of the epoch's batches, one after the other."""
        answers, first = self.views[sampler.epoch - 1]
        parts = [part for part, _ in sampler.shares()]
        batches = zip(sampler.draw()[0], parts, strict=True)
        mine = (torch.from_numpy(batch[part]) for batch, part in batches)
        unseen = [first[parts[0]]]

        def answer(images: Tensor, labels: Tensor) -> Lesson:
            if unseen and not same(unseen.pop(), fingerprint(images)):
                raise UsageError(
                    f"the answers in {self.folder} are to other images than these, which this "
                    "machine or version draws differently; ask anew with tools.answers, and "
                    "another --output-dir"
                )
            return Lesson(labels, answers[next(mine)].to(labels.device, torch.float32))

        return answer
