"""Recall of what was said before, in three probes that need no training: what linear students lose first, and longest.

associative    a list of pairs of words, text, then the keys again in another order; which value follows?
copy           random tokens, then the same tokens again
induction      pairs A B among random tokens, then each A again among others, the same distance behind; B follows

In the first the answer stands in a list and is asked for by its key, once; in the second every token before helps to
find the place; in the third only the one before. A prompt has exactly the asked length, and what is asked for lies as
far back as that length allows, so that it has left any window that is clearly shorter; the result says how far. All
of a prompt is read in one pass. An answer is given after it was asked for: each is asked for once, so that tells
nothing about the next one.

An answer counts as *first* where it is likelier than all other candidates (the other values of the list; all tokens
that are copied; the other B), for which guessing has a chance of 1 / candidates, and as *greedy* where it is the
likeliest of the whole vocabulary.

Source: multi-query associative recall, Arora et al. 2023 (arXiv 2312.04927), here in words and without training, so
that it suits pretrained models; induction, Olsson et al. 2022 (arXiv 2209.11895).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.inference import device_of, hidden_states, inference, output_head
from linearize.benchmarks.needle import special_start
from linearize.benchmarks.resampling import mean_interval
from linearize.benchmarks.words import single_token_words
from linearize.errors import LinearizeError

__all__ = ["PROBES", "RecallPrompt", "build_recall", "has_words", "recall", "summarise_recall"]

PROBES = ("associative", "copy", "induction")
# Pairs of a list, of which as many as QUERIES are asked for.
PAIRS = (8, 32)
QUERIES = 8
# Prompts of each length and list: the fewest whose means have an interval worth the name.
TRIALS = 4
# Of induction: pairs of a prompt, and tokens from one to the next.
PLANTED, STEP = 8, 6
LIST = "\nA list of pairs:"
AGAIN = "\n\nThe same pairs, in another order:"
PAIR = "\n- {key}: {value}"
# Positions whose logits are made at once, in float32.
SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class RecallPrompt:
    """One prompt of a probe.

    Attributes:
        probe: one of `PROBES`.
        length: tokens of the prompt.
        pairs: of associative recall and induction; 0 in a copy.
        distance: mean number of tokens from where an answer was said to where it is asked for.
        tokens: the prompt, answers included.
        places: indices of the answers.
        candidates: tokens that an answer is ranked among; each answer is one of them.
    """

    probe: str
    length: int
    pairs: int
    distance: float
    tokens: tuple[int, ...]
    places: tuple[int, ...]
    candidates: tuple[int, ...]


def has_words(tokenizer: Any) -> bool:
    """Whether the tokenizer has the words that associative recall is made of."""
    return len(single_token_words(tokenizer)) >= 2 * max(PAIRS)


def build_recall(tokenizer: Any, tokens: Tensor, lengths: Sequence[int], seed: int = 0) -> list[RecallPrompt]:
    """Prompts of all probes at all lengths, the same for every model that shares the tokenizer.

    Args:
        tokenizer: of the models. One without enough words of one token gets no associative recall (`has_words`).
        tokens: LongTensor (n,), held-out text. It stands between a list and its questions, from a random place on and
            from the start again where it ends; copies and induction are made of the tokens that occur in it.
        lengths: tokens of a prompt.
        seed: of all that is drawn.

    Raises:
        LinearizeError: a length that is too short for the longest list, or a text of too few different tokens.
    """
    start, alphabet = special_start(tokenizer), sorted(set(tokens.tolist()))
    needed = 2 * PLANTED + 2
    if len(alphabet) < needed:
        raise LinearizeError(
            f"recall_lengths: the held-out text has {len(alphabet)} different tokens, and the probes need {needed}; "
            "give more text"
        )
    words = single_token_words(tokenizer) if has_words(tokenizer) else {}
    generator = random.Random(seed)
    prompts = []
    for length in lengths:
        for _ in range(TRIALS):
            for pairs in sorted(PAIRS, reverse=True) if words else ():  # a length is too short for the longest first
                prompts.append(_associative(tokenizer, start, tokens, words, length, pairs, generator))
            prompts.append(_copy(start, alphabet, length, generator))
            prompts.append(_induction(start, alphabet, length, generator))
    return prompts


def _associative(
    tokenizer: Any,
    start: Sequence[int],
    text: Tensor,
    words: Mapping[str, int],
    length: int,
    pairs: int,
    generator: random.Random,
) -> RecallPrompt:
    drawn = generator.sample(list(words), 2 * pairs)
    said = list(zip(drawn[:pairs], drawn[pairs:]))
    asked = generator.sample(said, min(QUERIES, pairs))
    values = [words[value] for _, value in said]

    def encode(head: str, listed: Sequence[tuple[str, str]], tail: str = "") -> tuple[list[int], list[int]]:
        """Tokens, and where in them the values are."""
        lines = "".join(PAIR.format(key=key, value=value) for key, value in listed)
        ids = tokenizer(head + lines + tail, add_special_tokens=False)["input_ids"]
        places = [ids.index(words[value]) for _, value in listed]
        assert places == sorted(places), "a word has another token in its list"
        return ids, places

    first, said_at = encode(LIST, said, "\n\n")
    last, asked_at = encode(AGAIN, asked)
    room = length - len(start) - len(first) - len(last)
    if room < 0:
        raise LinearizeError(
            f"recall_lengths: {length} is too short for {pairs} pairs and {len(asked)} questions; use {length - room} "
            "or more, better twice that"
        )
    offset = generator.randrange(len(text))
    between = text[(torch.arange(room) + offset) % len(text)].tolist()
    # A word of the list that stood in the text as well would be said more often than others.
    taken, spare = set(values) | {words[key] for key, _ in said}, [token for token in between if token not in words]
    between = [generator.choice(spare) if token in taken and spare else token for token in between]
    begin = len(start) + len(first) + room
    places = [begin + place for place in asked_at]
    at = dict(zip(said, said_at))
    distance = sum(place - len(start) - at[pair] for place, pair in zip(places, asked)) / len(asked)
    ids = (*start, *first, *between, *last)
    return RecallPrompt("associative", length, pairs, distance, ids, tuple(places), tuple(values))


def _copy(start: Sequence[int], alphabet: Sequence[int], length: int, generator: random.Random) -> RecallPrompt:
    """What follows a token is certain where all differ, which they do as far as the text has so many."""
    half, odd = divmod(length - len(start), 2)
    many = half + odd <= len(alphabet)
    drawn = generator.sample(alphabet, half + odd) if many else generator.choices(alphabet, k=half + odd)
    before, once = drawn[:odd], drawn[odd:]  # where the length is odd, one more token before both
    ids = (*start, *before, *once, *once)
    # Nothing says what the second copy begins with.
    places = range(len(start) + odd + half + 1, len(ids))
    return RecallPrompt("copy", length, 0, float(half), ids, tuple(places), tuple(sorted(set(once))))


def _induction(start: Sequence[int], alphabet: Sequence[int], length: int, generator: random.Random) -> RecallPrompt:
    """Pairs STEP tokens apart at the start, the same ones STEP tokens apart at the end, no other of their tokens."""
    distance = length - len(start) - PLANTED * STEP
    if distance < PLANTED * STEP:
        least = len(start) + 2 * PLANTED * STEP
        raise LinearizeError(f"recall_lengths: {length} is too short for {PLANTED} pairs, twice; use {least} or more")
    drawn = generator.sample(alphabet, 2 * PLANTED)
    pairs = list(zip(drawn[:PLANTED], drawn[PLANTED:]))
    others = sorted(set(alphabet) - set(drawn))
    ids = [*start, *generator.choices(others, k=length - len(start))]
    places = []
    for number, pair in enumerate(pairs):
        place = len(start) + number * STEP
        ids[place : place + 2] = ids[place + distance : place + distance + 2] = pair
        places.append(place + distance + 1)
    values = tuple(value for _, value in pairs)
    return RecallPrompt("induction", length, PLANTED, float(distance), tuple(ids), tuple(places), values)


def recall(model: nn.Module, prompts: Sequence[RecallPrompt]) -> list[dict[str, float]]:
    """Read every prompt once; `summarise_recall` compares rows.

    Returns:
        For each prompt the means over its answers: `{"first", "greedy", "nll"}`, shares and nats.
    """
    head, results = output_head(model), []
    with inference(model):
        for prompt in prompts:
            ids = torch.tensor([prompt.tokens], device=device_of(model))
            places = torch.tensor(prompt.places, device=ids.device)
            hidden = hidden_states(model, ids)[0, places - 1]
            candidates = torch.tensor(prompt.candidates, device=ids.device)
            parts = zip(hidden.split(SCORED_AT_ONCE), ids[0, places].split(SCORED_AT_ONCE))
            scores = torch.cat([_score(head(states).float(), answer, candidates) for states, answer in parts])
            first, greedy, nll = scores.double().mean(0).tolist()
            results.append({"first": first, "greedy": greedy, "nll": nll})
    return results


def _score(logits: Tensor, answers: Tensor, candidates: Tensor) -> Tensor:
    """Whether each answer (n,) is first and greedy, and its NLL: (n, 3) on the CPU. A tie or NaN is neither."""
    own = logits.gather(-1, answers[:, None])
    # The answer is one of the candidates: where it is first, nothing but itself is as likely.
    first = (logits[:, candidates] >= own).sum(-1) == 1
    greedy = (logits >= own).sum(-1) == 1
    nll = torch.logsumexp(logits, -1) - own[:, 0]
    return torch.stack([first.float(), greedy.float(), nll], -1).cpu()


def summarise_recall(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    prompts: Sequence[RecallPrompt],
    comparisons: Sequence[tuple[str, str]],
    seed: int = 0,
) -> dict[str, Any]:
    """Means of each row and probe with intervals, by cell too, and paired differences between rows.

    Args:
        results: row name -> what `recall` returned.
        prompts: what was read.
        comparisons: pairs (row, against), compared prompt by prompt.
        seed: of the bootstrap over prompts.

    Returns:
        The `"recall"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    probes = {}
    for probe in PROBES:
        own = [number for number, prompt in enumerate(prompts) if prompt.probe == probe]
        if own:
            asked = [prompts[number] for number in own]
            answers = {row: [found[number] for number in own] for row, found in results.items()}
            probes[probe] = {
                "n_prompts": len(own),
                "n_answers": sum(len(prompt.places) for prompt in asked),
                "chance_first": sum(1 / len(prompt.candidates) for prompt in asked) / len(asked),
                "rows": {
                    row: {**_means(found, seed), "cells": list(_cells(asked, found))} for row, found in answers.items()
                },
                "comparisons": [
                    {"row": row, "against": against, **_difference(answers[row], answers[against], seed)}
                    for row, against in comparisons
                ],
            }
    return {"probes": probes}


def _cells(prompts: Sequence[RecallPrompt], found: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """The means of the prompts of each length and number of pairs, in that order."""
    cells: dict[tuple[int, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        cells.setdefault((prompt.length, prompt.pairs), []).append(number)
    for (length, pairs), own in sorted(cells.items()):
        group = [prompts[number] for number in own]
        yield {
            "length": length,
            "pairs": pairs,
            "distance": sum(prompt.distance for prompt in group) / len(group),
            "chance_first": sum(1 / len(prompt.candidates) for prompt in group) / len(group),
            "answers": sum(len(prompt.places) for prompt in group),
            **_plain_means([found[number] for number in own]),
        }


def _values(found: Sequence[Mapping[str, float]], name: str) -> Tensor:
    return torch.tensor([one[name] for one in found], dtype=torch.float64)


def _plain_means(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Over prompts: shares, and the NLL where it is finite."""
    nll = _values(found, "nll").mean()
    means = {name: float(_values(found, name).mean()) for name in ("first", "greedy")}
    return {**means, "nll": float(nll) if nll.isfinite() else None}


def _means(found: Sequence[Mapping[str, float]], seed: int) -> dict[str, Any]:
    intervals = {f"{name}_ci95": mean_interval(_values(found, name), seed) for name in ("first", "greedy")}
    return {**_plain_means(found), **intervals}


def _difference(found: Sequence[Mapping[str, float]], against: Sequence[Mapping[str, float]], seed: int) -> Any:
    """Mean of row minus against, resampling the prompts of both together. Above 0: the row is better."""
    parts: dict[str, Any] = {}
    for name in ("first", "greedy"):
        difference = _values(found, name) - _values(against, name)
        parts |= {f"{name}_difference": float(difference.mean()), f"{name}_ci95": mean_interval(difference, seed)}
    return parts
