"""Texts that the teacher writes itself: training data in the teacher's own distribution, from nothing.

The texts are sampled in rounds. A round is one line of the cache file, written at once, and round r draws from a seed
that depends on r alone: a run that was killed keeps its finished rounds and goes on to write the same texts.
"""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["OPENINGS", "write_texts"]

# Neutral beginnings, so that texts differ from their first words on. Every second text has no opening of its own but
# what precedes any text; chat models then write a whole conversation, the question included.
OPENINGS = (
    "The", "In the", "When", "A common", "How to", "Once", "People", "The first", "It is", "According to", "There are",
    "Many", "If you", "One of the", "As a", "This", "Most", "To make", "After the", "What is", "Although", "Our",
    "Dear", "During", "Every", "For", "Here is", "I", "Let us", "Question:", "She", "def ",
)  # fmt: skip
ROWS = 16
# Plain sampling lets small models slip into gibberish; choosing among the likeliest few is also cheap, which sorting
# the vocabulary, as nucleus sampling does, is not.
TEMPERATURE = 0.8
TOP_K = 100
SHORTEST = 64
# Rounds in a row that bring no new text before the teacher counts as having nothing more to say.
PATIENCE = 3


def write_texts(
    teacher: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: int,
    seq_len: int,
    seed: int,
    prompt: str | None = None,
    cache_dir: str | Path | None = None,
) -> list[list[int]]:
    """Let the teacher write at least `tokens` tokens.

    Args:
        teacher: the original model, in any mode; left as it was.
        tokenizer: the teacher's.
        tokens: how many to write. A later call with more continues the same texts if their length is the same.
        seq_len: the most tokens a text has.
        seed: of the sampling.
        prompt: how each text begins; None takes `OPENINGS`.
        cache_dir: where `generated-<hash>.jsonl` is kept; None keeps nothing.

    Returns:
        Distinct texts as token ids, opening included.

    Raises:
        LinearizeError: the teacher repeats itself before it has written `tokens` tokens, or a prompt as long as a row.
    """
    length = min(seq_len, max(SHORTEST, -(-tokens // ROWS)))
    file = None
    if cache_dir is not None:
        file = Path(cache_dir) / f"generated-{_fingerprint(teacher, tokenizer, length, seed, prompt)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
    rounds = _read_rounds(file)
    texts: dict[tuple[int, ...], None] = {}
    barren = 0
    done = 0
    with _progress() as progress:
        task = progress.add_task("the teacher writes", total=tokens)
        for number in _endless():
            if number < len(rounds):
                fresh = rounds[number]
            else:
                fresh = _write_round(teacher, tokenizer, length, seed, number, prompt)
                _append_round(file, fresh)
            before = len(texts)
            texts.update(dict.fromkeys(map(tuple, fresh)))
            barren = 0 if len(texts) > before else barren + 1
            done = sum(map(len, texts))
            progress.update(task, completed=min(done, tokens))
            if done >= tokens:
                return [list(text) for text in texts]
            if barren == PATIENCE:
                break
    raise LinearizeError(
        f"data source generated: the teacher wrote {done} tokens of different texts, {tokens} were asked for; "
        "lower 'tokens', or give another 'prompt'"
    )


def _endless() -> Any:
    number = 0
    while True:
        yield number
        number += 1


def _write_round(
    teacher: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    seed: int,
    number: int,
    prompt: str | None,
) -> list[list[int]]:
    """One batch of samples, `length` tokens each."""
    draw = random.Random(f"{seed} {number}")
    openings = [prompt] * ROWS if prompt is not None else draw.sample(OPENINGS, ROWS)
    starts = [list(tokenizer(opening)["input_ids"]) for opening in openings]
    if prompt is None and (start := _bare_start(tokenizer)):
        starts[::2] = [start] * len(starts[::2])
    longest = max(map(len, starts))
    if longest >= length:
        raise LinearizeError(
            f"data source generated: the prompt has {longest} tokens, a text at most {length}; give a shorter prompt"
        )
    pad = tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(start)) + start for start in starts], device=teacher.device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in starts], device=teacher.device)
    was_training = teacher.training
    teacher.eval()
    try:
        # The global generators are left as they were: writing texts must not change what a run draws later.
        with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
            torch.manual_seed(draw.getrandbits(63))
            rows = teacher.generate(
                ids,
                attention_mask=mask,
                # Enough for the shortest opening; the other texts are cut to the same length.
                max_new_tokens=length - min(map(len, starts)),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                top_p=1.0,
                repetition_penalty=1.0,
                pad_token_id=pad,
                # An id that no model writes: after its end-of-text token a text goes on with the next one, as in
                # packed rows, and no row of the batch idles.
                eos_token_id=teacher.get_input_embeddings().weight.shape[0],
            )
    finally:
        teacher.train(was_training)
    return [row[longest - len(start) :][:length] for row, start in zip(rows.tolist(), starts)]


def _bare_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What precedes any text: of a chat, all up to the user's first word; else the tokenizer's first token, if any."""
    if tokenizer.chat_template is not None:
        word = "linearize"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": word}], tokenize=False)
        assert isinstance(chat, str)
        return list(tokenizer(chat.partition(word)[0], add_special_tokens=False)["input_ids"])
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _fingerprint(
    teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", length: int, seed: int, prompt: str | None
) -> str:
    """What the texts depend on. In bfloat16, so that the same model loaded in another dtype keeps its texts."""
    weight = teacher.get_input_embeddings().weight[:16].detach().to("cpu", torch.bfloat16).float()
    told = [teacher.config.model_type, len(tokenizer), length, seed, prompt, weight.flatten().tolist()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _read_rounds(file: Path | None) -> list[list[list[int]]]:
    """The finished rounds. A last line that was cut short, when the writer was killed, is removed from the file."""
    if file is None or not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as lines:
            lines.truncate(len(whole))
    try:
        return [json.loads(line)["texts"] for line in whole.splitlines()]
    except (ValueError, KeyError, TypeError):
        raise LinearizeError(f"{file}: the cache of generated texts is damaged; delete the file") from None


def _append_round(file: Path | None, texts: list[list[int]]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"texts": texts}) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def _progress() -> Any:
    """A bar on the terminal, nothing in a log file."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal, transient=True)
