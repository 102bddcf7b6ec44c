"""The report's summary: plain sentences, every one of them computed from the numbers.

A difference is called one only where its 95 % interval leaves out zero (quality) or one (speed), or where the ranges of
enough repeats do not overlap (prefill); otherwise the sentence says that nothing was measured, whichever way the mean
points.
"""

from dataclasses import dataclass
from typing import Any

from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.verdicts import of_counts, of_ranges

__all__ = [
    "CONTROL",
    "STATE_OFF",
    "WINDOW_OFF",
    "WINDOW_SINKS",
    "Sentence",
    "cell_of",
    "difference",
    "longest_compared",
    "number",
    "percent",
    "quality_sentences",
    "size",
    "smallest_caches",
    "speed_sentences",
]

CONTROL = "control"
WINDOW_SINKS = "window + sinks"
STATE_OFF = "student, state off"
WINDOW_OFF = "student, window off"
# Below this, an interval over sequences says little about other text.
FEW_SEQUENCES = 10


@dataclass(frozen=True)
class Sentence:
    """A finding. `tone` is `"good"` or `"bad"` for the student, `"open"` where nothing was decided, or `"note"`."""

    tone: str
    text: str


def number(value: float | None) -> str:
    """Three significant digits, thousands grouped: 35.1, 0.0213, 12 300. A dash for None."""
    if value is None:
        return "–"
    value = float(f"{value:.3g}")
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def size(count: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{number(count) if unit != 'bytes' else round(count)} {unit}"
        count /= 1024
    return f"{number(count)} GiB"


def percent(share: float) -> str:
    """Whole percents."""
    return f"{round(100 * share)} %".replace("-", "−")


def difference(perplexity: dict[str, Any], row: str, against: str) -> dict[str, Any] | None:
    """The paired comparison of two rows in a `"perplexity"` part, or None where it was not made."""
    for pair in perplexity["comparisons"]:
        if (pair["row"], pair["against"]) == (row, against):
            return pair
    return None


def _sign(pair: dict[str, Any]) -> int | None:
    """-1: the row has the lower NLL, 1: the higher, 0: no difference measured, None: it cannot be said."""
    if pair["ci95"] is None:
        return None
    low, high = pair["ci95"]
    return -1 if high < 0 else 1 if low > 0 else 0


def quality_sentences(result: dict[str, Any]) -> list[Sentence]:
    """What an evaluate.json says, most important first."""
    perplexity = result["perplexity"]
    if perplexity is None:
        return [Sentence("note", "Perplexity was not measured; `linearize evaluate` without --only measures all.")]
    rows = perplexity["rows"]
    sentences = [
        Sentence(
            "bad", f"{name}: {row['n_not_finite']} of {perplexity['n_tokens']} predictions are not finite numbers."
        )
        for name, row in rows.items()
        if row["n_not_finite"]
    ]
    if STUDENT not in rows:
        return [*sentences, Sentence("note", "No student was measured.")]
    if any(rows[name]["n_not_finite"] for name in (BASELINE, STUDENT)):
        return sentences
    sentences += [
        _against_original(perplexity),
        *_against(perplexity, WINDOW_SINKS, _window_sinks_text),
        *_against(perplexity, STATE_OFF, _state_text),
        *_against(perplexity, WINDOW_OFF, _window_text),
        *_gap(perplexity),
        *_control(perplexity),
    ]
    if result["choices"] is not None:
        sentences.append(_choices(result["choices"]))
    if result["needle"] is not None:
        sentences.append(_needle(result["needle"]))
    n = perplexity["n_sequences"]
    if n < FEW_SEQUENCES:
        count = "one sequence" if n == 1 else f"{n} sequences"
        sentences.append(
            Sentence("note", f"Perplexity rests on {count} of {perplexity['seq_len']} tokens: a rough guide.")
        )
    return [*sentences, *(Sentence("note", note) for note in result["notes"])]


def _against_original(perplexity: dict[str, Any]) -> Sentence:
    rows = perplexity["rows"]
    ours, theirs = rows[STUDENT]["ppl"], rows[BASELINE]["ppl"]
    text = f"Perplexity of the student: {number(ours)}, of the original: {number(theirs)}"
    pair = difference(perplexity, STUDENT, BASELINE)
    assert pair is not None, "an evaluation compares every row with the original"
    sign = _sign(pair)
    if sign is None:
        return Sentence("open", f"{text}; one sequence cannot tell whether that is a difference.")
    if sign == 0:
        return Sentence("open", f"{text}; no difference measured.")
    return Sentence("bad" if sign > 0 else "good", f"{text}, {number(ours / theirs)} times the original's.")


def _against(perplexity: dict[str, Any], other: str, text: Any) -> list[Sentence]:
    """The student against another row of its own kind, if that was measured."""
    pair = difference(perplexity, STUDENT, other)
    if pair is None or pair["nll_difference"] is None:
        return []
    sign = _sign(pair)
    numbers = f"{number(perplexity['rows'][other]['ppl'])} against {number(perplexity['rows'][STUDENT]['ppl'])}"
    tone = {-1: "good", 1: "bad", 0: "bad", None: "open"}[sign]
    # That a student needs its window is expected, and no merit.
    return [Sentence("note" if other == WINDOW_OFF and sign == -1 else tone, text(sign, numbers))]


def _window_sinks_text(sign: int | None, numbers: str) -> str:
    start = f"Window + sinks alone, without training, against the student: perplexity {numbers}"
    return {
        -1: f"{start}. The student is better than this free baseline.",
        1: f"{start}. The student is worse than this free baseline.",
        0: f"{start}. No gain over this free baseline was measured.",
        None: f"{start}; one sequence cannot tell whether that is a difference.",
    }[sign]


def _state_text(sign: int | None, numbers: str) -> str:
    start = f"With the state switched off, against on: perplexity {numbers}"
    return {
        -1: f"{start}. The state carries information.",
        1: f"{start}. The state does harm: the student is better without it.",
        0: f"{start}. The state does nothing that could be measured.",
        None: f"{start}; one sequence cannot tell whether that is a difference.",
    }[sign]


def _window_text(sign: int | None, numbers: str) -> str:
    start = f"With the window switched off, against on: perplexity {numbers}"
    return {
        -1: f"{start}. The student needs its window.",
        1: f"{start}. The window does harm: the student is better without it.",
        0: f"{start}. The window does nothing that could be measured.",
        None: f"{start}; one sequence cannot tell whether that is a difference.",
    }[sign]


def _gap(perplexity: dict[str, Any]) -> list[Sentence]:
    """How much of what window + sinks loses the student wins back, in NLL."""
    rows = perplexity["rows"]
    pair = difference(perplexity, WINDOW_SINKS, BASELINE)
    # A share of a gap that may be zero means nothing.
    if pair is None or _sign(pair) != 1 or rows[STUDENT]["nll"] is None:
        return []
    lost = rows[WINDOW_SINKS]["nll"] - rows[BASELINE]["nll"]
    share = (rows[WINDOW_SINKS]["nll"] - rows[STUDENT]["nll"]) / lost
    if share <= 0:
        return [Sentence("bad", "The student closes none of the gap between window + sinks and the original.")]
    return [
        Sentence(
            "good", f"The student closes {percent(share)} of the gap (in NLL) between window + sinks and the original."
        )
    ]


def _control(perplexity: dict[str, Any]) -> list[Sentence]:
    """What the same training does to the original: without it a student looks better than it is.

    Where the student learns from the original's logits alone, the control learns from the text, as it has nothing to
    learn from its own logits.
    """
    rows = perplexity["rows"]
    pair = difference(perplexity, CONTROL, BASELINE)
    if pair is None:
        return [
            Sentence("note", "There is no control row: what this training does to the original itself is not known.")
        ]
    if pair["nll_difference"] is None:  # not finite, which has a sentence of its own
        return []
    numbers = f"from {number(rows[BASELINE]['ppl'])} to {number(rows[CONTROL]['ppl'])}"
    same = "The same steps on the same text, learnt by cross-entropy,"
    text = {
        -1: f"{same} improve the original itself, {numbers} (control); compare the student with that.",
        1: f"{same} make the original itself worse, {numbers} (control).",
        0: f"{same} leave the original as it was, {numbers} (control).",
        None: f"{same} take the original {numbers} (control); one sequence cannot tell more.",
    }[_sign(pair)]
    return [Sentence("note", text)]


def _choices(choices: dict[str, Any]) -> Sentence:
    ours, theirs = choices["rows"][STUDENT]["normalised"], choices["rows"][BASELINE]["normalised"]
    text = (
        f"Multiple choice, {choices['n_items']} questions: the student answers {percent(ours['accuracy'])}, "
        f"the original {percent(theirs['accuracy'])}, guessing {percent(choices['chance'])}"
    )
    kept = ours["retention_over_chance"]
    if kept["value"] is None or kept["ci95"] is None:
        return Sentence("open", f"{text}. The original is not clearly above guessing, so this set cannot tell.")
    low, high = kept["ci95"]
    text += f"; above guessing, the student keeps {percent(kept['value'])}"
    text += f" (95 % interval {percent(low)} to {percent(high)})."
    if low <= 0:
        return Sentence("bad", f"{text} It is not clearly above guessing.")
    if low <= 1 <= high:
        return Sentence("open", f"{text} No difference from the original was measured.")
    return Sentence("bad" if high < 1 else "good", text)


def _needle(needle: dict[str, Any]) -> Sentence:
    rows = needle["rows"]

    def found(row: str, score: str) -> int:
        return round(rows[row][score] * rows[row]["trials"])

    trials = rows[STUDENT]["trials"]
    text = f"Needle: of {trials} hidden numbers the student writes {found(STUDENT, 'greedy')}, the original "
    text += f"{found(BASELINE, 'greedy')}; ranked first of {needle['candidates']}: {found(STUDENT, 'first')} and "
    text += f"{found(BASELINE, 'first')}"
    others = [name for name in (WINDOW_SINKS, STATE_OFF) if name in rows]
    if others:
        text += ", " + " and ".join(f"{found(name, 'first')} ({name})" for name in others)
    guesses = f"{trials * needle['chance_first']:.2g}"
    text += f"; guessing would rank about {guesses} first."
    if found(BASELINE, "first") <= 2 * trials * needle["chance_first"]:
        return Sentence("open", f"{text} The original hardly finds them, so this test cannot tell.")
    verdicts = {
        score: of_counts(found(STUDENT, score), found(BASELINE, score), trials) for score in ("greedy", "first")
    }
    # A loss by either score is a loss.
    for verdict in ("bad", "good"):
        if verdict in verdicts.values():
            return Sentence(verdict, text)
    return Sentence("open", f"{text} No difference from the original was measured.")


def speed_sentences(result: dict[str, Any]) -> list[Sentence]:
    """What a bench.json says about the student, then about the measurement itself."""
    sentences = []
    if any(pair["row"] == STUDENT for pair in result["comparisons"]):
        sentences += [_speed(result, pair) for pair in result["comparisons"] if pair["row"] == STUDENT]
        sentences += [_crossover(result, found) for found in result["crossover"] if found["row"] == STUDENT]
        sentences += [*_prefill(result), _memory(result)]
    else:
        sentences.append(Sentence("note", "No student was timed."))
    for drop in result["dropped"]:
        place = f"{drop['context']}{_at_batch(result, drop['batch'])}"
        what = "Context" if drop["what"] == "decode" else "The prefill of"
        sentences.append(Sentence("note", f"{what} {place} was dropped: {drop['reason']}."))
    short = sorted({cell["context"] for cell in result["cells"] if cell["repeats"] < result["repeats_asked"]})
    if short:
        contexts = ", ".join(map(str, short))
        asked = result["repeats_asked"]
        sentences.append(Sentence("note", f"Context {contexts}: time was up before all {asked} repeats were done."))
    for skipped in result["skipped"]:
        text = f"{skipped['row']}, {skipped['mode']} was not measured: {skipped['reason']}."
        sentences.append(Sentence("note", text[0].upper() + text[1:]))
    spoilt = sorted({f"{cell['row']}, {cell['mode']}" for cell in result["cells"] if cell["recompiles"]})
    if spoilt:
        text = f"Compiled again during timed steps, so that their times are not to be trusted: {'; '.join(spoilt)}."
        sentences.append(Sentence("bad", text))
    moved, blocks = sum(block["moved"] for block in result["blocks"]), len(result["blocks"])
    if moved:
        sentences.append(
            Sentence("note", f"The machine's own speed moved by more than 10 % during {moved} of {blocks} blocks.")
        )
    return sentences


def _at_batch(result: dict[str, Any], batch: int) -> str:
    """Said only where batches differ."""
    return f", batch {batch}" if len(result["batches"]) > 1 else ""


def cell_of(result: dict[str, Any], row: str, context: int, batch: int, mode: str) -> dict[str, Any]:
    """The record of one cell of a bench.json."""
    return next(
        cell
        for cell in result["cells"]
        if (cell["row"], cell["context"], cell["batch"], cell["mode"]) == (row, context, batch, mode)
    )


def _speed(result: dict[str, Any], pair: dict[str, Any]) -> Sentence:
    context, batch = pair["context"], pair["batch"]
    ours = cell_of(result, STUDENT, context, batch, pair["mode"])
    theirs = cell_of(result, BASELINE, context, batch, pair["baseline_mode"])
    text = (
        f"At {context} tokens of context{_at_batch(result, batch)} the student decodes a token in "
        f"{number(ours['ms_per_token']['p50'])} ms ({pair['mode']}), "
        f"the original in {number(theirs['ms_per_token']['p50'])} ms ({pair['baseline_mode']}): "
    )
    speedup = pair["speedup"]
    faster = speedup["p50"] > 1
    value, word = number(speedup["p50"] if faster else 1 / speedup["p50"]), "faster" if faster else "slower"
    if speedup["ci95"] is None:
        return Sentence("open", f"{text}{value} times {word}, by one repeat, which has no spread.")
    if pair["verdict"] == "undecided":
        return Sentence("open", f"{text}no difference, the repeats disagree.")
    low, high = speedup["ci95"] if faster else [1 / end for end in reversed(speedup["ci95"])]
    span = f"95 % interval {number(low)} to {number(high)}, {ours['repeats']} repeats"
    return Sentence("good" if faster else "bad", f"{text}{value} times {word} ({span}).")


def _crossover(result: dict[str, Any], crossover: dict[str, Any]) -> Sentence:
    to = f"{crossover['measured_to']} tokens{_at_batch(result, crossover['batch'])}"
    if crossover["kind"] == "at":
        at = f"{number(crossover['context'])} tokens of context{_at_batch(result, crossover['batch'])}"
        return Sentence("good", f"The student becomes faster at about {at}.")
    if crossover["kind"] == "everywhere":
        return Sentence("good", f"By the medians the student is faster from the first context on, up to {to}.")
    if crossover["kind"] == "never":
        return Sentence("bad", f"By the medians the student is not faster at any context up to {to}.")
    return Sentence("open", f"Faster at some contexts, slower at longer ones: no single crossover up to {to}.")


def _prefill(result: dict[str, Any]) -> list[Sentence]:
    """Prefill of the most tokens that both read, each in its faster mode, and how it grows."""
    best: dict[tuple[int, int, str], dict[str, float]] = {}
    found = [(cell["context"], cell, cell["prefill_ms"]) for cell in result["cells"]]
    found += [(part["length"], part, part["ms"]) for part in result["prefill"]]
    for length, part, times in found:
        if times is not None:
            key, times = (length, -part["batch"], part["row"]), times | {"repeats": part["repeats"]}
            best[key] = min(best.get(key, times), times, key=lambda known: known["p50"])
    both = [(length, batch) for length, batch, row in best if row == STUDENT and (length, batch, BASELINE) in best]
    if not both:
        return []
    tokens, batch = max(both)
    ours, theirs = best[tokens, batch, STUDENT], best[tokens, batch, BASELINE]
    text = f"Prefill of {tokens} tokens: {number(ours['p50'])} ms, the original {number(theirs['p50'])} ms"
    repeats = int(min(ours["repeats"], theirs["repeats"]))
    verdict = of_ranges((ours["min"], ours["max"]), (theirs["min"], theirs["max"]), repeats)
    if verdict == "good":
        first = Sentence("good", f"{text}; the student is {number(theirs['p50'] / ours['p50'])} times faster.")
    elif verdict == "bad":
        first = Sentence("bad", f"{text}; the student is {number(ours['p50'] / theirs['p50'])} times slower.")
    else:
        first = Sentence("open", f"{text}; no difference is decided by {repeats} repeats.")
    growth = {part["row"]: part for part in result["prefill_growth"]}
    if not {STUDENT, BASELINE} <= growth.keys():
        return [first]
    part = growth[STUDENT]
    text = (
        f"From {part['from']} to {part['to']} tokens, {number(part['to'] / part['from'])} times as many, the student's "
        f"prefill grows {number(part['ratio'])} times, the original's {number(growth[BASELINE]['ratio'])} times."
    )
    return [first, Sentence("note", text)]


def smallest_caches(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, int]]:
    """(context, batch) -> row -> bytes of its cache in the mode that holds least: without the spare room of a
    preallocated cache."""
    held: dict[tuple[int, int], dict[str, int]] = {}
    for cell in result["cells"]:
        rows, total = held.setdefault((cell["context"], cell["batch"]), {}), cell["cache_bytes"]["total"]
        rows[cell["row"]] = min(rows.get(cell["row"], total), total)
    return held


def longest_compared(result: dict[str, Any]) -> tuple[int, int]:
    """The longest context at which rows were compared, and its smallest batch."""
    context = max(pair["context"] for pair in result["comparisons"])
    return context, min(pair["batch"] for pair in result["comparisons"] if pair["context"] == context)


def _memory(result: dict[str, Any]) -> Sentence:
    """Cache bytes at the longest context, at its smallest batch."""
    context, batch = longest_compared(result)
    held = smallest_caches(result)[context, batch]
    ours, theirs = held[STUDENT], held[BASELINE]
    text = f"Cache at {context} tokens{_at_batch(result, batch)}: {size(ours)}, the original {size(theirs)}"
    if ours < theirs:
        return Sentence("good", f"{text}, {number(theirs / ours)} times as much.")
    return Sentence("bad", f"{text}; the student's cache is not smaller at this context.")
