"""Other libraries on a student: PEFT's adapters, accelerate's placement of weights, transformers' own loops."""

from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, TextIteratorStreamer

from linearize import LinearizeError, load, save
from linearize.convert import converted_layers, is_converted
from tests.parity import (
    LENGTH,
    LOGITS,
    ORIGINAL,
    STUDENTS,
    Case,
    alone,
    everywhere,
    in_pieces,
    left_padded,
    make,
    positions_of,
    student,
)
from tests.tiny_models import make_tokens
from tests.tiny_tokenizer import tiny_tokenizer


@torch.no_grad()
def logits_of(model, tokens, **options):
    return model(tokens, **options).logits


@torch.no_grad()
def written(model, tokens, **options):
    return model.generate(tokens, max_new_tokens=12, do_sample=False, **options)


def assert_consistent(model, tokens):
    """Padded in pieces, each text is what it is alone; generated text is the same with a cache and without one."""
    texts = [tokens[0], tokens[1, 9:]]
    padded, mask = left_padded(texts)
    logits, _ = in_pieces(model, [23, 11, 1], padded, mask)
    torch.testing.assert_close(logits[mask.bool()], torch.cat(alone(model, texts)), **LOGITS)
    with_mask = written(model, padded, attention_mask=mask)
    assert torch.equal(written(model, padded, attention_mask=mask, use_cache=False), with_mask)
    assert torch.equal(written(model, texts[1][None])[0, -12:], with_mask[1, -12:])


class TestPeft:
    """LoRA on the projections of every layer, converted or not."""

    @staticmethod
    def config(**changes):
        from peft import LoraConfig

        return LoraConfig(r=3, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], **changes)

    @staticmethod
    def train(model, tokens):
        """Three steps on all that wants a gradient; (first loss, last loss)."""
        wanting = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(wanting, lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(tokens, labels=tokens, use_cache=False).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in wanting)
            optimizer.step()
        return losses[0], losses[-1]

    @everywhere
    def test_train_save_load_merge(self, case, tmp_path):
        from peft import PeftModel, get_peft_model

        tokens = make_tokens(2, LENGTH)
        plain = logits_of(make(case), tokens)
        adapted = get_peft_model(make(case), self.config())
        first, last = self.train(adapted.train(), tokens)
        assert last < first
        adapted.eval()
        expected = logits_of(adapted, tokens)
        assert (expected - plain).abs().max() > 0.1
        assert_consistent(adapted, tokens)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        again = PeftModel.from_pretrained(make(case), tmp_path)
        assert torch.equal(logits_of(again, tokens), expected)
        with again.disable_adapter():
            assert torch.equal(logits_of(again, tokens), plain)
        merged = again.merge_and_unload()
        assert type(merged) is type(make(case))
        torch.testing.assert_close(logits_of(merged, tokens), expected, **LOGITS)
        assert_consistent(merged, tokens)

    @pytest.mark.parametrize("case", [case for case in STUDENTS if case.far != "none"], ids=str)
    def test_mixers_learn_beside_it(self, case, tmp_path):
        """`modules_to_save` takes what conversion added along: trained, saved and loaded with the adapter."""
        from peft import PeftModel, get_peft_model

        tokens = make_tokens(2, LENGTH)
        adapted = get_peft_model(make(case), self.config(modules_to_save=["mixer", "mix"]))
        before = {name: p.detach().clone() for name, p in adapted.named_parameters() if ".mix" in name}
        self.train(adapted.train(), tokens)
        assert any((p - before[name]).abs().max() > 0 for name, p in adapted.named_parameters() if name in before)
        expected = logits_of(adapted.eval(), tokens)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        again = PeftModel.from_pretrained(make(case), tmp_path).eval()
        assert torch.equal(logits_of(again, tokens), expected)
        assert_consistent(again, tokens)
        with again.disable_adapter():
            assert torch.equal(logits_of(again, tokens), logits_of(make(case), tokens))
        save(adapted, tmp_path / "ours", adapter=True)
        for merge in (True, False):
            loaded = load(tmp_path / "ours", base=make(Case(case.family, ORIGINAL)), merge=merge)
            torch.testing.assert_close(logits_of(loaded, tokens), expected, **LOGITS)

    @everywhere
    def test_by_the_model_itself(self, case, tmp_path):
        """transformers' own methods, without a PeftModel around."""
        tokens, model = make_tokens(2, LENGTH), make(case)
        plain = logits_of(model, tokens)
        torch.manual_seed(5)
        model.add_adapter(self.config(init_lora_weights=False), "mine")
        adapted = logits_of(model.eval(), tokens)
        assert (adapted - plain).abs().max() > 0.1
        assert_consistent(model, tokens)
        model.disable_adapters()
        assert torch.equal(logits_of(model, tokens), plain)
        model.enable_adapters()
        assert torch.equal(logits_of(model, tokens), adapted)
        model.save_pretrained(tmp_path)
        other = make(case)
        other.load_adapter(tmp_path)
        assert torch.equal(logits_of(other.eval(), tokens), adapted)


class TestAccelerate:
    """Where weights lie is nothing that a text shows."""

    @everywhere
    @pytest.mark.parametrize("placement", ["auto", "cpu", "disk"])
    def test_device_map(self, case, placement, tmp_path):
        tokens, model = make_tokens(2, LENGTH), make(case)
        expected, text = logits_of(model, tokens), written(model, tokens)
        if is_converted(model):
            save(model, tmp_path / "saved")
        else:
            model.save_pretrained(tmp_path / "saved")
        given = {"auto": "auto", "cpu": {"": "cpu"}}.get(placement)
        if given is None:
            parts = ("embed_tokens", "rotary_emb", "norm", "layers.1")
            given = {f"model.{part}": "cpu" for part in parts} | {"model.layers.0": "disk", "lm_head": "cpu"}
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=given, offload_folder=tmp_path / "away"
        )
        assert type(placed) is type(model)
        away = all(p.is_meta for p in placed.model.layers[0].parameters())
        assert away == (placement == "disk")
        for _ in range(2):
            assert torch.equal(logits_of(placed, tokens), expected)
            assert torch.equal(written(placed, tokens), text)
        assert_consistent(placed, tokens)

    @student
    def test_prepared(self, case):
        from accelerate import Accelerator

        tokens, model = make_tokens(2, LENGTH), make(case)
        expected = logits_of(model, tokens)
        prepared = Accelerator(cpu=True).prepare(model)
        assert torch.equal(logits_of(prepared, tokens), expected)
        assert list(converted_layers(prepared)) == list(converted_layers(model))


class TestLoops:
    @everywhere
    def test_a_serving_thread(self, case):
        """One request after another, each in a thread of its own that streams, each going on from the chat's cache."""
        model, tokenizer = make(case, vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
        tokens = make_tokens(1, LENGTH) % len(tokenizer)
        history, cache = tokens[:, :20], DynamicCache(config=model.config)
        for turn in (20, 31, 45):
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
            options = {"past_key_values": cache, "streamer": streamer, "return_dict_in_generate": True}
            found = []
            thread = Thread(target=lambda h=history, o=options, f=found: f.append(written(model, h, **o)))
            thread.start()
            said = "".join(streamer)
            thread.join()
            sequence = found[0].sequences
            assert torch.equal(sequence, written(model, history, use_cache=False))
            assert said == tokenizer.decode(sequence[0, history.shape[1] :])
            history = torch.cat([sequence, tokens[:, turn : turn + 9]], dim=1)

    @student
    def test_continuous_batching(self, case):
        """It pages keys and values, of which a converted layer keeps none."""
        model = make(case)
        with pytest.raises(LinearizeError, match=r"generate_batch: .*; use generate"):
            model.generate_batch([[1, 2, 3]])

    @everywhere
    def test_a_loop_of_ones_own(self, case):
        """Greedy by hand, padded, as evaluation code writes it: masks grow by a column of ones."""
        model, tokens = make(case), make_tokens(2, LENGTH)
        padded, mask = left_padded([tokens[0], tokens[1, 9:]])
        expected = written(model, padded, attention_mask=mask)
        text, cache, given = padded, DynamicCache(), padded
        for _ in range(12):
            positions = positions_of(mask)[:, -given.shape[1] :]
            with torch.no_grad():
                out = model(given, attention_mask=mask, position_ids=positions, past_key_values=cache)
            given = out.logits[:, -1:].argmax(-1)
            text, mask = torch.cat([text, given], dim=1), torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        assert torch.equal(text, expected)
