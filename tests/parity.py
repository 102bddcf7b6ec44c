"""What the parity suite shares: the models, the ways to hand them tokens, and how near two results must be.

A student is compared with itself: whatever way the tokens come, its logits are those of one pass over each text alone,
without a cache. The original stands among the models, so that a way that it cannot go either would show.
`tests/parity_table.py` is the table of what the suite finds.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.config import MIXERS
from tests.tiny_models import make_model, make_tokens, randomize_far

__all__ = [
    "FARS",
    "LENGTH",
    "LOGITS",
    "MODELS",
    "ORIGINAL",
    "PIECES",
    "SINKS",
    "STUDENTS",
    "WAYS",
    "WINDOW",
    "Case",
    "Way",
    "alone",
    "covering",
    "everywhere",
    "in_pieces",
    "lay_out",
    "left_padded",
    "make",
    "positions_of",
    "student",
]

WINDOW, SINKS = 8, 2
LENGTH = 60  # 7.5 chunks: the state holds most of it
PIECES = (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5)  # they sum to 61
LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # float32, logits of a few units
ORIGINAL = "original"
FARS = ("none", "normalizer", "peak", "gate", "gla")


@dataclass(frozen=True)
class Case:
    """A tiny model of two layers: `far` is "original", "gla", "none" or hedgehog's mix; `kept` layers stay softmax."""

    family: str
    far: str
    kept: tuple[int, ...] = ()

    def __str__(self) -> str:
        kept = f"-kept{self.kept[0]}" if self.kept and self.far != ORIGINAL else ""
        return f"{self.family}-{self.far}{kept}"


# A few for tests that are not of the mixers.
MODELS = (
    Case("llama", ORIGINAL),
    Case("llama", "normalizer"),
    Case("qwen3", "none", (1,)),
    Case("qwen2", "gla", (0,)),
)
STUDENTS = MODELS[1:]
everywhere = pytest.mark.parametrize("case", MODELS, ids=str)
student = pytest.mark.parametrize("case", STUDENTS, ids=str)


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """The model of a case, in evaluation mode; `changes` go to its transformers config."""
    from linearize import LinearizeConfig, convert

    model = make_model(case.family, dtype, seed, **{"num_hidden_layers": 2} | changes)
    if case.far == ORIGINAL:
        return model
    mixer = case.far if case.far in MIXERS else "hedgehog"
    mix = "gate" if mixer == "gla" else "normalizer" if mixer == "none" else case.far
    config = LinearizeConfig(mixer=mixer, mix=mix, window=WINDOW, sinks=SINKS, softmax_layers=case.kept)
    return randomize_far(convert(model, config))


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows in which every two values of different axes meet at least once. The same rows every time."""

    def pairs(row: Iterable[int]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2)
        for a in range(len(first))
        for b in range(len(second))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for axis in (i for i in range(len(axes)) if i not in row):
            row[axis] = max(
                range(len(axes[axis])),
                key=lambda value: sum(tuple(sorted([(axis, value), other])) in missing for other in row.items()),
            )
        indices = [row[axis] for axis in range(len(axes))]
        missing -= pairs(indices)
        rows.append(tuple(axis[i] for axis, i in zip(axes, indices, strict=True)))
    return rows


def lay_out(texts: list[Tensor], columns: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (texts, width): text i in the columns columns[i], ascending; elsewhere padding."""
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (text, place) in enumerate(zip(texts, columns, strict=True)):
        tokens[i, place], mask[i, place] = text, 1
    return tokens, mask


def left_padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, mask) as a tokenizer with padding_side="left" gives them."""
    width = max(len(text) for text in texts)
    return lay_out(texts, [torch.arange(width - len(text), width) for text in texts], width)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids of the real tokens, as `generate` counts them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def alone(model: Any, texts: list[Tensor]) -> list[Tensor]:
    """What everything is compared with: logits (tokens, vocabulary) of each text by itself, without a cache."""
    return [model(text[None], use_cache=False).logits[0] for text in texts]


@torch.no_grad()
def in_pieces(
    model: Any,
    pieces: Sequence[int],
    tokens: Tensor,
    mask: Tensor | None = None,
    cache: Any = None,
    embedded: bool = False,
) -> tuple[Tensor, Any]:
    """(logits of all positions, cache) of tokens given in pieces of these lengths, the last one repeated.

    mask: of the tokens that `cache` holds and of these; embedded: the tokens go in as `inputs_embeds`.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    past, done, logits = int(cache.get_seq_length()), 0, []
    for piece in itertools.chain(pieces, itertools.repeat(pieces[-1])):
        if done >= tokens.shape[1]:
            break
        part = tokens[:, done : done + piece]
        inputs = {"inputs_embeds": model.get_input_embeddings()(part)} if embedded else {"input_ids": part}
        seen = past + done + part.shape[1]
        if mask is not None:
            inputs |= {"attention_mask": mask[:, :seen], "position_ids": positions_of(mask)[:, past + done : seen]}
        result = model(**inputs, past_key_values=cache, use_cache=True)
        assert result.past_key_values is cache
        assert int(cache.get_seq_length()) == seen
        logits.append(result.logits)
        done += part.shape[1]
    return torch.cat(logits, dim=1), cache


@dataclass(frozen=True)
class Way:
    """One way to hand texts of these lengths to a model: `run` gives the logits of every text, (tokens, vocabulary)."""

    name: str
    lengths: tuple[int, ...]
    run: Callable[[Any, list[Tensor]], list[Tensor]]

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    def texts(self, seed: int = 2) -> list[Tensor]:
        """Random texts of its lengths, without the padding token."""
        tokens = make_tokens(len(self.lengths), max(self.lengths), seed)
        return [row[:length] for row, length in zip(tokens, self.lengths, strict=True)]


EQUAL = (LENGTH,) * 3
RAGGED = (LENGTH, LENGTH - 5, 13)


def _one_pass(use_cache: bool) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    def run(model: Any, texts: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(model(torch.stack(texts), use_cache=use_cache).logits)

    return run


def _pieces(*pieces: int, embedded: bool = False) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    def run(model: Any, texts: list[Tensor]) -> list[Tensor]:
        return list(in_pieces(model, pieces, torch.stack(texts), embedded=embedded)[0])

    return run


def _padded(place: Callable[[int], Tensor], width: int, *pieces: int) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    """Texts of n tokens in the columns place(n) of `width`; in one pass without a cache where no pieces are named."""

    def run(model: Any, texts: list[Tensor]) -> list[Tensor]:
        columns = [place(len(text)) for text in texts]
        tokens, mask = lay_out(texts, columns, width)
        if pieces:
            logits = in_pieces(model, pieces, tokens, mask)[0]
        else:
            with torch.no_grad():
                inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
                logits = model(tokens, **inputs, use_cache=False).logits
        return [row[real] for row, real in zip(logits, columns, strict=True)]

    return run


def _left(length: int) -> Tensor:
    return torch.arange(LENGTH - length, LENGTH)


def _short(length: int) -> Tensor:
    return torch.arange(WINDOW + 1 - length, WINDOW + 1)


def _both(length: int) -> Tensor:
    return torch.arange(length) + 3


def _holes(length: int) -> Tensor:
    """Padding anywhere between real tokens."""
    generator = torch.Generator().manual_seed(length)
    return torch.randperm(LENGTH + 9, generator=generator)[:length].sort().values


def _packed(model: Any, texts: list[Tensor]) -> list[Tensor]:
    """As transformers' collator lays texts out for training: one row, positions that restart, no cache."""
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": text.tolist()} for text in texts])
    assert {"position_ids", "cu_seq_lens_q", "max_length_q"} <= set(batch)
    batch.pop("labels")
    with torch.no_grad():
        (logits,) = model(**batch, use_cache=False).logits
    return list(logits.split([len(text) for text in texts]))


def _empty_past(model: Any, texts: list[Tensor]) -> list[Tensor]:
    """A cache that was given no tokens is the same as none."""
    from transformers import DynamicCache

    with torch.no_grad():
        return list(model(torch.stack(texts), past_key_values=DynamicCache()).logits)


WAYS = (
    Way("one pass", EQUAL, _one_pass(use_cache=False)),
    Way("one pass with a cache", EQUAL, _one_pass(use_cache=True)),
    Way("token by token", EQUAL, _pieces(1)),
    Way("uneven pieces", (sum(PIECES) + 3,) * 2, _pieces(*PIECES, 1)),
    Way("prefill, then tokens", EQUAL, _pieces(45, 1)),
    Way("left-padded", RAGGED, _padded(_left, LENGTH)),
    Way("left-padded in pieces", RAGGED, _padded(_left, LENGTH, *PIECES)),
    Way("left-padded, then tokens", RAGGED, _padded(_left, LENGTH, 50, 1)),
    Way("right-padded", RAGGED, _padded(torch.arange, LENGTH)),
    Way("right-padded in pieces", RAGGED, _padded(torch.arange, LENGTH, *PIECES)),
    Way("padded on both sides", RAGGED, _padded(_both, LENGTH + 9)),
    Way("padded on both sides in pieces", RAGGED, _padded(_both, LENGTH + 9, *PIECES)),
    Way("padding between tokens", RAGGED, _padded(_holes, LENGTH + 9)),
    Way("padding between tokens in pieces", RAGGED, _padded(_holes, LENGTH + 9, *PIECES)),
    Way("packed documents", (31, 1, LENGTH, 17), _packed),
    Way("embeddings", EQUAL, _pieces(LENGTH, embedded=True)),
    Way("embeddings in pieces", (sum(PIECES),) * 2, _pieces(*PIECES, embedded=True)),
    Way("empty past", EQUAL, _empty_past),
    Way("shorter than the sinks", (1, 1), _pieces(1)),
    Way("short prompts, left-padded", (1, 2, WINDOW - 1, WINDOW + 1), _padded(_short, WINDOW + 1, 4, 1)),
    Way("batch of eight", (LENGTH,) * 8, _pieces(LENGTH - 4, 1)),
)
