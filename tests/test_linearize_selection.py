"""Choosing layers from scores: the arithmetic of limits, the recipe's line, and the command."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from linearize import LinearizeConfig, LinearizeError, cache_bytes, convert
from linearize.cli import app
from linearize.console import parse_bytes
from linearize.distill.recipe import load_recipe
from linearize.selection import (
    LayerCosts,
    choose_layers,
    choose_within,
    keeping_costs,
    parse_keep,
    uniform_layers,
    uniform_within,
    write_softmax_layers,
)
from tests.saved_models import save_tiny_model
from tests.tiny_models import make_config, make_model, make_tokens

PRESETS = Path(__file__).resolve().parents[1] / "distill" / "recipes"


class TestChoice:
    def test_uniform_is_every_nth_where_that_fits(self) -> None:
        for layers, every in ((30, 3), (28, 4), (12, 2), (16, 16)):
            kept = LinearizeConfig(softmax_layers=f"every:{every}").kept_layers(layers)
            assert uniform_layers(range(layers), layers // every) == kept
        assert uniform_layers(range(30), 8) == (2, 6, 10, 14, 17, 21, 25, 29)
        assert uniform_layers((1, 3, 5, 7), 2) == (3, 7)

    def test_the_highest_scores_stay(self) -> None:
        assert choose_layers({0: 0.1, 1: 0.5, 2: 0.5, 3: -1.0, 4: 0.7}, 2) == (1, 4)
        assert choose_layers({5: 0.1, 7: 0.2}, 1) == (7,)

    def test_of_layers_that_cost_the_same_no_choice_is_better(self) -> None:
        draw = random.Random(0)
        for _ in range(30):
            scores = {index: draw.random() for index in range(7)}
            costs = LayerCosts(1024, 50, dict.fromkeys(range(7), 10))
            limit = draw.randrange(50, 120)
            fitting = (
                kept for n in range(8) for kept in itertools.combinations(range(7), n) if costs.total(kept) <= limit
            )
            best = max(fitting, key=lambda kept: sum(scores[i] for i in kept))
            assert choose_within(scores, costs, limit) == best

    def test_score_by_byte_counts_where_layers_cost_differently(self) -> None:
        costs = LayerCosts(1024, 0, {0: 100, 1: 10, 2: 10, 3: 95, 4: -5})
        scores = {0: 1.0, 1: 0.3, 2: 0.2, 3: 1.1, 4: -3.0}
        assert choose_within(scores, costs, 20) == (1, 2, 4), "4 makes the cache smaller"
        assert choose_within(scores, costs, 100) == (1, 2, 4), "3 has the better score but no longer fits"
        assert choose_within(scores, costs, 110) == (1, 2, 3, 4)

    def test_harm_comes_last_however_dear(self) -> None:
        costs = LayerCosts(1024, 0, {0: 1, 1: 1000, 2: 10})
        assert choose_within({0: -1.0, 1: -2.0, 2: 0.1}, costs, 10) == (2,)
        assert choose_within({0: -1.0, 1: -2.0, 2: 0.1}, costs, 1010) == (0, 2)

    def test_a_limit_without_a_choice_is_an_error(self) -> None:
        costs = LayerCosts(8192, 2000, {0: 10, 1: 10})
        with pytest.raises(LinearizeError, match=r"1\.0 KiB is less than the 2\.0 KiB that are left at 8k"):
            choose_within({0: 1.0, 1: 1.0}, costs, 1024)
        for choose in (lambda: choose_within({0: 1.0, 1: 1.0}, costs, 2020), lambda: uniform_within(costs, 2020)):
            with pytest.raises(LinearizeError, match="has room for the original's own"):
                choose()

    def test_uniform_fills_a_limit(self) -> None:
        costs = LayerCosts(1024, 100, dict.fromkeys(range(8), 10))
        assert uniform_within(costs, 129) == (3, 7)
        assert uniform_within(costs, 100) == ()

    @pytest.mark.parametrize(("text", "count"), [("8", 8), ("25%", 8), ("50%", 15), ("2%", 1), (" 10 % ", 3)])
    def test_keep(self, text: str, count: int) -> None:
        assert parse_keep(text, 30) == count

    @pytest.mark.parametrize("text", ["", "x", "8.5", "-1", "0", "30", "100%", "1%", "25 percent"])
    def test_no_keep(self, text: str) -> None:
        with pytest.raises(LinearizeError, match=r"^keep: "):
            parse_keep(text, 30)

    def test_bytes(self) -> None:
        given = {"50MB": 50_000_000, "1.5 KiB": 1536, "7": 7, "2gib": 2**31, "3 B": 3}
        assert {text: parse_bytes(text, "cache_bytes") for text in given} == given
        for text in ("", "MB", "5 XB", "-1", "1e6"):
            with pytest.raises(LinearizeError, match=r"^cache_bytes: "):
                parse_bytes(text, "cache_bytes")


class TestCosts:
    @pytest.mark.parametrize("mixer", ["none", "hedgehog"])
    def test_they_are_the_bytes_of_a_real_cache(self, mixer: str) -> None:
        """Whichever layers stay: the prediction for them is what a cache then holds."""
        tokens = make_tokens(1, 48)
        plain = LinearizeConfig(mixer=mixer, window=4, sinks=2)
        costs = keeping_costs(make_config("llama"), plain, 48, "float32")
        for kept in ((), (1,), (0, 2)):
            config = LinearizeConfig(mixer=mixer, window=4, sinks=2, softmax_layers=kept)
            with torch.no_grad():
                cache = convert(make_model("llama"), config)(input_ids=tokens, use_cache=True).past_key_values
            assert costs.total(kept) == cache_bytes(cache)["total"]

    def test_a_sliding_layer_is_no_choice(self) -> None:
        own = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        model_config = make_config("qwen3", use_sliding_window=True, **own)
        costs = keeping_costs(model_config, LinearizeConfig(window=4), 4096, "bfloat16")
        assert sorted(costs.extra) == [0, 2]
        assert keeping_costs(model_config, LinearizeConfig(window=4), 1, "bfloat16").extra[0] < 0


RECIPE = """\
# mine
model: somewhere  # softmax_layers: not here
convert:  # of layers
  mixer: hedgehog
  softmax_layers:  {value}  # none, every:4 or a list
  window: 64
data: {{sources: [{{kind: pydoc}}]}}
"""


class TestRecipe:
    @pytest.mark.parametrize("value", ["none", "every:4", "[1, 2]", "'none'", "", "null"])
    def test_one_line_changes_and_its_comment_stays(self, tmp_path: Path, value: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(value=value))
        write_softmax_layers(path, (3, 11))
        before, after = RECIPE.format(value=value).splitlines(), path.read_text().splitlines()
        assert [n for n in range(len(before)) if before[n] != after[n]] == [4]
        assert " ".join(after[4].split()) == "softmax_layers: [3, 11] # none, every:4 or a list"
        assert load_recipe(path).convert.softmax_layers == (3, 11)

    def test_line_ends_and_a_file_without_a_last_one_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(b"name: x\r\nconvert:\r\n  softmax_layers: none")
        write_softmax_layers(path, (1,))
        assert path.read_bytes() == b"name: x\r\nconvert:\r\n  softmax_layers: [1]"
        path.write_bytes(b"convert:\r\n  softmax_layers: none # x\r\n  window: 8\r\n")
        write_softmax_layers(path, (1,))
        assert path.read_bytes() == b"convert:\r\n  softmax_layers: [1] # x\r\n  window: 8\r\n"

    @pytest.mark.parametrize(
        "text",
        [
            "convert: {softmax_layers: none}\n",
            "convert:\n  window: 8\nother:\n  softmax_layers: none\n",
            "convert:\n  softmax_layers:\n    - 1\n    - 2\n",
            "convert:\n  window: 8\n",
            "data: {}\n",
            "- convert\n",
        ],
    )
    def test_without_a_line_of_its_own_nothing_is_written(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(LinearizeError, match=r"softmax_layers: none$"):
            write_softmax_layers(path, (1,))
        assert path.read_text() == text

    def test_what_is_no_yaml_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(LinearizeError, match="'demo' is no file; give a recipe's YAML"):
            write_softmax_layers(Path("demo"), (1,))
        (tmp_path / "x.yaml").write_text("convert: [")
        with pytest.raises(LinearizeError, match=r"x\.yaml is not valid YAML"):
            write_softmax_layers(tmp_path / "x.yaml", (1,))

    def test_the_default_preset_has_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "copy.yaml"
        path.write_text((PRESETS / "default.yaml").read_text())
        write_softmax_layers(path, (0, 5))
        assert yaml.safe_load(path.read_text())["convert"]["softmax_layers"] == [0, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=4)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


SMALL = ("--window", 4, "--sinks", 2, "--seq-len", 48, "--rows", 1, "--dtype", "float32")


class TestCommand:
    @pytest.mark.parametrize("by", ["uniform", "lazy", "swap", "recall"])
    def test_every_score_chooses_and_writes(self, model: Path, tmp_path: Path, by: str) -> None:
        recipe, found = tmp_path / "recipe.yaml", tmp_path / "layers.json"
        recipe.write_text(RECIPE.format(value="none"))
        result = call("select", model, "--by", by, "--keep", "50%", *SMALL, "--out", found, "--write", recipe)
        assert result.exit_code == 0, result.output
        written = json.loads(found.read_text())
        kept = written["softmax_layers"]
        assert len(kept) == 2
        assert f"softmax_layers: {kept}" in result.stdout
        assert load_recipe(recipe).convert.softmax_layers == tuple(kept)
        scores = {int(index): score for index, score in written["scores"].items()}
        if by == "uniform":
            assert kept == [1, 3]
            assert not scores
        else:
            assert tuple(kept) == choose_layers(scores, 2)
            assert len(set(scores.values())) == 4
            table = [line for line in result.stdout.splitlines() if "#" in line]
            assert "#" * 24 in table[0]
            assert "stays softmax" in table[0]

    def test_a_picture(self, model: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        picture = tmp_path / "layers.png"
        result = call("select", model, "--by", "lazy", *SMALL, "--out", picture)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_limit_of_bytes_holds(self, model: Path, tmp_path: Path) -> None:
        # 2 kv heads of 16 in float32: 256 bytes a token and layer as softmax.
        costs = keeping_costs(
            make_config("llama", num_hidden_layers=4), LinearizeConfig(window=4, sinks=2), 1024, "float32"
        )
        limit = costs.total((0, 1)) + 100
        found = tmp_path / "layers.json"
        result = call(
            "select", model, "--by", "lazy", *SMALL, "--cache-bytes", limit, "--context", "1k", "--out", found
        )
        assert result.exit_code == 0, result.output
        written = json.loads(found.read_text())
        assert len(written["softmax_layers"]) == 2
        assert written["cache_bytes"] == costs.total((0, 1))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--by", "magic"], "by: 'magic' is unknown; use one of uniform, lazy, swap, recall"),
            (["--keep", "9"], "keep: 9 is 9 of the 4 layers"),
            (["--keep", "2", "--cache-bytes", "1MB"], "cache_bytes: 1MB and keep 2 are two limits"),
            (["--cache-bytes", "1KB"], "cache_bytes: 1.0 KiB is less than"),
            (["--cache-bytes", "1TB"], "cache_bytes: '1TB' is not a number of bytes"),
            (["--context", "1k,2k"], "context: '1k,2k' names several lengths"),
            (["--out", "x.pdf"], "out: 'x.pdf' ends in neither .json nor .png"),
            (["--by", "uniform", "--text", "x.txt"], "text: 'x.txt' is given, and uniform reads no text"),
            (["--by", "uniform", "--out", "x.png"], "out: uniform measures nothing"),
            (["--write", "nowhere.yaml"], "write: 'nowhere.yaml' is no file"),
            (["--text", "nowhere/*.txt"], "nowhere/*.txt"),
            (["--seq-len", "8", "--window", "4"], "seq_len: in rows of 8 tokens nothing has left a window of 4"),
        ],
    )
    def test_a_mistake_is_one_line(self, model: Path, words: list[str], message: str) -> None:
        result = call("select", model, "--by", "lazy", "--dtype", "float32", *words)
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = [x for x in result.stderr.splitlines() if not x.startswith("dtype: ")]
        assert line.startswith("error: ")
        assert message in line

    def test_a_student_is_refused(self, model: Path, tmp_path: Path) -> None:
        for kind in ([], ["--adapter"]):
            student = tmp_path / f"student{len(kind)}"
            assert call("convert", model, student, "--window", 4, *kind).exit_code == 0
            result = call("select", student, *SMALL)
            assert result.exit_code == 2
            assert "is a student, whose layers are chosen already" in result.stderr
