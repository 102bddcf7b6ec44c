"""Generation health: does a model stop, does it repeat itself, how long are its answers?

Log-likelihoods do not show a model that no longer ends its answers or runs into a loop. Every row answers the same
prompts greedily, in left-padded batches.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from linearize.benchmarks.inference import device_of, inference
from linearize.benchmarks.resampling import interval, mean_interval
from linearize.errors import LinearizeError

__all__ = [
    "QUESTIONS",
    "answer",
    "encode_prompts",
    "ends_in_loop",
    "load_prompts",
    "repetition",
    "summarise_answers",
]

NGRAM = 4
# An answer's end counts as a loop where at least 3 copies of one piece, together at least 16 tokens, stand there.
LOOP_COPIES, LOOP_TOKENS = 3, 16

QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What is the difference between weather and climate?",
    "Give me three tips for a good night's sleep.",
    "Explain what a library is to a child.",
    "How do I boil an egg?",
    "What is a prime number?",
    "Write two sentences about the sea.",
    "Why do leaves change colour in autumn?",
    "What does a judge do?",
    "How are mountains formed?",
    "Name four things that people use water for.",
    "What is the capital of France?",
    "Describe a cat in one paragraph.",
    "How does a candle burn?",
    "What should I pack for a day in the mountains?",
    "Why do we have leap years?",
    "What is bread made of?",
    "Write a short poem about rain.",
    "How can I remember the names of new people?",
    "What is the purpose of a bridge?",
    "Explain how plants get their food.",
    "What is a volcano?",
    "Why do people shake hands?",
    "How many days are in a week, and what are they called?",
    "What makes a good friend?",
    "Tell me how to clean a window.",
    "What is the moon?",
    "Why is exercise good for you?",
    "How does a boat float?",
    "Write a polite note that declines an invitation.",
    "What is money for?",
)


def load_prompts(path: str | Path | None, limit: int) -> list[str]:
    """The first `limit` questions of a jsonl file, or `QUESTIONS`.

    Args:
        path: a line is an object with `messages` (a list of role and content, of which the first user's is read),
            or with a text `prompt` or `instruction`.
        limit: how many.

    Raises:
        LinearizeError: no such file, or a line without a question; names the line.
    """
    if path is None:
        return list(QUESTIONS[:limit])
    path = Path(path)
    if not path.is_file():
        raise LinearizeError(f"prompts: {str(path)!r} is not a file; name a jsonl file of chats or prompts")
    found: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if len(found) == limit:
            break
        if line.strip():
            found.append(_question(line, f"{path}:{number}"))
    if not found:
        raise LinearizeError(f"prompts: {str(path)!r} holds no prompts; each line is an object of messages or prompt")
    return found


def _question(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LinearizeError(f"{where}: not JSON ({error}); each line is an object of messages or prompt") from error
    if isinstance(record, dict):
        messages = record.get("messages")
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, dict) and message.get("role") == "user" and isinstance(message.get("content"), str):
                return message["content"]
        for key in ("prompt", "instruction"):
            if isinstance(record.get(key), str) and record[key].strip():
                return record[key]
    raise LinearizeError(f"{where}: no question; it needs messages with a user's turn, a prompt or an instruction")


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of each prompt, in the chat template where the tokenizer has one."""
    if tokenizer.chat_template is None:
        return [tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"] for prompt in prompts]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]


def answer(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Greedy answers, batches of prompts of about the same length, padded on the left.

    Returns:
        For each prompt `{"tokens": [int, ...], "ended": bool}`: without the end-of-text token, which `ended` says
        was written.
    """
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    device = device_of(model)
    with inference(model):
        for place in range(0, len(order), batch_size):
            batch = order[place : place + batch_size]
            width = len(prompts[batch[0]])
            ids = torch.full((len(batch), width), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            written = cast(Any, model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
            )
            for index, tokens in zip(batch, written[:, width:].tolist()):
                end = next((at for at, token in enumerate(tokens) if token in ends), None)
                answers[index] = {"tokens": tokens[:end], "ended": end is not None}
    return answers


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer, by the model and by the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return {token for token in (*found, tokenizer.eos_token_id) if token is not None}


def repetition(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams that it has written before; 0 for fewer than five tokens."""
    grams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the end is one piece again and again: at least 3 copies, together at least 16 tokens."""
    for period in range(1, len(tokens) // LOOP_COPIES + 1):
        span = max(LOOP_COPIES * period, LOOP_TOKENS)
        tail = tokens[-span:]
        if len(tail) == span and all(tail[i] == tail[i - period] for i in range(period, span)):
            return True
    return False


def summarise_answers(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    tokenizer: Any,
    max_new_tokens: int,
    baseline: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Rates and lengths of each row, with intervals over prompts.

    Args:
        answers: row name -> what `answer` returned.
        tokenizer: to show the answers as text.
        max_new_tokens: the limit that they were written under.
        baseline: the row whose mean length the others' is divided by.
        seed: of the bootstrap.

    Returns:
        The `"generation"` part of evaluate.json; see `linearize.benchmarks.evaluate`.
    """
    rows: dict[str, Any] = {}
    lengths = {
        name: torch.tensor([len(one["tokens"]) for one in found], dtype=torch.float64)
        for name, found in answers.items()
    }
    theirs = lengths[baseline]
    for name, found in answers.items():
        ours = lengths[name]
        whole = float(theirs.mean())

        def ratio(index: torch.Tensor, ours: torch.Tensor = ours) -> torch.Tensor:
            return ours[index].mean(1) / theirs[index].mean(1)

        rows[name] = {
            **_rate("end_rate", [float(one["ended"]) for one in found], seed),
            **_rate("repetition", [repetition(one["tokens"]) for one in found], seed),
            **_rate("loop_rate", [float(ends_in_loop(one["tokens"])) for one in found], seed),
            "mean_length": float(ours.mean()),
            "length_ratio": float(ours.mean()) / whole if whole else None,
            "length_ratio_ci95": interval(ratio, len(ours), seed),
            "answers": [tokenizer.decode(one["tokens"]) for one in found],
        }
    return {"n_prompts": len(theirs), "max_new_tokens": max_new_tokens, "rows": rows}


def _rate(key: str, values: list[float], seed: int) -> dict[str, Any]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {key: float(tensor.mean()), f"{key}_ci95": mean_interval(tensor, seed)}
