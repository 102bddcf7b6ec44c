"""torch.compile and torch.export of converted models: one graph, for any length, with the same numbers."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from linearize.kernels.near_far import Hedgehog, near_far_attention
from tests.tiny_models import make_student, make_tokens, pad
from tests.tolerance import assert_near

# Whole chunks and others, fewer and more than the first.
LENGTHS = (101, 100, 137, 192, 200)


@pytest.fixture(autouse=True)
def fresh(caplog):
    # torch writes its trace to this logger at DEBUG, and pytest would keep minutes' worth of it.
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(model, backend):
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


def graphs():
    """How many graphs were compiled in this test."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("far", "masked"), [("none", True), ("normalizer", False), ("normalizer", True)])
def test_a_model_is_one_graph_for_all_lengths(far, masked):
    student = make_student("llama", far, changes={"num_hidden_layers": 1})
    fast = compiled(student, "aot_eager")
    with torch.no_grad():
        for length in LENGTHS:
            tokens, options = make_tokens(2, length), {}
            if masked:
                tokens, options["attention_mask"] = pad(tokens, [0, 7], "left")
            expected = student(input_ids=tokens, use_cache=False, **options).logits
            assert_near(fast(input_ids=tokens, use_cache=False, **options).logits, expected)
            assert graphs() == 1
        if masked:  # the graph asks no question about what the mask holds
            options["attention_mask"] = torch.ones_like(tokens)
            expected = student(input_ids=tokens, use_cache=False).logits
            assert_near(fast(input_ids=tokens, use_cache=False, **options).logits, expected)
            assert graphs() == 1


def test_a_deeper_model_of_another_family():
    """Layers that stay softmax beside converted ones; norms of queries and keys."""
    student = make_student("qwen3", "gate", softmax_layers=[1], changes={"num_hidden_layers": 2})
    fast = compiled(student, "eager")
    with torch.no_grad():
        for length in (100, 150):
            tokens, mask = pad(make_tokens(2, length), [3, 0], "left")
            expected = student(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            assert_near(fast(input_ids=tokens, attention_mask=mask, use_cache=False).logits, expected)
    assert graphs() == 1


class Attention(torch.nn.Module):
    """The attention function alone, as a module."""

    def __init__(self):
        super().__init__()
        self.mixer = Hedgehog(4, 2, 16)
        self.mix = torch.nn.Parameter(torch.randn(4))

    def forward(self, q, k, v):
        return near_far_attention(q, k, v, self.mixer, self.mix, window=4, sinks=2)


def make_inputs(length):
    """q, k, v in the layout of models: (B, T, heads, D) transposed."""
    return tuple(torch.randn(2, length, heads, 16).transpose(1, 2) for heads in (4, 2, 2))


def test_training_is_one_graph_for_all_lengths():
    module = Attention()
    fast = compiled(module, "aot_eager")
    for length in LENGTHS:
        inputs = [x.requires_grad_() for x in make_inputs(length)]
        leaves = [*inputs, *module.parameters()]
        expected = module(*inputs)
        actual = fast(*inputs)
        assert_near(actual, expected)
        weight = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad((actual * weight).sum(), leaves),
            torch.autograd.grad((expected * weight).sum(), leaves),
            strict=True,
        ):
            assert_near(a, b)
    assert graphs() == 1


def test_export():
    module = Attention()
    exported = torch.export.export(module, make_inputs(64), dynamic_shapes=[{2: torch.export.Dim.DYNAMIC}] * 3)
    with torch.no_grad():
        for tokens in (64, 65, 7, 200):
            inputs = make_inputs(tokens)
            assert_near(exported.module()(*inputs), module(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_inductor(masked):
    """The default backend, which compiles for a minute."""
    student = make_student("llama", "normalizer", changes={"num_hidden_layers": 1})
    fast = compiled(student, "inductor")
    with torch.no_grad():
        for length in LENGTHS:
            tokens, options = make_tokens(2, length), {}
            if masked:
                tokens, options["attention_mask"] = pad(tokens, [0, 7], "left")
            expected = student(input_ids=tokens, use_cache=False, **options).logits
            assert_near(fast(input_ids=tokens, use_cache=False, **options).logits, expected)
    assert graphs() == 1
