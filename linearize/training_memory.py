"""How much memory a GPU needs to train with, computed from a model's configuration alone.

No weights are read: the model is built without memory (on PyTorch's meta device) to count its parameters. Letters: e
bytes of the dtype, T = batch_size * seq_len tokens, h hidden size, I inner size of the MLP, H heads on K key-value
heads of size D, F features, W window, L = S + 2 W, V vocabulary, P processes. A step's peak is

    weights + teacher + trained + gathered + max(kept + logits, kept + layer, update)

    weights   e a parameter of the model, and 4 of what conversion and LoRA add
    teacher   the frozen copy that a full training has, e a parameter; with LoRA the teacher is the model itself: 0
    trained   a trained parameter: 4 gradient, 8 Adam's moments, and 4 master copy where the model holds it in 16 bit
    gathered  FSDP2: two decoder layers whole, the one that computes and the next
    kept      what autograd keeps of all layers from forward to backward: `_kept_bytes` a token and layer
              with checkpointing e h a token and layer, the layers' inputs
    logits    2 e V a token, student's, which become their gradient, and teacher's (with top_k only the student's), and
              the larger of 9 * 4 V for each of 128 rows, the loss, and the head's gradient, the backward pass's start
    layer     gradients inside of one layer, 2 e I or those of the attention; with checkpointing its `_kept_bytes` too
    update    8 + e bytes for the largest trained parameter: sums of gradients, Adam's temporaries

Gradients are counted as alive throughout, as they are when several batches are accumulated. FSDP2 divides the frozen
weights of the decoder's layers by P; what is trained stays whole in every process, and so do embedding, head and last
norm. Without FSDP2 every process has everything.
The transfer stage keeps nothing and has no logits: `layer` is then what one layer's loss takes, while the teacher's
forward pass waits in that layer.

Not in here: the CUDA context and libraries' buffers (0.5 to 1 GiB), what the allocator loses between blocks (5 to
20 %), and buffers of communication.
"""

from dataclasses import asdict, dataclass
from typing import Any

from linearize.config import LinearizeConfig
from linearize.convert import added_parameters, convert, converted_layers
from linearize.errors import LinearizeError
from linearize.families import family_of, geometry_of

__all__ = ["BACKENDS", "StageMemory", "TrainingMemory", "training_memory"]

BACKENDS = ("triton", "torch")
FLOAT = 4  # bytes of float32: the state, LoRA, gradients and Adam's moments have it whatever the model's dtype
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_COPIES = 2  # tensors of the size and dtype of a batch's logits, see linearize.distill.end_to_end
ROWS_AT_ONCE = 128  # of logits in float32, see linearize.distill.logit_losses
ROW_COPIES = 9  # float32 tensors of those rows at a time
# Families that plans were compared with real trainings of; others have experts, other norms, MLPs or whole maps.
MEASURED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite", "cohere")
FUSED = 128  # up to this head_dim and feature_dim the Triton kernels make hedgehog's features themselves


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process in one stage, at its peak; the parts are those of the module.

    `stage` is "transfer", "distill, lora" or "distill, full"; `checkpointing`: of activations.
    """

    stage: str
    checkpointing: bool
    weights: int
    teacher: int
    trained: int
    gathered: int
    kept: int
    logits: int
    layer: int
    update: int

    @property
    def total(self) -> int:
        """All that is alive at the peak."""
        steady = self.weights + self.teacher + self.trained + self.gathered
        return steady + max(self.kept + self.logits, self.kept + self.layer, self.update)


@dataclass(frozen=True)
class TrainingMemory:
    """The stages of one model. `parameters`: of the original; `added`: what conversion adds; `lora`: of the adapter."""

    model: str
    family: str
    dtype: str
    seq_len: int
    batch_size: int
    processes: int
    fsdp: bool
    backend: str
    parameters: int
    added: int
    lora: int
    stages: tuple[StageMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        stages = [asdict(stage) | {"total": stage.total} for stage in self.stages]
        return asdict(self) | {"stages": stages}


@dataclass(frozen=True)
class _Sizes:
    """The numbers that formulas need.

    `given`: PyTorch makes the features, not the kernels. `original`, `added`, `lora`, `decoder` count parameters: of
    the model, of conversion, of the adapter, of one decoder layer; `largest`, `largest_added`: of the largest tensor of
    the model, of conversion.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    converted: int
    qk_norm: bool
    window: int
    sinks: int
    mixer: bool
    features: int
    given: bool
    original: int
    added: int
    lora: int
    decoder: int
    largest: int
    largest_added: int
    projections: tuple[str, ...]
    output: str
    targets: tuple[str, ...]
    rank: int


def training_memory(
    model_config: Any,
    config: LinearizeConfig,
    *,
    seq_len: int = 1024,
    batch_size: int = 1,
    processes: int = 1,
    fsdp: bool = False,
    dtype: str = "bfloat16",
    lora_rank: int = 8,
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    top_k: int | None = None,
    backend: str = "triton",
    name: str = "",
) -> TrainingMemory:
    """Bytes that each process needs in each stage.

    Args:
        model_config: a transformers configuration of a known family.
        config: the conversion.
        seq_len, batch_size: tokens a row and rows a batch, of one process.
        processes: in all, one a GPU.
        fsdp: divide the frozen weights among the processes by FSDP2, instead of a whole copy each (DDP).
        dtype: "float32", "bfloat16" or "float16": of the weights and products.
        lora_rank, lora_targets, top_k: as in `DistillOptions`.
        backend: of the converted layers: "triton", as on a GPU, or "torch", as on a CPU, which keeps more.
        name: what to call the model in the result.

    Raises:
        LinearizeError: an unknown dtype or backend, a number below 1, `fsdp` with one process, LoRA targets that name
            no module, a family that is not among `MEASURED`, or what `convert` would refuse.
    """
    if dtype not in DTYPE_BYTES:
        raise LinearizeError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    if backend not in BACKENDS:
        raise LinearizeError(f"backend: {backend!r} is not known; use one of {', '.join(BACKENDS)}")
    for key, value in (("seq_len", seq_len), ("batch_size", batch_size), ("processes", processes)):
        if value < 1:
            raise LinearizeError(f"{key}: {value} is below 1; give at least 1")
    if fsdp and processes == 1:
        raise LinearizeError("fsdp: nothing is sharded over 1 process; give processes, or leave fsdp out")
    sizes = _sizes(model_config, config, lora_rank, lora_targets)
    setting = _Setting(sizes, DTYPE_BYTES[dtype], batch_size * seq_len, processes, fsdp, backend, top_k)
    stages = [setting.transfer()] if sizes.added else []
    trained = (False,) if fsdp else (False, True)  # a fully trained student is in no shards, so a launch refuses it
    stages += [setting.distill(full, checkpointing) for full in trained for checkpointing in (False, True)]
    return TrainingMemory(
        model=name,
        family=model_config.model_type,
        dtype=dtype,
        seq_len=seq_len,
        batch_size=batch_size,
        processes=processes,
        fsdp=fsdp,
        backend=backend,
        parameters=sizes.original,
        added=sizes.added,
        lora=sizes.lora,
        stages=tuple(stages),
    )


def _sizes(model_config: Any, config: LinearizeConfig, rank: int, targets: tuple[str, ...]) -> _Sizes:
    """Counted on the model itself, built and converted without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    geometry, family = geometry_of(model_config), family_of(model_config)
    if family.model_type not in MEASURED:
        raise LinearizeError(
            f"train: the formulas have been measured on {', '.join(MEASURED)}, not on {family.model_type}; run a few "
            "steps and look at their memory instead"
        )
    targets = family.modules(targets)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    original = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    decoder = model.get_submodule(family.layers)[0]
    decoder_size = sum(parameter.numel() for parameter in decoder.parameters())
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [target for target in targets if target not in leaves]
    if unknown:
        known = sorted(leaf for leaf in leaves if leaf.endswith("_proj"))
        raise LinearizeError(
            f"lora_targets: no module is called {', '.join(unknown)}; the model has {', '.join(known)}"
        )
    linears = [x for name, x in model.named_modules() if name.rpartition(".")[2] in targets]
    lora = sum(rank * (x.in_features + x.out_features) for x in linears)
    convert(model, config)
    layers = converted_layers(model)
    added = added_parameters(model)
    mixer = next(iter(layers.values())).mixer
    return _Sizes(
        hidden=model_config.hidden_size,
        inner=model_config.intermediate_size,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        vocab=model_config.vocab_size,
        layers=geometry.layers,
        converted=len(layers),
        qk_norm=any(layer.qk_norm is not None for layer in layers.values()),
        window=config.window,
        sinks=config.sinks,
        mixer=mixer is not None,
        features=0 if mixer is None else mixer.num_features,
        given=mixer is not None
        and (config.mixer != "hedgehog" or max(geometry.head_dim, mixer.num_features // 2) > FUSED),
        original=original,
        added=sum(parameter.numel() for parameter in added.values()),
        lora=lora,
        decoder=decoder_size,
        largest=largest,
        largest_added=max((parameter.numel() for parameter in added.values()), default=0),
        projections=family.projections,
        output=family.output,
        targets=targets,
        rank=rank,
    )


@dataclass(frozen=True)
class _Setting:
    """One training: sizes, e bytes of the dtype, T tokens a process, and how it is spread."""

    sizes: _Sizes
    e: int
    tokens: int
    processes: int
    fsdp: bool
    backend: str
    top_k: int | None

    def transfer(self) -> StageMemory:
        s, e = self.sizes, self.e
        # The embeddings, the layer's input and what its attention or MLP is given wait meanwhile.
        attention = 3 * e * s.hidden + _transfer_bytes(s, e, self.backend)
        layer = max(attention, 4 * e * s.hidden + 3 * e * s.inner)
        return self._stage("transfer", False, False, kept=0, logits=0, layer=self.tokens * layer)

    def distill(self, full: bool, checkpointing: bool) -> StageMemory:
        s, e = self.sizes, self.e
        one = {converted: _kept_bytes(s, e, self.backend, full, converted) for converted in (False, True)}
        kept = s.converted * one[True] + (s.layers - s.converted) * one[False]
        # When gradients reach the attention, what autograd kept of the MLP is gone.
        layer = max(2 * e * s.inner, _attention_gradient_bytes(s, e, self.backend) - 3 * e * s.inner)
        layer += 2 * e * s.hidden
        if checkpointing:
            kept = s.layers * e * s.hidden
            layer += max(one[True], one[False] if s.converted < s.layers else 0)
        kept += FLOAT * s.hidden + e * s.hidden * (1 + full)  # the last norm's and the head's input
        batch = e * s.vocab * self.tokens
        copies = LOGIT_COPIES - (self.top_k is not None)
        rows = ROW_COPIES * FLOAT * s.vocab * min(ROWS_AT_ONCE, self.tokens)
        head = self._update_bytes(s.vocab * s.hidden) if full else 0
        logits = copies * batch + max(rows, head)
        stage = "distill, full" if full else "distill, lora"
        sizes = {"kept": self.tokens * kept, "logits": logits, "layer": self.tokens * layer}
        return self._stage(stage, full, checkpointing, **sizes)

    def _update_bytes(self, largest: int) -> int:
        """What a gradient of `largest` numbers takes beside their sum: itself; in 16 bit two float32 copies too."""
        return (FLOAT if self.e == FLOAT else self.e + 2 * FLOAT) * largest

    def _stage(self, stage: str, full: bool, checkpointing: bool, *, kept: int, logits: int, layer: int) -> StageMemory:
        s, e = self.sizes, self.e
        added = s.added + (s.lora if stage == "distill, lora" else 0)
        master = 0 if e == FLOAT else FLOAT
        shards = self.processes if self.fsdp else 1
        inside = s.layers * s.decoder
        frozen = e * (inside // shards + s.original - inside)
        return StageMemory(
            stage=stage,
            checkpointing=checkpointing,
            weights=(e * s.original if full else frozen) + FLOAT * added,
            teacher=frozen + FLOAT * s.added if full else 0,
            trained=added * 3 * FLOAT + (s.original * (3 * FLOAT + master) if full else 0),
            gathered=2 * e * s.decoder if self.fsdp else 0,
            kept=kept,
            logits=logits,
            layer=layer,
            update=self._update_bytes(s.largest) if full else 2 * FLOAT * s.largest_added,
        )


def _kept_bytes(s: _Sizes, e: int, backend: str, full: bool, converted: bool) -> int:
    """Bytes a token that autograd keeps of one decoder layer.

    norms      2 * 4 h, and 2 e h where they are trained
    inputs     of the projections: full e (h + h + I) and the attention's output; with LoRA in float32, 4 a number
               of each target's input (in 16 bit a copy a target), and 4 rank
    MLP        3 e I: gate, silu(gate), up
    attention  e (2 H D + 2 K D) + 4 H for softmax: q, out, k, v, log-sum-exp
               and `_near_far_bytes` for a converted layer
    """
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = 2 * FLOAT * s.hidden + (2 * e * s.hidden if full else 0)
    if s.qk_norm:
        norms += (q + k) * (FLOAT + (e if full else 0))
    widths = dict.fromkeys(s.projections, s.hidden) | {s.output: q}
    widths |= {"gate_proj": s.hidden, "up_proj": s.hidden, "down_proj": s.inner}
    # In float32 softmax attention's own output is what the output projection keeps.
    own_output = converted or (not full and e != FLOAT)
    if full:
        inputs = e * (2 * s.hidden + s.inner + (q if own_output else 0))
    else:
        inputs = sum(FLOAT * s.rank for target in widths if target in s.targets)
        shared = set()
        for target, width in widths.items():
            group = (
                "out" if target == s.output else "down" if target == "down_proj" else target in ("gate_proj", "up_proj")
            )
            if target not in s.targets or (target == s.output and not own_output) or (e == FLOAT and group in shared):
                continue
            shared.add(group)
            inputs += FLOAT * width
    mlp = 3 * e * s.inner
    attention = _near_far_bytes(s, e, backend) if converted else e * (2 * q + 2 * k) + FLOAT * s.heads
    return norms + inputs + mlp + attention


def _near_far_bytes(s: _Sizes, e: int, backend: str) -> int:
    """Bytes a token that autograd keeps of one converted attention.

    triton  e (2 H D + 2 K D) + 3 * 4 H: q, out, k, v and three numbers a query; the mix 4 H + 4 H D, q in float32
    torch   4 times the numbers: H L weights, 2 K D L / W near keys and values, 4 H D near, far and scaled q,
            2 H F and 2 K F features, K F D / W states; the mix as above
    """
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    mix = FLOAT * (s.heads + q) if s.mixer and (e != FLOAT or backend == "torch") else 0
    if backend == "triton":
        given = (FLOAT + e) * (s.heads + s.kv_heads) * s.features if s.given else 0
        return e * (2 * q + 2 * k) + FLOAT * 3 * s.heads + mix + given
    keys = s.sinks + 2 * s.window
    near = s.heads * keys + 2 * k * keys / s.window + 2 * q
    far = 2 * q + 2 * s.heads * s.features + 2 * s.kv_heads * s.features + k * s.features / s.window
    return int(FLOAT * (near + (far if s.mixer else 0))) + mix


def _attention_gradient_bytes(s: _Sizes, e: int, backend: str) -> int:
    """Bytes a token of gradients inside of one attention's backward pass."""
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    wide = FLOAT if backend == "torch" else e
    features = wide * (s.heads + s.kv_heads) * s.features
    return e * (2 * q + 2 * k) + 2 * wide * q + features


def _transfer_bytes(s: _Sizes, e: int, backend: str) -> int:
    """Bytes a token of one layer's loss in the transfer stage, objective "decomposed".

    triton  e (2 H D + 2 K D) q, k, v and output; 4 * 7 H D near, far and all of the teacher, q and the far side in
            float32, errors; 4 * 3 K F D / W states
    torch   e (H D + 2 K D) q, k, v; 4 times 8 H D as above, 2 H F + K F features, 2 K F D / W states, K D values, and
            H D + K D q and k from 16 bit
    """
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    states = k * s.features / s.window
    if backend == "triton":
        given = (FLOAT + e) * (s.heads + s.kv_heads) * s.features if s.given else 0
        return int(e * (2 * q + 2 * k) + FLOAT * (7 * q + 3 * states)) + given
    features = 2 * s.heads * s.features + s.kv_heads * s.features
    widened = 0 if e == FLOAT else q + k
    return int(e * (q + 2 * k) + FLOAT * (8 * q + features + 2 * states + k + widened))
