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
from linearize.benchmarks.summary import (
    CONTROL,
    cell_of,
    difference,
    longest_compared,
    number,
    percent,
    size,
    smallest_caches,
)
from linearize.benchmarks.verdicts import of_counts, of_interval, of_ranges

__all__ = ["Claim", "headline", "one_line", "prefills", "texts_of"]


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
    """All claims, speed first. Either result may be missing, which is a claim too.

    Args:
        quality: an evaluate.json.
        speed: a bench.json, as `linearize.benchmarks.decode` gives it.
    """
    return [*_speed(speed), *_quality(quality)]


def one_line(found: Sequence[Claim]) -> str:
    """The claims as one sentence; empty without any."""
    line = "; ".join(claim.brief for claim in found if claim.brief)
    return f"{line[0].upper()}{line[1:]}." if line else ""


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
    if not any(pair["row"] == STUDENT for pair in speed["comparisons"]):
        text = "No student was timed beside the original."
        return [Claim("Speed and memory", "missing", text, brief="speed and memory: not measured")]
    return [*_decoding(speed), *_prefill(speed), _memory(speed)]


def _place(record: dict[str, Any], speed: dict[str, Any]) -> str:
    """Where a cell was measured; the batch is said only where there are several."""
    batch = f", batch {record['batch']}" if len(speed["batches"]) > 1 else ""
    return f"{record['context']} tokens{batch}"


def _decoding(speed: dict[str, Any]) -> list[Claim]:
    """The best and the worst of all contexts and batches."""
    pairs = [pair for pair in speed["comparisons"] if pair["row"] == STUDENT]
    pairs.sort(key=lambda pair: pair["speedup"]["p50"])
    count = len(pairs)
    chosen = [(pairs[0], "")] if count == 1 else [(pairs[-1], f"best of {count}"), (pairs[0], f"worst of {count}")]
    found: list[Claim] = []
    for pair, rank in chosen:
        place, ratio = _place(pair, speed), pair["speedup"]
        cell = cell_of(speed, STUDENT, pair["context"], pair["batch"], pair["mode"])
        once = cell["repeats"] == 1
        spread = f"{span(ratio['ci95'] or (ratio['min'], ratio['max']), _decimals)} in {cell['repeats']} repeats"
        tone = {"faster": "good", "slower": "bad"}.get(pair["verdict"], "unclear" if once else "open")
        basis = f"{rank} measured; batch {pair['batch']}" if rank else f"batch {pair['batch']}"
        basis += f", {_on(speed)}; each in its better mode: {pair['mode']}, the original {pair['baseline_mode']}"
        basis += f"; {cell['filled']} tokens of the context filled in, not read." if cell["filled"] else "."
        brief = _times(ratio["p50"]) if found else f"decodes {_times(ratio['p50'])} as fast"
        brief += f" at {place}" + {"open": " (no difference measured)", "unclear": " (one repeat)"}.get(tone, "")
        found.append(
            Claim(
                topic=f"Decoding at {place}",
                tone=tone,
                value=_times(ratio["p50"]),
                text=f"as fast as the original ({'one repeat, no spread' if once else spread})",
                basis=basis[0].upper() + basis[1:],
                brief=brief,
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


def prefills(speed: dict[str, Any]) -> list[dict[str, Any]]:
    """Every prefill that was timed, `{"row", "mode", "context", "batch", "repeats", "ms"}`: those of the lengths asked
    for, whose mode is empty, and elsewhere those of the cells that read the whole context."""
    asked = [{**found, "context": found["length"], "mode": ""} for found in speed["prefill"]]
    known = {(found["row"], found["context"], found["batch"]) for found in asked}
    return asked + [
        {**cell, "ms": cell["prefill_ms"]}
        for cell in speed["cells"]
        if cell["prefill_ms"] is not None and (cell["row"], cell["context"], cell["batch"]) not in known
    ]


def _prefill(speed: dict[str, Any]) -> list[Claim]:
    """The longest that both have read, at its smallest batch, each in its faster mode."""
    best: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for found in prefills(speed):
        own = best.setdefault((found["context"], -found["batch"]), {})
        own[found["row"]] = min(own.get(found["row"], found), found, key=lambda one: one["ms"]["p50"])
    both = [place for place, rows in best.items() if {STUDENT, BASELINE} <= rows.keys()]
    if not both:
        return []
    ours, theirs = (best[max(both)][row] for row in (STUDENT, BASELINE))
    own, other = ours["ms"], theirs["ms"]
    once = ours["repeats"] == 1
    return [
        Claim(
            topic=f"Prefill of {_place(ours, speed)}",
            tone="unclear"
            if once
            else of_ranges(
                (own["min"], own["max"]), (other["min"], other["max"]), min(ours["repeats"], theirs["repeats"])
            ),
            value=_times(other["p50"] / own["p50"]),
            text=f"as fast as the original: {number(own['p50'])} ms against {number(other['p50'])} ms"
            + (" (one repeat, no spread)" if once else ""),
            basis=f"The longest measured; batch {ours['batch']}, {_on(speed)}.",
        )
    ]


def _memory(speed: dict[str, Any]) -> Claim:
    """Cache bytes at the longest context, at its smallest batch."""
    context, batch = longest_compared(speed)
    held = smallest_caches(speed)[context, batch]
    ours, theirs = held[STUDENT], held[BASELINE]
    place = _place({"context": context, "batch": batch}, speed)
    share = f"{100 * ours / theirs:.2g} %" if ours < theirs else percent(ours / theirs)
    weights = {cell["row"]: cell["weight_bytes"] for cell in speed["cells"]}.get(STUDENT)
    beside = f"; the student's are {size(weights)}" if weights else ""
    return Claim(
        topic=f"Cache at {place}",
        tone="good" if ours < theirs else "bad" if ours > theirs else "open",
        value=share,
        text=f"of the original's bytes: {size(ours)} against {size(theirs)}",
        basis=f"Batch {batch}; keys, values and states, without the model's weights{beside}.",
        brief=f"holds {share} of the cache at {place}",
    )


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
    basis = f"Values said once in a long text and written again by greedy decoding; {trials} prompts."
    if not theirs:
        text = f"written, and {theirs} by the original, so this cannot tell."
        brief = f"needles at {length} tokens: cannot tell"
        return Claim(topic, "unclear", text, value=f"{ours} of {trials}", basis=basis, brief=brief)
    verdict = of_counts(ours, theirs, trials)
    text = f"written, {percent(ours / theirs)} of the original's {theirs}"
    return Claim(
        topic=topic,
        tone=verdict,
        value=f"{ours} of {trials}",
        text=text,
        basis=basis,
        brief=f"writes {ours} of {trials} needles at {length} tokens, the original {theirs}",
    )
