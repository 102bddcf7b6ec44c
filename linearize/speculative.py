"""Lossless speculative decoding: a student drafts at a constant cost a token, its original decides.

A block is k tokens that the student drafts one by one, and one forward pass of the original over them (arXiv
2211.17192). The original's logits at the k + 1 places say how many of the drafted tokens stand, and give one more
token for nothing: its own in place of the first that does not stand, or the next one where all do. Both models have a
cache of their own, which forgets what did not stand.

    text so far          ... a b
    student drafts           c d e         reads b c d
    original decides         c d x         reads b c d e: c and d stand, e does not, x is the original's
    both caches          ... a b c d       x is read with the next block
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from linearize.cache import NearFarLayer, new_cache
from linearize.convert import base_model, converted_layers, is_converted, original_attention, switch_of
from linearize.errors import LinearizeError
from linearize.families import own_window
from linearize.growing import growing_cache
from linearize.packed_attention import packed_attention

__all__ = ["Speculation", "speculative_generate"]

AUTO = "auto"
# Where the length adapts: of the first block.
FIRST_DRAFT = 4
# Up to so many tokens in a pass, all of them get logits.
FEW_LOGITS = 64


@dataclass(frozen=True)
class Speculation:
    """What `speculative_generate` returns.

    Attributes:
        sequences: LongTensor (1, T + n): the input and n new tokens, as `generate` returns them.
        new_tokens: n.
        drafted: how many tokens the student drafted, a number for each block.
        accepted: how many of these stand in `sequences`. The first token comes with the prompt, before any block.
        margins: greedy: for each new token, how far its logit lies above the original's second largest. None where
            tokens are sampled.
        prefill_seconds: of reading the prompt, by both models.
        draft_seconds, verify_seconds: of the student's and the original's part of all blocks.
    """

    sequences: Tensor
    new_tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    margins: tuple[float, ...] | None
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float

    @property
    def acceptance_length(self) -> float | None:
        """New tokens of a block on average: 1 is what the original gives alone. None without a block."""
        return (self.new_tokens - 1) / len(self.drafted) if self.drafted else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that stand; None where nothing was drafted."""
        drafted = sum(self.drafted)
        return sum(self.accepted) / drafted if drafted else None


@torch.no_grad()
def speculative_generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: int | str = AUTO,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    original: Any = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continue a text as a student's original would, in fewer passes of the original.

    The original is the same weights with the conversion switched off, and without the LoRA that was trained on the
    student: load that unmerged (`linearize.load(folder, merge=False)`). There is one set of weights in memory.

    Greedy (the default), every token is the one with the largest logit in the original's pass over its block, given
    all tokens before: token for token what the original generates by itself. A pass over several tokens adds up in
    another order than passes over single ones, so where the original's two largest logits differ by no more than
    rounding, either token may come, as it may from `generate` with another batch size or cache; what follows then
    follows from that token. `Speculation.margins` shows where this can have been: a float32 model's logits round by
    some 1e-5, a bfloat16 model's by a tenth, so that there the text is one of the original's greedy texts rather than
    the one that a certain way of running it gives. Sampled tokens have the original's distribution under the same
    `temperature`, `top_k` and `top_p`, in the same sense; the draws are others than `generate` makes by the same seed.

    Args:
        model: a converted model, or a PeftModel around one.
        input_ids: LongTensor (1, T), the prompt.
        attention_mask: (1, T), 0 for padding, which is left out; None where all tokens are real.
        max_new_tokens: the longest answer.
        draft_tokens: k, from 1 to the window W, which is as far as a student's cache can go back; "auto" begins with
            4, and takes one more after a block that stands whole and one less after any other.
        do_sample: sample instead of taking the likeliest token.
        temperature, top_k, top_p: with `do_sample`, as transformers applies them; None leaves one out. Nothing but
            the end of text is read from the model's generation config.
        eos_token_id: one or several tokens that end the text; None takes the generation config's, [] has none.
        original: the original as a model of its own, for a student whose weights were trained in full or whose LoRA
            is merged; None is what is said above.
        streamer: as for `generate`: gets the prompt, then each new token once, as soon as it stands.
        generator: of all random numbers; None is PyTorch's own.

    Raises:
        LinearizeError: a model that is not converted, more than one row, an empty prompt, or a setting out of range.
    """
    window = _check_model(model, original)
    _check_sliding(base_model(model))
    _check_count("max_new_tokens", max_new_tokens)
    if draft_tokens != AUTO:
        _check_count("draft_tokens", draft_tokens, window)
    warps: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rule = _Sampled(_warpers(**warps), generator) if do_sample else _greedy(**warps)
    text = _prompt(input_ids, attention_mask)
    base = base_model(model)
    ends = _end_tokens(base.generation_config.eos_token_id if eos_token_id is None else eos_token_id)
    student = _Reader(lambda: nullcontext(model), new_cache(base.config, list(converted_layers(base))), base.device)
    if original is None:
        adapters = _adapters(model)
        verifier = _Reader(lambda: _as_original(model, adapters), growing_cache(base.config), base.device)
    else:
        config = base_model(original).config
        verifier = _Reader(lambda: nullcontext(original), growing_cache(config), base.device)

    if streamer is not None:
        streamer.put(input_ids.cpu())

    def put(tokens: list[int]) -> None:
        for token in tokens if streamer is not None else ():
            streamer.put(torch.tensor([token]))

    length = min(FIRST_DRAFT, window) if draft_tokens == AUTO else int(draft_tokens)
    most = window if draft_tokens == AUTO else None
    found = _write(student, verifier, rule, text, max_new_tokens, length, most, ends, put)
    if streamer is not None:
        streamer.end()
    written = torch.tensor([found.tokens], dtype=input_ids.dtype, device=input_ids.device)
    return Speculation(
        sequences=torch.cat([input_ids, written], dim=1),
        new_tokens=len(found.tokens),
        drafted=tuple(found.drafted),
        accepted=tuple(found.accepted),
        margins=None if do_sample else tuple(found.margins),
        prefill_seconds=found.seconds["prefill"],
        draft_seconds=found.seconds["draft"],
        verify_seconds=found.seconds["verify"],
    )


def _check_sliding(model: Any) -> None:
    """Layers with a sliding window of their own are asked for several tokens in a row before anything is taken back;
    transformers had that wrong before 5.23.

    Raises:
        LinearizeError: a model with such layers under a transformers that hands them more keys than their masks know.
    """
    if all(own_window(model.config, layer) is None for layer in range(model.config.num_hidden_layers)):
        return
    layer, token = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    for _ in range(3):
        keys, _ = layer.update(token, token)
    if keys.shape[2] != 2:
        raise LinearizeError(
            f"speculative_generate: {type(model).__name__} has layers with a sliding window, whose cache transformers "
            f"{transformers.__version__} cannot read token by token before it is taken back; update transformers"
        )


@dataclass
class _Written:
    """New tokens and how they came; the names are `Speculation`'s."""

    tokens: list[int]
    margins: list[float]
    drafted: list[int]
    accepted: list[int]
    seconds: dict[str, float]


def _write(
    student: "_Reader",
    verifier: "_Reader",
    rule: "_Greedy | _Sampled",
    prompt: list[int],
    max_new_tokens: int,
    length: int,
    most: int | None,
    ends: set[int],
    put: Callable[[list[int]], None],
) -> _Written:
    """Read the prompt, then draft and decide until the text ends.

    length: of the first draft; it adapts, up to `most`, or stays where that is None. put: gets each new token once.
    """
    text, found = list(prompt), _Written([], [], [], [], {"prefill": 0.0, "draft": 0.0, "verify": 0.0})
    with _timed(found.seconds, "prefill", verifier.device):
        student.read(text)
        decided, margins = rule.judge([], [], verifier.read(text))
        student.expect_rollback()
        verifier.expect_rollback()
    while True:
        text += decided
        found.tokens += decided
        found.margins += margins
        put(decided)
        left = max_new_tokens - len(found.tokens)
        if not left or text[-1] in ends:
            return found
        count = min(length, left - 1)  # a block gives one token more than it has drafts
        with _timed(found.seconds, "draft", verifier.device):
            drafts, chances = _draft(student, text, count, rule)
        with _timed(found.seconds, "verify", verifier.device):
            logits = verifier.read(text[verifier.seen :] + drafts, last=count + 1)
            decided, margins = rule.judge(drafts, chances, logits)
            stood = len(decided) - 1
            for reader in (student, verifier):
                reader.keep(len(text) + stood)
        decided = _until_end(decided, ends)
        margins = margins[: len(decided)]
        found.drafted.append(count)
        found.accepted.append(min(stood, len(decided)))
        if most is not None and count == length:
            length = min(length + 1, most) if stood == count else max(length - 1, 1)


class _Reader:
    """A model and the cache of the tokens that it has read, `seen` of them."""

    def __init__(self, enter: Callable[[], AbstractContextManager[Any]], cache: DynamicCache, device: torch.device):
        self.enter = enter
        self.cache = cache
        self.device = device
        self.seen = 0

    def read(self, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Read the tokens that come next; the float32 logits after the `last` of them, (last, vocabulary)."""
        ids = torch.tensor([tokens], device=self.device)
        # The last of a few hidden states are a slice, for which PyTorch's product with the language head copies the
        # whole weight first; the rest of their logits costs less.
        kept = len(tokens) if len(tokens) <= FEW_LOGITS else last
        with self.enter() as model, packed_attention(model):
            out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=kept)
        self.seen += len(tokens)
        return out.logits[0, -last:].float()

    def expect_rollback(self) -> None:
        """Tell the layers that need to know it from now on: those with a sliding window of the model's own, and of
        converted ones those of mixer `gla`. The others go back by W tokens as they are, without a copy a block."""
        for layer in self.cache.layers:
            if hasattr(layer, "activate_past_recording") and not (
                isinstance(layer, NearFarLayer) and layer.is_croppable
            ):
                layer.activate_past_recording()

    def keep(self, tokens: int) -> None:
        """Forget all but the first so many tokens; to be called after each block."""
        forgotten = max(self.seen - tokens, 0)
        self.cache.crop(-forgotten)  # also of 0: a layer that was told drops here what it kept for this
        self.seen -= forgotten


class _Greedy:
    """The likeliest token each time."""

    def draw(self, logits: Tensor) -> tuple[int, None]:
        """The token after logits (1, vocabulary)."""
        return int(logits.argmax()), None

    def judge(self, drafts: list[int], chances: list[None], logits: Tensor) -> tuple[list[int], list[float]]:
        """The drafts that stand and the original's next token, and the margin of each; logits (k + 1, vocabulary)."""
        chosen = logits.argmax(-1).tolist()
        stood = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        first, second = logits[: stood + 1].topk(2, dim=-1).values.unbind(-1)
        return chosen[: stood + 1], (first - second).tolist()


class _Sampled:
    """Tokens drawn by the student's chances q, kept or replaced so that they are distributed as the original's p.

    A drafted token x stands with probability min(1, p(x) / q(x)); the first that does not is replaced by a draw from
    (p - q)+, normalised (arXiv 2211.17192, algorithm 1).
    """

    def __init__(self, warpers: LogitsProcessorList, generator: torch.Generator | None):
        self.warpers = warpers
        self.generator = generator

    def draw(self, logits: Tensor) -> tuple[int, Tensor]:
        """A token after logits (1, vocabulary), and the chances (vocabulary,) that it was drawn by."""
        (chances,) = self._chances(logits)
        return self._one_of(chances), chances

    def judge(self, drafts: list[int], chances: list[Tensor], logits: Tensor) -> tuple[list[int], list[float]]:
        """The drafts that stand and one more token; no margins. chances: q of each; logits (k + 1, vocabulary)."""
        p = self._chances(logits)
        for i, (draft, q) in enumerate(zip(drafts, chances, strict=True)):
            drawn = torch.rand((), generator=self.generator, device=p.device)
            if not drawn * q[draft] < p[i, draft]:  # not <=: what the original never says cannot stand
                rest = (p[i] - q).clamp_min(0)
                # Mathematically there is a rest wherever a draft falls; p and q that differ by rounding may leave none.
                return [*drafts[:i], self._one_of(rest if rest.any() else p[i])], []
        return [*drafts, self._one_of(p[-1])], []

    def _chances(self, logits: Tensor) -> Tensor:
        # None of the three looks at the tokens before.
        return self.warpers(None, logits).softmax(-1)

    def _one_of(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))


def _adapters(model: Any) -> list[Any]:
    """The modules in which PEFT has put something beside the model's own weights."""
    return [module for module in model.modules() if hasattr(module, "disable_adapters")]


@contextmanager
def _as_original(model: Any, adapters: list[Any]) -> Iterator[Any]:
    """Inside, the original: no adapters, no conversion. PEFT's own `disable_adapter` first takes stock of the whole
    model, and takes longer than a token."""
    before = [module.disable_adapters for module in adapters]
    try:
        for module in adapters:
            module._disable_adapters = True
        if not all(module.disable_adapters for module in adapters):
            raise RuntimeError("this version of PEFT does not let its adapters be disabled one by one")
        with original_attention(model):
            yield model
    finally:
        for module, disabled in zip(adapters, before, strict=True):
            module._disable_adapters = disabled


def _draft(student: _Reader, text: list[int], count: int, rule: Any) -> tuple[list[int], list[Any]]:
    """`count` tokens after the text, and what `rule.draw` says of each. The student reads what it has not seen: all
    but the last draft."""
    drafts: list[int] = []
    chances = []
    for _ in range(count):
        token, chance = rule.draw(student.read([*text, *drafts][student.seen :]))
        drafts.append(token)
        chances.append(chance)
    return drafts, chances


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends the text, that one included."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


@contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Adds to `seconds[name]`."""
    begun = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] += time.perf_counter() - begun


def _check_model(model: Any, original: Any) -> int:
    """The window of a model that can draft for this original.

    Raises:
        LinearizeError: it cannot.
    """
    switch_of(model)  # refuses a model that is not converted
    if original is not None:
        if is_converted(original):
            raise LinearizeError("original: it is converted itself; give the original, or leave it out")
        sizes = [base_model(one).config.vocab_size for one in (original, model)]
        if sizes[0] != sizes[1]:
            raise LinearizeError(
                f"original: it has {sizes[0]} tokens but the student has {sizes[1]}; give the model that was converted"
            )
    return next(iter(converted_layers(model).values())).linearize_config.window


def _prompt(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """The real tokens of one row."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise LinearizeError(
            f"input_ids: {tuple(input_ids.shape)} is not (1, tokens), and of a draft each row would keep another part; "
            "call it once for each row"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise LinearizeError(
            f"attention_mask: {tuple(attention_mask.shape)} is not {tuple(input_ids.shape)} as the input_ids; give one "
            "number for each token"
        )
    ids = input_ids[0] if attention_mask is None else input_ids[0][attention_mask[0].bool()]
    if not len(ids):
        raise LinearizeError("input_ids: there is no token; give at least one")
    return ids.tolist()


def _check_count(name: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LinearizeError(f"{name}: {value!r} is not an integer >= 1; give a number of tokens")
    if most is not None and value > most:
        raise LinearizeError(
            f"{name}: {value} exceeds the window {most}, which is as far as a student's cache goes back; use {most} or "
            "less"
        )


def _greedy(**warps: float | None) -> _Greedy:
    for name, value in warps.items():
        if value is not None:
            raise LinearizeError(f"{name}: {value!r} is for sampling; add do_sample=True, or leave it out")
    return _Greedy()


def _warpers(temperature: float | None, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` applies them."""
    warpers = LogitsProcessorList()
    try:
        if temperature is not None:
            warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            warpers.append(TopPLogitsWarper(float(top_p)))
    except ValueError as error:  # each names its setting, the value and the limit
        raise LinearizeError(f"do_sample: {error}; leave that setting out, or give it another value") from error
    return warpers


def _end_tokens(given: int | Sequence[int] | None) -> set[int]:
    if given is None:
        return set()
    return {given} if isinstance(given, int) else {int(token) for token in given}
