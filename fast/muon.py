"""Muon for convolutional networks: orthogonalised momentum on the filters, SGD on everything else.

A layer's filters are seen as a matrix, one row an output channel. Its gradient is dominated by a
few directions; Muon steps along the nearest matrix whose rows (or columns) are orthogonal, so that
the rare directions move as fast as the common ones (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon). As in airbench (Jordan, 2024,
https://github.com/KellerJordan/cifar10-airbench) the filters keep a fixed norm: the BatchNorm
behind them undoes any scale, but the larger a filter has grown, the less a step would turn it.

torch.optim.Muon takes matrices only, knows no grouped convolutions, and lets the norm grow.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

# The quintic of Jordan et al.: it brings singular values between about 0.7 and 1.2 in few steps,
# faster than the classical one brings them to 1. Three steps are enough here, as in airbench.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 3
EPSILON = 1e-7  # a gradient of zeros stays zero


def orthogonalize(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Brings the singular values of each matrix towards 1 and leaves its directions alone.

    A matrix of a single row or column has one, which becomes 1 at once.

    Args:
        matrices: float (N, rows, columns); computed in their dtype.
        steps: Newton-Schulz iterations.

    Returns:
        The same shape and dtype.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # so that the products below are the small ones
    x = x / (x.norm(dim=(1, 2), keepdim=True) + EPSILON)
    if x.shape[1] == 1:
        return x.mT if tall else x
    for _ in range(steps):  # x becomes (a + b (x x') + c (x x')^2) x, a sum with each product
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _stacks(
    alike: list[list[Tensor]], channel_groups: int, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for filters as matrices, one stack for all filters of one shape.

    Returns:
        The stacks, (N, rows, columns) of any contents, a matrix for each filter's group of
        channels; and each filter's place in them, a view of its own shape and layout. In what
        order a layout has a matrix's columns does not matter to its singular values.
    """
    stacks, places = [], []
    for filters in alike:
        first = filters[0]
        shape = (len(filters) * len(first), *first.shape[1:])
        layout = torch.contiguous_format if first.is_contiguous() else torch.channels_last
        exact = dtype is None or len(first) == channel_groups  # single rows are only normalised
        options = {"dtype": first.dtype if exact else dtype, "device": first.device}
        bank = torch.empty(shape, memory_format=layout, **options)
        places += bank.split(len(first))
        rows = bank if first.is_contiguous() else bank.permute(0, 2, 3, 1)
        stacks.append(rows.reshape(len(filters) * channel_groups, -1, first[0].numel()))
    return stacks, places


class Muon(torch.optim.Optimizer):
    """Muon for the filters of a model's convolutions, SGD for its other parameters.

    Both with Nesterov momentum. Every group of channels of a grouped convolution is a matrix of
    its own; a depthwise filter is then a single row, whose step is scaled to length 1.

    Args:
        model: its convolutions should be followed by a normalisation, which makes their scale
            meaningless. All its parameters that require a gradient are taken.
        lr: of the filters; each is kept at length 1 on average over its matrix, so this is the
            angle of a step, in radians, where the step's row has length 1 too.
        other_lr: of everything else.
        momentum: of the filters.
        other_momentum: of everything else.
        weight_decay: on the other parameters of two dimensions or more (linear weights).
        dtype: that the orthogonalisation computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        other_lr: float,
        momentum: float = 0.6,
        other_momentum: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        filters: dict[int, list[Tensor]] = {}  # by the number of groups of channels
        taken: set[int] = set()
        for module in model.modules():
            # A weight that is computed from others (weight_norm) is none; those others are SGD's.
            weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d) else None
            if weight is not None and weight.requires_grad and id(weight) not in taken:
                filters.setdefault(module.groups, []).append(weight)
                taken.add(id(weight))  # two layers may share one
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        groups = [
            {"params": weights, "lr": lr, "momentum": momentum, "channel_groups": channel_groups}
            for channel_groups, weights in filters.items()
        ]
        groups.append({"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay})
        groups.append({"params": [p for p in others if p.ndim < 2]})
        self.dtype = dtype
        other = dict(lr=other_lr, momentum=other_momentum, weight_decay=0.0, channel_groups=0)
        super().__init__([group for group in groups if group["params"]], other)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                step = self._step_filters if group["channel_groups"] else self._step_others
                step(parameters, group)
        return loss

    def _buffers(self, parameters: list[Tensor]) -> list[Tensor]:
        """Their momenta, at first zero."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]

    def _step_filters(self, parameters: list[Tensor], group: dict) -> None:
        channel_groups, momentum = group["channel_groups"], group["momentum"]
        by_shape: dict[tuple, list[Tensor]] = {}
        for parameter in parameters:
            key = (parameter.shape, parameter.is_contiguous(), parameter.dtype)
            by_shape.setdefault(key, []).append(parameter)
        alike = list(by_shape.values())
        parameters = [parameter for filters in alike for parameter in filters]

        # Nesterov's momentum, as torch.optim.SGD computes it.
        gradients, buffers = [p.grad for p in parameters], self._buffers(parameters)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)

        stacks, places = _stacks(alike, channel_groups)
        steps, step_places = _stacks(alike, channel_groups, self.dtype)
        torch._foreach_copy_(places, parameters)
        torch._foreach_copy_(step_places, updates)
        for matrices, step in zip(stacks, steps, strict=True):
            matrices.sub_(orthogonalize(step), alpha=group["lr"])
        # Back to the fixed norm: rows of length 1 on average.
        norms = [matrices.norm(dim=(1, 2), keepdim=True) for matrices in stacks]
        torch._foreach_add_(norms, EPSILON)
        torch._foreach_div_(norms, [matrices.shape[1] ** 0.5 for matrices in stacks])
        for matrices, norm in zip(stacks, norms, strict=True):
            matrices.div_(norm)
        torch._foreach_copy_(parameters, places)

    def _step_others(self, parameters: list[Tensor], group: dict) -> None:
        sgd(
            parameters,
            [parameter.grad for parameter in parameters],
            self._buffers(parameters),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=True,
            maximize=False,
            fused=parameters[0].device.type in ("cuda", "cpu"),
        )
