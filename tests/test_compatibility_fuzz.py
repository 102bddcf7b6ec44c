"""Random conversations with random models: pieces, padding, moved rows and tokens taken back, against one full pass.

Hypothesis makes them and shrinks what fails to the shortest one, which it prints. The fast test draws the same examples
every time, the slow one new ones from a seed that it prints; `FUZZ_SEED=... pytest -m slow` draws those again.
"""

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from tests.parity import FARS, LOGITS, WINDOW, Case, make, positions_of
from tests.tiny_models import FAMILIES, VOCAB

SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],  # no time on explaining
}
SIZES = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5)


@dataclass(frozen=True)
class Give:
    """Columns of new tokens; `padding` of them all are none, in every row its own."""

    columns: int
    padding: float
    seed: int


@dataclass(frozen=True)
class Move:
    """Rows that stand where the old ones stood, by `reorder_cache` or `batch_select_indices`."""

    rows: tuple[int, ...]
    select: bool


@dataclass(frozen=True)
class Repeat:
    """Every row so often."""

    times: int


@dataclass(frozen=True)
class Crop:
    """Columns taken back."""

    columns: int


@dataclass(frozen=True)
class Record:
    """From here on everything that comes may be taken back."""


seeds = st.integers(0, 99)
gives = st.builds(Give, st.sampled_from(SIZES), st.sampled_from((0.0, 0.0, 0.3, 0.9)), seeds)
long_gives = st.builds(Give, st.sampled_from((5 * WINDOW, 6 * WINDOW + 3)), st.sampled_from((0.0, 0.3)), seeds)
moves = st.builds(Move, st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), st.booleans())
repeats = st.builds(Repeat, st.integers(1, 2))
crops = st.builds(Crop, st.integers(0, 3 * WINDOW))
first = st.one_of(long_gives, long_gives, gives)
conversations = st.lists(
    st.one_of(gives, gives, moves, repeats, crops, crops, st.builds(Record)), min_size=3, max_size=9
)
cases = st.builds(Case, st.sampled_from(FAMILIES), st.sampled_from(FARS), st.sampled_from(((), (0,), (1,))))


@lru_cache(maxsize=16)
def model_of(case: Case) -> Any:
    return make(case)


@dataclass
class Conversation:
    """A cache and what was put into it.

    highest: the most columns that it has held. recorded: the columns that it can always go back to, None without.
    """

    model: Any
    rolls_back: bool
    tokens: Tensor
    mask: Tensor
    cache: DynamicCache
    highest: int = 0
    recorded: int | None = None

    @torch.no_grad()
    def give(self, step: Give) -> None:
        generator = torch.Generator().manual_seed(step.seed)
        shape = self.tokens.shape[0], step.columns
        real = (torch.rand(shape, generator=generator) >= step.padding).long()
        tokens = torch.randint(1, VOCAB, shape, generator=generator) * real
        self.tokens, self.mask = torch.cat([self.tokens, tokens], dim=1), torch.cat([self.mask, real], dim=1)
        positions = positions_of(self.mask)
        inputs = {"attention_mask": self.mask, "position_ids": positions[:, -step.columns :]}
        actual = self.model(tokens, past_key_values=self.cache, **inputs).logits[real.bool()]
        full = {"attention_mask": self.mask, "position_ids": positions}
        expected = self.model(self.tokens, use_cache=False, **full).logits[:, -step.columns :][real.bool()]
        torch.testing.assert_close(actual, expected, **LOGITS)
        assert self.cache.get_seq_length() == self.tokens.shape[1]
        self.highest = max(self.highest, self.tokens.shape[1])

    def move(self, step: Move) -> None:
        rows = torch.tensor(step.rows) % self.tokens.shape[0]
        (self.cache.batch_select_indices if step.select else self.cache.reorder_cache)(rows)
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]

    def repeat(self, step: Repeat) -> None:
        if self.tokens.shape[0] * step.times > 8:
            return
        self.cache.batch_repeat_interleave(step.times)
        self.tokens = self.tokens.repeat_interleave(step.times, dim=0)
        self.mask = self.mask.repeat_interleave(step.times, dim=0)

    def record(self, step: Record) -> None:
        self.cache.activate_past_recording()
        self.recorded = self.tokens.shape[1]

    def crop(self, step: Crop) -> None:
        """As far as is promised: W columns under the most that there were, or to what is recorded. One stays: rows of
        transformers' own layers do not move where there is none."""
        columns = self.tokens.shape[1]
        without = WINDOW - self.highest + columns if self.rolls_back else 0
        recorded = 0 if self.recorded is None else columns - self.recorded
        remove = min(step.columns, max(without, recorded), columns - 1)
        if not remove and not self.rolls_back and self.recorded is None:
            return
        self.cache.crop(-remove)
        event(f"tokens taken back: {remove > 0}, more than W: {remove > WINDOW}")
        keep = columns - remove
        self.recorded = None if self.recorded is None else keep
        self.tokens, self.mask = self.tokens[:, :keep], self.mask[:, :keep]


def hold(case: Case, rows: int, steps: list[Any]) -> None:
    """Run a conversation; every piece's logits are compared."""
    empty = torch.zeros(rows, 0, dtype=torch.long)
    talk = Conversation(model_of(case), case.far != "gla", empty, empty, DynamicCache())
    takes = {Give: talk.give, Move: talk.move, Repeat: talk.repeat, Crop: talk.crop, Record: talk.record}
    for step in steps:
        note(str(step))
        takes[type(step)](step)
    event(f"more than 5 W columns: {talk.highest > 5 * WINDOW}")


@settings(max_examples=40, derandomize=True, **COMMON)
@given(cases, st.integers(1, 3), first, conversations)
def test_conversations(case, rows, begin, steps):
    hold(case, rows, [begin, *steps])


@pytest.mark.slow
def test_many_conversations():
    print(f"FUZZ_SEED={SEED}")

    @seed(SEED)
    @settings(max_examples=500, **COMMON)
    @given(cases, st.integers(1, 3), first, conversations)
    def conversations_of_the_seed(case, rows, begin, steps):
        hold(case, rows, [begin, *steps])

    conversations_of_the_seed()
