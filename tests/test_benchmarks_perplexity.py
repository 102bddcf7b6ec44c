"""Perplexity: the right positions, float32, honest intervals."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.benchmarks import perplexity as module
from linearize.benchmarks.inference import hidden_states, inference, output_head
from linearize.benchmarks.perplexity import (
    cut_sequences,
    perplexity,
    perplexity_by_context,
    position_edges,
    summarise_perplexity,
    token_nll,
)
from linearize.benchmarks.resampling import interval, mean_interval
from linearize.errors import LinearizeError
from tests.memory_tally import tally
from tests.tiny_models import make_model, make_tokens


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return LlamaForCausalLM(config)


def test_nll_is_the_models_own_loss(model):
    tokens = torch.randint(128, (5 * 40 + 7,))
    nll = perplexity(model, tokens, 40, batch_size=2)
    assert nll.shape == (5, 39)
    assert nll.dtype == torch.float32
    for row, sequence in zip(nll, tokens[:200].reshape(5, 40)):
        loss = model(input_ids=sequence[None], labels=sequence[None]).loss
        torch.testing.assert_close(row.mean(), loss.detach(), rtol=1e-5, atol=1e-6)


def test_nll_does_not_depend_on_the_batch_size(model):
    tokens = torch.randint(128, (6 * 33,))
    torch.testing.assert_close(perplexity(model, tokens, 33, 1), perplexity(model, tokens, 33, 4))


def test_contexts_share_what_a_longer_one_has_read(model, monkeypatch):
    tokens = torch.randint(128, (160,))
    read = []
    whole = module.perplexity
    monkeypatch.setattr(module, "perplexity", lambda m, t, n: read.append((len(t), n)) or whole(m, t, n))
    found = perplexity_by_context(model, tokens, (20, 80, 40))
    assert list(found) == [20, 80, 40]
    assert read == [(160, 80), (80, 40), (80, 20)]  # 80 each: half of the text is read already
    for context, nll in found.items():
        torch.testing.assert_close(nll, whole(model, tokens, context), rtol=1e-5, atol=1e-6)


def test_contexts_are_read_apart_where_the_rotary_embedding_looks_at_the_length(model, monkeypatch):
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    read = []
    whole = module.perplexity
    monkeypatch.setattr(module, "perplexity", lambda m, t, n: read.append((len(t), n)) or whole(m, t, n))
    perplexity_by_context(model, torch.randint(128, (80,)), (20, 40))
    assert read == [(80, 40), (80, 20)]


def test_token_nll_is_float32_and_split_without_a_seam():
    logits = 30 * torch.randn(2, 600, 11, dtype=torch.bfloat16)  # more positions than are taken at once
    targets = torch.randint(11, (2, 600))
    want = -torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None])[..., 0]
    got = token_nll(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_modes_come_back_also_after_an_error(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, torch.randint(128, (80,)), 40)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError):
        perplexity(model, torch.full((80,), 999), 40)  # outside the vocabulary
    assert [module.training for module in model.modules()] == before


def test_cut_sequences_drops_the_rest_and_obeys_the_limit():
    tokens = torch.arange(100)
    assert cut_sequences(tokens, 30).tolist() == tokens[:90].reshape(3, 30).tolist()
    assert cut_sequences(tokens, 30, limit=59).tolist() == tokens[:30].reshape(1, 30).tolist()


@pytest.mark.parametrize(
    ("tokens", "seq_len", "message"),
    [
        (torch.arange(10), 11, "tokens: 10 held-out tokens do not fill one sequence of 11"),
        (torch.arange(10), 1, "seq_len: 1 leaves no token to score; use 2 or more"),
        (torch.zeros(2, 5), 5, r"tokens: shape \(2, 5\) is not one text"),
    ],
)
def test_cut_sequences_refuses(tokens, seq_len, message):
    with pytest.raises(LinearizeError, match=message):
        cut_sequences(tokens, seq_len)


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [
        (2, [1, 2]),
        (32, [1, 32]),
        (33, [1, 32, 33]),
        (257, [1, 32, 64, 128, 256, 257]),
        (1024, [1, 32, 64, 128, 256, 512, 1024]),
    ],
)
def test_position_edges(seq_len, edges):
    assert position_edges(seq_len) == edges


def test_summary_bins_make_up_the_whole():
    nll = torch.rand(7, 99)
    summary = summarise_perplexity({"original": nll}, [])
    row = summary["rows"]["original"]
    assert (summary["n_sequences"], summary["seq_len"], summary["n_tokens"]) == (7, 100, 7 * 99)
    assert [(b["start"], b["end"]) for b in row["by_position"]] == [(1, 32), (32, 64), (64, 100)]
    whole = sum(b["nll"] * (b["end"] - b["start"]) for b in row["by_position"]) / 99
    assert whole == pytest.approx(row["nll"]) == pytest.approx(float(nll.mean()))
    assert row["ppl"] == pytest.approx(float(nll.mean().exp()))
    assert row["ppl_ci95"][0] < row["ppl"] < row["ppl_ci95"][1]


def test_bins_hold_the_tokens_with_that_many_before_them():
    nll = torch.zeros(2, 99)
    nll[:, 31:63] = 1.0  # the predictions of tokens 32 to 63
    bins = summarise_perplexity({"original": nll}, [])["rows"]["original"]["by_position"]
    assert [b["nll"] for b in bins] == [0.0, 1.0, 0.0]


def test_paired_difference_sees_what_separate_intervals_hide():
    text = torch.randn(20, 1)  # sequences differ by far more than rows do
    rows = {"original": 3 + text.expand(20, 50), "student": 3.05 + text.expand(20, 50) + 0.01 * torch.randn(20, 50)}
    summary = summarise_perplexity(rows, [("student", "original")])
    low, high = summary["comparisons"][0]["ci95"]
    assert 0.04 < low < high < 0.06
    a, b = (summary["rows"][name]["nll_ci95"] for name in rows)
    assert a[1] > b[0]


def test_values_that_are_not_finite_are_counted_not_averaged():
    nll = torch.ones(3, 60)
    nll[1, 40] = torch.nan
    summary = summarise_perplexity({"original": torch.ones(3, 60), "student": nll}, [("student", "original")])
    row = summary["rows"]["student"]
    assert (row["n_not_finite"], row["nll"], row["ppl_ci95"]) == (1, None, None)
    assert [b["n_not_finite"] for b in row["by_position"]] == [0, 1]
    assert row["by_position"][0]["ppl"] == pytest.approx(2.718281828)
    assert summary["comparisons"][0]["nll_difference"] is None


def test_one_sequence_has_no_interval():
    summary = summarise_perplexity(
        {"original": torch.rand(1, 9), "student": torch.rand(1, 9)}, [("student", "original")]
    )
    assert summary["rows"]["student"]["ppl_ci95"] is None
    assert summary["comparisons"][0]["ci95"] is None


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8])
def test_intervals_cover_as_often_as_they_say(n):
    """A plain percentile interval of 8 values covers about 0.88 of the time, of 2 values 0.5."""
    samples = torch.randn(600, n, generator=torch.Generator().manual_seed(n))
    ends = [mean_interval(sample, seed) for seed, sample in enumerate(samples)]
    covered = sum(low <= 0 <= high for low, high in ends) / len(ends)
    assert 0.92 < covered < 0.98


def test_intervals_repeat_with_their_seed():
    values = torch.randn(12)
    assert mean_interval(values, 3) == mean_interval(values, 3) != mean_interval(values, 4)


def test_no_interval_where_its_end_is_not_finite():
    assert interval(lambda index: torch.where(index[:, 0] == 0, torch.nan, 1.0), 4) is None


def test_hidden_states_of_a_batch_copy_no_weight():
    """Given a strided slice, PyTorch multiplies each row of a batch by a copy of the head's weight of its own."""
    model = make_model("llama", vocab_size=8000)
    weight = output_head(model).weight.nbytes
    with inference(model):
        peak = tally(lambda: hidden_states(model, make_tokens(16, 12))).peak
    assert peak < 4 * weight  # of 16
