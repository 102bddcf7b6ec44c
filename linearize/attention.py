"""The one converted attention module, for all families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from linearize.cache import NearFarLayer
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.families import Family, Geometry
from linearize.kernels.near_far import MIXERS, Mixer, near_far_attention
from linearize.kernels.near_far.documents import Documents
from linearize.kernels.near_far.mixers import accumulation_dtype, full_precision
from linearize.offload import loaded

__all__ = ["ConvertedAttention", "Mix", "Observation", "Switch"]


@dataclass(frozen=True)
class Observation:
    """What one converted layer saw in a forward pass: of the original, the material of attention transfer.

    q: (B, H, T, D), k: (B, K, T, D), after norms and rotary embedding; v: (B, K, T, V); mask: (B, T) bool, true for
    real tokens, or None where all are; documents: where several documents lie in a row, or None.
    """

    layer: "ConvertedAttention"
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    documents: Documents | None = None


@dataclass
class Switch:
    """How all converted layers of one model behave now; shared by them.

    Attributes:
        converted: False runs the original attention instead.
        far_share: None is the learned mix; 0.0 never reads the state; 1.0 reads nothing else where there is one.
        observer: called with an `Observation` by each layer. While `converted` is False, one that has computed the
            original's attention returns it, (B, H, T, V), before the output projection: a layer does not do it twice.
            Of a converted layer it sees q and k as the near side has them, and what it returns is not used.
        windows: for some layers, another window than the config's; 0 reads nothing but the state where there is one.
            For training without a cache, whose layout depends on the config's window.
    """

    converted: bool = True
    far_share: float | None = None
    observer: Callable[[Observation], Tensor | None] | None = None
    windows: dict[int, int] = field(default_factory=dict)


def _active(module: Any) -> Any:
    """Of a module that PEFT has wrapped to train a copy of it, the one of both that is in use; any other as it is."""
    if not hasattr(module, "modules_to_save"):
        return module
    names = [] if module.disable_adapters else [x for x in module.active_adapters if x in module.modules_to_save]
    return module.modules_to_save[names[0]] if names else module.original_module


class Mix(nn.Module):
    """Log-odds of the far side: bias_h + weight_h . q, a linear function of the query for each head.

    The far mass that softmax would give, sum exp(scale q.k), moves by orders of magnitude with q; a constant a head
    cannot follow it. For keys of mean mu and covariance C its logarithm is, to second order, scale q.mu + scale^2
    q.C q / 2 and a constant: the linear part is what this adds.

    weight: (H, D), 0 at the start, or None for a constant a head; bias: (H,), `start` at the start. Both float32.
    """

    def __init__(self, heads: int, head_dim: int, start: float = 0.0, of_query: bool = True):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, dtype=torch.float32)) if of_query else None
        self.bias = nn.Parameter(torch.full((heads,), start, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Back to the start."""
        if self.weight is not None:
            nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)

    def forward(self, q: Tensor) -> Tensor:
        """q: (B, H, T, D) -> (B, H, T); (H,) where the query has no say."""
        dtype = accumulation_dtype(q)
        if self.weight is None:
            return self.bias.to(dtype)
        q, weight, bias = q.to(dtype), self.weight.to(dtype), self.bias.to(dtype)[:, None]
        if q.shape[2] == 1:  # a token: fewer calls
            return (q * weight[:, None]).sum(-1) + bias
        return (q @ weight[..., None]).squeeze(-1) + bias


class ConvertedAttention(nn.Module):
    """Near-and-far attention in the place of a softmax attention.

    It adopts the original's submodules under their own names, so checkpoints, device maps and LoRA targets stay what
    they were, and adds `mixer` and `mix`, in float32. The original module itself is kept unregistered:
    it shares the weights, runs when the conversion is switched off, and is what `revert` puts back.
    """

    mixer: Mixer | None
    mix: Mix | None

    def __init__(
        self,
        original: nn.Module,
        config: LinearizeConfig,
        family: Family,
        geometry: Geometry,
        switch: Switch,
    ):
        super().__init__()
        self.layer_idx = cast(int, original.layer_idx)
        self.head_dim = geometry.head_dim
        self.scaling = cast(float, original.scaling)
        self.linearize_config = config
        self.family = family
        self.geometry = geometry
        self.qk_norm = family.qk_norm_of(original)
        self.rotates = family.rotary_if is None or bool(getattr(original, family.rotary_if))
        self.soft_cap = None if family.soft_cap is None else cast(float | None, getattr(original, family.soft_cap))
        self.switch = switch
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._original = (original,)  # in a tuple, so that it is no submodule

        self.mixer = None
        self.mix = None
        mixer_class = MIXERS[config.mixer]
        if mixer_class is not None:
            with torch.device(next(original.parameters()).device):
                scale = {} if config.feature_scale is None else {"scale": config.feature_scale}
                sizes = geometry.heads, geometry.kv_heads, geometry.head_dim, config.feature_dim
                self.mixer = mixer_class(*sizes, **scale)
                if config.mix_input != "fixed":
                    self.mix = Mix(geometry.heads, geometry.head_dim, config.mix_start, config.mix_input == "query")

    @property
    def original(self) -> nn.Module:
        """The attention module that this one replaced, with the submodules and parameters that this one has now: an
        adapter that has wrapped a projection since then counts in both."""
        original = self._original[0]
        for name in original._modules:
            original._modules[name] = self._modules[name]
        for name in original._parameters:
            original._parameters[name] = self._parameters[name]
        return original

    @property
    def output(self) -> nn.Module:
        """The output projection: a linear layer, or an adapter around one."""
        return cast(nn.Module, getattr(self, self.family.output))

    @property
    def softmax(self) -> dict[str, Any]:
        """How the original makes weights of q.k: the options `scale`, `soft_cap` and `sink_logit` of the kernels."""
        sink = None if self.family.sink is None else getattr(self, self.family.sink)
        return {"scale": self.scaling, "soft_cap": self.soft_cap, "sink_logit": sink}

    @property
    def mixer_in_use(self) -> Mixer | None:
        """The mixer, or the copy of it that PEFT's active adapter has (`modules_to_save=["mixer", "mix"]`): in its
        place PEFT has put a wrapper that passes calls on, and a mixer is not called."""
        return self.mixer if self.mixer is None or isinstance(self.mixer, Mixer) else _active(self.mixer)

    @property
    def mix_in_use(self) -> Mix | None:
        """The mix, likewise."""
        return _active(self.mix)

    def train(self, mode: bool = True) -> "ConvertedAttention":
        """As for any module; the original, which is no submodule, follows: its attention may have dropout."""
        self.original.training = mode
        return super().train(mode)

    def reset_parameters(self) -> None:
        """The untrained start: the mixer's own, and the config's mix."""
        for module in (self.mixer, self.mix):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        near_far_mask: Tensor | None = None,
        near_far_documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, hidden) -> (B, T, hidden), None.

        position_embeddings: cosines and sines, (B, T, D) each or as many channels as turn.
        near_far_mask: (B, T) bool, true for real tokens; None where all are real. near_far_documents: where several
        documents lie in a row; each is a sequence of its own. `attention_mask` is the original's
        4-D mask and is used only when the conversion is off.
        """
        if self.family.cache in kwargs:
            past_key_values = kwargs.pop(self.family.cache)
        if not self.family.hands_down:  # see `linearize.convert`
            *position_embeddings, near_far_mask, near_far_documents = position_embeddings
        if not self.switch.converted:
            if self.switch.observer is not None:
                q, k, v = self._project(hidden_states)
                q, k = self._rotate(position_embeddings, q, k)
                with full_precision(q):
                    seen = Observation(self, q.to(v.dtype), k.to(v.dtype), v, near_far_mask, near_far_documents)
                    out = self.switch.observer(seen)
                if out is not None:
                    return self.output(out.to(v.dtype).transpose(1, 2).flatten(2)), None
            return self.original(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{self.family.cache: past_key_values},
                **kwargs,
            )
        q, k, v = self._project(hidden_states)
        plain = q, k
        q, k = self._rotate(position_embeddings, q, k)
        # Under autocast the rotary embedding widens what the projections narrowed.
        q, k = q.to(v.dtype), k.to(v.dtype)
        mixer = self.mixer_in_use
        with full_precision(q), loaded(mixer):
            if self.switch.observer is not None:
                self.switch.observer(Observation(self, q, k, v, near_far_mask, near_far_documents))
            logit = self.mix_logit(q)
            if mixer is not None and not mixer.rotary:
                q, k = (torch.cat([x, y.to(x.dtype)], dim=-1) for x, y in zip((q, k), plain, strict=True))
            out = self._attend(q, k, v, mixer, logit, past_key_values, near_far_mask, near_far_documents)
        out = out.transpose(1, 2).flatten(2)
        return self.output(out), None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mixer: Mixer | None,
        mix_logit: Tensor | None,
        past_key_values: Any,
        near_far_mask: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """Near-and-far attention (B, H, T, V), of the whole text or as a step of the cache."""
        options: dict[str, Any] = {
            # `or`: a window of 0 is the config's, and the mix leaves it unread.
            "window": self.switch.windows.get(self.layer_idx) or self.linearize_config.window,
            "sinks": self.linearize_config.sinks,
            "mix": self.linearize_config.mix,
            "mask": near_far_mask,
            **self.softmax,
        }
        if past_key_values is None:
            return near_far_attention(q, k, v, mixer, mix_logit, **options, cu_seqlens=documents)
        layer = past_key_values.layers[self.layer_idx]
        if not isinstance(layer, NearFarLayer):
            raise LinearizeError(
                f"cache: layer {self.layer_idx} is a {type(layer).__name__}, which a converted layer cannot use; "
                "call the model as a whole, which gives a cache its layers"
            )
        return layer.step(q, k, v, mixer, mix_logit, **options)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """q (B, H, T, D), k and v (B, K, T, D), as the original attention has them before the rotary embedding."""
        made = [getattr(self, name)(hidden_states) for name in self.family.projections]
        heads, kv_heads = self.geometry.heads, self.geometry.kv_heads
        if self.family.fused == "heads":
            made = made[0].unflatten(-1, (heads, 3, self.head_dim)).unbind(-2)
        elif self.family.fused == "blocks":
            made = made[0].split([n * self.head_dim for n in (heads, kv_heads, kv_heads)], dim=-1)
        norms = [getattr(self, name) for name in self.family.norms] if self.qk_norm else []
        if self.qk_norm == "whole":
            made = [norms[0](made[0]), norms[1](made[1]), made[2]]
        if self.family.fused != "heads":
            made = [x.unflatten(-1, (-1, self.head_dim)) for x in made]
        if self.qk_norm == "head":
            made = [norms[0](made[0]), norms[1](made[1]), made[2]]
        q, k, v = (x.transpose(1, 2) for x in made)
        if self.qk_norm == "transposed":
            q, k = norms[0](q), norms[1](k)
        return q, k, v

    def _rotate(self, position_embeddings: tuple[Tensor, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        """q and k (B, heads, T, D) after the rotary embedding, which may turn the first channels of a head only."""
        if not self.rotates:
            return tensors
        cos, sin = (x[:, None] for x in position_embeddings)
        if self.family.rotary == "once":
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        quarter = _quarter_pairs if self.family.rotary == "pairs" else _quarter_halves
        size = cos.shape[-1]
        turned = (x[..., :size] * cos + quarter(x[..., :size]) * sin for x in tensors)
        if size == self.head_dim:
            return tuple(turned)
        return tuple(torch.cat([y, x[..., size:].to(y.dtype)], dim=-1) for x, y in zip(tensors, turned, strict=True))

    def mix_logit(self, q: Tensor) -> Tensor | None:
        """Log-odds of the far side: the mix's for q (B, H, T, D), or what the switch puts in its place (H,)."""
        if self.mixer is None:
            return None
        far_share = 1.0 if self.switch.windows.get(self.layer_idx) == 0 else self.switch.far_share
        if far_share is None and self.mix is not None:
            return self.mix(q)
        if far_share is None:
            logit = self.linearize_config.mix_start
        else:
            # Log-odds of certainty. Finite on the far side, so that an empty state (log mass -inf) still has no share.
            logit = 1e30 if far_share else -torch.inf
        return torch.full(q.shape[1:2], logit, dtype=accumulation_dtype(q), device=q.device)


def _quarter_halves(x: Tensor) -> Tensor:
    """(..., D): the second half negated, before the first (rotary embedding, arXiv 2104.09864, in halves)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _quarter_pairs(x: Tensor) -> Tensor:
    """(..., D): of each two neighbours the second negated, before the first (the same, in pairs)."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
