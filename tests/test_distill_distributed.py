"""Several processes train what one does: the same losses and checkpoints, and none waits long for one that ended.

All on CPUs over gloo. The processes are started once for many trainings: starting is what costs.
"""

import json
import os
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from linearize import LinearizeError
from linearize.convert import base_model
from linearize.distill import checkpoints, processes
from linearize.distill.loop import train
from linearize.distill.options import Budget, TransferOptions
from linearize.distill.sharding import is_sharded, wants_sharding
from tests.launched import UnevenRows, launch, train_stage
from tests.tiny_training import chance_of_now, kill_while_training, log_lines

STEPS = 5
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CHOSEN = {"train": ("*.o_proj.weight",), "dtype": torch.bfloat16}


def kill_both(pair, folder, chance):
    """Process 0 is killed at a moment of chance; the other is to end by itself, soon."""
    killed = kill_while_training(pair[0], folder, chance)
    start = time.monotonic()
    pair[1].join(60)
    assert not pair[1].is_alive()
    return killed, time.monotonic() - start


def all_trainings(root: Path, accumulation: int) -> None:
    """What the tests below look at, in `root`."""
    processes.open_accelerator()
    for kind in ("transfer", "distill"):
        train_stage(kind, root / kind, accumulation)
        # Stopped after 2 steps, for the other number of processes to go on with.
        try:
            train_stage(kind, root / f"{kind}-stopped", accumulation, UnevenRows(stop=4))
        except KeyboardInterrupt:
            processes.gather(None)  # nobody goes on before process 0 has written
    train_stage("distill", root / "masters", accumulation, **CHOSEN)
    train_stage("transfer", root / "local", 1, local_steps=2)
    if accumulation == 1:
        averages(root)
        os.environ.update(FSDP)
    for kind, options in (("transfer", {}), ("distill", {"checkpointing": True})):
        student = train_stage(kind, root / f"{kind}-sharded", accumulation, **options)
        if accumulation == 1:
            told_of_shards(student)
    if accumulation == 1:
        two_stages_sharded(root)


def averages(root: Path) -> None:
    """`average_gradients` with buckets of a few numbers, and gradients that only one process has, or none."""
    rank = processes.rank()
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 2, 4)]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for index, parameter in enumerate(parameters):
        if index != 2 and (index, rank) != (3, 1):
            parameter.grad = torch.full_like(parameter, 10.0 * index + rank)
    processes.BUCKET = 24
    processes.average_gradients(parameters)
    processes.BUCKET = 2**20
    found = [None if p.grad is None else p.grad.tolist() for p in parameters]
    assert found == [[0.5] * 3, [10.5] * 5, None, [15.0] * 4, [40.5] * 2]
    processes.same_start(parameters)
    assert processes.means({"a": 1.0 + rank, "b": torch.tensor(3.0)}, "cpu") == {"a": 1.5, "b": 3.0}
    assert processes.greatest(float(rank), "cpu") == 1.0
    (root / f"averages-{rank}").touch()


def told_of_shards(student) -> None:
    """Half of each frozen weight is here, what is trained is whole."""
    base = base_model(student)
    assert is_sharded(student)
    inside = {name: p for name, p in base.named_parameters() if ".layers." in name}
    whole = {name for name in inside if ".lora_" in name or ".mixer." in name or ".mix." in name}
    for name, parameter in inside.items():
        assert hasattr(parameter, "device_mesh") == (name not in whole), name
        if name not in whole:
            assert parameter.to_local().numel() == parameter.numel() // 2
    assert not hasattr(base.get_input_embeddings().weight, "device_mesh")


def two_stages_sharded(root: Path) -> None:
    """Transfer, then LoRA on the sharded model, then the student is saved: as a job does it."""
    from linearize.checkpoint import save
    from linearize.distill.end_to_end import run_distill
    from linearize.distill.options import DistillOptions

    student = train_stage("transfer", root / "both", 1)
    settings = DistillOptions(budget=Budget(steps=2), lora_rank=2)
    student, _ = run_distill(student, UnevenRows(), settings, root / "both")
    if processes.rank() == 0:
        save(student, root / "both" / "student", adapter=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """one/ and two/: everything trained by one process, and by two with half the accumulation."""
    root = tmp_path_factory.mktemp("trained")
    children = [*launch(all_trainings, 2, root / "two", 1), *launch(all_trainings, 1, root / "one", 2)]
    for child in children:
        child.join(300)
    for told in root.glob("*/rank-*.txt"):
        pytest.fail(f"{told}:\n{told.read_text()}")
    assert [child.exitcode for child in children] == [0, 0, 0]
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (newest,) = folder.glob("checkpoints/*/step-*")
    return load_file(newest / "weights.safetensors")


def same_training(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    lines, others = log_lines(one), log_lines(two)
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    for line, other in zip(lines, others):
        assert line["tokens"] == other["tokens"]
        assert line["lr"] == other["lr"]
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(line[key], rel=tolerance), (key, line["step"])
    expected = weights(one)
    for name, value in weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


class TestTwoProcessesTrainAsOne:
    @pytest.mark.parametrize("kind", ["transfer", "distill"])
    def test_the_same_curve(self, kind, trained):
        same_training(trained / "one" / kind, trained / "two" / kind)

    @pytest.mark.parametrize("kind", ["transfer", "distill"])
    def test_the_curve_depends_on_the_other_process(self, kind, trained, tmp_path):
        """The negative control: half of each step's batches give another curve."""
        half = tmp_path / kind
        train_stage(kind, half, 1)
        losses = [[line["loss"] for line in log_lines(folder)] for folder in (half, trained / "one" / kind)]
        assert max(abs(a / b - 1) for a, b in zip(*losses)) > 1e-2

    @pytest.mark.parametrize("kind", ["transfer", "distill"])
    def test_every_batch_counts_the_same(self, kind, trained, tmp_path):
        """However much of it is padding: a step's loss is the plain mean of its batches' own."""
        folder = trained / "two" / kind
        alone = []
        for index in (0, 1):
            rows = UnevenRows()
            rows.skip(index)
            train_stage(kind, tmp_path / str(index), 1, rows, steps=1)
            alone.append(log_lines(tmp_path / str(index))[0])
        assert alone[0]["tokens"] != alone[1]["tokens"]
        assert log_lines(folder)[0]["loss"] == pytest.approx(sum(x["loss"] for x in alone) / 2, rel=1e-5)
        assert log_lines(folder)[0]["tokens"] == sum(x["tokens"] for x in alone)

    def test_masters(self, trained):
        same_training(trained / "one" / "masters", trained / "two" / "masters", 2e-2)
        kept = weights(trained / "two" / "masters")
        assert all(x.dtype == torch.float32 for x in kept.values())

    def test_local_steps(self, trained):
        lines = log_lines(trained / "two" / "local")
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert lines[-1]["loss"] < lines[0]["loss"]

    def test_averages(self, trained):
        assert len(list((trained / "two").glob("averages-*"))) == 2

    def test_process_0_alone_writes(self, trained):
        for kind in ("transfer", "distill"):
            folder = trained / "two" / kind
            assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "train.jsonl"]
            assert [path.name for path in folder.glob("checkpoints/*/*")] == [f"step-{STEPS:08d}"]


class TestSharded:
    @pytest.mark.parametrize("kind", ["transfer", "distill"])
    def test_the_same_curve(self, kind, trained):
        same_training(trained / "one" / f"{kind}-sharded", trained / "two" / f"{kind}-sharded")

    def test_the_student_of_two_stages_is_saved_whole(self, trained):
        """An adapter of the unsharded model's names and shapes, which loads onto the original."""
        from linearize.checkpoint import load
        from tests.tiny_models import make_model, make_tokens

        student = load(trained / "two" / "both" / "student", base=make_model("llama"))
        assert torch.isfinite(student(input_ids=make_tokens(1, 40)).logits).all()

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"FSDP_VERSION": "1"}, "accelerate: FSDP version 1 is not supported; add --fsdp_version 2"),
            ({"FSDP_OFFLOAD_PARAMS": "true"}, "accelerate: fsdp_offload_params is not supported; leave it off, and "),
            ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "accelerate: fsdp_activation_checkpointing is not supported"),
        ],
    )
    def test_refusals(self, environment, message, monkeypatch):
        for name, value in (FSDP | environment).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LinearizeError) as error:
            wants_sharding()
        assert str(error.value).startswith(message)


def go_on(root: Path, folders: list[Path], accumulation: int) -> None:
    processes.open_accelerator()
    for folder in folders:
        train_stage(folder.name.partition("-")[0], folder, accumulation)


class TestGoingOn:
    def test_in_another_number_of_processes(self, trained):
        """2 -> 1 and 1 -> 2, both stages."""
        stopped = {n: [trained / n / f"{kind}-stopped" for kind in ("transfer", "distill")] for n in ("one", "two")}
        for folder in (*stopped["one"], *stopped["two"]):
            assert [line["step"] for line in log_lines(folder)] == [1, 2]
        pair = launch(go_on, 2, trained / "on-two", stopped["one"], 1)
        alone = launch(go_on, 1, trained / "on-one", stopped["two"], 2)
        for child in (*pair, *alone):
            child.join(200)
            assert child.exitcode == 0, list(trained.glob("on-*/rank*"))
        for folder in (*stopped["one"], *stopped["two"]):
            same_training(trained / "one" / folder.name.partition("-")[0], folder)

    @pytest.mark.parametrize("kind", ["transfer", "distill"])
    def test_after_a_kill(self, kind, tmp_path):
        """Process 0 is killed, the other ends by itself; both go on to the weights of two that were left alone."""
        chance = chance_of_now()
        cut, whole = tmp_path / "cut" / kind, tmp_path / "whole" / kind
        killed, seconds = kill_both(launch(train_long, 2, cut.parent, cut), cut, chance)
        assert seconds < 30
        groups = [launch(train_long, 2, folder.parent, folder) for folder in (cut, whole)]
        for child in (*groups[0], *groups[1]):
            child.join(200)
            assert child.exitcode == 0
        actual, expected = weights(cut), weights(whole)
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        assert [x["loss"] for x in log_lines(cut)] == [x["loss"] for x in log_lines(whole)]
        told = cut.parent / "rank-1.txt"
        if killed:
            assert "LinearizeError: processes: number 1 of 2 has lost the others (" in told.read_text()

    def test_processes_that_see_different_checkpoints(self, tmp_path):
        pair = launch(different_checkpoints, 2, tmp_path)
        for child in pair:
            child.join(100)
            assert child.exitcode == 0, [path.read_text() for path in tmp_path.glob("rank*")]


def train_long(root: Path, folder: Path) -> None:
    train_stage(folder.name, folder, 1, steps=20)


def different_checkpoints(root: Path) -> None:
    processes.open_accelerator()
    folder = root / str(processes.rank())
    if processes.rank() == 0:
        (folder / "checkpoints/toy/step-00000003").mkdir(parents=True)
    weight = nn.Parameter(torch.ones(1))
    settings = TransferOptions(budget=Budget(steps=2))
    with pytest.raises(LinearizeError) as error:
        train("toy", lambda batch, backward: {}, {"weight": weight}, UnevenRows(), settings, folder)
    told = (
        "checkpoints: the processes find different ones (step-00000003, None, by number); give an output folder that "
        "all machines share"
    )
    assert str(error.value) == told
    if processes.rank() == 0:
        (folder / "checkpoints/transfer/step-00000003").mkdir(parents=True)
    # Where weights are sharded, the one that calibrates would wait for the other.
    alone = patch("linearize.distill.transfer.calibrate", side_effect=AssertionError("one calibrates alone"))
    with alone, pytest.raises(LinearizeError) as error:
        train_stage("transfer", folder, 1, calibration_tokens=32)
    assert str(error.value) == told


class TestFailures:
    def test_a_process_that_fails_does_not_hang_the_other(self, tmp_path):
        """The data of process 1 is gone in the third step; process 0 says that it has lost it, and what to do."""
        start = time.monotonic()
        for child in launch(lose_data, 2, tmp_path):
            child.join(100)
            assert child.exitcode == 1
        assert time.monotonic() - start < 60
        assert "OSError: the file is gone" in (tmp_path / "rank-1.txt").read_text()
        told = (tmp_path / "rank-0.txt").read_text().strip().splitlines()[-1]
        assert told.startswith("linearize.errors.LinearizeError: processes: number 0 of 2 has lost the others (")
        assert told.endswith(
            "look for the error of the one that ended first; the same command goes on from the last checkpoint"
        )
        assert checkpoints.latest(tmp_path / "out/checkpoints/transfer").name == "step-00000002"

    def test_what_all_see_all_raise(self, tmp_path):
        """A loss that is no number in one process alone stops both, with the same words."""
        for child in launch(broken_in_one, 2, tmp_path):
            child.join(100)
            assert child.exitcode == 0, [path.read_text() for path in tmp_path.glob("rank*")]
        texts = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
        assert texts[0] == texts[1]
        assert texts[0].startswith(
            "toy: the loss is nan, not finite is the loss of layer 3, not finite is the gradient"
        )


def lose_data(root: Path) -> None:
    train_stage("transfer", root / "out", 1, UnevenRows(lost=5))


def broken_in_one(root: Path) -> None:
    processes.open_accelerator()
    weight = nn.Parameter(torch.ones(1))

    def step(batch, backward):
        loss = weight.sum() * (float("nan") if processes.rank() == 1 else 1.0)
        backward(loss)
        return {"loss": loss.detach(), "layer.3": loss.detach(), "layer.5": torch.ones(())}

    settings = TransferOptions(budget=Budget(steps=2))
    with pytest.raises(LinearizeError) as error:
        train("toy", step, {"weight": weight}, UnevenRows(), settings, root)
    (root / f"told-{processes.rank()}").write_text(str(error.value))


def fail_in_main() -> None:
    with processes.wait_for_main():
        assert processes.rank() == 0
        raise LinearizeError("a: b")


def waiting(root: Path) -> None:
    """The others wait for process 0, and take over its mistakes."""
    processes.open_accelerator()
    with processes.wait_for_main():
        if processes.rank() == 0:
            time.sleep(0.5)
            (root / "made").touch()
        assert (root / "made").exists()
    with pytest.raises(LinearizeError, match="a: b"):
        fail_in_main()
    assert processes.from_main(processes.rank()) == 0
    assert processes.gather(processes.rank()) == [0, 1]
    assert dist.get_world_size() == 2


def test_waiting(tmp_path):
    for child in launch(waiting, 2, tmp_path):
        child.join(100)
        assert child.exitcode == 0, [path.read_text() for path in tmp_path.glob("rank*")]


def refused(root: Path) -> None:
    with pytest.raises(LinearizeError) as error:
        processes.open_accelerator()
    (root / f"told-{os.environ['RANK']}").write_text(str(error.value))


@pytest.mark.parametrize(
    ("count", "environment", "message"),
    [
        (
            2,
            {"ACCELERATE_USE_CPU": "false"},
            "accelerate: 2 processes were launched, but no GPU is visible here and ea",
        ),
        (1, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "accelerate: mixed precision 'fp16' needs scaled losses; use bf16"),
        (1, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "accelerate: gradient_accumulation_steps is 4; leave it"),
        (1, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "accelerate: dynamo backend INDUCTOR is not supported in trai"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the first case is a machine without GPU")
def test_launches_that_are_refused(count, environment, message, tmp_path):
    for rank, child in enumerate(launch(refused, count, tmp_path, **environment)):
        child.join(100)
        assert child.exitcode == 0, [path.read_text() for path in tmp_path.glob("rank*")]
        assert (tmp_path / f"told-{rank}").read_text().startswith(message)


def narrow(root: Path) -> None:
    for kind in ("transfer", "distill"):
        student = train_stage(kind, root / kind, 1, steps=3)
        assert all(p.dtype == torch.float32 for p in student.parameters())


def test_mixed_precision(tmp_path):
    """Products in bfloat16, weights in float32: near the float32 losses, but not them."""
    children = [*launch(narrow, 1, tmp_path / "wide")]
    children += launch(narrow, 1, tmp_path / "narrow", ACCELERATE_MIXED_PRECISION="bf16")
    for child in children:
        child.join(100)
        assert child.exitcode == 0, [path.read_text() for path in tmp_path.glob("*/rank*")]
    for kind in ("transfer", "distill"):
        wide, half = (log_lines(tmp_path / name / kind) for name in ("wide", "narrow"))
        assert json.dumps([x["loss"] for x in wide]) != json.dumps([x["loss"] for x in half])
        for line, other in zip(wide, half):
            assert other["loss"] == pytest.approx(line["loss"], rel=0.1)
        for value in weights(tmp_path / "narrow" / kind).values():
            assert value.dtype == torch.float32
