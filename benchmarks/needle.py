"""A small needle-in-a-haystack test: is a number, said once in a long text, still known at its end?

The haystack is held-out text, cut at token level so that a prompt has exactly the asked length. One sentence with a
random number is put at a depth (0 = start, 1 = end), and the prompt ends where that sentence's number would be
repeated. With several keys there are as many such sentences, each about another thing, the others at random depths;
one is asked for. Two scores: greedy decoding writes exactly the number; and the number's rank by log-likelihood among
nine others (those of the other keys, then random ones), which shows something for models too small to answer.
"""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.choices import encode_choices
from linearize.benchmarks.inference import device_of, inference
from linearize.benchmarks.perplexity import token_nll
from linearize.errors import LinearizeError

__all__ = ["CANDIDATES", "Needle", "build_needles", "needle", "summarise_needles"]

# The number and nine distractors: guessing ranks it first once in ten.
CANDIDATES = 10
SENTENCE = "\nOne fact to remember: the secret number is {number}.\n"
QUESTION = "\nThe fact to remember: the secret number is"
SENTENCE_OF = "\nOne fact to remember: the secret number of the {key} is {number}.\n"
QUESTION_OF = "\nThe fact to remember: the secret number of the {key} is"
KEYS = ("garden", "river", "window", "teacher", "mountain", "kitchen", "engine", "letter")


@dataclass(frozen=True)
class Needle:
    """One prompt and its candidates.

    Attributes:
        length: tokens of the prompt.
        depth: where in the haystack the sentence stands, 0 to 1.
        prompt: the tokens, ending just before the number.
        numbers: the right number first, then the distractors.
        candidates: the tokens of ` number` for each of them.
    """

    length: int
    depth: float
    prompt: tuple[int, ...]
    numbers: tuple[str, ...]
    candidates: tuple[tuple[int, ...], ...]


def build_needles(
    tokenizer: Any,
    tokens: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 1,
    seed: int = 0,
    keys: int = 1,
    digits: int = 5,
) -> list[Needle]:
    """Prompts for every length and depth, the same for every model that shares the tokenizer.

    Args:
        tokenizer: of the models.
        tokens: LongTensor (n,), held-out text; each trial takes another stretch of it.
        lengths: tokens of a prompt.
        depths: 0 to 1.
        trials: prompts per cell.
        seed: of numbers and stretches.
        keys: how many sentences there are, at most 8.
        digits: of a number, at least 2.

    Raises:
        LinearizeError: a length longer than the text or too short for the sentences, a depth outside 0 to 1, or more
            keys than there are.
    """
    if not 1 <= keys <= len(KEYS):
        raise LinearizeError(f"needle_keys: {keys} is outside 1 to {len(KEYS)}; 1 asks for the only number")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise LinearizeError(f"needle_depths: {depth} is outside 0 to 1; 0 is the start of the text, 1 its end")
    generator = random.Random(seed)
    start = _special_start(tokenizer)
    needles = []
    for length in lengths:
        for depth in depths:
            for _ in range(trials):
                numbers = tuple(map(str, generator.sample(range(10 ** (digits - 1), 10**digits), CANDIDATES)))
                names = generator.sample(KEYS, keys) if keys > 1 else []
                sentences = [
                    tokenizer(sentence, add_special_tokens=False)["input_ids"]
                    for sentence in _sentences(numbers, names)
                ]
                texts = [f" {number}" for number in numbers]
                asked = QUESTION_OF.format(key=names[0]) if names else QUESTION
                question, candidates = encode_choices(tokenizer, asked, texts, special=False)
                room = length - len(start) - sum(map(len, sentences)) - len(question)
                if room < 1:
                    least = length - room + 1
                    raise LinearizeError(f"needle_lengths: {length} is too short for the sentence; use {least} or more")
                if room > len(tokens):
                    raise LinearizeError(
                        f"needle_lengths: {length} is longer than the {len(tokens)} held-out tokens; "
                        "give more text or smaller lengths"
                    )
                offset = generator.randrange(len(tokens) - room + 1)
                haystack = tokens[offset : offset + room].tolist()
                cuts = [round(depth * room), *(generator.randrange(room + 1) for _ in sentences[1:])]
                # From the back, so that a sentence that is put in does not move the places of those before it.
                for cut, sentence in sorted(zip(cuts, sentences), reverse=True):
                    haystack[cut:cut] = sentence
                prompt = [*start, *haystack, *question]
                needles.append(Needle(length, depth, tuple(prompt), numbers, tuple(map(tuple, candidates))))
    return needles


def _sentences(numbers: Sequence[str], names: Sequence[str]) -> list[str]:
    """The sentence that is asked for, then those of the other keys."""
    if not names:
        return [SENTENCE.format(number=numbers[0])]
    return [SENTENCE_OF.format(key=name, number=number) for name, number in zip(names, numbers)]


def _special_start(tokenizer: Any) -> list[int]:
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
        For each prompt `{"length", "depth", "greedy": bool, "rank": 1 to 10, "text": what greedy decoding wrote}`.
    """
    results = []
    with inference(model):
        for task in needles:
            ids = torch.tensor([task.prompt], device=device_of(model))
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            rank = _rank(_candidate_nll(model, output.logits, copy.deepcopy(output.past_key_values), task.candidates))
            # One token more than the number: it must also end where it ends.
            steps = max(map(len, task.candidates)) + 1
            text = tokenizer.decode(_greedy(model, output.logits, output.past_key_values, steps))
            written = re.match(r"\s*(\d+)", text)
            greedy = written is not None and written[1] == task.numbers[0]
            results.append({"length": task.length, "depth": task.depth, "greedy": greedy, "rank": rank, "text": text})
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
    """Fractions per row, per length, and per cell of length and depth.

    Args:
        results: row name -> what `needle` returned.

    Returns:
        The `"needle"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    rows = {}
    for name, trials in results.items():
        lengths: dict[int, list[dict[str, Any]]] = {}
        cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
        for trial in trials:
            lengths.setdefault(trial["length"], []).append(trial)
            cells.setdefault((trial["length"], trial["depth"]), []).append(trial)
        rows[name] = {
            **_fractions(trials),
            "lengths": [{"length": length, **_fractions(group)} for length, group in lengths.items()],
            "cells": [
                {"length": length, "depth": depth, **_fractions(group)} for (length, depth), group in cells.items()
            ],
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
