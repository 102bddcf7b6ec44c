"""End-to-end distillation: the whole student learns from the teacher's logits.

With LoRA the teacher is the same weights with adapters disabled and the conversion switched off, so there is one
model in memory. Where chosen parameters are trained in full, the teacher is a frozen copy made before.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize.convert import added_parameters, base_model, original_attention, switch_of
from linearize.distill.data import Batch, TokenStream
from linearize.distill.loop import Outcome, StepLosses, train
from linearize.distill.options import DistillOptions
from linearize.distill.transfer import mix_lr_scale
from linearize.errors import LinearizeError

__all__ = ["CONTROL", "STUDENT", "distill_losses", "kl_divergence", "run_distill"]

STUDENT, CONTROL = "default", "control"  # names of the PEFT adapters
CLIP = 1.0  # gradient norm: one bad batch must not undo a short training
ROWS_AT_ONCE = 128  # tokens whose logits are in float32 at a time


def run_distill(
    model: Any,
    stream: TokenStream,
    options: DistillOptions,
    folder: Path,
    *,
    accumulation: int = 1,
    control: bool = False,
    stage: str | None = None,
) -> tuple[Any, Outcome]:
    """Train the student towards its teacher: KL of the logits, and cross-entropy where asked.

    Mixers and mixes go on learning beside LoRA or the chosen parameters.

    Args:
        model: a converted model, or the PeftModel that an earlier call returned.
        stream: training text.
        folder: of the run: `train.jsonl` and `checkpoints/<stage>` go there, and a killed run goes on from there.
        accumulation: batches an optimizer step.
        control: train the original instead, in a LoRA adapter named "control", from the same teacher: what the
            training itself does to a model that is not converted. LoRA only.
        stage: name in the log; None is "distill", or "control".

    Returns:
        The model, a PeftModel where LoRA was trained, and what the stage did.

    Raises:
        LinearizeError: a model that is not converted, patterns that match no parameter, LoRA targets that name no
            module, a LoRA unlike the one it goes on with, or a control without LoRA.
    """
    switch_of(model)  # an error of its own where nothing is converted
    stage = stage or ("control" if control else "distill")
    device = base_model(model).get_input_embeddings().weight.device
    lora = options.train == "lora"
    if control and not lora:
        raise LinearizeError(
            f"stages: a control is trained with LoRA only, and train is {list(options.train)}; set train to lora, "
            "or evaluate.control to false"
        )
    if control and options.kl_weight and not options.ce_weight:
        # KL to oneself is 0 from the start: the control of pure distillation learns from the text itself.
        options = replace(options, kl_weight=0.0, ce_weight=1.0)
    model.requires_grad_(False)
    if options.train == "lora":
        name = CONTROL if control else STUDENT
        model = _with_lora(model, options, name)
        parameters = {n: p for n, p in model.named_parameters() if f".{name}." in n}
        teacher: Callable[[], AbstractContextManager[Any]] = lambda: _untrained(model)  # noqa: E731
    else:
        parameters = _chosen(model, options.train)
        frozen = copy.deepcopy(model)
        teacher = lambda: _untrained(frozen)  # noqa: E731
    added = added_parameters(model)
    if not control:
        known = {id(p) for p in parameters.values()}
        parameters |= {n: p for n, p in added.items() if id(p) not in known}
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def step(batch: Batch, backward: Callable[[Tensor], None]) -> StepLosses:
        switched = original_attention(model) if control else nullcontext()
        losses = distill_losses(model, teacher, batch, options, switched)
        backward(losses["loss"])
        return {key: x.detach() for key, x in losses.items()}

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
    if control and STUDENT in model.peft_config:
        model.set_adapter(STUDENT)
    model.requires_grad_(False)
    return model, outcome


def distill_losses(
    model: Any,
    teacher: Callable[[], AbstractContextManager[Any]],
    batch: Batch,
    options: DistillOptions,
    student: AbstractContextManager[Any],
) -> dict[str, Tensor]:
    """`loss` = kl_weight * `kl` + ce_weight * `ce`, each a mean over the batch's real tokens.

    kl: KL(teacher || student) of the next token, at temperature tau times tau^2 (Hinton et al. 2015, arXiv
    1503.02531). ce: cross-entropy of the next token of the text.
    """
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    losses: dict[str, Tensor] = {}
    targets = None
    if options.kl_weight:
        with teacher() as taught, torch.no_grad():
            targets = taught(**batch, use_cache=False).logits
    with student:
        logits = model(**batch, use_cache=False).logits
    loss = logits.new_zeros((), dtype=torch.float32)
    if targets is not None:
        losses["kl"] = _by_rows(
            lambda mine, wanted: kl_divergence(mine, wanted, options.top_k, options.temperature),
            logits[mask],
            targets[mask],
        )
        loss = loss + options.kl_weight * losses["kl"]
    if options.ce_weight:
        scored = mask[:, 1:] & mask[:, :-1]
        losses["ce"] = _by_rows(
            lambda mine, wanted: F.cross_entropy(mine.float(), wanted, reduction="none"),
            logits[:, :-1][scored],
            batch["input_ids"][:, 1:][scored],
        )
        loss = loss + options.ce_weight * losses["ce"]
    return {"loss": loss} | losses


def kl_divergence(logits: Tensor, teacher_logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """KL(teacher || student) a row, times temperature^2.

    With `top_k` the distributions are compared over the teacher's k likeliest tokens and one more outcome, "any
    other token", so the tail's mass counts exactly and only its shape is ignored.

    logits, teacher_logits: (N, vocabulary) -> (N,), float32.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, index = log_p.topk(top_k, dim=-1)
        log_q = log_q.gather(-1, index)
        log_p, log_q = (torch.cat([x, _log_rest(x)], dim=-1) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def _log_rest(log_p: Tensor) -> Tensor:
    """log (1 - sum p), (N, 1), kept finite where the listed tokens have all the mass."""
    listed = log_p.logsumexp(-1, keepdim=True).clamp_max(-1e-7)
    return torch.log(-torch.expm1(listed))


def _by_rows(loss: Callable[[Tensor, Tensor], Tensor], mine: Tensor, wanted: Tensor) -> Tensor:
    """Mean of a per-row loss, a few rows at a time: the float32 copies of a whole vocabulary are never all alive."""
    total = mine.new_zeros((), dtype=torch.float32)
    for rows in range(0, mine.shape[0], ROWS_AT_ONCE):
        part = slice(rows, rows + ROWS_AT_ONCE)
        total = total + checkpoint(lambda a, b: loss(a, b).sum(), mine[part], wanted[part], use_reentrant=False)
    return total / max(mine.shape[0], 1)


def _with_lora(model: Any, options: DistillOptions, name: str) -> Any:
    """The model with a fresh LoRA adapter, active; an adapter of that name from an earlier stage goes on."""
    from peft import LoraConfig, PeftModel, get_peft_model

    names = [module_name for module_name, _ in base_model(model).named_modules()]
    unknown = [x for x in options.lora_targets if not any(f".{known}".endswith(f".{x}") for known in names)]
    if unknown:
        known = sorted({leaf for x in names if (leaf := x.rpartition(".")[2]).endswith("_proj")})
        raise LinearizeError(
            f"lora_targets: no module is called {', '.join(unknown)}; the model has {', '.join(known)}"
        )
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=list(options.lora_targets),
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


@contextmanager
def _untrained(model: Any) -> Iterator[Any]:
    """The teacher inside a student: no adapter, original attention."""
    with ExitStack() as stack:
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(original_attention(model))
        yield model


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
    half = [name for name, p in chosen.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise LinearizeError(
            f"stages: {half[0]!r} is {names[half[0]].dtype}, which swallows small updates; set dtype to float32, or "
            "train with lora"
        )
    return chosen
