"""What is saved is what is loaded, bit for bit: whole students, adapters, and with LoRA."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
from linearize import LinearizeConfig, LinearizeError, convert, load, original_attention, revert, save
from linearize.convert import converted_layers, is_converted
from linearize.fingerprint import spread
from tests.saved_models import CHECK, save_tiny_model
from tests.tiny_models import FAMILIES, FAR, VOCAB, make_model, make_student, make_tokens, randomize_far

ROOT = Path(__file__).resolve().parents[1]


def logits(model, tokens=None):
    with torch.no_grad():
        return model(make_tokens(2, 30) if tokens is None else tokens).logits


def assert_same(model, other):
    """Class, weights, dtypes and outputs."""
    assert type(model) is type(other)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name])
    assert torch.equal(logits(model), logits(other))


def add_lora(model):
    """A PeftModel whose LoRA is random in both factors, so that it changes the outputs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).eval()


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


class TestWhole:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_round_trip(self, family, far, dtype, tmp_path):
        student = make_student(family, far, dtype, softmax_layers=[1], sinks=3)
        before = logits(student)
        save(student, tmp_path)
        assert torch.equal(logits(student), before)
        assert files(tmp_path) == {"config.json", "generation_config.json", "model.safetensors"}
        loaded = load(tmp_path)
        assert_same(loaded, student)
        assert not loaded.training
        assert loaded.config.linearize == student.config.linearize
        assert loaded.config.model_type == family
        assert list(converted_layers(loaded)) == [0, 2]
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (family in ("llama", "qwen2"))
        for layer in converted_layers(loaded).values():
            assert layer.q_proj.weight.dtype == dtype
            if far != "none":
                assert {x.dtype for x in (*layer.mixer.parameters(), *layer.mix.parameters())} == {torch.float32}
        with original_attention(loaded), original_attention(student):
            assert torch.equal(logits(loaded), logits(student))
        options = {"max_new_tokens": 6, "do_sample": False}
        tokens = make_tokens(2, 15)
        assert torch.equal(loaded.generate(tokens, **options), student.generate(tokens, **options))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_transformers_own_functions(self, family, tmp_path):
        student = make_student(family, "gate")
        student.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), student)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["model_type"] == "linearize"
        header = {"format": 1, "version": linearize.__version__, "base_model_type": family}
        assert written["linearize"] == header | student.config.linearize
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is type(student.config)
        assert config.linearize == student.config.linearize

    def test_again_after_loading(self, tmp_path):
        student = make_student("llama", "normalizer")
        save(student, tmp_path / "first")
        save(load(tmp_path / "first"), tmp_path / "second")
        assert_same(load(tmp_path / "second"), student)
        first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_other_dtype(self, dtype, tmp_path):
        student = make_student("llama", "normalizer")
        save(student, tmp_path)
        loaded = load(tmp_path, dtype=dtype)
        expected = make_student("llama", "normalizer", torch.bfloat16)
        assert_same(loaded, expected)

    @pytest.mark.parametrize("far", ["none", "gate"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_revert_of_a_loaded_student(self, family, far, tmp_path):
        """What is left is an original like any other, which is saved and loaded without linearize."""
        save(make_student(family, far), tmp_path / "student")
        teacher = make_model(family)
        reverted = revert(load(tmp_path / "student"))
        assert_same(reverted, teacher)
        assert not is_converted(reverted)
        expected = teacher.config.to_dict()
        changed = {key for key, value in reverted.config.to_dict().items() if expected.get(key) != value}
        assert changed <= {"architectures", "dtype", "_name_or_path"}
        reverted.save_pretrained(tmp_path / "original")
        written = json.loads((tmp_path / "original" / "config.json").read_text())
        assert written["model_type"] == family
        assert written["architectures"] == [type(teacher).__name__]
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "original"), teacher)

    def test_merged_lora(self, tmp_path):
        merged = add_lora(make_student("llama", "gate")).merge_and_unload()
        save(merged, tmp_path)
        assert_same(load(tmp_path), merged)

    def test_untrained_start(self):
        """`from_config` builds what `convert` does, not transformers' random weights."""
        config = make_student("llama", "gate").config
        made = AutoModelForCausalLM.from_config(config)
        fresh = convert(make_model("llama"), LinearizeConfig(window=4, sinks=2))
        for layer, expected in zip(converted_layers(made).values(), converted_layers(fresh).values(), strict=True):
            for module in ("mixer", "mix"):
                for name, value in getattr(layer, module).named_parameters():
                    assert torch.equal(value, getattr(expected, module).get_parameter(name))

    def test_missing_weights_start_untrained(self, tmp_path):
        """transformers only warns of them; they must not be whatever was in memory."""
        student = make_student("llama", "gate")
        save(student, tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        missing = {name for name in weights if ".mix" in name and ("layers.1" in name or "query_weight" in name)}
        kept = {name: value for name, value in weights.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        fresh = convert(make_model("llama"), LinearizeConfig(window=4, sinks=2)).state_dict()
        for name, value in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
            assert torch.equal(value, fresh[name] if name in missing else student.state_dict()[name]), name


class TestAdapter:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_round_trip(self, family, far, dtype, tmp_path):
        student = make_student(family, far, dtype, softmax_layers=[1], sinks=3)
        save(student, tmp_path, adapter=True)
        assert files(tmp_path) == {"linearize.json", "adapter.safetensors"}
        assert not any("proj" in name for name in load_file(tmp_path / "adapter.safetensors"))
        base = make_model(family, dtype)
        loaded = load(tmp_path, base=base)
        assert loaded is base
        assert_same(loaded, student)
        assert_same(revert(loaded), make_model(family, dtype))

    def test_original_by_name(self, tmp_path):
        """The folder that it came from is recorded; another one can be named."""
        base = save_tiny_model(tmp_path / "original", vocab_size=VOCAB)
        config = LinearizeConfig(window=4, sinks=2)
        student = randomize_far(convert(AutoModelForCausalLM.from_pretrained(base), config))
        save(student, tmp_path / "adapter", adapter=True)
        assert_same(load(tmp_path / "adapter"), student)
        moved = base.rename(tmp_path / "moved")
        assert_same(load(tmp_path / "adapter", base=moved), student)
        assert_same(load(tmp_path / "adapter", base=str(moved)), student)
        save(student, tmp_path / "adapter", adapter=True, base=str(moved))
        assert_same(load(tmp_path / "adapter"), student)

    def test_original_in_its_own_dtype(self, tmp_path):
        """Not in the one that would be fastest here."""
        base = save_tiny_model(tmp_path / "original", vocab_size=VOCAB)
        original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        original.save_pretrained(base)
        student = randomize_far(convert(original, LinearizeConfig(window=4)))
        save(student, tmp_path / "adapter", adapter=True, base=str(base))
        assert_same(load(tmp_path / "adapter"), student)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_other_dtype(self, dtype, tmp_path):
        save(make_student("llama", "normalizer"), tmp_path, adapter=True)
        expected = make_student("llama", "normalizer", torch.bfloat16)
        assert_same(load(tmp_path, base=make_model("llama"), dtype=dtype), expected)

    @pytest.mark.parametrize("order", ["convert, adapt", "adapt, convert"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_lora(self, family, order, tmp_path):
        if order == "convert, adapt":
            student = add_lora(make_student(family, "gate"))
        else:
            adapted = add_lora(make_model(family))
            student = randomize_far(convert(adapted, LinearizeConfig(window=4, sinks=2, mix="gate")))
        save(student, tmp_path, adapter=True)
        assert files(tmp_path) == {"linearize.json", "adapter.safetensors", "lora"}
        assert files(tmp_path / "lora") == {"adapter_config.json", "adapter_model.safetensors"}
        loaded = load(tmp_path, base=make_model(family), merge=False)
        assert torch.equal(logits(loaded), logits(student))
        with loaded.disable_adapter(), student.disable_adapter():
            assert torch.equal(logits(loaded), logits(student))
        merged = load(tmp_path, base=make_model(family))
        assert not hasattr(merged, "peft_config")
        torch.testing.assert_close(logits(merged), logits(student), rtol=1e-4, atol=1e-4)

    def test_small(self, tmp_path):
        save(make_student("llama", "gate"), tmp_path, adapter=True)
        weights = load_file(tmp_path / "adapter.safetensors")
        # Query and key features, weights and biases of the mix, a layer; float32.
        assert sum(x.numel() for x in weights.values()) == 3 * ((4 + 2) * 16 * 16 + 4 * 16 + 4)
        assert {x.dtype for x in weights.values()} == {torch.float32}

    def test_tokenizer_beside_it(self, tmp_path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "original"))
        for adapter in (False, True):
            save(make_student("llama", "none"), tmp_path / str(adapter), adapter=adapter, tokenizer=tokenizer)
            assert AutoTokenizer.from_pretrained(tmp_path / str(adapter)).get_vocab() == tokenizer.get_vocab()


PROGRAMS = {
    # Also a whole model as an object, with its original inside.
    "linearize before transformers": """
import linearize
from transformers import AutoConfig, AutoModelForCausalLM
student = torch.load(folder + "/student.pt", weights_only=False)
assert AutoConfig.from_pretrained(folder).linearize["window"] == 4
check(AutoModelForCausalLM.from_pretrained(folder))
with torch.no_grad():
    tokens, expected = torch.load(folder + "/expected.pt")
    assert torch.equal(student(tokens).logits, expected)
from linearize.convert import converted_layers, original_attention, revert
assert list(converted_layers(student)) == [0, 1, 2]
tokens = torch.ones(1, 9, dtype=torch.long)
with torch.no_grad():
    with original_attention(student):
        teacher = student(tokens).logits
    assert torch.equal(revert(student)(tokens).logits, teacher)
""",
    # Without linearize nobody loads it as the softmax model that it no longer is.
    "linearize after transformers": """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "model type `linearize`" in str(error), error
else:
    raise AssertionError("loaded")
import linearize
check(AutoModelForCausalLM.from_pretrained(folder))
""",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(stdout, stderr, status) of the programs above, run side by side: most of it is the import of transformers."""
    folder = tmp_path_factory.mktemp("saved")
    student = make_student("qwen3", "gate")
    save(student, folder)
    torch.save((make_tokens(2, 30), logits(student)), folder / "expected.pt")
    torch.save(student, folder / "student.pt")
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", CHECK + program, str(folder)],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, program in PROGRAMS.items()
    }  # fmt: skip
    return {name: (*process.communicate(timeout=120), process.returncode) for name, process in running.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_process(name, finished):
    out, err, status = finished[name]
    assert (out.strip(), status) == ("same LinearizedQwen3ForCausalLM", 0), err


def corrupt(path):
    """Keep the first half of a file, as if the machine had stopped while writing it."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def edit(path, **changes):
    """Change entries of a JSON file; `None` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that tests copy before they break them."""
    folder = tmp_path_factory.mktemp("saved")
    student = make_student("llama", "normalizer")
    save(student, folder / "whole")
    save(student, folder / "adapter", adapter=True)
    save(make_student("llama", "normalizer", feature_dim=5), folder / "narrow", adapter=True)
    save(make_student("llama", "normalizer", softmax_layers=[1]), folder / "fewer", adapter=True)
    make_model("llama").save_pretrained(folder / "original")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    return tmp_path / "saved"


class TestBadInputs:
    @staticmethod
    def message(use):
        with pytest.raises(LinearizeError) as error:
            use()
        return str(error.value)

    def test_model_that_is_not_converted(self, tmp_path):
        for adapter in (False, True):
            assert self.message(lambda adapter=adapter: save(make_model("llama"), tmp_path / "x", adapter=adapter)) == (
                "model: LlamaForCausalLM is not converted; use its own save_pretrained, or convert it"
            )
        assert not (tmp_path / "x").exists()

    def test_whole_with_lora(self, tmp_path):
        assert self.message(lambda: save(add_lora(make_student("llama", "gate")), tmp_path)) == (
            "model: its LoRA weights are not merged, so there is no whole checkpoint to write; call "
            "model.merge_and_unload() first, or save with adapter=True"
        )

    def test_neither(self, folder):
        path = folder / "empty"
        for missing in (path, folder / "not there"):
            assert self.message(lambda missing=missing: load(missing)) == (
                f"'{missing}': neither a whole student (config.json) nor an adapter (linearize.json); check the path"
            )

    def test_an_original(self, folder):
        path = folder / "original"
        assert self.message(lambda: load(path)) == f"'{path}': it is an original, not a student; convert it first"

    def test_base_for_a_whole_student(self, folder):
        path = folder / "whole"
        assert self.message(lambda: load(path, base=make_model("llama"))) == (
            f"base: '{path}' is a whole student and needs no original; leave base out"
        )

    def test_no_base(self, folder):
        assert self.message(lambda: load(folder / "adapter")) == (
            "base: the adapter does not record its original's name; give the original as base"
        )

    @pytest.mark.parametrize(
        ("base", "found"),
        [
            (("qwen2", {}), "a qwen2 with {'heads': 4, 'kv_heads': 2, 'head_dim': 16, 'layers': 3}"),
            (
                ("llama", {"num_hidden_layers": 2}),
                "a llama with {'heads': 4, 'kv_heads': 2, 'head_dim': 16, 'layers': 2}",
            ),
            (
                ("llama", {"num_attention_heads": 8}),
                "a llama with {'heads': 8, 'kv_heads': 2, 'head_dim': 16, 'layers': 3}",
            ),
        ],
        ids=["family", "layers", "heads"],
    )
    def test_another_original(self, base, found, folder):
        model = make_model(base[0], **base[1])
        assert self.message(lambda: load(folder / "adapter", base=model)) == (
            f"base: {found} is not the llama with {{'heads': 4, 'kv_heads': 2, 'head_dim': 16, 'layers': 3}} that "
            f"'{folder / 'adapter'}' was made on; give that original as base"
        )
        assert not is_converted(model)

    def test_base_that_is_converted(self, folder):
        assert "is converted already" in self.message(
            lambda: load(folder / "adapter", base=make_student("llama", "gate"))
        )

    @pytest.mark.parametrize("other", ["narrow", "fewer"])
    def test_weights_of_another_student(self, other, folder):
        path = folder / "adapter"
        shutil.copy(folder / other / "adapter.safetensors", path)
        base = make_model("llama")
        count = 12 if other == "narrow" else 8
        assert self.message(lambda: load(path, base=base)) == (
            f"{path / 'adapter.safetensors'}: its {count} tensors are not the 12 of the conversion in linearize.json; "
            "the folder mixes files of different students, save it again"
        )
        assert_same(base, make_model("llama"))

    @pytest.mark.parametrize("how", ["half", "missing"])
    @pytest.mark.parametrize("name", ["adapter/adapter.safetensors", "adapter/linearize.json"])
    def test_broken_adapter(self, name, how, folder):
        base, path = make_model("llama"), folder / name
        if how == "half":
            corrupt(path)
        else:
            path.unlink()
        message = self.message(lambda: load(folder / "adapter", base=base))
        if how == "missing" and name.endswith("json"):
            assert message.startswith(f"'{folder / 'adapter'}': neither a whole student")
        else:
            assert message.startswith(f"{path}: cannot be read (")
            assert message.endswith("; save the student again")
        assert "\n" not in message
        assert_same(base, make_model("llama"))

    @pytest.mark.parametrize("how", ["half", "missing"])
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_broken_whole(self, name, how, folder):
        path = folder / "whole"
        if how == "half":
            corrupt(path / name)
        else:
            (path / name).unlink()
        message = self.message(lambda: load(path))
        wanted = "neither a whole student" if (name, how) == ("config.json", "missing") else "cannot be read ("
        assert message.startswith(f"'{path}': {wanted}")
        assert "\n" not in message

    def test_missing_weights(self, folder):
        path = folder / "whole" / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.2.self_attn.mixer.key_weight"], weights["model.layers.1.self_attn.mix.bias"]
        save_file(weights, path, metadata={"format": "pt"})
        assert self.message(lambda: load(folder / "whole")) == (
            f"'{folder / 'whole'}': 2 weights are missing, model.layers.1.self_attn.mix.bias among them; save the "
            "student again"
        )

    def test_formats_of_the_future(self, folder):
        path = folder / "adapter" / "linearize.json"
        edit(path, format=2)
        assert self.message(lambda: load(folder / "adapter", base=make_model("llama"))) == (
            f"{path}: format 2 is not the 1 that this version of linearize reads; install the version that wrote it"
        )
        path = folder / "whole" / "config.json"
        edit(path, linearize=json.loads(path.read_text())["linearize"] | {"format": 2})
        assert self.message(lambda: load(folder / "whole")) == (
            f"config.json: format 2 of the conversion is not the 1 that linearize {linearize.__version__} reads; it "
            f"was written by linearize {linearize.__version__}, install that one"
        )

    def test_config_without_the_conversion(self, folder):
        edit(folder / "whole" / "config.json", linearize=None)
        assert self.message(lambda: load(folder / "whole")) == (
            "config.json: it says model_type 'linearize' but its entry 'linearize' names no base_model_type; save the "
            "student again with save_pretrained"
        )

    def test_config_of_an_unknown_family(self, folder):
        path = folder / "whole" / "config.json"
        edit(path, linearize=json.loads(path.read_text())["linearize"] | {"base_model_type": "gemma"})
        assert self.message(lambda: load(folder / "whole")).startswith(
            "model_type 'gemma' is not among the known families (cohere, gemma2, "
        )

    def test_unknown_setting(self, folder):
        path = folder / "adapter" / "linearize.json"
        edit(path, conversion=json.loads(path.read_text())["conversion"] | {"windows": 4})
        assert self.message(lambda: load(folder / "adapter", base=make_model("llama"))) == (
            "windows: unknown setting of a conversion; did you mean 'window'?"
        )


class TestOriginalsWeights:
    """An adapter belongs to one original, and holds everything that changed, or is refused."""

    def test_adapter_on_another_original(self, tmp_path):
        save(make_student("llama", "normalizer"), tmp_path, adapter=True)
        with pytest.raises(LinearizeError, match="sampled weights are not those of the original"):
            load(tmp_path, base=make_model("llama", seed=7))

    def test_adapter_on_a_rounded_original(self, tmp_path):
        save(make_student("llama", "normalizer"), tmp_path, adapter=True)
        load(tmp_path, base=make_model("llama"), dtype=torch.bfloat16)

    def test_adapter_of_trained_weights(self, tmp_path):
        student = make_student("llama", "normalizer")
        with torch.no_grad():
            student.model.layers[1].mlp.up_proj.weight.mul_(1.001)
        with pytest.raises(LinearizeError, match="its own weights have changed since the conversion"):
            save(student, tmp_path, adapter=True)
        assert not (tmp_path / "linearize.json").exists()

    def test_adapter_of_a_student_that_was_loaded_whole(self, tmp_path):
        save(make_student("llama", "normalizer"), tmp_path / "whole")
        with pytest.raises(LinearizeError, match="it was loaded as a whole student"):
            save(load(tmp_path / "whole"), tmp_path / "adapter", adapter=True)

    @pytest.mark.parametrize("size", [1, 2, 5, 28311552, 10**10])
    def test_sampled_places_exist(self, size):
        places = spread(size, 4)
        assert len(set(places)) == min(size, 4)
        assert places[0] == 0
        assert places[-1] == size - 1
