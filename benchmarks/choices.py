"""Questions scored by log-likelihood; `linearize.benchmarks.items` has their three kinds.

Raw accuracy takes the choice with the highest summed log-likelihood; normalised accuracy divides it by the choice's
length in UTF-8 bytes first, so that short choices have no advantage (bytes, not tokens, so that tokenizers stay
comparable). Where the contexts are the choice, the same continuation is scored after each. A last word counts where
greedy decoding writes exactly its tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.inference import TOKENS_AT_ONCE, device_of, hidden_states, inference, output_head
from linearize.benchmarks.items import AnyItem, Contexts, Item
from linearize.benchmarks.resampling import RESAMPLES, interval, mean_interval, resampled_interval
from linearize.errors import LinearizeError

__all__ = [
    "encode_choices",
    "mean_retention",
    "multiple_choice",
    "retention",
    "score_items",
    "summarise_choices",
    "summarise_words",
]

# Scored positions whose logits are made at once: 512 x 49k entries are 100 MB in float32.
SCORED_AT_ONCE = 512


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


def score_items(model: nn.Module, tokenizer: Any, items: Sequence[AnyItem]) -> list[list[tuple[float, bool]]]:
    """For every item, for each of its choices: the summed log-likelihood (nats) of what is scored, and whether
    greedy decoding would write exactly that. A last word is one choice.

    Sequences of all items are sorted by length and run in batches of `TOKENS_AT_ONCE` tokens, padded on the right:
    nothing before the padding sees it, so no mask is needed. Logits are made of scored positions only.
    """
    sequences = []  # item, choice, tokens, index of the first scored token
    for number, item in enumerate(items):
        for choice, (prefix, ending) in enumerate(_encode(tokenizer, item)):
            prefix = prefix or [_start_token(tokenizer)]
            sequences.append((number, choice, prefix + ending, len(prefix)))
    # Nothing reads the last token's output. The largest batch comes first: out of memory early.
    sequences.sort(key=lambda sequence: len(sequence[2]), reverse=True)
    scores: list[dict[int, tuple[float, bool]]] = [{} for _ in items]
    with inference(model):
        while sequences:
            size = max(1, TOKENS_AT_ONCE // max(1, len(sequences[0][2]) - 1))
            batch, sequences = sequences[:size], sequences[size:]
            scored = _scored_tokens(model, [(tokens, first) for _, _, tokens, first in batch])
            for (number, choice, _, _), (likelihood, greedy) in zip(batch, scored):
                scores[number][choice] = (float(likelihood.double().sum()), bool(greedy.all()))
    return [[found[choice] for choice in range(len(found))] for found in scores]


def multiple_choice(model: nn.Module, tokenizer: Any, items: Sequence[Item | Contexts]) -> list[list[float]]:
    """Summed log-likelihood, nats, of every choice of every item; `summarise_choices` makes accuracies of it."""
    return [[likelihood for likelihood, _ in choices] for choices in score_items(model, tokenizer, items)]


def _encode(tokenizer: Any, item: AnyItem) -> list[tuple[list[int], list[int]]]:
    """For each choice the tokens before what is scored, and the scored ones."""
    if isinstance(item, Item):
        joint = delimiter(item.query)
        # A choice's leading space belongs to its first token, so it goes with the choice.
        query, lead = item.query + joint.rstrip(), joint[len(joint.rstrip()) :]
        prefix, endings = encode_choices(tokenizer, query, [lead + choice for choice in item.choices])
        return [(prefix, ending) for ending in endings]
    contexts = item.contexts if isinstance(item, Contexts) else (item.context,)
    pairs = []
    for context in contexts:
        text = item.continuation if not context or context[-1].isspace() else f" {item.continuation}"
        prefix, (ending,) = encode_choices(tokenizer, context, [text])
        pairs.append((prefix, ending))
    return pairs


def _start_token(tokenizer: Any) -> int:
    """A token to score an empty query's choices after."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise LinearizeError("choices: a query is empty and the tokenizer has no bos or eos token; give it a query")


def _scored_tokens(model: nn.Module, sequences: Sequence[tuple[list[int], int]]) -> list[tuple[Tensor, Tensor]]:
    """For each (tokens, index of the first scored one): log-likelihood, float32, and whether it is the likeliest, of
    every scored token, on the CPU."""
    longest = max(len(tokens) for tokens, _ in sequences) - 1
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (tokens, first) in enumerate(sequences):
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        rows += [row] * (len(tokens) - first)
        columns += range(first - 1, len(tokens) - 1)
        targets += tokens[first:]
    device, head = device_of(model), output_head(model)
    hidden = hidden_states(model, ids.to(device))[rows, columns]
    likelihood, greedy = [], []
    for states, target in zip(hidden.split(SCORED_AT_ONCE), torch.tensor(targets, device=device).split(SCORED_AT_ONCE)):
        logits = head(states).float()
        likelihood.append(torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0].cpu())
        greedy.append((logits.argmax(-1) == target).cpu())
    lengths = [len(tokens) - first for tokens, first in sequences]
    return list(zip(torch.cat(likelihood).split(lengths), torch.cat(greedy).split(lengths)))


def summarise_choices(
    scores: Mapping[str, list[list[float]]], items: Sequence[Item | Contexts], baseline: str, seed: int = 0
) -> dict[str, Any]:
    """Accuracies, and what share of the baseline's accuracy each row keeps; see `retention`.

    Args:
        scores: row name -> log-likelihoods, as `multiple_choice` returns them.
        items: what was scored.
        baseline: the row that retention compares with; it is among `scores`.
        seed: of the bootstrap over items.

    Returns:
        One task of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    chance = torch.tensor([1 / _choices(item) for item in items], dtype=torch.float64)
    right = {name: [_right(values, items, per_byte) for per_byte in (False, True)] for name, values in scores.items()}
    result: dict[str, Any] = {"n_items": len(items), "chance": float(chance.mean()), "rows": {}}
    for name, kinds in right.items():
        pairs = zip(("raw", "normalised"), kinds, right[baseline])
        result["rows"][name] = {kind: _score(hits, reference, chance, seed) for kind, hits, reference in pairs}
    return result


def summarise_words(scores: Mapping[str, list[tuple[float, bool]]], baseline: str, seed: int = 0) -> dict[str, Any]:
    """The same for last words, which nobody guesses: chance is 0.

    Args:
        scores: row name -> for each item its word's log-likelihood, and whether greedy decoding writes it.
        baseline: the row that retention compares with.
        seed: of the bootstrap over items.
    """
    hits = {
        name: torch.tensor([greedy and _finite(likelihood) for likelihood, greedy in values], dtype=torch.float64)
        for name, values in scores.items()
    }
    chance = torch.zeros_like(hits[baseline])
    rows: dict[str, Any] = {}
    for name, values in scores.items():
        likelihood = torch.tensor([value for value, _ in values], dtype=torch.float64)
        finite = bool(likelihood.isfinite().all())
        rows[name] = {
            "raw": _score(hits[name], hits[baseline], chance, seed),
            "log_likelihood": float(likelihood.mean()) if finite else None,
            "log_likelihood_ci95": mean_interval(likelihood, seed) if finite else None,
        }
    return {"n_items": len(chance), "chance": 0.0, "rows": rows}


def retention(hits: Tensor, reference: Tensor, chance: Tensor, seed: int = 0) -> dict[str, Any]:
    """(s - r) / (t - r) with its interval, where s is a row's accuracy, t the baseline's and r that of guessing.

    The interval resamples items, the same ones for s and t. The value is None where t is not above r, its interval
    None where resampled t often are not: then these items cannot tell how much was kept.

    Args:
        hits, reference: float64 (items,), 1 where the row and the baseline are right.
        chance: float64 (items,), how likely a guess is right; zeros give s / t.
        seed: of the resampling.
    """
    above = float((reference - chance).mean())
    if above <= 0:
        return {"value": None, "ci95": None}

    def ratio(index: Tensor) -> Tensor:
        kept, whole = (hits - chance)[index].mean(1), (reference - chance)[index].mean(1)
        # A resample whose baseline only guesses has no retention.
        return torch.where(whole > 0, kept / whole, torch.nan)

    return {"value": float((hits - chance).mean()) / above, "ci95": interval(ratio, len(hits), seed)}


def mean_retention(tasks: Sequence[Mapping[str, Any]], baseline: str, seed: int = 0) -> dict[str, Any]:
    """What each row keeps over all tasks: (mean s - mean r) / (mean t - mean r), means over tasks, each weighing the
    same. The interval resamples the items of every task.

    Args:
        tasks: parts of evaluate.json, as `summarise_choices` and `summarise_words` return them.
        baseline: the row that gives t.
        seed: of the resampling.

    Returns:
        The `"task_mean"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    chance = sum(task["chance"] for task in tasks) / len(tasks)
    hits = {row: [_hits(task, row) for task in tasks] for row in tasks[0]["rows"]}
    reference, rows = hits[baseline], {}
    draws = []
    for number, values in enumerate(reference):
        generator = torch.Generator().manual_seed(seed + number)
        draws.append(torch.randint(len(values), (RESAMPLES, len(values)), generator=generator))
    whole = torch.stack([values[index].mean(1) for values, index in zip(reference, draws)]).mean(0) - chance
    above = float(torch.stack([values.mean() for values in reference]).mean()) - chance
    for row, own in hits.items():
        accuracy = float(torch.stack([values.mean() for values in own]).mean())
        kept = torch.stack([values[index].mean(1) for values, index in zip(own, draws)]).mean(0) - chance
        ratio = torch.where(whole > 0, kept / whole, torch.nan)
        known: dict[str, Any] = {"value": None, "ci95": None}
        if above > 0:
            known = {"value": (accuracy - chance) / above, "ci95": resampled_interval(ratio, sum(map(len, own)))}
        rows[row] = {"accuracy": accuracy, "retention_over_chance": known}
    return {"tasks": len(tasks), "chance": chance, "rows": rows}


def _hits(task: Mapping[str, Any], row: str) -> Tensor:
    """Per item, 1 where the row is right: by log-likelihood per byte where there are choices."""
    scores = task["rows"][row]
    return torch.tensor([int(hit) for hit in scores.get("normalised", scores["raw"])["hits"]], dtype=torch.float64)


def _choices(item: Item | Contexts) -> int:
    return len(item.choices if isinstance(item, Item) else item.contexts)


def _score(hits: Tensor, reference: Tensor, chance: Tensor, seed: int) -> dict[str, Any]:
    return {
        "hits": "".join(str(int(hit)) for hit in hits),
        "accuracy": float(hits.mean()),
        "ci95": mean_interval(hits, seed),
        "retention": retention(hits, reference, torch.zeros_like(chance), seed),
        "retention_over_chance": retention(hits, reference, chance, seed),
    }


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _right(scores: list[list[float]], items: Sequence[Item | Contexts], per_byte: bool) -> Tensor:
    """Float64 (items,): 1 where the likeliest choice is the right one. A score that is not finite is wrong."""
    hits = []
    for values, item in zip(scores, items):
        choices = item.choices if isinstance(item, Item) else (item.continuation,) * len(item.contexts)
        lengths = [len(choice.encode()) if per_byte else 1 for choice in choices]
        likelihood = torch.tensor([v / n for v, n in zip(values, lengths)], dtype=torch.float64)
        hits.append(float(bool(likelihood.isfinite().all()) and int(likelihood.argmax()) == item.gold))
    return torch.tensor(hits, dtype=torch.float64)
