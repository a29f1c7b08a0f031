"""Train a small CNN on CIFAR-10: the door of this repository, and one run from top to bottom.

    python train.py                              # asks which model and how many epochs
    python train.py --model 2 --epochs 20        # asks nothing
    python train.py --model my_net.py            # your own file: one network class and a RECIPE
    python train.py --model 2 --dry-run          # all of it in seconds, on data/sample
    python train.py --resume                     # goes on with the newest run that was cut off

Everything a run writes lands in a folder of its own, output/YYYYMMDD-HHMMSS-model_2/.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the slow imports below ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import cifar10
import cli
import networks
import parallel
import plots
import recipes
import reports
import runs
import utils
from support import flags, model_files, provenance, teachers, workers
from support import settings as run_settings
from support.files import stored_path
from support.history import History


def train(args: argparse.Namespace, arguments: Sequence[str] | None, team: parallel.Team) -> None:
    """One run; under torchrun each process of the team goes through it, and the first one writes.

    Raises:
        UsageError, cifar10.DataError, OSError: nothing could be trained or written.
        DivergedError, KeyboardInterrupt: stopped; the finished epochs are reported first.
    """
    # 1. What is trained, and how: from the flags, the run that is resumed, or the user's answers.
    folder, before = None, {}
    if again := team.once(parallel.remembered, runs.Run.SETTINGS):  # torchrun restarted us
        if runs.is_finished(again):
            return
        args.resume = str(again)
    if args.resume is not None:
        folder, before = team.once(runs.unfinished, args.resume, args.output_dir)
        args = flags.resumed(folder, before.get("arguments"), arguments)
        network = networks.load_network(model_files.of_run(folder, before, args.model))
    else:
        args.model, args.epochs = team.once(flags.choose, args)
        network = networks.load_network(args.model)
    recipe = flags.recipe_of(args, network)
    device = network.fitting(utils.Device.pick(args.device))

    # 2. The images: split, stats, transforms, loaders.
    data = team.once_a_machine(cli.load_data, args)
    images, labels = data.train_images, data.train_labels
    test_set = reported = ("test", data.test_images, data.test_labels)
    if args.val_split is not None:
        kept, out = utils.validation_split(len(images), args.val_split)
        reported = ("val", images[out], labels[out])
        images, labels = images[kept], labels[kept]
    recipe = recipe.fitted(len(images), shrink=flags.batch_may_shrink(args))
    mean, std = utils.channel_stats(images)
    augment = recipe.train_transform(mean, std, args.epochs)
    plain = utils.test_transform(mean, std)
    # None: whole batches are augmented on the device; a number: image by image in worker processes.
    num_workers, how = workers.choose(augment, args.loader, args.workers)
    options = {"shuffle": True, "seed": args.seed, "workers": num_workers, "team": team}
    loader = utils.make_loader(images, labels, augment, recipe.batch_size, device, **options)

    # 3. The model, and what moves it: teacher, criterion, optimizer, schedule.
    known = network.file, args.val_split, device, args.dry_run
    teacher, taught_by = networks.load_teacher(recipe.teacher, *known, before.get("teacher"))
    if teacher is not None:  # stored answers belong to their batches: the sampler gets their seed
        here = data, args.val_split, augment, recipe, num_workers, device, team
        teacher.attend(loader.sampler, teachers.circumstances(*here))
    utils.seed_everything(args.seed)
    model = network.build()
    summary = model_files.summary_table(model)
    model = networks.prepare(model, device, recipe)
    criterion = teachers.make_criterion(recipe)
    optimizer = recipes.make_optimizer(model, recipe, device.dtype)
    scheduler = recipes.make_scheduler(optimizer, recipe, args.epochs * len(loader))
    # fp16's small gradients would vanish; bf16's do not, and a disabled scaler does nothing.
    scaler = torch.amp.GradScaler(device.where.type, enabled=device.dtype == torch.float16)
    torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape
    ours = network.file.parent in model_files.OUR_FOLDERS  # others the user has to name himself
    wrapped_model = team.wrap(model, device.where, uses_all=ours)

    def evaluate(split: str, images: np.ndarray, labels: np.ndarray) -> utils.Evaluation:
        turns = team.turns(len(images), utils.TEST_BATCH)
        images, labels = images[turns], labels[turns]
        loader = utils.make_loader(images, labels, plain, utils.TEST_BATCH, device.exact)
        return utils.evaluate(model, loader, device, split, team)

    # 4. The folder: a new one, or the one to go on with.
    history = History(reported[0], args.epochs, recipe.target_accuracy, recipe.target_epochs)
    about = {"network": network.build.__name__, "recipe": asdict(recipe), "seed": args.seed}
    about |= {"mean": mean, "std": std}
    state = runs.State(model, optimizer, scheduler, scaler, history, len(loader), about)
    settings = about | {
        "model_file": stored_path(network.file),
        "model_sha256": network.digest,
        "parameters": network.parameters,
        "epochs": args.epochs,
        "recipe_name": args.recipe,
        "teacher": taught_by,
        "augmentation": recipe.augmentation(args.epochs),
        "loader": "batched" if num_workers is None else "albumentations",
        "workers": num_workers or 0,
        "val_split": args.val_split,
        "dry_run": args.dry_run,
        "device": str(device),
        "processes": team.size,
        "precision": str(device.dtype),
        "memory_format": str(device.layout),
        "train_transform": augment.to_dict(),
        "data_sha256": cifar10.digests(data),
        "arguments": flags.to_store(args),
    }
    if folder is not None:
        run_settings.refuse_changes(folder, before, settings)
    with runs.begin(folder, args.output_dir, network.name, team) as run:
        parallel.remember(run.folder)
        named = [] if ours else ["--model", str(network.file)]
        run.resume_command = shlex.join(["python", "train.py", "--resume", str(run.folder), *named])
        if folder is None:
            run.write("summary.txt", summary)
            run.write("augmentations.png", plots.augmentations(images, labels, augment, mean, std))
            # Last, since it makes the folder a run's.
            run.write_json("settings.json", settings | provenance.environment())
            run.log(f"Network: {network.build.__name__}, {network.parameters:,} parameters")
            run.log(f"Device: {device}, {device.dtype}, {device.layout}")
            if network.only_contiguous:
                run.log(f"Layout: contiguous, since channels_last fails: {network.only_contiguous}")
            run.log(f"Training: {args.epochs} x {len(images):,} images, seed {args.seed}, {how}")
            run.log(f"Recipe ({args.recipe}), where it differs from plain defaults:")
            for key, value in flags.differences(recipe).items():
                run.log(f"  {key:<16}{value}")
            run.log(f"Output: {run.folder}")
        elif state.restore(run, team):
            run.log(f"Resumed after epoch {len(history.rows)}, on {device}")
        else:
            run.log("Resumed from the start: no epoch had been finished")

        # 5. The epochs; an interruption goes back to the last whole one.
        evaluation = stopped = None
        try:
            for epoch in range(len(history.rows) + 1, args.epochs + 1):
                utils.seed_everything(args.seed, epoch, team.rank)
                loader.sampler.set_epoch(epoch)
                started = time.perf_counter()
                metrics = utils.train(
                    wrapped_model, loader, criterion, optimizer, scheduler, scaler, device,
                    recipe.clip_norm, teacher and teacher.begin(loader.sampler),
                )  # fmt: skip
                trained = time.perf_counter()
                evaluation = evaluate(*reported)
                seconds = trained - started, time.perf_counter() - trained
                history.add(scheduler.get_last_lr()[0], metrics, evaluation, seconds)
                state.save(run)
            evaluated = reported if args.no_test else test_set
            if evaluation is None or evaluated is not reported:
                evaluation = evaluate(*evaluated)
        except (KeyboardInterrupt, RuntimeError) as error:
            # Other processes may be gone; then `team`, in evaluate() too, is this one alone.
            (team, stopped), evaluated = team.after(error), reported
            state.restore(run, team)  # history.rows, too: back to the last whole epoch
            done = len(history.rows)
            where = f"epoch {done + 1}" if done < args.epochs else "the last evaluation"
            run.log(f"Stopped in {where}: {str(stopped) or 'Ctrl-C'}")
            if not done:
                raise stopped from None
            evaluation = evaluate(*reported)

        # 6. The report; results.json ends the run, and the pages come after it.
        split, images, _ = evaluated
        title = f"{network.build.__name__}, {split} set, epoch {len(history.rows)}"
        for name, picture in plots.of_run(history, evaluation, images, title).items():
            run.write(name, picture)
        run.log(f"\n{network.build.__name__}, {network.parameters:,} parameters")
        run.log(history.table(split, evaluation.accuracy, run.folder))
        results = history.results(split, evaluation, completed=stopped is None)
        run.write_json(run.RESULTS, results)
        reports.write_page(run)
        reports.write_index(run)
        if stopped is not None:
            raise stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    def work(args: argparse.Namespace) -> None:
        with parallel.join() as team:
            train(args, arguments, team)

    with parallel.one_voice():
        return cli.run(flags.parser(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
