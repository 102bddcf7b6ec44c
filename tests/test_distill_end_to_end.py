"""End-to-end distillation: its losses, its teacher, what it trains, and the control."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from linearize import LinearizeConfig, LinearizeError, convert, original_attention, state_off, window_off
from linearize.convert import added_parameters, base_model, switch_of
from linearize.distill import end_to_end
from linearize.distill.end_to_end import (
    CONTROL,
    STUDENT,
    WINDOW,
    counted_rows,
    distill_losses,
    run_distill,
    window_dropout,
)
from linearize.distill.logit_losses import ROWS_AT_ONCE, Listed, logit_losses
from linearize.distill.options import Budget, DistillOptions
from linearize.distill.teacher_cache import TeacherCache
from tests.tiny_models import make_model, make_student, make_tokens
from tests.tiny_training import OneText, TokenRows, log_lines

VOCAB = 50


def options(steps=3, **changes):
    return DistillOptions(**({"budget": Budget(steps=steps), "lr": 1e-2, "lora_rank": 4} | changes))


def snapshot(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def logits_of(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


def divergence(logits, teacher):
    """Mean KL(teacher || student), float64."""
    p, q = teacher.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.fixture
def taught(monkeypatch):
    """The teacher's logits in every loss that is computed, in order."""
    calls = []

    def record(logits, *, teacher=None, **options):
        calls.append(teacher.detach().clone())
        return logit_losses(logits, teacher=teacher, **options)

    monkeypatch.setattr(end_to_end, "logit_losses", record)
    return calls


class TestLosses:
    def losses(self, student, batch, **changes):
        given = options(**changes)
        told = end_to_end._teach(lambda: original_attention(student), batch, given, None) if given.kl_weight else None
        (losses,) = distill_losses(student, told, batch, given)
        return losses

    @pytest.mark.parametrize("padded", [None, [0, 9, 20, 61]])
    def test_formulas(self, padded):
        student = make_student("llama", "normalizer")
        batch = TokenRows(4, 64, padded).at(0)
        losses = self.losses(student, batch, kl_weight=0.7, ce_weight=0.4)
        teacher, mine = make_model("llama"), student
        kl, ce = [], []
        for row, tokens in enumerate(batch["input_ids"]):
            length = 64 if padded is None else 64 - padded[row]
            tokens = tokens[None, :length]
            p, q = logits_of(teacher, tokens), logits_of(mine, tokens)
            kl += [divergence(q[:, t], p[:, t]) for t in range(length)]
            ce.append(F.cross_entropy(q[0, :-1].double(), tokens[0, 1:], reduction="none"))
        assert len(kl) > ROWS_AT_ONCE
        expected = {"kl": torch.stack(kl).mean(), "ce": torch.cat(ce).mean()}
        expected["loss"] = 0.7 * expected["kl"] + 0.4 * expected["ce"]
        assert losses.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(losses[key], expected[key].float(), rtol=1e-4, atol=1e-5)

    def test_only_what_is_asked_for(self):
        student, batch = make_student("llama", "normalizer"), TokenRows(1, 40).at(0)
        assert self.losses(student, batch).keys() == {"loss", "kl"}

        losses = self.losses(student, batch, kl_weight=0.0, ce_weight=1.0)
        assert losses.keys() == {"loss", "ce"}
        assert losses["loss"] == losses["ce"]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_has_no_influence(self, side):
        student = make_student("llama", "normalizer")
        student.requires_grad_(False)
        weight = student.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
        batch = TokenRows(3, 40, [0, 6, 13], side).at(0)
        other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 77)}
        found = []
        for one in (batch, other):
            losses = self.losses(student, one, ce_weight=1.0)
            found.append((*losses.values(), *torch.autograd.grad(losses["loss"], weight)))
        assert all(torch.equal(a, b) for a, b in zip(*found))

    @pytest.mark.parametrize("top_k", [None, 10])
    def test_a_window_that_covers_all_has_nothing_to_learn(self, top_k):
        student = make_student("llama", "normalizer", window=40)
        losses = self.losses(student, TokenRows(2, 40).at(0), top_k=top_k)
        assert losses["kl"].abs() < 1e-6
        assert self.losses(make_student("llama", "normalizer"), TokenRows(2, 40).at(0), top_k=top_k)["kl"] > 0.1


class TestLora:
    @pytest.mark.parametrize("mix", ["normalizer", "gate"])
    def test_teaches(self, mix, tmp_path):
        student = convert(make_model("llama"), LinearizeConfig(window=8, sinks=2, mix=mix))
        tokens = OneText(2, 64).at(0)["input_ids"]
        teacher = logits_of(make_model("llama"), tokens)
        before = divergence(logits_of(student, tokens), teacher)
        student, outcome = run_distill(student, OneText(2, 64), options(30), tmp_path)
        assert outcome.first["kl"] == pytest.approx(float(before), rel=1e-4)
        assert outcome.last["kl"] < 0.5 * outcome.first["kl"]
        assert divergence(logits_of(student, tokens), teacher) < 0.3 * before
        assert outcome.first.keys() == {"loss", "kl"}
        assert [line["stage"] for line in log_lines(tmp_path)] == ["distill"] * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_other_weights_stay_bit_for_bit(self, dtype, tmp_path):
        student = make_student("llama", "normalizer", dtype)
        before, added = snapshot(student), snapshot_of(added_parameters(student))
        model, _ = run_distill(student, TokenRows(2, 40), options(), tmp_path)
        after = {name.replace(".base_layer.", "."): x for name, x in base_model(model).state_dict().items()}
        assert [name for name, x in before.items() if name not in added and not torch.equal(x, after[name])] == []
        assert all(not torch.equal(x, after[name]) for name, x in added.items())
        lora = {name: x for name, x in after.items() if ".lora_" in name}
        assert len(lora) == 3 * 4 * 2
        assert all(x.dtype == torch.float32 and x.any() and x.isfinite().all() for x in lora.values())
        assert after.keys() == before.keys() | lora.keys()
        assert not any(p.requires_grad for p in model.parameters())

    def test_the_teacher_is_the_original_throughout(self, taught, tmp_path):
        student = make_student("llama", "normalizer")
        model, _ = run_distill(student, TokenRows(2, 40), options(3, lr=0.1), tmp_path)
        expected = [logits_of(make_model("llama"), TokenRows(2, 40).at(i)["input_ids"]).flatten(0, 1) for i in range(3)]
        assert len(taught) == 3
        assert all(torch.equal(got, expected[index]) for index, got in enumerate(taught))
        # The LoRA that the teacher must not have does change what the same weights say.
        with original_attention(model):
            assert (logits_of(model, make_tokens(1, 40)) - logits_of(make_model("llama"), make_tokens(1, 40))).any()

    def test_no_second_model(self, tmp_path):
        student = make_student("llama", "normalizer")
        pointers = {p.data_ptr() for p in student.parameters()}
        model, _ = run_distill(student, TokenRows(1, 40), options(1), tmp_path)
        assert base_model(model) is student
        assert {p.data_ptr() for n, p in model.named_parameters() if ".lora_" not in n} == pointers

    def test_a_later_stage_goes_on_with_the_same_adapter(self, taught, tmp_path):
        student = make_student("llama", "normalizer")
        model, _ = run_distill(student, TokenRows(1, 40), options(2), tmp_path)
        before = snapshot(model)
        again, outcome = run_distill(model, TokenRows(1, 40), options(2), tmp_path, stage="distill-2")
        assert again is model
        assert list(model.peft_config) == [STUDENT]
        assert snapshot(model).keys() == before.keys()
        assert any(not torch.equal(x, before[name]) for name, x in snapshot(model).items() if ".lora_" in name)
        assert {line["stage"] for line in log_lines(tmp_path)} == {"distill", "distill-2"}
        assert outcome.steps == 2
        expected = logits_of(make_model("llama"), TokenRows(1, 40).at(0)["input_ids"])[0]
        assert torch.equal(taught[-2], expected)

    def test_ranks_and_targets_are_those_asked_for(self, tmp_path):
        model, _ = run_distill(
            make_student("llama", "normalizer"),
            TokenRows(1, 40),
            options(1, lora_rank=3, lora_alpha=6.0, lora_targets=["v_proj", "up_proj"]),
            tmp_path,
        )
        names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
        assert len(names) == 6
        assert {name.split(".lora_A")[0].rpartition(".")[2] for name in names} == {"v_proj", "up_proj"}
        assert all(p.shape[0] == 3 for name, p in model.named_parameters() if ".lora_A." in name)
        assert model.peft_config[STUDENT].lora_alpha == 6.0

    def test_a_padded_stream(self, tmp_path):
        model, outcome = run_distill(
            make_student("llama", "gate"), TokenRows(2, 40, [0, 15]), options(2, ce_weight=0.5, top_k=8), tmp_path
        )
        assert outcome.tokens == 2 * (40 + 25)
        assert all(p.isfinite().all() for p in model.parameters())
        assert outcome.first.keys() == {"loss", "kl", "ce"}


def snapshot_of(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


class TestChosen:
    def test_trains_what_matches_and_mixers(self, tmp_path):
        student = make_student("llama", "normalizer")
        before, added = snapshot(student), added_parameters(student)
        patterns = ("*.mlp.up_proj.*", "model.layers.?.self_attn.o_proj.weight")
        model, outcome = run_distill(student, TokenRows(2, 40), options(train=patterns), tmp_path)
        assert model is student
        changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
        chosen = {f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("mlp.up_proj", "self_attn.o_proj")}
        assert changed == chosen | added.keys()
        assert not any(p.requires_grad for p in student.parameters())
        assert outcome.steps == 3

    def test_the_teacher_is_a_frozen_copy(self, taught, tmp_path):
        student = make_student("llama", "normalizer")
        run_distill(student, TokenRows(2, 40), options(3, lr=0.1, train=["*"]), tmp_path)
        expected = [logits_of(make_model("llama"), TokenRows(2, 40).at(i)["input_ids"]).flatten(0, 1) for i in range(3)]
        assert len(taught) == 3
        assert all(torch.equal(got, expected[index]) for index, got in enumerate(taught))
        with original_attention(student):
            now = logits_of(student, make_tokens(1, 40))
        assert (now - logits_of(make_model("llama"), make_tokens(1, 40))).abs().max() > 0.1

    def test_after_lora_the_teacher_is_still_the_original(self, taught, tmp_path):
        student = make_student("llama", "normalizer")
        model, _ = run_distill(student, TokenRows(2, 40), options(2, lr=0.1), tmp_path)
        taught.clear()
        rows = TokenRows(2, 40)
        model, _ = run_distill(model, rows, options(1, train=["*.mlp.*"]), tmp_path, stage="distill-2")
        assert torch.equal(taught[0], logits_of(make_model("llama"), rows.at(0)["input_ids"]).flatten(0, 1))
        assert logits_of(model, make_tokens(1, 40)).isfinite().all()

    def test_teaches(self, tmp_path):
        student = convert(make_model("llama"), LinearizeConfig(window=8, sinks=2))
        _, outcome = run_distill(student, OneText(2, 64), options(30, lr=3e-3, train=["*.self_attn.*"]), tmp_path)
        assert outcome.last["kl"] < 0.5 * outcome.first["kl"]


class TestControl:
    def test_trains_the_original_in_an_adapter_of_its_own(self, tmp_path):
        student, _ = run_distill(make_student("llama", "normalizer"), TokenRows(2, 40), options(2), tmp_path)
        before, tokens = snapshot(student), make_tokens(2, 40)
        said = logits_of(student, tokens)
        model, outcome = run_distill(student, TokenRows(2, 40), options(2), tmp_path, role=CONTROL)
        assert list(model.peft_config) == [STUDENT, CONTROL]
        assert model.active_adapter == STUDENT
        assert not any(p.requires_grad for p in model.parameters())
        after = snapshot(model)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert after.keys() - before.keys() == {n.replace(".default.", ".control.") for n in before if ".lora_" in n}
        assert torch.equal(logits_of(model, tokens), said)
        # It learns the text, from where the original stands.
        batch = TokenRows(2, 40).at(0)["input_ids"]
        teacher = logits_of(make_model("llama"), batch)
        expected = F.cross_entropy(teacher[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        assert outcome.first["ce"] == pytest.approx(float(expected), rel=1e-5)
        assert outcome.first.keys() == {"loss", "ce"}
        assert log_lines(tmp_path)[-1]["stage"] == "control"

    def test_its_lora_changes_the_original_and_teaches_it(self, tmp_path):
        model, outcome = run_distill(make_student("llama", "normalizer"), OneText(2, 40), options(1), tmp_path)
        model, outcome = run_distill(model, OneText(2, 40), options(30, ce_weight=0.0), tmp_path, role=CONTROL)
        batch = OneText(2, 40).at(0)["input_ids"]
        original = logits_of(make_model("llama"), batch)
        model.set_adapter(CONTROL)
        with original_attention(model):
            trained = logits_of(model, batch)
        assert (trained - original).abs().max() > 0.1
        losses = [F.cross_entropy(x[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) for x in (trained, original)]
        assert losses[0] < 0.9 * losses[1]
        assert outcome.last["ce"] < 0.95 * outcome.first["ce"]
        # Without it the original is what it was.
        with model.disable_adapter(), original_attention(model):
            assert torch.equal(logits_of(model, batch), original)

    def test_training_the_student_on_leaves_the_control_alone(self, tmp_path):
        model, _ = run_distill(make_student("llama", "normalizer"), TokenRows(1, 40), options(1), tmp_path)
        model, _ = run_distill(model, TokenRows(1, 40), options(2), tmp_path, role=CONTROL)
        before = snapshot(model)
        model, _ = run_distill(model, TokenRows(1, 40), options(2), tmp_path, stage="distill-2")
        after = snapshot(model)
        control = [name for name in before if ".control." in name]
        assert len(control) == 3 * 4 * 2
        assert all(torch.equal(before[name], after[name]) for name in control)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(".default." in name for name in changed)

    def test_of_a_student_without_lora(self, tmp_path):
        student = make_student("llama", "normalizer")
        before = snapshot(student)
        model, outcome = run_distill(student, TokenRows(1, 40), options(2), tmp_path, role=CONTROL)
        assert outcome.steps == 2
        assert list(model.peft_config) == [CONTROL]
        after = {name.replace(".base_layer.", "."): x for name, x in base_model(model).state_dict().items()}
        assert all(torch.equal(x, after[name]) for name, x in before.items())

    def test_with_cross_entropy_asked_for_both_terms_stay(self, tmp_path):
        _, outcome = run_distill(
            make_student("llama", "normalizer"), TokenRows(1, 40), options(2, ce_weight=0.3), tmp_path, role=CONTROL
        )
        assert outcome.first.keys() == {"loss", "kl", "ce"}
        assert abs(outcome.first["kl"]) < 1e-6


class TestWindow:
    """Window + sinks, trained in the same way: the baseline that a state has to beat."""

    def test_trains_window_and_sinks_in_an_adapter_of_its_own(self, tmp_path):
        student, _ = run_distill(make_student("llama", "normalizer"), OneText(2, 64), options(1), tmp_path)
        before, tokens = snapshot(student), OneText(2, 64).at(0)["input_ids"]
        teacher = logits_of(make_model("llama"), tokens)
        with student.disable_adapter(), state_off(student):
            untrained = divergence(logits_of(student, tokens), teacher)
        model, outcome = run_distill(student, OneText(2, 64), options(30), tmp_path, role=WINDOW)
        assert list(model.peft_config) == [STUDENT, WINDOW]
        assert model.active_adapter == STUDENT
        # It starts where the untrained window + sinks stand, learns, and nothing of the student moves.
        assert outcome.first["kl"] == pytest.approx(float(untrained), rel=1e-4)
        after = snapshot(model)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        model.set_adapter(WINDOW)
        with state_off(model):
            assert divergence(logits_of(model, tokens), teacher) < 0.7 * untrained
        assert log_lines(tmp_path)[-1]["stage"] == "window"


class TestWindowDropout:
    def test_layers_see_less(self):
        """The windows drawn are those of models converted with them, and none is the state alone."""
        student = make_student("llama", "normalizer", window=8)
        tokens = make_tokens(2, 64)
        for window in (4, 2):
            switch_of(student).windows = dict.fromkeys(range(3), window)
            other = make_student("llama", "normalizer", window=window)
            other.load_state_dict(student.state_dict())
            assert torch.equal(logits_of(student, tokens), logits_of(other, tokens))
        switch_of(student).windows = {}
        with window_off(student):
            alone = logits_of(student, tokens)
        switch_of(student).windows = dict.fromkeys(range(3), 0)
        assert torch.equal(logits_of(student, tokens), alone)

    def test_draws_depend_on_the_batch_alone(self):
        student = make_student("llama", "normalizer")
        draws = []
        for index in (0, 1, 0):
            with window_dropout(student, TokenRows(1, 64).at(index), 0.5):
                draws.append(switch_of(student).windows)
            assert switch_of(student).windows == {}
        assert draws[0] == draws[2] != draws[1]

    def test_share_and_choices(self):
        student = make_student("llama", "normalizer", window=8)
        seen = []
        for index in range(200):
            with window_dropout(student, TokenRows(1, 16).at(index), 0.3):
                seen += switch_of(student).windows.values()
        assert 0.2 < len(seen) / 600 < 0.4
        assert set(seen) == {4, 2, 0}

    def test_training_draws_and_zero_does_not(self, monkeypatch, tmp_path):
        seen = []
        losses = end_to_end.distill_losses

        def record(model, *args):
            seen.append(dict(switch_of(model).windows))
            return losses(model, *args)

        monkeypatch.setattr(end_to_end, "distill_losses", record)
        student = make_student("llama", "normalizer")
        run_distill(student, TokenRows(1, 40), options(2, window_dropout=1.0), tmp_path / "a")
        assert all(len(windows) == 3 for windows in seen)
        run_distill(make_student("llama", "normalizer"), TokenRows(1, 40), options(2), tmp_path / "b")
        assert seen[-1] == {}


class TestCheckpointing:
    @pytest.mark.parametrize("role", [STUDENT, CONTROL, WINDOW])
    def test_the_same_training(self, role, tmp_path, monkeypatch):
        counts = []
        original = torch.utils.checkpoint.checkpoint
        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: counts.append(1) or original(*a, **k))
        found = []
        for wanted in (False, True):
            given = options(2, checkpointing=wanted, ce_weight=0.5)
            student = make_student("llama", "normalizer")
            model, outcome = run_distill(student, TokenRows(2, 40), given, tmp_path / str(wanted), role=role)
            found.append((outcome.last, {n: x for n, x in snapshot(model).items() if ".lora_" in n}))
            assert not any(m.training for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        for name, x in found[0][1].items():
            torch.testing.assert_close(x, found[1][1][name], rtol=1e-4, atol=1e-6)

    def test_keeps_less(self):
        """Bytes that autograd keeps until the backward pass."""

        def kept(wanted):
            student, sizes = make_student("llama", "normalizer"), {}

            def pack(x):
                sizes[x.data_ptr()] = x.nbytes
                return x

            batch, given = TokenRows(2, 64).at(0), options(kl_weight=0.0, ce_weight=1.0)
            with end_to_end._checkpointing(student, wanted):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                    (losses,) = distill_losses(student, None, batch, given)
                losses["loss"].backward()
            return sum(sizes.values())

        assert kept(True) < 0.5 * kept(False)


class TestTeacherCache:
    def run(self, folder, out, **changes):
        given = options(3, top_k=10, teacher_cache=str(folder), **changes)
        return run_distill(make_student("llama", "normalizer"), TokenRows(2, 40), given, out)[1]

    def test_the_second_run_asks_no_teacher_and_learns_the_same(self, tmp_path, monkeypatch):
        asked = []
        ask = end_to_end._untrained
        monkeypatch.setattr(end_to_end, "_untrained", lambda model: asked.append(1) or ask(model))
        without = run_distill(make_student("llama", "normalizer"), TokenRows(2, 40), options(3, top_k=10), tmp_path)[1]
        first = self.run(tmp_path / "kept", tmp_path / "a")
        assert len(asked) == 6
        second = self.run(tmp_path / "kept", tmp_path / "b")
        assert len(asked) == 6
        assert without.last == first.last == second.last
        assert len(list((tmp_path / "kept").iterdir())) == 3

    @pytest.mark.parametrize("changes", [{"top_k": 9}, {"temperature": 2.0}])
    def test_another_question_is_asked_anew(self, tmp_path, changes):
        self.run(tmp_path / "kept", tmp_path / "a")
        given = {"top_k": 10, "teacher_cache": str(tmp_path / "kept")} | changes
        run_distill(make_student("llama", "normalizer"), TokenRows(2, 40), options(3, **given), tmp_path / "b")
        assert len(list((tmp_path / "kept").iterdir())) == 6

    def test_mixed_precision_is_another_question(self, tmp_path):
        cache = TeacherCache(tmp_path, make_student("llama", "normalizer"), 2, 1.0)
        batch = TokenRows(1, 8).at(0)
        cache.write(batch, Listed(torch.zeros(8, 2), torch.zeros(8, 2, dtype=torch.int64)))
        with torch.autocast("cpu", torch.bfloat16):
            assert cache.read(batch) is None
        assert cache.read(batch) is not None

    def test_the_whole_vocabulary(self, tmp_path):
        given = options(1, top_k=128, teacher_cache=str(tmp_path / "kept"))
        with pytest.raises(LinearizeError, match="top_k: 128 tokens are the whole vocabulary of 128, which teacher_ca"):
            run_distill(make_student("llama", "normalizer"), TokenRows(2, 40), given, tmp_path)

    def test_a_damaged_file(self, tmp_path):
        self.run(tmp_path / "kept", tmp_path / "a")
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(LinearizeError, match=r"teacher_cache: .*safetensors cannot be read .*remove that file"):
            self.run(tmp_path / "kept", tmp_path / "b")

    def test_a_full_disk(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("linearize.distill.teacher_cache.save_file", full)
        with pytest.raises(LinearizeError, match=r"cannot be written .*No space left.*set teacher_cache to null"):
            self.run(tmp_path / "kept", tmp_path / "a")
        assert list((tmp_path / "kept").iterdir()) == []


class TestCountedRows:
    def test_documents_and_answers(self):
        batch = {
            "input_ids": torch.arange(8)[None],
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
            "loss_mask": torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1]]),
        }
        expected = torch.tensor([[False, True, False, True, False, True, True, False]])
        compared, scored = counted_rows(batch)
        assert torch.equal(compared, expected)
        assert torch.equal(scored, expected)

    def test_plain_rows(self):
        compared, scored = counted_rows({"input_ids": torch.arange(4)[None]})
        assert compared.tolist() == [[True] * 4]
        assert scored.tolist() == [[True, True, True, False]]


class TestRefusals:
    def refused(self, tmp_path, student, role=STUDENT, **changes):
        before = snapshot(student)
        with pytest.raises(LinearizeError) as error:
            run_distill(student, TokenRows(1, 40), options(**changes), tmp_path, role=role)
        assert snapshot(student).keys() == before.keys()
        assert not list(tmp_path.iterdir())
        return str(error.value)

    def test_a_pattern_that_matches_nothing(self, tmp_path):
        message = self.refused(tmp_path, make_student("llama", "none"), train=["*.mlp.*", "*.mpl.*"])
        assert message == (
            "stages: train pattern '*.mpl.*' matches no parameter; names look like 'model.embed_tokens.weight'"
        )

    def test_half_precision_learns_in_float32(self, tmp_path):
        """Chosen bfloat16 weights stay bfloat16, and are what a float32 training of theirs rounds to."""
        student = make_student("llama", "none", torch.bfloat16)
        before = snapshot(student)
        run_distill(student, TokenRows(1, 40), options(2, train=["*.mlp.up_proj.*"]), tmp_path)
        (newest,) = tmp_path.glob("checkpoints/distill/step-*")
        masters = load_file(newest / "weights.safetensors")
        for name, value in student.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in masters)
            if name in masters:
                assert (value.dtype, masters[name].dtype) == (torch.bfloat16, torch.float32)
                assert torch.equal(value, masters[name].bfloat16())

    def test_half_precision_weights_with_float32_mixers_chosen(self, tmp_path):
        student = make_student("llama", "normalizer", torch.bfloat16)
        before, added = snapshot(student), added_parameters(student)
        run_distill(student, TokenRows(1, 40), options(2, train=["*.mixer.*"]), tmp_path)
        changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
        assert changed == added.keys()

    def test_control_without_lora(self, tmp_path):
        message = self.refused(tmp_path, make_student("llama", "none"), role=CONTROL, train=["*.mlp.*"])
        assert message == (
            "stages: a control row is trained with LoRA only, and train is ['*.mlp.*']; set train to lora, or "
            "evaluate.control to false"
        )

    @pytest.mark.parametrize("train", ["lora", ("*.mlp.*",)])
    def test_a_model_that_is_not_converted(self, train, tmp_path):
        message = self.refused(tmp_path, make_model("llama"), train=train)
        assert message == "model: LlamaForCausalLM is not converted; call linearize.convert first"

    def test_lora_targets_that_match_nothing(self, tmp_path):
        message = self.refused(tmp_path, make_student("llama", "none"), lora_targets=["q_proj", "q_porj", "w_pack"])
        assert message == (
            "lora_targets: no module is called q_porj, w_pack; the model has down_proj, gate_proj, k_proj, o_proj, "
            "q_proj, up_proj, v_proj"
        )

    def test_a_lora_unlike_the_earlier_stages(self, tmp_path):
        model, _ = run_distill(make_student("llama", "none"), TokenRows(1, 40), options(1), tmp_path)
        with pytest.raises(LinearizeError) as error:
            run_distill(model, TokenRows(1, 40), options(1, lora_rank=7, lora_targets=["q_proj"]), tmp_path, stage="2")
        assert str(error.value) == (
            "lora_rank, lora_alpha, lora_targets: (7, 16.0, ['q_proj']) differ from (4, 16.0, ['k_proj', 'o_proj', "
            "'q_proj', 'v_proj']) of the LoRA that an earlier stage trained and this one goes on with; give the stages "
            "the same"
        )


@pytest.mark.parametrize("train", ["lora", ("*.mlp.*",)])
def test_mixers_have_a_learning_rate_of_their_own(tmp_path, train):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    student = make_student("llama", "normalizer")
    before = {name: p.detach().clone() for name, p in added_parameters(student).items()}
    settings = DistillOptions(budget=Budget(steps=1), lr=1e-5, mixer_lr=1e-2, warmup=0.0, train=train)
    trained, _ = run_distill(student, TokenRows(2, 32), settings, tmp_path)
    for name, p in added_parameters(trained).items():
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(1e-3 if name.endswith("mix.weight") else 1e-2, rel=1e-2)
