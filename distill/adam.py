"""AdamW as every stage uses it: float32 masters of half-precision parameters, gradients averaged over processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from linearize.distill.processes import average_gradients

__all__ = ["Adam"]

HALF = (torch.float16, torch.bfloat16)


class Adam(torch.optim.AdamW):
    """AdamW without weight decay of named parameters; the training loop sets the learning rate, times `lr_scale` of a
    parameter's name.

    A bfloat16 weight near 1 moves in steps of 1/128: adding an update of 1e-4 to it changes nothing, however often. So
    a parameter in half precision has a float32 copy, the master, which takes the updates; the parameter is the master
    rounded. Its gradients are summed in float32 too, batch by batch, and its own `grad` stays None.

    Attributes:
        trained: what Adam updates and checkpoints keep, by name: the masters, and the other parameters themselves.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], lr_scale: Callable[[str], float] = lambda name: 1.0):
        self.trained: dict[str, nn.Parameter] = {}
        self._rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._hooks: list[Any] = []
        self._averaged = False
        for name, parameter in parameters.items():
            master = parameter
            if parameter.dtype in HALF:
                master = nn.Parameter(parameter.detach().float())
                self._rounded.append((parameter, master))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_move_gradient_to(master)))
            self.trained[name] = master
        groups = [{"params": [p], "scale": lr_scale(name)} for name, p in self.trained.items()]
        super().__init__(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def average(self) -> None:
        """Make every gradient the mean over all processes; nothing if that is done since `zero_grad`."""
        if not self._averaged:
            average_gradients(self.trained.values())
            self._averaged = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update by the mean of all processes' gradients."""
        assert closure is None, "stages compute their losses themselves"
        self.average()
        super().step()
        self.round()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._averaged = False

    @torch.no_grad()
    def round(self) -> None:
        """Give the half-precision parameters the values of their masters."""
        for parameter, master in self._rounded:
            parameter.copy_(master)

    def close(self) -> None:
        """Gradients are the parameters' own again."""
        for hook in self._hooks:
            hook.remove()


def _move_gradient_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def move(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None, "the hook runs after a gradient was accumulated"
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.grad = None

    return move
