"""What the commands do for one model; `linearize.job` does the whole job of a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.config import LinearizeConfig
from linearize.console import note
from linearize.convert import base_model, convert
from linearize.distill.options import DataOptions, EvaluateOptions, Source
from linearize.errors import LinearizeError
from linearize.inspection import Inspection, inspect_config
from linearize.models import load_config, load_model, load_tokenizer, recorded_conversion, resolve, resolve_dtype
from linearize.rows import CONTROL, WINDOW, comparison_rows, speed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "announce_dtype",
    "bench_model",
    "check_evaluation",
    "convert_and_save",
    "evaluate_model",
    "evaluation_texts",
    "held_out_tokens",
    "run_folder",
    "write_answer",
]

# Text beyond what perplexity reads, so that the stretches that needles hide in differ from one another.
HAYSTACKS = 4
HELD_OUT = "held-out"
# Of transformers' `generate`, where a model's generation config has none.
DEFAULT_TOP_K = 50
# Text that every Python has, for measuring where none is named.
DEFAULT_DATA = DataOptions(sources=(Source(kind="pydoc"),))


def convert_and_save(name: str, config: LinearizeConfig, out: Path, adapter: bool) -> Inspection:
    """Convert a model in the dtype that it is stored in and save it with its tokenizer; returns the plan.

    Raises:
        LinearizeError: what `inspect_config` or `convert` refuses. Then nothing is written.
    """
    from linearize.checkpoint import save

    plan = inspect_config(load_config(name), config, name=name)  # refuses before the weights are read
    model, tokenizer = load_model(name, dtype=None, device="cpu")
    convert(model, config)
    save(model, out, adapter=adapter, tokenizer=tokenizer)
    return plan


def evaluate_model(
    name: str,
    base: str | None,
    options: EvaluateOptions,
    out: Path,
    dtype: str,
    device: str | None,
    seed: int,
    only: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    also: Sequence[str] = (),
    work: Path | None = None,
) -> dict[str, Any]:
    """Measure a model beside what it must be compared with and write the JSON; returns what was written.

    Args:
        name, base: as for `load_model`; for a whole student, `base` is what it is compared with.
        options: what is measured.
        out: the JSON.
        dtype, device, seed: as everywhere.
        only: kinds of measurements, see `evaluate_rows`; None is all.
        rows: names of the rows that are measured beside the original; None is all.
        also: more rows, see `also_rows`.
        work: the folder of finished measurements; None is OUT.work beside the JSON.
    """
    from linearize.also import also_rows, row_identities, tokens_seen
    from linearize.benchmarks.evaluate import BASELINE, MEASUREMENTS, evaluate_rows
    from linearize.benchmarks.files import write_json
    from linearize.benchmarks.work import Work

    # By what its files record, not by where they are: a whole student on the hub needs its original too.
    whole = resolve(name).kind != "adapter" and recorded_conversion(name) is not None
    if whole and base is None:
        raise LinearizeError(f"base: {name!r} is a whole student, compared with its original; name that with --base")
    chosen = announce_dtype(dtype, device)
    # Mistakes in texts and lengths show before minutes of loading.
    tokenizer = load_tokenizer(name, None if whole else base)
    texts = evaluation_texts(options, *_data(name, seed), tokenizer=tokenizer)
    check_evaluation(options, texts, tokenizer, seed)
    if whole:
        model, _ = load_model(name, chosen, device)
        original, _ = load_model(str(base), chosen, device)
    else:
        # LoRA stays apart: without it the weights are the original's, and no second model is needed.
        model, _ = load_model(name, chosen, device, base=base, merge=False)
        original = None
        _add_beside(model, run_folder(name))
    found = comparison_rows(model, original)
    below = base_model(model if original is None else original).config.name_or_path
    found |= also_rows(also, found, below, chosen, base_model(model).device.type)
    if rows is not None:
        for row in rows:
            if row not in found:
                raise LinearizeError(f"rows: there is no row {row!r}; choose from {', '.join(map(repr, found))}")
        found = {row: enter for row, enter in found.items() if row in rows or row == BASELINE}
    identities = row_identities(found, model, below, name, run_folder(name), also)
    kept = Work(out.with_suffix(".work") if work is None else work, identities)
    conversion = base_model(model).config.linearize
    measured = MEASUREMENTS if only is None else only
    result = evaluate_rows(found, tokenizer, texts, options, seed, kept, measured, conversion)
    result["tokens_seen"] = tokens_seen(found, run_folder(name), also)
    result["notes"].append(_near_side(model))
    write_json(out, result)
    return result


def run_folder(name: str) -> Path | None:
    """The folder of the run that made a student, OUT of OUT/student; None for any other model."""
    path = Path(name).expanduser()
    path = path if path.name == "student" else path.resolve()
    found = path.name == "student" and path.is_dir() and (path.parent / "recipe.yaml").is_file()
    return path.parent if found else None


def _add_beside(model: Any, run: Path | None) -> None:
    """Put the LoRA of what a run trained beside its student into the model, so that a new comparison has all rows."""
    if run is None or not hasattr(model, "peft_config"):
        return
    active = model.active_adapter
    for role in (CONTROL, WINDOW):
        if (run / role).is_dir():
            model.load_adapter(str(run / role), adapter_name=role)
    model.set_adapter(active)


def _near_side(model: Any) -> str:
    """What stays exact in a converted model: for an original, nothing else says what it is compared with."""
    config = LinearizeConfig.from_dict(base_model(model).config.linearize)
    recent = f"{config.window} to {2 * config.window - 1} recent tokens"
    return f"Converted layers keep exactly: window W = {config.window} ({recent}) and sinks S = {config.sinks}."


def bench_model(
    name: str,
    base: str | None,
    options: dict[str, Any],
    out: Path,
    dtype: str,
    device: str | None,
    seed: int,
    control: bool = False,
) -> dict[str, Any]:
    """Time a model against the original attention and write the JSON; returns what was written.

    Args:
        name, base: as for `load_model`.
        options: of `bench_decode`.
        out: the JSON.
        dtype, device, seed: as everywhere.
        control: time the original twice, as two rows.
    """
    from linearize.benchmarks.decode import bench_decode, check_bench
    from linearize.benchmarks.files import write_json

    check_bench(**options)  # before minutes of loading
    tokenizer = load_tokenizer(name, base)
    tokens = held_out_tokens(EvaluateOptions(), *_data(name, seed), tokenizer=tokenizer)
    model, _ = load_model(name, announce_dtype(dtype, device), device, base=base)
    rows = speed_rows(model, control)
    result = bench_decode(rows, tokens=tokens, seed=seed, **options)
    *_, converted = rows.values()
    with converted() as other:
        note(_near_side(other))
    write_json(out, result)
    return result


def write_answer(
    name: str,
    base: str | None,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    dtype: str,
    device: str | None,
    seed: int,
    speculative: bool = False,
) -> None:
    """Continue a prompt; the text streams to standard output.

    Args:
        speculative: the original writes, and the student drafts for it (see `linearize.speculative`).
        the others: as everywhere.

    Raises:
        LinearizeError: chat asked of a model without a chat template, an empty prompt, or `speculative` of a whole
            student without `base`: what its weights were before training is not known.
    """
    from transformers import TextStreamer

    if speculative:
        model, original, tokenizer = _student_and_original(name, base, announce_dtype(dtype, device), device)
    else:
        model, tokenizer = load_model(name, announce_dtype(dtype, device), device, base=base)
    if chat:
        if tokenizer.chat_template is None:
            raise LinearizeError(f"chat: {name!r} has no chat template; leave --chat out, or use an instruct model")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise LinearizeError("prompt: it has no tokens; give the text to continue")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    inputs = inputs.to(model.device)
    options: dict[str, Any] = sampling | {"max_new_tokens": max_new_tokens}
    options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if speculative:
        from linearize.speculative import speculative_generate

        if temperature:  # what `generate` takes besides
            settings = base_model(model).generation_config
            options["top_k"] = DEFAULT_TOP_K if settings.top_k is None else settings.top_k or None
            options["top_p"] = settings.top_p
        _say_what_is_not_applied(base_model(model).generation_config)
        speculative_generate(model, inputs["input_ids"], inputs["attention_mask"], original=original, **options)
        return
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generate(**inputs, **options, pad_token_id=pad)


def _say_what_is_not_applied(settings: Any) -> None:
    """`generate` would heed these, which `speculative_generate` does not know."""
    known = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": None, "typical_p": 1.0}
    asked = {name: getattr(settings, name, None) for name in known}
    ignored = [f"{name} {value}" for name, value in asked.items() if value not in (None, known[name])]
    if ignored:
        note(f"speculative: {', '.join(ignored)} of the model's generation config is not applied")


def _student_and_original(name: str, base: str | None, dtype: torch.dtype, device: str | None) -> tuple[Any, Any, Any]:
    """(student, original, tokenizer); the original is None where the student has it inside, its LoRA unmerged."""
    if recorded_conversion(name) is None:
        raise LinearizeError(f"speculative: {name!r} is an original, which drafts for none; leave --speculative out")
    if resolve(name).kind == "adapter":
        model, tokenizer = load_model(name, dtype, device, base=base, merge=False)
        return model, None, tokenizer
    if base is None:
        raise LinearizeError(f"base: {name!r} is a whole student, which drafts for its original; name that with --base")
    model, tokenizer = load_model(name, dtype, device)
    return model, load_model(base, dtype, device)[0], tokenizer


def announce_dtype(dtype: str, device: str | None) -> torch.dtype:
    """Choose the dtype and say on stderr why."""
    chosen, reason = resolve_dtype(dtype, device)
    note(f"dtype: {reason}")
    return chosen


def _data(name: str, seed: int) -> tuple[DataOptions, int]:
    """Where held-out text comes from, and its seed: for a run's student the run's own data, so that nothing that it
    was trained on is measured."""
    run = run_folder(name)
    if run is None:
        return DEFAULT_DATA, seed
    from linearize.distill.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    return recipe.data, recipe.seed


def held_out_tokens(
    options: EvaluateOptions, data: DataOptions, seed: int, tokenizer: "PreTrainedTokenizerBase"
) -> Tensor:
    """The first of `evaluation_texts`."""
    return next(iter(evaluation_texts(options, data, seed, tokenizer).values()))


def evaluation_texts(
    options: EvaluateOptions, data: DataOptions, seed: int, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Tensor]:
    """The texts to evaluate on: `options.text` where it is given, else what `data` never trains on.

    Returns:
        name -> LongTensor (n,), at most what the measurements can use.

    Raises:
        LinearizeError: a file that is missing or not UTF-8, a name twice, or no text left to hold out.
    """
    from linearize.benchmarks.items import named_path

    limit = max(
        options.tokens,
        HAYSTACKS * max(options.needle_lengths, default=0),
        2 * max(options.recall_lengths, default=0),
    )
    if not options.text:
        from linearize.distill.data import build_stream

        return {HELD_OUT: build_stream(data, tokenizer, seed, part="held_out").tokens(limit)}
    texts: dict[str, Tensor] = {}
    for given in options.text:
        name, path = named_path(given, "text")
        if name in texts:
            raise LinearizeError(f"text: two files are called {name!r}; write NAME={path} for one of them")
        try:
            # A token has at least one byte, and rarely more than sixteen: a large file is not read to its end.
            text = path.read_text(encoding="utf-8")[: 16 * limit]
        except UnicodeDecodeError as error:
            raise LinearizeError(f"text: {str(path)!r} is not UTF-8 at byte {error.start}; convert it") from error
        texts[name] = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:limit], dtype=torch.long)
    return texts


def check_evaluation(
    options: EvaluateOptions, texts: dict[str, Tensor], tokenizer: "PreTrainedTokenizerBase", seed: int
) -> None:
    """Raise the LinearizeError that `evaluate_rows` would raise, without a model."""
    from linearize.benchmarks.evaluate import plan_measurements

    plan_measurements(tokenizer, texts, options, (), seed)
