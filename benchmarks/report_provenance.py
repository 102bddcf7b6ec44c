"""The report's last section: what every number was measured with, so that it can be traced and done again."""

from typing import Any

from linearize.benchmarks import page
from linearize.benchmarks.headline import texts_of
from linearize.benchmarks.page import Data, Section
from linearize.benchmarks.report_format import DASH, counted
from linearize.benchmarks.summary import number

__all__ = ["provenance_section"]


def provenance_section(quality: dict[str, Any] | None, speed: dict[str, Any] | None, recipe: str | None) -> Section:
    """Machine, versions, commit, command, seed, data, noise and recipe of what there is.

    Args:
        quality: an evaluate.json.
        speed: a bench.json, as `linearize.benchmarks.decode` gives it.
        recipe: the text of recipe.yaml.
    """
    parts = []
    if quality is not None:
        pairs = [*_machine(quality), ("rows", ", ".join(quality["rows"])), *_measured_on(quality)]
        parts.append(page.subsection("Quality", page.definitions(pairs), _seconds(quality)))
    if speed is not None:
        parts.append(page.subsection("Speed", page.definitions([*_machine(speed), *_noise(speed)]), _blocks(speed)))
    if recipe is not None:
        parts.append(page.subsection("Recipe", page.preformatted("recipe.yaml", recipe)))
    return page.section("How this was measured", *parts)


def _machine(result: dict[str, Any]) -> list[tuple[str, str]]:
    info = result["machine"]
    cpu, gpu, commit = info["cpu"], info["gpu"], info["commit"]
    quota = "" if cpu["quota"] is None else f", limited to the time of {cpu['quota']:g}"
    versions = ", ".join(f"{package} {version}" for package, version in info["versions"].items() if version)
    changed = "" if commit is None or not commit["changed"] else ", with local changes"
    return [
        ("measured", info["date"]),
        ("command", info["command"]),
        ("seed", "" if info["seed"] is None else str(info["seed"])),
        ("processor", f"{cpu['model'] or 'unknown'}, {cpu['usable']} of {cpu['cores']} cores{quota}"),
        ("instructions", " ".join(cpu["flags"])),
        ("threads", str(info["threads"])),
        ("memory", "" if info["memory_gib"] is None else f"{info['memory_gib']:g} GiB"),
        ("GPU", "none" if gpu is None else f"{gpu['name']}, {gpu['memory_gib']:g} GiB"),
        ("system", info["system"]),
        ("versions", versions),
        ("commit", "unknown: not run from a checkout" if commit is None else commit["hash"] + changed),
        ("file", f"{result['kind']}, schema {result['schema']}"),
    ]


def _measured_on(quality: dict[str, Any]) -> list[tuple[str, str]]:
    """The data behind each measurement."""
    texts = "; ".join(
        f"{name}: " + ", ".join(f"{found['n_sequences']} × {found['seq_len']} tokens" for found in contexts.values())
        for name, contexts in texts_of(quality).items()
    )
    tasks = quality.get("tasks") or {}
    seen = {row: tokens for row, tokens in (quality.get("tokens_seen") or {}).items() if tokens}
    return [
        ("texts", texts),
        ("tasks", ", ".join(f"{name}: {task['n_items']} questions" for name, task in tasks.items())),
        ("tokens trained on", "; ".join(f"{row}: {tokens}" for row, tokens in seen.items())),
        ("notes", " ".join(quality.get("notes") or ())),
    ]


def _seconds(quality: dict[str, Any]) -> str:
    """What each measurement of each row took."""
    taken = quality.get("seconds_by_measurement")
    if not taken:
        return ""
    titles = list(dict.fromkeys(title for row in taken.values() for title in row))
    rows: list[list[Any]] = [[row, *(times.get(title) for title in titles)] for row, times in taken.items()]
    shown = [[row, *(number(value) for value in values)] for row, *values in rows]
    table = page.table(
        "Seconds that each measurement took", ["row", *titles], shown, data=Data("seconds", ["row", *titles], rows)
    )
    return page.details("What it took", table)


def _noise(speed: dict[str, Any]) -> list[tuple[str, str]]:
    blocks = speed["blocks"]
    moved = sum(block["moved"] for block in blocks)
    noise = f"the machine's own speed moved during {moved} of {counted(len(blocks), 'block')}"
    again = sum(block.get("attempts", 1) > 1 for block in blocks)
    if again:
        noise += f"; {again} were measured twice, because it had moved the first time"
    spoilt = sorted({f"{cell['row']}, {cell['mode']}" for cell in speed["cells"] if cell["recompiles"]})
    asked = counted(speed["repeats_asked"], "repeat")
    modes = "; ".join(f"{row}: {', '.join(own)}" for row, own in speed["modes"].items())
    return [
        ("noise", noise),
        ("compiled again", "; ".join(spoilt)),
        ("repeats", f"{asked} asked, {speed['decode_tokens']} tokens each"),
        ("modes", modes),
        ("left out", "; ".join(f"{one['row']}, {one['mode']}: {one['reason']}" for one in speed["skipped"])),
        ("dropped", "; ".join(_dropped(drop) for drop in speed["dropped"])),
        ("time", f"{number(speed['seconds'])} s"),
    ]


def _dropped(drop: dict[str, Any]) -> str:
    what = "prefill of" if drop["what"] == "prefill" else "context"
    return f"{what} {drop['context']}, batch {drop['batch']}: {drop['reason']}"


def _blocks(speed: dict[str, Any]) -> str:
    """Every block with the fixed matrix product that was timed before and after it."""
    keys = ("what", "repeat", "context", "batch", "matmul_before_ms", "matmul_after_ms")
    rows: list[list[Any]] = [
        [*(block[key] for key in keys), "moved" if block["moved"] else ""] for block in speed["blocks"]
    ]
    head = ["what", "repeat", "context", "batch", "matrix product before, ms", "after, ms", "marked"]
    shown = [[*map(str, row[:4]), number(row[4]), number(row[5]), row[6] or DASH] for row in rows]
    table = page.table("Blocks: one repeat of one context, all rows", head, shown, data=Data("blocks", head, rows))
    return page.details("Every block, and how steady the machine was", table)
