"""Where attention goes: masses equal those of whole maps, and a state that nothing reads shows as 0."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from linearize import LinearizeConfig, convert, original_attention, state_off, window_off
from linearize.attention import Observation
from linearize.benchmarks.attention_mass import PARTS, attention_mass, original_shares, student_shares
from linearize.benchmarks.evaluate import evaluate_rows
from linearize.benchmarks.work import Work
from linearize.convert import switch_of
from linearize.distill.options import EvaluateOptions
from linearize.rows import comparison_rows
from linearize.tables import print_evaluation
from tests.induction_model import teach_inducer
from tests.tiny_models import FAMILIES, make_model, make_student, make_tokens
from tests.tiny_tokenizer import tiny_tokenizer

WINDOW, SINKS, LENGTH = 4, 2, 39
FIRST = 8  # the first query that has something older


def seen_by(model: Any, tokens: torch.Tensor) -> dict[int, Observation]:
    """What each layer sees in one pass, in whichever way the model runs."""
    found: dict[int, Observation] = {}

    def keep(seen: Observation) -> None:
        found[seen.layer.layer_idx] = seen

    switch = switch_of(model)
    switch.observer = keep
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        switch.observer = None
    return found


def parts_of(weights: torch.Tensor, sinks: int = SINKS) -> torch.Tensor:
    """(3, ...) of maps (..., T, T): sums over sinks, window, older."""
    query, key = torch.arange(weights.shape[-1])[:, None], torch.arange(weights.shape[-1])
    sink = key < sinks
    older = ~sink & (key // WINDOW < query // WINDOW - 1)
    return torch.stack([(weights * part).sum(-1) for part in (sink & (key <= query), ~sink & ~older, older)])


def near_weights(seen: Observation, sinks: int = SINKS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, H, T, T) of all keys, -inf in the future; and which keys are near, and which are older."""
    group = seen.q.shape[1] // seen.k.shape[1]
    logits = seen.q @ seen.k.repeat_interleave(group, 1).transpose(-1, -2) * seen.layer.scaling
    query, key = torch.arange(logits.shape[-1])[:, None], torch.arange(logits.shape[-1])
    older = (key >= sinks) & (key // WINDOW < query // WINDOW - 1)
    return logits.masked_fill(key > query, -torch.inf), ~older & (key <= query), older


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_the_originals_masses_are_those_of_its_maps(family, sinks):
    tokens = make_tokens(2, LENGTH)
    student = make_student(family, "normalizer", torch.float64, sinks=sinks)
    with original_attention(student):
        seen = seen_by(student, tokens)
    model = make_model(family, torch.float64, attn_implementation="eager")
    with torch.no_grad():
        maps = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    for layer, weights in enumerate(maps):
        shares = original_shares(seen[layer])
        # transformers takes the softmax of its maps in float32, whatever the model's dtype.
        torch.testing.assert_close(shares, parts_of(weights, sinks), rtol=0, atol=1e-6)
        exact = near_weights(seen[layer])[0].softmax(-1)
        torch.testing.assert_close(shares, parts_of(exact, sinks), rtol=0, atol=1e-10)
        assert shares[2, ..., FIRST:].mean() > 0.1


@pytest.mark.parametrize("mix", ["normalizer", "peak", "gate"])
def test_the_students_masses_are_those_of_its_formula(mix):
    model, tokens = make_student("llama", mix, torch.float64), make_tokens(2, LENGTH)
    for layer, seen in seen_by(model, tokens).items():
        logits, near, older = near_weights(seen)
        near_logits = logits.masked_fill(~near, -torch.inf)
        mixer = seen.layer.mixer
        group = seen.q.shape[1] // seen.k.shape[1]
        weights = mixer.query_features(seen.q) @ mixer.key_features(seen.k).repeat_interleave(group, 1).mT
        mass = (weights * older).sum(-1)
        odds = seen.layer.mix(seen.q)
        if mix != "gate":
            odds = odds + mass.log() - near_logits.logsumexp(-1)
        if mix == "peak":
            odds = odds + near_logits.amax(-1)
        share = torch.where(mass > 0, odds.sigmoid(), 0.0)
        whole = (1 - share)[..., None] * near_logits.softmax(-1)
        whole = whole + (share / mass.clamp_min(1e-300))[..., None] * weights * older
        torch.testing.assert_close(student_shares(seen), parts_of(whole), rtol=0, atol=1e-10)
        assert 0.05 < share[..., FIRST:].mean() < 0.95, layer


def test_a_window_that_is_longer_than_the_sinks_end_and_shorter():
    """Sinks count as sinks while they lie in the window too, and where they fill all of it."""
    for sinks in (1, 3, 6, 60):
        model = make_student("llama", "normalizer", torch.float64, sinks=sinks)
        (seen, *_) = seen_by(model, make_tokens(1, LENGTH)).values()
        logits, near, _ = near_weights(seen, sinks)
        weights = logits.masked_fill(~near, -torch.inf).softmax(-1)
        shares = student_shares(seen)
        torch.testing.assert_close(
            shares[:2] / (1 - shares[2]), parts_of(weights, sinks)[:2], rtol=0, atol=1e-10, equal_nan=False
        )


@pytest.mark.parametrize("switch", [nullcontext, original_attention, state_off, window_off])
@pytest.mark.parametrize("far", ["normalizer", "gate", "none"])
def test_masses_sum_to_one(switch, far):
    model = make_student("qwen3", far)
    before = model(input_ids=make_tokens(1, 50)).logits
    with switch(model) if switch is not nullcontext else nullcontext():
        found = attention_mass(model, make_tokens(3, 50))
    assert (found["window"], found["sinks"], [layer["layer"] for layer in found["layers"]]) == (4, 2, [0, 1, 2])
    for layer in found["layers"]:
        assert [len(layer[part]) for part in PARTS] == [4, 4, 4]
        for shares in zip(*(layer[part] for part in PARTS)):
            assert sum(shares) == pytest.approx(1, abs=2e-6)
            assert min(shares) >= 0
    # Nothing is left switched on.
    assert switch_of(model).observer is None
    assert torch.equal(model(input_ids=make_tokens(1, 50)).logits, before)


def test_a_state_that_nothing_reads_has_no_mass():
    """The negative control: far share forced to 0, everywhere 0; and what the window then gets is what it had."""
    model, tokens = make_student("llama", "normalizer"), make_tokens(2, 50)
    with state_off(model):
        off = attention_mass(model, tokens)
    assert {share for layer in off["layers"] for share in layer["older"]} == {0.0}
    with window_off(model):
        alone = attention_mass(model, tokens)
    assert {share for layer in alone["layers"] for share in layer["older"]} == {1.0}
    on = attention_mass(model, tokens)
    assert min(share for layer in on["layers"] for share in layer["older"]) > 0.01


def test_means_are_over_the_queries_that_have_something_older():
    model, tokens = make_student("llama", "normalizer", torch.float64), make_tokens(2, LENGTH)
    found = attention_mass(model, tokens)["layers"]
    for layer, seen in seen_by(model, tokens).items():
        wanted = student_shares(seen)[..., FIRST:].mean((1, 3))
        assert torch.tensor([found[layer][part] for part in PARTS]).double() == pytest.approx(wanted, abs=1e-6)


def test_batches_change_nothing(monkeypatch):
    model, tokens = make_student("llama", "normalizer", torch.float64), make_tokens(4, LENGTH)
    whole = attention_mass(model, tokens)
    monkeypatch.setattr("linearize.benchmarks.attention_mass.TOKENS_AT_ONCE", LENGTH)
    assert attention_mass(model, tokens) == whole


def test_gla_shows_its_gate():
    config = LinearizeConfig(mixer="gla", mix="gate", window=4, sinks=2, mix_start=-1.0, mix_input="head")
    found = attention_mass(convert(make_model("llama"), config), make_tokens(1, 50))
    share = float(torch.tensor(-1.0).sigmoid())
    assert all(older == pytest.approx(share, abs=1e-6) for layer in found["layers"] for older in layer["older"])


def test_what_cannot_be_measured_says_why():
    assert attention_mass(make_model("llama"), make_tokens(1, 50)) == {
        "why_not": "no layer is converted, so there is no window to split its attention at"
    }
    short = attention_mass(make_student("llama", "normalizer"), make_tokens(1, 8))
    assert short == {"why_not": "nothing is older than the window in 8 tokens; it takes more than 8"}


def make_options(**changes) -> EvaluateOptions:
    given = {"tokens": 200, "contexts": (100,), "needle_lengths": (), "recall_lengths": (), "kl_tokens": 0}
    return EvaluateOptions(**(given | {"answers": 0, "attention": True} | changes))


def test_rows_side_by_side(capsys):
    model = make_student("llama", "normalizer", softmax_layers=(1,))
    plain = make_model("llama")
    rows = comparison_rows(model) | {"plain": lambda: nullcontext(plain)}
    texts = {"t": make_tokens(1, 300)[0]}
    result = evaluate_rows(rows, tiny_tokenizer(), texts, make_options(), only=["attention"])
    part = result["attention"]
    assert (part["text"], part["seq_len"], part["n_sequences"]) == ("t", 100, 2)
    assert part["not_measured"] == {"plain": "no layer is converted, so there is no window to split its attention at"}
    assert list(part["rows"]) == [row for row in rows if row != "plain"]
    assert [layer["layer"] for layer in part["rows"]["original"]["layers"]] == [0, 2]
    for row in part["rows"].values():
        heads = [layer["older"] for layer in row["layers"]]
        assert row["mean"]["older"] == pytest.approx(float(torch.tensor(heads).double().mean()))
    # The original's heads look back here, in all layers; without the state nobody does.
    assert part["rows"]["student, state off"]["bypassed"] == {"heads": 8, "of": 8}
    assert part["rows"]["student"]["bypassed"] == {"heads": 0, "of": 8}
    print_evaluation(result)
    shown = capsys.readouterr().out
    assert "8 of 8" in shown
    assert "attention of plain: not measured" in shown


def test_a_state_that_is_needed_is_seen_where_it_is():
    """Of the model that does induction the second layer looks back, and the first never."""
    rows = comparison_rows(teach_inducer())
    texts = {"t": torch.arange(4, 32).repeat(9)}
    rows = evaluate_rows(rows, tiny_tokenizer(), texts, make_options(), only=["attention"])["attention"]["rows"]
    assert [layer["older"][0] for layer in rows["student"]["layers"]] == pytest.approx([0, 1], abs=0.01)
    assert [layer["older"][0] for layer in rows["original"]["layers"]] == pytest.approx([0, 1], abs=0.1)
    assert (rows["student"]["bypassed"], rows["window + sinks"]["bypassed"]) == (
        {"heads": 0, "of": 1},
        {"heads": 1, "of": 1},
    )


def test_what_is_kept_of_the_original_depends_on_the_conversion(tmp_path):
    """Of one original in one folder of measurements: its attention is split at the student's window."""
    found = {}
    for window in (4, 8):
        model = make_student("llama", "none", window=window)
        rows = {"original": lambda model=model: original_attention(model)}
        found[window] = evaluate_rows(
            rows,
            tiny_tokenizer(),
            {"t": make_tokens(1, 300)[0]},
            make_options(),
            work=Work(tmp_path, {"original": "the same"}),
            only=["attention"],
            conversion=model.config.linearize,
        )["attention"]["rows"]["original"]["mean"]
    assert found[4]["older"] > found[8]["older"] + 0.01
