"""Attention transfer: every converted layer learns alone, from one forward pass of the original.

The teacher is the student's own weights with the conversion switched off. Each layer's loss is computed and
back-propagated inside the forward pass, so only one layer's activations live at a time, and no gradient crosses from
one layer to another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.attention import Observation
from linearize.config import TAUGHT_MIXERS, LinearizeConfig
from linearize.convert import added_parameters, base_model, converted_layers, original_attention, switch_of
from linearize.distill import processes
from linearize.distill.adam import Adam
from linearize.distill.calibration import Calibration, mix_lr_scale
from linearize.distill.data import Batch, TokenStream, model_inputs
from linearize.distill.loop import Outcome, StepLosses, agreed_checkpoint, train
from linearize.distill.objectives import OBJECTIVES, FarTarget, check_far_queries
from linearize.distill.options import TransferOptions
from linearize.distill.positions import position_limit, spread_positions
from linearize.distill.sharding import shard_frozen
from linearize.errors import LinearizeError
from linearize.families import family_of

__all__ = ["calibrate", "check_taught", "observe", "run_transfer", "transfer_step"]


def run_transfer(
    model: Any, stream: TokenStream, options: TransferOptions, folder: Path, *, accumulation: int = 1
) -> Outcome:
    """Calibrate, unless `options` says not to, then train mixers and mixes for the budget.

    Args:
        model: a converted model; every other weight is frozen.
        stream: training text.
        folder: of the run: `train.jsonl` and `checkpoints/transfer` go there, and a killed run goes on from there.
        accumulation: batches an optimizer step.

    Raises:
        LinearizeError: no layer is converted or has a state to train, rows too short for any token to have left
            the window, or more positions than the model knows.
    """
    base = base_model(model)
    switch_of(base)  # an error of its own where nothing is converted
    check_taught(next(iter(converted_layers(base).values())).linearize_config, stream.seq_len, "transfer")
    limit = position_limit(base.config, stream.seq_len, options.positions, "transfer")
    parameters = added_parameters(base)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    shard_frozen(model)
    device = base.get_input_embeddings().weight.device

    if options.local_steps > 1 and accumulation > 1:
        raise LinearizeError(
            f"gradient_accumulation: {accumulation} with {options.local_steps} local_steps would update between the "
            "batches of a step; set one of them to 1"
        )
    processes.open_accelerator()
    if options.calibration_tokens and agreed_checkpoint(folder / "checkpoints" / "transfer") is None:
        position = stream.state_dict()
        _calibrate(base, stream, options.calibration_tokens, limit)
        stream.load_state_dict(position)
    optimizer = Adam(parameters, mix_lr_scale)  # after calibration: masters are copies

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(batch: Batch, backward: Callable[[Tensor], None]) -> StepLosses:
        sums: StepLosses = {}
        for part, share in spread_positions(batch, limit):

            def shared(loss: Tensor, share: float = share) -> None:
                backward(loss * share)

            losses = transfer_step(base, part, options.objective, shared, update, options.local_steps)
            sums = {key: sums.get(key, 0.0) + x * share for key, x in losses.items()}
        return sums

    outcome = train(
        "transfer",
        step,
        parameters,
        stream,
        options,
        folder,
        accumulation=accumulation,
        device=device,
        optimizer=optimizer,
    )
    model.requires_grad_(False)
    return outcome


def check_taught(config: LinearizeConfig, seq_len: int, name: str) -> None:
    """Raise the LinearizeError that says why rows of so many tokens teach such layers nothing, if they do not; `name`
    is what wants to teach."""
    if config.mixer not in TAUGHT_MIXERS:
        raise LinearizeError(
            f"{name}: mixer {config.mixer!r} has no far side of its own to teach; convert with mixer 'hedgehog', or "
            "skip it"
        )
    check_far_queries(config, seq_len, "data.seq_len")


def transfer_step(
    model: Any,
    batch: Batch,
    objective: str,
    backward: Callable[[Tensor], None],
    update: Callable[[], None] = lambda: None,
    local_steps: int = 1,
) -> StepLosses:
    """One batch: the losses of all layers, each back-propagated into its own mixer and mix.

    With `local_steps` > 1 a layer learns from what it saw that many times while it is at hand: `update` applies and
    clears the gradients that there are, its own and what the layer before left, before each further loss. The last
    are left to the caller, so each counts once. The losses are those of the first look.
    """
    loss_of = OBJECTIVES[objective]
    losses: StepLosses = {}

    def learn(seen: Observation) -> Tensor:
        target = FarTarget(seen)
        for step in range(local_steps):
            if step:
                update()
            with torch.enable_grad():
                loss = loss_of(seen, target)
                backward(loss)
            losses.setdefault(f"layer.{seen.layer.layer_idx}", loss.detach())
        return target.attention(seen)

    observe(model, batch, learn)
    return {"loss": torch.stack(list(losses.values())).mean()} | losses


def calibrate(model: Any, stream: TokenStream, tokens: int, positions: int | None = None) -> dict[int, list[float]]:
    """Fit every mixer and mix to the teacher's far attention; see `linearize.distill.calibration`.

    Args:
        model: a converted model. Nothing but mixers and mixes changes, and they are left asking for gradients.
        stream: text; whole batches are drawn until they have `tokens` real tokens, one batch at least.
        tokens: a few thousand are enough.
        positions: as in `TransferOptions`.

    Returns:
        For each layer, its decomposed loss on each batch, before it learned from it.

    Raises:
        LinearizeError: as `run_transfer`.
    """
    base = base_model(model)
    switch_of(base)  # an error of its own where nothing is converted
    check_taught(next(iter(converted_layers(base).values())).linearize_config, stream.seq_len, "calibrate")
    return _calibrate(base, stream, tokens, position_limit(base.config, stream.seq_len, positions, "calibrate"))


def _calibrate(base: Any, stream: TokenStream, tokens: int, limit: int) -> dict[int, list[float]]:
    device = base.get_input_embeddings().weight.device
    batches: list[Batch] = []
    drawn = 0
    while not batches or drawn < tokens:
        batches.append({key: x.to(device) for key, x in next(stream).items()})
        drawn += int(batches[-1].get("attention_mask", torch.ones_like(batches[-1]["input_ids"])).sum())
    parts = [part for batch in batches for part, _ in spread_positions(batch, limit)]
    calibration = Calibration(len(parts))
    for parameter in added_parameters(base).values():
        parameter.requires_grad_(True)
    for part in parts:
        observe(base, part, calibration)
    calibration.finish()
    return calibration.losses


def observe(model: Any, batch: Batch, observer: Callable[[Observation], Tensor | None]) -> None:
    """Run the original's decoder on a batch, without gradient, and show `observer` what each converted layer sees.

    What `observer` returns, if anything, is the layer's attention (B, H, T, V), which is then not computed again.
    """
    base = base_model(model)
    decoder = base.get_submodule(family_of(base.config).decoder)
    switch = switch_of(base)
    with original_attention(base), torch.no_grad():
        switch.observer = observer
        try:
            decoder(**model_inputs(batch), use_cache=False)
        finally:
            switch.observer = None
