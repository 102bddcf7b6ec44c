"""The training loop: budgets, schedule, log, checkpoints, and going on after a kill."""

import json
import math
import os
import shutil
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from linearize import LinearizeError
from linearize.convert import added_parameters
from linearize.distill import checkpoints
from linearize.distill.end_to_end import CONTROL, run_distill
from linearize.distill.loop import FINAL_LR, Outcome, learning_rate, progress_of, train
from linearize.distill.options import Budget, DistillOptions, TransferOptions
from linearize.distill.transfer import run_transfer
from tests.tiny_models import make_student
from tests.tiny_training import (
    TokenRows,
    chance_of_now,
    finish,
    in_child,
    kill_while_training,
    log_lines,
    train_student,
)

LENGTH = 16


def options(**budget):
    changes = {name: budget.pop(name) for name in list(budget) if name not in ("steps", "tokens", "minutes")}
    return TransferOptions(**({"budget": Budget(**budget), "lr": 0.1} | changes))


class Toy:
    """A training of three numbers, whose loss depends on the batch."""

    def __init__(self, rows=None):
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), nn.Parameter(torch.tensor(0.5))
        self.rows = TokenRows(2, LENGTH) if rows is None else rows
        self.steps = 0
        self.gradients = []

    @property
    def parameters(self):
        return {"weight": self.weight, "bias": self.bias}

    def step(self, batch, backward):
        self.steps += 1
        wanted = batch["input_ids"][:, :3].float().mean(0) / 64
        loss = (self.weight + self.bias - wanted).square().mean()
        backward(loss)
        self.gradients.append(self.weight.grad.clone())
        return {"loss": loss.detach(), "layer.4": 2 * loss.detach(), "layer.7": torch.zeros(())}

    def train(self, folder, settings, **more):
        return train("toy", self.step, self.parameters, self.rows, settings, folder, **more)

    def values(self):
        return [p.detach().clone() for p in self.parameters.values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


class TestBudget:
    @pytest.mark.parametrize(
        ("budget", "steps"),
        [
            ({"steps": 5}, 5),
            ({"tokens": 64}, 2),
            ({"tokens": 65}, 3),  # 32 a step: the step that reaches it is the last
            ({"tokens": 1}, 1),
            ({"steps": 3, "tokens": 10_000, "minutes": 60.0}, 3),
            ({"steps": 100, "tokens": 96, "minutes": 60.0}, 3),
        ],
    )
    def test_ends_at_the_first_limit(self, budget, steps, tmp_path):
        toy = Toy()
        outcome = toy.train(tmp_path, options(**budget))
        assert (outcome.steps, toy.steps, outcome.tokens) == (steps, steps, 32 * steps)
        assert outcome.seconds > 0

    def test_minutes(self, tmp_path):
        class Slow(Toy):
            def step(self, batch, backward):
                time.sleep(0.02)
                return super().step(batch, backward)

        start = time.perf_counter()
        outcome = Slow().train(tmp_path, options(minutes=0.4 / 60, steps=1000))
        assert 1 <= outcome.steps <= 20
        assert 0.4 <= outcome.seconds <= time.perf_counter() - start

    def test_padding_is_no_token(self, tmp_path):
        outcome = Toy(TokenRows(2, LENGTH, [0, 6])).train(tmp_path, options(tokens=27))
        assert (outcome.steps, outcome.tokens) == (2, 2 * (32 - 6))

    def test_accumulated_batches_count_and_are_one_step(self, tmp_path):
        toy = Toy()
        outcome = toy.train(tmp_path, options(steps=2), accumulation=3)
        assert (outcome.steps, toy.steps, toy.rows.drawn, outcome.tokens) == (2, 6, 6, 6 * 32)

    def test_progress(self):
        budget = Budget(steps=10, tokens=1000, minutes=2.0)
        assert progress_of(budget, 0, 0, 0.0) == 0
        assert progress_of(budget, 5, 100, 12.0) == 0.5
        assert progress_of(budget, 1, 700, 12.0) == 0.7
        assert progress_of(budget, 1, 100, 90.0) == 0.75
        assert progress_of(budget, 11, 100, 12.0) == 1
        assert progress_of(Budget(tokens=50), 999, 25, 1e9) == 0.5


class TestLearningRate:
    def test_shape(self):
        grid = torch.linspace(0, 1, 201).tolist()
        rates = [learning_rate(x, 0.5, 0.1) for x in grid]
        top = max(range(len(rates)), key=rates.__getitem__)
        assert grid[top] == pytest.approx(0.1)
        assert rates[top] == pytest.approx(0.5)
        assert 0 < rates[0] < 0.01  # the first step, at progress 0, is no step of nothing
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] == pytest.approx(0.5 * FINAL_LR)
        assert learning_rate(0.55, 0.5, 0.1) == pytest.approx(0.5 * (1 + FINAL_LR) / 2)
        steps = [abs(a - b) for a, b in pairwise(rates)]
        assert max(steps) < 0.03

    def test_without_warmup(self):
        assert learning_rate(0.0, 0.5, 0.0) == 0.5
        assert learning_rate(1.0, 0.5, 0.0) == pytest.approx(0.05)

    @pytest.mark.parametrize("budget", [{"steps": 8}, {"tokens": 8 * 32}])
    def test_follows_the_budget(self, budget, tmp_path):
        toy = Toy()
        toy.train(tmp_path, options(**budget, warmup=0.25, log_every=1))
        rates = [line["lr"] for line in log_lines(tmp_path)]
        assert rates == [learning_rate(i / 8, 0.1, 0.25) for i in range(8)]

    def test_is_what_the_optimizer_uses(self, tmp_path):
        """Adam's first step is the learning rate itself."""
        toy = Toy()
        before = toy.values()
        toy.train(tmp_path, options(steps=1, warmup=0.0), lr_scale=lambda name: 0.1 if name == "bias" else 1.0)
        moved = [(a - b).abs() for a, b in zip(toy.values(), before)]
        torch.testing.assert_close(moved[0], torch.full((3,), 0.1))
        torch.testing.assert_close(moved[1], torch.tensor(0.01))


class TestLog:
    @pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (100, [1, 7])])
    def test_lines(self, every, steps, tmp_path):
        toy = Toy()
        outcome = toy.train(tmp_path / "new" / "folder", options(steps=7, log_every=every))
        lines = log_lines(tmp_path / "new" / "folder")
        assert [line["step"] for line in lines] == steps
        for line in lines:
            assert set(line) == {"stage", "step", "tokens", "loss", "lr", "tokens_per_s", "losses_per_layer"}
            assert line["stage"] == "toy"
            assert line["tokens"] == 32 * line["step"]
            assert line["tokens_per_s"] > 0
            assert line["losses_per_layer"] == {"4": pytest.approx(2 * line["loss"]), "7": 0.0}
        assert outcome.first["loss"] == lines[0]["loss"]

    def test_losses_at_both_ends(self, tmp_path):
        outcome = Toy().train(tmp_path, options(steps=40, log_every=1))
        losses = [line["loss"] for line in log_lines(tmp_path)]
        running = losses[0]
        for number, loss in enumerate(losses, 1):
            share = max(0.1, 1 / number)
            running = (1 - share) * running + share * loss
        assert outcome.first == {"loss": losses[0], "layer.4": 2 * losses[0], "layer.7": 0.0}
        assert outcome.last["loss"] == pytest.approx(running)
        assert outcome.last.keys() == outcome.first.keys()
        assert min(losses) <= outcome.last["loss"] < outcome.first["loss"]

    def test_a_step_of_several_batches_reports_their_mean(self, tmp_path):
        toy = Toy()
        toy.train(tmp_path, options(steps=1), accumulation=4)
        losses = []
        fresh = Toy()
        for index in range(4):
            losses.append(float(fresh.step(fresh.rows.at(index), lambda loss: loss.backward())["loss"]))
        assert log_lines(tmp_path)[0]["loss"] == pytest.approx(sum(losses) / 4)

    def test_stages_without_layers_have_no_losses_per_layer(self, tmp_path):
        toy = Toy()
        train(
            "plain",
            lambda batch, backward: {"loss": toy.step(batch, backward)["loss"]},
            toy.parameters,
            toy.rows,
            options(steps=1),
            tmp_path,
        )
        assert "losses_per_layer" not in log_lines(tmp_path)[0]

    def test_going_on_keeps_the_lines_up_to_the_checkpoint_and_of_other_stages(self, tmp_path):
        toy = Toy()
        toy.train(tmp_path, options(steps=3, log_every=1))
        text = (tmp_path / "train.jsonl").read_text()
        other = json.dumps({"stage": "another", "step": 9}) + "\n"
        late = json.dumps({"stage": "toy", "step": 4}) + "\n"
        (tmp_path / "train.jsonl").write_text(text + other + late + '{"stage": "toy", "st')
        Toy().train(tmp_path, options(steps=3, log_every=1))
        assert (tmp_path / "train.jsonl").read_text() == text + other


class TestOptimizer:
    def test_gradients_are_of_one_step_each(self, tmp_path):
        toy = Toy()
        weights = []
        step = toy.step

        def watched(batch, backward):
            weights.append(toy.values())
            return step(batch, backward)

        toy.step = watched
        toy.train(tmp_path, options(steps=3))
        for index, (weight, bias) in enumerate(weights):
            fresh = Toy()
            fresh.weight.data, fresh.bias.data = weight, bias
            fresh.step(fresh.rows.at(index), lambda loss: loss.backward())
            assert torch.equal(toy.gradients[index], fresh.gradients[0])

    @pytest.mark.parametrize("clip", [None, 1e-3])
    def test_clipping(self, clip, tmp_path):
        toy = Toy()
        toy.train(tmp_path, options(steps=1), clip=clip)
        moments = load_file(tmp_path / "checkpoints/toy/step-00000001/optimizer.safetensors")
        norm = torch.cat([moments["weight/exp_avg"], moments["bias/exp_avg"][None]]).norm() / 0.1
        if clip is None:
            assert norm > 0.1
        else:
            assert norm == pytest.approx(clip, rel=1e-3)

    def test_a_loss_that_is_no_number_ends_it_and_spoils_no_checkpoint(self, tmp_path):
        class Broken(Toy):
            def step(self, batch, backward):
                losses = super().step(batch, backward)
                return losses | {"loss": losses["loss"] * math.nan} if self.steps == 4 else losses

        with pytest.raises(LinearizeError) as error:
            Broken().train(tmp_path, options(steps=9, checkpoint_minutes=1e-9))
        assert str(error.value) == ("toy: the loss is nan at step 4; lower lr (0.1), or set dtype to float32")
        assert checkpoints.latest(tmp_path / "checkpoints/toy").name == "step-00000003"


class TestAccumulation:
    def first_moments(self, tmp_path, batch, accumulation, padded=None):
        """Adam's first moments after a step, which are a tenth of the gradient, and the loss."""
        folder = tmp_path / str(batch)
        torch.manual_seed(0)
        run_distill(
            make_student("llama", "normalizer"),
            TokenRows(batch, 40),
            DistillOptions(budget=Budget(steps=1), ce_weight=0.5),
            folder,
            accumulation=accumulation,
        )
        (newest,) = (folder / "checkpoints" / "distill").iterdir()
        moments = load_file(newest / "optimizer.safetensors")
        return {name: x for name, x in moments.items() if name.endswith("/exp_avg")}, log_lines(folder)[0]

    def test_two_batches_of_one_row_are_one_of_two(self, tmp_path):
        (one, log), (two, other_log) = (self.first_moments(tmp_path, *sizes) for sizes in ((1, 2), (2, 1)))
        assert one.keys() == two.keys()
        assert any(x.abs().max() > 1e-3 for x in one.values())
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
        assert log["loss"] == pytest.approx(other_log["loss"], rel=1e-5)
        assert log["tokens"] == other_log["tokens"] == 80


def optimizer_of(parameters, steps=2):
    """Adam after a few steps."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        sum(p.square().sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def make_parameters(seed=0):
    torch.manual_seed(seed)
    return {
        "a.weight": nn.Parameter(torch.randn(3, 4)),
        "a.bias": nn.Parameter(torch.randn(4, dtype=torch.bfloat16)),
        "b": nn.Parameter(torch.randn(())),
    }


class TestCheckpoints:
    def test_round_trip(self, tmp_path):
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        state = {"stream": {"drawn": 3}, "outcome": {"seconds": 0.1 + 0.2}}
        checkpoints.write(tmp_path, 12, parameters, optimizer, state)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]
        other = make_parameters(seed=1)
        fresh = torch.optim.AdamW(other.values(), lr=0.1)
        assert checkpoints.restore(checkpoints.latest(tmp_path), other, fresh) == state
        for name, parameter in parameters.items():
            assert torch.equal(other[name], parameter)
            before, after = optimizer.state[parameter], fresh.state[other[name]]
            assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"}
            for key in before:
                assert before[key].dtype == after[key].dtype
                assert torch.equal(before[key], after[key])
        # And the next step of both is the same.
        for some, their in ((parameters, optimizer), (other, fresh)):
            sum(p.square().sum() for p in some.values()).backward()
            their.step()
        assert all(torch.equal(other[name], parameters[name]) for name in parameters)

    def test_the_newest_stays(self, tmp_path):
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        assert checkpoints.latest(tmp_path / "nowhere") is None
        for step in (9, 10, 100_000_000):
            checkpoints.write(tmp_path, step, parameters, optimizer, {"step": step})
            assert checkpoints.latest(tmp_path).name == f"step-{step:08d}"
            assert len(list(tmp_path.iterdir())) == 1

    def test_a_partial_one_is_ignored_and_cleaned(self, tmp_path):
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        checkpoints.write(tmp_path, 1, parameters, optimizer, {"step": 1})
        for name in ("partial-00000002", "partial-00000007", "step-", "step-x"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights.safetensors").write_bytes(b"half")
        assert checkpoints.latest(tmp_path).name == "step-00000001"
        checkpoints.write(tmp_path, 2, parameters, optimizer, {"step": 2})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
        assert checkpoints.restore(checkpoints.latest(tmp_path), parameters, optimizer) == {"step": 2}

    def test_only_partial_ones_are_none(self, tmp_path):
        (tmp_path / "partial-00000002").mkdir()
        assert checkpoints.latest(tmp_path) is None

    @pytest.mark.parametrize("call", range(1, 10))
    def test_stopped_at_any_moment_of_writing_there_is_a_whole_one(self, call, tmp_path, monkeypatch):
        """An exception in place of the kill, at each call of the functions that write, sync, rename and remove."""
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        checkpoints.write(tmp_path, 1, parameters, optimizer, {"step": 1})
        calls = []

        def stop_at(function):
            def counted(*args, **kwargs):
                calls.append(function)
                if len(calls) == call:
                    raise InterruptedError
                return function(*args, **kwargs)

            return counted

        for place, name in (
            (checkpoints, "save_file"),
            (checkpoints, "_to_disk"),
            (os, "replace"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(place, name, stop_at(getattr(place, name)))
        with pytest.raises(InterruptedError):
            checkpoints.write(tmp_path, 2, parameters, optimizer, {"step": 2})
        monkeypatch.undo()
        newest = checkpoints.latest(tmp_path)
        expected = 2 if newest.name == "step-00000002" else 1
        assert checkpoints.restore(newest, parameters, optimizer) == {"step": expected}
        checkpoints.write(tmp_path, 3, parameters, optimizer, {"step": 3})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]

    def test_the_moments_of_writing(self, tmp_path, monkeypatch):
        """The test above stops at each of them."""
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        checkpoints.write(tmp_path, 1, parameters, optimizer, {})
        order = []
        for place, name in ((checkpoints, "save_file"), (checkpoints, "_to_disk"), (os, "replace"), (shutil, "rmtree")):
            function = getattr(place, name)

            def noted(*args, name=name, function=function, **named):
                order.append(name)
                return function(*args, **named)

            monkeypatch.setattr(place, name, noted)
        checkpoints.write(tmp_path, 2, parameters, optimizer, {})
        # Files and their folder are on disk before the rename, the rename before anything older goes.
        assert order == ["save_file"] * 2 + ["_to_disk"] * 4 + ["replace", "_to_disk", "rmtree"]
        assert len(order) == 9  # as many as there are calls above

    @pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
    def test_a_damaged_one_is_never_loaded(self, file, damage, tmp_path):
        parameters = make_parameters()
        optimizer = optimizer_of(parameters)
        checkpoints.write(tmp_path, 1, parameters, optimizer, {"stream": {}, "outcome": {}})
        path = tmp_path / "step-00000001" / file
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(content[: len(content) - 3] if damage == "truncated" else b"")
        before = {name: p.detach().clone() for name, p in parameters.items()}
        with pytest.raises(LinearizeError) as error:
            checkpoints.restore(checkpoints.latest(tmp_path), parameters, optimizer)
        message = str(error.value)
        assert message.startswith(f"checkpoint {tmp_path}/step-00000001: cannot be read (")
        assert message.endswith("); remove that folder to start over")
        assert "\n" not in message
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())

    def test_of_another_training(self, tmp_path):
        parameters = make_parameters()
        checkpoints.write(tmp_path, 1, parameters, optimizer_of(parameters), {})
        for change in ({"c": nn.Parameter(torch.zeros(1))}, {"b": nn.Parameter(torch.zeros(2))}):
            other = make_parameters() | change
            before = {name: p.detach().clone() for name, p in other.items()}
            with pytest.raises(LinearizeError) as error:
                checkpoints.restore(checkpoints.latest(tmp_path), other, torch.optim.AdamW(other.values()))
            assert str(error.value) == (
                f"checkpoint {tmp_path}/step-00000001: it holds 3 tensors of another training; give another output "
                "folder, or the settings it was made with"
            )
            assert all(torch.equal(p, before[name]) for name, p in other.items())


class TestGoingOn:
    @pytest.mark.parametrize("minutes", [1e-9, 60.0])
    @pytest.mark.parametrize("stop", [1, 2, 6, 9])
    def test_after_a_stop_at_any_step(self, stop, minutes, tmp_path):
        """With a checkpoint at every step, and with none before the end."""
        settings = options(steps=9, checkpoint_minutes=minutes, log_every=1)
        whole = Toy()
        expected = whole.train(tmp_path / "whole", settings, accumulation=2)

        class Stopped(Toy):
            def step(self, batch, backward):
                if self.steps == 2 * stop - 1:  # in the second batch of the step
                    raise KeyboardInterrupt
                return super().step(batch, backward)

        with pytest.raises(KeyboardInterrupt):
            Stopped().train(tmp_path / "cut", settings, accumulation=2)
        toy = Toy()
        outcome = toy.train(tmp_path / "cut", settings, accumulation=2)
        assert same(toy.values(), whole.values())
        assert toy.steps == (2 * (9 - stop + 1) if minutes < 1 else 18)
        assert (outcome.steps, outcome.tokens) == (9, expected.tokens)
        assert (outcome.first, outcome.last) == (expected.first, expected.last)
        lines = [[(x["step"], x["loss"], x["lr"]) for x in log_lines(tmp_path / name)] for name in ("whole", "cut")]
        assert lines[0] == lines[1]

    def test_a_finished_stage_is_not_trained_again(self, tmp_path):
        settings = options(steps=4)
        whole = Toy()
        expected = whole.train(tmp_path, settings)
        again = Toy()
        assert vars(again.train(tmp_path, settings)) == vars(expected)
        assert again.steps == 0
        assert same(again.values(), whole.values())
        assert again.rows.drawn == 4

    def test_a_larger_budget_goes_on(self, tmp_path):
        Toy().train(tmp_path, options(steps=4))
        toy = Toy()
        outcome = toy.train(tmp_path, options(steps=6, log_every=1))
        assert (toy.steps, outcome.steps) == (2, 6)
        assert [line["step"] for line in log_lines(tmp_path)] == [1, 4, 5, 6]

    def test_minutes_count_those_before_the_checkpoint(self, tmp_path):
        toy = Toy()
        toy.train(tmp_path, options(steps=2))
        state_file = tmp_path / "checkpoints/toy/step-00000002/state.json"
        state = json.loads(state_file.read_text())
        state["outcome"]["seconds"] = 119.9
        state_file.write_text(json.dumps(state))
        again = Toy()
        start = time.perf_counter()
        outcome = again.train(tmp_path, options(minutes=2.0))
        assert again.steps >= 1
        assert 120 <= outcome.seconds < 120 + time.perf_counter() - start

    def test_each_step_is_saved_once(self, tmp_path, monkeypatch):
        """The last one too: to replace a checkpoint is to be without one for a moment."""
        steps = []
        write = checkpoints.write
        monkeypatch.setattr(checkpoints, "write", lambda *args: (steps.append(args[1]), write(*args)))
        Toy().train(tmp_path, options(steps=4, checkpoint_minutes=1e-9))
        assert steps == [1, 2, 3, 4]

    def test_a_stages_own_state_is_part_of_a_checkpoint(self, tmp_path):
        class Seen:
            def __init__(self):
                self.losses = []

            def state_dict(self):
                return {"losses": self.losses}

            def load_state_dict(self, state):
                self.losses = state["losses"]

            def after_step(self, reported):
                self.losses.append(reported["layer.4"])

        whole, cut, again = Seen(), Seen(), Seen()
        Toy().train(tmp_path / "whole", options(steps=5), extra=whole)
        Toy().train(tmp_path / "cut", options(steps=3, warmup=0.0), extra=cut)
        Toy().train(tmp_path / "cut", options(steps=5), extra=again)
        assert len(whole.losses) == len(again.losses) == 5
        assert again.losses[:3] == cut.losses

    def test_a_checkpoint_of_other_data(self, tmp_path):
        Toy().train(tmp_path, options(steps=2))
        with pytest.raises(LinearizeError, match="data: another shape"):
            Toy(TokenRows(3, LENGTH)).train(tmp_path, options(steps=3))

    def test_stages_have_checkpoints_of_their_own(self, tmp_path):
        student = make_student("llama", "normalizer")
        run_transfer(student, TokenRows(1, 32), options(steps=2), tmp_path)
        settings = DistillOptions(budget=Budget(steps=1), lora_rank=2)
        model, _ = run_distill(student, TokenRows(1, 32), settings, tmp_path)
        run_distill(model, TokenRows(1, 32), settings, tmp_path, role=CONTROL)
        found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("checkpoints/*/*"))
        assert found == [
            "checkpoints/control/step-00000001",
            "checkpoints/distill/step-00000001",
            "checkpoints/transfer/step-00000002",
        ]
        assert [line["stage"] for line in log_lines(tmp_path)] == ["transfer", "transfer", "distill", "control"]

    def test_of_other_settings(self, tmp_path):
        run_transfer(make_student("llama", "normalizer"), TokenRows(1, 32), options(steps=1), tmp_path)
        other = make_student("llama", "normalizer", softmax_layers=[1])
        with pytest.raises(LinearizeError, match="it holds 12 tensors of another training"):
            run_transfer(other, TokenRows(1, 32), options(steps=2), tmp_path)
        run_distill(
            make_student("llama", "normalizer"),
            TokenRows(1, 32),
            DistillOptions(budget=Budget(steps=1), lora_rank=2),
            tmp_path,
        )
        with pytest.raises(LinearizeError, match="it holds 36 tensors of another training"):
            run_distill(
                make_student("llama", "normalizer"),
                TokenRows(1, 32),
                DistillOptions(budget=Budget(steps=2), lora_rank=3),
                tmp_path,
            )

    def test_a_truncated_checkpoint_of_a_student(self, tmp_path):
        run_transfer(make_student("llama", "normalizer"), TokenRows(1, 32), options(steps=1), tmp_path)
        path = tmp_path / "checkpoints/transfer/step-00000001/weights.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        student = make_student("llama", "normalizer")
        with pytest.raises(LinearizeError, match=r"cannot be read .*; remove that folder to start over"):
            run_transfer(student, TokenRows(1, 32), options(steps=2), tmp_path)
        shutil.rmtree(path.parent)
        assert run_transfer(student, TokenRows(1, 32), options(steps=2), tmp_path).steps == 2


class TestKill:
    STEPS, KILLS = 28, 3

    @pytest.fixture(params=["transfer", "distill"])
    def kind(self, request):
        return request.param

    def test_killed_again_and_again_the_weights_are_those_of_one_run(self, kind, tmp_path):
        chance = chance_of_now()
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        killed = 0
        for kill in range(self.KILLS):
            killed += kill_while_training(in_child(train_student, kind, cut, self.STEPS), cut, chance)
            if kill == 0:
                # What a kill in the middle of a write leaves behind, if none of these happened to.
                partial = cut / "checkpoints" / kind / "partial-00000099"
                partial.mkdir(parents=True)
                (partial / "weights.safetensors").write_bytes(b"half")
        assert killed  # on a fast machine the last ones may come too late
        finish(train_student, kind, cut, self.STEPS)
        finish(train_student, kind, whole, self.STEPS)
        actual, expected = (load_file(folder / "final.safetensors") for folder in (cut, whole))
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        lines, others = log_lines(cut), log_lines(whole)
        assert [line["step"] for line in lines] == list(range(1, self.STEPS + 1))
        assert [line["loss"] for line in lines] == [line["loss"] for line in others]
        assert [line["lr"] for line in lines] == [line["lr"] for line in others]
        assert [p.name for p in (cut / "checkpoints" / kind).iterdir()] == [f"step-{self.STEPS:08d}"]
        # It was a training: what it trains has moved.
        start = make_student("llama", "normalizer")
        moved = [name for name, p in added_parameters(start).items() if not torch.equal(p, self.find(expected, name))]
        assert len(moved) == 12

    @staticmethod
    def find(weights, name):
        return weights[name] if name in weights else weights[f"base_model.model.{name}"]


def test_outcome_is_what_a_checkpoint_holds():
    assert vars(Outcome()).keys() == {"steps", "tokens", "seconds", "first", "last"}
    assert Outcome(**json.loads(json.dumps(vars(Outcome(steps=3, first={"loss": 0.1}))))).first == {"loss": 0.1}
