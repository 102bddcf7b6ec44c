"""The stage `extend`: long rows in segments, each from what the ones before left."""

import pytest
import torch
import torch.nn.functional as F

from linearize import LinearizeConfig, LinearizeError, convert, original_attention
from linearize.distill import end_to_end
from linearize.distill.end_to_end import CONTROL, distill_losses, run_distill
from linearize.distill.options import Budget, ExtendOptions
from tests.tiny_models import make_model, make_student, make_tokens
from tests.tiny_training import OneText, TokenRows


def extend(steps=2, **changes):
    return ExtendOptions(**({"budget": Budget(steps=steps), "lr": 1e-2, "lora_rank": 4, "seq_len": 96} | changes))


class TestExtend:
    """Truncated state passing: the values of the whole row, gradients inside each segment."""

    def parts(self, student, batch, segment, **changes):
        given = extend(**changes)
        told = end_to_end._teach(lambda: original_attention(student), batch, given, None)
        student.zero_grad()
        sums = {}
        for losses in distill_losses(student, told, batch, given, segment):
            losses["loss"].backward()
            sums = {key: sums.get(key, 0.0) + x.detach() for key, x in losses.items()}
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        return sums, gradients

    @pytest.mark.parametrize("kept", ["none", [1]])
    @pytest.mark.parametrize("padded", [None, [0, 25]])
    @pytest.mark.parametrize("segment", [32, 40])
    def test_the_values_of_the_whole_row(self, segment, padded, kept):
        student = convert(make_model("llama"), LinearizeConfig(window=8, sinks=2, softmax_layers=kept))
        batch = TokenRows(2, 96, padded, "right").at(0)
        changes = {"ce_weight": 0.5, "top_k": 20}
        whole, gradients = self.parts(student, batch, None, **changes)
        parts, truncated = self.parts(student, batch, segment, **changes)
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-5)
        assert truncated.keys() == gradients.keys()
        # Truncation is what it says: the gradient is another one, but points the same way.
        name = "model.layers.0.self_attn.q_proj.weight"
        a, b = gradients[name].flatten(), truncated[name].flatten()
        assert not torch.allclose(a, b, rtol=1e-3)
        assert F.cosine_similarity(a, b, dim=0) > 0.5

    def test_the_gradient_is_that_of_the_segment(self):
        """The second half alone, its cache filled without gradient."""
        student = make_student("llama", "normalizer", window=8)
        batch = TokenRows(1, 96).at(0)
        tokens, given = batch["input_ids"], extend(kl_weight=0.0, ce_weight=1.0)
        parts = distill_losses(student, None, batch, given, 48)
        next(parts)
        student.zero_grad()
        next(parts)["loss"].backward()
        got = student.model.layers[0].self_attn.mixer.key_weight.grad.clone()
        student.zero_grad()
        with torch.no_grad():
            past = student(tokens[:, :48], use_cache=True).past_key_values
        logits = student(tokens[:, 48:], past_key_values=past).logits
        (F.cross_entropy(logits[0, :-1], tokens[0, 49:], reduction="sum") / 95).backward()
        torch.testing.assert_close(got, student.model.layers[0].self_attn.mixer.key_weight.grad, rtol=1e-4, atol=1e-7)
        assert got.abs().max() > 0

    def test_trains(self, tmp_path):
        student = convert(make_model("llama"), LinearizeConfig(window=8, sinks=2, softmax_layers=[2]))
        given = extend(20, segment=32)
        model, outcome = run_distill(student, OneText(2, 96), given, tmp_path, stage="extend")
        assert outcome.last["kl"] < 0.6 * outcome.first["kl"]
        assert outcome.steps == 20
        _, control = run_distill(model, OneText(2, 96), extend(2, segment=32), tmp_path, role=CONTROL)
        assert control.first.keys() == {"loss", "ce"}

    def test_several_documents_a_row(self):
        batch = {"input_ids": make_tokens(1, 16), "position_ids": torch.arange(8).repeat(2)[None]}
        with pytest.raises(LinearizeError, match=r"segment: 8 in rows of 16 tokens that hold several documents"):
            next(distill_losses(make_student("llama", "normalizer"), None, batch, extend(), 8))

    @pytest.mark.parametrize("changes", [{"window_dropout": 0.1}, {"checkpointing": True}])
    def test_what_segments_cannot_have(self, changes):
        (key,) = changes
        with pytest.raises(LinearizeError, match=rf"^{key}: .* with segment 1024: .* segment to null"):
            extend(**changes)
        extend(segment=None, **changes)
