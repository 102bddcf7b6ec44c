"""What is written of speculative decoding, and of the second real model, is what was measured."""

import re
from pathlib import Path

import pytest

from linearize.benchmarks.distillation_table import table
from linearize.benchmarks.evaluate import KIND as EVALUATE
from linearize.benchmarks.files import read_json
from linearize.benchmarks.speculative import KIND
from linearize.benchmarks.speculative_table import equality_table, speed_table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="results are not in the sdist")
SMOLLM2, QWEN = RESULTS / "smollm2", RESULTS / "qwen2.5-coder"
SPEED = {
    "LoRA merged, two sets of weights": "speculative-apart.json",
    "one set of weights": "speculative-one-set.json",
}
EQUALITY = {
    "student-25": "speculative-equal.json",
    "untrained, W = 16": "speculative-equal-untrained.json",
}


def read(files):
    return [(label, read_json(SMOLLM2 / name, KIND)) for label, name in files.items()]


def test_the_readmes_tables_of_speculative_decoding():
    text = (SMOLLM2 / "README.md").read_text(encoding="utf-8")
    assert speed_table(read(SPEED)) in text
    assert equality_table(read(EQUALITY)) in text


def test_two_hundred_texts_are_the_originals():
    """All of them, or those that are not part at a tie: by no more than rounding moves a logit."""
    for label, result in read(EQUALITY):
        found = result["equality"]
        assert result["dtype"] == "float32"
        assert found["prompts"] == 200, label
        assert found["equal"] + len(found["differences"]) == 200
        assert all(one["margin"] < 1e-3 for one in found["differences"]), label
        assert found["tokens"] > 3000
    trained, untrained = (result["equality"]["acceptance_length"] for _, result in read(EQUALITY))
    assert trained > untrained


def test_the_second_models_table():
    text = (QWEN / "README.md").read_text(encoding="utf-8")
    assert table([("no softmax layer", read_json(QWEN / "transfer-20k.json", EVALUATE))]) in text


@pytest.mark.parametrize("file", [*SMOLLM2.glob("speculative-*.json"), *QWEN.glob("*.*")], ids=lambda file: file.name)
def test_no_folder_of_its_maker(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~/:<-])/(work|tmp|home|root|mnt|Users|opt|var)/", text)
