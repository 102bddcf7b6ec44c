"""The command line, `linearize --help`: each command reads its options and hands over to the library.

Nothing heavy is imported here: torch and transformers load inside the commands that need them.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize._version import __version__
from linearize.cli_calibrate import calibrate
from linearize.cli_capacity import capacity
from linearize.cli_export import export
from linearize.cli_generate import generate
from linearize.cli_options import (
    DEFAULT,
    Base,
    Device,
    DType,
    FeatureDim,
    Mix,
    Mixer,
    Model,
    Seed,
    Sinks,
    SoftmaxLayers,
    Window,
    check_new_folder,
    conversion,
    planned_conversion,
    quiet,
)
from linearize.cli_plan import plan
from linearize.cli_select import select
from linearize.config import LinearizeConfig
from linearize.console import OneLineErrors, PlainCommand, PlainGroup, note, parse_counts, parse_tokens
from linearize.errors import LinearizeError

__all__ = ["app", "main"]

app = typer.Typer(
    name="linearize",
    cls=OneLineErrors,
    help="Give a pretrained language model attention with a fixed-size memory, and measure what that kept and gained.",
    epilog="Start with: linearize inspect MODEL, then linearize run demo --out runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    help="Measure speed and memory against the original.",
    epilog="Example: linearize bench decode runs/demo/student --contexts 1k,8k",
)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The `linearize` command."""
    app(prog_name="linearize")


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or a preset: demo, default, decomposed, lolcats, liger or window-only."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe; can be given many times."),
]
Teacher = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The original, instead of the recipe's.")]
RunFolder = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="runs/NAME-OF-RECIPE if left out.")]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="NAME", help="Report to tensorboard, wandb, mlflow, ...; can be given many times."),
]
ResultFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The JSON; if left out, in the folder of the student's run, else here."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"linearize {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Options before the command. `OneLineErrors` itself takes --debug off the command line."""


@app.command(cls=PlainCommand)
def inspect(
    model: Model,
    mixer: Mixer = DEFAULT.mixer,
    window: Window = DEFAULT.window,
    sinks: Sinks = DEFAULT.sinks,
    mix: Mix = DEFAULT.mix,
    softmax_layers: SoftmaxLayers = "none",
    feature_dim: FeatureDim = None,
    contexts: Annotated[
        str | None, typer.Option(help="Context lengths in tokens; 1k,8k,32k,128k if left out (1k = 1024).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights, keys and values: float32, bfloat16, float16.")] = "bfloat16",
    train: Annotated[bool, typer.Option("--train", help="Show the memory per GPU of each training stage instead.")] = (
        False
    ),
    seq_len: Annotated[int | None, typer.Option(help="With --train: tokens a row; 1024 if left out.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="With --train: rows a GPU; 1 if left out.")] = None,
    processes: Annotated[int | None, typer.Option(help="With --train: GPUs in all; 1 if left out.")] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="With --train: frozen weights divided by FSDP2.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show layer by layer what conversion would do, and the bytes it would save. Reads no weights.

    Example: linearize inspect path/to/model --window 64 --softmax-layers every:4 --contexts 1k,32k
    """
    config = conversion(mixer, window, sinks, mix, softmax_layers, feature_dim)
    sizes = {"seq_len": seq_len, "batch_size": batch_size, "processes": processes, "fsdp": fsdp or None}
    training: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if training and not train:
        raise LinearizeError(f"{next(iter(training))}: it is a setting of --train; add --train, or leave it out")
    if train and contexts is not None:
        raise LinearizeError(
            f"contexts: {contexts!r} is for caches, which training has none of; leave out --train or it"
        )
    lengths = parse_tokens(contexts or "1k,8k,32k,128k", "contexts")
    quiet()
    from linearize.inspection import inspect_config
    from linearize.models import load_config
    from linearize.tables import print_inspection, print_json, print_training
    from linearize.training_memory import training_memory

    config = planned_conversion(model, config)
    if train:
        memory = training_memory(load_config(model), config, dtype=dtype, name=model, **training)
        print_json(memory.to_dict()) if json else print_training(memory)
        return
    plan = inspect_config(load_config(model), config, lengths, dtype, name=model)
    if json:
        print_json(plan.to_dict())
    else:
        print_inspection(plan)


@app.command(cls=PlainCommand)
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the converted model.")],
    mixer: Mixer = DEFAULT.mixer,
    window: Window = DEFAULT.window,
    sinks: Sinks = DEFAULT.sinks,
    mix: Mix = DEFAULT.mix,
    softmax_layers: SoftmaxLayers = "none",
    feature_dim: FeatureDim = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Save only what conversion adds, not the base.")] = False,
) -> None:
    """Convert a model and save it, untrained.

    Example: linearize convert path/to/model converted --window 64 --sinks 4
    """
    config = conversion(mixer, window, sinks, mix, softmax_layers, feature_dim)
    check_new_folder(out)
    quiet()
    from linearize.tasks import convert_and_save

    plan = convert_and_save(model, config, out, adapter)
    print(f"{plan.converted} of {len(plan.layers)} layers converted, untrained; saved in {out}")
    if config.mixer != "none":
        note("The state is untrained, so quality is poor. This converts the original again and teaches the student:")
        words = ["--model", model, "--set", "data.sources.0.path=texts/*.txt", *_settings(config)]
        note(f"  linearize distill default {shlex.join(words)}")


app.command(cls=PlainCommand)(export)
app.command(cls=PlainCommand)(calibrate)
app.command(cls=PlainCommand)(select)
app.command(cls=PlainCommand)(plan)


@app.command(cls=PlainCommand)
def distill(
    recipe: RecipeName, model: Teacher = None, out: RunFolder = None, set_: Settings = None, track: Track = None
) -> None:
    """Convert a model and teach it; the student is saved in OUT/student. Goes on where an interrupted run ended.

    Example: linearize distill default --model path/to/model --set 'data.sources.0.path=texts/*.txt' --out runs/mine
    """
    _job(recipe, model, out, set_, track, parts=("student",))


@app.command(cls=PlainCommand)
def run(
    recipe: RecipeName, model: Teacher = None, out: RunFolder = None, set_: Settings = None, track: Track = None
) -> None:
    """The whole job of one recipe: convert, teach, evaluate, bench, report. Goes on where an interrupted run ended.

    Example: linearize run demo --out runs/short --set stages.0.transfer.budget.minutes=1
    """
    from linearize.job import PARTS

    _job(recipe, model, out, set_, track, parts=PARTS)


def _job(
    name: str,
    model: str | None,
    out: Path | None,
    settings: list[str] | None,
    track: list[str] | None,
    parts: tuple[str, ...],
) -> None:
    from linearize.distill.recipe import load_recipe

    recipe = load_recipe(name, [*([] if model is None else [f"model={model}"]), *(settings or [])])
    quiet()
    from linearize.job import Job

    folder = out or Path("runs") / recipe.name
    for path in Job(recipe, folder, track or ()).run(parts):
        print(path)


@app.command(cls=PlainCommand)
def evaluate(
    model: Model,
    base: Base = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="A text; many times if you like; Python's documentation if left out."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of each are read.")] = 8192,
    contexts: Annotated[str, typer.Option(help="Tokens a sequence, one perplexity each.")] = "1k",
    choices: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Questions, jsonl as of ARC, PIQA, Winogrande, LAMBADA; many times."),
    ] = None,
    choices_limit: Annotated[int, typer.Option(help="How many questions of each are read, at random.")] = 100,
    needle: Annotated[str, typer.Option(help="Haystack lengths in tokens, or none.")] = "256,512,1k",
    needle_depths: Annotated[str, typer.Option(help="Where in the haystack, 0 = start, 1 = end.")] = "0.1,0.5,0.9",
    needle_trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 1,
    needle_keys: Annotated[str, typer.Option(help="How many values are hidden, of which one is asked for: 1,4.")] = "1",
    needle_digits: Annotated[int, typer.Option(help="Digits of a number.")] = 5,
    needle_kind: Annotated[str, typer.Option(help="What is hidden, digits or words or both.")] = "digits",
    recall_lengths: Annotated[
        str, typer.Option(help="Tokens of prompts that ask for pairs and copies said before, or none.")
    ] = "512",
    kl_tokens: Annotated[int, typer.Option(help="Tokens that the distance from the original is measured on.")] = 2048,
    answers: Annotated[int, typer.Option(help="Prompts that are answered; 0 leaves generation out.")] = 8,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 64,
    letters: Annotated[
        int, typer.Option(help="Questions of each task asked by letter, in every order of choices; 0 leaves it out.")
    ] = 0,
    attention: Annotated[
        bool, typer.Option("--attention", help="Where attention goes, by layer and head: sinks, window, older.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, such as arc_easy,piqa.")
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files of your own for it, in YAML.")
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="How many questions of each are asked.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What is asked: jsonl of chats or prompts; neutral questions if left out.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Among perplexity, choices, needle, kl, generation, recall, letters, attention, lm-eval; the rest as "
            "measured before."
        ),
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="A row beside the original; many times; all if left out.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="One more row: a student, a control's LoRA, or a run's checkpoints/STAGE."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of finished measurements; evaluations may share one; OUT.work if left out."
        ),
    ] = None,
    out: ResultFile = None,
    dtype: DType = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure quality: the original, window + sinks, the student, the student with its state or window off.

    Goes on where an interrupted evaluation ended.

    Example: linearize evaluate runs/demo/student --tokens 16384 --contexts 1k,4k
    """
    from linearize.distill.options import EvaluateOptions

    def names(text: str) -> Any:
        return tuple(name.strip() for name in text.split(",") if name.strip())

    depths: Any = needle_depths.split(",")
    options = EvaluateOptions(
        text=tuple(text or ()),
        tokens=tokens,
        contexts=parse_tokens(contexts, "contexts"),
        choices=tuple(choices or ()),
        choices_limit=choices_limit,
        needle_lengths=() if needle == "none" else parse_tokens(needle, "needle"),
        needle_depths=depths,
        needle_trials=needle_trials,
        needle_keys=parse_tokens(needle_keys, "needle-keys"),
        needle_digits=needle_digits,
        needle_kind=names(needle_kind),
        recall_lengths=() if recall_lengths == "none" else parse_tokens(recall_lengths, "recall-lengths"),
        attention=attention,
        letters=letters,
        lm_eval=names(lm_eval or ""),
        lm_eval_tasks=None if lm_eval_tasks is None else str(lm_eval_tasks),
        lm_eval_limit=lm_eval_limit,
        kl_tokens=kl_tokens,
        answers=answers,
        answer_tokens=answer_tokens,
        prompts=None if prompts is None else str(prompts),
    )
    kinds = None if only is None else [kind.strip() for kind in only.split(",")]
    quiet()
    from linearize.tables import print_evaluation
    from linearize.tasks import evaluate_model

    with _result_file(model, out, "evaluate.json") as file:
        found = evaluate_model(model, base, options, file, dtype, device, seed, kinds, rows, also or (), work)
        print_evaluation(found)


@bench_app.command("decode", cls=PlainCommand)
def bench_decode(
    model: Model,
    base: Base = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens; 1k = 1024.")] = "1k,4k,8k",
    batch: Annotated[str, typer.Option(help="Sequences at once; a list is measured at every context.")] = "1",
    decode_tokens: Annotated[int, typer.Option(help="Timed steps a repeat.")] = 16,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats, of which the median is shown.")] = 5,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Among dynamic, static, static+compile, dynamic+projections, static+projections; all that "
            "this machine has, with minutes of compiling, if left out."
        ),
    ] = None,
    fill: Annotated[
        str, typer.Option(help="Of more tokens than this, context times batch, a part is filled in, not read; or none.")
    ] = "8k",
    prefill: Annotated[str | None, typer.Option(help="Lengths in tokens whose prefill is timed besides.")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Time the original once more, as a row: the measurement's own error.")
    ] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop in time, and leave out contexts that do not fit.")] = None,
    out: ResultFile = None,
    dtype: DType = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure milliseconds per token, prefill and cache by context and batch, each model in its best mode.

    Example: linearize bench decode runs/demo/student --contexts 1k,8k,32k --batch 1,4 --prefill 4k,32k
    """
    options = {
        "contexts": parse_tokens(contexts, "contexts"),
        "batches": parse_counts(batch, "batch"),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "modes": None if modes is None else [mode.strip() for mode in modes.split(",")],
        "fill": _fill_limit(fill),
        "prefill": () if prefill is None else parse_tokens(prefill, "prefill"),
        "max_minutes": minutes,
    }
    quiet()
    from linearize.tables import print_bench
    from linearize.tasks import bench_model

    with _result_file(model, out, "bench.json") as file:
        print_bench(bench_model(model, base, options, file, dtype, device, seed, control))


def _fill_limit(text: str) -> int | None:
    if text == "none":
        return None
    limit = parse_tokens(text, "fill")
    if len(limit) > 1:
        raise LinearizeError(f"fill: {text!r} is a list; give one number of tokens, or none")
    return limit[0]


bench_app.command("capacity", cls=PlainCommand)(capacity)


@bench_app.command("compile", cls=PlainCommand)
def bench_compile(
    targets: Annotated[str | None, typer.Option(help="Among sm_80, sm_90, gfx942; all if left out.")] = None,
    models: Annotated[str | None, typer.Option(help="Among those of the table; all if left out.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="For compile.md and compile.json.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory, bounds of time.

    Exit status 1 where a kernel spills, needs too much shared memory, misses the tensor cores or does not compile.

    Example: linearize bench compile --targets sm_90 --out compiled
    """
    from linearize.benchmarks.compile import bench_compile as compile_kernels

    names = [None if text is None else [name.strip() for name in text.split(",")] for text in (targets, models)]
    done = compile_kernels(out, names[0], names[1])
    for row in done:
        for problem in row.resources.problems:
            note(f"{row.target.name}, {row.case.model}, W {row.case.window}, {row.case.kernel}: {problem}")
    print(out / "compile.md")
    if any(row.resources.problems for row in done):
        raise typer.Exit(1)


@bench_app.command("kernels", cls=PlainCommand)
def bench_kernels(
    model: Annotated[str, typer.Option(help="Whose shape: SmolLM2-135M, Qwen3-0.6B or Llama-3.1-8B.")] = "SmolLM2-135M",
    tokens: Annotated[str, typer.Option(help="Lengths in tokens; 1k = 1024.")] = "1k,4k,16k",
    what: Annotated[str, typer.Option(help="Among forward, backward, decode.")] = "forward,backward,decode",
    dtype: Annotated[str, typer.Option(help="Among float32, bfloat16, float16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    window: Window = DEFAULT.window,
    sinks: Sinks = DEFAULT.sinks,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats, of which the median is shown.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile", help="Time the PyTorch form under torch.compile too.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSON; the page goes beside it.")] = Path(
        "kernels.json"
    ),
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OLD.json", help="An earlier result of this device: status 1 if a cell is slower now."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With --compare: percent that do not count; 10 if left out.")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure one layer's attention alone, by length, beside PyTorch's softmax attention of the same shape.

    Example: linearize bench kernels --tokens 1k,4k,16k,32k --what forward --compare before.json
    """
    lengths = parse_tokens(tokens, "tokens")
    if out.suffix != ".json":
        raise LinearizeError(f"out: {str(out)!r} does not end in .json; name the file of the results, kernels.json")
    if compare is not None and compare.resolve() == out.resolve():
        raise LinearizeError(f"compare: {str(compare)!r} would be replaced by the new result; give another --out")
    if compare is None and tolerance is not None:
        raise LinearizeError(f"tolerance: {tolerance:g} is a setting of --compare; add --compare, or leave it out")
    allowed = 10.0 if tolerance is None else tolerance
    quiet()
    import torch

    from linearize.benchmarks.kernel_regression import compare_kernels, read_old
    from linearize.benchmarks.microbenchmark import Problem
    from linearize.benchmarks.microbenchmark import bench_kernels as measure
    from linearize.benchmarks.microbenchmark_page import markdown, write_result
    from linearize.tables import print_regression

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    whats, dtypes = ([name.strip() for name in text.split(",")] for text in (what, dtype))
    problem = Problem(model, batch, window, sinks)
    old = None if compare is None else read_old(compare, problem, place, lengths, whats, dtypes, allowed)
    result = measure(problem, lengths, whats, dtypes, place, repeats, compiled, seed)
    print(markdown(result).rstrip())
    for path in write_result(out, result):
        note(f"written: {path}")
    if old is not None:
        found = compare_kernels(old, result, allowed)
        print_regression(found)
        if found["slower"]:
            raise typer.Exit(1)


@app.command(cls=PlainCommand)
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder: evaluate.json, bench.json, ...")],
) -> None:
    """Write report.html, one file without dependencies, from what a folder holds.

    Example: linearize report runs/demo
    """
    from linearize.benchmarks.report import write_report

    print(write_report(folder))


@app.command(cls=PlainCommand)
def doctor() -> None:
    """Show what runs on this machine and why: GPU, Triton kernels, the backend that is chosen.

    Example: linearize doctor
    """
    quiet()
    from linearize.kernels.backends import doctor as checks

    for check in checks():
        print(f"{'yes' if check.works else 'no':3}  {check.name}: {check.detail}")


@app.command(cls=PlainCommand)
def families() -> None:
    """Show the families of models that can be converted, what the attention of each has of its own, and which cannot.

    Example: linearize families
    """
    from linearize.tables import print_families

    print_families()


app.command(cls=PlainCommand)(generate)


def _settings(config: LinearizeConfig) -> list[str]:
    """The options that give a recipe this conversion: those in which it is not the default."""
    values, default = config.to_dict(), DEFAULT.to_dict()
    changed = {key: value for key, value in values.items() if value != default[key]}
    pairs = (f"convert.{key}={x if isinstance(x, str) else dumps(x)}" for key, x in changed.items())
    return [word for pair in pairs for word in ("--set", pair)]


@contextmanager
def _result_file(model: str, out: Path | None, name: str) -> Iterator[Path]:
    """Where a measurement writes its result; afterwards, say where it is and how to see it.

    By default a run's student is measured into the run's folder, whose report then shows the new result.
    """
    from linearize.benchmarks.report import write_report
    from linearize.tasks import run_folder

    run = run_folder(model) if out is None else None
    file = out or (run or Path()) / name
    if file.is_dir():
        raise LinearizeError(f"out: {str(file)!r} is a folder; give a file, such as {str(file / name)!r}")
    replaced = file.exists()
    yield file
    note(f"written: {file}{', in place of the one before' if replaced else ''}")
    command = f"linearize report {shlex.quote(str(file.parent))}"
    if run is not None:
        note(f"written: {write_report(run)}, which shows it; {command} writes that again")
    elif file.name == name:
        note(f"to see it as a page: {command}")
    else:
        note(f"to see it as a page, rename it to {name}, then: {command}")
