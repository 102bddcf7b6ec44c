"""Presets named after a paper: the converted layer against that paper's formula, written out here once more in loops or
T x T, in float64. And every preset: loads, trains, generates with a cache as without."""

import math

import pytest
import torch

from linearize import LinearizeConfig, convert
from linearize.convert import added_parameters, converted_layers
from linearize.distill.end_to_end import run_distill
from linearize.distill.objectives import OBJECTIVES
from linearize.distill.options import TransferOptions
from linearize.distill.recipe import load_recipe
from linearize.distill.transfer import observe, run_transfer
from linearize.errors import LinearizeError
from linearize.kernels.near_far import near_far_attention
from tests.test_distill_recipe import FILL_IN
from tests.tiny_models import make_model, make_tokens, randomize_far
from tests.tiny_training import TokenRows, log_lines
from tests.tolerance import assert_near

HEADS, KV_HEADS, SIZE, LENGTH = 4, 2, 64, 150
THETA = 10000.0


def student_of(preset, model=None):
    """A tiny model with heads of 64 channels, converted as the preset says, in float64."""
    model = model or make_model("llama", torch.float64, head_dim=SIZE, num_hidden_layers=1)
    return convert(model, load_recipe(preset, FILL_IN[preset]).convert)


def layer_input(seed=3):
    return torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(length):
    """(T, D / 2) of the rotary embedding: t theta^(-2 i / D)."""
    return torch.tensor(
        [[t * THETA ** (-2 * i / SIZE) for i in range(SIZE // 2)] for t in range(length)], dtype=torch.float64
    )


def layer_output(student, hidden):
    """What the first attention makes of hidden states (1, T, hidden). The model's own angles are float32 ones."""
    twice = angles(hidden.shape[1]).repeat(1, 2)[None]
    with torch.no_grad():
        return student.model.layers[0].self_attn(hidden, (twice.cos(), twice.sin()))[0]


def rotated(x):
    """The rotary embedding of x (T, D): the pairs (i, i + D / 2) turned by their angles."""
    cos, sin = angles(len(x)).cos(), angles(len(x)).sin()
    a, b = x[:, : SIZE // 2], x[:, SIZE // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


def by_formula(student, hidden, attend):
    """The layer with `attend(q, k, v, h, kv) -> (T, V)` for each head, from q, k before the rotary embedding."""
    attention = student.model.layers[0].self_attn
    with torch.no_grad():
        q, k, v = (
            getattr(attention, f"{name}_proj").weight.double() @ hidden[0].T for name in "qkv"
        )  # (heads D, T): row by row of the projection
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            own, shared = slice(h * SIZE, (h + 1) * SIZE), slice(kv * SIZE, (kv + 1) * SIZE)
            heads.append(attend(q[own].T, k[shared].T, v[shared].T, h, kv))
        return (torch.cat(heads, dim=1) @ attention.o_proj.weight.double().T)[None]


def in_window(count, window=64):
    """(T, T) bool: the keys that a query sees by softmax, its own chunk and the one before."""
    return torch.tensor([[i <= t and i // window >= t // window - 1 for i in range(count)] for t in range(count)])


def lolcats(query_weight, key_weight, factor, linear_factor=1.0, from_peak=True):
    """Equation 6 of arXiv 2410.10254, with its stabilising constant c_t = max of the window's logits.

    o_t = (sum_window g exp(q_t.k_i / sqrt D - c_t) v_i + sum_before phi(q_t).phi(k_i) v_i) / (the same without v)
    """

    def phi(x, weight):
        y = x @ weight
        up, down = y.exp(), (-y).exp()
        return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], dim=-1)

    def attend(q, k, v, h, kv):
        q, k = rotated(q), rotated(k)
        phi_q, phi_k = phi(q, query_weight[h]), phi(k, key_weight[kv])
        near = in_window(len(q))
        logits = (q @ k.T / math.sqrt(SIZE)).masked_fill(~near, -torch.inf)
        peak = logits.amax(1, keepdim=True) if from_peak else 0.0
        before = torch.ones_like(near).tril() & ~near
        weights = factor[h] * (logits - peak).exp() + linear_factor * (phi_q @ phi_k.T) * before
        return weights @ v / weights.sum(1, keepdim=True)

    return attend


def liger(share=0.5, temperature=16):
    """arXiv 2503.01496: o_t = 1/2 softmax window + 1/2 S_t^T softmax(q_t).

    S_t = diag(a_t) S_{t-1} + softmax(k_t) v_t^T with a_t = sigmoid(k_t)^(1/16); the recurrence reads q and k before the
    rotary embedding, the window after it.
    """

    def attend(q, k, v, h, kv):
        logits = rotated(q) @ rotated(k).T / math.sqrt(SIZE)
        weights = logits.exp() * in_window(len(q))
        window = weights @ v / weights.sum(1, keepdim=True)
        state = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        linear = []
        for t in range(len(q)):
            gate = (1 / (1 + (-k[t]).exp())) ** (1 / temperature)
            key, query = k[t].exp() / k[t].exp().sum(), q[t].exp() / q[t].exp().sum()
            state = gate[:, None] * state + key[:, None] * v[t][None]
            linear.append(state.T @ query)
        return (1 - share) * window + share * torch.stack(linear)

    return attend


class TestLolcats:
    def test_untrained(self):
        student, hidden = student_of("lolcats"), layer_input()
        identity = torch.eye(SIZE, dtype=torch.float64)
        bias = student.model.layers[0].self_attn.mix.bias.detach().double()
        factor = (-bias).exp().tolist()
        assert factor == pytest.approx([1 / (1 + math.exp(2.1972245773362196))] * HEADS, rel=1e-6)  # float32 biases
        expected = by_formula(student, hidden, lolcats([identity] * HEADS, [identity] * KV_HEADS, factor))
        assert_near(layer_output(student, hidden), expected)
        others = {
            "without the peak": lolcats([identity] * HEADS, [identity] * KV_HEADS, factor, from_peak=False),
            "a factor on the linear side": lolcats([identity] * HEADS, [identity] * KV_HEADS, factor, 0.9),
        }
        for name, other in others.items():
            assert (by_formula(student, hidden, other) - expected).abs().max() > 1e-4, name

    def test_trained(self):
        student, hidden = student_of("lolcats"), layer_input()
        generator = torch.Generator().manual_seed(5)
        attention = student.model.layers[0].self_attn
        factor = [0.05, 0.3, 0.6, 0.97]
        with torch.no_grad():
            for parameter in attention.mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            attention.mix.bias.copy_(-torch.tensor(factor, dtype=torch.float64).log())
        weights = [x.detach().double() for x in (attention.mixer.query_weight, attention.mixer.key_weight)]
        # The biases are float32: the factors that they stand for.
        factor = (-attention.mix.bias.detach().double()).exp().tolist()
        expected = by_formula(student, hidden, lolcats(*weights, factor))
        assert_near(layer_output(student, hidden), expected)

    def test_what_learns(self):
        student = student_of("lolcats")
        shapes = {name.rpartition("self_attn.")[2]: tuple(p.shape) for name, p in added_parameters(student).items()}
        assert shapes == {
            "mixer.query_weight": (HEADS, SIZE, 64),
            "mixer.key_weight": (KV_HEADS, SIZE, 64),
            "mix.bias": (HEADS,),
        }

    def test_stages(self):
        recipe = load_recipe("lolcats", FILL_IN["lolcats"])
        (_, transfer), (_, distill) = recipe.stages
        assert (transfer.objective, transfer.calibration_tokens, transfer.lr) == ("output", 0, 1e-2)
        assert (distill.kl_weight, distill.ce_weight, distill.lr, distill.mixer_lr) == (0, 1, 1e-4, 0)
        assert (distill.lora_rank, distill.lora_alpha, len(distill.lora_targets)) == (8, 16, 4)
        assert transfer.budget.tokens + distill.budget.tokens == 40_000_000
        assert recipe.data.seq_len * recipe.data.batch_size * recipe.gradient_accumulation == 8 * 1024


class TestLiger:
    def test_formula(self):
        """There is nothing to train in the layer, so the start is all there is."""
        student, hidden = student_of("liger"), layer_input()
        expected = by_formula(student, hidden, liger())
        assert_near(layer_output(student, hidden), expected)
        for other in (liger(share=0.4), liger(temperature=1)):
            assert (by_formula(student, hidden, other) - expected).abs().max() > 1e-3

    def test_no_parameter_is_added(self):
        assert not added_parameters(student_of("liger"))

    def test_stage(self):
        recipe = load_recipe("liger", FILL_IN["liger"])
        ((name, options),) = recipe.stages
        assert (name, options.kl_weight, options.ce_weight, options.lr) == ("distill", 0, 1, 1e-3)
        assert (options.lora_rank, options.budget.tokens) == (8, 20_000_000)

    def test_it_has_no_far_side_to_transfer(self, tmp_path):
        overrides = [*FILL_IN["default"], "convert.mixer=gla", "convert.mix=gate"]
        with pytest.raises(LinearizeError, match="transfer teaches the state, and convert"):
            load_recipe("default", overrides)
        student = convert(make_model("llama"), LinearizeConfig(mixer="gla", mix="gate", window=4))
        with pytest.raises(LinearizeError, match="gla"):
            run_transfer(student, TokenRows(1, 32), TransferOptions(budget={"steps": 1}), tmp_path)


@pytest.mark.parametrize("preset", FILL_IN)
class TestEveryPreset:
    def recipe(self, preset):
        """The preset for tiny models: short windows, two steps a stage."""
        overrides = [*FILL_IN[preset], "convert.window=4"]
        for index, (name, _) in enumerate(load_recipe(preset, FILL_IN[preset]).stages):
            overrides += [f"stages.{index}.{name}.budget={{steps: 2}}", f"stages.{index}.{name}.log_every=1"]
            if name == "transfer" and preset != "lolcats":
                overrides.append(f"stages.{index}.{name}.calibration_tokens=40")
        return load_recipe(preset, overrides)

    def test_two_steps_of_every_stage(self, preset, tmp_path):
        recipe = self.recipe(preset)
        student = convert(make_model("llama"), recipe.convert)
        added = {name: p.detach().clone() for name, p in added_parameters(student).items()}
        for name, options in recipe.stages:
            if name == "transfer":
                outcome = run_transfer(student, TokenRows(1, 40), options, tmp_path)
            else:
                learned = {name: p.detach().clone() for name, p in added_parameters(student).items()}
                student, outcome = run_distill(student, TokenRows(1, 40), options, tmp_path)
                still = all(torch.equal(p, learned[name]) for name, p in added_parameters(student).items())
                assert still == (options.mixer_lr == 0 or not learned)
                lora = [p for name, p in student.named_parameters() if "lora_B" in name]
                assert all(bool(p.any()) for p in lora)
            assert outcome.steps == 2
        trained = [name for name, p in added_parameters(student).items() if not torch.equal(p, added[name])]
        assert len(trained) == len(added)
        losses = [line["loss"] for line in log_lines(tmp_path) if "loss" in line]
        assert len(losses) == 2 * len(recipe.stages)
        assert all(math.isfinite(loss) for loss in losses)

    def test_generation_with_a_cache_is_that_without(self, preset):
        student = randomize_far(convert(make_model("llama"), self.recipe(preset).convert))
        tokens = make_tokens(2, 21)
        mask = torch.ones_like(tokens)
        tokens[1, :3], mask[1, :3] = 0, 0
        options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
        cached = student.generate(tokens, **options, use_cache=True)
        assert torch.equal(cached, student.generate(tokens, **options, use_cache=False))
        assert cached.shape == (2, 35)

    def test_the_state_counts(self, preset):
        """With what is far removed, logits change; without a state there is nothing to remove."""
        from linearize.convert import state_off

        student = randomize_far(convert(make_model("llama"), self.recipe(preset).convert))
        with torch.no_grad():
            logits = student(make_tokens(1, 30)).logits
            with state_off(student):
                without = student(make_tokens(1, 30)).logits
        has_state = any(layer.mixer is not None for layer in converted_layers(student).values())
        assert ((logits - without).abs().max() > 1e-3) == has_state


@pytest.mark.parametrize("preset", ["lolcats", "liger"])
def test_saved_and_loaded(preset, tmp_path):
    """The choice is in the checkpoint."""
    from transformers import AutoModelForCausalLM

    student = randomize_far(student_of(preset, make_model("llama")))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    first = next(iter(converted_layers(loaded).values()))
    assert first.linearize_config == load_recipe(preset, FILL_IN[preset]).convert
    tokens = make_tokens(1, 150)
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("mix_input", ["query", "head", "fixed"])
@pytest.mark.parametrize("mix", ["peak", "normalizer", "gate"])
def test_transfer_sees_the_output_that_the_layer_has(mix, mix_input):
    """The loss `output`, from near and far by themselves, is the error of the attention as a whole."""
    config = LinearizeConfig(window=4, sinks=2, mix=mix, mix_input=mix_input, mix_start=0.7)
    student = randomize_far(convert(make_model("llama", torch.float64), config))
    losses = []

    def look(seen):
        layer = seen.layer
        logit = layer.mix_logit(seen.q)
        options = {"window": 4, "sinks": 2, "scale": layer.scaling}
        out = near_far_attention(seen.q, seen.k, seen.v, layer.mixer, logit, mix=mix, **options)
        full = near_far_attention(seen.q, seen.k, seen.v, window=64, scale=layer.scaling)
        counted = slice(8, None)  # the first queries with far keys
        error, size = ((x[:, :, counted] ** 2).sum() for x in (out - full, full))
        losses.append((OBJECTIVES["output"](seen, None), error / size))

    observe(student, {"input_ids": make_tokens(2, 33)}, look)
    assert len(losses) == 3
    for loss, expected in losses:
        assert expected > 0.01
        assert_near(loss, expected)
