"""What stands on the kernels, on a GPU: attention transfer, PyTorch's compiler, a converted model, fla's kernels."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from linearize.kernels import fla_engine
from linearize.kernels.near_far import near_far_attention
from linearize.kernels.near_far.rows import rows_of_batch
from linearize.kernels.near_far.transfer import far_divergence, split_attention

from ..steps import Skip
from .attention import BF16, FP32, Case, compare, judge, make_inputs, new_kernels

__all__ = [
    "ENGINES",
    "check_compiled",
    "check_compiled_model",
    "check_divergence",
    "check_engine",
    "check_generate",
    "check_logits",
    "check_operator",
    "check_split",
]

# --- transfer ------------------------------------------------------------------------------------------------------


def transfer_inputs(
    dtype: torch.dtype, device: torch.device, small: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], dict[str, Any]]:
    """(q, k, v), the student's features in float32, and the options of the calls."""
    case = Case(dtype, 2, 2, 16, 8, 16, chunks=3.2) if small else Case(dtype, 2, 4, 64, 64, 64)
    inputs = make_inputs(case, device)
    assert inputs.mixer is not None
    with torch.no_grad():
        features = inputs.mixer.query_features(inputs.q), inputs.mixer.key_features(inputs.k)
    return (inputs.q, inputs.k, inputs.v), features, {"window": case.window, "sinks": case.sinks}


def check_split(dtype: torch.dtype, device: torch.device, small: bool) -> dict[str, Any]:
    """Softmax attention split into near and far, against PyTorch in float64. The bounds of log Z are float32's: it is
    float32 whatever the inputs are."""
    qkv, _, options = transfer_inputs(dtype, device, small)
    got = dict(zip(PARTS, split_attention(*qkv, **options, backend="triton")))
    truth = dict(zip(PARTS, split_attention(*(x.double() for x in qkv), **options, backend="torch")))
    for parts in (got, truth):
        parts["far_some"] = (parts["far_lse"] > -torch.inf).double()
        parts["far_lse"] = parts["far_lse"].masked_fill(parts["far_lse"] == -torch.inf, 0.0)
    values = {name: truth.pop(name) for name in ("near", "far")}
    errors = compare(got, truth, FP32)["errors"] | compare(got, values, dtype)["errors"]
    return {"errors": errors, "kernels": new_kernels()}


PARTS = ("near", "near_lse", "far", "far_lse")


def check_divergence(dtype: torch.dtype, device: torch.device, small: bool) -> dict[str, Any]:
    """The divergence of the student's far weights, and its gradients, against PyTorch in float64.

    Under bfloat16 products of features are bfloat16 ones: at most twice what rounding the features alone does to the
    result, and 2^-7 of the largest gradient, to which a product, its weight and the features add 2^-9 or more each.
    """
    (q, k, v), features, options = transfer_inputs(dtype, device, small)
    far_lse = split_attention(q.double(), k.double(), v.double(), **options, backend="torch")[3]

    def run(wide: torch.dtype, backend: str, own: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in own]
        inputs = (q, k) if backend == "triton" else (q.double(), k.double())
        divergence, log_mass = far_divergence(*inputs, far_lse.to(wide), *leaves, **options, backend=backend)
        log_mass = log_mass.masked_fill(log_mass == -torch.inf, 0.0)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(2, *divergence.shape, generator=generator, dtype=torch.float64).to(q.device, wide)
        gradients = torch.autograd.grad((torch.stack([divergence, log_mass]) * weight).sum(), leaves)
        outputs = {"divergence": divergence.detach(), "log_mass": log_mass.detach()}
        return outputs | dict(zip(("d phi_q", "d phi_k"), gradients))

    got, truth = run(FP32, "triton", features), run(torch.float64, "torch", features)
    if dtype == FP32:
        return compare(got, truth, FP32) | {"kernels": new_kernels()}
    rounded = run(torch.float64, "torch", (features[0].to(dtype), features[1].to(dtype)))
    errors = {}
    for name, expected in truth.items():
        bound = 2 * largest(rounded[name] - expected) if name[:2] != "d " else 2**-7 * largest(expected)
        errors[name] = [largest(got[name].double() - expected), bound]
    return judge(errors) | {"kernels": new_kernels()}


def largest(x: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    return float(x.abs().max())


# --- PyTorch's compiler --------------------------------------------------------------------------------------------


def check_operator(far: str, device: torch.device) -> dict[str, Any]:
    """torch.library.opcheck: schema, fake kernel, autograd registration, tracing with dynamic shapes."""
    from linearize.kernels.near_far.triton_operators import near_far_operator

    inputs = make_inputs(Case(FP32, 1, 2, 16, 8, 16, far, batch=1, chunks=2.4), device)
    leaves, mixer = inputs.leaves(FP32, FP32)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    kind, mix = "none", "normalizer"
    extra: tuple[Tensor | None, ...] = (None, None, None)
    if mixer is not None:
        kind, mix = "hedgehog", far
        extra = (leaves["mix_logit"], mixer.query_weight, mixer.key_weight)
    rows = rows_of_batch(1, q.shape[2], 16, 4, device)
    arguments = (q, k, v, *extra, rows.chunks, rows.sequences, rows.count, False, 16, 4, mix, kind, 0.25)
    torch.library.opcheck(near_far_operator, arguments)
    return {}


def compiler(device: torch.device) -> str:
    """Of torch.compile: the default on a GPU; on a CPU, where tracing is rehearsed, one that generates no code."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def check_compiled(device: torch.device, small: bool) -> dict[str, Any]:
    """Attention under torch.compile without a graph break, with and without padding, forward and backward."""
    case = Case(FP32, 1, 2, 16, 8, 16, batch=2, chunks=2.4)
    if not small:
        case = Case(FP32, 2, 3, 64, 64, 64)
    inputs = make_inputs(case, device)
    mask = torch.arange(case.length, device=device) >= torch.tensor([[3], [0]], device=device)

    options = case.options

    class Attention(torch.nn.Module):
        """Where a model has its attention: what is an attribute of a module is a constant to the compiler."""

        def __init__(self) -> None:
            super().__init__()
            self.mixer = inputs.mixer
            self.window, self.sinks, self.mix = options["window"], options["sinks"], options["mix"]

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            options = {"window": self.window, "sinks": self.sinks, "mix": self.mix}
            return near_far_attention(q, k, v, self.mixer, inputs.mix_logit, **options, mask=mask, backend="triton")

    run = Attention()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=compiler(device))
    errors = {}
    for name, own in (("no mask", None), ("left padding", mask)):
        results = []
        for function in (run, compiled):
            leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
            out = function(*leaves, own)
            gradients = torch.autograd.grad(out.square().sum(), leaves)
            results.append(dict(zip(("out", "dq", "dk", "dv"), (out, *gradients))))
        for key, pair in compare(results[1], results[0], FP32)["errors"].items():
            errors[f"{name}, {key}"] = pair
    return {"errors": errors}


# --- a converted model ---------------------------------------------------------------------------------------------


def small_llama(dtype: torch.dtype) -> Any:
    """A random Llama of 2 layers on the CPU, converted, whose far side has a good share of every output."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import linearize
    from linearize.convert import added_parameters

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = linearize.convert(LlamaForCausalLM(config), linearize.LinearizeConfig(window=16, sinks=4)).eval()
    with torch.no_grad():
        added = added_parameters(model)
        for parameter in added.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        for name, parameter in model.named_parameters():  # as from_pretrained does: buffers stay float32
            if name not in added:
                parameter.data = parameter.data.to(dtype)
    return model


def small_batch() -> dict[str, Tensor]:
    """Two rows of 75 tokens, one left-padded."""
    ids = torch.randint(1, 128, (2, 75), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch there."""
    return {name: x.to(device) for name, x in batch.items()}


@torch.no_grad()
def check_logits(device: torch.device) -> dict[str, Any]:
    """Logits of a converted Llama, padding and cache included, against the same model on the CPU.

    float32: 1e-4 of the largest. bfloat16: twice the CPU's own error in bfloat16.
    """
    batch = small_batch()
    real = batch["attention_mask"].bool()
    truth = small_llama(FP32)(**batch, use_cache=False).logits[real].double()
    errors: dict[str, list[float]] = {}
    for dtype in (FP32, BF16):
        results = []
        for place in (torch.device("cpu"), device):
            model = small_llama(dtype).to(place)
            full = model(**on(place, batch), use_cache=False).logits.cpu()[real].double()
            cached = model(**on(place, batch), use_cache=True).logits.cpu()[real].double()
            results.append([full, cached])
        for name, own, got in zip(("logits", "logits with a cache"), *results):
            bound = 1e-4 * largest(truth) if dtype == FP32 else 2 * largest(own - truth)
            errors[f"{name}, {str(dtype)[6:]}"] = [largest(got - truth), bound]
    return judge(errors)


def check_generate(device: torch.device, small: bool) -> dict[str, Any]:
    """Greedy tokens of a left-padded batch in float32, across chunk borders, against the CPU's."""
    results = []
    for place in (torch.device("cpu"), device):
        model = small_llama(FP32).to(place)
        found = model.generate(**on(place, small_batch()), max_new_tokens=8 if small else 40, do_sample=False)
        results.append(found.cpu())
    return judge({"tokens that differ": [float((results[0] != results[1]).sum()), 0.0]})


@torch.no_grad()
def check_compiled_model(device: torch.device) -> dict[str, Any]:
    """A converted Llama under torch.compile without a graph break: logits within 1e-4 of the largest of its own."""
    if device.type != "cuda":
        raise Skip("tracing it takes a CPU 20 s, and the tests do it; here its code for a GPU matters")
    model = small_llama(FP32).to(device)
    batch = on(device, small_batch())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler(device))
    errors = {}
    for name, own in (("padded", batch), ("no mask", {"input_ids": batch["input_ids"][:1]})):
        expected = model(**own, use_cache=False).logits
        got = compiled(**own, use_cache=False).logits
        errors[name] = [largest((got - expected)[:1]), 1e-4 * largest(expected)]
    return judge(errors)


# --- flash-linear-attention ----------------------------------------------------------------------------------------

# By name: the function, and which gates it takes besides k and v; states take no queries.
ENGINES: dict[str, tuple[Callable[..., Any], tuple[str, ...], bool]] = {
    "simple_gla": (fla_engine.simple_gla, ("per token",), True),
    "gla": (fla_engine.gla, ("per feature",), True),
    "gated_delta_rule": (fla_engine.gated_delta_rule, ("per token", "beta"), True),
    "decayed_states": (fla_engine.decayed_states, ("per head",), False),
    "gated_states": (fla_engine.gated_states, ("per feature",), False),
    "delta_states": (fla_engine.delta_states, ("per token", "beta"), False),
}


def check_engine(name: str, device: torch.device) -> dict[str, Any]:
    """fla's kernel through its adapter, grouped queries included, against PyTorch in float64: 2e-3 of the largest,
    as fla's float32 products are TF32."""
    if find_spec("fla") is None:
        raise Skip("flash-linear-attention is not installed")
    if device.type != "cuda":
        raise Skip("flash-linear-attention's kernels need a GPU")
    function, gates, queries = ENGINES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    kv_heads, group, length, size = 2, 2, 200, 64
    k = torch.nn.functional.normalize(normal(1, kv_heads, length, size), dim=-1)
    v = normal(1, kv_heads, length, size)
    shapes = {"per head": (kv_heads,), "per token": (1, kv_heads, length), "per feature": (1, kv_heads, length, size)}
    inputs = [k, v]
    if queries:
        inputs.insert(0, normal(1, kv_heads * group, length, size))
    inputs += [
        normal(1, kv_heads, length).sigmoid() if gate == "beta" else -0.1 * normal(*shapes[gate]).abs()
        for gate in gates
    ]
    options: dict[str, Any] = {} if queries else {"chunk": 64}
    got = function(*(x.to(device, FP32) for x in inputs), **options, backend="fla")
    truth = function(*(x.to(device) for x in inputs), **options, backend="torch")
    names = ("out", "last state") if queries else ("states",)
    pairs = zip(names, got if queries else (got,), truth if queries else (truth,))
    return judge(
        {key: [largest(actual.double() - expected), 2e-3 * largest(expected)] for key, actual, expected in pairs}
    )
