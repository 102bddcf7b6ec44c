"""The tables of docs/scaling.md: memory per GPU by the shape of a model, as `linearize inspect --train` computes it.

python -m linearize.benchmarks.scaling_page          # renews the page, where it is run in a checkout
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.benchmarks.numerics_page import renew
from linearize.config import LinearizeConfig
from linearize.console import human_bytes
from linearize.training_memory import TrainingMemory, training_memory

__all__ = ["SHAPES", "main", "tables"]

_COLUMNS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
# Published shapes of each size, as (family, numbers in the order of _COLUMNS).
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "0.5B": ("qwen2", (151936, 896, 4864, 24, 14, 2, 64, 1)),
    "1.5B": ("qwen2", (151936, 1536, 8960, 28, 12, 2, 128, 1)),
    "1.7B": ("qwen3", (151936, 2048, 6144, 28, 16, 8, 128, 1)),
    "3B": ("llama", (128256, 3072, 8192, 28, 24, 8, 128, 1)),
    "8B": ("llama", (128256, 4096, 14336, 32, 32, 8, 128, 0)),
    "14B": ("qwen3", (151936, 5120, 17408, 40, 40, 8, 128, 0)),
    "32B": ("qwen3", (151936, 5120, 25600, 64, 64, 8, 128, 0)),
    "70B": ("llama", (128256, 8192, 28672, 80, 64, 8, 128, 0)),
}
CONFIG = LinearizeConfig()
SETTING: dict[str, Any] = {"seq_len": 1024, "batch_size": 8, "dtype": "bfloat16"}
GPUS = 8
EXAMPLE = "8B"


def model_config(size: str) -> Any:
    """The transformers configuration of a shape of `SHAPES`."""
    from transformers import AutoConfig

    family, numbers = SHAPES[size]
    values = dict(zip(_COLUMNS, numbers, strict=True))
    return AutoConfig.for_model(family, **values | {"tie_word_embeddings": bool(values["tie_word_embeddings"])})


def tables() -> dict[str, str]:
    """Every table of the page as Markdown, by the name of its markers."""
    whole = {size: training_memory(model_config(size), CONFIG, **SETTING) for size in SHAPES}
    divided = {
        size: training_memory(model_config(size), CONFIG, processes=GPUS, fsdp=True, **SETTING) for size in SHAPES
    }
    return {
        "shapes": _table(
            ["size", "family", "vocabulary", "hidden", "MLP", "layers", "heads", "kv heads", "head_dim", "parameters"],
            [
                [size, family, *map(str, numbers[:-1]), f"{whole[size].parameters / 1e9:.2f}e9"]
                for size, (family, numbers) in SHAPES.items()
            ],
        ),
        "whole": _totals(whole, ["transfer", "LoRA", "LoRA, checkpointing", "all, checkpointing"]),
        "divided": _totals(divided, ["transfer", "LoRA", "LoRA, checkpointing"]),
        "parts": _parts(whole[EXAMPLE]),
    }


def _totals(plans: dict[str, TrainingMemory], head: Sequence[str]) -> str:
    wanted = [("transfer", False), ("distill, lora", False), ("distill, lora", True), ("distill, full", True)]
    rows = []
    for size, plan in plans.items():
        found = {(stage.stage, stage.checkpointing): stage.total for stage in plan.stages}
        rows.append([size, *(_gib(found[key]) for key in wanted if key in found)])
    return _table(["size", *head], rows)


def _parts(plan: TrainingMemory) -> str:
    names = ("weights", "teacher", "trained", "kept", "logits", "layer", "total")
    rows = [
        [
            f"{stage.stage}, checkpointing" if stage.checkpointing else stage.stage,
            *(human_bytes(getattr(stage, name)) if getattr(stage, name) else "0" for name in names),
        ]
        for stage in plan.stages
    ]
    return _table(["stage", *names[:-1], "at the peak"], rows)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}" if count < 100 * 2**30 else f"{count / 2**30:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Renew docs/scaling.md."""
    page = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
    page.write_text(renew(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
