"""Whatever way tokens come, a student's logits are those of one pass over each text alone, as in the original."""

import copy

import pytest
import torch

from tests.parity import FARS, LOGITS, ORIGINAL, WAYS, Case, alone, covering, make
from tests.tiny_models import FAMILIES, OTHER_FAMILIES

HALF = (torch.bfloat16, torch.float16)
CASES = [
    (way, Case(family, far, kept), dtype)
    for way, family, far, kept, dtype in covering(
        WAYS, FAMILIES, (ORIGINAL, *FARS), ((), (1,), (0,)), (torch.float32, *HALF)
    )
]


@pytest.mark.parametrize(("way", "case", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_ways(way, case, dtype):
    """The logits, the likeliest next tokens, and the cache's length after every call.

    float32: sums in another order, 1e-5 on logits of a few units. Half precision: every product is rounded, and in
    another order to another value; so the error against the same weights in float32 may be twice that of one pass.
    """
    model, texts = make(case, dtype), way.texts()
    actual, expected = torch.cat(way.run(model, texts)), torch.cat(alone(model, texts))
    assert actual.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, **LOGITS)
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
        return
    exact = torch.cat(alone(copy.deepcopy(model).float(), texts))
    allowed = 2 * (expected.float() - exact).abs().max()
    assert (actual.float() - exact).abs().max() <= allowed
    first, second = exact.topk(2).values.unbind(-1)
    decided = first - second > 2 * allowed
    assert decided.any()
    assert torch.equal(actual.argmax(-1)[decided], exact.argmax(-1)[decided])


OTHERS = [
    (way, Case(family, far))
    for way, family, far in covering(
        [way for way in WAYS if way.name in ("uneven pieces", "left-padded in pieces")],
        OTHER_FAMILIES,
        ("normalizer", "gla"),
    )
]


@pytest.mark.parametrize(("way", "case"), OTHERS, ids=str)
def test_other_families(way, case):
    """The same in the families that the other tests leave out, at two ways; some have sliding windows of their own."""
    model, texts = make(case, num_hidden_layers=3), way.texts()
    actual, expected = torch.cat(way.run(model, texts)), torch.cat(alone(model, texts))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)  # logits of up to 9
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
