"""A tiny random model with its tokenizer, saved as a folder: what commands take as MODEL."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import make_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

__all__ = ["CHAT_TEMPLATE", "CHECK", "save_tiny_model"]

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

# A program's begin: `check(student)` says whether it gives what folder/expected.pt, (tokens, logits), holds.
CHECK = """
import sys, torch
folder = sys.argv[1]
def check(student):
    tokens, expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, expected)
    print("same", type(student).__name__)
"""


def save_tiny_model(folder: str | Path, family: str = "llama", chat: bool = False, **changes: Any) -> Path:
    """Write a random 2-layer model in float32 and its tokenizer; returns the folder. No random state changes."""
    own = {"num_hidden_layers": 2, "vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        model = make_model(family, **own | {"pad_token_id": 3} | changes)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return Path(folder)
