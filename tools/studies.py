"""What tools.search tries, and the Optuna study that keeps it: parameters, storage, what counts.

Any number of workers, on any machines, share a study, and each can be killed at any moment. The
storage numbers the trials one by one; so all workers agree, without asking each other, which of two
trials of the same point counts (the first), and which ones are beyond the last of a --tune study.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import sqlite3
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import filelock

import support.needed
from errors import Error, UsageError
from recipes import Recipe
from support.flags import recipe_entry

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

HEARTBEAT, GRACE = 10, 120  # seconds between signs of life; without one for so long, a worker died
BUSY = 60  # seconds that SQLite waits for others who write
MOST = 10_000  # trainings of a grid
WHOLE = {name for name, field in Recipe.__pydantic_fields__.items() if field.annotation is int}


class StorageError(Error):
    """The database cannot be read or written."""


def needed() -> contextlib.AbstractContextManager:
    """As support.needed, for searches."""
    return support.needed.needed("a search", "requirements-search.txt")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own lines and warnings are left out; what the database says becomes a StorageError.

    The heartbeat is called experimental, and meant for Optuna's own loop; ours keeps it alive.
    """
    with needed():
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        try:
            yield
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            raise StorageError(
                f"the storage failed: {_reason(error)}; what was trained is kept, and the same "
                "command goes on, if the storage is whole"
            ) from None
        except json.JSONDecodeError as error:
            raise StorageError(
                f"the storage is damaged: {error}; move it away to begin anew, the runs stay"
            ) from None


def _reason(error: BaseException) -> str:
    """What the database itself said, in one line."""
    error = error.__cause__ or error
    return " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__


# ---------------------------------------------------------------- what is tried


class Parameter(NamedTuple):
    """A key of the recipe: one of `values`, or for --tune a number from low to high."""

    key: str
    values: tuple = ()
    low: float | None = None  # of a grid's numbers, too; whole ones are int
    high: float | None = None
    log: bool = False

    @property
    def ends(self) -> tuple:
        """The values between which, or of which, the others are."""
        return self.values or (self.low, self.high)

    def suggest(self, trial: "Trial") -> object:
        """The trial's value: as it was enqueued, or as the sampler wants it."""
        if self.low is None:
            return trial.suggest_categorical(self.key, self.values)
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        ask = trial.suggest_int if whole else trial.suggest_float
        return ask(self.key, self.low, self.high, log=self.log)


def _split(text: str, like: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not {like}")
    if key == "seed":
        raise argparse.ArgumentTypeError("seed is no key of a recipe; give --seeds N with --grid")
    return key, values


def grid_entry(text: str) -> Parameter:
    """KEY=VALUE,VALUE,... of --grid, the values read as `train.py --set` reads them."""
    key, values = _split(text, "KEY=VALUE,VALUE,...")
    found = tuple(recipe_entry(f"{key}={value}")[1] for value in values.split(","))
    twice = [value for number, value in enumerate(found) if value in found[:number]]
    if twice or "" in found:
        what = f"has {twice[0]!r:.40} twice" if twice else "has an empty value"
        raise argparse.ArgumentTypeError(f"{text!r:.60} {what}")
    # Numbers are an axis in Optuna's dashboard, other values are categories.
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in found):
        return Parameter(key, found)
    whole = all(isinstance(value, int) for value in found)
    ends = (min(found), max(found)) if whole else (float(min(found)), float(max(found)))
    return Parameter(key, found, *ends)


def tune_entry(text: str) -> Parameter:
    """KEY=LOW:HIGH, :log or :int or both behind it, or KEY=VALUE,VALUE,... of --tune.

    Keys that are whole numbers in every recipe need no :int.
    """
    like = "KEY=LOW:HIGH, KEY=LOW:HIGH:log, KEY=LOW:HIGH:int or KEY=VALUE,VALUE,..."
    key, values = _split(text, like)
    low, *rest = values.split(":")
    if not rest:
        found = grid_entry(text)
        if len(found.values) < 2:
            raise argparse.ArgumentTypeError(f"{text!r:.60} leaves no choice; fix it with --set")
        return found._replace(low=None, high=None)
    high, how = rest[0], set(rest[1:])
    ends = [recipe_entry(f"{key}={end}")[1] for end in (low, high)]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if not numbers or not how <= {"log", "int"} or len(rest) - 1 != len(how):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not {like}")
    if ends[0] >= ends[1]:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: the range must begin below its end")
    whole = all(isinstance(end, int) for end in ends)
    if "int" in how and not whole:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: the ends of :int are whole numbers")
    if "log" in how and ends[0] <= 0:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: a logarithmic range begins above 0")
    if not ("int" in how or (whole and key in WHOLE)):
        ends = [float(end) for end in ends]
    return Parameter(key, (), *ends, "log" in how)


def label(params: dict) -> str:
    """A setting in words: "lr=0.03, seed 1"."""
    parts = [f"{key}={short(value)}" for key, value in params.items() if key != "seed"]
    return ", ".join(parts + ([f"seed {params['seed']}"] if "seed" in params else []))


def short(value: object) -> str:
    """A value as tables show it; numbers that a sampler drew with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings_of(space: Sequence[Parameter], seeds: int) -> list[dict]:
    """The settings of a grid, in the order of the command; the last key changes fastest.

    Raises:
        UsageError: they are too many.
    """
    trainings = seeds * math.prod(len(parameter.values) for parameter in space)
    if trainings > MOST:
        raise UsageError(
            f"this grid is {trainings:,} trainings, {MOST:,} at most; take fewer values"
        )
    keys = [parameter.key for parameter in space]
    products = itertools.product(*(parameter.values for parameter in space))
    return [dict(zip(keys, values, strict=True)) for values in products]


def name_of(model: str, kind: str, space: Sequence[Parameter], about: dict) -> str:
    """The study's name, which follows from what is searched: the same command, the same study.

    Args:
        model, kind: "model_2", "grid" or "tune".
        about: what else makes another study: code, recipe, epochs, seeds, ...
    """
    keys = sorted(parameter.key for parameter in space)
    # In whichever order keys and values are given.
    tried = sorted([p.key, sorted(map(repr, p.values)), repr(p[2:])] for p in space)
    text = json.dumps([kind, tried, about], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{model}-{kind}-{'-'.join(keys)[:60]}-{digest}"


# ---------------------------------------------------------------- where it is kept


def open_storage(url: str) -> "RDBStorage":
    """The database behind a URL, with Optuna's tables in it.

    Raises:
        StorageError, UsageError: it cannot be reached, written or read, or is none.
    """
    with needed():
        import optuna
        import sqlalchemy.exc
    shown = url.rpartition("@")[2]  # never the password
    try:
        parsed = sqlalchemy.make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.port is not None and not 0 < parsed.port < 2**16:
            raise ValueError
        if parsed.get_backend_name() == "sqlite":
            if parsed.query:
                raise UsageError(f"--storage {shown}: give sqlite:///FILE.db, without options")
            if parsed.database in (None, "", ":memory:"):
                raise UsageError(f"--storage {shown} would be forgotten; give sqlite:///FILE.db")
            return _open_sqlite(url, Path(parsed.database))
        for attempt in itertools.count(1):
            try:
                return _connect(url, {"pool_pre_ping": True})
            except (
                sqlalchemy.exc.ProgrammingError,
                sqlalchemy.exc.IntegrityError,
                optuna.exceptions.StorageInternalError,
            ):
                if attempt == 5:
                    raise
                time.sleep(random.random())  # another machine makes the tables at this moment
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"--storage {shown} is no database that is known; give sqlite:///FILE.db or "
            "postgresql://USER@MACHINE/DATABASE"
        ) from None
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or error
        ours = "-r requirements-search.txt" if url.startswith("postgresql") else driver
        raise support.needed.NotInstalledError(
            f"--storage {shown} needs {driver}; pip install {ours}"
        ) from None
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        RuntimeError,  # tables of another version of Optuna
        sqlite3.Error,
    ) as error:
        raise StorageError(
            f"--storage {shown} cannot be used: {_reason(error)}; mend it, or give another"
        ) from None


def _connect(url: str, options: dict) -> "RDBStorage":
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    return RDBStorage(
        url.replace("{", "{{").replace("}", "}}"),  # Optuna formats it
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )


def _open_sqlite(url: str, file: Path) -> "RDBStorage":
    """SQLite, whose transactions take their turns.

    Python's sqlite3 begins one at the first write alone: two workers could read that a trial waits,
    and both take it. Begun at once, and for writing, they come one after the other.
    https://docs.sqlalchemy.org/en/20/dialects/sqlite.html (on BEGIN IMMEDIATE)
    """
    import sqlalchemy

    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{file}.lock"):  # its tables are made once
        if others := _others_in(file):
            names = ", ".join(others)[:60]
            raise UsageError(
                f"--storage {file} holds another program's tables ({names}); give another file"
            )
        storage = _connect(url, {"connect_args": {"timeout": BUSY}})

    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return storage


def _others_in(file: Path) -> list[str]:
    """What another program keeps in the file; none where Optuna's table of studies is."""
    if not file.is_file():
        return []
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY)) as connection:
        found = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
        columns = connection.execute("SELECT name FROM pragma_table_info('studies')")
        return [] if ("study_name",) in columns else found


def open_study(storage: "RDBStorage", name: str, pruner: "BasePruner", about: dict) -> "Study":
    """The study of that name, begun or gone on with.

    Whoever begins it draws with seed 0, so that one worker alone repeats itself; the others draw
    differently, since the same random beginnings twice would be of no use.
    """
    import optuna

    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=0),
            pruner=pruner,
        )
    except optuna.exceptions.DuplicatedStudyError:
        sampler = optuna.samplers.TPESampler()
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    else:
        for key, value in about.items():
            study.set_user_attr(key, value)
    return study


# ---------------------------------------------------------------- which trials count


def point(trial: "FrozenTrial") -> tuple:
    """What a trial tries, to be compared."""
    return tuple(sorted((trial.system_attrs.get("fixed_params") or trial.params).items()))


def living(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    """Those that are waiting, running, complete or pruned; the failed ones were repeated."""
    return [trial for trial in trials if trial.state.name != "FAIL"]


def counted(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    """The living ones, without what waits for a point that another stands for.

    Two workers may enqueue a point at the same moment; whoever takes the second one drops it, but
    when all is done nobody does.
    """
    found, points = [], set()
    for trial in sorted(living(trials), key=lambda each: each.state.name == "WAITING"):
        if trial.state.name != "WAITING" or point(trial) not in points:
            found.append(trial)
            points.add(point(trial))
    return sorted(found, key=lambda each: each.number)


def finished(trials: Sequence["FrozenTrial"]) -> list["FrozenTrial"]:
    """Those that are complete or pruned."""
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]


def fill(study: "Study", points: Sequence[dict]) -> None:
    """Enqueues the first point of a grid that nothing living stands for, unless a trial waits.

    One at a time, since Optuna takes the trials that wait in the order of their numbers: one that
    was interrupted waits under a new number, and is to be gone on with before others begin.
    """
    trials = living(study.get_trials(deepcopy=False))
    there = {point(trial) for trial in trials}
    missing = [each for each in points if tuple(sorted(each.items())) not in there]
    if missing and not any(trial.state.name == "WAITING" for trial in trials):
        study.enqueue_trial(missing[0])


def superfluous(study: "Study", number: int, points: Sequence[dict], most: int | None) -> bool:
    """Whether others have this trial's point already, or it is beyond the last of `most` trials."""
    trials = living(study.get_trials(deepcopy=False))
    mine = next(trial for trial in trials if trial.number == number)
    before = [trial for trial in trials if trial.number < number]
    if most is not None:
        return len(before) >= most
    known = {tuple(sorted(each.items())) for each in points}
    return point(mine) not in known or point(mine) in map(point, before)


def drop(study: "Study", number: int) -> bool:
    """Lets a running trial fail; returns whether it did not end before."""
    import optuna

    try:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False
    return True


def give_back(study: "Study", number: int) -> None:
    """Lets a running trial wait again, to be gone on with where its folder is.

    As Optuna does with those of dead workers: it fails, and a copy of it waits. Nothing happens
    where others have taken this worker for dead and did so already.
    """
    import optuna

    if not drop(study, number):
        return
    trial = next(trial for trial in study.get_trials() if trial.number == number)
    optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)


def revive(study: "Study") -> None:
    """Lets the trials of dead workers wait again."""
    import optuna

    optuna.storages.fail_stale_trials(study)
    # A worker that was killed between taking a trial and its first sign of life.
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in running:
        age = datetime.now() - trial.datetime_start
        if trial.user_attrs.get("taken") != trial.number and age.total_seconds() > GRACE:
            give_back(study, trial.number)
