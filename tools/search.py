"""Recipes chosen by many trainings on held-out images: a grid with seeds, or Optuna's sampler.

    pip install -r requirements-search.txt
    python -m tools.search --model 2 --epochs 20 --grid lr=0.03,0.045,0.06 --seeds 3
    python -m tools.search --model 2 --epochs 20 --tune lr=0.01:0.1:log augment=0:0.5 --trials 40

Each trial is a `train.py` in a process of its own. The same command goes on with a search that was
stopped, and on another machine, with the same --storage, it takes part in it. docs/search.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

import cifar10
import cli
import networks
import recipes
import utils
from errors import Error
from support import flags, model_files, teachers, workers
from tools import findings, studies
from tools.trials import Search, command_of

SEEDS, TRIALS = 3, 40
HELD_OUT = {False: 5000, True: 200}  # images, of CIFAR-10 and in a dry run
FAIR = 5  # trials that have to be finished before others are pruned


def recipe_of(args: argparse.Namespace, network: networks.Network, setting: dict) -> recipes.Recipe:
    """The recipe that train.py will take from that command.

    Raises:
        UsageError: as train.py itself would say it.
    """
    return flags.recipe_of(flags.parser().parse_args(command_of(args, network, setting)), network)


def check(args: argparse.Namespace, network: networks.Network, space: Sequence) -> None:
    """Every value of a grid, and the ends of every range, as train.py will judge them.

    Raises:
        UsageError: something that no training could begin with; none has.
    """
    keys = [parameter.key for parameter in space]
    for key in keys:
        if keys.count(key) > 1 or key in dict(args.set):
            raise cli.UsageError(f"{key} is given twice; give it one --grid, --tune or --set")
    utils.Device.pick(args.device)
    settings = [{p.key: value} for p in space for value in p.ends]
    found = [recipe_of(args, network, setting) for setting in settings]
    data = cli.load_data(args)
    kept, _ = utils.validation_split(len(data.train_images), args.val_split)
    for setting, recipe in zip(settings, found, strict=True):
        shrink = args.dry_run and "batch_size" not in setting | dict(args.set)
        recipe.fitted(len(kept), shrink=shrink)
        model_files.scale_dropout(network.build(), recipe.dropout)
    for recipe in found:
        if recipe.teacher:
            check_teacher(args, network, recipe, data, kept)


def check_teacher(
    args: argparse.Namespace,
    network: networks.Network,
    recipe: recipes.Recipe,
    data: cifar10.CIFAR10,
    kept: np.ndarray,
) -> None:
    """The recipe's teacher, as train.py will judge it.

    Raises:
        UsageError: no such teacher, or one of other images.
    """
    device, held_out = network.fitting(utils.Device.pick(args.device)), args.val_split
    recipe = recipe.fitted(len(kept), shrink=True)
    known = network.file, held_out, device, args.dry_run
    teacher, _ = networks.load_teacher(recipe.teacher, *known)
    augment = recipe.train_transform(*utils.channel_stats(data.train_images[kept]), args.epochs)
    num_workers, _ = workers.choose(augment)
    sampler = utils.BatchSampler(len(kept), recipe.batch_size, shuffle=True)
    about = data, held_out, augment, recipe, num_workers, device
    teacher.attend(sampler, teachers.circumstances(*about))


def work(args: argparse.Namespace) -> None:
    """Looks at all that was asked for, then opens the study, and trains."""
    with studies.needed():
        import optuna
    args.space, kind = args.grid or args.tune, "grid" if args.grid else "tune"
    if bool(args.grid) == bool(args.tune):
        raise cli.UsageError("give either --grid or --tune (which takes KEY=VALUE,VALUE,... too)")
    if args.tune and args.seeds is not None:
        raise cli.UsageError(
            "--seeds is for --grid: a trial of --tune is one training; repeat the best ones with "
            "--grid and --seeds"
        )
    if args.grid and (args.trials is not None or args.no_pruning):
        raise cli.UsageError("--trials and --no-pruning are for --tune; a grid is trained as it is")
    network = networks.load_network(args.model)
    args.val_split = args.val_split or HELD_OUT[args.dry_run]
    args.trials, args.seeds = args.trials or TRIALS, args.seeds or SEEDS
    check(args, network, args.space)
    settings, points = studies.settings_of(args.space, args.seeds) if args.grid else [], []
    points = [setting | {"seed": seed} for seed in range(args.seeds) for setting in settings]
    about = {"network": network.build.__name__, "code": network.digest, "epochs": args.epochs}
    about |= {"recipe": asdict(recipe_of(args, network, {})), "held_out": args.val_split}
    about |= {"dry_run": args.dry_run, "seeds": args.seeds if args.grid else 1}
    about |= {"pruning": not (args.grid or args.no_pruning)}
    name = studies.name_of(network.name, kind, args.space, about)
    if args.grid:
        args.space = [*args.space, studies.Parameter("seed", (), 0, args.seeds - 1)]
    root = Path(args.output_dir) / "search"
    url = args.storage
    if url is None:
        url = f"sqlite:///{(root / network.name).resolve()}.db"
    pruner = optuna.pruners.NopPruner()
    if about["pruning"]:
        pruner = optuna.pruners.MedianPruner(FAIR, n_warmup_steps=args.epochs // 2)
    with studies.quiet():
        (root / name).mkdir(parents=True, exist_ok=True)
        storage = studies.open_storage(url)
        about |= {"command": shlex.join(sys.argv)}
        study = studies.open_study(storage, name, pruner, about)
        print(f"Study: {name}\nOutput: {root / name}", flush=True)
        search = Search(args, network, study, storage, root / name, points)
        try:
            search.run()
        except (KeyboardInterrupt, Error):
            findings.write(root / name, study, args.space, settings)
            print("The same command goes on.", flush=True)
            raise
        findings.write(root / name, study, args.space, settings)
        storage.engine.dispose()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.ArgumentParser(prog="tools.search", description=__doc__.splitlines()[0])
    add, number = parser.add_argument, cli.whole_number
    add("--model", required=True, help="1, 2, 3 or a model file")
    add("--epochs", type=cli.parse_epochs, required=True, help="of each training")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--grid", type=studies.grid_entry, metavar="KEY=VALUE,VALUE,...", help="all of them, with "
        "every seed; several keys: every combination", **several)  # fmt: skip
    add("--tune", type=studies.tune_entry, metavar="KEY=LOW:HIGH[:log][:int]", help="Optuna's "
        "sampler chooses from these ranges, or from KEY=VALUE,VALUE,...", **several)  # fmt: skip
    add("--seeds", type=number(1, 1000), help=f"of each setting of --grid, from 0 on ({SEEDS})")
    add("--trials", type=number(1, 100_000), help=f"of --tune, of all machines ({TRIALS})")
    add("--no-pruning", action="store_true", help="train every trial of --tune to its end")
    add("--set", type=flags.recipe_entry, action="append", default=[], metavar="KEY=VALUE",
        help="another value of the recipe, the same in all trainings")  # fmt: skip
    add("--val-split", type=number(1), metavar="N", help="held-out training images (5000)")
    add("--jobs", type=number(1, 256), default=1, help="trainings at a time, sharing the cores (1)")
    add("--storage", metavar="URL", help="postgresql://USER@MACHINE/DATABASE, for several machines "
        "(default: an SQLite file for each model in OUTPUT_DIR/search)")  # fmt: skip
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    cli.add_data_flags(parser)
    return cli.run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
