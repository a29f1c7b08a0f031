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

# The quintic of Jordan et al.: it brings singular values between about 0.7 and 1.2 in few steps,
# faster than the classical one brings them to 1. Three steps are enough here, as in airbench.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 3
EPSILON = 1e-7  # a gradient of zeros stays zero


def orthogonalize(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Brings the singular values of each matrix towards 1 and leaves its directions alone.

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
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


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
            step = self._step_filters if group["channel_groups"] else self._step_other
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step(parameter, group)
        return loss

    def _nesterov(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """The gradient with momentum, as torch.optim.SGD(nesterov=True) computes it."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient.add(buffer, alpha=momentum)

    def _step_filters(self, parameter: Tensor, group: dict) -> None:
        channel_groups = group["channel_groups"]
        rows = len(parameter) // channel_groups
        update = self._nesterov(parameter, parameter.grad, group["momentum"])
        matrices = update.reshape(channel_groups, rows, -1)
        if rows == 1:  # the orthogonal matrix nearest to a row is the row at length 1
            step = matrices / (matrices.norm(dim=2, keepdim=True) + EPSILON)
        else:
            step = orthogonalize(matrices.to(self.dtype)).to(parameter.dtype)
        parameter.sub_(group["lr"] * step.reshape(parameter.shape))
        norms = parameter.reshape(channel_groups, -1).norm(dim=1)
        scales = (rows**0.5 / (norms + EPSILON)).repeat_interleave(rows)
        parameter.mul_(scales.view(-1, 1, 1, 1))

    def _step_other(self, parameter: Tensor, group: dict) -> None:
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
        update = self._nesterov(parameter, gradient, group["momentum"])
        parameter.sub_(group["lr"] * update)
