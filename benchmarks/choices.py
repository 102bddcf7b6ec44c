"""Multiple choice by log-likelihood: which continuation of a query does the model find most likely?

Items are lines of JSON, `{"query": str, "choices": [str, ...], "gold": int}`. Raw accuracy takes the choice with the
highest summed log-likelihood; normalised accuracy divides it by the choice's length in UTF-8 bytes first, so that
short choices have no advantage (bytes, not tokens, so that tokenizers stay comparable).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from linearize.benchmarks.inference import device_of, inference
from linearize.benchmarks.perplexity import LOGITS_AT_ONCE, token_nll
from linearize.benchmarks.resampling import interval, mean_interval
from linearize.errors import LinearizeError

__all__ = ["Item", "encode_choices", "load_items", "multiple_choice", "summarise_choices"]


@dataclass(frozen=True)
class Item:
    """One question: the text before, the continuations, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def load_items(path: str | Path, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Read items from a jsonl file; with `limit`, a random sample of that size (files are often sorted).

    Raises:
        LinearizeError: no such file, or a line that is not an item; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise LinearizeError(f"choices: {str(path)!r} is not a file; name a jsonl file of query, choices and gold")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            items.append(_parse(line, f"{path}:{number}"))
    if not items:
        raise LinearizeError(f"choices: {str(path)!r} holds no items; each line is an object of query, choices, gold")
    if limit is None or limit >= len(items):
        return items
    kept = random.Random(seed).sample(range(len(items)), limit)
    return [items[index] for index in sorted(kept)]


def _parse(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LinearizeError(f"{where}: not JSON ({error}); each line is an object of query, choices, gold") from error
    keys = {"query", "choices", "gold"}
    if not isinstance(record, dict) or not keys <= record.keys():
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise LinearizeError(f"{where}: has {found}, needs the keys query, choices and gold")
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(query, str):
        raise LinearizeError(f"{where}: query is {query!r}, expected a text")
    if not (isinstance(choices, list) and len(choices) >= 2 and all(isinstance(c, str) and c for c in choices)):
        raise LinearizeError(
            f"{where}: choices is {choices!r}, expected a list of two or more texts that are not empty"
        )
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise LinearizeError(f"{where}: gold is {gold!r}, expected the index of a choice, 0 to {len(choices) - 1}")
    return Item(query, tuple(choices), gold)


def delimiter(query: str) -> str:
    """What joins a query and a choice: a line `Answer:` after a `Question:`, else a space where there is none yet."""
    if query.startswith("Question:"):
        return "\nAnswer: "
    return "" if not query or query[-1].isspace() else " "


def encode_choices(
    tokenizer: Any, query: str, continuations: Sequence[str], special: bool = True
) -> tuple[list[int], list[list[int]]]:
    """Tokenise a query with each continuation and split where the token sequences part.

    A tokenizer may merge the query's end with the continuation's beginning. The split is therefore the longest
    prefix that all whole sequences share with the query's own tokens, so that all continuations are scored after the
    same tokens.

    Returns:
        The shared tokens, and for each continuation the tokens after them (at least one).
    """
    alone = tokenizer(query, add_special_tokens=special)["input_ids"]
    whole = [tokenizer(query + text, add_special_tokens=special)["input_ids"] for text in continuations]
    shared = 0
    while shared < len(alone) and all(len(ids) > shared + 1 and ids[shared] == alone[shared] for ids in whole):
        shared += 1
    return alone[:shared], [ids[shared:] for ids in whole]


def multiple_choice(model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> list[list[float]]:
    """Summed log-likelihood, nats, of every choice of every item; `summarise_choices` makes accuracies of it.

    Choices of all items are sorted by length and run in right-padded batches.
    """
    sequences: list[tuple[int, int, list[int], int]] = []  # item, choice, tokens, index of the first scored token
    for number, item in enumerate(items):
        joint = delimiter(item.query)
        # A choice's leading space belongs to its first token, so it goes with the choice.
        query, lead = item.query + joint.rstrip(), joint[len(joint.rstrip()) :]
        prefix, endings = encode_choices(tokenizer, query, [lead + choice for choice in item.choices])
        if not prefix:
            prefix = [_start_token(tokenizer)]
        sequences += [(number, c, prefix + ending, len(prefix)) for c, ending in enumerate(endings)]
    sequences.sort(key=lambda sequence: len(sequence[2]), reverse=True)  # the largest batch first: out of memory early
    scores = [[0.0] * len(item.choices) for item in items]
    vocabulary = cast(Any, model.config).get_text_config().vocab_size
    with inference(model):
        while sequences:
            size = max(1, min(16, LOGITS_AT_ONCE // (len(sequences[0][2]) * vocabulary)))
            batch, sequences = sequences[:size], sequences[size:]
            nll = _padded_nll(model, [tokens for _, _, tokens, _ in batch])
            for row, (number, choice, tokens, first) in zip(nll, batch):
                scores[number][choice] = -float(row[first - 1 : len(tokens) - 1].double().sum())
    return scores


def _start_token(tokenizer: Any) -> int:
    """A token to score an empty query's choices after."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise LinearizeError("choices: a query is empty and the tokenizer has no bos or eos token; give it a query")


def _padded_nll(model: nn.Module, sequences: Sequence[list[int]]) -> Tensor:
    """NLL of each token after the first, float32 (sequences, longest - 1) on the CPU; padding holds garbage."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    device = device_of(model)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return token_nll(logits[:, :-1], ids[:, 1:].to(device)).cpu()


def summarise_choices(
    scores: Mapping[str, list[list[float]]], items: Sequence[Item], baseline: str, seed: int = 0
) -> dict[str, Any]:
    """Accuracies, and what share of the baseline's accuracy each row keeps.

    Retention is given raw, s / t, and corrected for chance, (s - r) / (t - r), where s is the row's accuracy, t the
    baseline's and r the accuracy of guessing. Intervals resample items, the same ones for s and t. The corrected
    value is None where t is not above r, its interval None where resampled t often are not: then these items cannot
    tell how much was kept.

    Args:
        scores: row name -> log-likelihoods, as `multiple_choice` returns them.
        items: the items.
        baseline: the row that retention refers to.
        seed: of the bootstrap over items.

    Returns:
        The `"choices"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    chance = torch.tensor([1 / len(item.choices) for item in items], dtype=torch.float64)
    result: dict[str, Any] = {"n_items": len(items), "chance": float(chance.mean()), "rows": {}}
    right = {name: (_right(values, items, False), _right(values, items, True)) for name, values in scores.items()}
    for name, kinds in right.items():
        row: dict[str, Any] = {}
        for kind, hits, reference in zip(("raw", "normalised"), kinds, right[baseline]):
            row[kind] = {
                "accuracy": float(hits.mean()),
                "ci95": mean_interval(hits, seed),
                "retention": _retention(hits, reference, torch.zeros_like(chance), seed),
                "retention_over_chance": _retention(hits, reference, chance, seed),
            }
        result["rows"][name] = row
    return result


def _right(scores: list[list[float]], items: Sequence[Item], normalised: bool) -> Tensor:
    """Float64 (items,): 1 where the likeliest choice is the right one. A score that is not finite is wrong."""
    hits = []
    for values, item in zip(scores, items):
        lengths = [len(choice.encode()) if normalised else 1 for choice in item.choices]
        likelihood = torch.tensor([v / n for v, n in zip(values, lengths)], dtype=torch.float64)
        hits.append(float(bool(likelihood.isfinite().all()) and int(likelihood.argmax()) == item.gold))
    return torch.tensor(hits, dtype=torch.float64)


def _retention(hits: Tensor, reference: Tensor, chance: Tensor, seed: int) -> dict[str, Any]:
    """(s - r) / (t - r) with its interval."""
    above = float((reference - chance).mean())
    if above <= 0:
        return {"value": None, "ci95": None}

    def ratio(index: Tensor) -> Tensor:
        kept, whole = (hits - chance)[index].mean(1), (reference - chance)[index].mean(1)
        # A resample whose baseline only guesses has no retention.
        return torch.where(whole > 0, kept / whole, torch.nan)

    return {"value": float((hits - chance).mean()) / above, "ci95": interval(ratio, len(hits), seed)}
