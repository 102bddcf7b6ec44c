"""Saving and loading students: whole, or as a small adapter on top of the original.

A whole student is an ordinary transformers checkpoint (see `linearize.modeling`). An adapter folder holds

    linearize.json         the conversion, the original's name and geometry, the format
    adapter.safetensors    what conversion added: mixers and mixes
    lora/                  a PEFT adapter, where distillation trained one
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linearize.attention import ConvertedAttention
from linearize.config import LinearizeConfig
from linearize.convert import base_model, convert, is_converted, revert
from linearize.errors import LinearizeError
from linearize.families import geometry_of
from linearize.fingerprint import Sample, changed_values, weight_sample

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "added_weights", "load", "save"]

ADAPTER_CONFIG = "linearize.json"
ADAPTER_WEIGHTS = "adapter.safetensors"
LORA_FOLDER = "lora"
FORMAT_VERSION = 1


def save(
    model: Any, folder: str | os.PathLike[str], adapter: bool = False, tokenizer: Any = None, base: str | None = None
) -> None:
    """Write a converted model.

    Args:
        model: a converted model, or a PeftModel around one.
        folder: made where it is missing; files of the same names are replaced.
        adapter: True writes only what conversion and distillation added (a few MB); `load` then needs the original.
        tokenizer: saved beside it where given.
        base: the name that `load` finds the original by; None takes the name that the model was loaded from.

    Raises:
        LinearizeError: a model that is not converted, a whole checkpoint of a model with unmerged LoRA, or an adapter
            of a model whose own weights have changed since its conversion.
    """
    if not is_converted(model):
        raise LinearizeError(
            f"model: {type(base_model(model)).__name__} is not converted; use its own save_pretrained, or convert it"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if not adapter:
        if hasattr(model, "peft_config"):
            raise LinearizeError(
                "model: its LoRA weights are not merged, so there is no whole checkpoint to write; "
                "call model.merge_and_unload() first, or save with adapter=True"
            )
        model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    else:
        sample = _check_unchanged(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        if hasattr(model, "peft_config"):
            # Only the student's own adapter; and peft must not go looking for the original's config.json.
            model.save_pretrained(path / LORA_FOLDER, selected_adapters=["default"], save_embedding_layers=False)
            (path / LORA_FOLDER / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        save_file(added_weights(model), path / ADAPTER_WEIGHTS)
        inner = base_model(model)
        geometry = geometry_of(inner.config)
        description = {
            "format": FORMAT_VERSION,
            "base": base or inner.config.name_or_path or None,
            "base_model_type": inner.config.model_type,
            "geometry": vars(geometry),
            "conversion": inner.config.linearize,
            "base_sample": sample,
        }
        # Last, so that a folder with this file is complete.
        _write_text(path / ADAPTER_CONFIG, json.dumps(description) + "\n")


def load(
    folder: str | os.PathLike[str],
    base: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    merge: bool = True,
) -> Any:
    """Read what `save` wrote.

    Args:
        folder: a whole student or an adapter.
        base: for an adapter, the original: a model (converted in place) or a name; None takes the recorded name.
        dtype: of the weights; None is what the checkpoint has. Mixers and mixes stay float32.
        device: where the model goes.
        merge: True adds LoRA weights into the model's own, the fastest to run; False keeps a PeftModel.

    Returns:
        The student, in evaluation mode.

    Raises:
        LinearizeError: a folder that is neither, an original that does not fit, or weights that are missing.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        return _load_whole(path, base, dtype, device)
    description = _read_description(path)
    try:
        weights = load_file(path / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise LinearizeError(
            f"{path / ADAPTER_WEIGHTS}: cannot be read ({str(error).splitlines()[0]}); save the student again"
        ) from error
    model = _original(description, base, dtype, device)
    found, wanted = vars(geometry_of(model.config)), description["geometry"]
    if found != wanted or model.config.model_type != description["base_model_type"]:
        raise LinearizeError(
            f"base: a {model.config.model_type} with {found} is not the {description['base_model_type']} with {wanted} "
            f"that {str(path)!r} was made on; give that original as base"
        )
    _check_base(model, description, path)
    convert(model, LinearizeConfig.from_dict(description["conversion"]))
    expected = {name: x.shape for name, x in added_weights(model).items()}
    if {name: x.shape for name, x in weights.items()} != expected:
        revert(model)
        raise LinearizeError(
            f"{path / ADAPTER_WEIGHTS}: its {len(weights)} tensors are not the {len(expected)} of the conversion in "
            f"{ADAPTER_CONFIG}; the folder mixes files of different students, save it again"
        )
    model.load_state_dict(weights, strict=False)
    if (path / LORA_FOLDER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path / LORA_FOLDER)
        if merge:
            model = model.merge_and_unload()
    return model.to(device).eval()


def added_weights(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that conversion added, by their names in the causal language model's state dict."""
    base = base_model(model)
    return {
        f"{name}.{part}.{inner}": p.detach().contiguous()
        for name, layer in base.named_modules()
        if isinstance(layer, ConvertedAttention)
        for part, module in (("mixer", layer.mixer_in_use), ("mix", layer.mix_in_use))
        if module is not None
        for inner, p in module.named_parameters()
    }


def _check_unchanged(model: Any) -> Sample | None:
    """The sample of the original's weights, which must be what they were at the conversion."""
    base = base_model(model)
    if not hasattr(base, "_linearize_sample"):
        raise LinearizeError(
            "model: it was loaded as a whole student, so its original is not known; save it whole, with adapter=False"
        )
    now, before = weight_sample(model), base._linearize_sample
    if now is None or before is None:
        return now
    dtype, sample = before
    changed, compared = changed_values(sample, now, exact=base.dtype == dtype)
    if changed:
        raise LinearizeError(
            f"model: its own weights have changed since the conversion ({changed} of {compared} sampled values, by "
            "merging or training), which an adapter would leave out; save it whole, with adapter=False, or load it "
            "with merge=False"
        )
    return sample


def _check_base(model: Any, description: dict[str, Any], path: Path) -> None:
    """The original must have the weights that the adapter was made on."""
    now, made_on = weight_sample(model), description.get("base_sample")
    if now is None or made_on is None:
        return
    changed, compared = changed_values(made_on, now, exact=False)
    if now.keys() != made_on.keys() or changed > compared // 20:
        raise LinearizeError(
            f"base: {changed} of {compared} sampled weights are not those of the original that {str(path)!r} was made "
            f"on ({description['base']}); give that original as base"
        )


def _load_whole(path: Path, base: Any, dtype: torch.dtype | str | None, device: str | torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise LinearizeError(
            f"{str(path)!r}: neither a whole student (config.json) nor an adapter ({ADAPTER_CONFIG}); check the path"
        )
    if base is not None:
        raise LinearizeError(f"base: {str(path)!r} is a whole student and needs no original; leave base out")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    except (SafetensorError, OSError) as error:
        raise LinearizeError(
            f"{str(path)!r}: cannot be read ({str(error).splitlines()[0]}); save the student again"
        ) from error
    if not is_converted(model):
        raise LinearizeError(f"{str(path)!r}: it is an original, not a student; convert it first")
    if report["missing_keys"]:
        raise LinearizeError(
            f"{str(path)!r}: {len(report['missing_keys'])} weights are missing, {min(report['missing_keys'])} among "
            "them; save the student again"
        )
    return model.to(device).eval()


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise LinearizeError(f"{path / ADAPTER_CONFIG}: cannot be read ({error}); save the student again") from error
    if description.get("format") != FORMAT_VERSION:
        raise LinearizeError(
            f"{path / ADAPTER_CONFIG}: format {description.get('format')!r} is not the {FORMAT_VERSION} that this "
            "version of linearize reads; install the version that wrote it"
        )
    return description


def _original(
    description: dict[str, Any], base: Any, dtype: torch.dtype | str | None, device: str | torch.device
) -> Any:
    if base is None:
        base = description["base"]
        if base is None:
            raise LinearizeError("base: the adapter does not record its original's name; give the original as base")
    if isinstance(base, (str, os.PathLike)):
        from linearize.models import load_weights

        return load_weights(str(base), dtype, str(device))
    if dtype not in (None, "auto"):
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        # Weights only, as from_pretrained does: `to` would round the rotary frequencies as well.
        for parameter in base.parameters():
            parameter.data = parameter.data.to(wanted)
    return base


def _write_text(path: Path, text: str) -> None:
    """Replace the file at once: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
