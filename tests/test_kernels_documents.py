"""Documents end to end in the rows of a batch: where they lie, and that each is a sequence of its own."""

import itertools
import random

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels.near_far import near_far_attention
from linearize.kernels.near_far.documents import SHORT, lay_out_documents
from linearize.kernels.near_far.ops import far_read
from linearize.kernels.near_far.transfer import far_divergence, split_attention
from tests.near_far_cases import FAR, far_options, make_inputs
from tests.tolerance import assert_near

W, S = 4, 3
# Of a row of 40 tokens: shorter than the sinks, one window, one that begins a bucket of its own.
LENGTHS = ([1, 2, 4, 8, 25], [39, 1])
T = 40


def lay_out(lengths, device="cpu"):
    borders = [0, *itertools.accumulate(itertools.chain(*lengths))]
    return lay_out_documents(borders, len(lengths), sum(lengths[0]), device)


def pieces(lengths):
    """(row, columns) of each document."""
    for row, sizes in enumerate(lengths):
        ends = list(itertools.accumulate(sizes))
        yield from ((slice(row, row + 1), slice(end - size, end)) for size, end in zip(sizes, ends))


class TestLayout:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_token_has_one_slot(self, seed):
        chance = random.Random(seed)
        length = 900
        rows = []
        for _ in range(3):
            cuts = sorted({0, length, *(chance.randrange(length) for _ in range(chance.choice((0, 3, 40))))})
            rows.append([b - a for a, b in itertools.pairwise(cuts)])
        documents = lay_out(rows)
        expected = [list(itertools.chain(*(range(n) for n in sizes))) for sizes in rows]
        assert documents.positions.tolist() == expected
        x = torch.arange(3.0 * length).view(3, 1, length, 1)
        (*parts,) = documents.split(x)
        assert [(part.shape[0], part.shape[2]) for (part,) in parts] == list(documents.buckets)
        assert torch.equal(documents.join([part for (part,) in parts]), x)
        assert sum(int((part > 0).sum()) for (part,) in parts) == 3 * length - 1, "padding is zero"
        assert sum(n for n, _ in documents.buckets) == sum(map(len, rows))
        # Little more than the tokens themselves, but for documents that are short anyway.
        slots = sum(n * longest for n, longest in documents.buckets)
        assert slots <= 1.5 * 3 * length + SHORT * sum(n < SHORT for sizes in rows for n in sizes)

    def test_one_long_document_beside_many_short_ones(self):
        documents = lay_out([[1000, *[6] * 4]])
        assert documents.buckets == ((1, 1000), (4, 6))

    def test_documents_of_other_rows_are_refused(self):
        q, k, v = (torch.zeros(2, heads, T, 8) for heads in (4, 2, 2))
        for other, message in (
            (lay_out(LENGTHS[:1]), r"those of \(1, 40\) tokens and q has \(2, 40\); lay them out for these rows"),
            (lay_out(LENGTHS, "meta"), "the documents are on meta but q is on cpu; move them there"),
        ):
            with pytest.raises(LinearizeError, match=message):
                near_far_attention(q, k, v, window=W, cu_seqlens=other)


@pytest.mark.parametrize(
    ("far", "backend"),
    [
        *itertools.product(FAR, ("reference", "torch")),
        pytest.param("normalizer", "triton", marks=pytest.mark.interpret),
    ],
)
def test_attention_and_its_gradient(far, backend, device):
    """B = 2: outputs and gradients are those of each document alone."""
    place = device if backend == "triton" else torch.device("cpu")
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make_inputs((2, 4, 2, T, 16, 16, W, S, 8), dtype)
    q, k, v = (x.to(place).requires_grad_() for x in inputs[:3])
    mixer, mix_logit, mix = far_options(far, *inputs[3:])
    options = {"window": W, "sinks": S, "mix": mix, "backend": backend}
    leaves = [q, k, v]
    if mixer is not None:
        mixer, mix_logit = mixer.to(place), mix_logit.detach().to(place).requires_grad_()
        leaves += [mix_logit, *mixer.parameters()]
    out = near_far_attention(q, k, v, mixer, mix_logit, **options, cu_seqlens=lay_out(LENGTHS, place))
    alone = torch.zeros_like(out)
    for row, part in pieces(LENGTHS):
        logit = mix_logit[row, :, part] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
        x = (x[row, :, part] for x in (q, k, v))
        alone[row, :, part] = near_far_attention(*x, mixer, logit, **(options | {"backend": "torch"}))
    assert_near(out, alone)
    whole = near_far_attention(q, k, v, mixer, mix_logit, **options)
    assert (whole - out).abs().max() > 0.1, "without borders it is another thing"
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (out, alone))):
        assert_near(a, b)


def test_nan_stays_in_its_document():
    q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, T, 8, 8, W, S, 4))
    for x in (q, k, v):
        x[0, :, 7] = torch.nan  # in the document of columns 7 to 14
    out = near_far_attention(q, k, v, mixer, mix_logit, window=W, sinks=S, cu_seqlens=lay_out(LENGTHS))
    bad = out.isnan().any(-1).any(1)
    assert bad[0, 7:11].all()
    bad[0, 7:15] = False
    assert not bad.any()


def test_what_transfer_measures():
    q, k, v, mixer, _ = make_inputs((2, 4, 2, T, 16, 16, W, S, 8))
    options = {"window": W, "sinks": S}
    documents = lay_out(LENGTHS)
    split = split_attention(q, k, v, **options, documents=documents)
    with torch.no_grad():
        phi_q, phi_k = mixer.query_features(q), mixer.key_features(k)
    read = far_read(q, k, v, mixer, **options, documents=documents)
    divergence = far_divergence(q, k, split[3], phi_q, phi_k, **options, documents=documents)
    for row, part in pieces(LENGTHS):
        own = [x[row, :, part] for x in (q, k, v)]
        alone = split_attention(*own, **options)
        size = own[0].shape[2]
        padded = [torch.nn.functional.pad(x, (0, 0, 0, -size % W)) for x in own]
        far = [x[:, :, :size] for x in far_read(*padded, mixer, **options)]
        features = [x[row, :, part] for x in (phi_q, phi_k)]
        weights = far_divergence(*own[:2], alone[3], *features, **options)
        for whole, one in zip((*split, *read, *divergence), (*alone, *far, *weights), strict=True):
            none = one == -torch.inf
            assert torch.equal(whole[row, :, part] == -torch.inf, none)
            assert_near(whole[row, :, part].masked_fill(none, 0), one.masked_fill(none, 0))
