"""A small needle-in-a-haystack test: is a number or a word, said once in a long text, still known at its end?

The haystack is held-out text, cut at token level so that a prompt has exactly the asked length. One sentence with a
random value is put at a depth (0 = start, 1 = end), and the prompt ends where that sentence's value would be repeated.
With several keys there are as many such sentences, each about another thing, the others at random depths; one is asked
for. Two scores: greedy decoding writes exactly the value; and the value's rank by log-likelihood among nine others
(those of the other keys, then random ones), which shows something for models too small to answer.

Values are numbers (kind "digits", several tokens) or common words (kind "words": one token each, and none of them
stands in the haystack). Each number of keys and kind has prompts of its own, which do not depend on the others asked
for.
"""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.choices import encode_choices
from linearize.benchmarks.inference import device_of, inference
from linearize.benchmarks.perplexity import token_nll
from linearize.benchmarks.words import single_token_words
from linearize.errors import LinearizeError

__all__ = ["CANDIDATES", "KINDS", "Needle", "build_needles", "needle", "special_start", "summarise_needles"]

# The value and nine distractors: guessing ranks it first once in ten.
CANDIDATES = 10
# What is hidden -> what its sentence calls it, and what of a text counts as one.
KINDS = {"digits": ("number", r"\d+"), "words": ("word", r"[^\W\d_]+")}
SENTENCE = "\nOne fact to remember: the secret {what} is {value}.\n"
QUESTION = "\nThe fact to remember: the secret {what} is"
SENTENCE_OF = "\nOne fact to remember: the secret {what} of the {key} is {value}.\n"
QUESTION_OF = "\nThe fact to remember: the secret {what} of the {key} is"
# What a cell of the result is told apart by, in this order.
CELL = ("length", "depth", "keys", "kind")
KEYS = ("garden", "river", "window", "teacher", "mountain", "kitchen", "engine", "letter")


@dataclass(frozen=True)
class Needle:
    """One prompt and its candidates.

    Attributes:
        length: tokens of the prompt.
        depth: where in the haystack the sentence stands, 0 to 1.
        keys: how many sentences there are.
        kind: one of `KINDS`.
        prompt: the tokens, ending just before the value.
        values: the right value first, then the distractors.
        candidates: the tokens of ` value` for each of them.
    """

    length: int
    depth: float
    keys: int
    kind: str
    prompt: tuple[int, ...]
    values: tuple[str, ...]
    candidates: tuple[tuple[int, ...], ...]


def build_needles(
    tokenizer: Any,
    tokens: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 1,
    seed: int = 0,
    keys: Sequence[int] = (1,),
    digits: int = 5,
    kinds: Sequence[str] = ("digits",),
) -> list[Needle]:
    """Prompts for every kind, number of keys, length and depth, the same for every model that shares the tokenizer.

    Args:
        tokenizer: of the models.
        tokens: LongTensor (n,), held-out text; each trial takes another stretch of it.
        lengths: tokens of a prompt.
        depths: 0 to 1.
        trials: prompts per cell.
        seed: of values and stretches.
        keys: how many sentences there are, at most 8.
        digits: of a number, at least 2.
        kinds: among `KINDS`.

    Raises:
        LinearizeError: a length longer than the text or too short for the sentences, a depth outside 0 to 1, more
            keys than there are, an unknown kind, or words that the tokenizer or the text leaves too few of.
    """
    for count in keys:
        if not 1 <= count <= len(KEYS):
            raise LinearizeError(f"needle_keys: {count} is outside 1 to {len(KEYS)}; 1 asks for the only value")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise LinearizeError(f"needle_depths: {depth} is outside 0 to 1; 0 is the start of the text, 1 its end")
    for kind in kinds:
        if kind not in KINDS:
            raise LinearizeError(f"needle_kind: {kind!r} is unknown; choose from {', '.join(KINDS)}")
    words = single_token_words(tokenizer) if "words" in kinds else ()
    if "words" in kinds and len(words) < CANDIDATES:
        raise LinearizeError(
            f"needle_kind: 'words' needs {CANDIDATES} words that are one token each, and the tokenizer has "
            f"{len(words)} of those known; use digits"
        )
    hide = _Hide(tokenizer, tokens, special_start(tokenizer), tuple(words), digits)
    needles = []
    for kind, count in product(kinds, keys):
        # Of its own, so that what is asked for besides does not change these prompts.
        generator = random.Random(seed)
        for length, depth, _ in product(lengths, depths, range(trials)):
            needles.append(hide(kind, count, length, depth, generator))
    return needles


@dataclass(frozen=True)
class _Hide:
    """Makes one prompt after another of the same text."""

    tokenizer: Any
    tokens: Tensor
    start: list[int]
    words: tuple[str, ...]
    digits: int

    def __call__(self, kind: str, keys: int, length: int, depth: float, generator: random.Random) -> Needle:
        # Which words can be hidden is known when the stretch of text is. As each is one token, any stand for them
        # until then.
        values = self._numbers(generator) if kind == "digits" else self.words[:CANDIDATES]
        names = generator.sample(KEYS, keys) if keys > 1 else []
        sentences, question, _ = self._encode(kind, values, names)
        room = length - len(self.start) - sum(map(len, sentences)) - len(question)
        if room < 1:
            least = length - room + 1
            raise LinearizeError(f"needle_lengths: {length} is too short for the sentence; use {least} or more")
        if room > len(self.tokens):
            raise LinearizeError(
                f"needle_lengths: {length} is longer than the {len(self.tokens)} held-out tokens; "
                "give more text or smaller lengths"
            )
        offset = generator.randrange(len(self.tokens) - room + 1)
        text = self.tokens[offset : offset + room].tolist()
        if kind == "words":
            values = self._unsaid_words(text, length, generator)
        sentences, question, candidates = self._encode(kind, values, names)
        cuts = [round(depth * room), *(generator.randrange(room + 1) for _ in sentences[1:])]
        # From the back, so that a sentence that is put in does not move the places of those before it.
        for cut, sentence in sorted(zip(cuts, sentences), reverse=True):
            text[cut:cut] = sentence
        prompt = (*self.start, *text, *question)
        assert len(prompt) == length, "a value has another number of tokens in its sentence"
        return Needle(length, depth, keys, kind, prompt, values, tuple(map(tuple, candidates)))

    def _numbers(self, generator: random.Random) -> tuple[str, ...]:
        return tuple(map(str, generator.sample(range(10 ** (self.digits - 1), 10**self.digits), CANDIDATES)))

    def _unsaid_words(self, text: list[int], length: int, generator: random.Random) -> tuple[str, ...]:
        """Words that stand nowhere in the haystack: one that did would be known, and hidden twice."""
        said = set(re.findall(KINDS["words"][1], self.tokenizer.decode(text).lower()))
        unsaid = [word for word in self.words if word not in said]
        if len(unsaid) < CANDIDATES:
            raise LinearizeError(
                f"needle_kind: {length} tokens of the text say all but {len(unsaid)} of the {len(self.words)} words "
                f"that could be hidden in it, and {CANDIDATES} are needed; use digits or smaller lengths"
            )
        return tuple(generator.sample(unsaid, CANDIDATES))

    def _encode(
        self, kind: str, values: Sequence[str], names: Sequence[str]
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """Tokens of the sentences, of the question, and of each value after it."""
        what = KINDS[kind][0]
        texts = _sentences(what, values, names)
        sentences = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        asked = QUESTION_OF.format(what=what, key=names[0]) if names else QUESTION.format(what=what)
        question, candidates = encode_choices(self.tokenizer, asked, [f" {value}" for value in values], special=False)
        return sentences, question, candidates


def _sentences(what: str, values: Sequence[str], names: Sequence[str]) -> list[str]:
    """The sentence that is asked for, then those of the other keys."""
    if not names:
        return [SENTENCE.format(what=what, value=values[0])]
    return [SENTENCE_OF.format(what=what, key=name, value=value) for name, value in zip(names, values)]


def special_start(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as bos."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []


def needle(model: nn.Module, tokenizer: Any, needles: Sequence[Needle]) -> list[dict[str, Any]]:
    """Run every prompt once; `summarise_needles` makes fractions of it.

    The prompt is read once into the model's cache. A copy of the cache, one row a candidate, scores the candidates in
    one pass; the cache itself then serves greedy decoding, token by token as in use.

    Returns:
        For each prompt `{"length", "depth", "keys", "kind", "greedy": bool, "rank": 1 to 10, "text": what greedy
        decoding wrote}`.
    """
    results = []
    with inference(model):
        for task in needles:
            ids = torch.tensor([task.prompt], device=device_of(model))
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            rank = _rank(_candidate_nll(model, output.logits, copy.deepcopy(output.past_key_values), task.candidates))
            # One token more than the value: it must also end where it ends.
            steps = max(map(len, task.candidates)) + 1
            text = tokenizer.decode(_greedy(model, output.logits, output.past_key_values, steps))
            written = re.match(rf"\s*({KINDS[task.kind][1]})", text)
            greedy = written is not None and written[1] == task.values[0]
            cell = {name: getattr(task, name) for name in CELL}
            results.append({**cell, "greedy": greedy, "rank": rank, "text": text})
    return results


def _candidate_nll(model: nn.Module, logits: Tensor, cache: Any, candidates: Sequence[Sequence[int]]) -> Tensor:
    """NLL of each candidate after the cached prompt, float32 (candidates,). Changes the cache."""
    longest = max(map(len, candidates))
    padded = [[*tokens, *[tokens[-1]] * (longest - len(tokens))] for tokens in candidates]
    ids = torch.tensor(padded, device=logits.device)
    # reorder_cache selects rows of the batch; selecting row 0 for each candidate forks the prompt.
    cache.reorder_cache(torch.zeros(len(candidates), dtype=torch.long, device=logits.device))
    predictions = logits.expand(len(candidates), -1, -1)
    if longest > 1:
        following = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
        predictions = torch.cat([predictions, following], 1)
    nll = token_nll(predictions, ids)
    # Padding comes after a candidate's last token, so nothing that counts has seen it.
    lengths = torch.tensor([len(tokens) for tokens in candidates], device=logits.device)
    return (nll * (torch.arange(longest, device=logits.device) < lengths[:, None])).sum(1)


def _rank(nll: Tensor) -> int:
    """Rank of the first candidate, 1 = likeliest. Ties and values that are not finite count against it."""
    if not nll.isfinite().all():
        return len(nll)
    return 1 + int((nll[1:] <= nll[0]).sum())


def _greedy(model: nn.Module, logits: Tensor, cache: Any, steps: int) -> list[int]:
    """The `steps` likeliest tokens after the cached prompt, one at a time. Changes the cache."""
    written = []
    for step in range(steps):
        written.append(logits[:, -1:].argmax(-1))
        if step < steps - 1:
            logits = model(input_ids=written[-1], past_key_values=cache, use_cache=True).logits
    return torch.cat(written, 1)[0].tolist()


def summarise_needles(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Fractions per row, per length, and per cell of length, depth, number of keys and kind.

    Args:
        results: row name -> what `needle` returned.

    Returns:
        The `"needle"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    rows = {}
    for name, trials in results.items():
        lengths: dict[int, list[dict[str, Any]]] = {}
        cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for trial in trials:
            lengths.setdefault(trial["length"], []).append(trial)
            cells.setdefault(tuple(trial[name] for name in CELL), []).append(trial)
        rows[name] = {
            **_fractions(trials),
            "lengths": [{"length": length, **_fractions(group)} for length, group in lengths.items()],
            "cells": [{**dict(zip(CELL, cell)), **_fractions(group)} for cell, group in cells.items()],
        }
    return {"candidates": CANDIDATES, "chance_first": 1 / CANDIDATES, "rows": rows}


def _fractions(trials: list[dict[str, Any]]) -> dict[str, Any]:
    n = len(trials)
    return {
        "trials": n,
        "greedy": sum(trial["greedy"] for trial in trials) / n,
        "first": sum(trial["rank"] == 1 for trial in trials) / n,
        "mean_rank": sum(trial["rank"] for trial in trials) / n,
    }
