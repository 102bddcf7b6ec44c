"""One training in several processes, as `accelerate launch` or `torchrun` start them.

A step's micro-batches follow one another in the one stream of the data: process r of P takes numbers r, r + P, ...
Every process holds all trained parameters and all of Adam's state, and their gradients are averaged before a step.
For LoRA and mixers that is what DDP does; DDP's own hooks do not fit a backward pass inside the teacher's forward.
`linearize.distill.sharding` divides the frozen weights among the processes where one device is too small for them.
"""

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from linearize.errors import LinearizeError

__all__ = [
    "average_gradients",
    "count",
    "from_main",
    "gather",
    "greatest",
    "means",
    "open_accelerator",
    "rank",
    "same_start",
    "wait_for_main",
]

T = TypeVar("T")
BUCKET = 32 * 2**20  # bytes that are averaged at once: few messages, little memory beside the gradients
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_agreement: list[Any] = []  # the group for objects and waits, made once


def count() -> int:
    """How many processes train together; 1 where nothing was launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. count() - 1. Number 0 alone writes and prints."""
    return dist.get_rank() if count() > 1 else 0


def open_accelerator(**settings: Any) -> Accelerator:
    """The accelerator of this process; joins the other processes at the first call.

    Raises:
        LinearizeError: a launch that would not do what it says: processes that do not find each other, another kind of
            parallelism than DDP and FSDP2, a precision that needs loss scaling, or accelerate's own accumulation.
    """
    accelerator = Accelerator(**settings)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.barrier()  # who leaves first takes the meeting point along, and others never hear the reason
        raise LinearizeError(
            f"accelerate: {launched} processes were launched, but no GPU is visible here and each would train alone; "
            "set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    kind = accelerator.distributed_type.value
    if kind not in SUPPORTED:
        raise LinearizeError(f"accelerate: {kind} is not supported; use DDP (--multi_gpu) or --use_fsdp")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise LinearizeError(
            f"accelerate: mixed precision {accelerator.mixed_precision!r} needs scaled losses; use bf16 or no"
        )
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise LinearizeError(
            f"accelerate: dynamo backend {accelerator.state.dynamo_plugin.backend.value} is not supported in training; "
            "use --dynamo_backend no"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise LinearizeError(
            f"accelerate: gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; leave it at 1 and "
            "set gradient_accumulation in the recipe"
        )
    if count() > 1 and not _agreement:
        # Objects travel by CPU; and a wait for process 0, which may write texts for hours, is no hang.
        _agreement.append(dist.new_group(backend="gloo", timeout=timedelta(days=7)))
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    _agreement.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(value: T) -> T:
    """What process 0 has, in all of them. Picklable."""
    if count() == 1:
        return value
    box = [value]
    with _others_needed():
        dist.broadcast_object_list(box, src=0, group=_agreement[0])
    return box[0]


def gather(value: T) -> list[T]:
    """What every process has, by rank. Picklable."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _others_needed():
        dist.all_gather_object(found, value, group=_agreement[0])
    return found


@contextmanager
def wait_for_main() -> Iterator[None]:
    """Process 0 does what is inside first, the others after it, from the files that it left.

    A LinearizeError of process 0 is raised in all.
    """
    if count() == 1:
        yield
        return
    problem: str | None = None
    if rank() == 0:
        try:
            yield
        except LinearizeError as error:
            problem = str(error)
            raise
        finally:
            from_main(problem)
    else:
        problem = from_main(None)
        if problem is not None:
            raise LinearizeError(problem)
        yield


def means(values: Mapping[str, Tensor | float], device: torch.device | str) -> dict[str, float]:
    """Each value's mean over the processes, bit for bit the same in all; the keys are the same everywhere."""
    stacked = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in values.values()])
    if count() > 1:
        with _others_needed():
            dist.all_reduce(stacked)
        stacked /= count()
    return dict(zip(values, stacked.tolist()))


def greatest(value: float, device: torch.device | str) -> float:
    """The largest of all processes' values."""
    if count() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    with _others_needed():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in buckets of BUCKET bytes.

    A parameter without a gradient in one process counts as zeros there; without one in any it stays without.
    """
    if count() == 1:
        return
    trained = list(parameters)
    if not trained:
        return
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    with _others_needed():
        dist.all_reduce(present)
    pieces: list[Tensor] = []
    for parameter, held in zip(trained, present.tolist()):
        if held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pieces.append(parameter.grad)
    for bucket in _buckets(pieces):
        flat = torch.cat([x.reshape(-1) for x in bucket])
        with _others_needed():
            dist.all_reduce(flat)
        flat /= count()
        for gradient, mean in zip(bucket, flat.split([x.numel() for x in bucket])):
            gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def same_start(parameters: Iterable[nn.Parameter]) -> None:
    """Every process takes process 0's values."""
    if count() == 1:
        return
    for bucket in _buckets([p.detach() for p in parameters]):
        flat = torch.cat([x.reshape(-1) for x in bucket])
        with _others_needed():
            dist.broadcast(flat, src=0)
        for value, sent in zip(bucket, flat.split([x.numel() for x in bucket])):
            value.copy_(sent.view_as(value))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET bytes together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(x.nbytes for x in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and nccl, where another process is gone
        reason = " ".join(str(error).split())[:200]
        raise LinearizeError(
            f"processes: number {rank()} of {count()} has lost the others ({reason}); look for the error of the one "
            "that ended first; the same command goes on from the last checkpoint"
        ) from error
