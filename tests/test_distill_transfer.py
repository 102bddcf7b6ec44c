"""Attention transfer: one forward pass of the original teaches every layer, alone."""

import math

import pytest
import torch

from linearize import LinearizeConfig, LinearizeError, convert, original_attention, state_off
from linearize.convert import added_parameters, converted_layers, switch_of
from linearize.distill.objectives import OBJECTIVES, FarTarget, first_far_query
from linearize.distill.options import Budget, TransferOptions
from linearize.distill.transfer import calibrate, observe, run_transfer, transfer_step
from tests.cost import LargestTensor
from tests.tiny_models import FAMILIES, make_model, make_student, make_tokens, pad
from tests.tiny_training import TokenRows, log_lines
from tests.tolerance import assert_near

MIXES = ("normalizer", "gate")


def options(steps=3, **changes):
    return TransferOptions(**({"budget": Budget(steps=steps), "calibration_tokens": 200, "positions": 0} | changes))


def backward(loss):
    loss.backward()


def trainable(student):
    """Only mixers and mixes ask for gradients, as in `run_transfer`."""
    student.requires_grad_(False)
    for parameter in added_parameters(student).values():
        parameter.requires_grad_(True)
    return student


def gradients(student):
    """By name, and none left behind."""
    found = {name: p.grad for name, p in added_parameters(student).items()}
    for parameter in student.parameters():
        parameter.grad = None
    return found


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def unchanged(model, before, added):
    """Names of the model's own tensors that are not what they were, to the bit."""
    return [name for name, x in model.state_dict().items() if name not in added and not torch.equal(x, before[name])]


def divergence(logits, teacher):
    """Mean KL(teacher || student) of the next token."""
    p, q = teacher.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class TestObserve:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_forward_pass_of_the_original_shows_all_layers(self, family):
        teacher = make_model(family)
        student = make_student(family, "normalizer")
        batch = {"input_ids": make_tokens(2, 24)}
        calls, hidden = [], []
        handles = [
            student.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state)),
            *(
                layer.register_forward_hook(lambda module, args, out, i=i: calls.append(i))
                for i, layer in enumerate(student.model.layers)
            ),
        ]
        seen = []
        observe(student, batch, seen.append)
        for handle in handles:
            handle.remove()
        assert calls == [0, 1, 2]
        assert [one.layer.layer_idx for one in seen] == [0, 1, 2]
        with torch.no_grad():
            expected = teacher.model(batch["input_ids"]).last_hidden_state
        assert len(hidden) == 1
        assert torch.equal(hidden[0], expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_softmax_of_what_is_seen_is_the_originals_output(self, family):
        student = make_student(family, "normalizer", softmax_layers=[1])
        outputs = {}
        for index, layer in converted_layers(student).items():
            layer.original.o_proj.register_forward_pre_hook(lambda m, args, i=index: outputs.update({i: args[0]}))
        seen = []
        observe(student, {"input_ids": make_tokens(2, 24)}, seen.append)
        assert [one.layer.layer_idx for one in seen] == [0, 2]
        for one in seen:
            assert one.mask is None
            out = torch.nn.functional.scaled_dot_product_attention(
                one.q, one.k, one.v, is_causal=True, scale=one.layer.scaling, enable_gqa=True
            )
            torch.testing.assert_close(out.transpose(1, 2).flatten(2), outputs[one.layer.layer_idx])

    def test_mask_of_a_padded_batch(self):
        rows, mask = pad(make_tokens(2, 24), [0, 5], "left")
        seen = []
        observe(make_student("llama", "gate"), {"input_ids": rows, "attention_mask": mask}, seen.append)
        assert all(torch.equal(one.mask, mask.bool()) for one in seen)

    @pytest.mark.parametrize("side", [None, "left", "right"])
    def test_attention_that_an_observer_computed_is_not_computed_again(self, side):
        teacher, student = make_model("llama"), make_student("llama", "normalizer", softmax_layers=[1])
        rows, mask = pad(make_tokens(2, 24), [0, 5 if side else 0], side or "right")
        batch = {"input_ids": rows} | ({"attention_mask": mask} if side else {})
        hidden, calls = [], []
        for layer in converted_layers(student).values():
            layer.original.register_forward_hook(lambda module, args, out: calls.append(module.layer_idx))
        student.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
        observe(student, batch, lambda one: FarTarget(one).attention(one))
        assert calls == []
        with torch.no_grad():
            expected = teacher.model(**batch).last_hidden_state
        assert_near(hidden[0][mask.bool()], expected[mask.bool()])
        observe(student, batch, lambda one: torch.zeros_like(FarTarget(one).attention(one)))
        assert not torch.allclose(hidden[1][mask.bool()], expected[mask.bool()], atol=0.1)

    def test_after_an_exception_the_student_is_itself_again(self):
        student = make_student("llama", "normalizer")
        tokens = make_tokens(1, 24)
        with torch.no_grad():
            before = student(tokens).logits

        def fail(seen):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            observe(student, {"input_ids": tokens}, fail)
        assert switch_of(student).observer is None
        assert switch_of(student).converted
        with torch.no_grad():
            assert torch.equal(student(tokens).logits, before)
        seen = []
        observe(student, {"input_ids": tokens}, seen.append)
        assert len(seen) == 3


class TestStep:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_losses_and_gradients_are_each_layers_own(self, mix, objective):
        student = trainable(make_student("llama", mix))
        batch = TokenRows(2, 40).at(0)
        losses = transfer_step(student, batch, objective, backward)
        together = gradients(student)
        assert list(losses) == ["loss", "layer.0", "layer.1", "layer.2"]
        assert not any(x.requires_grad for x in losses.values())
        layers = [losses[f"layer.{i}"] for i in range(3)]
        assert losses["loss"] == torch.stack(layers).mean()
        alone = {}
        seen = []

        def see(one):
            seen.append(one)
            return FarTarget(one).attention(one)

        observe(student, batch, see)
        for one, loss in zip(seen, layers):
            value = OBJECTIVES[objective](one)
            assert torch.equal(value.detach(), loss)
            value.backward()
            alone |= {name: grad for name, grad in gradients(student).items() if grad is not None}
        assert alone.keys() == together.keys()
        assert all(torch.equal(together[name], alone[name]) for name in alone)
        assert all(grad.any() for grad in alone.values())

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_other_layers_have_no_influence(self, objective):
        """Layer 1's gradient is the same whatever the mixers of layers 0 and 2 are."""
        student = trainable(make_student("llama", "normalizer"))
        batch = TokenRows(2, 40).at(0)
        transfer_step(student, batch, objective, backward)
        before = gradients(student)
        with torch.no_grad():
            for index in (0, 2):
                for parameter in converted_layers(student)[index].mixer.parameters():
                    parameter.mul_(-3)
        transfer_step(student, batch, objective, backward)
        after = gradients(student)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if ".layers.1." in name}

    def test_no_second_copy_of_the_weights(self):
        student = trainable(make_student("llama", "normalizer"))
        before = {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()}
        used = set()

        def watch(seen):
            used.update(p.data_ptr() for p in seen.layer.original.parameters())

        observe(student, TokenRows(1, 40).at(0), watch)
        transfer_step(student, TokenRows(1, 40).at(0), "decomposed", backward)
        assert {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()} == before
        assert used == {
            pointer
            for name, (_, pointer) in before.items()
            if ".self_attn." in name and name not in added_parameters(student)
        }

    def test_gradients_are_left_in_no_other_parameter(self):
        student = trainable(make_student("llama", "normalizer"))
        transfer_step(student, TokenRows(1, 40).at(0), "output", backward)
        added = added_parameters(student)
        assert {name for name, p in student.named_parameters() if p.grad is not None} == added.keys()

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_has_no_influence(self, side, objective):
        student = trainable(make_student("llama", "normalizer"))
        batch = TokenRows(3, 40, [0, 6, 13], side).at(0)
        other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 77)}
        losses, expected = (transfer_step(student, one, objective, lambda loss: None) for one in (other, batch))
        assert all(torch.equal(losses[key], expected[key]) for key in expected)

    def test_left_and_right_padding_are_the_same(self):
        student = trainable(make_student("llama", "normalizer"))
        losses = {}
        for side in ("left", "right"):
            batch = TokenRows(3, 40, [0, 6, 13], side).at(0)
            # Feature maps see positions, so these count real tokens.
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            losses[side] = transfer_step(student, batch, "decomposed", lambda loss: None)
        for key, expected in losses["right"].items():
            torch.testing.assert_close(losses["left"][key], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_no_tensor_of_length_squared(self, objective):
        student = trainable(make_student("llama", "normalizer", window=16))
        largest = {}
        for length in (512, 2048):
            batch = TokenRows(1, length).at(0)
            transfer_step(student, batch, objective, backward)
            with LargestTensor() as record:
                transfer_step(student, batch, objective, backward)
            largest[length] = record.bytes
        assert largest[2048] <= 4.1 * largest[512]
        assert largest[2048] < 4 * 2048 * 2048 / 2

    def test_half_precision_weights(self):
        """bfloat16 base, float32 mixers: about the losses of float32, finite float32 gradients."""
        batch = TokenRows(2, 40).at(0)
        losses = {}
        for dtype in (torch.float32, torch.bfloat16):
            student = trainable(make_student("llama", "normalizer", dtype))
            losses[dtype] = transfer_step(student, batch, "decomposed", backward)
            found = gradients(student)
            assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in found.values())
        for key, value in losses[torch.bfloat16].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, losses[torch.float32][key], rtol=0.05, atol=0.0)


class TestRun:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("mix", MIXES)
    def test_teaches(self, mix, objective, tmp_path):
        """Losses fall in every layer but one at most, and the student's predictions come nearer to the teacher's:
        nearer than before, and than those of window and sinks alone."""
        student = convert(make_model("llama"), LinearizeConfig(window=8, sinks=2, mix=mix))
        tokens = make_tokens(2, 128)

        def distances():
            with torch.no_grad():
                with original_attention(student):
                    teacher = student(tokens).logits
                with state_off(student):
                    near = divergence(student(tokens).logits, teacher)
                return divergence(student(tokens).logits, teacher), near

        before, near = distances()
        untrained = transfer_step(student, TokenRows(2, 128).at(0), objective, lambda loss: None)
        outcome = run_transfer(student, TokenRows(2, 128), options(60, objective=objective), tmp_path)
        after, near_after = distances()
        assert near_after == near
        assert after < 0.8 * before
        assert after < 0.65 * near
        fallen = [key for key in outcome.first if outcome.last[key] < 0.92 * untrained[key]]
        assert "loss" in fallen
        assert len(fallen) >= 3
        assert outcome.first.keys() == outcome.last.keys() == {"loss", "layer.0", "layer.1", "layer.2"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_other_weights_stay_bit_for_bit(self, dtype, tmp_path):
        student = make_student("qwen3", "normalizer", dtype, softmax_layers=[1])
        before, added = snapshot(student), added_parameters(student)
        run_transfer(student, TokenRows(2, 40), options(), tmp_path)
        assert unchanged(student, before, added) == []
        assert all(not torch.equal(p, before[name]) for name, p in added.items())
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in added.values())
        assert not any(p.requires_grad for p in student.parameters())
        assert all(p.grad is None or not p.grad.any() for p in student.parameters())

    def test_calibrates_on_the_first_batches_and_trains_on_them_too(self, tmp_path):
        rows = TokenRows(2, 40)
        student, other = (make_student("llama", "normalizer") for _ in range(2))
        outcome = run_transfer(student, rows, options(1, calibration_tokens=100), tmp_path)
        assert rows.drawn == 1
        calibrate(other, TokenRows(2, 40), 100, 0)
        losses = transfer_step(other, TokenRows(2, 40).at(0), "decomposed", lambda loss: None)
        assert outcome.first == {key: float(x) for key, x in losses.items()}

    def test_calibration_of_half_precision_mixers_is_kept(self, tmp_path):
        """Adam's masters are copies: they have to be made of what calibration left."""
        student, alone = (make_student("llama", "normalizer").to(torch.bfloat16) for _ in range(2))
        run_transfer(student, TokenRows(2, 40), options(1, lr=1e-9, calibration_tokens=80), tmp_path)
        start = snapshot(alone)
        calibrate(alone, TokenRows(2, 40), 80, 0)
        for name, parameter in added_parameters(alone).items():
            assert not torch.equal(parameter, start[name])
            assert torch.equal(added_parameters(student)[name], parameter)

    def test_without_calibration_it_starts_as_converted(self, tmp_path):
        student, other = (make_student("llama", "normalizer") for _ in range(2))
        outcome = run_transfer(student, TokenRows(2, 40), options(1, calibration_tokens=0), tmp_path)
        losses = transfer_step(other, TokenRows(2, 40).at(0), "decomposed", lambda loss: None)
        assert outcome.first == {key: float(x) for key, x in losses.items()}

    def test_a_run_that_goes_on_is_not_calibrated_again(self, tmp_path, monkeypatch):
        run_transfer(make_student("llama", "normalizer"), TokenRows(2, 40), options(2, warmup=0.0), tmp_path)
        monkeypatch.setattr("linearize.distill.transfer.calibrate", None)
        student = make_student("llama", "normalizer")
        assert run_transfer(student, TokenRows(2, 40), options(3, warmup=0.0), tmp_path).steps == 3

    def test_log_has_a_loss_for_each_layer(self, tmp_path):
        student = make_student("llama", "gate", softmax_layers=[0])
        run_transfer(student, TokenRows(2, 40), options(4, log_every=2), tmp_path)
        lines = log_lines(tmp_path)
        assert [line["step"] for line in lines] == [1, 2, 4]
        for line in lines:
            assert line["stage"] == "transfer"
            assert line["losses_per_layer"].keys() == {"1", "2"}
            assert math.isclose(line["loss"], sum(line["losses_per_layer"].values()) / 2, rel_tol=1e-5)

    def test_a_mixs_weight_learns_at_a_tenth_of_the_rate(self, tmp_path):
        """Adam's first step is the learning rate in every element with a gradient, at any scale of it."""
        student = make_student("llama", "normalizer")
        start = {}

        def remember(stream):
            start.update(snapshot(student))
            return stream

        class Rows(TokenRows):
            def __next__(self):
                remember(self)  # the second draw comes after calibration
                return super().__next__()

        run_transfer(student, Rows(2, 40), options(1, lr=1e-2, warmup=0.0), tmp_path)
        for name, parameter in added_parameters(student).items():
            moved = float((parameter - start[name]).abs().median())
            expected = 1e-3 if name.endswith("mix.weight") else 1e-2
            assert moved == pytest.approx(expected, rel=0.02), name

    def test_row_length_that_leaves_nothing_to_learn(self, tmp_path):
        for window, sinks, needed in ((4, 2, 8), (4, 4, 12), (4, 11, 16), (8, 0, 16)):
            student = make_student("llama", "normalizer", window=window, sinks=sinks)
            assert first_far_query(LinearizeConfig(window=window, sinks=sinks)) == needed
            before = snapshot(student)
            with pytest.raises(LinearizeError) as error:
                run_transfer(student, TokenRows(2, needed), options(), tmp_path)
            assert str(error.value) == (
                f"data.seq_len: in rows of {needed} tokens nothing has left a window of {window} (two chunks) and "
                f"{sinks} sinks; use more than {needed}, better {needed + 14 * window}"
            )
            assert unchanged(student, before, []) == []
            run_transfer(student, TokenRows(2, needed + 1), options(1), tmp_path / str(needed) / str(window))
            assert unchanged(student, before, []) != []

    def test_mixer_none_has_nothing_to_train(self, tmp_path):
        with pytest.raises(LinearizeError) as error:
            run_transfer(make_student("llama", "none"), TokenRows(2, 40), options(), tmp_path)
        assert str(error.value) == (
            "transfer: mixer 'none' has no far side of its own to teach; convert with mixer 'hedgehog', or skip it"
        )

    def test_a_model_that_is_not_converted(self, tmp_path):
        with pytest.raises(LinearizeError, match=r"LlamaForCausalLM is not converted; call linearize\.convert first"):
            run_transfer(make_model("llama"), TokenRows(2, 40), options(), tmp_path)


class TestLocalSteps:
    """A layer learns from a batch several times: as if the batch had come again, with the teacher's pass shared."""

    def test_two_local_steps_are_two_updates(self):
        updates = []
        student = trainable(make_student("llama", "normalizer"))
        before = {name: p.detach().clone() for name, p in added_parameters(student).items()}

        def update():
            moved = [name for name, p in added_parameters(student).items() if p.grad is not None]
            updates.append(max(int(name.split(".")[2]) for name in moved))
            with torch.no_grad():
                for name in moved:
                    p = added_parameters(student)[name]
                    p -= 0.1 * p.grad
                    p.grad = None

        batch = {"input_ids": make_tokens(1, 32)}
        losses = transfer_step(student, batch, "decomposed", backward, update, local_steps=3)
        assert updates == [0, 0, 1, 1, 2, 2]
        assert all(not torch.equal(before[name], p) for name, p in added_parameters(student).items())
        again = transfer_step(student, batch, "decomposed", backward)
        assert again["loss"] < losses["loss"]

    def test_more_is_learnt_from_the_same_tokens(self, tmp_path):
        rows = [TokenRows(1, 48) for _ in range(2)]
        one = run_transfer(make_student("llama", "normalizer"), rows[0], options(20), tmp_path / "1")
        three = run_transfer(
            make_student("llama", "normalizer"),
            rows[1],
            options(20, local_steps=3),
            tmp_path / "3",
        )
        assert one.tokens == three.tokens
        assert three.last["loss"] < one.last["loss"]

    def test_not_with_accumulation(self, tmp_path):
        student = make_student("llama", "normalizer")
        with pytest.raises(LinearizeError, match="gradient_accumulation: 2 with 3 local_steps would update between"):
            run_transfer(student, TokenRows(1, 48), options(local_steps=3), tmp_path, accumulation=2)
