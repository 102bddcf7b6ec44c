"""Packed rows in training: what transfer measures and both stages' losses are those of the documents alone."""

import itertools
import json
import random
import string

import pytest
import torch

from linearize.distill.data import build_stream
from linearize.distill.end_to_end import distill_losses
from linearize.distill.objectives import OBJECTIVES, FarTarget
from linearize.distill.options import Budget, DataOptions, DistillOptions, Source, TransferOptions
from linearize.distill.transfer import observe, run_transfer, transfer_step
from tests.packed_rows import POSITIONS, T, make, pieces
from tests.tiny_models import make_tokens
from tests.tiny_tokenizer import tiny_tokenizer
from tests.tolerance import assert_near

FIELDS = ("out", "near", "near_lse", "far", "far_lse", "far_share", "mix_lse")


def seen_by(student, **batch):
    seen = []
    observe(student, batch, seen.append)
    return seen


@pytest.mark.parametrize("mix", ["normalizer", "gate", "peak"])
def test_targets_and_losses_are_those_of_the_documents_alone(mix):
    student, tokens = make(mix), make_tokens(2, T)
    packed = seen_by(student, input_ids=tokens, position_ids=POSITIONS)
    targets = [FarTarget(seen) for seen in packed]
    counts, sums = [0, 0], [dict.fromkeys(OBJECTIVES, 0.0) for _ in packed]
    for row, part in pieces():
        for index, seen in enumerate(seen_by(student, input_ids=tokens[row, part])):
            alone, size = FarTarget(seen), part.stop - part.start
            assert torch.equal(targets[index].counted[row, :, part], alone.counted[:, :, :size])
            for name in FIELDS:
                whole, one = getattr(targets[index], name)[row, :, part], getattr(alone, name)[:, :, :size]
                none = one == -torch.inf
                assert torch.equal(whole == -torch.inf, none)
                assert_near(whole.masked_fill(none, 0), one.masked_fill(none, 0))
            count = int(alone.counted.sum())
            counts[index] += count
            for name, loss in OBJECTIVES.items():
                sums[index][name] += count * float(loss(seen, alone).detach())
    assert counts[0] == sum(max(part.stop - part.start - 8, 0) for _, part in pieces())
    for seen, target, count, sum_of in zip(packed, targets, counts, sums):
        for name, loss in OBJECTIVES.items():
            value = loss(seen, target)
            assert value.detach().isfinite()
            if name == "weights":  # the others are ratios of two means
                torch.testing.assert_close(float(value.detach()), sum_of[name] / count, rtol=2e-4, atol=1e-5)
    unpacked = FarTarget(seen_by(student, input_ids=tokens)[0])
    assert int(unpacked.counted.sum()) > counts[0]


def packed_stream(tmp_path, batch_size=2):
    path = tmp_path / "d.jsonl"
    chance = random.Random(0)
    texts = ["".join(chance.choices(string.ascii_letters, k=3 * n + 2)) for n in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = DataOptions(
        sources=(Source(kind="jsonl", path=str(path)),), seq_len=48, batch_size=batch_size, held_out=0
    )
    return build_stream(options, tiny_tokenizer(), seed=0)


def test_a_stage_of_transfer(tmp_path):
    student, stream = make("normalizer"), packed_stream(tmp_path)
    batch = next(stream)
    assert "position_ids" in batch

    def loss():
        return float(transfer_step(student, batch, "decomposed", lambda loss: None)["loss"])

    before = loss()
    run_transfer(student, stream, TransferOptions(budget=Budget(steps=12), lr=2e-2), tmp_path / "run")
    assert loss() < 0.9 * before


def test_losses_end_to_end(tmp_path):
    """The cross-entropy of packed rows is that of the documents alone: no token is predicted from another document."""
    student = make("normalizer")
    batch = next(packed_stream(tmp_path))
    options = DistillOptions(budget=Budget(steps=1), kl_weight=0.0, ce_weight=1.0)
    (losses,) = distill_losses(student, None, batch, options)
    total, count = 0.0, 0
    for ids, positions in zip(batch["input_ids"], batch["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(starts):
            with torch.no_grad():
                logits = student(input_ids=ids[None, begin:end], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[begin + 1 : end], reduction="sum"))
            count += end - begin - 1
    assert float(losses["ce"]) == pytest.approx(total / count, rel=1e-4)
