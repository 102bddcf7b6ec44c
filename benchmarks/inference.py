"""What every measurement does around a model: evaluation mode, no gradients, progress on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.convert import base_model
from linearize.errors import LinearizeError

__all__ = [
    "POSITIONS_AT_ONCE",
    "TOKENS_AT_ONCE",
    "Rows",
    "device_of",
    "hidden_states",
    "inference",
    "output_head",
    "progress_bar",
]

# Tokens of one forward pass: enough to keep the processor busy, few enough for the activations to stay small.
TOKENS_AT_ONCE = 2048
# Positions whose float32 logits are held at once: 256 x 49k entries are 50 MB.
POSITIONS_AT_ONCE = 256

# A row's name -> a function without arguments whose context manager yields the model of that row.
Rows = dict[str, Callable[[], AbstractContextManager[Any]]]


@contextmanager
def inference(
    model: nn.Module, without_gradients: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its former mode back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with without_gradients():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, which is where its inputs go."""
    return next(model.parameters()).device


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns the last hidden states into logits."""
    return base_model(model).get_output_embeddings()


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model's output head reads, for all positions; logits of some positions are then cheap, and those of
    all never stand in memory together.

    Args:
        model: a causal language model of transformers. Call it inside `inference`.
        ids: LongTensor (B, T). Rows that end earlier may hold anything behind their end: nothing before sees it.

    Returns:
        (B, T, hidden) in the model's dtype; `output_head(model)` makes logits of them.

    Raises:
        LinearizeError: the model does something else to its logits after the head, such as capping them.
    """
    caught: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(args[0])
        # Contiguous: PyTorch multiplies a strided slice by a copy of the head's weight for each row of the batch.
        return (args[0][:, -1:].contiguous(),)

    head = output_head(model)
    handle = head.register_forward_pre_hook(keep)
    try:
        last = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    again = head(caught[0][:, -1:].contiguous()) if caught else last
    if len(caught) != 1 or not torch.allclose(again.to(last.dtype), last, equal_nan=True):
        raise LinearizeError(
            f"model: the logits of {type(base_model(model)).__name__} are not what its output embedding gives; "
            "evaluation needs a model without a function after it"
        )
    return caught[0]


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, silent where stderr is no terminal. Yields a function: one step done, and what comes now."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)

        def advance(now: str) -> None:
            bar.update(task, advance=1, description=f"{description}: {now}")

        yield advance
