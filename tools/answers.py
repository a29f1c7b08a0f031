"""A teacher's answers to a few augmented epochs, stored once, so that students train at full speed.

    python -m tools.answers output/reference/model_1 --model 2 --epochs 70 --views 20
    python -m tools.answers RUN1 RUN2 --model 3 --epochs 75    # the mean of two teachers' answers
    python train.py --model 2 --epochs 70 --set teacher=output/answers/FOLDER

Distilling asks the teacher about every augmented image of every epoch, which for a large one takes
longer than the student's own training. Here it is asked about --views epochs, with the flags that
the student will be trained with, which then goes through their very batches again and again,
whatever its seed, as Faghri et al. (2023, https://arxiv.org/abs/2303.08983) do at a larger scale.
The same command goes on where it was stopped, or with more --views adds some, which count once all
are there; the folder in output/answers is named after the student's file and all that the answers
depend on.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch

import cli
import networks
import utils
from parallel import ALONE
from support import flags, provenance, teachers, workers
from support.files import HERE, CheckpointError, write_file
from support.meter import progress
from support.settings import InUseError


def load_teachers(
    names: Sequence[str],
    student: Path,
    held_out: int | None,
    device: utils.Device,
    dry_run: bool,
) -> tuple[list[teachers.Teacher], dict]:
    """The networks that answer, and what is told of them.

    Raises:
        cli.UsageError: no such network, or one that knows other images than the student will.
    """
    found, about = [], {"network": [], "weights_sha256": []}
    for name in names:
        folder = flags.teacher_path(name, name, HERE / name)
        teacher, told = networks.load_teacher(folder, student, held_out, device, dry_run)
        if isinstance(teacher, teachers.Replay):
            raise cli.UsageError(f"{name} holds answers; give the run of the network itself")
        found.append(teacher)
        for key, values in about.items():
            values.append(told[key])
    about = {key: " and ".join(values) for key, values in about.items()}
    return found, about | {"seed": teachers.batch_seed(about["weights_sha256"])}


@torch.no_grad()
def answer(
    loader: utils.Loader, asked: Sequence[teachers.Teacher], device: utils.Device, title: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One view: the mean of the teachers' probabilities for each image.

    Returns:
        Log-probabilities float32 (images, classes) in the order of the data set, the first batch's
        fingerprint, and the share of right answers in percent.
    """
    answers, first, right = None, None, 0
    batches = loader.sampler.draw()[0]
    for index, (images, labels) in zip(batches, progress(loader, title), strict=True):
        images, labels = device.take(images, labels)
        found = torch.stack([teacher(images, labels).answers for teacher in asked])
        mean = (found.logsumexp(dim=0) - math.log(len(asked))).cpu()
        if answers is None:
            answers = torch.empty(loader.sampler.size, mean.shape[1])
            first = teachers.fingerprint(images)
        answers[torch.from_numpy(index)] = mean
        right += (mean.argmax(dim=1) == labels.cpu()).sum().item()
    if not answers.half().isfinite().all():
        raise cli.UsageError("the teacher's answers are no numbers; its training went astray")
    return answers, first, 100 * right / len(answers)


def answered(file: Path, loader: utils.Loader, device: utils.Device) -> bool:
    """Whether the view that the loader is about to draw lies in the file; says so if it is bad.

    Raises:
        cli.UsageError: whole answers to other images, which runs may have begun with.
    """
    if not file.is_file():
        return False
    try:
        answers, first = teachers.read_view(file)
    except CheckpointError as error:
        print(f"{error}; it is asked for anew")
        return False
    images, _ = device.take(*next(iter(loader)))
    if len(answers) == loader.sampler.size and teachers.same(first, teachers.fingerprint(images)):
        return True
    raise cli.UsageError(
        f"{file} answers for other images than this machine or version draws; it is kept, so give "
        "another --output-dir, or remove it and ask again"
    )


def work(args: argparse.Namespace) -> None:
    """Asks the teachers about every view that is not stored yet."""
    if args.resume is not None:
        raise cli.UsageError("--resume is for train.py; the same command goes on here")
    if args.model is None or args.epochs is None:
        raise cli.UsageError("give --model and --epochs, those of the student")
    network = networks.load_network(args.model)
    recipe = flags.recipe_of(args, network)
    if recipe.teacher:
        raise cli.UsageError(
            f"the recipe has the teacher {recipe.teacher:.60}, which is for train.py; here its run "
            "is named without a flag, so add --set teacher="
        )
    device = network.fitting(utils.Device.pick(args.device))
    known = network.file, args.val_split, device, args.dry_run
    asked, about = load_teachers(args.teachers, *known)
    data = cli.load_data(args)
    images, labels = data.train_images, data.train_labels
    if args.val_split is not None:
        kept, _ = utils.validation_split(len(images), args.val_split)
        images, labels = images[kept], labels[kept]
    recipe = recipe.fitted(len(images), shrink=flags.batch_may_shrink(args))
    augment = recipe.train_transform(*utils.channel_stats(images), args.epochs)
    num_workers, how = workers.choose(augment, args.loader, args.workers)
    now = teachers.circumstances(data, args.val_split, augment, recipe, num_workers, device)
    about["circumstances"] = now

    text = json.dumps(about, sort_keys=True)
    name = f"{network.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    folder = Path(args.output_dir) / "answers" / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InUseError(f"{folder} is in use: another process makes these answers") from None
    with lock:
        there, before = folder / teachers.NAME, 0
        if there.is_file():
            before = teachers.read_about(folder)["views"]
        views = max(args.views, before)
        about |= {"command": provenance.command(), "views": views}
        # Others are added to whole views: those stay usable until all of them are there.
        whole = before and all(teachers.view_file(folder, n + 1).is_file() for n in range(before))
        if views > before and not whole:
            write_file(there, json.dumps(about, indent=2) + "\n")
        print(f"Teacher: {about['network']}\nDevice: {device}, {device.dtype}, {how}")
        print(f"Output: {folder}", flush=True)
        if views > args.views:
            print(f"They were begun with --views {views}, so they get as many")
        options = {"shuffle": True, "seed": about["seed"], "workers": num_workers, "team": ALONE}
        loader = utils.make_loader(images, labels, augment, recipe.batch_size, device, **options)
        for view in range(1, views + 1):
            title, file = f"View {view} of {views}", teachers.view_file(folder, view)
            start = time.perf_counter()
            utils.seed_everything(about["seed"], view)
            loader.sampler.set_epoch(view)
            if answered(file, loader, device):
                print(f"{title}: is there")
                continue
            utils.seed_everything(about["seed"], view)
            answers, first, right = answer(loader, asked, device, title)
            teachers.write_view(folder, view, answers, first)
            seconds = time.perf_counter() - start
            print(f"{title}: {right:.2f} % of the answers are right, {seconds:.1f} s", flush=True)
        if views > before and whole:
            write_file(there, json.dumps(about, indent=2) + "\n")
    print(f"Learn from them with: --set {shlex.quote(f'teacher={folder}')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = flags.parser()
    parser.prog, parser.description = "tools.answers", __doc__.splitlines()[0]
    parser.epilog = "It takes the student's flags; --seed and --no-test change no answers."
    add = parser.add_argument
    add("teachers", nargs="+", metavar="RUN", help="a run's folder, or a name of output/reference")
    views = cli.whole_number(1, teachers.MOST_VIEWS)
    add("--views", type=views, default=20, help="augmented epochs that are answered (20)")
    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
