"""What the commands do for one model; `linearize.job` does the whole job of a recipe."""

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
from linearize.rows import CONTROL, comparison_rows, speed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "announce_dtype",
    "bench_model",
    "check_evaluation",
    "convert_and_save",
    "evaluate_model",
    "held_out_tokens",
    "run_folder",
    "write_answer",
]

# Text beyond what perplexity reads, so that the stretches that needles hide in differ from one another.
HAYSTACKS = 4
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
    name: str, base: str | None, options: EvaluateOptions, out: Path, dtype: str, device: str | None, seed: int
) -> dict[str, Any]:
    """Measure a model beside what it must be compared with and write the JSON; returns what was written."""
    from linearize.benchmarks.evaluate import evaluate_rows
    from linearize.benchmarks.files import write_json

    # By what its files record, not by where they are: a whole student on the hub needs its original too.
    whole = resolve(name).kind != "adapter" and recorded_conversion(name) is not None
    if whole and base is None:
        raise LinearizeError(f"base: {name!r} is a whole student, compared with its original; name that with --base")
    chosen = announce_dtype(dtype, device)
    # Mistakes in texts and lengths show before minutes of loading.
    tokenizer = load_tokenizer(name, None if whole else base)
    tokens = held_out_tokens(options, *_data(name, seed), tokenizer=tokenizer)
    if whole:
        model, _ = load_model(name, chosen, device)
        original, _ = load_model(str(base), chosen, device)
    else:
        # LoRA stays apart: without it the weights are the original's, and no second model is needed.
        model, _ = load_model(name, chosen, device, base=base, merge=False)
        original = None
        _add_control(model, run_folder(name))
    rows = comparison_rows(model, original)
    result = evaluate_rows(rows, tokenizer, tokens, options, seed)
    result["notes"].append(_near_side(model))
    write_json(out, result)
    return result


def run_folder(name: str) -> Path | None:
    """The folder of the run that made a student, OUT of OUT/student; None for any other model."""
    path = Path(name).expanduser()
    path = path if path.name == "student" else path.resolve()
    found = path.name == "student" and path.is_dir() and (path.parent / "recipe.yaml").is_file()
    return path.parent if found else None


def _add_control(model: Any, run: Path | None) -> None:
    """Put the LoRA of the run's control beside the student's, so that a new comparison has all rows of the run's."""
    if run is not None and hasattr(model, "peft_config") and (run / CONTROL).is_dir():
        active = model.active_adapter
        model.load_adapter(str(run / CONTROL), adapter_name=CONTROL)
        model.set_adapter(active)


def _near_side(model: Any) -> str:
    """What stays exact in a converted model: for an original, nothing else says what it is compared with."""
    config = LinearizeConfig.from_dict(base_model(model).config.linearize)
    recent = f"{config.window} to {2 * config.window - 1} recent tokens"
    return f"Converted layers keep exactly: window W = {config.window} ({recent}) and sinks S = {config.sinks}."


def bench_model(
    name: str, base: str | None, options: dict[str, Any], out: Path, dtype: str, device: str | None, seed: int
) -> dict[str, Any]:
    """Time a model against the original attention and write the JSON; returns what was written."""
    from linearize.benchmarks.decode import bench_decode
    from linearize.benchmarks.files import write_json

    tokenizer = load_tokenizer(name, base)
    tokens = held_out_tokens(EvaluateOptions(), *_data(name, seed), tokenizer=tokenizer)
    model, _ = load_model(name, announce_dtype(dtype, device), device, base=base)
    result = bench_decode(speed_rows(model), tokens=tokens, seed=seed, **options)
    note(_near_side(model))
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
) -> None:
    """Continue a prompt; the text streams to standard output.

    Raises:
        LinearizeError: chat asked of a model without a chat template, or an empty prompt.
    """
    from transformers import TextStreamer

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
    model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


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
    """The text to evaluate on: `options.text` where it is given, else what `data` never trains on.

    Returns:
        LongTensor (n,), at most what the measurements can use.

    Raises:
        LinearizeError: a file that is missing or not UTF-8, or no text left to hold out.
    """
    limit = max(options.tokens, HAYSTACKS * max(options.needle_lengths, default=0))
    if options.text is None:
        from linearize.distill.data import build_stream

        return build_stream(data, tokenizer, seed, part="held_out").tokens(limit)
    path = Path(options.text)
    if not path.is_file():
        raise LinearizeError(f"text: {options.text!r} is not a file; name a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LinearizeError(f"text: {options.text!r} is not UTF-8 at byte {error.start}; convert it") from error
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][:limit], dtype=torch.long)


def check_evaluation(options: EvaluateOptions, tokens: Tensor, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
    """Raise the LinearizeError that `evaluate_rows` would raise, without a model."""
    from linearize.benchmarks.choices import load_items
    from linearize.benchmarks.needle import build_needles
    from linearize.benchmarks.perplexity import cut_sequences

    cut_sequences(tokens, options.seq_len, options.tokens)
    if options.choices is not None:
        load_items(options.choices, options.choices_limit, seed)
    if options.needle_lengths and options.needle_depths:
        build_needles(tokenizer, tokens, options.needle_lengths, options.needle_depths, seed=seed)
