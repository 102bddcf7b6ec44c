"""Conversion in place and its inverse, on every family: what stays the same, what changes, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import linearize
from linearize import LinearizeConfig, LinearizeError, convert, original_attention, revert, state_off, window_off
from linearize.convert import converted_layers, is_converted, plan_layers, switch_of
from tests.cost import LargestTensor, flops, growth_of_time, peak_bytes
from tests.tiny_models import (
    FAMILIES,
    FAR,
    OTHER_FAMILIES,
    make_config,
    make_model,
    make_student,
    make_tokens,
    pad,
    randomize_far,
)

LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # float32, logits of a few units


def logits(model, tokens, **inputs):
    """Of one forward pass without gradients."""
    with torch.no_grad():
        return model(tokens, **inputs).logits


def explicit_mask(length, window, sinks, pads=(0,)):
    """(B, 1, T, T), 0 or -inf: sinks, own chunk and the one before, causal, of rows with `pads` tokens at the left."""
    mask = torch.full((len(pads), 1, length, length), -torch.inf)
    for row, first in enumerate(pads):
        mask[row, 0, range(length), range(length)] = 0.0
        for t in range(length - first):
            for i in range(t + 1):
                if i < sinks or i // window >= t // window - 1:
                    mask[row, 0, first + t, first + i] = 0.0
    return mask


class TestTeacher:
    @pytest.mark.parametrize("kept", ["none", "every:2"])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_window_that_covers_all(self, family, far, kept):
        teacher, tokens = make_model(family), make_tokens(2, 33)
        student = make_student(family, far, window=33, sinks=3, softmax_layers=kept)
        torch.testing.assert_close(logits(student, tokens), logits(teacher, tokens), **LOGITS)
        rows, mask = pad(tokens, [0, 7], "left")
        got, expected = (logits(model, rows, attention_mask=mask) for model in (student, teacher))
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **LOGITS)

    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 2), (5, 11), (16, 4)])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_window_and_sinks_are_an_explicit_mask(self, family, window, sinks):
        teacher, tokens = make_model(family), make_tokens(2, 37)
        student = make_student(family, "none", window=window, sinks=sinks)
        expected = logits(teacher, tokens, attention_mask=explicit_mask(37, window, sinks))
        torch.testing.assert_close(logits(student, tokens), expected, **LOGITS)
        assert (logits(teacher, tokens) - expected).abs().max() > 0.1
        rows, mask = pad(tokens, [0, 6], "left")
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = logits(
            teacher, rows, attention_mask=explicit_mask(37, window, sinks, (0, 6)), position_ids=position_ids
        )
        got = logits(student, rows, attention_mask=mask, position_ids=position_ids)
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **LOGITS)

    @pytest.mark.parametrize("far", FAR[1:])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_state_off_is_window_and_sinks(self, family, far):
        tokens = make_tokens(2, 37)
        student, window_only = make_student(family, far), make_student(family, "none")
        with state_off(student) as inside:
            assert inside is student
            torch.testing.assert_close(logits(student, tokens), logits(window_only, tokens), **LOGITS)
        assert (logits(student, tokens) - logits(window_only, tokens)).abs().max() > 0.1

    @pytest.mark.parametrize("far", FAR[1:])
    def test_window_off_reads_the_state_alone(self, far):
        student = make_student("llama", far, changes={"num_hidden_layers": 1})
        tokens = make_tokens(1, 24)  # 6 chunks; the last token reads tokens 2 .. 15 from the state
        with window_off(student):
            before = logits(student, tokens)[:, -1]
            for position in (0, 1, 16, 22):
                changed = tokens.clone()
                changed[:, position] += 1
                torch.testing.assert_close(logits(student, changed)[:, -1], before, **LOGITS)
            for position in (2, 15):
                changed = tokens.clone()
                changed[:, position] += 1
                assert (logits(student, changed)[:, -1] - before).abs().max() > 1e-3
        assert (logits(student, tokens)[:, -1] - before).abs().max() > 1e-3

    @pytest.mark.parametrize("kept", ["none", "every:2"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_conversion_switched_off_is_the_teacher(self, family, kept):
        teacher, tokens = make_model(family), make_tokens(2, 37)
        student = make_student(family, "normalizer", softmax_layers=kept)
        rows, mask = pad(tokens, [0, 7], "left")
        with original_attention(student) as inside:
            assert inside is student
            assert torch.equal(logits(student, tokens), logits(teacher, tokens))
            masked = logits(student, rows, attention_mask=mask)
            assert torch.equal(masked, logits(teacher, rows, attention_mask=mask))
            options = {"max_new_tokens": 8, "do_sample": False}
            assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))
        assert (logits(student, tokens) - logits(teacher, tokens)).abs().max() > 0.1

    def test_switches_restore_what_was_there(self):
        student = make_student("llama", "gate")
        switch = switch_of(student)

        def fail():
            assert switch.far_share == 1.0
            raise RuntimeError

        with state_off(student):
            with pytest.raises(RuntimeError), window_off(student):
                fail()
            assert switch.far_share == 0.0
            with original_attention(student):
                assert not switch.converted
            assert switch.converted
        assert switch.far_share is None


class TestLocality:
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_future_token_counts(self, family, far):
        student, tokens = make_student(family, far), make_tokens(2, 30)
        before = logits(student, tokens)
        for position in (1, 8, 15, 29):
            changed = tokens.clone()
            changed[:, position] = 1 + changed[:, position] % 100
            after = logits(student, changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
            assert (after[:, position] - before[:, position]).abs().max() > 1e-2

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_only_the_state_sees_beyond_window_and_sinks(self, family, far):
        """Three layers with a window of 4 carry a token at most 3 * 7 further; the last is 34 away."""
        student, tokens = make_student(family, far), make_tokens(2, 40)
        changed = tokens.clone()
        changed[:, 5] = 1 + changed[:, 5] % 100
        difference = (logits(student, changed) - logits(student, tokens)).abs()[:, -1].max()
        if far == "none":
            assert difference <= 1e-6
            return
        assert difference > 1e-3
        with state_off(student):
            assert (logits(student, changed) - logits(student, tokens)).abs()[:, -1].max() <= 1e-6

    def test_sinks_are_seen_for_ever(self):
        tokens = make_tokens(2, 40)
        changed = tokens.clone()
        changed[:, 1] = 1 + changed[:, 1] % 100
        seen = {
            sinks: (logits(student, changed) - logits(student, tokens)).abs()[:, -1].max()
            for sinks, student in ((s, make_student("llama", "none", sinks=s)) for s in (1, 2))
        }
        assert seen[1] <= 1e-6
        assert seen[2] > 1e-3


class TestRevert:
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bit_exact(self, family, far):
        model, tokens = make_model(family), make_tokens(2, 20)
        untouched = make_model(family)
        config, made = model.config, type(model)
        attributes = set(vars(model))
        expected = logits(model, tokens)
        parameters = {name: (id(x), x.data_ptr()) for name, x in model.named_parameters()}
        options = {"mixer": "none"} if far == "none" else {"mix": far}
        convert(model, LinearizeConfig(window=4, sinks=2, **options))
        logits(randomize_far(model), tokens)
        assert revert(model) is model

        assert type(model) is made
        assert model.config is config
        assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
        assert config.to_dict() == untouched.config.to_dict()
        assert set(vars(model)) == attributes
        assert {name: (id(x), x.data_ptr()) for name, x in model.named_parameters()} == parameters
        assert list(model.state_dict()) == list(untouched.state_dict())
        assert [type(x) for x in model.modules()] == [type(x) for x in untouched.modules()]
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(logits(model, tokens), expected)
        assert torch.equal(
            model.generate(tokens, max_new_tokens=5, do_sample=False),
            untouched.generate(tokens, max_new_tokens=5, do_sample=False),
        )

    def test_again_and_again(self):
        model, tokens = make_model("qwen3"), make_tokens(1, 20)
        expected = logits(model, tokens)
        for window in (4, 5):
            convert(model, LinearizeConfig(window=window, mixer="none"))
            assert model.config.linearize["window"] == window
            revert(model)
        assert torch.equal(logits(model, tokens), expected)

    @pytest.mark.parametrize("how", ["revert", "switch"])
    def test_mode_of_training_reaches_the_original(self, how):
        """Its attention has dropout, which the conversion must not leave on."""
        model, tokens = make_model("llama", attention_dropout=0.5), make_tokens(1, 20)
        expected = logits(model, tokens)
        convert(model.train(), LinearizeConfig(window=4))
        model.eval()
        if how == "revert":
            assert torch.equal(logits(revert(model), tokens), expected)
        else:
            with original_attention(model):
                assert torch.equal(logits(model, tokens), expected)
                model.train()
                assert not torch.equal(logits(model, tokens), expected)

    def test_trained_weights_stay(self):
        model, tokens = make_student("llama", "normalizer"), make_tokens(1, 20)
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
        other = make_model("llama")
        other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.5)
        assert torch.equal(logits(revert(model), tokens), logits(other, tokens))


class TestConversion:
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_in_place_and_nothing_else(self, family, far):
        model, bystander = make_model(family), make_model(family)
        made, config = type(model), model.config
        weights = {name: x.data_ptr() for name, x in model.named_parameters()}
        options = {"mixer": "none"} if far == "none" else {"mix": far}
        assert convert(model, LinearizeConfig(**options)) is model
        assert is_converted(model)
        assert list(converted_layers(model)) == [0, 1, 2]
        assert isinstance(model, made)
        assert isinstance(model.config, type(config))
        assert model.config.model_type == family
        assert model.config.linearize == LinearizeConfig(**options).to_dict()
        now = {name: x.data_ptr() for name, x in model.named_parameters()}
        added = {f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ADDED} if far != "none" else set()
        assert now.keys() - weights.keys() == added
        assert {name: now[name] for name in weights} == weights
        # Another model of the same class, and the class, are as before.
        assert type(bystander) is made
        assert not is_converted(bystander)
        assert not hasattr(config, "linearize")
        assert not hasattr(bystander.config, "linearize")

    @pytest.mark.parametrize(
        ("kept", "converted"), [("every:2", [0, 2]), ("every:3", [0, 1]), ([2, 0], [1]), ([1], [0, 2])]
    )
    def test_kept_layers(self, kept, converted):
        model = make_student("mistral", "normalizer", softmax_layers=kept)
        assert list(converted_layers(model)) == converted
        plan = plan_layers(make_config("mistral"), LinearizeConfig(window=4, sinks=2, softmax_layers=kept))
        assert [layer.index for layer in plan if layer.converted] == converted
        assert [layer.after for layer in plan if not layer.converted] == ["softmax"] * (3 - len(converted))
        assert {layer.after for layer in plan if layer.converted} == {"window 4 + sinks 2 + hedgehog (normalizer)"}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_half_precision(self, family, dtype):
        student = make_student(family, "normalizer", dtype)
        assert {x.dtype for layer in converted_layers(student).values() for x in layer.mixer.parameters()} == {
            torch.float32
        }
        assert {layer.mix.bias.dtype for layer in converted_layers(student).values()} == {torch.float32}
        tokens = make_tokens(2, 30)
        with torch.no_grad():
            out = student(tokens, use_cache=True)
        assert out.logits.dtype == dtype
        assert bool(out.logits.isfinite().all())
        assert out.past_key_values.layers[1].memory.near_k.dtype == dtype
        assert out.past_key_values.layers[1].memory.state.s.dtype == torch.float32
        # The same student in float32 is what both it and its window-only teacher are measured by.
        wide, teacher = make_student(family, "normalizer"), make_model(family)
        for model in (wide, teacher):
            model.load_state_dict(student.state_dict(), strict=model is wide)
        with original_attention(student):
            plain = (logits(student, tokens).float() - logits(teacher, tokens)).abs().max()
        assert (out.logits.float() - logits(wide, tokens)).abs().max() <= 2 * plain

    def test_on_meta(self):
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(make_config("qwen2"))
        convert(model, LinearizeConfig(window=4))
        assert {x.device.type for x in model.parameters()} == {"meta"}
        real = make_student("qwen2", "normalizer")
        assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == {
            name: (x.shape, x.dtype) for name, x in real.state_dict().items()
        }
        assert model(torch.zeros(1, 9, dtype=torch.long, device="meta")).logits.shape == (1, 9, 128)

    @pytest.mark.gpu
    def test_on_cuda(self):
        student = make_student("llama", "normalizer")
        tokens = make_tokens(2, 30)
        expected = logits(student, tokens)
        revert(student)
        on_gpu = randomize_far(convert(student.cuda(), LinearizeConfig(window=4, sinks=2)))
        assert {x.device.type for x in on_gpu.parameters()} == {"cuda"}
        torch.testing.assert_close(logits(on_gpu, tokens.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
        out = on_gpu.generate(tokens.cuda(), max_new_tokens=6, do_sample=False)
        recomputed = on_gpu.generate(tokens.cuda(), max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(out, recomputed)

    def test_layers_with_a_window_of_their_own_stay(self):
        types = ["full_attention", "sliding_attention", "full_attention"]
        changes = {"layer_types": types, "use_sliding_window": True, "sliding_window": 6}
        student = make_student("qwen2", "none", changes=changes, window=33)
        assert list(converted_layers(student)) == [0, 2]
        tokens = make_tokens(2, 33)
        torch.testing.assert_close(logits(student, tokens), logits(make_model("qwen2", **changes), tokens), **LOGITS)
        plan = plan_layers(make_config("qwen2", **changes), LinearizeConfig(window=4))
        assert [layer.before for layer in plan] == ["softmax", "softmax, sliding window 6", "softmax"]
        assert plan[1].after == plan[1].before

    def test_embeddings_as_inputs(self):
        student, tokens = make_student("llama", "normalizer"), make_tokens(2, 20)
        embedded = student.get_input_embeddings()(tokens)
        with torch.no_grad():
            assert torch.equal(student(inputs_embeds=embedded).logits, logits(student, tokens))

    @pytest.mark.parametrize("far", FAR)
    def test_scale_of_the_model_itself(self, far):
        """Not the usual head_dim^(-1/2)."""
        teacher, tokens = make_model("llama"), make_tokens(2, 33)
        plain = logits(teacher, tokens)
        for layer in teacher.model.layers:
            layer.self_attn.scaling = 0.7
        expected = logits(teacher, tokens)
        assert (expected - plain).abs().max() > 0.1
        options = {"mixer": "none"} if far == "none" else {"mix": far}
        student = randomize_far(convert(teacher, LinearizeConfig(window=33, sinks=2, **options)))
        torch.testing.assert_close(logits(student, tokens), expected, **LOGITS)

    def test_feature_dim(self):
        student = make_student("llama", "normalizer", feature_dim=5)
        assert converted_layers(student)[0].mixer.query_weight.shape == (4, 16, 5)
        assert converted_layers(student)[0].mixer.num_features == 10

    def test_subclass_of_a_user(self, tmp_path):
        """It converts, and reverts, and does not take the place of the family's own class."""
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        class Own(LlamaForCausalLM):
            pass

        own, tokens = make_model("llama"), make_tokens(2, 20)
        own.__class__ = Own
        expected = logits(own, tokens)
        randomize_far(convert(own, LinearizeConfig(window=4)))
        assert isinstance(own, Own)
        own.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not isinstance(loaded, Own)
        assert torch.equal(logits(loaded, tokens), logits(own, tokens))
        assert torch.equal(logits(revert(own), tokens), expected)
        assert type(own) is Own

    def test_public_names(self):
        assert linearize.convert is convert
        assert linearize.revert is revert


ADDED = ("mix.weight", "mix.bias", "mixer.query_weight", "mixer.key_weight")


def gradients(model, tokens, labels=None, **inputs):
    """By name, of the parameters that have one after a backward pass."""
    model.zero_grad()
    model(input_ids=tokens, labels=tokens if labels is None else labels, **inputs).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(actual, expected):
    """Up to the order of float32 sums: 1e-5 of a tensor's largest element."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
class TestTraining:
    @pytest.mark.parametrize(
        ("family", "far", "padded"),
        [(family, far, False) for family in FAMILIES for far in FAR] + [("llama", far, True) for far in FAR],
    )
    def test_gradient_checkpointing(self, family, far, padded):
        """And with a cache, which transformers makes by default even for training: the same gradients."""
        student, tokens = make_student(family, far, softmax_layers=[1]).train(), make_tokens(2, 30)
        rows, mask = pad(tokens, [0, 9 if padded else 0], "left")
        inputs = {"tokens": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}
        expected = gradients(student, use_cache=False, **inputs)
        assert expected.keys() == {name for name, _ in student.named_parameters()}
        assert all(float(x.abs().max()) > 0 for x in expected.values())
        assert_same_gradients(gradients(student, use_cache=True, **inputs), expected)
        student.enable_input_require_grads()
        for reentrant in (False, True):
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert_same_gradients(gradients(student, **inputs), expected)
            student.gradient_checkpointing_disable()

    @staticmethod
    def runs(far):
        """Forward and backward of a whole model, by length."""
        student = make_student("llama", far, window=32, changes={"num_hidden_layers": 2}).train()

        def run(length):
            rows, mask = pad(make_tokens(1, length), [100], "left")
            return lambda: student(rows, attention_mask=mask, labels=rows).loss.backward()

        runs = {length: run(length) for length in (1024, 4096)}
        runs[1024]()  # makes the gradients, which stay
        return runs

    @pytest.mark.slow
    @pytest.mark.parametrize("far", FAR)
    def test_time_is_linear(self, far):
        assert growth_of_time(self.runs(far), limit=5) <= 5

    @pytest.mark.parametrize("far", FAR)
    def test_cost_is_linear(self, far):
        """4096 tokens against 1024: no 4-D mask either."""
        runs = self.runs(far)
        peak = {length: peak_bytes(step) for length, step in runs.items()}
        assert peak[4096] <= 5 * peak[1024]
        work = {length: flops(step) for length, step in runs.items()}
        assert 0 < work[4096] <= 4.1 * work[1024]
        largest = {}
        for length, step in runs.items():
            with LargestTensor() as record:
                step()
            largest[length] = record.bytes
        assert largest[4096] <= 5 * largest[1024]


class TestPeft:
    @staticmethod
    def add_lora(model, targets=("q_proj", "v_proj", "o_proj", "up_proj")):
        """LoRA whose both factors are random, so that it changes the outputs."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_lora_on_a_student(self, family):
        tokens = make_tokens(2, 30)
        student = make_student(family, "normalizer")
        plain = logits(student, tokens)
        adapted = self.add_lora(student)
        assert is_converted(adapted)
        trained = {name for name, x in adapted.named_parameters() if x.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        got = gradients(adapted.train(), tokens)
        assert got.keys() == trained
        assert all(float(x.abs().max()) > 0 for x in got.values())
        adapted.eval()
        assert (logits(adapted, tokens) - plain).abs().max() > 1e-2
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, tokens), plain)
            with original_attention(adapted):
                assert torch.equal(logits(adapted, tokens), logits(make_model(family), tokens))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_revert_of_an_adapted_student(self, family):
        tokens = make_tokens(2, 30)
        adapted = self.add_lora(make_student(family, "normalizer"))
        expected = self.add_lora(make_model(family))
        assert revert(adapted) is adapted
        assert list(adapted.state_dict()) == list(expected.state_dict())
        expected.load_state_dict(adapted.state_dict())
        assert torch.equal(logits(adapted, tokens), logits(expected, tokens))
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, tokens), logits(make_model(family), tokens))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_conversion_of_an_adapted_model(self, family):
        tokens = make_tokens(2, 30)
        adapted = self.add_lora(make_model(family))
        expected = logits(adapted, tokens)
        assert convert(adapted, LinearizeConfig(window=30, sinks=2)) is adapted
        randomize_far(adapted)
        torch.testing.assert_close(logits(adapted, tokens), expected, **LOGITS)
        with original_attention(adapted):
            assert torch.equal(logits(adapted, tokens), expected)
        gradient = gradients(adapted.train(), tokens)
        lora = {name for name, _ in adapted.named_parameters() if "lora_" in name}
        assert all(float(gradient[name].abs().max()) > 0 for name in lora)
        adapted.eval()
        assert torch.equal(logits(revert(adapted), tokens), expected)

    def test_merging(self):
        tokens = make_tokens(2, 30)
        adapted = self.add_lora(make_student("llama", "gate"))
        expected = logits(adapted, tokens)
        merged = adapted.merge_and_unload()
        assert is_converted(merged)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)
        reverted = revert(merged)
        teacher = make_model("llama")
        teacher.load_state_dict(reverted.state_dict())
        assert torch.equal(logits(reverted, tokens), logits(teacher, tokens))


class TestCopies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_deepcopy(self, family):
        student, tokens = make_student(family, "normalizer"), make_tokens(2, 30)
        expected = logits(student, tokens)
        twin = copy.deepcopy(student)
        assert torch.equal(logits(twin, tokens), expected)
        assert not {x.data_ptr() for x in twin.parameters()} & {x.data_ptr() for x in student.parameters()}
        # They share nothing: neither weights, nor the switch, nor the original modules.
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        with state_off(twin):
            assert torch.equal(logits(student, tokens), expected)
        revert(twin)
        assert not is_converted(twin)
        assert torch.equal(logits(student, tokens), expected)
        assert torch.equal(logits(revert(student), tokens), logits(make_model(family), tokens))


class Linear4bit(nn.Linear):
    """Stands for the linear layers of quantization libraries, which subclass torch's."""


def quantized(model):
    old = model.model.layers[1].self_attn.k_proj
    model.model.layers[1].self_attn.k_proj = Linear4bit(old.in_features, old.out_features, bias=False)
    return model


def narrowed(model):
    model.model.layers[2].self_attn.v_proj = nn.Linear(64, 16, bias=False)
    return model


def with_extra_norm(model):
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(16)
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def gemma():
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    )


def classifier():
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(make_config("llama", num_labels=2))


FAMILY_ENTRY = (
    f"is not among the known families ({', '.join(sorted(FAMILIES + OTHER_FAMILIES))}); add an entry to "
    "linearize/families.py that says where its decoder layers and attention are, and what its attention has of its own"
)
# What is given, with which settings, and the whole message.
BAD_MODELS = [
    (
        lambda: make_student("llama", "normalizer"),
        {},
        "model: LinearizedLlamaForCausalLM is converted already (3 layers); call linearize.revert(model) first",
    ),
    (
        lambda: make_model("llama").model,
        {},
        "model: LlamaModel is no causal language model; give a LlamaForCausalLM, which "
        "AutoModelForCausalLM.from_pretrained returns",
    ),
    (
        classifier,
        {},
        "model: LlamaForSequenceClassification is no causal language model; give a LlamaForCausalLM, which "
        "AutoModelForCausalLM.from_pretrained returns",
    ),
    (gpt2, {}, f"model_type 'gpt2' {FAMILY_ENTRY}"),
    (gemma, {}, f"model_type 'gemma' {FAMILY_ENTRY}"),
    (
        lambda: quantized(make_model("llama")),
        {},
        "layer 1: k_proj is a tests Linear4bit, not a dense torch.nn.Linear; load the model without quantization",
    ),
    (
        lambda: narrowed(make_model("llama")),
        {},
        "layer 2: v_proj has 16 outputs but 32 follow from the config's 4 heads, 2 key-value heads and head_dim 16; "
        "correct the config",
    ),
    (
        lambda: with_extra_norm(make_model("llama")),
        {},
        "layer 0: LlamaAttention has ['k_proj', 'o_proj', 'q_norm', 'q_proj', 'v_proj'] but a llama attention has "
        "['k_proj', 'o_proj', 'q_proj', 'v_proj']; its family needs an entry of its own in linearize/families.py",
    ),
    (
        lambda: make_model("llama"),
        {"softmax_layers": [1, 3]},
        "softmax_layers: layer 3 is out of range, the model has layers 0 to 2; name layers inside that range",
    ),
    (
        lambda: make_model("llama"),
        {"softmax_layers": [-1]},
        "softmax_layers: layer -1 is out of range, the model has layers 0 to 2; name layers inside that range",
    ),
    (
        lambda: make_model("llama"),
        {"softmax_layers": "every:1"},
        "softmax_layers: 'every:1' leaves none of the 3 layers to convert (0 have a sliding window of their own and "
        "stay as they are); keep fewer layers",
    ),
    (
        lambda: make_model("mistral", sliding_window=8),
        {},
        "sliding_window: every layer has one of 8 tokens, and such layers stay as they are; to convert them, set "
        "sliding_window to null in the model's config, which changes nothing for texts shorter than it",
    ),
    (
        lambda: make_model("llama", max_position_embeddings=64),
        {"window": 65},
        "window: 65 exceeds the model's 64 positions, so no token would ever leave it; use at most 64, better 16 to "
        "128",
    ),
    (
        lambda: make_model("llama", max_position_embeddings=64),
        {"sinks": 100},
        "sinks: 100 exceeds the model's 64 positions, so no token would ever leave it; use at most 64, better 16 to "
        "128",
    ),
]


@pytest.mark.parametrize("mixer", ["hedgehog", "gla"])
@pytest.mark.parametrize("mix_input", ["query", "fixed"])
def test_offloaded_weights(mix_input, mixer):
    """By accelerate: what conversion added is loaded with its layer and goes away again, however it was offloaded."""
    from accelerate import cpu_offload

    tokens, cpu = make_tokens(1, 30), torch.device("cpu")
    for given in ({}, {"preload_module_classes": ["ConvertedAttention"]}):
        config = LinearizeConfig(mixer=mixer, mix="gate", mix_input=mix_input, window=4, sinks=2)
        student = randomize_far(convert(make_model("llama"), config))
        with torch.no_grad():
            expected = student(tokens).logits
            written = student.generate(tokens, max_new_tokens=9, do_sample=False)
            cpu_offload(student, execution_device=cpu, **given)
            for _ in range(2):
                assert torch.equal(student(tokens).logits, expected)
                assert all(p.is_meta for p in student.model.layers[0].self_attn.parameters())
            assert torch.equal(student.generate(tokens, max_new_tokens=9, do_sample=False), written)
            with original_attention(student):
                assert torch.equal(student(tokens).logits, make_model("llama")(tokens).logits)


class TestBadInputs:
    @pytest.mark.parametrize(("make", "settings", "message"), BAD_MODELS, ids=[x[2][:45] for x in BAD_MODELS])
    def test_model_or_config_that_does_not_fit(self, make, settings, message):
        model = make()
        before = type(model), model.config, [id(x) for x in model.modules()]
        with pytest.raises(LinearizeError) as error:
            convert(model, LinearizeConfig(**settings))
        assert str(error.value) == message
        assert (type(model), model.config, [id(x) for x in model.modules()]) == before

    def test_model_of_another_library(self):
        with pytest.raises(LinearizeError) as error:
            convert(nn.Linear(2, 2), LinearizeConfig())
        assert str(error.value) == (
            "model: Linear is no transformers model; give what AutoModelForCausalLM.from_pretrained returns"
        )

    @pytest.mark.parametrize(
        "use", [revert, switch_of, lambda model: original_attention(model).__enter__()], ids=["revert", "switch", "off"]
    )
    def test_model_that_is_not_converted(self, use):
        with pytest.raises(LinearizeError, match=r"model: LlamaForCausalLM is not converted; "):
            use(make_model("llama"))

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (
                {"attention_mask": torch.zeros(2, 1, 6, 6)},
                "attention_mask: (2, 1, 6, 6) is not (batch, tokens); a converted layer takes a 2-D mask of real "
                "tokens only",
            ),
            (
                {"attention_mask": torch.ones(2, 4, dtype=torch.long)},
                "attention_mask: it covers 4 tokens but 6 are given; make it cover all, past and new",
            ),
            (
                {"attention_mask": {"full_attention": torch.zeros(2, 1, 6, 6)}},
                "attention_mask: dict is not (batch, tokens); a converted layer takes a 2-D mask of real tokens only",
            ),
        ],
        ids=["4-D mask", "short mask", "dict of masks"],
    )
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_forward(self, inputs, message, use_cache):
        student = make_student("llama", "normalizer")
        with pytest.raises(LinearizeError) as error:
            logits(student, make_tokens(2, 6), use_cache=use_cache, **inputs)
        assert str(error.value) == message


class TestFarSideInHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_mix_is_computed_in_float32(self, dtype):
        student = make_student("llama", "normalizer").to(dtype)
        layer = converted_layers(student)[0]
        assert layer.mix.weight.dtype == dtype
        assert layer.mix(torch.randn(1, 4, 5, 16, dtype=dtype)).dtype == torch.float32


def test_attention_maps_are_refused():
    student = make_student("llama", "normalizer")
    with pytest.raises(LinearizeError, match="output_attentions: a converted layer has no attention map"):
        student(make_tokens(1, 9), output_attentions=True)
    with original_attention(student):
        student(make_tokens(1, 9), output_attentions=True)


@pytest.mark.parametrize("use_cache", [False, True])
def test_mixed_precision_training(use_cache):
    """float32 weights under autocast, as trainers with `bf16=True` run them: rotary embeddings widen q and k again."""
    student = make_student("llama", "normalizer")
    tokens = make_tokens(2, 40)
    expected = student(input_ids=tokens, use_cache=False).logits
    student.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = student(input_ids=tokens, labels=tokens, use_cache=use_cache)
    assert (out.logits.float() - expected).norm() <= 0.05 * expected.norm()
    out.loss.backward()
    for layer in converted_layers(student).values():
        for parameter in (*layer.mixer.parameters(), *layer.mix.parameters()):
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.isfinite().all())
            assert bool(parameter.grad.any())
