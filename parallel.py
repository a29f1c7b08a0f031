"""One training in several processes, started by torchrun: which am I, who does what, sums.

    torchrun --standalone --nproc-per-node 2 train.py --model 1 --epochs 20

torchrun starts the very same command once for each GPU (or as often as asked, on CPUs) and names
each process in its environment. Every process trains the same network on its share of every batch;
DistributedDataParallel averages their gradients. The first process alone asks, prints and writes.
"""

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import Error, UsageError

MISSING = "another process of this training has ended, or does not answer"
INTERRUPTED = "interrupted"  # how cli.run tells of a signal
PATIENCE = timedelta(minutes=10)  # with a process that does not answer, as NCCL's own


class LostProcessError(Error, RuntimeError):
    """Another process of this training has ended, or does not answer."""


@dataclass(frozen=True)
class Team:
    """The processes of a training: this one's number, and how many there are."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None
    calls: Iterator[int] = field(default_factory=itertools.count)  # the same in all of them

    @property
    def first(self) -> bool:
        """Whether this process asks, prints and writes."""
        return self.rank == 0

    def share(self, size: int) -> tuple[slice, float]:
        """This process's part of a batch of `size` images, and the weight of its mean loss.

        DistributedDataParallel takes the plain mean of what the processes found; weighted so, it is
        the mean over the whole batch, where the parts differ in size. A batch of less than two
        images a process, such as a short last one, goes to all of them whole: BatchNorm1d cannot
        be trained with one image, and nothing with none. (So it counts several times in the means
        of the training metrics, not in what is learnt.)
        """
        if size < 2 * self.size:
            return slice(0, size), 1.0
        start, end = size * self.rank // self.size, size * (self.rank + 1) // self.size
        return slice(start, end), (end - start) * self.size / size

    def refuse(self, batch_size: int) -> None:
        """Raises UsageError where batches are too small to be shared."""
        if self.size > 1 and batch_size < 2 * self.size:
            raise UsageError(
                f"a batch of {batch_size} images is too small to be shared by {self.size} "
                f"processes; give a --batch-size of {2 * self.size} or more, or fewer processes"
            )

    def turns(self, size: int, batch_size: int) -> np.ndarray:
        """The indices of the batches that are this process's, of `size` images: every so manyth."""
        images = np.arange(size)
        return images[images // batch_size % self.size == self.rank]

    def once(self, work: Callable, *arguments: object) -> object:
        """What `work(*arguments)` gives in the first process, or raises there, in all of them."""
        if self.size == 1:
            return work(*arguments)
        answer = [None, None]
        if self.first:
            try:
                answer[0] = work(*arguments)
            except (Exception, SystemExit) as error:
                answer[1] = error
        self._wait_for(1 if self.first else 0, 1)  # a question may stay unanswered for long
        with _told():
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def once_a_machine(self, work: Callable, *arguments: object) -> object:
        """Does the work in every process; in one of each machine before the others."""
        leader = os.environ.get("LOCAL_RANK", "0") == "0" or self.size == 1
        done = work(*arguments) if leader else None
        if self.size > 1:
            self._wait_for(int(leader), int(os.environ["GROUP_WORLD_SIZE"]))
        return done if leader else work(*arguments)

    def _wait_for(self, arrived: int, wanted: int) -> None:
        """Until so many have arrived, however long; torchrun ends the wait where one has failed."""
        with _told():
            key = f"call {next(self.calls)}"
            self.store.add(key, arrived)
            while self.store.add(key, 0) < wanted:
                time.sleep(0.02)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            with _told():
                dist.all_reduce(values)
        return values

    def gather(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """Everybody's tensors, on the CPU: of `mine` in the order of `turns`, all in order."""
        everybodys = [[tensor.cpu() for tensor in mine]]
        if self.size > 1:
            everybodys *= self.size
            with _told():
                dist.all_gather_object(everybodys, everybodys[self.rank])
        longest = max(map(len, everybodys))
        return [each[turn] for turn in range(longest) for each in everybodys if turn < len(each)]

    def wrap(self, model: nn.Module, device: torch.device, uses_all: bool = False) -> nn.Module:
        """The model as it trains: its gradients are the means over all processes.

        On CUDA BatchNorm takes its statistics from the whole batch (SyncBatchNorm); on the CPU,
        where PyTorch has no such layer, from each process's part.

        Args:
            uses_all: every step uses every parameter. A network of somebody's own may not; to look
                takes time, and PyTorch warns where it was in vain.
        """
        if self.size == 1:
            return model
        on_gpu = device.type == "cuda"
        if on_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        options = {"forward_sync_buffers": False, "find_unused_parameters": not uses_all}
        return DistributedDataParallel(model, [device] if on_gpu else None, **options)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        """Brings BatchNorm's running statistics to their mean, all other buffers to the first's."""
        if self.size > 1:
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(self.sum(buffer.clone()) / self.size)
                else:
                    with _told():
                        dist.broadcast(buffer, 0)

    def after(self, stop: BaseException) -> tuple["Team", BaseException]:
        """Who reports a training that was stopped, and what stopped it.

        Where every process met the same, all of them; after a signal, or where one is gone, the
        first alone, since the others may be gone as well.

        Raises:
            the error itself: this process is not to report, or it is a fault and no stop.
        """
        if self.size > 1 and isinstance(stop, RuntimeError) and not isinstance(stop, Error):
            stop = _lost(stop)
        if isinstance(stop, LostProcessError):
            try:  # what took the others may be on its way here: Ctrl-C, or torchrun's SIGTERM
                time.sleep(3)  # a process takes a while to end, and torchrun to notice
            except KeyboardInterrupt as signal:
                stop = signal
        if isinstance(stop, Error) and not isinstance(stop, LostProcessError):
            return self, stop
        if not self.first or not isinstance(stop, Error | KeyboardInterrupt):
            raise stop
        return ALONE, stop


ALONE = Team()


@contextlib.contextmanager
def join() -> Iterator[Team]:
    """The team that torchrun started this process in; ALONE without torchrun.

    Raises:
        LostProcessError: the others did not come.
    """
    if not _by_torchrun():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _told():
        store = _meet(rank, size, _store(PATIENCE))
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    yield Team(rank, size, store)
    dist.destroy_process_group()  # after an error it could wait for the others in vain


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Within it no process but torchrun's first prints."""
    with contextlib.ExitStack() as stack:
        if _by_torchrun() and os.environ["RANK"] != "0":
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield


def _by_torchrun() -> bool:
    needed = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed)


def _meet(own: int, size: int, store: dist.TCPStore) -> dist.Store:
    """A part of the store that only the processes of this attempt know.

    torchrun keeps its store for the next attempt (PyTorch 2.14), where the addresses of the dead
    would be taken for those of the living. So each process asks by a name that nobody had before,
    until the first one, which may answer to the dead as well, has heard from all the living.
    """
    if own == 0:
        name, missing = uuid.uuid4().hex, set(range(1, size))
        end = time.monotonic() + PATIENCE.total_seconds()
        while missing:
            for rank in missing:
                if store.check([f"asks/{rank}"]):
                    store.set(f"answer/{store.get(f'asks/{rank}').decode()}", name)
            missing = {rank for rank in missing if not store.check([f"{name}/{rank}"])}
            if time.monotonic() > end:
                raise LostProcessError(f"{MISSING} (process {min(missing)} did not come)")
            time.sleep(0.01)
        store.set("attempt", name)
    else:
        mine = uuid.uuid4().hex
        store.set(f"asks/{own}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"{name}/{own}", "")
    return dist.PrefixStore(name, store)


def device_index(asked: torch.device, devices: int) -> int | None:
    """Which of this machine's devices is this process's; CUDA takes it for the default.

    None where no other process shares the machine: then any may be asked for.

    Raises:
        UsageError: there are more processes here than devices, or all are to share one.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > devices:
        raise UsageError(
            f"torchrun started {processes} processes on a machine of {devices} {asked.type} "
            f"devices; give it --nproc-per-node {devices}, or train.py --device cpu"
        )
    if processes == 1:
        return None
    if asked.index is not None:
        raise UsageError(
            f"each of torchrun's {processes} processes has a device of its own here; instead of "
            f"{asked} give {asked.type}, and CUDA_VISIBLE_DEVICES to torchrun"
        )
    index = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(index)  # else each process would reserve memory on the first, too
    return index


# ---------------------------------------------------------------- what outlives a process


def first_to_tell(line: str) -> bool:
    """Whether no other process has told this line: an error that all of them meet is told once.

    That this one was interrupted, or misses another, is told where nothing else was: it may follow.
    """
    store = _store()
    with contextlib.suppress(RuntimeError):
        if store is None:
            return True
        told = "told/" + (store.get("attempt").decode() if store.check(["attempt"]) else "")
        before = store.add(told, 1) - 1
        if line.startswith((MISSING, INTERRUPTED)):
            return not before
        return store.add(f"{told}/{line}", 1) == 1
    return True


def remember(folder: Path) -> None:
    """Keeps where this training is written, for torchrun's next attempt."""
    if note := _note():
        note.write_text(str(folder.absolute()), encoding="utf-8")


def remembered(settled: str) -> Path | None:
    """Where an earlier attempt of this training was written: torchrun starts anew what failed.

    Args:
        settled: a file of that folder; without it there is nothing to go on with.
    """
    note = _note()
    if note is None or not note.is_file():
        return None
    folder = Path(note.read_text(encoding="utf-8"))
    return folder if (folder / settled).is_file() else None


def answers() -> bool:
    """Whether somebody may be there to answer questions: not when torchrun starts anew."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def _note() -> Path | None:
    """A file in torchrun's own folder of this start, which all its attempts on a machine share."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/0/error.json
    return Path(error_file).parents[2] / "cifar10_run" if error_file else None


def _store(patience: timedelta = timedelta(seconds=10)) -> dist.TCPStore | None:
    """torchrun's own memory, which all processes share; None without torchrun."""
    if not _by_torchrun():
        return None
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(RuntimeError):  # torchrun itself is gone
        return dist.TCPStore(*where, is_master=False, timeout=patience)
    return None


def _lost(error: RuntimeError) -> RuntimeError:
    """A backend's word that a process is missing, as our own error; any other as it is."""
    text = str(error)
    if isinstance(error, dist.DistError) or "gloo" in text or "ProcessGroup" in text:
        reason = text.splitlines()[0].partition("] ")[2] or text.splitlines()[0]
        return LostProcessError(f"{MISSING} ({reason.split('. ')[0]:.90})")
    return error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from None
