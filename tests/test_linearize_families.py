"""Every family beside the four of Llama's kind: what its attention has of its own is what the converted layer has."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from linearize import LinearizeConfig, LinearizeError, convert, load, original_attention, revert, save
from linearize.benchmarks.attention_mass import original_shares
from linearize.benchmarks.step_costs import model_costs
from linearize.cache import cache_bytes
from linearize.cli import app
from linearize.convert import added_parameters, converted_layers, is_converted
from linearize.distill.end_to_end import run_distill
from linearize.distill.objectives import OBJECTIVES, FarTarget
from linearize.distill.options import Budget, DistillOptions
from linearize.distill.transfer import observe, transfer_step
from linearize.families import FAMILIES as KNOWN
from linearize.families import REFUSED, family_of
from linearize.inspection import inspect_config
from linearize.training_memory import training_memory
from tests.test_linearize_cache import in_pieces, one_pass
from tests.tiny_models import (
    FAMILIES,
    OTHER_FAMILIES,
    make_config,
    make_model,
    make_student,
    make_tokens,
    pad,
    randomize_far,
)
from tests.tiny_training import TokenRows

LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # float32, logits of a few units
SLIDING = ("gemma2", "gemma3_text", "gpt_oss")  # their first layer stays as it is
# What a family may have or not, beside what the tiny models of the others have.
VARIANTS = [
    *((family, {}) for family in OTHER_FAMILIES),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("phi3", {"partial_rotary_factor": 1.0, "sliding_window": 16384}),  # no window: as long as the longest text
    ("cohere", {"use_qk_norm": False}),
    ("stablelm", {"qk_layernorm": False, "use_qkv_bias": True, "use_parallel_residual": False}),
    ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False}),
]
IDS = ["-".join([family, *changes]) for family, changes in VARIANTS]


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def test_attention_that_leaves_the_soft_cap_out():
    """transformers 5.17 lets Gemma 2 run so, and takes it by itself."""
    model = make_model("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(LinearizeError, match="load it with attn_implementation='eager'"):
        convert(model, LinearizeConfig(window=8))
    assert type(model).__name__ == "Gemma2ForCausalLM"
    model = make_model("gemma2", attn_logit_softcapping=None)
    model.config._attn_implementation = "sdpa"
    assert is_converted(convert(model, LinearizeConfig(window=8)))


def add_lora(model, family):
    """LoRA around every linear layer of the attention, random in both factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = list(KNOWN[family].linears)
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).eval()


def test_the_tiny_models_are_of_all_families():
    assert set(KNOWN) == {*FAMILIES, *OTHER_FAMILIES}


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_a_window_that_covers_all_is_the_original(family, changes):
    """In one pass, token by token, in a left-padded batch, and writing greedily."""
    teacher, tokens = make_model(family, **changes), make_tokens(2, 33)
    student = make_student(family, "normalizer", changes=changes, window=33, sinks=3)
    assert list(converted_layers(student)) == ([1, 2] if family in SLIDING else [0, 1, 2])
    expected = logits(teacher, tokens)
    torch.testing.assert_close(logits(student, tokens), expected, **LOGITS)
    torch.testing.assert_close(in_pieces(student, [3, 1], tokens)[0], expected, rtol=1e-5, atol=3e-5)
    rows, mask = pad(tokens, [0, 7], "left")
    got, expected = (logits(model, rows, attention_mask=mask) for model in (student, teacher))
    # Without position_ids the student counts real tokens, the original columns: other angles, the same differences.
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=6e-5)
    inputs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(student.generate(rows, **inputs), teacher.generate(rows, **inputs))


@pytest.mark.parametrize(
    ("family", "far"),
    [(family, "normalizer") for family in OTHER_FAMILIES]
    + [(family, far) for family in ("gemma2", "gpt_oss") for far in ("none", "peak")],
)
def test_pieces_are_one_pass(family, far):
    student, tokens = make_student(family, far), make_tokens(2, 28)
    expected = one_pass(student, tokens)
    assert (expected - logits(make_model(family), tokens)).abs().max() > 0.1
    near = {"rtol": 1e-5, "atol": 3e-5}
    for pieces in ([1], [9, 1, 4, 3, 11]):
        torch.testing.assert_close(in_pieces(student, pieces, tokens)[0], expected, **near)
    rows, mask = pad(tokens, [0, 6], "left")
    real = torch.cat([expected[0], expected[1, :22]])
    torch.testing.assert_close(one_pass(student, rows, mask)[mask.bool()], real, **near)
    torch.testing.assert_close(in_pieces(student, [13, 1], rows, mask)[0][mask.bool()], real, **near)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_switched_off_and_reverted_it_is_the_original(family):
    teacher, tokens = make_model(family), make_tokens(2, 20)
    student = make_student(family, "gate")
    expected, names = logits(teacher, tokens), list(teacher.state_dict())
    rows, mask = pad(tokens, [0, 7], "left")
    with original_attention(student):
        assert torch.equal(logits(student, tokens), expected)
        assert torch.equal(logits(student, rows, attention_mask=mask), logits(teacher, rows, attention_mask=mask))
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))
    assert not torch.equal(logits(student, tokens), expected)
    assert revert(student) is student
    assert not is_converted(student)
    assert type(student) is type(teacher)
    assert list(student.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in student.modules())
    assert torch.equal(logits(student, tokens), expected)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    """Whole, by transformers, and as an adapter on the original, with LoRA."""
    tokens = make_tokens(2, 20)
    student = make_student(family, "normalizer")
    student.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert loaded.config.model_type == family
    assert torch.equal(logits(loaded, tokens), logits(student, tokens))
    with original_attention(loaded):
        assert torch.equal(logits(loaded, tokens), logits(make_model(family), tokens))
    make_model(family).save_pretrained(tmp_path / "original")
    adapted = add_lora(student, family)
    save(adapted, tmp_path / "adapter", adapter=True, base=str(tmp_path / "original"))
    found = logits(load(tmp_path / "adapter"), tokens)  # with LoRA merged
    torch.testing.assert_close(found, logits(adapted, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_lora_around_the_projections(family):
    tokens = make_tokens(2, 28)
    student = make_student(family, "normalizer")
    plain = logits(student, tokens)
    adapted = add_lora(student, family)
    assert (logits(adapted, tokens) - plain).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, tokens), plain)
        with original_attention(adapted):
            assert torch.equal(logits(adapted, tokens), logits(make_model(family), tokens))
    adapted.train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {name: x.grad for name, x in adapted.named_parameters() if x.requires_grad}
    assert all(x is not None and bool(x.any()) for x in gradients.values())
    wrapped = add_lora(make_model(family), family)
    expected = logits(wrapped, tokens)
    randomize_far(convert(wrapped, LinearizeConfig(window=28, sinks=2)))
    torch.testing.assert_close(logits(wrapped, tokens), expected, **LOGITS)


def explicit(seen):
    """Softmax attention (B, H, T, V) of what a layer has seen, by its maps; cap and sink as the family's papers have
    them."""
    softmax = seen.layer.softmax
    k, v = (x.repeat_interleave(seen.q.shape[1] // x.shape[1], 1) for x in (seen.k, seen.v))
    scores = seen.q @ k.transpose(-1, -2) * softmax["scale"]
    if softmax["soft_cap"] is not None:
        scores = softmax["soft_cap"] * torch.tanh(scores / softmax["soft_cap"])
    weights = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if softmax["sink_logit"] is not None:
        total = total + softmax["sink_logit"][:, None, None].exp()
    return weights / total @ v


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_transfer_sees_what_the_original_uses(family, changes):
    """Softmax of the q, k and v that an observer gets is what the original hands to its output projection; so are the
    near and far parts that are the targets, put together."""
    student = make_student(family, "normalizer", changes=changes)
    outputs = {}
    for index, layer in converted_layers(student).items():
        layer.output.register_forward_pre_hook(lambda m, args, i=index: outputs.update({i: args[0]}))
    seen = []
    observe(student, {"input_ids": make_tokens(2, 24)}, seen.append)
    assert [one.layer.layer_idx for one in seen] == list(converted_layers(student))
    with torch.no_grad():
        for one in seen:
            real = outputs[one.layer.layer_idx]
            torch.testing.assert_close(explicit(one).transpose(1, 2).flatten(2), real)
            torch.testing.assert_close(FarTarget(one).attention(one).transpose(1, 2).flatten(2), real)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "stablelm", "gpt_neox"])
def test_layers_learn(family, objective):
    """And a mask reaches the layers: padding changes no loss."""
    student = make_student(family, "normalizer")
    tokens, losses = make_tokens(2, 24), []
    rows, mask = pad(torch.cat([tokens, tokens[:, :5]], 1), [5, 5], "right")
    for batch in ({"input_ids": tokens}, {"input_ids": rows, "attention_mask": mask}):
        losses.append(transfer_step(student, batch, objective, lambda loss: loss.backward()))
        assert all(bool(p.grad.any()) for name, p in added_parameters(student).items() if "mixer" in name)
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "stablelm", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_training_with_checkpointing(family):
    student = make_student(family, "normalizer").train()
    rows, mask = pad(make_tokens(2, 28), [0, 9], "left")

    def gradients():
        student.zero_grad()
        student(rows, attention_mask=mask, labels=rows.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        return {name: x.grad.clone() for name, x in student.named_parameters() if x.grad is not None}

    expected = gradients()
    assert expected.keys() == {name for name, _ in student.named_parameters()}
    assert all(bool(x.any()) for name, x in expected.items() if ".experts." not in name)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, got in gradients().items():
        torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()))


@pytest.mark.parametrize("family", [family for family in OTHER_FAMILIES if KNOWN[family].packs])
def test_packed_documents_are_texts_of_their_own(family):
    student, first, second = make_student(family, "normalizer"), make_tokens(1, 15), make_tokens(1, 22, seed=9)
    positions = torch.cat([torch.arange(15), torch.arange(22)])[None]
    packed = logits(student, torch.cat([first, second], dim=1), position_ids=positions)
    expected = torch.cat([logits(student, first), logits(student, second)], dim=1)
    torch.testing.assert_close(packed, expected, **LOGITS)


def test_arguments_of_the_decoder_by_place():
    """GPT-NeoX has embeddings before the cache, others behind it."""
    for family in ("gpt_neox", "llama"):
        student, tokens = make_student(family, "gate"), make_tokens(1, 20)
        decoder = student.get_submodule(KNOWN[family].decoder)
        with torch.no_grad():
            expected = decoder(tokens).last_hidden_state
            cache = decoder(tokens[:, :9], use_cache=True).past_key_values
            place = [None, cache] if family == "gpt_neox" else [cache, None]
            rest = decoder(tokens[:, 9:], None, None, *place).last_hidden_state
        torch.testing.assert_close(rest, expected[:, 9:], **LOGITS)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_inspected_bytes_are_those_of_a_real_cache(family):
    config, contexts = LinearizeConfig(window=4, sinks=2), (5, 30)
    student = make_student(family, "normalizer")
    plan = inspect_config(make_config(family), config, contexts, "float32")
    assert [layer.layer for layer in plan.layers if layer.converted] == list(converted_layers(student))
    for model, planned in ((make_model(family), plan.kv_bytes), (student, plan.new_bytes)):
        for tokens, expected in zip(contexts, planned, strict=True):
            with torch.no_grad():
                cache = model(make_tokens(1, tokens), use_cache=True).past_key_values
            assert cache_bytes(cache)["total"] == expected


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_masses_of_attention_are_those_of_its_maps(family):
    tokens, window, sinks = make_tokens(2, 24), 4, 2
    student = make_student(family, "normalizer", window=window, sinks=sinks)
    seen = []
    observe(student, {"input_ids": tokens}, seen.append)
    with torch.no_grad():
        maps = make_model(family)(tokens, output_attentions=True, use_cache=False).attentions
    query, key = torch.arange(24)[:, None], torch.arange(24)
    older = (key >= sinks) & (key // window < query // window - 1)
    for one in seen:
        weights, shares = maps[one.layer.layer_idx], original_shares(one)
        inside = (weights * ((key >= sinks) & ~older)).sum(-1)
        beyond = (weights * older).sum(-1)
        # What a learned sink takes is in no map.
        expected = torch.stack([1 - inside - beyond, inside, beyond])
        torch.testing.assert_close(shares[..., sinks:], expected[..., sinks:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_targets_of_lora_by_llamas_names(family, tmp_path):
    student = make_student(family, "none")
    options = DistillOptions(budget=Budget(steps=1), lora_rank=2)
    model, _ = run_distill(student, TokenRows(1, 24), options, tmp_path, stage="distill")
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert names == set(KNOWN[family].linears)
    if family == "gpt_neox":  # whose training memory is not known
        return
    plan = training_memory(make_config(family), LinearizeConfig(window=4), lora_rank=2, dtype="float32")
    assert plan.lora == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


def test_a_step_reads_the_experts_that_it_uses():
    config = make_config("qwen3_moe")  # one layer of the three has experts, 2 of 4 are used
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0
    costs = model_costs(config, None, "float32")
    numbers = sum(p.numel() for p in model.parameters())
    assert costs.weight_bytes == 4 * numbers
    table = model.get_input_embeddings().weight.numel()
    assert costs.read_bytes == 4 * (numbers - table - experts / 2)


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_attention_of_another_kind(self, name):
        assert name in CONFIG_MAPPING
        with pytest.raises(LinearizeError) as error:
            family_of(CONFIG_MAPPING[name]())
        assert str(error.value) == (
            f"model_type {name!r} cannot be converted: {REFUSED[name]}; use a model of another family"
        )

    def test_more_than_text(self):
        with pytest.raises(
            LinearizeError, match="model_type 'gemma3' reads more than text; give a model of text alone"
        ):
            family_of(CONFIG_MAPPING["gemma3"]())

    def test_attention_that_sees_the_future(self):
        model = make_model("gemma3_text", use_bidirectional_attention=True)
        with pytest.raises(LinearizeError, match="layer 1: Gemma3Attention sees the future"):
            convert(model, LinearizeConfig(window=4))

    def test_projections_of_other_sizes(self):
        model = make_model("phi3")
        model.model.layers[1].self_attn.qkv_proj = torch.nn.Linear(64, 96, bias=False)
        with pytest.raises(LinearizeError, match="layer 1: qkv_proj has 96 outputs but 128 follow from the config's 4"):
            convert(model, LinearizeConfig(window=4))

    def test_packed_documents_that_the_original_takes_for_one(self):
        tokens, positions = make_tokens(1, 20), torch.cat([torch.arange(9), torch.arange(11)])[None]
        teacher, student = make_model("gpt_oss"), make_student("gpt_oss", "none")
        whole, alone = logits(teacher, tokens, position_ids=positions), logits(teacher, tokens[:, 9:])
        assert not torch.allclose(whole[:, 9:], alone, atol=0.1)
        with pytest.raises(
            LinearizeError, match=r"which GptOssModel does not tell apart; give each document its own row"
        ):
            logits(student, tokens, position_ids=positions)
        with original_attention(student):
            assert torch.equal(logits(student, tokens, position_ids=positions), whole)

    @pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "stablelm", "gpt_neox"])
    def test_training_memory_that_was_not_measured(self, family):
        with pytest.raises(
            LinearizeError, match=f"train: the formulas have been measured on llama, .*, not on {family};"
        ):
            training_memory(make_config(family), LinearizeConfig(window=4))


def test_the_command_lists_families():
    result = CliRunner().invoke(app, ["families"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert set(KNOWN) <= rows.keys()
    assert "soft cap" in rows["gemma2"]
    assert "learned sink" in rows["gpt_oss"]
    assert all(name in result.stdout for name in REFUSED)


def test_the_command_inspects_one(tmp_path):
    make_config("gpt_oss").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--window", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert [layer["converted"] for layer in json.loads(result.stdout)["layers"]] == [False, True, True]
