"""Which tokens of a chat are answers, by the tokenizer's chat template."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from linearize.distill.data import build_stream
from linearize.distill.encoding import encode
from linearize.distill.options import DataOptions, Source
from linearize.errors import LinearizeError
from tests.tiny_tokenizer import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As some families do: the text is trimmed, thoughts are shown in the last turn only, and only there with a frame.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% set text = m.content.split('/think')[-1] | trim %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "[{{ m.content.split('/think')[0] if '/think' in m.content }}]{% endif %}"
    "{{ text }}</s>{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
)
NO_END = "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "assistant"},
]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def write_jsonl(path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def answers(template: str, chat: list) -> list[str]:
    """What of a chat counts, in one piece each."""
    own = tokenizer(template)
    ids, counted = encode(own, chat, "answers")
    assert ids == encode(own, chat, "all").ids, "the tokens are what they are"
    assert len(counted) == len(ids)
    pieces: list[list[int]] = [[]]
    for token, counts in zip(ids, counted):
        if counts:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [own.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["chatml", "generation"])
def test_answers_and_their_ends_count(template):
    assert answers(template, CHAT) == ["Hello</s>", "assistant</s>"]


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " b \n"}], [" b \n</s>"]),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], ["</s>"]),
        ([{"role": "assistant", "content": "b"}, {"role": "user", "content": "b"}], ["b</s>"]),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "s>"}], ["s></s>"]),
        ([{"role": "user", "content": "a"}], []),
    ],
)
def test_odd_chats(chat, expected):
    assert answers(CHATML, chat) == expected


def test_a_template_that_treats_the_last_turn_differently():
    chat = [*CHAT[:3], {"role": "assistant", "content": "well/think Yes "}]
    assert answers(THINKING, chat) == ["Hello</s>", "well]Yes</s>"]


def test_the_end_of_text_that_a_template_lacks():
    """It ends the document after an answer; before a question it is no target."""
    assert answers(NO_END, CHAT) == ["Hello", "assistant", "</s>"]
    assert answers(NO_END, CHAT[:3]) == ["Hello"]


def test_all_or_plain_text_counts_everywhere():
    own = tokenizer(CHATML)
    assert encode(own, CHAT, "all").counted is None
    assert encode(own, "a text", "answers").counted is None
    assert encode(own, [5, 6], "answers").ids == [5, 6, own.eos_token_id]


def test_templates_that_do_not_show_answers():
    hides = "{% for m in messages %}{{ m.role }}{{ m.content if m.role == 'user' }}</s>{% endfor %}"
    with pytest.raises(LinearizeError, match=r"does not show where the answer 'Hello' is .*; set the source's loss to"):
        encode(tokenizer(hides), CHAT, "answers")
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LinearizeError, match=r"refuses a chat of user, assistant.* begins 'Hi' \(roles must alternate"):
        encode(tokenizer(refuses), CHAT, "answers")
    with pytest.raises(LinearizeError, match="no chat template"):
        encode(tokenizer(None), CHAT, "answers")


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_batches_mark_what_counts(tmp_path, packing):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q" * n, "response": "z" * n} for n in range(3, 9)])
    own = tokenizer(CHATML)
    options = DataOptions(
        sources=(Source(kind="jsonl", path=path),), seq_len=48, batch_size=2, packing=packing, held_out=0
    )
    stream = build_stream(options, own, seed=0)
    for _ in range(5):
        batch = next(stream)
        ids, counted = batch["input_ids"], batch["loss_mask"]
        assert (counted.shape, counted.dtype) == (ids.shape, torch.int64)
        z, end = own.convert_tokens_to_ids(["z", "</s>"])
        # Of a document that a row goes on with, the first token's answer is out of sight.
        answer = ids == z
        answer[:, 1:] |= (ids[:, 1:] == end) & (ids[:, :-1] == z)
        assert torch.equal(counted[:, 1:].bool(), answer[:, 1:])
        if "attention_mask" in batch:
            assert not (counted & ~batch["attention_mask"].bool()).any()
    assert "loss_mask" not in next(
        build_stream(
            DataOptions(sources=(Source(kind="jsonl", path=path, loss="all"),), seq_len=48, held_out=0), own, seed=0
        )
    )


def test_a_source_without_answers(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q" * 60}]}] * 3)
    options = DataOptions(sources=(Source(kind="jsonl", path=path),), seq_len=48, held_out=0)
    with pytest.raises(LinearizeError, match=r"d\.jsonl: none of its chats has an answer.*; give chats that have, or"):
        build_stream(options, tokenizer(CHATML), seed=0)
