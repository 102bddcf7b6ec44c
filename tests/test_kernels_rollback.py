"""Taking tokens back: a memory is then what it was, and goes on as one that never saw them."""

import copy

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels.near_far import MIXERS, Memory, near_far_attention, near_far_step
from linearize.kernels.near_far.rollback import remove_tokens
from tests.tolerance import assert_near

WINDOW, SINKS, HEADS, KV_HEADS, SIZE, BATCH = 4, 2, 4, 2, 8, 3
OPTIONS = {"window": WINDOW, "sinks": SINKS}


def make_inputs(length, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(BATCH, HEADS, length, SIZE, dtype=dtype)
    k, v = torch.randn(2, BATCH, KV_HEADS, length, SIZE, dtype=dtype)
    return q, k, v


def make_mixer(name):
    if name == "none":
        return None
    torch.manual_seed(1)
    mixer = MIXERS[name](HEADS, KV_HEADS, SIZE, SIZE).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def steps(q, k, v, memory, mixer, pieces, masks=None, **options):
    """Outputs of these tokens in pieces, and the memory after them."""
    outs, done = [], 0
    for piece in pieces:
        part = slice(done, done + piece)
        mask = None if masks is None else masks[:, part]
        out, memory = near_far_step(
            q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, **OPTIONS, mask=mask, **options
        )
        outs.append(out)
        done += piece
    return torch.cat(outs, 2), memory


def tensors(memory):
    """What a memory remembers, as far as any later token can see it."""
    length, state = memory.lengths, () if memory.state is None else tuple(memory.state)
    slot = torch.arange(2 * WINDOW)
    chunk, offset = (length - 1)[:, None] // WINDOW, (length - 1)[:, None] % WINDOW
    own = slot // WINDOW == chunk % 2
    seen = torch.where(own, slot % WINDOW <= offset, chunk > 0)[:, None, :, None]
    sink = (torch.arange(SINKS) < length[:, None])[:, None, :, None]
    rings = (memory.near_k * seen, memory.near_v * seen, memory.sink_k * sink, memory.sink_v * sink)
    return (*rings, *state)


@pytest.mark.parametrize("mixer", ["none", "hedgehog"])
@pytest.mark.parametrize("pieces", [[1], [7, 1], [3, 5, 13, 1]], ids=str)
@torch.no_grad()
def test_any_length_back_to_a_window(mixer, pieces):
    """From every length, by every number of tokens: what was there, and the outputs of what follows."""
    mixer, length = make_mixer(mixer), 26
    q, k, v = make_inputs(length + 10)
    whole = near_far_attention(q, k, v, mixer, **OPTIONS)
    first = sum(pieces[:-1])
    for reached in range(first + 1, length):
        taken = [*pieces[:-1], *[1] * (reached - first)]
        _, there = steps(q, k, v, Memory.empty(k, v, mixer, **OPTIONS), mixer, taken)
        for removed in range(min(WINDOW, reached) + 1):
            memory = copy.deepcopy(there)
            remove_tokens(memory, torch.full((BATCH,), removed), WINDOW)
            before = reached - removed
            assert memory.uniform == before
            assert memory.lengths.tolist() == [before] * BATCH
            expected = Memory.empty(k, v, mixer, **OPTIONS)
            if before:
                _, expected = steps(q, k, v, expected, mixer, [1] * before)
            for actual, wanted in zip(tensors(memory), tensors(expected), strict=True):
                assert_near(actual, wanted)
            rest = (x[:, :, before:] for x in (q, k, v))
            out, _ = steps(*rest, memory, mixer, [1, 1, 1, 1, 1, 2])
            assert_near(out, whole[:, :, before : before + 7])


@pytest.mark.parametrize("mixer", ["none", "hedgehog"])
@torch.no_grad()
def test_back_and_forth(mixer):
    """As speculative decoding does: again and again, other tokens each time, over many chunk borders."""
    mixer = make_mixer(mixer)
    q, k, v = make_inputs(60)
    whole = near_far_attention(q, k, v, mixer, **OPTIONS)
    wrong = make_inputs(60, seed=9)
    memory = Memory.empty(k, v, mixer, **OPTIONS)
    generator = torch.Generator().manual_seed(2)
    done = 0
    while done < 50:
        drafted = int(torch.randint(1, WINDOW + 1, (), generator=generator))
        rejected = int(torch.randint(0, drafted + 1, (), generator=generator))
        good = drafted - rejected
        mixed = [
            torch.cat([right[:, :, done : done + good], other[:, :, :rejected]], 2)
            for right, other in zip((q, k, v), wrong, strict=True)
        ]
        together = bool(torch.randint(0, 2, (), generator=generator))
        out, memory = steps(*mixed, memory, mixer, [drafted] if together else [1] * drafted)
        assert_near(out[:, :, :good], whole[:, :, done : done + good])
        remove_tokens(memory, torch.full((BATCH,), rejected), WINDOW)
        done += good


@pytest.mark.parametrize("mixer", ["none", "hedgehog"])
@torch.no_grad()
def test_rows_of_their_own_lengths(mixer):
    """Rows at other places of their chunks, and another number of tokens from each."""
    mixer = make_mixer(mixer)
    q, k, v = make_inputs(31)
    pads = torch.tensor([0, 3, 6])
    mask = torch.arange(31) >= pads[:, None]
    whole = near_far_attention(q, k, v, mixer, **OPTIONS, mask=mask)
    for reached in (17, 18, 19, 20, 21):
        for removed in ([0, 1, 2], [4, 0, 3], [1, 4, 4]):
            memory = Memory.empty(k, v, mixer, **OPTIONS)
            _, memory = steps(q, k, v, memory, mixer, [9, *[1] * (reached - 9)], mask)
            remove_tokens(memory, torch.tensor(removed), WINDOW)
            for row, back in enumerate(removed):
                assert int(memory.lengths[row]) == reached - int(pads[row]) - back
            # Each row goes on where it stands: the tokens that follow are those of its own place.
            columns = torch.tensor([[reached - back + i for i in range(6)] for back in removed])
            rows = torch.arange(BATCH)[:, None]
            later = [x.transpose(1, 2)[rows, columns].transpose(1, 2) for x in (q, k, v)]
            out, _ = steps(*later, memory, mixer, [1, 1, 1, 1, 2])
            assert_near(out, whole.transpose(1, 2)[rows, columns].transpose(1, 2))


class TestErrors:
    def make(self, mixer="hedgehog", length=22):
        mixer = make_mixer(mixer)
        q, k, v = make_inputs(30)
        with torch.no_grad():
            _, memory = steps(q, k, v, Memory.empty(k, v, mixer, **OPTIONS), mixer, [length - 4, 1, 1, 1, 1])
        return memory, mixer, (q, k, v)

    def refused(self, memory, removed, match):
        before = [x.clone() for x in tensors(memory)]
        with pytest.raises(LinearizeError, match=match):
            remove_tokens(memory, torch.tensor(removed), WINDOW)
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(memory), strict=True))

    def test_more_than_a_window(self):
        self.refused(
            self.make()[0], [5, 0, 0], "cannot remove 5 tokens, a converted layer can go back by its window of 4"
        )

    def test_more_than_there_are(self):
        memory, mixer, (q, k, v) = self.make()
        _, memory = steps(q, k, v, Memory.empty(k, v, mixer, **OPTIONS), mixer, [2])
        self.refused(memory, [3, 3, 3], "its shortest row has 2")

    def test_twice_into_the_same_chunk(self):
        """18 = 4 W + 2: by 4 into chunk 3, from where chunk 1 is gone."""
        memory, mixer, (q, k, v) = self.make(length=18)
        remove_tokens(memory, torch.tensor([4, 4, 4]), WINDOW)
        remove_tokens(memory, torch.tensor([1, 1, 1]), WINDOW)  # 13 tokens, the first of chunk 3
        self.refused(memory, [1, 1, 1], "earlier removals have used them up")
        rest = (x[:, :, 13:] for x in (q, k, v))
        with torch.no_grad():
            _, memory = steps(*rest, memory, mixer, [1, 1, 1, 1])
        remove_tokens(memory, torch.tensor([4, 4, 4]), WINDOW)  # chunk 4 has begun again
        assert memory.uniform == 13

    def test_nothing_kept(self):
        memory, _, _ = self.make()
        memory.undo = None
        self.refused(memory, [1, 1, 1], "keeps nothing to go back to")


class TestStatic:
    """A memory for graphs: the same outputs, addresses that stay, no question to the data."""

    @pytest.mark.parametrize("mixer", ["none", "hedgehog", "gla"])
    @pytest.mark.parametrize("ragged", [False, True])
    @torch.no_grad()
    def test_same_as_the_other(self, mixer, ragged):
        mixer = make_mixer(mixer) if mixer != "gla" else make_gla()
        q, k, v = make_inputs(40)
        if mixer is not None and not mixer.rotary:
            q, k = (torch.cat([x, x.flip(-1)], -1) for x in (q, k))
        options = OPTIONS | {"mix": "gate" if mixer is not None and not mixer.rotary else "normalizer"}
        mask = None
        if ragged:
            mask = torch.arange(40) >= torch.tensor([0, 3, 6])[:, None]
            mask[1, 37] = False  # a token that is none, while decoding
        whole = near_far_attention(q, k, v, mixer, **options, mask=mask)
        for first in (1, 5, 8, 19):
            memory = Memory.empty(k, v, mixer, **OPTIONS, static=True)
            held = (memory.keys, memory.values, memory.lengths, *(memory.state or ()))
            done = 0
            for piece in (first, *[1] * 9, 3, *[1] * 40):
                part = slice(done, min(done + piece, 40))
                if part.start >= 40:
                    break
                out, memory = near_far_step(
                    q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, **options,
                    mask=None if mask is None else mask[:, part],
                )  # fmt: skip
                assert_near(out, whole[:, :, part])
                done = part.stop
            now = (memory.keys, memory.values, memory.lengths, *(memory.state or ()))
            assert [x.data_ptr() for x in held] == [x.data_ptr() for x in now]


def make_gla():
    torch.manual_seed(1)
    return MIXERS["gla"](HEADS, KV_HEADS, SIZE, None).double()
