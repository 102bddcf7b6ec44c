"""Finding and loading models by name: a folder, a hub name, a GGUF file or a file inside an installed package.

Every command takes one such name. Loading goes through transformers and, for students, through
`linearize.checkpoint`; this module decides which, and turns what can go wrong into one clear line.
"""

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DTYPES",
    "ModelSource",
    "load_config",
    "load_model",
    "load_tokenizer",
    "recorded_conversion",
    "resolve",
    "resolve_dtype",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
PACKAGE_PREFIX = "package://"
ADAPTER_FILE = "linearize.json"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What transformers leaves on a model that it read from a GGUF file. The weights are dense by then, but with any of
# these the model counts as quantized: saving, training and conversion would refuse it.
GGUF_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: the name that finds it again from any working directory; saved students record it as their base.
        location: what transformers' `from_pretrained` takes: a folder or a hub name.
        gguf_file: the file's name inside `location`, or None.
        kind: "original", "student" (a full converted checkpoint), "adapter" (a student without its base), "hub".
    """

    name: str
    location: str
    gguf_file: str | None
    kind: Literal["original", "student", "adapter", "hub"]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve(name: str | Path) -> ModelSource:
    """Find a model by name, without reading weights and without the network.

    Args:
        name: a local folder, `path/to/file.gguf`, `package://installed_package/file.gguf` or a hub name.

    Raises:
        LinearizeError: nothing is there, or what is there is not a model.
    """
    text = str(name).strip()
    if not text:
        raise LinearizeError("model: the name is empty; give a folder, a hub name or a .gguf file")
    if text.startswith(PACKAGE_PREFIX):
        return _at_path(_package_path(text), text, portable_name=text)
    path = Path(text).expanduser()
    if path.exists():
        return _at_path(path, text, portable_name=str(path.resolve()))
    if text.lower().endswith(".gguf"):
        raise LinearizeError(f"model: no file {text!r}; give the path of an existing .gguf file")
    if text.startswith(("/", "./", "../", "~")) or not HUB_NAME.fullmatch(text):
        raise LinearizeError(f"model: no folder {text!r}, and it is not a hub name (owner/model); check the path")
    return ModelSource(text, text, None, "hub")


def _package_path(text: str) -> Path:
    """The path behind `package://package/file`, found without importing the package."""
    package, _, inside = text.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise LinearizeError(
            f"model: {text!r} needs the Python package {package!r}, which is not installed; install it with pip"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / inside
    if not inside or not path.exists():
        held = ", ".join(sorted(p.name for p in root.glob("*.gguf"))) or "no .gguf file"
        raise LinearizeError(f"model: the package {package!r} has no file {inside!r}; it holds {held}")
    return path


def _at_path(path: Path, text: str, portable_name: str) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LinearizeError(f"model: {text!r} is a file but not a .gguf file; give the model's folder")
        return ModelSource(portable_name, str(path.parent), path.name, "original")
    if (path / ADAPTER_FILE).is_file() and not (path / "config.json").is_file():
        return ModelSource(portable_name, str(path), None, "adapter")
    if (path / "config.json").is_file():
        student = _read_json(path / "config.json").get("model_type") == "linearize"
        return ModelSource(portable_name, str(path), None, "student" if student else "original")
    gguf = sorted(p.name for p in path.glob("*.gguf"))
    if gguf:
        raise LinearizeError(f"model: {text!r} has no config.json; did you mean {str(Path(text) / gguf[0])!r}?")
    if (path / "student").is_dir():
        raise LinearizeError(f"model: {text!r} holds a run, not a model; did you mean {str(Path(text) / 'student')!r}?")
    raise LinearizeError(
        f"model: {text!r} has neither a config.json (a model) nor a {ADAPTER_FILE} (a student); check the path"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LinearizeError(f"model: {str(path)!r} is not readable JSON ({_one_line(error)}); restore it") from error
    if not isinstance(found, dict):
        raise LinearizeError(f"model: {str(path)!r} holds no JSON object; restore it")
    return found


def load_config(name: str | Path) -> "PreTrainedConfig":
    """The configuration of a model, no weights read. For a student adapter: that of its base.

    Raises:
        LinearizeError: the model is not found or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    source = _base_of(resolve(name))
    with _clear_errors(source, "configuration"):
        return AutoConfig.from_pretrained(source.location, **source.options)


def recorded_conversion(name: str | Path) -> LinearizeConfig | None:
    """How a student was made; None for an original."""
    source = resolve(name)
    if source.kind == "adapter":
        return LinearizeConfig.from_dict(_read_json(Path(source.location) / ADAPTER_FILE)["conversion"])
    if source.kind == "original":
        return None
    values = getattr(load_config(name), "linearize", None)
    return None if values is None else LinearizeConfig.from_dict(values)


def load_tokenizer(name: str | Path, base: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; for a student adapter saved without one, that of its base."""
    from transformers import AutoTokenizer

    source = resolve(name)
    if source.kind == "adapter" and not (Path(source.location) / "tokenizer_config.json").is_file():
        source = _base_of(source, base)
    with _clear_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.location, **source.options)


def _base_of(source: ModelSource, base: str | None = None) -> ModelSource:
    """The original below a student adapter; anything else is its own base."""
    if source.kind != "adapter":
        return source
    name = base or _read_json(Path(source.location) / ADAPTER_FILE).get("base")
    if name is None:
        raise LinearizeError(f"model: the adapter {source.location!r} names no base; give the original with --base")
    try:
        found = resolve(name)
    except LinearizeError as error:
        raise LinearizeError(
            f"base: the adapter {source.location!r} sits on {name!r}, which is not there any more; "
            "give the original with --base"
        ) from error
    if found.kind not in ("original", "hub"):
        raise LinearizeError(f"base: {name!r} is a student itself; give the original model with --base")
    return found


@contextmanager
def _clear_errors(source: ModelSource, what: str) -> Iterator[None]:
    """One line instead of what transformers raises where the files of a model do not fit."""
    try:
        yield
    except LinearizeError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        if source.kind == "hub":
            way_out = (
                "there is no folder of that name either; check the name, or download the model and give its folder"
            )
        else:
            way_out = "check that the folder is complete and that transformers supports the architecture"
        reason = _one_line(error)
        raise LinearizeError(f"model: cannot load the {what} of {source.name!r}: {reason}; {way_out}") from error


def _one_line(error: BaseException) -> str:
    """An exception's first sentence: transformers' messages run over many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition(". ")[0].removesuffix(".")
    return text if len(text) <= 200 else text[:197] + "..."


def load_model(
    name: str | Path,
    dtype: str | torch.dtype | None = "auto",
    device: str | None = None,
    base: str | None = None,
    merge: bool = True,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer, dense and in evaluation mode.

    Args:
        name: see `resolve`. A student adapter brings its base along.
        dtype: one of `DTYPES` or a torch dtype; "auto" probes (see `resolve_dtype`), None is what the files hold.
        device: "cpu", "cuda", ...; None takes the GPU where there is one.
        base: for a student adapter, the original to put it on; None takes the one it recorded.
        merge: for a student adapter, whether its LoRA is added into the weights; False gives a PeftModel.

    Raises:
        LinearizeError: not found, not loadable, no such device, or an adapter whose base is missing.
    """
    source = resolve(name)
    device = _check_device(device)
    if base is not None and source.kind != "adapter":
        raise LinearizeError(f"base: {str(name)!r} is a complete model and takes no base; leave --base out")
    if isinstance(dtype, str):
        dtype = resolve_dtype(dtype, device)[0]
    model = _load_full(_base_of(source, base), dtype, device)
    if source.kind == "adapter":
        from linearize.checkpoint import load

        model = load(source.location, base=model, device=device, merge=merge)
    return model.eval(), load_tokenizer(name, base)


def load_weights(name: str, dtype: str | torch.dtype | None, device: str) -> "PreTrainedModel":
    """An original without its tokenizer. Arguments as in `load_model`."""
    if isinstance(dtype, str):
        dtype = resolve_dtype(dtype, device)[0]
    return _load_full(resolve(name), dtype, _check_device(device)).eval()


def _load_full(source: ModelSource, dtype: torch.dtype | None, device: str) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    with _clear_errors(source, "weights"):
        model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype or "auto", **source.options)
    if source.gguf_file is not None:
        for mark in GGUF_MARKS:
            model.__dict__.pop(mark, None)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
    # transformers records the folder it read; for a GGUF file or a package that would not find the model again.
    model.config._name_or_path = model.name_or_path = source.name
    return model.to(device)


def _check_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise LinearizeError(f"device: {device!r} is not a device; use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise LinearizeError(f"device: {device!r} asked for, but torch sees no GPU here; use --device cpu")
    return device


def resolve_dtype(dtype: str, device: str | None = None) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and one line that says why.

    On a CPU without bfloat16 instructions bfloat16 products are several times slower than float32 ones, on one with
    them about twice as fast; no flag tells reliably, so "auto" times both for some milliseconds.

    Raises:
        LinearizeError: not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise LinearizeError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype), f"{dtype}, as asked"
    if torch.device(_check_device(device)).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16: the GPU multiplies it natively"
        return torch.float32, "float32: the GPU has no native bfloat16"
    fp32, bf16 = _matmul_gflops(torch.float32), _matmul_gflops(torch.bfloat16)
    figures = f"{bf16:.0f} GFLOP/s in bfloat16 against {fp32:.0f} in float32 on this CPU"
    # bfloat16 costs accuracy and its element-wise work gains little: it has to be clearly faster to be worth it.
    if bf16 > 1.25 * fp32:
        return torch.bfloat16, f"bfloat16: {figures}"
    return torch.float32, f"float32: {figures}"


def _matmul_gflops(dtype: torch.dtype, tokens: int = 128, inner: int = 512, outer: int = 512) -> float:
    """Best of a few products of the size of a small model's projections; 1 to 40 ms in all."""
    x, weight = torch.ones(tokens, inner, dtype=dtype), torch.ones(outer, inner, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        torch.nn.functional.linear(x, weight)  # the first call sets up threads and buffers
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - start)
    return 2 * tokens * inner * outer / best / 1e9
