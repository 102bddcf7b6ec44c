"""One page of HTML from the results in a run's folder.

Reads what is there of evaluate.json, bench.json, train.jsonl and recipe.yaml, and writes report.html: a single file
without scripts or anything from the network. A training that is still running is shown as far as it is.

The sections are functions of the results, in the modules `report_*`; `write_report` has their order. How to write one:
`linearize.benchmarks.page`.
"""

from pathlib import Path
from typing import Any

from linearize.benchmarks import decode, evaluate, page, plots
from linearize.benchmarks.files import read_json, write_text
from linearize.benchmarks.headline import Claim, headline, one_line
from linearize.benchmarks.page import Section
from linearize.benchmarks.report_attention import attention_section
from linearize.benchmarks.report_provenance import provenance_section
from linearize.benchmarks.report_quality import answers_section, divergence_section, perplexity_section
from linearize.benchmarks.report_recall import needles_section, recall_section
from linearize.benchmarks.report_speed import speed_section
from linearize.benchmarks.report_tasks import harness_section, letters_section, tasks_section
from linearize.benchmarks.report_training import progress_section, training_section
from linearize.benchmarks.summary import quality_sentences, speed_sentences
from linearize.benchmarks.training_log import read_train_log, stage_logs
from linearize.errors import LinearizeError

__all__ = ["read_train_log", "write_report"]

NO_PLOTS = "This report has no plots: they need matplotlib (pip install 'linearize[report]')."
MARKS = (
    "In tables ✓ means better and ✗ worse than the original, beyond what the measurement can tell apart. "
    "Without a mark no difference was measured, or there is nothing to compare."
)

# In the order of the page. A section whose part was not measured is left out.
QUALITY = (
    perplexity_section,
    divergence_section,
    tasks_section,
    letters_section,
    harness_section,
    needles_section,
    recall_section,
    attention_section,
    answers_section,
)


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from the results in `folder`, and return its path.

    The same results give the same bytes.

    Raises:
        LinearizeError: no results in the folder, or a file that cannot be read.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in ("evaluate.json", "bench.json", "train.jsonl", "recipe.yaml")}
    quality = read_json(path, evaluate.KIND) if (path := paths["evaluate.json"]).is_file() else None
    speed = decode.read_bench(path) if (path := paths["bench.json"]).is_file() else None
    log = read_train_log(path) if (path := paths["train.jsonl"]).is_file() else []
    if quality is None and speed is None and not log:
        raise LinearizeError(
            f"{folder}: no evaluate.json, bench.json or train.jsonl to report on; "
            "run `linearize evaluate` or `linearize bench` first, or wait for a training's first step"
        )
    recipe = path.read_text(encoding="utf-8") if (path := paths["recipe.yaml"]).is_file() else None
    values = _parsed(recipe)
    stages = stage_logs(log, values)
    claims = headline(quality, speed)
    sections = [
        progress_section(stages),
        _headline(claims),
        _findings(quality, speed),
        *([] if quality is None else [part(quality) for part in QUALITY]),
        *([] if speed is None else [speed_section(speed)]),
        training_section(stages),
        provenance_section(quality, speed, recipe),
    ]
    title, subtitle = _title(values)
    return write_text(folder / "report.html", page.page(title, subtitle, one_line(claims), sections))


def _parsed(recipe: str | None) -> dict[str, Any]:
    """What recipe.yaml holds; empty where there is none."""
    if recipe is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise LinearizeError(f"recipe.yaml: not YAML ({' '.join(str(error).split())}); restore or delete it") from error
    return values if isinstance(values, dict) else {}


def _title(values: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle; from the recipe where there is one."""
    if not values:
        return "Student and original, side by side", "How much was kept, and what was gained."
    model = str(values.get("model") or "a model").rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    convert = values.get("convert") or {}
    parts = [f"{key.replace('_', ' ')} {convert[key]}" for key in ("mixer", "window", "sinks", "mix") if key in convert]
    if "softmax_layers" in convert:
        parts.append(f"softmax layers: {convert['softmax_layers']}")
    return f"{model}, converted", ", ".join(parts) or "How much was kept, and what was gained."


def _headline(claims: list[Claim]) -> Section:
    """The numbers worth quoting, with those that speak against the student and those that are missing."""
    return page.section(
        "In short",
        page.paragraph(one_line(claims), "brief"),
        page.claims(claims),
        page.paragraph(MARKS, "small"),
        "" if plots.available() else page.paragraph(NO_PLOTS, "small"),
    )


def _findings(quality: dict[str, Any] | None, speed: dict[str, Any] | None) -> Section:
    """Every finding as a sentence."""
    return page.section(
        "Findings",
        page.subsection("Quality", page.sentences(quality_sentences(quality)) if quality is not None else ""),
        page.subsection("Speed and memory", page.sentences(speed_sentences(speed)) if speed is not None else ""),
    )
