"""Data: splits, packing, mixtures, positions, texts from the teacher, and mistakes with their messages."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.distill.data import build_stream
from linearize.distill.generated import ROWS, write_texts
from linearize.distill.options import DataOptions, Source
from linearize.distill.sources import QUOTE_CHARS, split_topics
from linearize.errors import LinearizeError

EOS, PAD = 256, 257
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, built here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT, model_max_length=64
    )


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def numbered(tmp_path):
    """40 documents of different lengths, each recognisable from any of its bytes' neighbourhood."""
    return write_jsonl(tmp_path / "docs.jsonl", [{"text": f"<{i:02d}>" * (i % 7 + 1)} for i in range(40)])


def data(*sources: Source, **settings) -> DataOptions:
    return DataOptions(sources=sources, **{"seq_len": 32, **settings})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Packing


def test_packed_rows_are_the_documents_in_a_row(tokenizer, numbered):
    options = data(Source(kind="jsonl", path=numbered), batch_size=3, held_out=0)
    stream = build_stream(options, tokenizer, seed=1)
    everything = stream.tokens()
    flat = []
    while len(flat) < 2 * len(everything):
        batch = next(stream)
        assert batch.keys() == {"input_ids", "position_ids"}
        for x in batch.values():
            assert (x.shape, x.dtype) == ((3, 32), torch.int64)
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist()):
            # The end-of-text token is the last of the document that it ends; a row begins anew.
            expected = []
            for before in [EOS, *ids[:-1]]:
                expected.append(0 if before == EOS else expected[-1] + 1)
            assert positions == expected
        flat += batch["input_ids"].flatten().tolist()
    documents = sorted(tokenizer.decode(everything).split("<eos>"))
    epochs = [flat[: len(everything)], flat[len(everything) : 2 * len(everything)]]
    orders = [tokenizer.decode(epoch).split("<eos>") for epoch in epochs]
    assert all(sorted(order) == documents for order in orders), "each epoch has every document once, whole"
    assert orders[0] != orders[1]
    assert len(documents) == 41  # the last is what follows the last end of text: nothing


def test_rows_of_one_document_have_no_positions(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x" * 63}])
    stream = build_stream(data(Source(kind="jsonl", path=path), held_out=0), tokenizer, seed=0)
    assert all(next(stream).keys() == {"input_ids"} for _ in range(4)), "two rows a document: neither has two"


def test_document_rows(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "ab"}, {"text": "x" * 50}, {"text": " "}, {"text": "abc"}])
    stream = build_stream(data(Source(kind="jsonl", path=path), packing="document", held_out=0), tokenizer, seed=0)
    rows = {}
    for _ in range(4):
        batch = next(stream)
        assert batch.keys() == {"input_ids"}, "a row alone needs no padding: it is as long as its document"
        ids = batch["input_ids"][0]
        rows[tokenizer.decode(ids)] = len(ids)
    assert rows == {"ab<eos>": 3, "x" * 32: 32, "x" * 18 + "<eos>": 19, "abc<eos>": 4}


def test_rows_for_long_documents(tokenizer, tmp_path, capsys):
    """What is shorter is passed over, the rest of a long one is a row too if it is long enough."""
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"text": t} for t in ("ab", "y" * 50, "z" * 40, "c" * 15, "d" * 14)])
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"text": "hello"}] * 3)
    sources = [Source(kind="jsonl", path=mixed), Source(kind="jsonl", path=chats, weight=9)]
    options = data(*sources, packing="document", held_out=0)
    stream = build_stream(options, tokenizer, seed=0, shortest=16)
    assert "chats.jsonl: none of its documents has 16 tokens" in capsys.readouterr().err
    rows = sorted(tokenizer.decode(next(stream)["input_ids"][0]) for _ in range(4))
    assert rows == ["c" * 15 + "<eos>", "y" * 18 + "<eos>", "y" * 32, "z" * 32], "the other 9 of z are too few"

    for _ in range(6):  # in the middle of a document too
        position = stream.state_dict()
        expected = next(stream)["input_ids"]
        again = build_stream(options, tokenizer, seed=0, shortest=16)
        again.load_state_dict(position)
        assert torch.equal(next(again)["input_ids"], expected)
    with pytest.raises(LinearizeError, match="position belongs to data"):
        build_stream(options, tokenizer, seed=0, shortest=8).load_state_dict(position)


def test_no_document_is_long_enough(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"text": "hello"}] * 3)
    options = data(Source(kind="jsonl", path=path), packing="document", held_out=0)
    with pytest.raises(LinearizeError, match=r"no document of jsonl .*chats\.jsonl has 16 tokens.*rows of up to 32"):
        build_stream(options, tokenizer, seed=0, shortest=16)


def test_padding_in_a_batch(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "ab"}, {"text": "x" * 50}])
    options = data(Source(kind="jsonl", path=path), packing="document", held_out=0, batch_size=2)
    batch = next(build_stream(options, tokenizer, seed=0))
    mask = batch["attention_mask"]
    lengths = mask.sum(1)
    assert sorted(lengths.tolist()) == [3, 32]
    assert torch.equal(mask, (torch.arange(32) < lengths[:, None]).long())
    assert (batch["input_ids"][mask == 0] == PAD).all()


# Order and position


@pytest.mark.parametrize("packing", ["packed", "document"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_restored_position_continues_exactly(tokenizer, numbered, tmp_path, packing, batch_size):
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(f"Paragraph {i}." * 5 for i in range(30)))
    sources = [Source(kind="jsonl", path=numbered, weight=2), Source(kind="text", path=str(text))]
    options = data(*sources, packing=packing, batch_size=batch_size)
    stream = build_stream(options, tokenizer, seed=3)
    states, batches = [], []
    for _ in range(90):
        states.append(json.dumps(stream.state_dict()))
        batches.append(next(stream))
    epochs = [json.loads(state)["positions"][0][0] for state in states]
    assert epochs[-1] >= 1, "the run crosses the border of an epoch"
    border = epochs.index(1)
    for start in (0, 1, border - 1, border, border + 1, 60):
        fresh = build_stream(options, tokenizer, seed=3)
        for _ in range(start % 3):  # wherever it stands before
            next(fresh)
        fresh.load_state_dict(json.loads(states[start]))
        assert all(same(next(fresh), batch) for batch in batches[start:])
    assert max(map(len, states)) < 300


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_processes_share_a_stream(tokenizer, numbered, packing):
    """Each draws its own batches; the position is the same in all, and goes on in another number of them."""
    options = data(Source(kind="jsonl", path=numbered), packing=packing, batch_size=2)
    one = build_stream(options, tokenizer, seed=3)
    expected = [next(one) for _ in range(12)]
    states = []
    for rank in range(3):
        stream = build_stream(options, tokenizer, seed=3)
        for step in range(2):
            stream.skip(rank)
            assert same(next(stream), expected[3 * step + rank])
            stream.skip(2 - rank)
        states.append(stream.state_dict())
    assert states[0] == states[1] == states[2]
    for rank in range(2):
        stream = build_stream(options, tokenizer, seed=3)
        stream.load_state_dict(states[0])
        stream.skip(rank)
        assert same(next(stream), expected[6 + rank])


def test_order_depends_on_the_seed_only(tokenizer, numbered):
    options = data(Source(kind="jsonl", path=numbered))
    a, b, c = (build_stream(options, tokenizer, seed=seed) for seed in (5, 5, 6))
    torch.manual_seed(11)
    first = [next(a) for _ in range(5)]
    torch.manual_seed(12)
    assert all(same(next(b), batch) for batch in first)
    assert not all(same(next(c), batch) for batch in first)


def test_a_position_in_other_data_is_refused(tokenizer, numbered, tmp_path):
    options = data(Source(kind="jsonl", path=numbered))
    state = build_stream(options, tokenizer, seed=0).state_dict()
    others = [
        build_stream(options, tokenizer, seed=1),
        build_stream(data(Source(kind="jsonl", path=numbered), seq_len=16), tokenizer, seed=0),
        build_stream(options, tokenizer, seed=0, part="held_out"),
    ]
    Path(numbered).write_text(Path(numbered).read_text().replace("00", "aa"))
    others.append(build_stream(options, tokenizer, seed=0))
    for other in others:
        with pytest.raises(LinearizeError, match="the checkpoint's position belongs to data"):
            other.load_state_dict(state)


@pytest.mark.parametrize("packing", ["packed", "document"])
def test_mixture_follows_the_weights(tokenizer, tmp_path, packing):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * n} for n in range(10, 40)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * n} for n in range(3, 20)])
    sources = [Source(kind="jsonl", path=a, weight=3), Source(kind="jsonl", path=b, weight=1)]
    stream = build_stream(data(*sources, packing=packing), tokenizer, seed=0)
    drawn = {"a": 0, "b": 0}
    for _ in range(200):
        batch = next(stream)
        ids = batch["input_ids"][0, : int(batch["attention_mask"].sum()) if "attention_mask" in batch else None]
        drawn[tokenizer.decode(ids).replace("<eos>", "")[0]] += len(ids)
        # Never further off than a row of one and its counterpart of the other.
        assert abs(drawn["a"] / 3 - drawn["b"]) <= 32 * (1 + 1 / 3)
    assert drawn["a"] / drawn["b"] == pytest.approx(3, rel=0.05)


# Split


def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path):
    records = [{"text": f"document number {i}"} for i in range(200)]
    path = write_jsonl(tmp_path / "d.jsonl", records + records[:100])  # half of them twice
    options = data(Source(kind="jsonl", path=path), held_out=0.25)
    train, held = (
        set(tokenizer.decode(build_stream(options, tokenizer, seed=0, part=part).tokens()).split("<eos>")) - {""}
        for part in ("train", "held_out")
    )
    assert not train & held
    assert train | held == {record["text"] for record in records}
    assert 30 <= len(held) <= 70


def test_split_does_not_depend_on_the_seed(tokenizer, numbered):
    options = data(Source(kind="jsonl", path=numbered), held_out=0.3)
    a, b = (build_stream(options, tokenizer, seed=seed, part="held_out").tokens() for seed in (0, 1))
    assert torch.equal(a, b)


def test_text_files_hold_out_their_end(tokenizer, tmp_path):
    paragraphs = {name: [f"{name}{i:03d} says something." for i in range(100)] for name in "ab"}
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs[name]))
    options = data(Source(kind="text", path=str(tmp_path / "*.txt")), held_out=0.2)
    train, held = (
        tokenizer.decode(build_stream(options, tokenizer, seed=0, part=part).tokens()) for part in ("train", "held_out")
    )
    for name in "ab":
        where = ["t" if p in train else "h" if p in held else "-" for p in paragraphs[name]]
        assert sum(p in train and p in held for p in paragraphs[name]) == 0
        assert "".join(where) == "t" * where.count("t") + "h" * where.count("h"), "cut between paragraphs, nothing lost"
        assert 18 <= where.count("h") <= 22


@pytest.mark.parametrize("text", ["word " * 3000, "x" * 9000, "line\n" * 2000], ids=["words", "solid", "lines"])
def test_long_texts_without_blank_lines(tokenizer, tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    stream = build_stream(data(Source(kind="text", path=str(tmp_path / "t.txt")), held_out=0), tokenizer, seed=0)
    passages = tokenizer.decode(stream.tokens()).split("<eos>")
    assert len(passages) > 10
    assert max(map(len, passages)) <= 32 * 4 * 4 * 1.5
    assert "".join(passages).replace("\n", "") == text.replace("\n", "")


def test_topics_are_split_without_quotes():
    quote = "this paragraph stands in two topics and is long enough to matter " * 2
    assert len(quote) >= QUOTE_CHARS
    topics = {f"t{i}": f"Topic {i}.\n\nIt is about {i} and " + "words " * 20 + str(i) for i in range(60)}
    for i in range(8):
        topics[f"t{i}"] += f"\n\n{i} {quote}"
        topics[f"t{i + 30}"] += f"\n  \n  {i} {quote}\n"
    for share in (0.05, 0.1, 0.3, 0.5, 0.9):
        train, held = split_topics(topics, share)
        assert train.keys() | held.keys() == topics.keys()
        assert not train.keys() & held.keys()
        assert [f"t{i}" in held for i in range(8)] == [f"t{i + 30}" in held for i in range(8)]
        assert sum(map(len, held.values())) == pytest.approx(share * sum(map(len, topics.values())), rel=0.25)
    assert split_topics(topics, 0.1) == split_topics(dict(reversed(topics.items())), 0.1)


def test_pydoc_has_text_to_train_and_to_hold_out(tokenizer):
    options = data(Source(kind="pydoc"), seq_len=1024)
    train = build_stream(options, tokenizer, seed=0)
    held = build_stream(options, tokenizer, seed=0, part="held_out").tokens()
    assert len(train.tokens()) > 300_000  # bytes
    assert 0.06 <= len(held) / len(train.tokens()) <= 0.115
    in_train = tokenizer.decode(train.tokens())
    paragraphs = [p.strip("\n") for p in tokenizer.decode(held).split("\n\n")]
    assert not [p for p in paragraphs if len(p) >= 2 * QUOTE_CHARS and p in in_train]
    assert next(train)["input_ids"].shape == (1, 1024)


def test_tokens_with_a_limit_mixes_the_sources(tokenizer, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 9 + str(i)} for i in range(100)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * 9 + str(i)} for i in range(100)])
    stream = build_stream(data(Source(kind="jsonl", path=a), Source(kind="jsonl", path=b)), tokenizer, seed=0)
    before = stream.state_dict()
    tokens = stream.tokens(limit=301)
    assert tokens.shape == (301,)
    text = tokenizer.decode(tokens)
    assert text.count("a") == pytest.approx(text.count("b"), abs=12)
    assert stream.state_dict() == before


# Formats


def test_records_of_many_forms(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"text": "plain"},
            {"messages": chat, "id": 3},
            {"prompt": "2+2?", "response": "4"},
            {"instruction": "Add", "input": "1, 2", "output": "3"},
            {"instruction": "Say no", "input": "", "output": "no"},
        ],
    )
    stream = build_stream(data(Source(kind="jsonl", path=path), held_out=0), tokenizer, seed=0)
    assert tokenizer.decode(stream.tokens()) == (
        "plain<eos>"
        "<user>Hi<eos>\n<assistant>Hello<eos>\n"
        "<user>2+2?<eos>\n<assistant>4<eos>\n"
        "<user>Add\n\n1, 2<eos>\n<assistant>3<eos>\n"
        "<user>Say no<eos>\n<assistant>no<eos>\n"
    )


def test_several_jsonl_files(tokenizer, tmp_path):
    for name, words in {"a": ["one", "two"], "b": ["three"], "c": ["four", "five", "six"]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": word} for word in words])
    stream = build_stream(data(Source(kind="jsonl", path=f"{tmp_path}/*.jsonl"), seq_len=8, held_out=0), tokenizer, 0)
    assert tokenizer.decode(stream.tokens()) == "one<eos>two<eos>three<eos>four<eos>five<eos>six<eos>"


def test_named_field_and_blank_lines(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "no", "body": "yes, this one"}\n\n{"body": "and this é"}')
    source = Source(kind="jsonl", path=str(tmp_path / "d.jsonl"), field="body")
    stream = build_stream(data(source, held_out=0, seq_len=8), tokenizer, seed=0)
    assert tokenizer.decode(stream.tokens()) == "yes, this one<eos>and this é<eos>"


def test_dataset_from_a_folder(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": [f"row {i}" for i in range(100)], "n": list(range(100))})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    parts = {}
    for folder in ("one", "two"):
        options = data(Source(kind="dataset", path=str(tmp_path / folder), field="body"), held_out=0.2)
        for part in ("train", "held_out"):
            tokens = build_stream(options, tokenizer, seed=0, part=part).tokens()
            parts[folder, part] = set(tokenizer.decode(tokens).split("<eos>")) - {""}
    assert parts["one", "train"] | parts["one", "held_out"] == {f"row {i}" for i in range(100)}
    assert not parts["one", "train"] & parts["one", "held_out"]
    assert parts["one", "train"] == parts["two", "train"]
    wrong = Source(kind="dataset", path=str(tmp_path / "two"), split="dev")
    with pytest.raises(LinearizeError, match="no split 'dev'; it has train, test"):
        build_stream(data(wrong), tokenizer, seed=0)
    with pytest.raises(LinearizeError, match=r"row 0: none of text, messages, .*; it has body, n"):
        build_stream(data(Source(kind="dataset", path=str(tmp_path / "one"))), tokenizer, seed=0)


# Texts from the teacher


def test_generated_texts(tokenizer, teacher, tmp_path):
    random_state = torch.random.get_rng_state()
    texts = write_texts(teacher, tokenizer, tokens=3000, seq_len=64, seed=0, cache_dir=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), random_state), "the run's own draws stay as they were"
    assert sum(map(len, texts)) >= 3000
    assert {len(text) for text in texts} == {64}
    starts = {tokenizer.decode(text)[:6] for text in texts}
    assert "<user>" in starts, "a chat, from before the question"
    assert len(starts) > ROWS // 2
    assert len(set(map(tuple, texts))) == len(texts)
    again = write_texts(teacher, tokenizer, tokens=3000, seq_len=64, seed=0)
    assert again == texts
    assert write_texts(teacher, tokenizer, tokens=3000, seq_len=64, seed=1) != texts


def test_generated_texts_continue_after_a_kill(tokenizer, teacher, tmp_path):
    texts = write_texts(teacher, tokenizer, tokens=3000, seq_len=64, seed=0, cache_dir=tmp_path)
    (file,) = tmp_path.glob("generated-*.jsonl")
    whole = file.read_bytes()
    assert whole.count(b"\n") == 3
    file.write_bytes(whole[: len(whole) // 2])  # the last of what is left is half a line
    assert write_texts(teacher, tokenizer, tokens=3000, seq_len=64, seed=0, cache_dir=tmp_path) == texts
    assert file.read_bytes() == whole


def test_finished_texts_are_not_written_again(tokenizer, teacher, tmp_path, monkeypatch):
    settings = {"seq_len": 64, "seed": 0, "cache_dir": tmp_path}
    texts = write_texts(teacher, tokenizer, tokens=2000, **settings)
    more = write_texts(teacher, tokenizer, tokens=3000, **settings)
    assert more[: len(texts)] == texts
    assert len(more) > len(texts)
    monkeypatch.setattr(teacher, "generate", None)
    assert write_texts(teacher, tokenizer, tokens=2000, **settings) == texts


def test_generated_source(tokenizer, teacher, tmp_path):
    options = data(Source(kind="generated", tokens=1000, prompt="Once upon"), Source(kind="pydoc"))
    stream = build_stream(options, tokenizer, seed=0, teacher=teacher, cache_dir=tmp_path)
    generated = [next(stream)["input_ids"] for _ in range(200)][::2]
    assert "Once upon" in tokenizer.decode(torch.cat(generated, 1)[0])
    held = build_stream(options, tokenizer, seed=0, part="held_out")
    only = build_stream(data(Source(kind="pydoc")), tokenizer, seed=0, part="held_out")
    assert torch.equal(held.tokens(), only.tokens()), "what the teacher wrote is never held out"


def test_a_teacher_that_repeats_itself(tokenizer, teacher, monkeypatch):
    def generate(ids, **_):
        return torch.full((len(ids), 40), 7)

    monkeypatch.setattr(teacher, "generate", generate)
    with pytest.raises(LinearizeError, match=r"the teacher wrote \d+ tokens of different texts, 9999 were asked for"):
        write_texts(teacher, tokenizer, tokens=9999, seq_len=64, seed=0)


def test_generated_mistakes(tokenizer, teacher, tmp_path):
    options = data(Source(kind="generated", tokens=100))
    with pytest.raises(LinearizeError, match="no teacher to write the texts"):
        build_stream(options, tokenizer, seed=0)
    with pytest.raises(LinearizeError, match="leaves no text to evaluate on"):
        build_stream(options, tokenizer, seed=0, part="held_out")
    with pytest.raises(LinearizeError, match="the prompt has 40 tokens, a text at most 32; give a shorter prompt"):
        write_texts(teacher, tokenizer, tokens=100, seq_len=32, seed=0, prompt="p" * 40)
    write_texts(teacher, tokenizer, tokens=ROWS, seq_len=64, seed=0, cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text("nonsense\n")
    with pytest.raises(LinearizeError, match="the cache of generated texts is damaged; delete the file"):
        write_texts(teacher, tokenizer, tokens=ROWS, seq_len=64, seed=0, cache_dir=tmp_path)


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "fine"}\nnot json\n', "d.jsonl, line 2: not JSON"),
        ('{"text": "fine"}\n{"text": "cut', "d.jsonl, line 2: not JSON"),
        ('["a"]\n', "d.jsonl, line 1: a JSON object is expected, got list"),
        ('{"text": "fine"}\n\n{"txt": "x"}\n', "d.jsonl, line 3: none of text, messages"),
        ('{"txt": "x", "id": 1}\n', "it has txt, id: set the source's 'field' to the one to read"),
        ('{"text": 3}\n', "line 1: field 'text' is neither a text nor a list of messages"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: field 'messages' is neither a text nor a list of messages"),
        ("", "d.jsonl: the file is empty (0 bytes)"),
        ('{"text": "ten tokens"}\n', "its train part has 11 tokens, one row needs 32; give more text, or lower"),
        ("\n\n", "its train part has 0 tokens, one row needs 32"),
    ],
)
def test_mistakes_in_jsonl(tokenizer, tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(LinearizeError) as caught:
        build_stream(data(Source(kind="jsonl", path=str(tmp_path / "d.jsonl")), held_out=0), tokenizer, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_absent(tokenizer, numbered):
    with pytest.raises(LinearizeError, match=r"docs\.jsonl, line 1: no field 'body'; it has text"):
        build_stream(data(Source(kind="jsonl", path=numbered, field="body")), tokenizer, seed=0)


def test_mistakes_in_text_files(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait" * 10)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "blank.txt").write_text("\n \n" * 30)
    cases = {
        "empty.txt": r"empty\.txt: the file is empty \(0 bytes\)",
        "latin.txt": r"latin\.txt: not UTF-8 at byte 3; convert",
        "missing*.txt": r"missing\*\.txt: no such file .* give a file or a glob that matches",
        "": "a folder, not a file; name its files with a glob",
        "short.txt": r"short\.txt: its train part has 6 tokens, one row needs 32; give more text",
        "blank.txt": r"blank\.txt: its train part has 0 tokens",
    }
    for name, message in cases.items():
        with pytest.raises(LinearizeError, match=message) as caught:
            build_stream(data(Source(kind="text", path=f"{tmp_path}/{name}"), held_out=0), tokenizer, seed=0)
        assert "\n" not in str(caught.value)


def test_a_file_with_brackets_in_its_name(tokenizer, tmp_path):
    (tmp_path / "a[1].txt").write_text("some text " * 20)
    options = data(Source(kind="text", path=str(tmp_path / "a[1].txt")), held_out=0)
    assert len(build_stream(options, tokenizer, seed=0).tokens()) > 190


def test_no_held_out_text(tokenizer, numbered):
    options = data(Source(kind="jsonl", path=numbered), held_out=0)
    with pytest.raises(LinearizeError, match=r"data\.held_out: 0\.0 leaves no text to evaluate on"):
        build_stream(options, tokenizer, seed=0, part="held_out")


def test_datasets_not_installed(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LinearizeError, match=r"'datasets' is not installed; pip install 'linearize\[data\]'"):
        build_stream(data(Source(kind="dataset", path="some/name")), tokenizer, seed=0)


def test_dataset_that_cannot_be_read(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(LinearizeError, match=r"data source dataset .*nowhere.*, split 'train': ") as caught:
        build_stream(data(Source(kind="dataset", path=str(tmp_path / "nowhere"))), tokenizer, seed=0)
    assert "\n" not in str(caught.value)


def test_tokenizers_that_lack_something(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a" * 40, "response": "b"}])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    options = data(Source(kind="jsonl", path=path), held_out=0)
    with pytest.raises(LinearizeError, match="no end-of-text token"):
        build_stream(options, bare, seed=0)
    with pytest.raises(LinearizeError, match="no chat template, which chat messages need"):
        build_stream(data(*options.sources, packing="document", held_out=0), bare, seed=0)
