"""What runs where: the choice of a backend and of blocks, fallbacks, and what is recorded for other devices."""

import json
import logging

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels import backends, launch, tuning
from linearize.kernels.devices import INTERPRETER, TARGETS, target_of


@pytest.fixture
def q() -> torch.Tensor:
    return torch.zeros(1, 1, 4, 16)


class TestChoice:
    def test_a_cpu_takes_pytorch_without_a_word(self, q, caplog):
        with caplog.at_level(logging.DEBUG, "linearize"):
            assert backends.choose_backend("auto", q, q) == "torch"
        assert not caplog.records

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    def test_named_ones_are_taken(self, q, backend):
        assert backends.choose_backend(backend, q, q) == backend

    def test_unknown(self, q):
        with pytest.raises(LinearizeError, match="backend: 'cuda' is unknown; known: auto, reference, torch, triton"):
            backends.choose_backend("cuda", q, q)

    def test_a_device_that_should_run_triton_and_cannot_says_so_once(self, caplog):
        backends.log_once.cache_clear()
        q = torch.zeros(1, 1, 4, 16, device="meta")  # stands for an accelerator that Triton does not know
        with caplog.at_level(logging.WARNING, "linearize"):
            assert backends.choose_backend("auto", q, q) == "torch"
            assert backends.choose_backend("auto", q, q) == "torch"
        assert [r.message for r in caplog.records] == [
            "near-and-far attention runs in PyTorch on meta: Triton has no kernels for meta tensors"
        ]

    def test_interpreter_set_too_late(self, q, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(backends, "interpreted", lambda: False)
        with pytest.raises(LinearizeError, match="TRITON_INTERPRET=1 was set after triton had been imported"):
            backends.choose_backend("triton", q, q)

    def test_without_triton(self, q, monkeypatch):
        monkeypatch.setattr(backends, "find_spec", lambda name: None)
        assert backends.choose_backend("auto", q, q) == "torch"
        with pytest.raises(LinearizeError, match="triton is not installed"):
            backends.choose_backend("triton", q, q)
        assert not next(check for check in backends.doctor() if check.name.startswith("flash")).works

    def test_limits(self, monkeypatch):
        monkeypatch.setattr(backends, "device_obstacle", lambda device: None)
        wide, good = torch.zeros(1, 1, 4, 257), torch.zeros(1, 1, 4, 16)
        assert backends.triton_obstacle(wide, good, 0) == "q has head size 257, above 256"
        assert backends.triton_obstacle(good, wide, 0) == "v has head size 257, above 256"
        assert backends.triton_obstacle(good, good, 513) == "the mixer has 513 features, above 512"
        assert backends.triton_obstacle(good, good, 512) is None


class TestDoctor:
    def test_names_the_backend_of_every_device(self):
        checks = {check.name: check for check in backends.doctor()}
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        assert checks[f"backend 'auto' on {device}"].detail == ("triton" if torch.cuda.is_available() else "torch")
        assert checks["torch"].detail.startswith(torch.__version__)


class TestTargets:
    def test_a_cpu_is_the_interpreter(self):
        assert target_of(torch.device("cpu")) is INTERPRETER

    def test_recording_chooses_for_another_target_and_runs_nothing(self):
        with launch.recording(TARGETS["sm_90"]) as launches:
            assert launch.current_target(torch.device("cpu")) is TARGETS["sm_90"]
            launch.launch("a kernel", (2, 3), {"x": 1}, num_warps=8)
        assert launch.current_target(torch.device("cpu")) is INTERPRETER
        assert launches == [launch.Launch("a kernel", (2, 3), {"x": 1}, 8, 1)]

    def test_an_empty_grid_runs_nothing(self):
        launch.launch(None, (0, 4), {})


class TestTuning:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tuning._choices.cache_clear()
        yield
        tuning._choices.cache_clear()

    def never(self, index: int) -> float:
        raise AssertionError("timed")

    def test_nothing_is_timed_unasked(self, monkeypatch):
        monkeypatch.delenv("LINEARIZE_TUNE", raising=False)
        assert tuning.choose("kernel", 3, self.never) == 0
        assert not tuning.tuning_file().exists()

    def test_measured_once_and_kept(self, monkeypatch):
        monkeypatch.setenv("LINEARIZE_TUNE", "1")
        assert tuning.choose("kernel", 3, [3.0, 1.0, 2.0].__getitem__) == 1
        assert json.loads(tuning.tuning_file().read_text()) == {"kernel": 1}
        tuning._choices.cache_clear()  # another process
        monkeypatch.delenv("LINEARIZE_TUNE")
        assert tuning.choose("kernel", 3, self.never) == 1
        assert tuning.choose("another", 3, self.never) == 0

    @pytest.mark.parametrize("content", ["{", "[1]", '{"kernel": "fast"}', '{"kernel": 7}'])
    def test_a_damaged_file_or_a_choice_that_is_gone_counts_as_none(self, content):
        tuning.tuning_file().parent.mkdir(parents=True)
        tuning.tuning_file().write_text(content)
        assert tuning.choose("kernel", 3, None) == 0

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "linearize").write_text("a file")
        monkeypatch.setenv("LINEARIZE_TUNE", "1")
        assert tuning.choose("kernel", 2, [2.0, 1.0].__getitem__) == 1
        assert tuning.choose("kernel", 2, self.never) == 1


class FakeGpuTensor:
    is_cuda = True
    device = torch.device("cuda", 0)


class TestBlocksThatDoNotFit:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tuning._choices.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(launch, "_chosen", {})
        yield
        tuning._choices.cache_clear()

    def run(self, fits: set[int]) -> list[int]:
        from triton.runtime.errors import OutOfResources

        tried = []

        def launch_it(candidate: int) -> None:
            tried.append(candidate)
            if candidate not in fits:
                raise OutOfResources(300_000, 200_000, "shared memory")

        launch.launch_best(("kernel", 64), [0, 1, 2], launch_it, FakeGpuTensor())
        return tried

    def test_the_next_one_is_taken_and_remembered(self):
        assert self.run({1, 2}) == [0, 1]
        assert self.run({1, 2}) == [1]

    def test_none_fits(self):
        with pytest.raises(LinearizeError, match=r"kernel does not fit a GPU with any blocks .* use backend='torch'"):
            self.run(set())
