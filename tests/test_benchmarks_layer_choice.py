"""Choices of layers judged by what they leave together, on a tiny model."""

import json

import pytest
import torch
import torch.nn.functional as F

from linearize import LinearizeConfig, convert
from linearize.benchmarks.files import read_json
from linearize.benchmarks.layer_choice import KIND, bench_layer_choice, main, markdown
from linearize.distill.data import build_stream
from linearize.distill.options import DataOptions, Source
from linearize.models import load_model, load_tokenizer
from tests.saved_models import save_tiny_model

LENGTH, WINDOW = 64, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    save_tiny_model(folder / "original", num_hidden_layers=4)
    (folder / "text.txt").write_text("\n".join(f"{number}. They keep what they saw.\n" for number in range(2000)))
    return folder


def make_stream(place, tokenizer):
    sources = (Source(kind="text", path=str(place / "text.txt")),)
    return build_stream(DataOptions(sources=sources, seq_len=LENGTH), tokenizer, 0)


@pytest.fixture(scope="module")
def found(place):
    model, _ = load_model(str(place / "original"), torch.float32)
    convert(model, LinearizeConfig(mixer="none", window=WINDOW, sinks=2))
    tokenizer = load_tokenizer(str(place / "original"))
    return bench_layer_choice(model, tokenizer, make_stream(place, tokenizer), [1, 2], rows=2, gaps=(20, 90))


def test_every_way_makes_a_choice_of_every_size(found):
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["window"], found["gaps"]) == (KIND, WINDOW, [20, 90])
    assert set(found["scores"]) == {"lazy", "swap", "recall"}
    sizes = sorted((choice["by"], len(choice["kept"])) for choice in found["choices"])
    ways = [(by, count) for by in ("lazy", "recall", "swap", "uniform") for count in (1, 2)]
    assert sizes == sorted([("all", 4), ("none", 0), *ways])
    for choice in found["choices"]:
        if choice["by"] in found["scores"]:
            scores = found["scores"][choice["by"]]
            best = sorted(scores, key=lambda layer: -scores[layer])[: len(choice["kept"])]
            assert choice["kept"] == sorted(map(int, best))


def test_a_choice_is_judged_by_the_model_that_it_makes(place, found):
    """KL of the model converted with that list, over rows that no score has seen."""
    tokenizer = load_tokenizer(str(place / "original"))
    stream = make_stream(place, tokenizer)
    filler = 1 + sum(gap + 16 * 5 for gap in (64, 32)) // LENGTH
    for _ in range(2 + filler):
        next(stream)
    rows = [next(stream)["input_ids"] for _ in range(2)]
    original, _ = load_model(str(place / "original"), torch.float32)
    for choice in found["choices"]:
        changed, _ = load_model(str(place / "original"), torch.float32)
        if choice["by"] == "all":
            assert choice["kl"] == 0
            continue
        kept = tuple(choice["kept"])
        convert(changed, LinearizeConfig(mixer="none", window=WINDOW, sinks=2, softmax_layers=kept))
        with torch.no_grad():
            p, q = (
                torch.cat([model(input_ids=row).logits.flatten(0, 1) for row in rows]).log_softmax(-1)
                for model in (original, changed)
            )
        assert choice["kl"] == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-4)
        assert choice["kl"] > 1e-5


def test_recall_is_the_share_of_digits_that_come_first(found, monkeypatch):
    from linearize.benchmarks import layer_choice

    class Copies(torch.nn.Module):
        """Puts the next token of `text` first in its logits, but at one answer of four."""

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            following = input_ids.roll(-1, dims=1)
            following[0, [4]] += 1
            return type("Said", (), {"logits": F.one_hot(following, 50).float()})

    text = layer_choice.Facts(torch.arange(10).view(1, 10), ((5, 6), (8, 9)))
    nothing = lambda *args: torch.no_grad()  # noqa: E731
    monkeypatch.setattr(layer_choice, "only_converted", nothing)
    monkeypatch.setattr(layer_choice, "original_attention", nothing)
    monkeypatch.setattr(layer_choice, "base_model", lambda model: model)
    model, rows = Copies(), [torch.zeros(1, 8, dtype=torch.long)]
    assert [judgement["recall"] for judgement in layer_choice._judge(model, [[], [1]], rows, [text])] == [
        [0.75],
        [0.75],
    ]


def test_the_command(place, capsys):
    out = place / "choice.json"
    words = [str(place / "original"), "--text", str(place / "text.txt"), "--keep", "25%", "--window", str(WINDOW)]
    main([*words, "--rows", "1", "--seq-len", "128", "--dtype", "float32", "--out", str(out)])
    written = read_json(out, KIND)
    assert written["dtype"] == "float32"
    printed = capsys.readouterr().out.splitlines()
    assert printed == markdown(written).splitlines()
    assert len(printed) == 2 + 6
    assert printed[2].startswith("| 4 | all |  | 0.000 |")
    assert printed[-1].startswith("| 0 | none |  | ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "lots"], "error: keep: "),
        (["--rows", "0"], "error: rows: 0 is out of range"),
        (
            ["--window", "512"],
            "error: window: 512 reaches over up to 1023 tokens, recall is judged over gaps",
        ),
        (["--seq-len", "2048", "--rows", "30"], "error: text: it ends before everything is drawn"),
    ],
)
def test_mistakes(place, words, message):
    text = ["--text", str(place / "text.txt"), "--dtype", "float32", "--window", "8"]
    with pytest.raises(SystemExit, match=message):
        main([str(place / "original"), *text, *words])
