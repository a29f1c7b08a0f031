"""The trainings of a search: each a train.py in a process of its own, followed by its log.csv."""

import argparse
import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

import networks
import runs
from errors import Error
from support.files import HERE, read_json, stored_path
from support.history import duration
from support.process import usable_cores
from tools import studies

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage

ERRORS = "errors.txt"  # of a trial: what train.py wrote to standard error
DIVERGED = "the training diverged"  # what train.py says of a loss that became nan
TRAIN = [sys.executable, str(HERE / "train.py")]
POLL = 0.5  # seconds between looks at a training
# Exit statuses of a training that somebody interrupted; the negative ones during its imports.
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


class TrainingError(Error):
    """A training ended otherwise than by its last epoch, a diverged loss or an interruption."""


class StoppedError(Error):
    """A training was interrupted; its trial waits to be gone on with."""


def command_of(args: argparse.Namespace, network: networks.Network, setting: dict) -> list[str]:
    """The arguments of train.py for a setting, which may hold a seed, but for --output-dir."""
    given = dict(args.set) | {key: value for key, value in setting.items() if key != "seed"}
    command = ["--model", str(network.file), "--epochs", str(args.epochs)]
    command += ["--seed", str(setting.get("seed", 0)), "--val-split", str(args.val_split)]
    command += [*(f"--set={key}={value}" for key, value in given.items()), "--no-test"]
    command += [f"--data-dir={args.data_dir}", *(["--dry-run"] if args.dry_run else [])]
    return command + ([f"--device={args.device}"] if args.device else [])


def run_in(place: Path) -> Path | None:
    """The run's folder in the folder of a trial; None before train.py has made it."""
    found = sorted(place.glob("*/settings.json"))
    return found[-1].parent if found else None


def epochs_in(place: Path) -> dict[int, tuple[float, float]]:
    """Held-out accuracy in percent, and seconds, by epoch, as far as the run in there has come.

    Raises:
        TrainingError: its table is damaged.
    """
    run = run_in(place)
    if run is None or not (run / "log.csv").is_file():
        return {}
    found, keys = {}, ("epoch", "val_acc", "train_seconds", "test_seconds")
    try:
        with open(run / "log.csv", newline="") as file:
            for row in csv.DictReader(file):
                epoch, accuracy, *seconds = (float(row[key]) for key in keys)
                found[int(epoch)] = accuracy, sum(seconds)
    except (ValueError, KeyError, TypeError, csv.Error):
        raise TrainingError(f"{run}/log.csv is damaged") from None
    return found


class Leftover:
    """A training whose search was killed, as a process that can only be waited for."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def poll(self) -> int | None:
        """None while it trains."""
        try:
            runs.Run(self.run).close()
        except runs.InUseError:
            return None
        return 0

    def terminate(self) -> None:
        """It is another's; whoever goes on finds it."""

    def wait(self) -> None:
        """Nothing is to be waited for."""


class Search:
    """The trials that this process trains, `args.jobs` at a time, of a study that others may share.

    Args:
        study, storage: with `studies.open_study`.
        folder: of the study, where each trial gets a folder of its own.
        points: of a grid, a setting and a seed each; none for --tune.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        network: networks.Network,
        study: "Study",
        storage: "RDBStorage",
        folder: Path,
        points: Sequence[dict],
    ) -> None:
        self.args, self.network, self.study, self.storage = args, network, study, storage
        self.folder, self.points = folder, points
        self.stopping, self.asking = threading.Event(), threading.Lock()
        self.failure: BaseException | None = None
        self.ended: list[int] = []  # threads that are done
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // args.jobs))}
        self.environment = threads | os.environ  # what the user set himself stays

    @property
    def most(self) -> int | None:
        """Trials of a --tune study; None of a grid."""
        return None if self.points else self.args.trials

    @property
    def wanted(self) -> int:
        """Trials that end the search."""
        return self.most or len(self.points)

    def run(self) -> None:
        """Trains until all is done, showing how far all workers are.

        Raises:
            KeyboardInterrupt: trainings have been stopped, and their trials wait.
            Error: the first that a training or the storage raised; the others were stopped.
        """
        threads = [threading.Thread(target=self._work) for _ in range(self.args.jobs)]
        form = "{desc} |{bar}| {elapsed}, {remaining} left"
        total, done = self.wanted * self.args.epochs, self._progress()[0]
        options = {"bar_format": form, "smoothing": 0, "disable": None, "leave": False}
        with tqdm(total=total, initial=done, **options) as bar:
            try:
                for thread in threads:
                    thread.start()
                while len(self.ended) < len(threads):
                    if not bar.disable:
                        bar.n, text = self._progress()
                        bar.set_description_str(text)
                    # Not join(): a thread whose join() Ctrl-C interrupts is taken for ended.
                    time.sleep(POLL)
            finally:
                self.stopping.set()
                for thread in threads:
                    thread.join()
        if self.failure is not None:
            raise self.failure

    def _progress(self) -> tuple[int, str]:
        """Epochs done, those that were saved by pruning too, and the trials in words."""
        trials = studies.living(self.study.get_trials(deepcopy=False))
        ended = studies.finished(trials)
        epochs = len(ended) * self.args.epochs
        epochs += sum(len(t.intermediate_values) for t in trials if t.state.name == "RUNNING")
        names = [trial.state.name for trial in trials]
        counts = f"{names.count('RUNNING')} running, {names.count('PRUNED')} pruned"
        return epochs, f"{len(ended)} of {self.wanted} trials done, {counts}"

    def _work(self) -> None:
        """A thread: one trial after the other."""
        try:
            while not self.stopping.is_set():
                with self.asking:
                    trial = self._ask()
                if trial is not None:
                    self._try(trial)
                elif self._is_done():
                    return
                else:  # what is left is trained elsewhere; its worker may die
                    self.stopping.wait(4 * POLL)
        except BaseException as error:
            self.failure = self.failure or error
            self.stopping.set()
        finally:
            self.storage.remove_session()
            self.ended.append(threading.get_ident())

    def _is_done(self) -> bool:
        return len(studies.finished(self.study.get_trials(deepcopy=False))) >= self.wanted

    def _ask(self) -> "Trial | None":
        """A trial to train, with its parameters; None where there is none at this moment."""
        studies.revive(self.study)
        studies.fill(self.study, self.points)
        trials = studies.living(self.study.get_trials(deepcopy=False))
        waiting = any(trial.state.name == "WAITING" for trial in trials)
        if not waiting and (self.points or len(trials) >= self.most):
            return None
        trial = self.study.ask()
        self.storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("taken", trial.number)
        for parameter in self.args.space:
            parameter.suggest(trial)
        if studies.superfluous(self.study, trial.number, self.points, self.most):
            studies.drop(self.study, trial.number)
            return None
        return trial

    def _try(self, trial: "Trial") -> None:
        """Trains, and tells the study what came out."""
        import optuna

        label, started = studies.label(trial.params), time.monotonic()
        try:
            accuracy = self._train(trial)
            self.study.tell(trial, accuracy, skip_if_finished=True)
            said = f"{accuracy:.2f} %"
        except optuna.TrialPruned as reason:
            state = optuna.trial.TrialState.PRUNED
            self.study.tell(trial, state=state, skip_if_finished=True)
            said = f"pruned ({reason})"
        except optuna.exceptions.UpdateFinishedTrialError:
            said = "others took this worker for dead, and have it now"
        except BaseException as error:
            studies.give_back(self.study, trial.number)
            if not isinstance(error, StoppedError):
                raise
            said = "stopped; it will be gone on with"
        seconds = duration(time.monotonic() - started)
        tqdm.write(f"trial {trial.number} ({label}): {said}, {seconds}")
        sys.stdout.flush()

    def _train(self, trial: "Trial") -> float:
        """Trains, or goes on; returns the accuracy of the final weights, in percent.

        Raises:
            optuna.TrialPruned: hopeless beside the others, or diverged.
            StoppedError, TrainingError: interrupted, or train.py ended with an error.
        """
        place = Path(trial.user_attrs.get("place", ""))
        if not trial.user_attrs.get("place") or not place.is_dir():  # new, or another machine's
            # With chance in its name: another storage may have a trial of this number.
            place = self.folder / f"{trial.number:04d}-{os.urandom(3).hex()}"
            place.mkdir(parents=True)
            trial.set_user_attr("place", str(place.resolve()))
            trial.set_user_attr("machine", socket.gethostname())
        told: set[int] = set()
        while (run := run_in(place)) is None or not runs.is_finished(run):
            if self.stopping.is_set():
                raise StoppedError("stopped")
            process = self._start(trial, place, run)
            status = self._follow(trial, place, process, told)
            if status in INTERRUPTED:
                self.stopping.wait(2 * POLL)  # Ctrl-C comes to both of us
            elif status or not (isinstance(process, Leftover) or run_in(place)):
                self._explain(trial, place, status)
        self._report(trial, place, told)
        return read_json(run / runs.Run.RESULTS)["final_accuracy"]

    def _explain(self, trial: "Trial", place: Path, status: int) -> None:
        """Raises what train.py said last: optuna.TrialPruned of a diverged loss, TrainingError."""
        import optuna

        lines = (place / ERRORS).read_text(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if "error:" in line.lower()), "")
        how = f"signal {-status} ended it" if status < 0 else f"it ended with status {status}"
        said = said.partition("error: ")[2] or said or how
        if DIVERGED not in said:
            raise TrainingError(f"trial {trial.number} in {place}: {said}")
        trial.set_user_attr("diverged", said)
        raise optuna.TrialPruned("diverged")

    def _start(
        self, trial: "Trial", place: Path, run: Path | None
    ) -> "subprocess.Popen | Leftover":
        if run is None:
            command = [*command_of(self.args, self.network, trial.params), f"--output-dir={place}"]
        else:
            leftover = Leftover(run)
            if leftover.poll() is None:
                return leftover
            command = ["--resume", str(run), "--model", str(self.network.file)]
            command += [f"--device={self.args.device}"] if self.args.device else []
        with open(place / ERRORS, "wb") as errors:
            return subprocess.Popen(
                [*TRAIN, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # train.log holds it
                stderr=errors,
                env=self.environment,
            )

    def _follow(
        self, trial: "Trial", place: Path, process: "subprocess.Popen | Leftover", told: set[int]
    ) -> int:
        """Reports its epochs, and stops it if need be; returns its exit status.

        Raises:
            optuna.TrialPruned, StoppedError: it was stopped, and has saved what it had.
            optuna.exceptions.UpdateFinishedTrialError: others took this worker for dead.
        """
        import optuna

        beat, wish, ours = time.monotonic(), None, not isinstance(process, Leftover)
        try:
            while (status := process.poll()) is None:
                if time.monotonic() - beat > studies.HEARTBEAT:
                    self.storage.record_heartbeat(trial._trial_id)
                    beat = time.monotonic()
                news = self._report(trial, place, told)
                if wish is None and self.stopping.is_set():
                    wish = StoppedError("stopped")
                    if not ours:
                        break
                early = news and ours and max(told) < self.args.epochs
                if wish is None and early and trial.should_prune():
                    wish = optuna.TrialPruned(f"after epoch {max(told)}")
                if wish is not None:
                    process.terminate()  # again and again: it may come too early to be heeded
                time.sleep(POLL)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        run = run_in(place)
        if wish is not None and not (run and runs.is_finished(run)):
            raise wish
        return status or 0

    def _report(self, trial: "Trial", place: Path, told: set[int]) -> bool:
        """Tells the study of new epochs; returns whether there were any."""
        found = epochs_in(place)
        news = sorted(set(found) - told)
        for epoch in news:
            trial.report(found[epoch][0], epoch)
            told.add(epoch)
        if news:
            trial.set_user_attr("folder", stored_path(run_in(place)))
            trial.set_user_attr("seconds", sum(seconds for _, seconds in found.values()))
        return bool(news)
