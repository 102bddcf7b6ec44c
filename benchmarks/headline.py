"""The report's headline: the few numbers that are worth quoting, with what speaks against the student among them.

What is shown does not depend on how it turned out: the best and the worst measured speed, the longest context, every
text. A part that is missing is called "not measured".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.report_format import counted, span
from linearize.benchmarks.summary import CONTROL, difference, number, percent, size
from linearize.benchmarks.verdicts import of_counts, of_interval, of_ranges

__all__ = ["Claim", "batch_of", "headline", "one_line", "texts_of"]


@dataclass(frozen=True)
class Claim:
    """One number of the headline.

    Attributes:
        topic: what was measured, in a few words.
        tone: `"good"`, `"bad"`, `"open"` (no difference measured), `"unclear"` (this measurement could not have shown
            one) or `"missing"`.
        text: a sentence that `value` begins.
        value: the number itself, set large; empty without one.
        basis: what it was measured on.
        brief: its clause in the one line; empty where the line does without.
    """

    topic: str
    tone: str
    text: str
    value: str = ""
    basis: str = ""
    brief: str = ""


def headline(quality: dict[str, Any] | None, speed: dict[str, Any] | None) -> list[Claim]:
    """All claims, speed first. Either result may be missing, which is a claim too."""
    return [*_speed(speed), *_quality(quality)]


def one_line(found: Sequence[Claim]) -> str:
    """The claims as one sentence; empty without any."""
    line = "; ".join(claim.brief for claim in found if claim.brief)
    return f"{line[0].upper()}{line[1:]}." if line else ""


def batch_of(record: dict[str, Any], result: dict[str, Any]) -> int:
    """The batch of a cell or comparison of a bench.json; in older files all have the same."""
    return int(record.get("batch", result.get("batch", 1)))


def texts_of(quality: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Text -> context -> its PERPLEXITY; older files have one text, without a name."""
    if quality.get("texts"):
        return quality["texts"]
    perplexity = quality.get("perplexity")
    return {} if perplexity is None else {"held-out text": {str(perplexity["seq_len"]): perplexity}}


def _times(ratio: float) -> str:
    """A ratio with two decimals around 1, three digits elsewhere."""
    return f"{_decimals(ratio)}×"


def _decimals(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= ratio < 10 else number(ratio)


def _speed(speed: dict[str, Any] | None) -> list[Claim]:
    if speed is None:
        text = "There is no bench.json in this folder; `linearize bench decode` writes it."
        return [Claim("Speed and memory", "missing", text, brief="speed and memory: not measured")]
    if not any(cell["row"] == STUDENT for cell in speed["cells"]):
        text = "No student was timed."
        return [Claim("Speed and memory", "missing", text, brief="speed and memory: not measured")]
    return [*_decoding(speed), *_prefill(speed), *_memory(speed)]


def _cell(record: dict[str, Any], speed: dict[str, Any]) -> tuple[int, int]:
    """Context and batch of a cell or comparison."""
    return record["context"], batch_of(record, speed)


def _place(record: dict[str, Any], speed: dict[str, Any]) -> str:
    """Where a cell was measured; the batch is said only where there are several."""
    batches = {batch_of(cell, speed) for cell in speed["cells"]}
    batch = f", batch {batch_of(record, speed)}" if len(batches) > 1 else ""
    return f"{record['context']} tokens{batch}"


def _decoding(speed: dict[str, Any]) -> list[Claim]:
    """The best and the worst of all contexts and batches."""
    pairs = sorted(
        (pair for pair in speed["comparisons"] if pair["row"] == STUDENT), key=lambda pair: pair["speedup"]["p50"]
    )
    if not pairs:
        return [Claim("Decoding", "missing", "No pair of cells could be compared.", brief="decoding: not measured")]
    chosen = [(pairs[-1], f"best of {len(pairs)}"), (pairs[0], f"worst of {len(pairs)}")] if len(pairs) > 1 else []
    found = []
    for pair, rank in chosen or [(pairs[0], "")]:
        place, ratio = _place(pair, speed), pair["speedup"]
        repeats = next(
            cell["repeats"]
            for cell in speed["cells"]
            if (cell["row"], cell["context"], batch_of(cell, speed))
            == (STUDENT, pair["context"], batch_of(pair, speed))
        )
        spread = f"{span((ratio['min'], ratio['max']), _decimals)} in {repeats} repeats"
        if repeats == 1:
            spread = "one repeat, no spread"
        tone = {"faster": "good", "slower": "bad"}.get(pair["verdict"], "open")
        basis = f"{rank} measured; batch {batch_of(pair, speed)}" if rank else f"batch {batch_of(pair, speed)}"
        basis += f", {_on(speed)}; against the original under its better cache ({pair['baseline_cache']})"
        found.append(
            Claim(
                topic=f"Decoding at {place}",
                tone=tone,
                value=_times(ratio["p50"]),
                text=f"as fast as the original ({spread})",
                basis=basis[0].upper() + basis[1:] + ".",
                brief=(f"decodes {_times(ratio['p50'])} as fast" if not found else _times(ratio["p50"]))
                + f" at {place}"
                + (" (no difference measured)" if tone == "open" else ""),
            )
        )
    first, *others = found
    # The worst shares the clause of the best: neither is quoted without the other.
    joined = ", ".join(claim.brief for claim in found)
    return [replace(first, brief=joined), *(replace(claim, brief="") for claim in others)]


def _on(speed: dict[str, Any]) -> str:
    dtypes = ", ".join(sorted(set(speed["dtypes"].values())))
    machine = speed["machine"]
    if str(speed["device"]).startswith("cpu"):
        name = f"{machine['cpu']['model'] or 'unknown'}, {counted(speed['threads'], 'thread')}"
    else:
        name = machine["gpu"]["name"] if machine["gpu"] else "unknown"
    return f"{dtypes} on {speed['device']} ({name})"


def _longest(speed: dict[str, Any], row: str) -> list[dict[str, Any]]:
    """A row's cells at the longest context, and of those the ones of the smallest batch."""
    context = max(speed["contexts"])
    cells = [cell for cell in speed["cells"] if (cell["row"], cell["context"]) == (row, context)]
    smallest = min((batch_of(cell, speed) for cell in cells), default=1)
    return [cell for cell in cells if batch_of(cell, speed) == smallest]


def _prefill(speed: dict[str, Any]) -> list[Claim]:
    """At the longest context, against the original's faster cache."""
    ours, theirs = _longest(speed, STUDENT), _longest(speed, BASELINE)
    if not ours or not theirs:
        return []
    own = ours[0]["prefill_ms"]
    other = min((cell["prefill_ms"] for cell in theirs), key=lambda times: times["p50"])
    ratio = other["p50"] / own["p50"]
    verdict = of_ranges((own["min"], own["max"]), (other["min"], other["max"]))
    text = f"as fast as the original: {number(own['p50'])} ms against {number(other['p50'])} ms"
    return [
        Claim(
            topic=f"Prefill of {_place(ours[0], speed)}",
            tone=verdict,
            value=_times(ratio),
            text=text,
            basis=f"The longest context measured; batch {batch_of(ours[0], speed)}, {_on(speed)}.",
        )
    ]


def _memory(speed: dict[str, Any]) -> list[Claim]:
    """Cache bytes at the longest context, against DynamicCache, which holds no spare room."""
    ours = next(iter(_longest(speed, STUDENT)), None)
    theirs = next((cell for cell in _longest(speed, BASELINE) if cell["cache"] == "dynamic"), None)
    if ours is None or theirs is None:
        return []
    held, other = ours["cache_bytes"]["total"], theirs["cache_bytes"]["total"]
    place = _place(ours, speed)
    share = f"{100 * held / other:.2g} %" if held < other else percent(held / other)
    return [
        Claim(
            topic=f"Cache at {place}",
            tone="good" if held < other else "bad" if held > other else "open",
            value=share,
            text=f"of the original's bytes: {size(held)} against {size(other)}",
            basis=f"Batch {batch_of(ours, speed)}; keys, values and states, without the model's weights.",
            brief=f"holds {share} of the cache at {place}",
        )
    ]


def _quality(quality: dict[str, Any] | None) -> list[Claim]:
    if quality is None:
        text = "There is no evaluate.json in this folder; `linearize evaluate` writes it."
        return [Claim("Quality", "missing", text, brief="quality: not measured")]
    if STUDENT not in quality["rows"]:
        return [Claim("Quality", "missing", "No student was measured.", brief="quality: not measured")]
    return [*_perplexity(quality), _accuracy(quality), _needle(quality)]


def _perplexity(quality: dict[str, Any]) -> list[Claim]:
    """Every text at its longest context."""
    found = []
    for name, contexts in texts_of(quality).items():
        perplexity = contexts[max(contexts, key=int)]
        rows = perplexity["rows"]
        ours, theirs = rows[STUDENT]["ppl"], rows[BASELINE]["ppl"]
        topic = f"Perplexity on {name}"
        basis = f"{counted(perplexity['n_sequences'], 'sequence')} of {perplexity['seq_len']} tokens; lower is better."
        if CONTROL in rows and rows[CONTROL]["ppl"] is not None:
            # Without it, what training on such a text gives anyone would look like the student's merit.
            basis += f" The original, trained in the same way: {number(rows[CONTROL]['ppl'])}."
        pair = difference(perplexity, STUDENT, BASELINE)
        if ours is None or theirs is None or pair is None:
            broken = ", ".join(f"{row}: {rows[row]['n_not_finite']}" for row in (BASELINE, STUDENT))
            text = f"Not finite: predictions that are no numbers ({broken} of {perplexity['n_tokens']})."
            found.append(Claim(topic, "bad", text, basis=basis, brief=f"perplexity on {name} not finite"))
            continue
        # One sequence gives no interval.
        verdict = "unclear" if pair["ci95"] is None else of_interval(pair["ci95"], 0, "lower")
        interval = "no interval"
        if pair["ci95"] is not None:
            interval = span([math.exp(end) for end in pair["ci95"]], _decimals)
        text = f"the original's: {number(ours)} against {number(theirs)} ({interval})"
        found.append(
            Claim(
                topic=topic,
                tone=verdict,
                value=_times(ours / theirs),
                text=text,
                basis=basis,
                brief=f"perplexity {_times(ours / theirs)} the original's on {name}",
            )
        )
    return found or [Claim("Perplexity", "missing", "Not measured.", brief="perplexity: not measured")]


def _accuracy(quality: dict[str, Any]) -> Claim:
    """What is kept of the accuracy above guessing, over all tasks; over the one task of older files."""
    tasks, choices = quality.get("task_mean"), quality.get("choices")
    if tasks is not None:
        rows, chance = tasks["rows"], tasks["chance"]
        names = ", ".join(f"{name} ({task['n_items']})" for name, task in quality["tasks"].items())
        basis = f"Mean of {names}; guessing gives {percent(chance)}."
    elif choices is not None:
        rows = {row: scores["normalised"] for row, scores in choices["rows"].items()}
        basis = f"Multiple choice, {choices['n_items']} questions; guessing gives {percent(choices['chance'])}."
    else:
        text = "Not measured; `linearize evaluate --choices FILE` does it."
        return Claim("Accuracy on tasks", "missing", text, brief="accuracy: not measured")
    kept = rows[STUDENT]["retention_over_chance"]
    numbers = f"{percent(rows[STUDENT]['accuracy'])} against {percent(rows[BASELINE]['accuracy'])}"
    if kept["value"] is None or kept["ci95"] is None:
        text = f"{numbers}; the original is not clearly above guessing, so this cannot tell."
        return Claim("Accuracy on tasks", "unclear", text, basis=basis, brief="accuracy: cannot tell")
    verdict = of_interval(kept["ci95"], 1, "higher")
    interval = span(kept["ci95"], percent)
    return Claim(
        topic="Accuracy on tasks",
        tone=verdict,
        value=percent(kept["value"]),
        text=f"of the original's accuracy above guessing ({interval}): {numbers}",
        basis=basis,
        brief=f"keeps {percent(kept['value'])} of the accuracy ({interval})",
    )


def _needle(quality: dict[str, Any]) -> Claim:
    """Numbers written from the longest texts."""
    needle = quality.get("needle")
    if needle is None:
        text = "Not measured; `linearize evaluate --needle 1k,4k` does it."
        return Claim("Needles", "missing", text, brief="needles: not measured")
    length = max(cell["length"] for cell in needle["rows"][STUDENT]["cells"])
    counts, trials = {}, 0
    for row in (STUDENT, BASELINE):
        cells = [cell for cell in needle["rows"][row]["cells"] if cell["length"] == length]
        trials = sum(cell["trials"] for cell in cells)
        counts[row] = sum(round(cell["greedy"] * cell["trials"]) for cell in cells)
    ours, theirs = counts[STUDENT], counts[BASELINE]
    topic = f"Needles at {length} tokens"
    basis = f"Numbers said once in a long text and written again by greedy decoding; {trials} prompts."
    if not theirs:
        text = f"numbers written, and {theirs} by the original, so this cannot tell."
        brief = f"needles at {length} tokens: cannot tell"
        return Claim(topic, "unclear", text, value=f"{ours} of {trials}", basis=basis, brief=brief)
    verdict = of_counts(ours, theirs, trials)
    text = f"numbers written, {percent(ours / theirs)} of the original's {theirs}"
    return Claim(
        topic=topic,
        tone=verdict,
        value=f"{ours} of {trials}",
        text=text,
        basis=basis,
        brief=f"writes {ours} of {trials} needles at {length} tokens, the original {theirs}",
    )
