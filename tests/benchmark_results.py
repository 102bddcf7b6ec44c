"""Results for the report's tests: fabricated measurements, run through the code that makes the real results."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from linearize.benchmarks import decode
from linearize.benchmarks.choices import summarise_choices
from linearize.benchmarks.evaluate import BASELINE, KIND, _comparisons
from linearize.benchmarks.items import Item
from linearize.benchmarks.machine import machine_info
from linearize.benchmarks.measurement import Run
from linearize.benchmarks.modes import MODES
from linearize.benchmarks.needle import summarise_needles
from linearize.benchmarks.perplexity import summarise_perplexity
from linearize.benchmarks.probe import CacheLayer, Probe
from linearize.benchmarks.speed import Sample

__all__ = ["fabricate_bench", "fabricate_evaluation", "fabricate_log", "make_probe", "sentence_about"]


def fabricate_evaluation(
    nll: dict[str, float],
    right: dict[str, float] | None = None,
    found: dict[str, int] | None = None,
    sequences: int = 16,
    seq_len: int = 257,
    noise: float = 0.02,
) -> dict[str, Any]:
    """An evaluate.json.

    Args:
        nll: row -> mean NLL; all rows share the text's difficulty, each sequence adds `noise` of its own.
        right: row -> share of 100 questions of four choices that are answered rightly.
        found: row -> how many of the nine needles are found, the shortest first.
    """
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(sequences, seq_len - 1, generator=generator)
    values = {}
    for row, mean in nll.items():
        own = noise * torch.randn(sequences, 1, generator=generator)
        # Centred, so that a row's mean is what was asked for.
        values[row] = mean + text - text.mean() + own - own.mean()
    items = [Item(f"question {n}", ("a", "b", "c", "d"), n % 4) for n in range(100)]
    scores = {
        row: [[float(c == (item.gold if n < 100 * share else (item.gold + 1) % 4)) - 1 for c in range(4)]
              for n, item in enumerate(items)]
        for row, share in (right or {}).items()
    }  # fmt: skip
    grid = [(length, depth) for length in (256, 512, 1024) for depth in (0.1, 0.5, 0.9)]
    needles = {
        row: [
            {"length": length, "depth": depth, "keys": 1, "kind": "digits"}
            | {"greedy": n < count, "rank": 1 if n < count else 5, "text": ""}
            for n, (length, depth) in enumerate(grid)
        ]
        for row, count in (found or {}).items()
    }
    return {
        "kind": KIND,
        "schema": 1,
        "baseline": BASELINE,
        "rows": list(nll),
        "seed": 0,
        "seconds": dict.fromkeys(nll, 1.0),
        "perplexity": summarise_perplexity(values, _comparisons(list(nll))),
        "choices": summarise_choices(scores, items, BASELINE) if right else None,
        "needle": summarise_needles(needles) if found else None,
        "notes": [],
        "machine": machine_info(seed=0, command=["linearize", "evaluate", "runs/demo"]),
    }


def make_probe(*modes: str, per_token: int = 100, period: int = 1) -> Probe:
    """What a row is found to be: one layer of `per_token` bytes, on the CPU."""
    return Probe(
        modes=tuple(MODES[name] for name in modes),
        device=torch.device("cpu"),
        dtype=torch.float32,
        weight_bytes=1000,
        period=period,
        layers=(CacheLayer(0, per_token),),
        token_bytes=0,
        logits_bytes=0,
    )


def fabricate_bench(
    monkeypatch: pytest.MonkeyPatch, ms: dict[str, dict[int, float]], noise: float = 0.02, **options: Any
) -> dict[str, Any]:
    """A bench.json of `bench_decode` itself, with fabricated times.

    Args:
        ms: `"original"`, other rows, and `"static"` (the original under StaticCache) -> context -> ms per token.
        noise: relative size of the random part of each repeat's time.
        options: of `bench_decode`; nothing is filled in if `fill` is left out.
    """
    generator = torch.Generator().manual_seed(1)
    current = [BASELINE]
    contexts = sorted(ms[BASELINE])

    def row(name: str):
        @contextmanager
        def enter():
            current[0] = name
            yield nn.Linear(1, 1)

        return enter

    def measure(model: nn.Module, run: Run) -> Sample:
        length = run.prompt.shape[1] + run.filled
        context = min(contexts, key=lambda c: abs(c - length))
        mean = ms["static" if run.mode.static else current[0]][context]
        mean *= 1 + noise * float(torch.rand((), generator=generator) - 0.5)
        original = current[0] == BASELINE
        held = 23040 * context * 2 if original else 5_000_000
        parts = {"softmax": held, "window": 0, "state": 0} if original else {"softmax": 0, "window": held, "state": 0}
        steps = (mean,) * run.decode_tokens
        return Sample(None if run.filled else 100 * mean, steps, parts | {"total": held}, run.filled)

    def probe(model: nn.Module) -> Probe:
        return make_probe("dynamic", "static") if current[0] == BASELINE and "static" in ms else make_probe("dynamic")

    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode, "measure_prefill", lambda model, prompt: prompt.shape[1] / 10)
    monkeypatch.setattr(decode, "matmul_ms", lambda device: 1.0)
    monkeypatch.setattr(decode, "probe", probe)
    rows = {name: row(name) for name in ms if name != "static"}
    return decode.bench_decode(rows, contexts, torch.arange(50), **{"fill": None} | options)


def fabricate_log() -> list[dict[str, Any]]:
    """A train.jsonl of two stages, as records."""
    layers = 30
    transfer = [
        {
            "stage": "transfer",
            "step": step,
            "tokens": 1024 * step,
            "loss": 0.8 * 0.97**step + 0.1,
            "lr": 0.01,
            "tokens_per_s": 900.0 + step,
            "losses_per_layer": {str(n): (0.8 * 0.97**step + 0.1) / (1 + n / 8) for n in range(layers)},
        }
        for step in range(1, 60, 5)
    ]
    distill = [
        {"stage": "distill", "step": s, "tokens": 1024 * s, "loss": 0.6 * 0.99**s, "lr": 2e-4, "tokens_per_s": 400.0}
        for s in range(1, 40, 5)
    ]
    return transfer + distill


def sentence_about(sentences: list[Any], start: str) -> Any:
    """The one sentence that begins with `start`."""
    (found,) = [sentence for sentence in sentences if sentence.text.startswith(start)]
    return found
