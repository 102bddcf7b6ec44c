"""Gaps in the positions of training rows: what they look like, that a row stays one text, and what they buy."""

from types import SimpleNamespace

import pytest
import torch

from linearize import LinearizeError, convert, original_attention
from linearize.config import LinearizeConfig
from linearize.distill import processes
from linearize.distill.end_to_end import run_distill
from linearize.distill.options import Budget, DistillOptions, TransferOptions
from linearize.distill.positions import PLAIN, position_limit, spread_positions
from linearize.distill.transfer import calibrate, observe, run_transfer, transfer_step
from tests.tiny_models import make_config, make_model, make_student, make_tokens, pad
from tests.tiny_training import TokenRows

LENGTH, LIMIT = 64, 256
GAPS = 1  # a seed of tokens that get gaps


def spread(seed: int, batch: int = 1, limit: int = LIMIT, length: int = LENGTH) -> torch.Tensor | None:
    return whole({"input_ids": make_tokens(batch, length, seed)}, limit).get("position_ids")


def whole(batch: dict, limit: int = LIMIT) -> dict:
    """With gaps, as one part."""
    ((found, share),) = spread_positions(batch, limit)
    assert share == 1
    return found


def test_positions_rise_from_0_to_below_the_limit_in_few_pieces():
    found = [spread(seed) for seed in range(400)]
    rows = torch.cat([row for row in found if row is not None])
    assert abs((len(found) - len(rows)) / len(found) - PLAIN) < 0.06
    assert (rows[:, 0] == 0).all()
    steps = rows.diff(dim=1)
    assert (steps >= 1).all()
    assert ((steps > 1).sum(1) <= 3).all()
    assert LIMIT - 8 < rows.max() < LIMIT
    # A scale of the limit or of half of it, both as often: the mean of the last position is 3/8 of the limit and more.
    assert abs(rows[:, -1].float().mean() - (LENGTH + (LIMIT / 2 - LENGTH / 2 + LIMIT / 4 - LENGTH / 2) / 2)) < 12
    assert rows[:, LENGTH // 2].unique().numel() > 50


@pytest.mark.parametrize("side", ["left", "right"])
def test_gaps_depend_on_the_rows_tokens_alone(side):
    """Not on the rows beside it, nor on how far those pad it."""
    rows = make_tokens(6, LENGTH, 1)
    together = whole({"input_ids": rows})["position_ids"]
    assert len({tuple(row.tolist()) for row in together}) > 3
    padded, mask = pad(torch.cat([rows, rows], dim=1), [LENGTH] * 6, side)
    found = whole({"input_ids": padded, "attention_mask": mask})
    assert torch.equal(found["attention_mask"], mask)
    for row, alone, beside, positions, real in zip(rows, together, padded, found["position_ids"], mask.bool()):
        assert torch.equal(beside[real], row)
        assert torch.equal(positions[real], alone)
        single = whole({"input_ids": row[None]})
        assert torch.equal(single.get("position_ids", torch.arange(LENGTH)[None])[0], alone)


@pytest.mark.parametrize("limit", [0, LENGTH - 1, LENGTH])
def test_no_room_for_gaps(limit):
    batch = {"input_ids": make_tokens(1, LENGTH)}
    assert whole(batch, limit) is batch


def test_smallest_room_and_shortest_rows():
    rows = [spread(seed, limit=LENGTH + 1) for seed in range(40)]
    assert max(int(row.max()) for row in rows if row is not None) == LENGTH
    assert all(spread(seed, length=3) is None for seed in range(10))
    assert any(spread(seed, length=4) is not None for seed in range(10))


def test_rows_of_several_documents_stay():
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None]
    batch = {"input_ids": make_tokens(1, LENGTH, 1), "position_ids": positions}
    assert whole(batch) is batch


def test_rows_of_several_documents_are_read_apart():
    rows = make_tokens(3, LENGTH, GAPS)
    positions = torch.arange(LENGTH).repeat(3, 1)
    positions[1, 40:] -= 40
    marks = torch.arange(3)[:, None].expand(-1, LENGTH)
    parts = spread_positions({"input_ids": rows, "position_ids": positions, "loss_mask": marks}, LIMIT)
    assert [share for _, share in parts] == [2 / 3, 1 / 3]
    (single, _), (several, _) = parts
    assert torch.equal(single["input_ids"], rows[[0, 2]])
    assert torch.equal(single["position_ids"], whole({"input_ids": rows[[0, 2]]})["position_ids"])
    assert torch.equal(several["position_ids"], positions[1:2])
    assert "attention_mask" not in several
    assert single["loss_mask"][:, 0].tolist() == [0, 2]
    assert several["loss_mask"][:, 0].tolist() == [1]


def test_as_many_parts_as_in_another_process(monkeypatch):
    """With sharded weights every process must make as many passes, whatever its rows."""
    batch = {"input_ids": make_tokens(3, LENGTH, GAPS)}
    together = whole(batch)
    monkeypatch.setattr(processes, "greatest", lambda parts, device: 2)
    parts = spread_positions(batch, LIMIT)
    assert [share for _, share in parts] == [1 / 3, 2 / 3]
    for name, x in together.items():
        assert torch.equal(torch.cat([part[name] for part, _ in parts]), x)
    assert len(spread_positions({"input_ids": batch["input_ids"][:1]}, LIMIT)) == 1
    assert len(spread_positions(batch, 0)) == 1


def test_a_mixed_batch_teaches_as_its_rows_one_by_one(tmp_path):
    rows = make_tokens(2, LENGTH, GAPS)
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1, 40:] -= 40
    batches = [{"input_ids": rows, "position_ids": positions}]
    alone = [{"input_ids": rows[:1]}, {"input_ids": rows[1:], "position_ids": positions[1:]}]
    found = []
    for name, given, accumulation in (("both", batches, 1), ("alone", alone, 2)):
        student = make_student("llama", "normalizer")
        options = TransferOptions(budget=Budget(steps=1), calibration_tokens=0)
        outcome = run_transfer(student, Given(given), options, tmp_path / name, accumulation=accumulation)
        found.append(outcome.first)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class Given(TokenRows):
    """These batches, in turn."""

    def __init__(self, batches):
        super().__init__(len(batches[0]["input_ids"]), LENGTH)
        self.batches = batches

    def at(self, index):
        return self.batches[index % len(self.batches)]


@pytest.mark.parametrize("softmax_layers", [[], [1]])
def test_the_original_reads_a_row_with_gaps_as_one_text(softmax_layers):
    """Without the mask a jump would mean another document to the original and to converted layers."""
    student = make_student("llama", "normalizer", softmax_layers=softmax_layers)
    batch = whole({"input_ids": make_tokens(2, LENGTH, GAPS)})
    assert (batch["position_ids"].diff(dim=1) > 1).any()
    seen = []
    observe(student, batch, seen.append)
    assert all(one.documents is None and one.mask is None for one in seen)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = make_model("llama")(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=causal
        ).logits
        with original_attention(student):
            found = student(**batch, use_cache=False).logits
        plain = student(batch["input_ids"], use_cache=False).logits
        student_gaps = student(**batch, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert (student_gaps - plain).abs().max() > 0.01, "converted layers see the positions too"


def test_limit():
    config = make_config("llama", max_position_embeddings=1000)
    assert position_limit(config, 100, None, "transfer") == 400
    assert position_limit(config, 300, None, "transfer") == 1000, "no more than the model knows"
    assert position_limit(config, 100, 0, "transfer") == 0
    assert position_limit(config, 100, 1000, "transfer") == 1000
    with pytest.raises(LinearizeError, match=r"transfer\.positions: 1001, and the model knows 1000"):
        position_limit(config, 100, 1001, "transfer")
    for positions in (1, 100):
        with pytest.raises(LinearizeError, match=rf"calibrate\.positions: {positions} leave no room .* of 100 tokens"):
            position_limit(config, 100, positions, "calibrate")
    flash = SimpleNamespace(_attn_implementation="flash_attention_2", max_position_embeddings=1000)
    assert position_limit(flash, 100, None, "calibrate") == 0
    with pytest.raises(LinearizeError, match=r"calibrate\.positions: 400, and flash_attention_2 takes a gap"):
        position_limit(flash, 100, 400, "calibrate")
    unlimited = SimpleNamespace()  # a model without such a number
    assert position_limit(unlimited, 300, None, "transfer") == 1200
    assert position_limit(unlimited, 300, 5000, "transfer") == 5000


def test_more_positions_than_the_model_knows_are_refused_before_training(tmp_path):
    student = make_student("llama", "normalizer")
    options = TransferOptions(budget=Budget(steps=1), positions=16385)
    with pytest.raises(LinearizeError, match=r"16385, and the model knows 16384"):
        run_transfer(student, TokenRows(1, LENGTH), options, tmp_path)
    with pytest.raises(LinearizeError, match="16385"):
        calibrate(student, TokenRows(1, LENGTH), 64, 16385)
    assert not any(tmp_path.iterdir())


class Peaked(TokenRows):
    """Random tokens of few kinds, so that attention has something to find."""

    def at(self, index):
        return {"input_ids": super().at(index)["input_ids"] % 8 + 1}


def far_loss(positions: int, folder) -> float:
    """The decomposed loss on rows four times as long as those of training."""
    torch.manual_seed(0)
    model = make_model("llama")
    convert(model, LinearizeConfig(window=8, sinks=2))
    options = TransferOptions(budget=Budget(steps=40), positions=positions, calibration_tokens=400)
    run_transfer(model, Peaked(2, 96), options, folder)
    batch = {"input_ids": make_tokens(2, 384, 77) % 8 + 1}
    return float(transfer_step(model, batch, "decomposed", lambda loss: None)["loss"])


def test_gaps_teach_what_longer_rows_ask_for(tmp_path):
    without, given = far_loss(0, tmp_path / "without"), far_loss(384, tmp_path / "given")
    assert given < 0.9 * without


def test_only_transfer_has_gaps(tmp_path):
    """End to end they were measured to change nothing; see benchmarks/results/smollm2."""
    seen: list = []
    student = make_student("llama", "normalizer")
    student.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given.get("position_ids")), with_kwargs=True
    )
    run_transfer(student, TokenRows(1, LENGTH), TransferOptions(budget=Budget(steps=4)), tmp_path)
    assert any(int(x.max()) >= LENGTH for x in seen if x is not None), "four times the row's length, if nothing is said"
    seen.clear()
    run_distill(student, TokenRows(1, LENGTH), DistillOptions(budget=Budget(steps=4), lora_rank=2), tmp_path)
    assert len(seen) == 8
    assert all(x is None for x in seen)


@pytest.mark.parametrize("known", [LENGTH, LENGTH // 2])
def test_a_model_that_knows_no_more_than_a_row(tmp_path, known):
    """Nothing was asked for, so nothing is refused."""
    model = make_model("llama", max_position_embeddings=known)
    convert(model, LinearizeConfig(window=8, sinks=2))
    options = TransferOptions(budget=Budget(steps=1), calibration_tokens=64)
    assert run_transfer(model, TokenRows(1, LENGTH), options, tmp_path).steps == 1
