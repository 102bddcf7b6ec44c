"""Near attention beside a recurrent branch: the whole text, and a step of decoding.

The window and its memory are those of a layer without a state; the state is the `Recurrent` mixer's, which reads and
writes it at every token. So a `Memory` here holds sinks, near keys and values as always, and the state of every token
so far, not only of those that have left the window.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import choose_backend
from .checks import check_documents, check_inputs
from .documents import Documents
from .memory import Memory, near_far_step
from .mixers import Recurrent, State, full_precision, near_part
from .ops import near_far_attention

__all__ = ["recurrent_attention", "recurrent_step"]


def recurrent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Recurrent,
    mix_logit: Tensor | None,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | Documents | None,
    backend: str,
    **options: Any,
) -> Tensor:
    """`near_far_attention` for a `Recurrent` mixer; arguments as there."""
    if not torch.compiler.is_compiling():
        _check(q, k, v, mixer, mix_logit, mask, backend, "near_far_attention", options)
        check_documents(cu_seqlens, q, mask)
    near = near_far_attention(
        near_part(mixer, q),
        near_part(mixer, k),
        v,
        **_near(options),
        mask=mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    if not q.shape[0]:
        return near
    begins = None if cu_seqlens is None else _begins(cu_seqlens, q)
    with full_precision(q):
        value, _ = mixer.attend(q, k, v, mask=mask, begins=begins, backend=_engine(backend))
        return _blend(near, value, mix_logit)


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    mixer: Recurrent,
    mix_logit: Tensor | None,
    *,
    mask: Tensor | None,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Memory]:
    """`near_far_step` for a `Recurrent` mixer; arguments as there."""
    if not torch.compiler.is_compiling():
        _check(q, k, v, mixer, mix_logit, mask, backend, "near_far_step", options)
    state = memory.state
    if state is None or state.s.shape != (v.shape[0], v.shape[1], mixer.num_features, v.shape[3]):
        from linearize.errors import LinearizeError

        held = "no state" if state is None else f"a state of shape {tuple(state.s.shape)}"
        raise LinearizeError(
            f"near_far_step: the memory holds {held}, and mixer {type(mixer).__name__} needs "
            f"{(v.shape[0], v.shape[1], mixer.num_features, v.shape[3])}; start with Memory.empty for it"
        )
    near, after = near_far_step(
        near_part(mixer, q),
        near_part(mixer, k),
        v,
        replace(memory, state=None),
        **_near(options),
        mask=mask,
        backend=backend,
    )
    with full_precision(q):
        value, last = mixer.attend(q, k, v, state, mask=mask, backend=_engine(backend))
        if (q.shape[2] == 1 and not torch.is_grad_enabled()) or memory.static:
            state.s.copy_(last.s.detach())  # in place, as all of a memory at one token
        else:
            # A copy: it may be a view of the states of all chunks, which would be kept alive with it.
            state = State(last.s.detach().to(state.s.dtype, copy=True), state.z)
        return _blend(near, value, mix_logit), replace(after, state=state)


def _near(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the near side, which knows nothing of a mix."""
    return {name: value for name, value in options.items() if name != "mix"}


def _blend(near: Tensor, value: Tensor, mix_logit: Tensor | None) -> Tensor:
    """(1 - r) near + r value, in near's dtype."""
    if mix_logit is None:
        mix_logit = value.new_zeros(value.shape[1])
    share = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(value.dtype).sigmoid()
    return torch.lerp(near.to(value.dtype), value, share[..., None]).to(near.dtype)


def _begins(documents: Tensor | Documents, q: Tensor) -> Tensor:
    """(B, T) bool: the first token of every document."""
    if isinstance(documents, Documents):
        return documents.positions == 0
    begins = torch.zeros(q.shape[0], q.shape[2] + 1, dtype=torch.bool, device=q.device)
    return begins.index_fill(1, documents.long(), True)[:, :-1]  # a document of no tokens may begin at the end


def _engine(backend: str) -> str:
    """The backend of the recurrent branch; its kernels are flash-linear-attention's, taken where they can run."""
    return backend if backend in ("reference", "torch") else "auto"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: Recurrent,
    mix_logit: Tensor | None,
    mask: Tensor | None,
    backend: str,
    function: str,
    options: dict[str, Any],
) -> None:
    from linearize.errors import LinearizeError

    window, sinks, mix = options["window"], options["sinks"], options["mix"]
    check_inputs(q, k, v, mixer, mix_logit, window, sinks, mix, mask, backend, function=function)
    name = type(mixer).__name__
    if mix != "gate":
        raise LinearizeError(
            f"{function}: mix {mix!r} weighs by a mass, and the state of {name} has none; use mix 'gate'"
        )
    if backend == "triton":
        choose_backend(backend, q, v, 0, f"{name} has a state of every token, which the kernels do not keep")
