"""Finding models by name, loading them, and choosing a dtype."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from linearize import models
from linearize.checkpoint import save
from linearize.config import LinearizeConfig
from linearize.convert import convert, is_converted
from linearize.errors import LinearizeError
from linearize.models import (
    load_config,
    load_model,
    load_tokenizer,
    recorded_conversion,
    resolve,
    resolve_dtype,
)
from tests.saved_models import save_tiny_model

IDS = torch.arange(4, 44)[None]
CONFIG = LinearizeConfig(window=4, sinks=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(path: Path) -> Path:
    """A one-layer Llama with random float32 weights and a byte-level tokenizer, as a GGUF file."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    words = ["<s>", "</s>", "ab", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    hidden, heads, kv_heads, head_dim, inner = 32, 4, 2, 8, 48
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, *[1] * (len(words) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(words), hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (heads * head_dim, hidden),
        "blk.0.attn_k.weight": (kv_heads * head_dim, hidden),
        "blk.0.attn_v.weight": (kv_heads * head_dim, hidden),
        "blk.0.attn_output.weight": (hidden, heads * head_dim),
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestResolve:
    def test_original(self, original: Path):
        source = resolve(original)
        assert (source.kind, source.location, source.gguf_file) == ("original", str(original), None)

    def test_a_relative_folder_is_recorded_absolute(self, original: Path, monkeypatch):
        monkeypatch.chdir(original.parent)
        assert resolve("original").name == str(original.resolve())

    def test_gguf_file(self, gguf: Path):
        source = resolve(gguf)
        assert (source.kind, source.location) == ("original", str(gguf.parent))
        assert source.options == {"gguf_file": "tiny.gguf"}

    def test_hub_name(self):
        assert resolve("owner/model-1.5").kind == "hub"

    def test_package_is_found_without_importing_it(self, original: Path, tmp_path: Path, monkeypatch):
        package = tmp_path / "carries_a_model"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "weights.gguf").write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(tmp_path)
        source = resolve("package://carries_a_model/weights.gguf")
        assert source.name == "package://carries_a_model/weights.gguf"
        assert (source.location, source.gguf_file) == (str(package), "weights.gguf")
        assert "carries_a_model" not in sys.modules
        with pytest.raises(LinearizeError, match=r"has no file 'other\.gguf'; it holds weights\.gguf"):
            resolve("package://carries_a_model/other.gguf")

    def test_refusals(self, original: Path, gguf: Path, tmp_path: Path):
        empty = tmp_path / "empty"
        empty.mkdir()
        run = tmp_path / "run"
        (run / "student").mkdir(parents=True)
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "config.json").write_text("{")
        wrong = {
            "": "the name is empty",
            "./nowhere": "no folder './nowhere', and it is not a hub name",
            "a/b/c": "no folder 'a/b/c', and it is not a hub name",
            "nowhere.gguf": "no file 'nowhere.gguf'",
            "package://no_such_package_here/x.gguf": "'no_such_package_here', which is not installed",
            "package://sys/x.gguf": "'sys', which is not installed",
            "package://not-a-name": "'not-a-name', which is not installed",
            str(empty): "neither a config.json",
            str(run): f"did you mean '{run / 'student'}'",
            str(gguf.parent): f"has no config.json; did you mean '{gguf}'",
            str(original / "config.json"): "is a file but not a .gguf file",
            str(broken): "is not readable JSON",
        }
        for name, message in wrong.items():
            with pytest.raises(LinearizeError) as error:
                resolve(name)
            assert message in str(error.value), name


class TestLoad:
    def test_original(self, original: Path):
        model, tokenizer = load_model(original, "float32", "cpu")
        assert isinstance(model, LlamaForCausalLM)
        assert (model.dtype, model.training) == (torch.float32, False)
        assert model.config._name_or_path == str(original)
        assert tokenizer("abc")["input_ids"] == load_tokenizer(original)("abc")["input_ids"]
        assert load_config(original).num_hidden_layers == 2

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_dtype_none_is_what_the_files_hold(self, original: Path, tmp_path: Path, stored: torch.dtype):
        model, tokenizer = load_model(original, stored, "cpu")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert load_model(tmp_path, None, "cpu")[0].dtype == stored

    @pytest.mark.parametrize("adapter", [True, False])
    def test_student(self, original: Path, tmp_path: Path, adapter: bool):
        model, tokenizer = load_model(original, "float32", "cpu")
        convert(model, CONFIG)
        save(model, tmp_path, adapter=adapter, tokenizer=tokenizer)
        assert resolve(tmp_path).kind == ("adapter" if adapter else "student")
        assert recorded_conversion(tmp_path) == CONFIG
        assert recorded_conversion(original) is None
        loaded, _ = load_model(tmp_path, "float32", "cpu")
        assert is_converted(loaded)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_adapter_without_a_tokenizer_uses_its_base(self, original: Path, tmp_path: Path):
        model, tokenizer = load_model(original, "float32", "cpu")
        save(convert(model, CONFIG), tmp_path, adapter=True)
        assert load_tokenizer(tmp_path)("xyz")["input_ids"] == tokenizer("xyz")["input_ids"]
        assert load_config(tmp_path).model_type == "llama"

    def test_adapter_whose_base_moved(self, original: Path, tmp_path: Path):
        moved = save_tiny_model(tmp_path / "moved")
        model, _ = load_model(moved, "float32", "cpu")
        save(convert(model, CONFIG), tmp_path / "student", adapter=True)
        moved.rename(tmp_path / "here")
        with pytest.raises(LinearizeError, match="which is not there any more; give the original with --base"):
            load_model(tmp_path / "student", "float32", "cpu")
        loaded, _ = load_model(tmp_path / "student", "float32", "cpu", base=str(tmp_path / "here"))
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_adapter_that_names_no_base(self, original: Path, tmp_path: Path):
        model, _ = load_model(original, "float32", "cpu")
        save(convert(model, CONFIG), tmp_path, adapter=True)
        description = json.loads((tmp_path / "linearize.json").read_text()) | {"base": None}
        (tmp_path / "linearize.json").write_text(json.dumps(description))
        with pytest.raises(LinearizeError, match="names no base; give the original with --base"):
            load_model(tmp_path)
        with pytest.raises(LinearizeError, match="is a student itself; give the original model with --base"):
            load_model(tmp_path, base=str(tmp_path))

    def test_gguf_becomes_an_ordinary_dense_model(self, gguf: Path, tmp_path: Path):
        model, tokenizer = load_model(gguf, "float32", "cpu")
        assert model.dtype == torch.float32
        assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
        assert not getattr(model, "is_quantized", False)
        assert not hasattr(model, "quantization_method")
        assert getattr(model, "hf_quantizer", None) is None
        assert not hasattr(model.config, "quantization_config")
        assert model.config._name_or_path == str(gguf)
        ids = tokenizer("abc", return_tensors="pt").input_ids
        assert ids.tolist() == [[2, 69]]  # ab, c
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert load_config(gguf).num_hidden_layers == 1

    def test_student_on_gguf_finds_its_base_again(self, gguf: Path, tmp_path: Path):
        model, _ = load_model(gguf, "float32", "cpu")
        save(convert(model, CONFIG), tmp_path, adapter=True)
        assert json.loads((tmp_path / "linearize.json").read_text())["base"] == str(gguf)
        assert is_converted(load_model(tmp_path, "float32", "cpu")[0])

    def test_refusals(self, original: Path, tmp_path: Path):
        with pytest.raises(LinearizeError, match="is a complete model and takes no base; leave --base out"):
            load_model(original, base=str(original))
        with pytest.raises(LinearizeError, match="'abacus' is not a device; use cpu, cuda or cuda:N"):
            load_model(original, device="abacus")
        with pytest.raises(LinearizeError, match="dtype: 'int3' is not known; use one of auto, float32"):
            load_model(original, "int3")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
        with pytest.raises(LinearizeError, match=r"cannot load the configuration of .*no_such_architecture"):
            load_config(tmp_path)
        (tmp_path / "config.json").write_text((original / "config.json").read_text())
        with pytest.raises(LinearizeError, match=r"cannot load the weights of .*check that the folder is complete"):
            load_model(tmp_path)

    def test_a_hub_name_that_is_not_there(self):
        with pytest.raises(LinearizeError, match="there is no folder of that name either; check the name") as error:
            load_config("no-such-owner/no-such-model")
        assert "\n" not in str(error.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, original: Path):
        with pytest.raises(LinearizeError, match="torch sees no GPU here; use --device cpu"):
            load_model(original, device="cuda")


class TestDtype:
    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_as_asked(self, name: str):
        assert resolve_dtype(name) == (getattr(torch, name), f"{name}, as asked")

    @pytest.mark.parametrize(
        ("bf16", "chosen"), [(200.0, torch.bfloat16), (100.0, torch.float32), (5.0, torch.float32)]
    )
    def test_auto_takes_bfloat16_only_where_it_is_clearly_faster(self, monkeypatch, bf16: float, chosen: torch.dtype):
        speeds = {torch.bfloat16: bf16, torch.float32: 90.0}
        monkeypatch.setattr(models, "_matmul_gflops", speeds.get)
        dtype, reason = resolve_dtype("auto", "cpu")
        assert dtype == chosen
        assert reason.startswith(f"{str(chosen).removeprefix('torch.')}: {bf16:.0f} GFLOP/s in bfloat16 against 90")

    def test_the_probe_measures(self):
        assert 0.01 < models._matmul_gflops(torch.float32) < 1e6
        assert resolve_dtype("auto", "cpu")[0] in (torch.float32, torch.bfloat16)
