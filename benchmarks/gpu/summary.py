"""The result of `linearize.benchmarks.gpu_check` as a page of Markdown."""

from typing import Any

__all__ = ["markdown"]


def markdown(data: dict[str, Any]) -> str:
    """Verdict, machine, correctness by section, speed by section, what failed with its traceback, what did not run."""
    records = [record for section in data["sections"] for record in section["steps"]]
    lines = ["# GPU check", "", f"**{data['verdict']}**", ""]
    if data["rehearsal"]:
        lines += ["A rehearsal on a CPU, in Triton's interpreter: it says nothing about kernels on a GPU.", ""]
    if not data["finished"]:
        lines += ["Not finished: this page holds what was done until it was written.", ""]
    counts = ", ".join(f"{count} {status}" for status, count in data["counts"].items())
    lines += [f"{counts}; {data['seconds']:.0f} s of {60 * data['minutes']:.0f} s.", ""]
    lines += _machine(records)
    for section in data["sections"]:
        steps = section["steps"]
        if not steps:
            continue
        lines += [f"## {section['name'][0].upper()}{section['name'][1:]}", ""]
        tables = [found for record in steps for found in record["values"].get("table", [])]
        if section["kind"] == "speed":
            lines += [*(_table(tables) if tables else []), *_others(steps)]
        else:
            lines += _table([_outcome(record) for record in steps])
    kernels = _kernels(records)
    if kernels:
        lines += ["## Kernels as the driver loaded them", "", *_table(kernels)]
    for record in records:
        if record["status"] == "failed" and record["traceback"]:
            lines += [f"## Failure: {record['section']}, {record['step']}", "", "```"]
            lines += [record["traceback"].strip().replace("```", "'''"), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(records: list[dict[str, Any]]) -> list[str]:
    values = next((record["values"] for record in records if "machine" in record["values"]), None)
    if values is None:
        return []
    machine, device = values["machine"], values.get("device")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [f"- {machine['date']}, {machine['system']}, {machine['cpu']['model']}; {versions}"]
    if device is not None:
        lines.insert(0, "- " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items()))
    commit = machine["commit"]
    if commit is not None:
        lines.append(f"- commit {commit['hash']}{' with changes' if commit['changed'] else ''}")
    lines += [f"- {name}: {detail}" for name, _, detail in values["doctor"]]
    return [*lines, ""]


def _outcome(record: dict[str, Any]) -> dict[str, Any]:
    """A correctness step in a row: its number that is nearest to its bound."""
    errors = record["values"].get("errors", {})
    worst = max(errors, key=lambda name: _used(errors[name]), default=None)
    error, bound = (None, None) if worst is None else errors[worst]
    return {
        "step": record["step"],
        "status": record["status"],
        "s": round(record["seconds"], 1),
        "nearest to its bound": worst,
        "error": f"{error:.2g}" if isinstance(error, float) else error,
        "bound": bound if bound is None else f"{bound:.2g}",
        "why": record["reason"],
    }


def _used(pair: list[Any]) -> float:
    """The error as a share of its bound; infinite for NaN, and above a bound of 0."""
    error, bound = pair
    if isinstance(error, str):
        return float("inf")
    return error / bound if bound else (float("inf") if error else 0.0)


def _others(steps: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {record['step']}: {record['status']}, {record['reason']}" for record in steps if record["reason"]]
    return [*lines, ""] if lines else []


def _kernels(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kernel once for each set of numbers, most local memory first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        for kernel in record["values"].get("kernels", []):
            shown = {name: value for name, value in kernel.items() if name != "device"}
            entry = found.setdefault(tuple(shown.values()), {**shown, "compiled for": []})
            if record["step"] not in entry["compiled for"]:
                entry["compiled for"].append(record["step"])
    ordered = sorted(found.values(), key=lambda x: (-x["local_bytes"], x["kernel"], -x["registers"]))
    return [{**kernel, "compiled for": "; ".join(kernel["compiled for"])} for kernel in ordered]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows under the union of their columns, numbers to the right, and an empty line."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    number = (int, float, type(None))
    sides = ["--:" if all(isinstance(row.get(name), number) for row in rows) else "---" for name in columns]
    lines = [columns, sides, *(["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return [*("| " + " | ".join(line) + " |" for line in cells), ""]
