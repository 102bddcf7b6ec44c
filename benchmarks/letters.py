"""Multiple choice by letter, under every cyclic order of the choices: does a model read them, or like a letter?

    {query}
    A. {choice}
    B. {choice}
    ...
    Answer:

The letter that is likeliest to follow is the model's choice. An item of n choices is asked n times, its choices moved
on by one each time, so that every letter is right equally often: a model that always says A is right 1 / n of the
time, and its histogram of letters shows why. Conversion is known to do that to models whose scores by log-likelihood
of whole choices have hardly changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.choices import encode_choices
from linearize.benchmarks.inference import TOKENS_AT_ONCE, device_of, hidden_states, inference, output_head
from linearize.benchmarks.items import AnyItem, Item
from linearize.benchmarks.resampling import mean_interval
from linearize.errors import LinearizeError

__all__ = ["LETTERS", "LetterItem", "build_letters", "choose_letters", "lettered", "summarise_letters"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# With two choices the letters say nothing that the two orders of `choices` would not.
LEAST = 3

# One item in all its orders: order s shows choice (letter + s) modulo n behind a letter. For each, the tokens of the
# prompt; and the tokens of the letters, the same for all.
LetterItem = tuple[list[list[int]], list[int]]


def lettered(items: Sequence[AnyItem]) -> bool:
    """Whether a task can be asked by letter: its choices continue a query, and there are three or more of each."""
    return all(isinstance(item, Item) and LEAST <= len(item.choices) <= len(LETTERS) for item in items)


def build_letters(tokenizer: Any, items: Sequence[Item]) -> list[LetterItem]:
    """The prompts of every item in every cyclic order, the same for every model that shares the tokenizer.

    Raises:
        LinearizeError: a tokenizer that does not write the letters as different tokens.
    """
    return [_encode(tokenizer, item) for item in items]


def _encode(tokenizer: Any, item: Item) -> LetterItem:
    n = len(item.choices)
    prompts: list[list[int]] = []
    letters: list[int] = []
    for order in range(n):
        lines = "".join(f"\n{LETTERS[place]}. {item.choices[(place + order) % n]}" for place in range(n))
        shared, endings = encode_choices(
            tokenizer, f"{item.query.rstrip()}{lines}\nAnswer:", [f" {letter}" for letter in LETTERS[:n]]
        )
        # A tokenizer may write the space by itself; it then belongs to what is shared.
        while len({ending[0] for ending in endings}) == 1 and all(len(ending) > 1 for ending in endings):
            shared, endings = [*shared, endings[0][0]], [ending[1:] for ending in endings]
        letters = [ending[0] for ending in endings]
        if len(set(letters)) < n:
            raise LinearizeError(f"letters: the tokenizer does not tell {', '.join(LETTERS[:n])} apart by one token")
        prompts.append(shared)
    return prompts, letters


def choose_letters(model: nn.Module, items: Sequence[LetterItem]) -> list[list[int]]:
    """For each item and order the place of the likeliest letter, 0 is A; -1 where logits are not finite.

    Prompts are sorted by length and run in batches of `TOKENS_AT_ONCE` tokens, padded on the right, as in `choices`.
    """
    asked = [(number, order) for number, (prompts, _) in enumerate(items) for order in range(len(prompts))]
    asked.sort(key=lambda one: len(items[one[0]][0][one[1]]), reverse=True)
    chosen = [[-1] * len(prompts) for prompts, _ in items]
    head = output_head(model)
    with inference(model):
        while asked:
            longest = len(items[asked[0][0]][0][asked[0][1]])
            size = max(1, TOKENS_AT_ONCE // longest)
            batch, asked = asked[:size], asked[size:]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            last = []
            for row, (number, order) in enumerate(batch):
                tokens = items[number][0][order]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                last.append(len(tokens) - 1)
            states = hidden_states(model, ids.to(device_of(model)))[range(len(batch)), last]
            for (number, order), logits in zip(batch, head(states).float().cpu()):
                own = logits[items[number][1]]
                chosen[number][order] = int(own.argmax()) if own.isfinite().all() else -1
    return chosen


def summarise_letters(
    chosen: Mapping[str, Sequence[Sequence[int]]],
    items: Sequence[Item],
    comparisons: Sequence[tuple[str, str]],
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy over all orders, the letters that were chosen, and how often the same choice is taken in every order.

    Args:
        chosen: row name -> what `choose_letters` returned.
        items: what was asked.
        comparisons: pairs (row, against), compared item by item.
        seed: of the bootstrap over items.

    Returns:
        One task of the `"letters"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    counts = [len(item.choices) for item in items]
    asked, most = sum(counts), max(counts)
    right = {row: _right(found, items) for row, found in chosen.items()}
    # Over all orders a letter is right once an item that has it.
    true = [sum(letter < count for count in counts) / asked for letter in range(most)]
    rows = {}
    for row, found in chosen.items():
        said = [sum(one.count(letter) for one in found) / asked for letter in range(most)]
        rows[row] = {
            "accuracy": float(right[row].mean()),
            "ci95": mean_interval(right[row], seed),
            "letters": said,
            "letter_distance": sum(abs(one - other) for one, other in zip(said, true)) / 2,
            "consistency": sum(_consistent(one) for one in found) / len(found),
        }
    return {
        "n_items": len(items),
        "chance": sum(1 / count for count in counts) / len(counts),
        "chance_consistency": sum(count ** (1 - count) for count in counts) / len(counts),
        "letters": list(LETTERS[:most]),
        "true": true,
        "rows": rows,
        "comparisons": [
            {"row": row, "against": against, **_difference(right[row] - right[against], seed)}
            for row, against in comparisons
        ],
    }


def _right(chosen: Sequence[Sequence[int]], items: Sequence[Item]) -> Tensor:
    """Float64 (items,): the share of an item's orders in which the right choice is taken."""
    shares = [
        sum(letter >= 0 and (letter + order) % len(one) == item.gold for order, letter in enumerate(one)) / len(one)
        for one, item in zip(chosen, items)
    ]
    return torch.tensor(shares, dtype=torch.float64)


def _consistent(chosen: Sequence[int]) -> bool:
    """Whether every order takes the same choice."""
    return min(chosen) >= 0 and len({(letter + order) % len(chosen) for order, letter in enumerate(chosen)}) == 1


def _difference(difference: Tensor, seed: int) -> dict[str, Any]:
    return {"accuracy_difference": float(difference.mean()), "ci95": mean_interval(difference, seed)}
