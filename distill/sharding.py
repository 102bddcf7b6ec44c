"""FSDP2 for models whose frozen weights do not fit one device.

The frozen weights of the decoder's layers are divided among the processes, and a layer's are gathered while it runs,
forward and backward. What is trained (mixers, mixes, LoRA, chosen parameters) is small, stays whole everywhere and is
averaged by `linearize.distill.processes`; so do the embedding, the head and the last norm, which run outside the
layers. Nothing but gathers is asked of the processes, so gloo on CPUs does as well as nccl on GPUs.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from linearize.convert import added_parameters, base_model
from linearize.distill import processes
from linearize.errors import LinearizeError
from linearize.families import family_of
from linearize.fingerprint import weight_sample

__all__ = ["is_sharded", "shard_frozen", "wants_sharding"]


def wants_sharding() -> bool:
    """Whether the launch asks for FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`).

    Raises:
        LinearizeError: FSDP of version 1, or settings of it that would have no effect here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise LinearizeError("accelerate: FSDP version 1 is not supported; add --fsdp_version 2")
    for name, instead in (
        ("OFFLOAD_PARAMS", "launch more processes, or use a smaller batch_size"),
        ("ACTIVATION_CHECKPOINTING", "set checkpointing in the recipe's distill stage"),
    ):
        if os.environ.get(f"FSDP_{name}", "false").lower() == "true":
            raise LinearizeError(f"accelerate: fsdp_{name.lower()} is not supported; leave it off, and {instead}")
    return True


def is_sharded(model: Any) -> bool:
    """Whether the frozen weights of the model are divided among processes."""
    return any(isinstance(module, FSDPModule) for module in base_model(model).modules())


def shard_frozen(model: Any) -> None:
    """Divide the frozen weights of the decoder's layers among the processes, where the launch asks for FSDP2.

    Call it after the parameters to train have `requires_grad`. The model may lie on the CPU: a layer's weights go to
    the process's GPU one after the other. A model that is sharded already stays so, with whatever was added to it.

    Raises:
        LinearizeError: parameters are to be trained that an earlier stage has sharded.
    """
    base = base_model(model)
    if is_sharded(base):
        trained = [name for name, p in base.named_parameters() if p.requires_grad and hasattr(p, "device_mesh")]
        if trained:
            raise LinearizeError(
                f"stages: {trained[0]!r} was frozen in an earlier stage and is sharded now; train lora, or launch "
                "without --use_fsdp"
            )
        return
    if not wants_sharding() or processes.count() == 1:
        return
    family = family_of(base.config)
    decoder = base.get_submodule(family.decoder)
    layers = base.get_submodule(family.layers)
    # Sharded weights are not to be looked into; frozen, they stay what they are.
    base._linearize_sharded_sample = weight_sample(base)
    added = {id(p) for p in added_parameters(base).values()}
    whole = {p for name, p in base.named_parameters() if p.requires_grad or id(p) in added or ".lora_" in name}
    device = f"cuda:{torch.cuda.current_device()}" if torch.distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(torch.device(device).type, (processes.count(),))
    for layer in layers.children():
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    inside = {id(p) for p in layers.parameters()}
    fully_shard(decoder, mesh=mesh, ignored_params=whole | {p for p in decoder.parameters() if id(p) not in inside})
    with torch.no_grad():
        for module in base.modules():
            for parameter in module.parameters(recurse=False):
                if parameter in whole or id(parameter) not in inside:
                    _move(parameter, device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


def _move(parameter: nn.Parameter, device: str) -> None:
    if not hasattr(parameter, "device_mesh") and parameter.device != torch.device(device):
        parameter.data = parameter.data.to(device)
