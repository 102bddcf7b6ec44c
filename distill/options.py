"""What the parts of a run can be told. Recipes hold these records; `linearize.distill.recipe` reads them from YAML."""

from dataclasses import dataclass, field
from typing import Literal

from linearize.distill.records import RecipeError, Record, option

__all__ = [
    "BenchOptions",
    "Budget",
    "DataOptions",
    "DistillOptions",
    "EvaluateOptions",
    "ExtendOptions",
    "Source",
    "TransferOptions",
]


@dataclass(frozen=True, kw_only=True)
class Budget(Record):
    """When a stage ends: at whichever limit is reached first. At least one is given.

    Attributes:
        tokens: training tokens.
        steps: optimizer steps.
        minutes: wall-clock minutes of training.
    """

    tokens: int | None = option(None, least=1)
    steps: int | None = option(None, least=1)
    minutes: float | None = option(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is None and self.steps is None and self.minutes is None:
            raise RecipeError("", "no limit is given; name at least one of tokens, steps, minutes")


# Which kinds of source read which optional key; the others must not be given, so that no key is silently ignored.
_SOURCE_KEYS = {
    "path": ("text", "jsonl", "dataset"),
    "field": ("jsonl", "dataset"),
    "loss": ("jsonl", "dataset"),
    "name": ("dataset",),
    "split": ("dataset",),
    "tokens": ("generated",),
    "prompt": ("generated",),
}


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """One source of training text.

    Attributes:
        kind: `"pydoc"`: the reference topics that come with Python. `"generated"`: texts that the teacher writes.
            `"text"`: UTF-8 text files. `"jsonl"`: one JSON object a line. `"dataset"`: a Hugging Face dataset.
        weight: the source's share of the training tokens, relative to the other sources' weights.
        path: text, jsonl: a file or a glob. dataset: a folder or a hub name.
        field: jsonl, dataset: the field that holds the text or the list of chat messages. `None` takes the first of
            text, messages, prompt + response, instruction (+ input) + output that a record has.
        loss: jsonl, dataset: what of chats end-to-end losses count. `"answers"`, if not given: the assistant's words
            and the tokens that end them. `"all"`: every token. In plain texts all count.
        name: dataset: the configuration's name, where it has several.
        split: dataset: `"train"` if not given.
        tokens: generated: how many tokens the teacher writes, 20000 if not given.
        prompt: generated: how each text begins; short neutral openings if not given.
    """

    kind: Literal["pydoc", "generated", "text", "jsonl", "dataset"] = option(
        hint="choose pydoc, generated, text, jsonl or dataset"
    )
    weight: float = option(1.0, above=0)
    path: str | None = None
    field: str | None = None
    loss: Literal["answers", "all"] | None = None
    name: str | None = None
    split: str | None = None
    tokens: int | None = option(None, least=1)
    prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, kinds in _SOURCE_KEYS.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise RecipeError(key, f"kind {self.kind!r} does not read it ({', '.join(kinds)} can); remove it")
        if self.kind in _SOURCE_KEYS["path"] and self.path is None:
            what = "a folder or a hub name" if self.kind == "dataset" else f"a file or a glob, e.g. texts/*.{self.kind}"
            raise RecipeError("path", f"nothing is given; kind {self.kind!r} needs {what.replace('.text', '.txt')}")
        if self.kind in _SOURCE_KEYS["loss"] and self.loss is None:
            object.__setattr__(self, "loss", "answers")
        if self.kind == "dataset" and self.split is None:
            object.__setattr__(self, "split", "train")
        if self.kind == "generated" and self.tokens is None:
            object.__setattr__(self, "tokens", 20_000)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Record):
    """The training data.

    Attributes:
        sources: mixed by their weights.
        seq_len: tokens a row.
        batch_size: rows a batch.
        packing: `"packed"`: documents joined by the end-of-text token and cut into full rows. `"document"`: a row
            holds one document or seq_len tokens of a longer one, right-padded to the longest of its batch.
        held_out: the share of each source (but `generated`) that is kept for evaluation and never trained on.
    """

    sources: tuple[Source, ...] = option(hint="list at least one source, e.g. - {kind: text, path: texts/*.txt}")
    seq_len: int = option(1024, least=2)
    batch_size: int = option(1, least=1)
    packing: Literal["packed", "document"] = "packed"
    held_out: float = option(0.1, least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise RecipeError("sources", "the list is empty; name at least one, e.g. {kind: text, path: texts/*.txt}")


_BUDGET_HINT = {"hint": "say when the stage ends, e.g. budget: {minutes: 10}"}


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Record):
    """The stage in which every converted layer learns alone, from the teacher's hidden states.

    Attributes:
        budget: when the stage ends.
        objective: `"decomposed"`: state and mix each have their own target. `"output"`: error of the layer's output.
            `"weights"`: KL of the teacher's attention weights from the student's. `"hidden"`: error of what the layer
            adds to the hidden states, after its output projection.
        calibration_tokens: mixers and mixes are first fitted to about so many of the stage's first tokens, whole
            batches of them, from one forward pass; 0 leaves them as converted.
        positions: rows are read with gaps in their positions, which then run up to so many: what is taught is right
            far beyond a row's own length. `None` means four times `data.seq_len`, and no more than the model knows;
            0 leaves no gaps. Rows of several documents have none, nor has a model under flash attention.
        local_steps: how often a layer learns from a batch while it has it; the teacher's pass is shared by them.
        lr: peak learning rate of Adam.
        warmup: share of the budget over which the learning rate rises.
        checkpoint_minutes: minutes between checkpoints.
        log_every: steps between lines of the log.
    """

    budget: Budget = field(metadata=_BUDGET_HINT)
    objective: Literal["decomposed", "output", "weights", "hidden"] = "decomposed"
    calibration_tokens: int = option(4096, least=0)
    positions: int | None = option(None, least=0)
    local_steps: int = option(1, least=1)
    lr: float = option(2e-2, above=0)
    warmup: float = option(0.05, least=0, below=1)
    checkpoint_minutes: float = option(2.0, above=0)
    log_every: int = option(10, least=1)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(Record):
    """The stage in which the whole student learns from the teacher's logits.

    Attributes:
        budget: when the stage ends.
        lr: peak learning rate of Adam, for LoRA or the chosen parameters.
        mixer_lr: the same for mixers and mixes, which take larger steps; 0 leaves them as they are.
        warmup: share of the budget over which the learning rate rises.
        kl_weight: weight of KL(teacher || student).
        ce_weight: weight of the cross-entropy on the text itself.
        top_k: how many of the teacher's likeliest tokens the KL compares; `None` compares the whole vocabulary.
        temperature: both logits are divided by it before the KL.
        teacher_cache: a folder that keeps the teacher's top_k tokens of every batch, for further runs on the same
            text; `None` asks the teacher each time.
        window_dropout: probability with which a layer sees, in one batch, a half or a quarter of its window or none.
        train: `"lora"`, or patterns of parameter names (as in a shell: `*`, `?`) that are trained in full.
        lora_rank: rank of the LoRA matrices.
        lora_alpha: LoRA's scale is lora_alpha / lora_rank.
        lora_targets: names of the modules that get LoRA. q_proj, k_proj, v_proj and o_proj stand for whatever the
            model's family has in their place, such as one projection for q, k and v.
        checkpointing: keep only the layers' inputs for the backward pass and compute the rest again: less memory, about
            a third more time.
        checkpoint_minutes: minutes between checkpoints.
        log_every: steps between lines of the log.
    """

    budget: Budget = field(metadata=_BUDGET_HINT)
    lr: float = option(2e-4, above=0)
    mixer_lr: float = option(5e-3, least=0)
    warmup: float = option(0.05, least=0, below=1)
    kl_weight: float = option(1.0, least=0)
    ce_weight: float = option(0.0, least=0)
    top_k: int | None = option(None, least=1)
    temperature: float = option(1.0, above=0)
    teacher_cache: str | None = None
    window_dropout: float = option(0.0, least=0, most=1)
    train: Literal["lora"] | tuple[str, ...] = "lora"
    lora_rank: int = option(8, least=1)
    lora_alpha: float = option(16.0, above=0)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    checkpointing: bool = False
    checkpoint_minutes: float = option(2.0, above=0)
    log_every: int = option(10, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise RecipeError("kl_weight", "0, and ce_weight is 0 too; nothing would be learned, set one above 0")
        if self.teacher_cache is not None and self.top_k is None:
            raise RecipeError("teacher_cache", "it keeps the likeliest tokens, and top_k is null; set top_k, e.g. 128")
        if not self.train:
            raise RecipeError("train", "the list is empty; write lora, or patterns such as '*.self_attn.*'")
        if self.train == "lora" and not self.lora_targets:
            raise RecipeError("lora_targets", "the list is empty; name at least one module, e.g. q_proj")


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(DistillOptions):
    """The distill stage at longer context, one document a row; documents shorter than the data's rows are passed over.

    Attributes:
        seq_len: tokens a row, instead of the data's.
        segment: truncated state passing: the student reads a row in segments of so many tokens, each from what the
            ones before left in state and window; gradients stay inside a segment, and so does the memory that they
            need. `None` reads the row at once.
    """

    seq_len: int = option(4096, least=2)
    segment: int | None = option(1024, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment is not None and self.window_dropout:
            raise RecipeError(
                "window_dropout",
                f"{self.window_dropout} with segment {self.segment}: what a segment leaves depends on the window; set "
                "window_dropout to 0, or segment to null",
            )
        if self.segment is not None and self.checkpointing:
            raise RecipeError(
                "checkpointing",
                f"true with segment {self.segment}: a layer computed again would find a state that has moved on; "
                "shorter segments save as much, or set segment to null",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Record):
    """What is measured about quality.

    Attributes:
        text: text files for perplexity, each a path or NAME=PATH; an empty list takes the held-out part of the data.
            Needles hide in the first one.
        tokens: how many tokens are read of each, the same ones at each context.
        contexts: tokens a sequence for perplexity, one perplexity each; the first one is the main one.
        choices: jsonl files of questions, each a path or NAME=PATH; `linearize.benchmarks.items` has the kinds.
        choices_limit: how many questions are read of each, at random.
        needle_lengths: haystack lengths in tokens; an empty list leaves the needle test out.
        needle_depths: where in the haystack the needle is, 0 = start, 1 = end.
        needle_trials: prompts of each length and depth.
        needle_keys: how many values are hidden, one of which is asked for; each of the list has its own prompts.
        needle_digits: digits of a number.
        needle_kind: `"digits"`: values are numbers. `"words"`: common words, one token each. Or both.
        recall_lengths: tokens of a prompt that asks for pairs of words, tokens or a copy said before; an empty list
            leaves these probes out. What is asked for has left a window of an eighth of a length.
        kl_tokens: how many tokens KL(original || row) is measured on, in sequences of the first context; 0 leaves it
            out.
        attention: also measure how much attention goes to sinks, window and all that is older, by layer and head.
        letters: how many questions of each task of three or more choices are asked by letter as well, in every cyclic
            order of their choices; 0 leaves it out.
        lm_eval: tasks of lm-evaluation-harness, which is an extra: pip install 'linearize[eval]'.
        lm_eval_tasks: a folder of task files of one's own.
        lm_eval_limit: how many questions of each are asked, the first ones; `None` asks all.
        answers: how many prompts are answered greedily; 0 leaves generation out.
        answer_tokens: tokens of the longest answer.
        prompts: a jsonl file of chats (the first user's turn is asked) or prompts; `None` takes neutral questions.
        control: also train the original in the same way as the student, for comparison.
        window: also train window + sinks, without the state, in the same way: what the state adds is the difference.
    """

    text: tuple[str, ...] = ()
    tokens: int = option(8192, least=2)
    contexts: tuple[int, ...] = option((1024,), least=2)
    choices: tuple[str, ...] = ()
    choices_limit: int = option(100, least=1)
    needle_lengths: tuple[int, ...] = option((256, 512, 1024), least=64)
    needle_depths: tuple[float, ...] = option((0.1, 0.5, 0.9), least=0, most=1)
    needle_trials: int = option(1, least=1)
    needle_keys: tuple[int, ...] = option((1,), least=1)
    needle_digits: int = option(5, least=2, most=9)
    needle_kind: tuple[Literal["digits", "words"], ...] = ("digits",)
    recall_lengths: tuple[int, ...] = option((512,), least=64)
    kl_tokens: int = option(2048, least=0)
    attention: bool = False
    letters: int = option(0, least=0)
    lm_eval: tuple[str, ...] = ()
    lm_eval_tasks: str | None = None
    lm_eval_limit: int | None = option(None, least=1)
    answers: int = option(8, least=0)
    answer_tokens: int = option(64, least=1)
    prompts: str | None = None
    control: bool = True
    window: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contexts:
            raise RecipeError("contexts", "the list is empty; name at least one context, e.g. 1024")
        if self.tokens < max(self.contexts):
            limit = max(self.contexts)
            raise RecipeError("tokens", f"{self.tokens} is less than one sequence of {limit}; lower contexts")
        for name in ("needle_keys", "needle_kind"):
            if not getattr(self, name):
                raise RecipeError(name, "the list is empty; to leave the needle test out, empty needle_lengths")
        for name in ("lm_eval_tasks", "lm_eval_limit"):
            if getattr(self, name) is not None and not self.lm_eval:
                raise RecipeError(name, f"{getattr(self, name)!r} without a task in lm_eval; name one, or leave it out")


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Record):
    """What is measured about speed.

    Attributes:
        contexts: tokens in the cache when decoding starts; 5 are the least that leave room to warm up.
        batch: numbers of sequences decoded at once; every context is measured with each.
        decode_tokens: tokens decoded in one repeat.
        repeats: interleaved repeats, of which the median is reported.
        modes: in which the rows decode, see `linearize.benchmarks.modes`; `None` is all that a row has. Compiling takes
            a minute or more for every context and batch.
        fill: where context times batch exceeds it, a part of the context is filled in instead of read; `None` reads
            all.
        prefill: lengths whose prefill is timed besides.
        minutes: no repeat is begun after this long, and a context that no repeat was done for is dropped, for all
            rows alike; `None` is no limit.
        control: time the original twice, as two rows: what is between them is the measurement's own error.
    """

    contexts: tuple[int, ...] = option((1024, 4096, 8192), least=5)
    batch: tuple[int, ...] = option((1,), least=1)
    decode_tokens: int = option(16, least=1)
    repeats: int = option(5, least=1)
    modes: (
        tuple[Literal["dynamic", "static", "static+compile", "dynamic+projections", "static+projections"], ...] | None
    ) = None
    fill: int | None = option(8192, least=1)
    prefill: tuple[int, ...] = option((), least=1)
    minutes: float | None = option(None, above=0)
    control: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("contexts", "batch"):
            if not getattr(self, name):
                example = {"contexts": "one context, e.g. 1024", "batch": "one number of sequences, e.g. 1"}[name]
                raise RecipeError(name, f"the list is empty; name at least {example}")
