"""End-to-end distillation: the whole student learns from the teacher's logits.

With LoRA the teacher is the same weights with adapters disabled and the conversion switched off, so there is one
model in memory. Where chosen parameters are trained in full, the teacher is a frozen copy made before.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.convert import added_parameters, base_model, converted_layers, original_attention, state_off, switch_of
from linearize.distill.calibration import mix_lr_scale
from linearize.distill.data import Batch, TokenStream, model_inputs
from linearize.distill.logit_losses import Listed, list_likeliest, logit_losses, rows_of
from linearize.distill.loop import Outcome, StepLosses, train
from linearize.distill.options import DistillOptions, ExtendOptions
from linearize.distill.sharding import shard_frozen
from linearize.distill.teacher_cache import TeacherCache
from linearize.errors import LinearizeError
from linearize.families import family_of
from linearize.rows import CONTROL, WINDOW, untrained

__all__ = [
    "CONTROL",
    "STAGE_OF",
    "STUDENT",
    "WINDOW",
    "counted_rows",
    "distill_losses",
    "run_distill",
    "window_dropout",
]

STUDENT = "default"  # the name of the student's PEFT adapter, as CONTROL and WINDOW are those of their own
STAGE_OF = {STUDENT: "distill", CONTROL: "control", WINDOW: "window"}
CLIP = 1.0  # gradient norm: one bad batch must not undo a short training


def run_distill(
    model: Any,
    stream: TokenStream,
    options: DistillOptions,
    folder: Path,
    *,
    accumulation: int = 1,
    role: str = STUDENT,
    stage: str | None = None,
) -> tuple[Any, Outcome]:
    """Train the student towards its teacher: KL of the logits, and cross-entropy where asked.

    Mixers and mixes go on learning beside LoRA or the chosen parameters.

    Args:
        model: a converted model, or the PeftModel that an earlier call returned.
        stream: training text.
        folder: of the run: `train.jsonl` and `checkpoints/<stage>` go there, and a killed run goes on from there.
        accumulation: batches an optimizer step.
        role: who learns. `STUDENT`. `CONTROL`: the original, from the same teacher: what the training itself does to
            a model that is not converted. `WINDOW`: the conversion without its state: what training does for window
            and sinks alone. The last two learn in LoRA adapters of their own, named after them, and nothing else.
        stage: name in the log; None is "distill", "control" or "window".

    Returns:
        The model, a PeftModel where LoRA was trained, and what the stage did.

    Raises:
        LinearizeError: a model that is not converted, patterns that match no parameter, LoRA targets that name no
            module, a LoRA unlike the one it goes on with, another role than the student's without LoRA, or a
            teacher_cache of the whole vocabulary.
    """
    switch_of(model)  # an error of its own where nothing is converted
    stage = stage or STAGE_OF[role]
    lora = options.train == "lora"
    if role != STUDENT and not lora:
        raise LinearizeError(
            f"stages: a {role} row is trained with LoRA only, and train is {list(options.train)}; set train to lora, "
            f"or evaluate.{role} to false"
        )
    if role == CONTROL and options.kl_weight and not options.ce_weight:
        # KL to oneself is 0 from the start: the control of pure distillation learns from the text itself.
        options = replace(options, kl_weight=0.0, ce_weight=1.0)
    model.requires_grad_(False)
    if options.train == "lora":
        model = _with_lora(model, options, role)
        parameters = {n: p for n, p in model.named_parameters() if ".lora_" in n and f".{role}." in n}
        teacher: Callable[[], AbstractContextManager[Any]] = lambda: _untrained(model)  # noqa: E731
    else:
        parameters = _chosen(model, options.train)
        frozen = copy.deepcopy(model)
        shard_frozen(frozen)
        teacher = lambda: _untrained(frozen)  # noqa: E731
    added = added_parameters(model)
    if role == STUDENT and options.mixer_lr:
        known = {id(p) for p in parameters.values()}
        parameters |= {n: p for n, p in added.items() if id(p) not in known}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    shard_frozen(model)
    device = base_model(model).get_input_embeddings().weight.device
    cache = None
    if options.teacher_cache is not None and options.top_k is not None:
        vocabulary = base_model(model).config.vocab_size
        if options.top_k >= vocabulary:
            raise LinearizeError(
                f"top_k: {options.top_k} tokens are the whole vocabulary of {vocabulary}, which teacher_cache does not "
                "keep; lower top_k, e.g. to 128, or set teacher_cache to null"
            )
        cache = TeacherCache(options.teacher_cache, model, options.top_k, options.temperature)

    def trained(batch: Batch) -> AbstractContextManager[Any]:
        if role == CONTROL:
            return original_attention(model)
        return state_off(model) if role == WINDOW else window_dropout(model, batch, options.window_dropout)

    segment = options.segment if isinstance(options, ExtendOptions) else None

    def step(batch: Batch, backward: Callable[[Tensor], None]) -> StepLosses:
        sums: StepLosses = {}
        told = _teach(teacher, batch, options, cache) if options.kl_weight else None
        with trained(batch), _checkpointing(model, options.checkpointing):
            for losses in distill_losses(model, told, batch, options, segment):
                backward(losses["loss"])
                sums = {key: sums.get(key, 0.0) + x.detach() for key, x in losses.items()}
        return sums

    outcome = train(
        stage,
        step,
        parameters,
        stream,
        options,
        folder,
        accumulation=accumulation,
        device=device,
        lr_scale=lambda name: mix_lr_scale(name) * (options.mixer_lr / options.lr if name in added else 1.0),
        clip=CLIP,
    )
    if role != STUDENT and STUDENT in model.peft_config:
        model.set_adapter(STUDENT)
    model.requires_grad_(False)
    return model, outcome


def distill_losses(
    model: Any, teacher: Tensor | Listed | None, batch: Batch, options: DistillOptions, segment: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """`loss` = kl_weight * `kl` + ce_weight * `ce` of a batch, each a mean over the tokens that count.

    Without `loss_mask` every real token's prediction is compared with the teacher's, and every token that follows
    another of its document is scored. With it, only predictions of tokens that it marks count.

    Args:
        model: in the role that learns.
        teacher: the teacher's side of all positions (B * T), as in `logit_losses`; None where kl_weight is 0.
        batch: rows of tokens.
        options: weights and temperature.
        segment: as in `ExtendOptions`; None is the whole row.

    Yields:
        One segment after the other, what it adds to the batch's losses; the next begins when it has been
        back-propagated.

    Raises:
        LinearizeError: segments of rows that hold several documents.
    """
    inputs = model_inputs(batch)
    rows, length = batch["input_ids"].shape
    segment = segment or length
    if segment < length and "position_ids" in inputs:
        raise LinearizeError(
            f"segment: {segment} in rows of {length} tokens that hold several documents; give one document a row "
            "(packing: document), or set segment to null"
        )
    counted = counted_rows(batch)
    following = batch["input_ids"].roll(-1, dims=1)
    places = torch.arange(rows * length, device=following.device).view(rows, length)
    past = None
    for start in range(0, length, segment):
        part = slice(start, start + segment)
        if segment < length:
            mask = inputs.get("attention_mask")
            said = model(
                input_ids=batch["input_ids"][:, part],
                attention_mask=None if mask is None else mask[:, : part.stop],
                past_key_values=past,
                use_cache=True,
            )
            past = _without_gradient(said.past_key_values)
        else:
            said = model(**inputs, use_cache=False)
        compared, scored = (x[:, part].flatten() for x in counted)
        kl_share, ce_share = (x[:, part].sum() / x.sum().clamp_min(1) for x in counted)
        loss, terms = logit_losses(
            said.logits.flatten(0, 1),
            teacher=teacher if segment >= length else rows_of(teacher, places[:, part].flatten()),
            compared=compared,
            tokens=following[:, part].flatten() if options.ce_weight else None,
            scored=scored,
            kl_weight=options.kl_weight * kl_share,
            ce_weight=options.ce_weight * ce_share,
            temperature=options.temperature,
            overwrite=True,  # half of what a large vocabulary takes
        )
        shares = {"kl": kl_share, "ce": ce_share}
        yield {"loss": loss} | {key: x * shares[key] for key, x in terms.items()}


def _without_gradient(cache: Any) -> Any:
    """The cache cut off from the segment that filled it. Converted layers keep no gradient by themselves."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor):
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, layers keep only their inputs. transformers asks for training mode; dropout stays as it was."""
    if not wanted:
        yield
        return
    base = base_model(model)
    before = {module: module.training for module in base.modules()}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in before:
        module.training = module.training or hasattr(module, "gradient_checkpointing")
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()
        for module, mode in before.items():
            module.training = mode


@contextmanager
def window_dropout(model: Any, batch: Batch, probability: float) -> Iterator[None]:
    """Inside, each converted layer with this probability sees a half or a quarter of its window, or none of it.

    What such a layer lacks only its state can give, so training cannot leave the state unused. A draw depends on the
    batch's tokens alone: a run that was killed and goes on draws the same.
    """
    if not probability:
        yield
        return
    digest = hashlib.sha256(batch["input_ids"].cpu().numpy().tobytes()).digest()
    draw = random.Random(digest)
    switch, before = switch_of(model), switch_of(model).windows
    switch.windows = {
        index: draw.choice((layer.linearize_config.window // 2, layer.linearize_config.window // 4, 0))
        for index, layer in converted_layers(model).items()
        if draw.random() < probability and layer.mixer is not None
    }
    try:
        yield
    finally:
        switch.windows = before


def counted_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which positions (B, T) count by the prediction made there: for the KL, and for the cross-entropy."""
    tokens = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    follows = torch.zeros_like(real)  # the next token is real, of the same document and a target
    follows[:, :-1] = real[:, 1:] & real[:, :-1]
    if "position_ids" in batch:
        follows[:, :-1] &= batch["position_ids"][:, 1:] != 0
    if "loss_mask" not in batch:
        return real, follows
    follows[:, :-1] &= batch["loss_mask"][:, 1:].bool()
    return follows, follows


def _teach(
    teacher: Callable[[], AbstractContextManager[Any]],
    batch: Batch,
    options: DistillOptions,
    cache: TeacherCache | None,
) -> Tensor | Listed:
    """The teacher's side of the KL for all positions (B * T): from the cache where it is there, else computed."""
    listed = None if cache is None else cache.read(batch)
    if listed is not None:
        return listed
    with teacher() as taught, torch.no_grad():
        logits = taught(**model_inputs(batch), use_cache=False).logits.flatten(0, 1)
    if options.top_k is None or options.top_k >= logits.shape[-1]:
        return logits
    listed = list_likeliest(logits, options.top_k, options.temperature)
    if cache is not None:
        cache.write(batch, listed)
    return listed


def _with_lora(model: Any, options: DistillOptions, name: str) -> Any:
    """The model with a fresh LoRA adapter, active; an adapter of that name from an earlier stage goes on."""
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = family_of(base_model(model).config).modules(options.lora_targets)
    names = [module_name for module_name, _ in base_model(model).named_modules()]
    unknown = [x for x in targets if not any(f".{known}".endswith(f".{x}") for known in names)]
    if unknown:
        base, head = base_model(model), base_model(model).get_output_embeddings()
        linears = [x for x, y in base.named_modules() if isinstance(y, nn.Linear) and y is not head]
        known = sorted({x.rpartition(".")[2] for x in linears})
        raise LinearizeError(
            f"lora_targets: no module is called {', '.join(unknown)}; the model has {', '.join(known)}"
        )
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    if name not in model.peft_config:
        model.add_adapter(name, config)
    before, now = _lora_settings(model.peft_config[name]), _lora_settings(config)
    if before != now:
        raise LinearizeError(
            f"lora_rank, lora_alpha, lora_targets: {now} differ from {before} of the LoRA that an earlier stage "
            "trained and this one goes on with; give the stages the same"
        )
    model.set_adapter(name)
    return model


def _lora_settings(config: Any) -> tuple[int, float, list[str]]:
    return config.r, float(config.lora_alpha), sorted(config.target_modules)


def _untrained(model: Any) -> AbstractContextManager[Any]:
    """The teacher inside a student: no adapter, original attention."""
    return untrained(model, original_attention)


def _chosen(model: Any, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters whose names match, each pattern at least one."""
    names = dict(model.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        matched = {name: p for name, p in names.items() if fnmatchcase(name, pattern)}
        if not matched:
            raise LinearizeError(
                f"stages: train pattern {pattern!r} matches no parameter; names look like {next(iter(names))!r}"
            )
        chosen |= matched
    return chosen
