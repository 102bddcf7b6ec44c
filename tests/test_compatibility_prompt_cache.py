"""A prompt's cache on disk: what goes on from the file is what goes on from the cache, and no other model takes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

import linearize
from linearize import LinearizeConfig, LinearizeError, convert, load_cache, save_cache
from tests.parity import LENGTH, ORIGINAL, SINKS, WINDOW, Case, in_pieces, left_padded, make
from tests.tiny_models import make_model, make_tokens

CASES = (
    Case("llama", "normalizer"),
    Case("qwen3", "none", (1,)),
    Case("qwen3", "gla", (0,)),
    Case("mistral", "peak"),
)
READ = 41  # tokens of the prompt that the file holds: in the middle of a chunk


def texts():
    return [row[:length] for row, length in zip(make_tokens(3, LENGTH), (LENGTH, 50, 33), strict=True)]


def same(a, b):
    """As long and as large as each other; what they hold shows in the logits."""
    assert a.get_seq_length() == b.get_seq_length()
    assert linearize.cache_bytes(a) == linearize.cache_bytes(b)
    assert linearize.cache_bytes(a)["total"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_file_goes_on_as_the_cache(case, dtype, tmp_path):
    """Bit for bit, in a padded batch, in pieces and single tokens; the file can be read again and again."""
    model, (tokens, mask) = make(case, dtype), left_padded(texts())
    _, cache = in_pieces(model, [READ], tokens[:, :READ], mask[:, :READ])
    save_cache(cache, tmp_path / "cache", model)
    loaded = [load_cache(tmp_path / "cache", model) for _ in range(2)]
    same(loaded[0], cache)
    expected, _ = in_pieces(model, [7, 1], tokens[:, READ:], mask, cache)
    for one in loaded:
        assert torch.equal(in_pieces(model, [7, 1], tokens[:, READ:], mask, one)[0], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generate(case, tmp_path):
    model, tokens = make(case), make_tokens(1, LENGTH)
    options = {"max_new_tokens": 9, "do_sample": False}
    _, cache = in_pieces(model, [READ], tokens[:, :READ])
    save_cache(cache, tmp_path / "cache")  # without a model: sizes are compared, weights are not
    out = model.generate(tokens, past_key_values=load_cache(tmp_path / "cache", model), **options)
    assert torch.equal(out, model.generate(tokens, use_cache=False, **options))


def test_rows_are_added_after_loading(tmp_path):
    model, tokens = make(CASES[1]), make_tokens(1, LENGTH)
    _, cache = in_pieces(model, [READ], tokens[:, :READ])
    save_cache(cache, tmp_path / "cache", model)
    loaded = load_cache(tmp_path / "cache", model)
    loaded.batch_repeat_interleave(3)
    rows = torch.cat([tokens.expand(3, -1)[:, :READ], make_tokens(3, 12, seed=9)], dim=1)
    actual, _ = in_pieces(model, [1], rows[:, READ:], cache=loaded)
    expected, _ = in_pieces(model, [READ, 1], rows)
    torch.testing.assert_close(actual, expected[:, READ:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_tokens_are_taken_back_after_loading(case, tmp_path):
    """What `crop` needs is in the file: the chunk before the window, and which of the last columns are padding."""
    model, (tokens, mask) = make(case), left_padded([row[:n] for row, n in zip(make_tokens(2, READ), (READ, 2))])
    _, cache = in_pieces(model, [READ - 5, 1], tokens, mask)
    save_cache(cache, tmp_path / "cache", model)
    loaded = load_cache(tmp_path / "cache", model)
    mask = torch.cat([mask[:, : READ - WINDOW], torch.ones(2, 20, dtype=mask.dtype)], dim=1)
    rest, logits = make_tokens(2, 20, seed=9), []
    for one in (cache, loaded):
        one.crop(-WINDOW)
        logits.append(in_pieces(model, [7, 1], rest, mask, one)[0])
    assert torch.equal(*logits)


def test_beside_sliding_layers(tmp_path):
    changes = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 6}
    model, tokens = make(Case("qwen2", "gate"), **changes), make_tokens(2, LENGTH)
    _, cache = in_pieces(model, [READ], tokens[:, :READ])
    save_cache(cache, tmp_path / "cache", model)
    expected, _ = in_pieces(model, [7, 1], tokens[:, READ:], cache=cache)
    actual, _ = in_pieces(model, [7, 1], tokens[:, READ:], cache=load_cache(tmp_path / "cache", model))
    assert torch.equal(actual, expected)


def test_what_the_header_says(tmp_path):
    model, tokens = make(CASES[1]), make_tokens(2, READ)
    save_cache(in_pieces(model, [READ], tokens)[1], tmp_path / "cache", model)
    with safe_open(tmp_path / "cache", "pt") as file:
        header = json.loads(file.metadata()["linearize"])
    assert (header["format"], header["version"], header["length"]) == (1, linearize.__version__, READ)
    assert header["model"]["conversion"] == model.config.linearize
    assert header["model"]["dtype"] == "float32"
    sizes = {"kv_heads": 2, "head_dim": 32, "window": WINDOW, "sinks": SINKS, "features": None}
    assert [layer["kind"] for layer in header["layers"]] == ["converted", "softmax"]
    assert header["layers"][0]["sizes"] == sizes


PROCESS = """
import sys
import torch
from linearize import load, load_cache
model, (tokens, out) = load(sys.argv[1]), torch.load(sys.argv[3])
cache = load_cache(sys.argv[2], model)
written = model.generate(tokens, past_key_values=cache, max_new_tokens=9, do_sample=False)
assert torch.equal(written, out), (written, out)
print("alike")
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_a_fresh_process(case, tmp_path):
    """The student from its folder, the cache from its file."""
    model, tokens = make(case), make_tokens(1, LENGTH)
    model.save_pretrained(tmp_path / "student")
    _, cache = in_pieces(model, [READ], tokens[:, :READ])
    save_cache(cache, tmp_path / "cache", model)
    out = model.generate(tokens, past_key_values=cache, max_new_tokens=9, do_sample=False)
    torch.save((tokens, out), tmp_path / "texts")
    places = [tmp_path / name for name in ("student", "cache", "texts")]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *places], env=os.environ | {"PYTHONPATH": root}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alike\n"


class TestRefused:
    @pytest.fixture
    def saved(self, tmp_path):
        model = make(CASES[0])
        save_cache(in_pieces(model, [READ], make_tokens(1, READ))[1], tmp_path / "cache", model)
        return tmp_path / "cache"

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            (lambda: make(CASES[0], seed=5), "it was made by a model of weights"),
            (
                lambda: make(CASES[0], torch.bfloat16),
                "it was made by a model of dtype float32, and this one's is bfloat16",
            ),
            (lambda: make(Case("mistral", "normalizer")), "it was made by a model of model_type llama"),
            (lambda: make(Case("llama", "peak")), "it was made by a model of conversion"),
            (lambda: make(Case("llama", "none")), "'features': 32}, the model's is a converted layer"),
            (lambda: make(Case("llama", "normalizer", (1,))), "layer 1 is a converted layer"),
            (lambda: make(Case("qwen3", "normalizer")), "'head_dim': 16, 'window': 8"),
            (
                lambda: make(CASES[0], num_hidden_layers=3),
                "it has 2 layers and the model 3; give the model that made it",
            ),
            (
                lambda: convert(make_model("llama", num_hidden_layers=2), LinearizeConfig(window=16, sinks=2)),
                "'window': 16, 'sinks': 2",
            ),
            (lambda: make(Case("llama", ORIGINAL)), "LlamaForCausalLM is not converted"),
        ],
    )
    def test_another_model(self, saved, model, says):
        with pytest.raises(LinearizeError) as error:
            load_cache(saved, model())
        assert says in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_trained_mixer(self, saved):
        """The same original under the same conversion: what conversion added counts too."""
        model = make(CASES[0])
        with torch.no_grad():
            next(iter(model.model.layers[1].self_attn.mixer.parameters())).mul_(1.5)
        with pytest.raises(LinearizeError, match="it was made by a model of weights"):
            load_cache(saved, model)

    def test_other_files(self, tmp_path):
        model = make(CASES[0])
        with pytest.raises(LinearizeError, match="cannot be read"):
            load_cache(tmp_path / "missing", model)
        (tmp_path / "text").write_text("no tensors")
        with pytest.raises(LinearizeError, match="cannot be read"):
            load_cache(tmp_path / "text", model)
        save_file({"keys": torch.zeros(3)}, tmp_path / "tensors")
        with pytest.raises(LinearizeError, match="it holds tensors but no cache"):
            load_cache(tmp_path / "tensors", model)
        save_file({"x": torch.zeros(1)}, tmp_path / "new", {"linearize": json.dumps({"format": 9, "version": "7.0"})})
        with pytest.raises(LinearizeError, match=r"format 9 is not the 1 .*; install linearize 7.0, which wrote it"):
            load_cache(tmp_path / "new", model)

    def test_caches_that_cannot_be_saved(self, tmp_path):
        with pytest.raises(LinearizeError, match="it holds nothing yet"):
            save_cache(DynamicCache(), tmp_path / "cache")
        model = make(Case("llama", ORIGINAL))
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        model(make_tokens(1, 9), past_key_values=cache)
        with pytest.raises(LinearizeError, match="layer 0, a StaticLayer in a StaticCache, cannot be saved; fill a"):
            save_cache(cache, tmp_path / "cache")
        model = make(CASES[0])
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        model(make_tokens(1, 9), past_key_values=cache)
        with pytest.raises(LinearizeError, match="layer 0, a NearFarLayer in a StaticCache, cannot be saved"):
            save_cache(cache, tmp_path / "cache")
        assert not list(tmp_path.iterdir())
