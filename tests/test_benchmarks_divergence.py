"""KL to the original: the formula, sequences of several batches, and what cannot be computed."""

import math

import pytest
import torch

from linearize.benchmarks import divergence as module
from linearize.benchmarks.divergence import divergence, reference_states, summarise_divergence
from linearize.errors import LinearizeError
from tests.tiny_models import make_model, make_student, make_tokens


def test_kl_is_the_formulas_over_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 48)  # several batches
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", 7)  # several pieces, the last one short
    original, student, sequences = make_model("llama"), make_student("llama", "normalizer"), make_tokens(5, 20)
    found = divergence(student, reference_states(original, sequences))
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(input_ids=sequences).logits.double(), -1) for model in (original, student))
    want = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-5)
    assert want.mean() > 0.01  # or the comparison shows nothing
    swapped = (q.exp() * (q - p)).sum(-1)
    assert (found - swapped).abs().max() > 1e-3


def test_a_model_has_no_distance_from_itself_also_after_its_embedding_changed():
    model, sequences = make_model("qwen2"), make_tokens(2, 16)
    reference = reference_states(model, sequences)
    assert divergence(model, reference).max() < 1e-5
    model.get_output_embeddings().weight.data.mul_(0.5)
    assert divergence(model, reference).mean() > 1e-3


def test_means_and_positions():
    kl = torch.rand(6, 40)
    summary = summarise_divergence({"student": kl, "broken": torch.where(kl < 0.5, kl, math.nan)})
    row = summary["rows"]["student"]
    assert (summary["n_tokens"], summary["seq_len"]) == (240, 40)
    assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-6)
    assert row["ci95"][0] < row["kl"] < row["ci95"][1]
    assert [(part["start"], part["end"]) for part in row["by_position"]] == [(1, 32), (32, 41)]
    assert row["by_position"][1]["kl"] == pytest.approx(float(kl[:, 31:].mean()), rel=1e-6)
    assert summary["rows"]["broken"]["kl"] is None


def test_a_function_after_the_output_embedding_is_refused():
    model = make_model("llama")
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = capped
    with pytest.raises(LinearizeError, match="are not what its output embedding gives"):
        reference_states(model, make_tokens(1, 8))
