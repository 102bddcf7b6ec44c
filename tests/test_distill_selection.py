"""Scores of layers: each equals what its definition gives when written out, and nothing of the model changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from linearize import LinearizeConfig, LinearizeError, convert, original_attention, revert
from linearize.convert import converted_layers, switch_of
from linearize.distill.selection import (
    Facts,
    build_facts,
    lazy_scores,
    only_converted,
    recall_scores,
    swap_scores,
)
from tests.tiny_models import FAMILIES, make_model, make_tokens
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOW, SINKS = 4, 2


def make_pair(family: str = "llama", **changes: Any) -> Any:
    return convert(make_model(family, **changes), LinearizeConfig(mixer="none", window=WINDOW, sinks=SINKS))


def keeping(family: str, layer: int, tokens: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Logits of a model of its own in which only `layer` is converted."""
    kept = [i for i in range(3) if i != layer]
    config = LinearizeConfig(mixer="none", window=WINDOW, sinks=SINKS, softmax_layers=tuple(kept))
    with torch.no_grad():
        return convert(make_model(family, **changes), config)(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_swap_is_the_kl_of_a_model_with_one_layer_converted(family: str) -> None:
    rows = [make_tokens(1, 40, seed=5), make_tokens(2, 24, seed=6)]
    scores = swap_scores(make_pair(family), rows)
    for layer in range(3):
        wanted = 0.0
        for row in rows:
            with torch.no_grad():
                original = make_model(family)(input_ids=row, use_cache=False).logits.log_softmax(-1)
            changed = keeping(family, layer, row).log_softmax(-1)
            wanted += float(F.kl_div(changed, original, log_target=True, reduction="sum")) / row.numel() / len(rows)
        assert scores[layer] == pytest.approx(wanted, rel=2e-4, abs=1e-6)
        assert scores[layer] > 1e-4, "these layers look far, so converting one must show"


def test_a_layer_without_a_say_scores_nothing() -> None:
    """The negative control: its attention misses as much mass as before, and none of it reaches the output."""
    model, row = make_pair(), make_tokens(1, 40)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    swap, lazy = swap_scores(model, [row]), lazy_scores(model, [row])
    assert swap[1] == pytest.approx(0.0, abs=1e-7)
    assert min(swap[0], swap[2]) > 1e-4
    assert min(lazy.values()) > 0.1


def test_lazy_is_the_attention_mass_outside_sinks_and_window() -> None:
    row = make_tokens(1, 23)
    scores = lazy_scores(make_pair(), [row])
    model = make_model("llama", attn_implementation="eager")
    with torch.no_grad():
        maps = model(input_ids=row, output_attentions=True, use_cache=False).attentions
    query, key = torch.arange(23)[:, None], torch.arange(23)
    far = (key >= SINKS) & (key // WINDOW < query // WINDOW - 1)
    for layer, attention in enumerate(maps):
        mass = (attention[0] * far).sum(-1)[:, far.any(-1)]
        assert scores[layer] == pytest.approx(float(mass.mean()), rel=2e-4)


def test_recall_is_the_kl_where_the_numbers_are_predicted() -> None:
    tokens = make_tokens(1, 40, seed=7)
    scores = recall_scores(make_pair(), [Facts(tokens, ((30, 31, 32), (36, 37)))])
    places = torch.tensor([29, 30, 31, 35, 36])  # a token is predicted one before it
    with torch.no_grad():
        original = make_model("llama")(input_ids=tokens, use_cache=False).logits[0, places].log_softmax(-1)
    for layer in range(3):
        changed = keeping("llama", layer, tokens)[0, places].log_softmax(-1)
        wanted = F.kl_div(changed, original, log_target=True, reduction="batchmean")
        assert scores[layer] == pytest.approx(float(wanted), rel=2e-4, abs=1e-6)
    assert min(scores.values()) > 1e-3


def test_layers_with_a_window_of_their_own_have_no_score() -> None:
    own = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model = make_pair("qwen3", use_sliding_window=True, **own)
    row = make_tokens(1, 40)
    assert set(swap_scores(model, [row])) == set(lazy_scores(model, [row])) == {0, 2}


def test_measuring_leaves_the_model_as_it_was() -> None:
    model, row = make_pair(), make_tokens(1, 40)
    switch = switch_of(model)
    with torch.no_grad():
        before = model(input_ids=row, use_cache=False).logits
        swap_scores(model, [row])
        assert torch.equal(model(input_ids=row, use_cache=False).logits, before)
    assert all(layer.switch is switch for layer in converted_layers(model).values())
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    reverted = revert(model)
    with torch.no_grad():
        assert torch.equal(
            reverted(input_ids=row, use_cache=False).logits, make_model("llama")(input_ids=row, use_cache=False).logits
        )


def test_an_interrupted_measurement_leaves_the_model_as_it_was() -> None:
    model = make_pair()

    def stop(layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swap_scores(model, [make_tokens(1, 40)], progress=stop)
    assert len({id(layer.switch) for layer in converted_layers(model).values()}) == 1
    assert switch_of(model).converted
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_only_converted_all_and_none_are_the_student_and_the_original() -> None:
    model, row = make_pair(), make_tokens(1, 40)
    with torch.no_grad():
        student = model(input_ids=row, use_cache=False).logits
        with original_attention(model):
            original = model(input_ids=row, use_cache=False).logits
        with only_converted(model, range(3)):
            torch.testing.assert_close(model(input_ids=row, use_cache=False).logits, student)
        with only_converted(model, []):
            assert torch.equal(model(input_ids=row, use_cache=False).logits, original)
    assert not torch.allclose(student, original, atol=1e-2)
    with pytest.raises(LinearizeError, match=r"layers: 7 is not converted; the converted ones are \[0, 1, 2\]"):
        only_converted(model, [7]).__enter__()


def test_rows_without_far_keys_are_refused() -> None:
    for measure in (lazy_scores, swap_scores):
        with pytest.raises(LinearizeError, match="seq_len: in rows of 8 tokens nothing has left a window of 4"):
            measure(make_pair(), [make_tokens(1, 40), make_tokens(1, 8)])
    with pytest.raises(LinearizeError, match="seq_len: in rows of 6 tokens"):
        recall_scores(make_pair(), [Facts(make_tokens(1, 6), ((4, 5),))])


class TestFacts:
    tokens = torch.tensor(tiny_tokenizer()("The quick brown fox. " * 60)["input_ids"])

    def test_every_answer_was_said_before_and_stands_where_it_is_said_to_stand(self) -> None:
        tokenizer = tiny_tokenizer()
        texts = build_facts(tokenizer, self.tokens, gaps=[100, 300], count=3, seed=4)
        for text, gap in zip(texts, (100, 300)):
            ids = text.tokens[0].tolist()
            assert len(text.answers) == 3
            for answer in text.answers:
                number = tokenizer.decode([ids[i] for i in answer])
                assert number.isdecimal()
                assert len(number) == 5
                question = tokenizer.decode(ids[: answer[0]])
                place = question.rpartition("the code for ")[2].removesuffix(" is ")
                fact = f"the code for {place} is {number}.\n"
                assert question.count(fact) == 1
                assert answer[0] - question.index(fact) > gap

    def test_the_seed_decides_and_each_text_has_its_own_filler(self) -> None:
        tokenizer = tiny_tokenizer()
        one, two = build_facts(tokenizer, self.tokens, gaps=[50, 50], seed=1)
        again, _ = build_facts(tokenizer, self.tokens, gaps=[50, 50], seed=1)
        other, _ = build_facts(tokenizer, self.tokens, gaps=[50, 50], seed=2)
        assert torch.equal(one.tokens, again.tokens)
        assert one.answers == again.answers
        assert not torch.equal(one.tokens, other.tokens)
        assert not torch.equal(one.tokens[:, :16], two.tokens[:, :16])

    def test_too_little_text_is_an_error(self) -> None:
        with pytest.raises(LinearizeError, match="text: 100 tokens are less than the 380 between"):
            build_facts(tiny_tokenizer(), self.tokens[:100], gaps=[300])

    def test_tokens_of_the_tiny_tokenizer_are_in_reach_of_a_tiny_model(self) -> None:
        texts = build_facts(tiny_tokenizer(), self.tokens, gaps=[20], count=2)
        scores = recall_scores(make_pair(vocab_size=len(VOCABULARY)), texts)
        assert set(scores) == {0, 1, 2}
        assert max(map(abs, scores.values())) > 1e-4
