"""The training loop: budgets, schedule, log, checkpoints, and going on after a kill."""

import errno
import json
import math
import os
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from linearize import LinearizeError
from linearize.convert import added_parameters, converted_layers
from linearize.distill import checkpoints, loop, tracking
from linearize.distill.adam import Adam
from linearize.distill.end_to_end import CONTROL, run_distill
from linearize.distill.loop import FINAL_LR, Outcome, learning_rate, progress_of, train
from linearize.distill.options import Budget, DistillOptions, TransferOptions
from linearize.distill.tracking import tracked
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
        self.gradients, self.norms = [], []

    @property
    def parameters(self):
        return {"weight": self.weight, "bias": self.bias}

    def step(self, batch, backward):
        self.steps += 1
        wanted = batch["input_ids"][:, :3].float().mean(0) / 64
        loss = (self.weight + self.bias - wanted).square().mean()
        backward(loss)
        self.gradients.append(self.weight.grad.clone())
        self.norms.append(torch.cat([self.weight.grad, self.bias.grad[None]]).norm())
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
            assert list(line) == [
                *("stage", "step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_s"),
                *("peak_memory_bytes", "losses_per_layer"),
            ]
            assert line["grad_norm"] == pytest.approx(float(toy.norms[line["step"] - 1]), rel=1e-5)
            assert 2**20 < line["peak_memory_bytes"] < 2**40
            assert 0 <= line["seconds"] <= outcome.seconds + 1e-3
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
        assert str(error.value) == (
            f"toy: the loss is nan at step 4; the last good checkpoint, {tmp_path}/checkpoints/toy/step-00000003, is "
            "kept; lower lr (0.1) and run it again, or set dtype to float32"
        )
        assert checkpoints.latest(tmp_path / "checkpoints/toy").name == "step-00000003"


class TestNotFinite:
    """What is no number is named, and the last good checkpoint stays."""

    def test_layers_by_their_losses(self, tmp_path):
        class Broken(Toy):
            def step(self, batch, backward):
                losses = super().step(batch, backward)
                bad = torch.tensor(math.inf) if self.steps == 2 else losses["layer.7"]
                return losses | {"layer.7": bad, "loss": losses["loss"] + bad}

        with pytest.raises(LinearizeError) as error:
            Broken().train(tmp_path, options(steps=9))
        assert str(error.value) == (
            "toy: the loss is inf, not finite is the loss of layer 7 at step 2; there is no checkpoint yet; lower lr "
            "(0.1) and run it again, or set dtype to float32"
        )

    @pytest.mark.parametrize("what", ["gradient", "parameter"])
    def test_gradients_and_parameters_by_name(self, what, tmp_path):
        """A gradient that is no number is found before it reaches a parameter, though the loss is finite."""

        class Broken(Toy):
            def step(self, batch, backward):
                losses = super().step(batch, backward)
                if self.steps == 3:
                    with torch.no_grad():
                        (self.bias.grad if what == "gradient" else self.weight[1]).fill_(math.nan)
                        if what == "parameter":
                            self.bias.grad.fill_(math.inf)
                return losses

        broken = Broken()
        with pytest.raises(LinearizeError) as error:
            broken.train(tmp_path, options(steps=9, checkpoint_minutes=1e-9))
        named = {"gradient": "the gradient of bias", "parameter": "the parameter weight, not finite is the gradient of"}
        assert str(error.value).startswith(f"toy: not finite is {named[what]}")
        assert "checkpoints/toy/step-00000002, is kept" in str(error.value)
        assert Toy().train(tmp_path, options(steps=3)).steps == 3  # and goes on from there

    def test_a_student_whose_weights_overflow(self, tmp_path):
        """The names are the model's own."""
        student = make_student("llama", "normalizer")
        layers = converted_layers(student)
        layers[1].mixer.requires_grad_(False)
        next(layers[1].mixer.parameters()).fill_(math.nan)
        with pytest.raises(LinearizeError) as error:
            run_transfer(student, TokenRows(1, 32), options(steps=2), tmp_path)
        assert "not finite is the loss of layer 1, not finite is the parameter model.layers.1." in str(error.value)

    def test_a_loss_that_diverges(self, tmp_path):
        class Diverging(Toy):
            def step(self, batch, backward):
                super().step(batch, lambda loss: backward(0 * loss))
                grown = 1.0 if self.steps <= 20 else 5.0
                return {"loss": torch.tensor(grown), "layer.4": torch.tensor(1.0), "layer.7": torch.tensor(grown)}

        with pytest.raises(LinearizeError) as error:
            Diverging().train(tmp_path, options(steps=200, checkpoint_minutes=1e-9))
        text = str(error.value)
        # The smoothed loss passes 4 times its best 14 steps after the jump, and has to stay there for 50.
        assert text.startswith("toy: the loss diverges, above all in layer 7: it was 1 and is 4.99")
        assert f"since {loop.PATIENCE} steps at step 83; the last good checkpoint, {tmp_path}/checkpoints" in text
        assert checkpoints.latest(tmp_path / "checkpoints/toy").name == "step-00000033"

    @pytest.mark.parametrize("grown", [3.9, 1e-3])
    def test_a_loss_that_is_only_uneven(self, grown, tmp_path):
        """Less than 4 times the best, or small beside the first: 1e-3 after 1e-5."""

        class Uneven(Toy):
            def step(self, batch, backward):
                super().step(batch, lambda loss: backward(0 * loss))
                return {"loss": torch.tensor(1.0 if self.steps == 1 else grown if self.steps > 20 else grown / 3.9)}

        assert Uneven().train(tmp_path, options(steps=120)).steps == 120


class TestMasters:
    """Parameters in half precision learn in float32."""

    @staticmethod
    def train(dtype, folder, steps=40, stop=None, accumulation=1):
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))

        def step(batch, backward):
            loss = weight.float().sum()  # the gradient is 1 for good: Adam moves by the learning rate each step
            backward(loss)
            return {"loss": loss.detach()}

        settings = options(steps=steps, lr=1e-3, warmup=0.0, checkpoint_minutes=1e-9)
        train("toy", step, {"weight": weight}, TokenRows(1, 4), settings, folder, accumulation=accumulation)
        return weight

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_updates_below_the_resolution_add_up(self, dtype, tmp_path):
        """bfloat16 numbers near 1 are 1/256 and more apart; each update is at most 1/1000."""
        exact, half = self.train(torch.float32, tmp_path / "a"), self.train(dtype, tmp_path / "b")
        assert half.dtype == dtype
        assert torch.equal(half, exact.to(dtype))
        assert (half[0] - 1).abs() > 0.01
        # The negative control: Adam on the parameter itself stays where it is.
        alone = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
        adam = torch.optim.AdamW([alone], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(40):
            alone.grad = torch.ones_like(alone)
            adam.step()
        assert alone.item() == 1.0

    def test_checkpoints_keep_the_masters(self, tmp_path):
        whole = self.train(torch.bfloat16, tmp_path / "a", 9)
        settings = options(steps=9, lr=1e-3, warmup=0.0, checkpoint_minutes=1e-9)
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
        steps = 0

        def step(batch, backward):
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt
            backward(weight.float().sum())
            return {"loss": weight.detach().float().sum()}

        with pytest.raises(KeyboardInterrupt):
            train("toy", step, {"weight": weight}, TokenRows(1, 4), settings, tmp_path / "b")
        saved = [load_file(checkpoints.latest(tmp_path / x / "checkpoints/toy") / "weights.safetensors") for x in "ab"]
        assert [x["weight"].dtype for x in saved] == [torch.float32] * 2
        weight.float().sum().backward()
        assert weight.grad is not None  # a stage that was stopped has left the parameter its gradients
        again = self.train(torch.bfloat16, tmp_path / "b", 9)
        assert torch.equal(again, whole)
        after = load_file(checkpoints.latest(tmp_path / "b/checkpoints/toy") / "weights.safetensors")
        assert torch.equal(after["weight"], saved[0]["weight"])

    def test_gradients_of_a_step_add_up_in_float32(self, tmp_path):
        weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = Adam({"weight": weight})
        for scale in (1.0, 1e-3, 1e-3, 1e-3):
            (weight.float() * scale).sum().backward()
        assert weight.grad is None
        rounded = torch.tensor(1e-3).bfloat16().float()
        assert torch.equal(optimizer.trained["weight"].grad, 1 + rounded + rounded + rounded.reshape(1))
        optimizer.close()
        weight.float().sum().backward()
        assert weight.grad is not None


class Full:
    """A disk that is full from the n-th file on, as safetensors and Python tell it."""

    def __init__(self, monkeypatch, file):
        self.file = file
        save, write, open_file = checkpoints.save_file, Path.write_text, Path.open

        def save_file(tensors, path):
            if path.name == file:
                path.write_bytes(b"half")
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            save(tensors, path)

        def write_text(path, text, **named):
            if path.name == file:
                write(path, text[: len(text) // 2], **named)
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, text, **named)

        def opened(path, mode="r", **named):
            handle = open_file(path, mode, **named)
            if path.name == file and "a" in mode:
                inner = handle.write

                def half(text):
                    inner(text[:9])
                    handle.flush()
                    raise OSError(errno.ENOSPC, "No space left on device")

                handle.write = half
            return handle

        monkeypatch.setattr(checkpoints, "save_file", save_file)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(Path, "open", opened)


class TestFullDisk:
    @pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "train.jsonl"])
    def test_nothing_is_lost(self, file, tmp_path, monkeypatch):
        settings = options(steps=6, checkpoint_minutes=1e-9, log_every=1)
        whole = Toy()
        whole.train(tmp_path / "whole", settings)
        folder = tmp_path / "cut"
        Toy().train(folder, options(steps=2, log_every=1, warmup=0.0))
        shutil.rmtree(folder)

        class Stopped(Toy):
            def step(self, batch, backward):
                if self.steps == 3:
                    Full(monkeypatch, file)
                return super().step(batch, backward)

        with pytest.raises(LinearizeError) as error:
            Stopped().train(folder, settings)
        monkeypatch.undo()
        text = str(error.value)
        place = "train.jsonl" if file == "train.jsonl" else "checkpoints/toy/step-00000004"
        assert text.startswith(f"{folder / place}: cannot be written (")
        assert "No space left on device" in text
        assert re.search(r"it needs [\d.]+ \w+ and that disk has [\d.]+ \wiB free; make room, then the same", text)
        assert [path.name for path in (folder / "checkpoints/toy").iterdir()] == ["step-00000003"]
        assert [line["step"] for line in log_lines(folder)] == ([1, 2, 3] if file == "train.jsonl" else [1, 2, 3, 4])
        # After room was made it goes on as if nothing had been.
        toy = Toy()
        toy.train(folder, settings)
        assert (toy.steps, same(toy.values(), whole.values())) == (3, True)
        assert [line["step"] for line in log_lines(folder)] == [1, 2, 3, 4, 5, 6]

    def test_while_the_log_is_cleaned(self, tmp_path, monkeypatch):
        Toy().train(tmp_path, options(steps=2, log_every=1))
        before = (tmp_path / "train.jsonl").read_text()
        Full(monkeypatch, "train.jsonl.partial")
        with pytest.raises(LinearizeError, match=r"train.jsonl: cannot be written \(No space left on device\)"):
            Toy().train(tmp_path, options(steps=3))
        monkeypatch.undo()
        assert (tmp_path / "train.jsonl").read_text() == before
        assert not (tmp_path / "train.jsonl.partial").exists()


class Noted(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "noted"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.ended = {}, [], False

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self.lines.append((step, values))

    def finish(self):
        self.ended = True


class TestTrackers:
    def test_of_ones_own(self, tmp_path, monkeypatch):
        taken_apart = []  # the processes, which go on together after the trackers' end
        monkeypatch.setattr("accelerate.state.PartialState.destroy_process_group", lambda *_: taken_apart.append(1))
        noted = Noted()
        with tracked([noted], tmp_path, {"a": {"b": 1, "c": [None, "x"]}}):
            Toy().train(tmp_path, options(steps=3, log_every=2))
            toy = Toy()
            train("next", toy.step, toy.parameters, toy.rows, options(steps=1), tmp_path)
            assert not noted.ended
        Toy().train(tmp_path / "other", options(steps=1))  # is over: nothing is told any more
        assert noted.ended
        assert taken_apart == []
        assert noted.config == {"a.b": 1, "a.c[0]": "None", "a.c[1]": "x"}
        assert [step for step, _ in noted.lines] == [1, 2, 3, 4]
        lines = log_lines(tmp_path)
        for (_, values), line in zip(noted.lines, lines):
            stage = line["stage"]
            layers = {f"{stage}/layer.{index}": x for index, x in line["losses_per_layer"].items()}
            told = {f"{stage}/{key}": x for key, x in line.items() if key not in ("stage", "step", "losses_per_layer")}
            assert values == told | layers

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "wandbb",
                "track: 'wandbb' is unknown; choose from aim, clearml, comet_ml, dvclive, mlflow, swanlab, tens",
            ),
            ("tensorboard", "track: the package for 'tensorboard' is not installed; install it with pip"),
        ],
    )
    def test_that_are_not_there(self, name, message, tmp_path, monkeypatch):
        monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
        with pytest.raises(LinearizeError) as error, tracked([name], tmp_path / "new", {}):
            pass
        assert str(error.value).startswith(message)
        assert not (tmp_path / "new").exists()


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
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return counted

        for place, name in (
            (checkpoints, "save_file"),
            (checkpoints, "_to_disk"),
            (os, "replace"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(place, name, stop_at(getattr(place, name)))
        with pytest.raises(KeyboardInterrupt):
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
    assert vars(Outcome()).keys() == {"steps", "tokens", "seconds", "first", "last", "best", "above"}
    assert Outcome(**json.loads(json.dumps(vars(Outcome(steps=3, first={"loss": 0.1}))))).first == {"loss": 0.1}
