"""The numerics page: what it says of the kernels is measured rightly, and its tables are those of the results.

Run as a program, this renews the page and the results with the Triton backend in Triton's interpreter, as mended by
`tests/interpreter.py`, where there is no GPU (some 5 minutes on one core):

    python -m tests.test_benchmarks_numerics
"""

import copy
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which importing torch does not do

from linearize.benchmarks.files import read_json, write_json
from linearize.benchmarks.numerics import FULL, KIND, Sizes, _Bench, _tf32, main, measure
from linearize.benchmarks.numerics_page import renew, tables
from linearize.errors import LinearizeError
from linearize.kernels.near_far.memory import Memory, near_far_step
from tests.tolerance import assert_near

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "numerics.json"
PAGE = ROOT / "docs" / "numerics.md"
SMALL = Sizes(
    heads=2,
    kv_heads=1,
    head_dim=16,
    window=16,
    sinks=2,
    feature_dim=16,
    tokens=64,
    gradient_tokens=64,
    scales=(1.0, 1e4),
    lengths=(128, 256),
    reference_length=128,
    tail=32,
    feature_dims=(8, 16),
    decode_lengths=(64, 2048),
    decode_windows=(4,),
)


@pytest.fixture(scope="module")
def committed() -> dict:
    return read_json(RESULTS, KIND)


@pytest.fixture(scope="module")
def data() -> dict:
    """All tables in small."""
    from tests.interpreter import install

    install()
    return measure(SMALL, ("reference", "torch", "triton"))


def errors(data: dict, name: str, column: str = "error", **wanted: object) -> list[float]:
    """The `column` of the table `name`, of the rows that have the wanted values."""
    found = [row[column] for row in data[name] if all(row[key] == value for key, value in wanted.items())]
    assert found
    return found


class TestPage:
    def test_tables_are_those_of_the_results(self, committed) -> None:
        page = PAGE.read_text(encoding="utf-8")
        assert renew(page, tables(committed)) == page
        changed = copy.deepcopy(committed)
        changed["decode"][-1]["far"] *= 2
        assert renew(page, tables(changed)) != page

    def test_results_cover_what_is_measured(self, committed) -> None:
        assert committed["sizes"] == json_sizes(FULL)
        backends, dtypes = 3, 3
        assert len(committed["logits"]) == 2 * 5 * backends * dtypes
        assert len(committed["gradients"]) == 2 * 6 * backends * dtypes
        assert len(committed["features"]) == 5 * backends * dtypes
        assert len(committed["lengths"]) == (4 + 4 + 2) * dtypes  # the T x T form stops at 4096
        assert {row["backend"] for row in committed["lengths"] if row["length"] == 65536} == {"torch", "triton"}

    def test_what_the_prose_says(self, committed) -> None:
        """The sentences of the page that have numbers in them."""
        rounded = {
            name: {row["scale"]: row["error"] for row in committed["inherent"] if row["rounded"] == name}
            for name in ("q·k to float32", "the output to bfloat16")
        }
        for scale, inherent in rounded["q·k to float32"].items():
            assert max(errors(committed, "logits", dtype="float32", scale=scale)) < 7 * inherent
        assert max(errors(committed, "logits", dtype="bfloat16")) < 1.3 * rounded["the output to bfloat16"][1.0]
        for scale in rounded["q·k to float32"]:
            wanted = {"mix": "gate", "scale": scale}
            (torch_error,) = errors(committed, "logits", dtype="float16", backend="torch", **wanted)
            (triton_error,) = errors(committed, "logits", dtype="float16", backend="triton", **wanted)
            assert triton_error < 7 * torch_error
            assert triton_error < min(errors(committed, "logits", dtype="bfloat16", **wanted))
        assert max(errors(committed, "lengths", dtype="float32")) < 2e-7
        assert max(errors(committed, "growth", "update_s")) < 5e-7
        assert 17 < 65504 / max(errors(committed, "growth", "s")) < 18.5

    def test_what_the_prose_says_of_bfloat16_states(self, committed) -> None:
        rounded = max(errors(committed, "inherent", rounded="the output to bfloat16"))
        assert 1.6e-3 < rounded < 1.75e-3
        with_mean = [row for row in committed["decode"] if row["mean"]]
        assert {row["chunks"] for row in with_mean} >= {62, 126, 254, 510, 1022}
        for row in with_mean:
            chunks, output = row["chunks"], row["out"] / rounded
            assert output < 0.5 if chunks <= 62 else output > 2
            assert output < 3 or chunks > 126
            assert row["out"] > 0.03 or chunks < 254
            assert row["kept"] > 1 or chunks != 254
            assert row["kept"] < 0.85 or chunks < 510
        assert max(row["far"] for row in committed["decode"] if not row["mean"]) < 0.01

    def test_markers_and_tables_have_the_same_names(self, committed) -> None:
        found = tables(committed)
        page = PAGE.read_text(encoding="utf-8").replace("<!-- numbers: weights -->", "<!-- numbers: wages -->")
        with pytest.raises(LinearizeError, match="wages"):
            renew(page, found)

    def test_renewed_tables_replace_old_ones(self) -> None:
        page = "before\n<!-- numbers: a -->\nold\nold\n<!-- end -->\nafter\n<!-- numbers: b -->\n<!-- end -->\n"
        new = "before\n<!-- numbers: a -->\n1\n<!-- end -->\nafter\n<!-- numbers: b -->\n2\n<!-- end -->\n"
        assert renew(page, {"a": "1", "b": "2"}) == new

    def test_what_is_not_finite_is_said(self, committed) -> None:
        changed = copy.deepcopy(committed)
        changed["features"][0]["error"] = None
        assert "not finite" in tables(changed)["features"]
        assert "not finite" not in tables(committed)["features"]


@pytest.mark.interpret
class TestMeasure:
    def test_errors_are_of_the_dtype(self, data) -> None:
        for backend in ("reference", "torch", "triton"):
            for dtype, low, high in (("float32", 1e-8, 1e-6), ("float16", 1e-4, 6e-4), ("bfloat16", 1e-3, 4e-3)):
                for mix in ("normalizer", "gate"):
                    (error,) = errors(data, "logits", mix=mix, dtype=dtype, backend=backend, scale=1.0)
                    assert low < error < high
                for name in ("features", "lengths"):
                    assert all(low < error < high for error in errors(data, name, dtype=dtype, backend=backend))
                for of in ("q", "k", "v"):
                    found = errors(data, "gradients", of=of, dtype=dtype, backend=backend, scale=1.0)
                    assert all(low < error < 2 * high for error in found)

    def test_large_logits(self, data) -> None:
        """Errors are about those that rounding the logits makes by itself, and no larger in 16 bits than elsewhere."""
        (inherent,) = errors(data, "inherent", rounded="q·k to float32", scale=1e4)
        found = errors(data, "logits", dtype="float32", scale=1e4)
        assert max(found) < max(20 * inherent, 1e-5)
        assert max(errors(data, "logits", dtype="bfloat16", scale=1e4)) < 4e-3

    def test_two_terms_of_the_weights(self, data) -> None:
        for norm in SMALL.norms:
            (one,) = errors(data, "weights", dtype="bfloat16", norm=norm, terms=1)
            (two,) = errors(data, "weights", dtype="bfloat16", norm=norm, terms=2)
            assert one > 1e-3
            assert two < 2e-5

    def test_a_bfloat16_state_stops_growing(self, data) -> None:
        early, late = (errors(data, "decode", "kept", mean=1.0, length=length)[0] for length in (64, 2048))
        assert abs(early - 1) < 0.01
        assert late < 0.95  # after 510 chunks
        assert errors(data, "decode", "far", mean=1.0, length=2048)[0] > 0.05
        assert max(errors(data, "decode", "out_float32")) < 2e-6

    def test_results_can_be_written_and_shown(self, data, tmp_path) -> None:
        write_json(tmp_path / "numerics.json", data)
        found = tables(read_json(tmp_path / "numerics.json", KIND))
        assert found == tables(data)
        assert "| bfloat16 | triton |" in found["features"]
        assert "interpreter" in found["machine"] or torch.cuda.is_available()

    def test_without_triton(self) -> None:
        tiny = Sizes(heads=1, kv_heads=1, head_dim=4, window=4, sinks=0, feature_dim=4, tokens=16, gradient_tokens=16,
                     scales=(1.0,), gradient_cases=(("gate", 1.0),), lengths=(16,), tail=8, feature_dims=(4,),
                     decode_lengths=(16,), decode_windows=(4,))  # fmt: skip
        data = measure(tiny, ("reference", "torch"))
        assert data["triton"] is None
        assert "not run" in tables(data)["machine"]


class TestParts:
    bench = _Bench(SMALL, ("torch",), torch.device("cpu"))

    def test_definition_from_logits(self) -> None:
        """What the inherent errors are measured with is the definition, where nothing is rounded."""
        inputs = self.bench.inputs(64, 3.0)
        assert_near(self.bench.from_logits(inputs), self.bench.attend(inputs, "reference"))

    def test_scale_is_that_of_the_logits(self) -> None:
        inputs = self.bench.inputs(512, 100.0)
        assert abs(float((inputs.q @ inputs.k.mT / 4).std()) / 100 - 1) < 0.1

    def test_tf32(self) -> None:
        x = torch.tensor([1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3 * (1 + 2**-12), 0.0, 2.0**-100, 2.0**100])
        assert _tf32(x.double()).tolist() == [1 + 2**-10, 1 + 2**-10, 1, -3, 0, 2.0**-100, 2.0**100]

    def test_pieces_round_as_single_tokens_do(self) -> None:
        """The table of 16-bit states feeds a chunk at a time; decoding gives the same state."""
        inputs = self.bench.inputs(96, mean=1.0).to(torch.float32)
        memories = []
        with torch.no_grad():
            for size in (8, 1):
                memory = Memory.empty(inputs.k, inputs.v, inputs.mixer, window=8, sinks=2, state_dtype=torch.bfloat16)
                for first in range(0, 96, size):
                    q, k, v = (x[:, :, first : first + size] for x in (inputs.q, inputs.k, inputs.v))
                    _, memory = near_far_step(q, k, v, memory, inputs.mixer, window=8, sinks=2, backend="torch")
                memories.append(memory)
        pieces, tokens = (memory.state for memory in memories)
        assert pieces.s.dtype == tokens.s.dtype == torch.bfloat16
        # A sum in another order may fall on the other side of a tie: rarely, and by one unit.
        assert (pieces.s != tokens.s).float().mean() < 0.01
        assert_near(pieces.z, tokens.z)
        exact = inputs.mixer.empty_state(inputs.k, inputs.v)
        exact = inputs.mixer.update(exact, inputs.mixer.key_features(inputs.k[:, :, 2:80]), inputs.v[:, :, 2:80])
        assert (pieces.s.float() - exact.s).abs().max() > 1e-3


class TestCommand:
    def test_out(self, tmp_path, monkeypatch, committed) -> None:
        monkeypatch.setattr("linearize.benchmarks.numerics.measure", lambda sizes, backends: committed)
        before = PAGE.read_text(encoding="utf-8")
        main(["--out", str(tmp_path)])
        assert read_json(tmp_path / "numerics.json", KIND) == committed
        assert tables(committed)["decode"] in (tmp_path / "numerics.md").read_text(encoding="utf-8")
        assert PAGE.read_text(encoding="utf-8") == before

    def test_no_checkout(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("linearize.__file__", str(tmp_path / "linearize" / "__init__.py"))
        with pytest.raises(LinearizeError, match="--out"):
            main([])


def json_sizes(sizes: Sizes) -> dict:
    """`sizes` as JSON holds it, lists for tuples."""
    return json.loads(json.dumps(asdict(sizes)))


if __name__ == "__main__":
    from tests.interpreter import install

    install()
    main(sys.argv[1:], backends=("reference", "torch", "triton"))
