"""Bounds of time: the bytes of a step against real tensors, the rates of devices, and what a bound says."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.benchmarks import roofline
from linearize.benchmarks.roofline import (
    GPUS,
    Roof,
    bandwidth,
    calibrate,
    measured_roof,
    model_costs,
    named_roof,
    predict,
    predicted_crossover,
    step_bytes,
    step_flops,
    step_seconds,
)
from linearize.benchmarks.step_costs import prefill_flops
from linearize.cache import cache_bytes
from linearize.config import LinearizeConfig
from linearize.convert import convert, converted_layers
from linearize.errors import LinearizeError
from linearize.kernels.devices import DEVICES
from tests.cost import flops
from tests.tiny_models import FAMILIES, make_config, make_model

CONFIGS = {
    "hedgehog": LinearizeConfig(window=8, sinks=2),
    "narrow": LinearizeConfig(window=4, sinks=0, feature_dim=3, mix="gate", mix_input="head"),
    "gla": LinearizeConfig(mixer="gla", mix="gate", window=8, sinks=2),
    "no state": LinearizeConfig(mixer="none", window=8, sinks=1),
    "hybrid": LinearizeConfig(window=8, sinks=2, softmax_layers=(1,)),
}
ROOF = Roof("made up", bandwidth=1e9, peaks={"float32": 1e12, "bfloat16": 2e12}, memory=1e9)


def real_bytes(model, tokens: int, batch: int) -> dict[str, int]:
    with torch.no_grad():
        return cache_bytes(model(torch.zeros(batch, tokens, dtype=torch.long), use_cache=True).past_key_values)


def weight_bytes(model) -> int:
    return sum(x.nbytes for x in model.parameters())


class TestStepBytes:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_an_original_they_are_its_tensors(self, family: str, dtype: str):
        model = make_model(family, getattr(torch, dtype))
        costs = model_costs(model.config, None, dtype)
        assert costs.weight_bytes == weight_bytes(model)
        moved = step_bytes(costs, 40, batch=3)
        table = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is table
        assert tied == (family in ("llama", "qwen2"))  # both ways are tested
        assert moved.weights + (0 if tied else table.nbytes) == weight_bytes(model)
        assert moved.rows == (0 if tied else 3 * table[0].nbytes)
        real = real_bytes(model, 40, batch=3)
        assert moved.softmax == real["softmax"] == costs.cache_bytes(40, 3)
        assert moved.written == real["softmax"] / 40
        assert (moved.window, moved.sinks, moved.state, moved.fold) == (0, 0, 0, 0)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_a_student_they_are_its_tensors(self, family: str, name: str, dtype: str):
        config, context, batch = CONFIGS[name], 40, 2
        window, sinks = config.window, config.sinks
        model = convert(make_model(family, getattr(torch, dtype)), config)
        costs = model_costs(make_config(family), config, dtype)
        moved = step_bytes(costs, context, batch)
        real = real_bytes(model, context, batch)

        assert costs.weight_bytes == weight_bytes(model)
        assert costs.cache_bytes(context, batch) == real["total"]
        # The keys' feature map is read by one step in W, the one that folds; the table is the head's or not read.
        keys = sum(x.nbytes for name, x in model.named_parameters() if name.endswith("key_weight"))
        table = model.get_input_embeddings().weight
        unread = 0 if model.get_output_embeddings().weight is table else table.nbytes
        assert moved.weights == weight_bytes(model) - unread - keys * (1 - 1 / window)
        assert moved.softmax == real["softmax"]
        # The ring holds 2 W tokens. A query sees W of the chunk before, and of its own as many as its place says.
        gla = config.mixer == "gla"  # it keeps nothing to go back by: no third chunk, no second state
        token = real["window"] / ((2 if gla else 3) * window + sinks)
        real["state"] /= 1 if gla else 2
        assert moved.window == pytest.approx(token * sum(window + place for place in range(window)) / window)
        assert moved.sinks == pytest.approx(token * sinks)
        assert moved.state == real["state"]
        # A fold reads a chunk's keys and values and the state, puts them aside, and writes the state; gla writes its
        # state at each step.
        fold = real["state"] if gla else 2 * token + 3 * real["state"] / window
        assert moved.fold == pytest.approx(fold)
        layers = len(converted_layers(model))
        assert moved.written == pytest.approx(token * len(model.model.layers) / layers)
        assert moved.total == sum(moved)

    def test_sliding_layers_stop_at_their_window(self):
        changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        model = make_model("qwen2", **changes)
        for tokens in (10, 15, 16, 60):
            for conversion in (None, LinearizeConfig(window=4)):
                costs = model_costs(make_config("qwen2", **changes), conversion, "float32")
                layers = (0, 1, 2) if conversion is None else (1, 2)
                assert costs.kept == layers
                held = real_bytes(model, tokens, 1)["softmax"]
                sliding = 2 * min(tokens, 15) * 2 * 2 * 16 * 4
                assert step_bytes(costs, tokens).softmax == (held if conversion is None else sliding)

    def test_a_short_context_is_read_as_it_is(self):
        costs = model_costs(make_config("llama"), LinearizeConfig(window=8, sinks=2), "float32")
        original = model_costs(make_config("llama"), None, "float32")
        moved = step_bytes(costs, 15, batch=2)
        assert moved.window == step_bytes(original, 15, batch=2).softmax
        assert (moved.sinks, moved.state, moved.fold) == (0, 0, 0)
        assert step_bytes(costs, 16).state > 0

    def test_only_the_cache_grows_with_batch_and_context(self):
        costs = model_costs(make_config("qwen3"), CONFIGS["hybrid"], "bfloat16")
        one, four = step_bytes(costs, 100, 1), step_bytes(costs, 100, 4)
        assert four.weights == one.weights
        assert [four[i] for i in range(1, 8)] == [4 * one[i] for i in range(1, 8)]
        far = step_bytes(costs, 1000, 1)
        assert far._replace(softmax=0) == one._replace(softmax=0)
        assert far.softmax == 10 * one.softmax

    def test_a_whole_students_configuration_does(self):
        config = CONFIGS["hybrid"]
        student = convert(make_model("llama"), config)
        for conversion in (None, config):
            ours = model_costs(student.config, conversion, "float32")
            plain = model_costs(make_config("llama"), conversion, "float32")
            assert ours.weight_bytes == plain.weight_bytes
            assert step_bytes(ours, 50) == step_bytes(plain, 50)

    def test_the_largest_batch_is_the_largest(self):
        costs = model_costs(make_config("llama"), None, "float32")
        memory = costs.weight_bytes + 3.5 * costs.cache_bytes(100)
        assert costs.largest_batch(100, memory) == 3
        assert costs.largest_batch(100, costs.weight_bytes - 1) == 0

    def test_refusals(self):
        with pytest.raises(LinearizeError, match="dtype: 'int8' is not known; use one of float32"):
            model_costs(make_config("llama"), None, "int8")
        with pytest.raises(LinearizeError, match="layer 3 is out of range"):
            model_costs(make_config("llama"), LinearizeConfig(softmax_layers=(3,)))


class TestOperations:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_an_original_they_are_those_that_torch_counts(self, family: str):
        """By torch's counter, which counts products alone, attention's included."""
        model = AutoModelForCausalLM.from_config(make_config(family), attn_implementation="eager").eval()
        costs = model_costs(model.config, None, "float32")
        with torch.no_grad():
            cache = model(torch.zeros(2, 30, dtype=torch.long), use_cache=True).past_key_values
            one = torch.zeros(2, 1, dtype=torch.long)
            counted = flops(lambda: model(one, past_key_values=cache, use_cache=True))
            prefill = flops(lambda: model(torch.zeros(2, 30, dtype=torch.long), use_cache=False, logits_to_keep=1))
        rotary = 2 * 2 * model.config.head_dim // 2  # positions times frequencies, as a product
        assert abs(counted - step_flops(costs, 30, 2)) <= rotary
        # Eager attention computes the upper triangle too; a causal one has T (T + 1) / 2 pairs.
        heads, size = model.config.num_attention_heads, model.config.head_dim
        triangle = 3 * 2 * 4 * heads * size * (30 * 30 - 30 * 31 / 2)
        assert prefill - prefill_flops(costs, 30, 2) - triangle == pytest.approx(0, abs=30 * rotary)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_of_a_student_they_do_not_grow(self, name: str):
        costs = model_costs(make_config("llama"), CONFIGS[name], "float32")
        kept = len(costs.kept) * 4 * 4 * 16  # heads, head_dim
        assert step_flops(costs, 1064, 2) - step_flops(costs, 64, 2) == 2 * 1000 * kept
        growth = prefill_flops(costs, 4096) / prefill_flops(costs, 1024)
        assert (growth == pytest.approx(4, rel=0.01)) == (not costs.kept)

    def test_softmax_layers_with_a_window_stop_growing(self):
        changes = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
        costs = model_costs(make_config("qwen2", **changes), None, "float32")
        assert step_flops(costs, 16) == step_flops(costs, 1000) > step_flops(costs, 10)
        pairs = prefill_flops(costs, 101) - prefill_flops(costs, 100)
        assert pairs == 2 * costs.products + 3 * 4 * 4 * 16 * 16


class TestPredict:
    def test_the_slower_of_memory_and_arithmetic(self):
        assert predict(2e9, 1e12, ROOF, "float32") == 2.0
        assert predict(1e9, 4e12, ROOF, "float32") == 4.0
        assert predict(1e9, 4e12, ROOF, "bfloat16") == 2.0

    def test_an_overhead_is_what_measured_steps_show(self):
        assert ROOF.overhead_s is None
        assert calibrate(ROOF, []).overhead_s is None
        # 1, 2 and 9 ms over the bound; a step below it, which only noise explains, is not a negative overhead.
        roof = calibrate(ROOF, [(0.010, 0.011), (0.020, 0.022), (0.001, 0.010)])
        assert roof.overhead_s == pytest.approx(0.002)
        assert calibrate(ROOF, [(0.010, 0.009)]).overhead_s == 0
        assert predict(2e9, 0, roof, "float32") == pytest.approx(2.002)

    def test_the_crossover_is_the_first_context_where_the_student_is_faster(self):
        original, student = (model_costs(make_config("llama"), x, "float32") for x in (None, CONFIGS["hedgehog"]))
        for batch in (1, 8):
            at = predicted_crossover(original, student, ROOF, batch)
            assert at is not None
            for context, faster in ((at - 1, False), (at, True), (10 * at, True)):
                ours, theirs = (step_seconds(x, context, batch, ROOF) for x in (student, original))
                assert (ours < theirs) == faster
        assert predicted_crossover(original, original, ROOF) is None

    def test_an_unknown_dtype(self):
        with pytest.raises(LinearizeError) as error:
            predict(1, 1, ROOF, "int8")
        assert str(error.value) == "dtype: there is no rate in 'int8' for made up; use float32, bfloat16"


class TestDevices:
    def test_every_name_has_a_data_sheet(self):
        assert sorted(GPUS.values()) == sorted(DEVICES)
        for name in GPUS:
            roof = named_roof(name)
            assert (roof.measured, roof.overhead_s) == (False, None)
            assert set(roof.peaks) == {"float32", "bfloat16", "float16"}
            assert roof.peaks["bfloat16"] > roof.peaks["float32"] > roof.bandwidth
            assert 20e9 < roof.memory < 300e9

    def test_unknown(self):
        with pytest.raises(LinearizeError, match="gpu: 'tpu' is unknown; use here for this machine, or one of h100, "):
            named_roof("tpu")


class TestBandwidth:
    def test_of_a_small_buffer(self):
        before = torch.get_num_threads()
        found = bandwidth("cpu", threads=1, dtypes=["float32"], buffer_mib=2, repeats=3)
        assert torch.get_num_threads() == before
        assert (found["device"], found["threads"], found["buffer_mib"], found["repeats"]) == ("cpu", 1, 2, 3)
        for name in ("read_gb_s", "copy_gb_s"):
            assert 0 < found[f"{name}_median"] <= found[name]
        assert set(found["matmul_gflop_s"]) == {"float32"}
        assert 0 < found["matmul_gflop_s_median"]["float32"] <= found["matmul_gflop_s"]["float32"]
        roof = measured_roof("cpu", found=found)
        assert (roof.measured, roof.bandwidth) == (True, 1e9 * found["read_gb_s"])
        assert roof.peaks == {"float32": 1e9 * found["matmul_gflop_s"]["float32"]}

    def test_rates_are_by_the_times(self, monkeypatch):
        """Calls that are made up to take 2 ms; the first round does not count."""
        times = iter([1000.0] * 4 + [2.0, 4.0, 8.0, 1.0] + [4.0, 8.0, 16.0, 2.0])
        monkeypatch.setattr(roofline, "time_ms", lambda call, device: next(times))
        found = bandwidth("cpu", dtypes=["float32"], buffer_mib=1, repeats=2)
        assert found["read_gb_s"] == pytest.approx(2**20 / 2e6)  # the sum is the faster reader
        assert found["read_gb_s_median"] == pytest.approx(2**20 / 3e6)
        assert found["copy_gb_s"] == pytest.approx(2 * 2**20 / 8e6)
        assert found["matmul_gflop_s"]["float32"] == pytest.approx(2 * found["matmul_size"] ** 3 / 1e6)

    def test_the_buffer_is_larger_than_the_caches(self, monkeypatch, tmp_path):
        for cpu, (index, level, size, shared) in enumerate(
            [(0, 1, "32K", "0"), (3, 3, "131072K", "0-1"), (3, 3, "131072K", "0-1"), (3, 3, "131072K", "2-3")]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
        caches = roofline._last_level_cache(torch.device("cpu"), tmp_path)
        assert caches == 2 * 128 * 2**20
        assert roofline._last_level_cache(torch.device("cpu"), tmp_path / "none") is None
        monkeypatch.setattr(roofline, "available_memory", lambda device: 2**40)
        assert roofline._buffer_mib(torch.device("cpu"), caches) == 4 * 256
        assert roofline._buffer_mib(torch.device("cpu"), None) == 256
        monkeypatch.setattr(roofline, "available_memory", lambda device: 2**29)
        assert roofline._buffer_mib(torch.device("cpu"), caches) == 64

    @pytest.mark.parametrize("option", ["threads", "buffer_mib", "repeats"])
    def test_below_one(self, option: str):
        with pytest.raises(LinearizeError, match=f"{option}: 0 is below 1; use 1 or more"):
            bandwidth("cpu", **{option: 0})

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        found = bandwidth("cuda", dtypes=["bfloat16"], repeats=3)
        assert found["read_gb_s"] > 100
        assert found["matmul_gflop_s"]["bfloat16"] > 10_000


@pytest.mark.slow
def test_a_prediction_is_near_what_this_machine_measures():
    """A step of 150 MB of weights in float32, which no cache holds: the bound may not be passed by more than a third,
    as nothing is faster than memory but noise in measuring it, nor missed by more than a factor of 8. Between the two
    lie Python, some ten small operations a layer, and a machine that others use."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "vocab_size": 2048}
    changes = sizes | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    model = make_model("llama", **changes)
    costs = model_costs(model.config, None, "float32")
    context, batch = 1024, 4
    with torch.inference_mode():
        cache = model(torch.ones(batch, context, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
        times = []
        for _ in range(12):
            start = time.perf_counter()
            model(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
    bound = step_seconds(costs, context, batch, measured_roof("cpu", ["float32"]))
    assert 0.75 < min(times) / bound < 8
