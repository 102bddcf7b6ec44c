"""Generation health: answers of left-padded batches, and what counts as ended, repeated or a loop."""

import json

import pytest
import torch

from linearize.benchmarks.generation import (
    QUESTIONS,
    answer,
    encode_prompts,
    ends_in_loop,
    load_prompts,
    repetition,
    summarise_answers,
)
from linearize.convert import state_off, window_off
from linearize.errors import LinearizeError
from tests.tiny_models import make_model, make_student
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Why?", "What is the sea made of?", "A much longer question " * 2)]


@pytest.mark.parametrize("far", ["original", "normalizer", "gate"])
@pytest.mark.parametrize("switch", [None, state_off, window_off])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(far, switch):
    if far == "original" and switch is not None:
        pytest.skip("an original has no switches")
    model = make_model("llama") if far == "original" else make_student("llama", far)
    if switch is not None:
        with switch(model):
            check_answers(model)
    else:
        check_answers(model)


def check_answers(model):
    found = answer(model, TOKENIZER, PROMPTS, 12, batch_size=2)
    ends = {TOKENIZER.eos_token_id}
    for prompt, one in zip(PROMPTS, found):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(12):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in ends:
                    break
        written = ids[len(prompt) :]
        assert one["ended"] == (written[-1] in ends)
        assert one["tokens"] == (written[:-1] if one["ended"] else written)


def test_an_answer_that_ends_has_no_end_token_and_no_padding():
    model = make_model("llama", tie_word_embeddings=False)
    end = TOKENIZER.eos_token_id
    with torch.no_grad():
        first = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax()
        model.lm_head.weight[[int(first), end]] = model.lm_head.weight[[end, int(first)]]
    found = answer(model, TOKENIZER, PROMPTS, 6)
    assert found[0] == {"tokens": [], "ended": True}
    assert any(not one["ended"] or one["tokens"] for one in found[1:])


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(50))) == 0
    assert repetition([1] * 13) == pytest.approx(0.9)
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([*range(20), *[7] * 16], True),
        ([*range(20), *[7] * 14], False),  # three full stops in a row are no loop yet
        ([*range(20), *([1, 2, 3, 4, 5, 6] * 3)], True),
        ([*range(20), *([1, 2, 3, 4, 5, 6] * 2)], False),
        ([*range(20), *([1, 2, 3, 4, 5, 6] * 3), 99], False),
        ([], False),
    ],
)
def test_a_loop_is_three_copies_and_sixteen_tokens_at_the_end(tokens, loops):
    assert ends_in_loop(tokens) == loops


def test_summary():
    original = [{"tokens": list(range(10, 30)), "ended": True}] * 4
    student = [{"tokens": [10] * 40, "ended": False}] * 2 + [{"tokens": list(range(10, 20)), "ended": True}] * 2
    found = summarise_answers({"original": original, "student": student}, TOKENIZER, 40, "original")
    row = found["rows"]["student"]
    assert (row["end_rate"], row["loop_rate"], row["mean_length"]) == (0.5, 0.5, 25)
    assert row["length_ratio"] == 1.25
    assert row["repetition"] == pytest.approx(0.5 * 36 / 37)
    assert row["end_rate_ci95"] is not None
    assert len(row["answers"]) == found["n_prompts"] == 4
    json.dumps(found, allow_nan=False)


def test_answers_of_no_tokens_have_no_ratio():
    empty = {"original": [{"tokens": [], "ended": True}] * 3}
    row = summarise_answers(empty, TOKENIZER, 40, "original")["rows"]["original"]
    assert (row["length_ratio"], row["length_ratio_ci95"]) == (None, None)


def test_prompts(tmp_path):
    assert load_prompts(None, 3) == list(QUESTIONS[:3])
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    path.write_text("\n".join(map(json.dumps, [chat, {"prompt": "p"}, {"instruction": "i"}, {"prompt": "q"}])))
    assert load_prompts(path, 3) == ["u", "p", "i"]
    for line, message in (("{", ":2: not JSON"), ('{"messages": []}', ":2: no question")):
        path.write_text(json.dumps(chat) + "\n" + line + "\n")
        with pytest.raises(LinearizeError, match=message):
            load_prompts(path, 8)
    path.write_text("\n")
    with pytest.raises(LinearizeError, match="holds no prompts"):
        load_prompts(path, 8)
    with pytest.raises(LinearizeError, match="is not a file"):
        load_prompts(tmp_path / "nowhere", 8)


def test_the_chat_template_is_used_where_there_is_one():
    plain, chat = tiny_tokenizer(), tiny_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert plain.decode(encode_prompts(plain, ["Why?"])[0]) == "Question: Why?\nAnswer:"
    assert chat.decode(encode_prompts(chat, ["Why?"])[0]) == "<user>Why?<a>"
