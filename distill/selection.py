"""What a layer is worth as softmax: one score a layer, from a few thousand tokens.

Three measurements of the original, on rows without padding. Each compares softmax attention with the free baseline,
window + sinks, because a state's quality is not known before it is trained:

- `lazy_scores`: the attention mass that falls outside. One forward pass for all layers.
- `swap_scores`: KL(original || model) when this one layer is converted. Half a forward pass a layer and row.
- `recall_scores`: the same KL where a number is repeated that was said long before.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.attention import Observation, Switch
from linearize.convert import base_model, converted_layers, original_attention
from linearize.distill.data import TokenStream
from linearize.distill.logit_losses import kl_divergence
from linearize.distill.objectives import FarTarget, check_far_queries
from linearize.distill.transfer import observe
from linearize.errors import LinearizeError
from linearize.families import family_of

__all__ = [
    "Facts",
    "build_facts",
    "draw_facts",
    "draw_texts",
    "lazy_scores",
    "only_converted",
    "recall_scores",
    "swap_scores",
]

ROWS_AT_ONCE = 256  # tokens whose logits are in float32 at a time
LEAD = 16  # tokens of text before the first number and after each: no sink is one of a number's tokens
PLACES = ("Oslo", "Madrid", "Cairo", "Lima", "Paris", "Tokyo", "Berlin", "Rome")
FACT = "\nNote: the code for {place} is {number}.\n"
QUESTION = "\nRecall the note: the code for {place} is"


@dataclass(frozen=True)
class Facts:
    """A text that says some numbers early and repeats them at its end.

    tokens: (1, T) int64; answers: the positions of the numbers' tokens at the end, one list a number.
    """

    tokens: Tensor
    answers: tuple[tuple[int, ...], ...]

    @property
    def positions(self) -> Tensor:
        """(n,) int64, those of all answers."""
        return torch.tensor([position for answer in self.answers for position in answer])


def lazy_scores(model: Any, rows: Sequence[Tensor]) -> dict[int, float]:
    """The share of attention that converting a layer would cut off: 1 - rho, mean over heads and queries.

    Queries without far keys do not count. LightTransfer calls layers with little of it lazy and converts those.

    Args:
        model: converted, on any device. Its original attention runs.
        rows: token ids (B, T), int64, without padding.

    Raises:
        LinearizeError: rows so short that nothing has left the window.
    """
    total: dict[int, float] = {}

    def add(seen: Observation) -> None:
        target = FarTarget(seen)
        count = target.counted.sum() * target.far_share.shape[1]
        share = (target.far_share * target.counted).sum() / count
        total[seen.layer.layer_idx] = total.get(seen.layer.layer_idx, 0.0) + float(share) / len(rows)

    _check_length(model, rows)
    for row in rows:
        observe(model, {"input_ids": row.to(_device(model))}, add)
    return total


def swap_scores(
    model: Any, rows: Sequence[Tensor], progress: Callable[[int], None] = lambda layer: None
) -> dict[int, float]:
    """KL(original || model with this one layer converted), mean over all tokens, in nats.

    The original's run of a row is kept layer by layer, (T, hidden) each, and goes on from the layer that changes.

    Args:
        model: converted; mixer `"none"` measures against window + sinks, another one with the state it has.
        rows: as above; one row is in memory at a time.
        progress: called with every layer that has been measured on a row.

    Raises:
        LinearizeError: rows so short that nothing has left the window.
    """
    return _mean_divergence(model, [(row, None) for row in rows], progress)


def recall_scores(
    model: Any, texts: Sequence[Facts], progress: Callable[[int], None] = lambda layer: None
) -> dict[int, float]:
    """The same KL where a number is repeated that was said long before: mean over the numbers' tokens alone.

    Over ordinary text the few layers that fetch a token from far back hardly show, because it seldom asks for one.

    Args: as in `swap_scores`, with texts from `build_facts`.
    """
    return _mean_divergence(model, [(text.tokens, text.positions - 1) for text in texts], progress)


def build_facts(tokenizer: Any, tokens: Tensor, gaps: Sequence[int], count: int = 4, seed: int = 0) -> list[Facts]:
    """Texts of which each says `count` five-digit numbers, goes on for `gap` tokens and asks for all of them.

    Args:
        tokenizer: the model's.
        tokens: (n,) int64, ordinary text, of which each text takes its own stretch.
        gaps: tokens between the last number and the first question, one text each.
        count: 1 to 8.
        seed: of numbers, places and their order.

    Raises:
        LinearizeError: less text than the gaps take.
    """
    draw = random.Random(seed)
    needed = _facts_filler(gaps, count)
    if len(tokens) < needed:
        raise LinearizeError(
            f"text: {len(tokens)} tokens are less than the {needed} between numbers and questions; give more text"
        )
    filler = iter(tokens.tolist())
    texts = []
    for gap in gaps:
        places = draw.sample(PLACES, count)
        numbers = [str(number) for number in draw.sample(range(10_000, 100_000), count)]
        ids = [next(filler) for _ in range(LEAD)]
        for place, number in zip(places, numbers, strict=True):
            ids += _encode(tokenizer, FACT.format(place=place, number=number))
            ids += [next(filler) for _ in range(LEAD)]
        ids += [next(filler) for _ in range(gap)]
        answers = []
        for place, number in draw.sample(list(zip(places, numbers, strict=True)), count):
            question = QUESTION.format(place=place)
            # Encoded as a whole, since a tokenizer may join the question's end with the number's start.
            whole, start = _encode(tokenizer, f"{question} {number}"), _shared(tokenizer, question, number)
            answers.append(tuple(range(len(ids) + start, len(ids) + len(whole))))
            ids += whole
        texts.append(Facts(torch.tensor([ids]), tuple(answers)))
    return texts


def draw_texts(tokenizer: Any, stream: TokenStream, rows: int, seed: int = 0) -> tuple[list[Tensor], list[Facts]]:
    """What the scores are measured on: `rows` rows of a stream of single rows, and as many texts with numbers.

    Every other text asks for what was said a whole row ago, the rest for what was said half a row ago.
    """
    texts = [next(stream)["input_ids"] for _ in range(rows)]
    return texts, draw_facts(tokenizer, stream, [stream.seq_len // (1 + number % 2) for number in range(rows)], seed)


def draw_facts(tokenizer: Any, stream: TokenStream, gaps: Sequence[int], seed: int = 0) -> list[Facts]:
    """`build_facts` with the text between numbers and questions from the next rows of a stream of single rows."""
    filler = [next(stream)["input_ids"][0] for _ in range(_facts_filler(gaps) // stream.seq_len + 1)]
    return build_facts(tokenizer, torch.cat(filler), gaps, seed=seed)


def _facts_filler(gaps: Sequence[int], count: int = 4) -> int:
    """How many tokens of ordinary text `build_facts` takes."""
    return sum(gap + LEAD * (count + 1) for gap in gaps)


@contextmanager
def only_converted(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Inside, of a converted model these layers are converted and all others run their original attention.

    For whole rows without padding and without a cache.

    Raises:
        LinearizeError: a layer that is not among the converted ones.
    """
    known = converted_layers(model)
    for index in layers:
        if index not in known:
            raise LinearizeError(f"layers: {index} is not converted; the converted ones are {sorted(known)}")
    with original_attention(model):
        shared = {index: known[index].switch for index in layers}
        for index in layers:
            known[index].switch = Switch()
        try:
            yield
        finally:
            for index, switch in shared.items():
                known[index].switch = switch


def _mean_divergence(
    model: Any, rows: Sequence[tuple[Tensor, Tensor | None]], progress: Callable[[int], None]
) -> dict[int, float]:
    """For each converted layer KL(original || model with it alone converted), mean over (B, T) rows and the positions
    given with each, all where None is."""
    _check_length(model, [tokens for tokens, _ in rows])
    total = dict.fromkeys(converted_layers(model), 0.0)
    head = base_model(model).get_output_embeddings()

    def measure(tokens: Tensor, positions: Tensor | None) -> None:
        def score(layer: int, *hidden: Tensor) -> None:
            shown = [(x if positions is None else x[:, positions.to(x.device)]).flatten(0, 1) for x in hidden]
            parts = zip(*(x.split(ROWS_AT_ONCE) for x in shown), strict=True)
            divergence = sum(float(kl_divergence(head(new), head(old), None, 1.0).sum()) for old, new in parts)
            total[layer] += divergence / len(shown[0]) / len(rows)
            progress(layer)

        _swap_each(model, tokens, score)

    for tokens, positions in rows:
        measure(tokens, positions)
    return total


def _swap_each(model: Any, tokens: Tensor, score: Callable[[int, Tensor, Tensor], None]) -> None:
    """`score(layer, original's final hidden states, the changed model's)` for every converted layer."""
    decoder, layers = _decoder(model)
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    tokens = tokens.to(_device(model))
    try:
        with torch.no_grad(), original_attention(model):
            original = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    for index in converted_layers(model):
        with torch.no_grad(), only_converted(model, [index]), _resumed(layers, index, inputs[index]):
            changed = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        with torch.no_grad():
            score(index, original, changed)


@contextmanager
def _resumed(layers: nn.ModuleList, first: int, hidden: Tensor) -> Iterator[None]:
    """Inside, the decoder starts its work at layer `first`, with this input: earlier layers hand it through."""
    before = [vars(layer).get("forward") for layer in layers[:first]]
    for layer in layers[:first]:
        vars(layer)["forward"] = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):  # a dispatched model has forwards of its own on its layers
            vars(layer).pop("forward") if forward is None else vars(layer).update(forward=forward)


def _decoder(model: Any) -> tuple[Any, nn.ModuleList]:
    base = base_model(model)
    family = family_of(base.config)
    return base.get_submodule(family.decoder), base.get_submodule(family.layers)


def _device(model: Any) -> torch.device:
    return base_model(model).get_input_embeddings().weight.device


def _check_length(model: Any, rows: Sequence[Tensor]) -> None:
    config = next(iter(converted_layers(model).values())).linearize_config
    check_far_queries(config, min(row.shape[1] for row in rows), "seq_len")


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shared(tokenizer: Any, question: str, number: str) -> int:
    """How many leading tokens two answers to one question have in common: the number itself starts there."""
    other = str(99_999 - int(number)).zfill(len(number))  # differs in every digit
    one, two = (_encode(tokenizer, f"{question} {x}") for x in (number, other))
    return next((n for n, (x, y) in enumerate(zip(one, two)) if x != y), min(len(one), len(two)))
