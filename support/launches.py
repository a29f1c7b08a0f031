"""How many operations a training step launches, counted on a GPU that is only imagined.

Such small networks keep a GPU waiting: launching an operation takes it longer than computing it. So
their number is what a step costs there, and it follows from the code alone: `python -m tools.bench`
prints it without a GPU, too; docs/speed.md tells what it came down to.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recipes
import utils
from fast import batched, jpeg, loader
from networks import Network
from support import model_files

# They reserve memory, or look at old memory in another shape, which their schemas do not tell.
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "as_strided_"),
}
EPOCHS = 20  # of the run whose augmentation is counted; no number of operations depends on it

# ---------------------------------------------------------------- counting


class Launches(TorchDispatchMode):
    """Counts the operations that reach a device in a `with`: `total`.

    Left out is what launches nothing: views (by their schema a result is an argument's memory,
    which is not written to), NO_LAUNCH, and what is no arithmetic at all (namespaces prim,
    profiler). A _foreach operation counts once where CUDA has one kernel for its lists, else once
    a tensor. Still, an operation may be several kernels: a sort, say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, operation: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = operation._schema.name.removeprefix("aten::")
        silent = operation.is_view or name in NO_LAUNCH
        if not silent and operation.namespace not in ("prim", "profiler"):
            self.total += _kernels(name, args) if name.startswith("_foreach_") else 1
        return operation(*args, **(kwargs or {}))


def _kernels(name: str, args: tuple) -> int:
    """1 where CUDA takes all tensors of a _foreach operation's lists at once, else their number.

    It does so where all have one number format (for copies: all of a list), where those that meet
    have the same shape and strides, and where none has gaps (can_use_fast_route and the checks that
    it calls, ATen/native/ForeachUtils.h).
    """
    lists = [
        each for each in args if isinstance(each, list | tuple) and isinstance(each[0], Tensor)
    ]
    formats = [{tensor.dtype for tensor in each} for each in lists]
    if name != "_foreach_copy_":
        formats = [set.union(*formats)]
    shapes = [{_steps(tensor) for tensor in met} for met in zip(*lists, strict=True)]
    whole = all(
        sum((size - 1) * stride for size, stride in _steps(tensor)) + 1 == tensor.numel()
        for each in lists
        for tensor in each
    )
    return 1 if whole and all(len(each) == 1 for each in formats + shapes) else len(lists[0])


def _steps(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of every dimension in which there is a step to take."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple((size, stride) for size, stride in pairs if size != 1)


# ---------------------------------------------------------------- the imagined GPU


class _OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, but for copies.

    Fake tensors alone do not check every operation, and know no fused optimizers. An index or a
    single number on another device, which PyTorch may copy behind our back, is refused as well.
    """

    def __torch_dispatch__(
        self, operation: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in tensors}
        name = operation._schema.name.removeprefix("aten::")
        if len(devices) > 1 and name != "copy_":
            names = " and ".join(sorted(str(device) for device in devices))
            raise RuntimeError(f"{name} of tensors on {names}")
        return None if name.startswith("_fused_") else operation(*args, **kwargs)


class _Generator:
    """In the place of torch.Generator, which wants a driver."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)

    def manual_seed(self, seed: int) -> None:
        pass


@contextlib.contextmanager
def imagined_gpu() -> Iterator[utils.Device]:
    """A CUDA device without a driver: its tensors have shapes and a device, and no contents.

    What mixes it with the CPU raises RuntimeError, as on a real one. Networks are built before and
    moved inside. There is no backward pass, for autograd asks the driver, and nothing can be read.
    """
    # The first backward pass of a process counts its devices; were this one among them, no process
    # forked later could make one.
    torch.zeros((), requires_grad=True).backward()
    rand, randn = torch.rand, torch.randn

    def drawn(
        draw: Callable, size: tuple, *, generator: _Generator, device: torch.device
    ) -> Tensor:
        if generator.device.type != torch.device(device).type:
            raise RuntimeError(f"numbers on {device} of a generator on {generator.device}")
        return draw(size, device=device)

    stand_ins = (
        (torch, "Generator", _Generator),
        (torch, "rand", functools.partial(drawn, rand)),
        (torch, "randn", functools.partial(drawn, randn)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
    )
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        for kept in (batched.per_channel, jpeg.constant):  # of one world or the other
            kept.cache_clear()
            stack.callback(kept.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_OneDevice())
        yield utils.Device(torch.device("cuda"), torch.bfloat16, torch.channels_last)


# ---------------------------------------------------------------- a training step


def of_a_step(network: Network) -> dict[str, float]:
    """Of the recipe's training step: its augmentation, its passes (with loss and metrics), its
    optimizer. The mean of a step, since batches are augmented several at once; without a teacher.
    """
    passes, optimizer = _of_training(network)
    return {
        "augmentation": _of_augmentation(network.recipe),
        "forward and backward": passes,
        "optimizer": optimizer,
    }


def _of_augmentation(recipe: recipes.Recipe) -> float:
    """For a batch, on the imagined GPU; 0 where worker processes do it."""
    size = recipe.batch_size
    count = max(1, loader.AT_ONCE // size) * size
    images, labels = np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.uint8)
    transform = recipe.train_transform((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), EPOCHS)
    with imagined_gpu() as device:
        try:
            batches = utils.make_loader(images, labels, transform, size, device)
        except batched.UnknownTransformError:
            return 0.0
        with Launches() as launches:
            made = len(list(batches))
    return launches.total / made


def _of_training(network: Network) -> tuple[int, int]:
    """Passes and optimizer, on the CPU, which has a backward pass: utils.train itself.

    In a GPU's number format and layout and with PyTorch's own layers the operations are the same
    there, but that a dropout is 3 of them to a GPU's 1.
    """
    cpu, recipe = torch.device("cpu"), network.recipe
    device = network.fitting(utils.Device(cpu, torch.bfloat16, torch.channels_last))
    model = network.build().to(memory_format=device.layout)
    model_files.scale_dropout(model, recipe.dropout)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = recipes.make_optimizer(model, recipe, device.dtype)
    scheduler = recipes.make_scheduler(optimizer, recipe, 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images = torch.zeros(2, 3, 32, 32).to(device.dtype, memory_format=device.layout)
    batches = _Batches([(images, torch.zeros(2, dtype=torch.int64))] * 2)
    rest = (criterion, optimizer, scheduler, scaler, device, recipe.clip_norm)
    seen = []
    with Launches() as launches:
        optimizer.register_step_pre_hook(lambda *_: seen.append(launches.total))
        optimizer.register_step_post_hook(lambda *_: seen.append(launches.total))
        # No look at the sums on the way: how often that is depends on the clock.
        with mock.patch.object(utils.Meter, "READ_EVERY", math.inf):
            utils.train(model, batches, *rest)
    _, first, before, second = seen  # what follows one step's optimizer is counted with the next
    return before - first, second - before


class _Batches(list):
    """A loader of ready batches."""

    dataset = range(4)  # its images
    sampler = utils.BatchSampler(4, 2, shuffle=False)
