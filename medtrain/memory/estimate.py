"""Bytes that training takes on one GPU, for each way of spreading it over several.

architecture + work of a process → what lies there all the time (weights, adapter, gradients,
optimiser state, what a strategy gathers) + what a step has alive at its fullest moment
(medtrain.memory.layers) → `Estimate`. Nothing is measured here; tests/memory holds it against what
is.

NF4 (https://arxiv.org/abs/2305.14314): half a byte a weight, and a constant for every 64 weights,
in float32 or, quantised again, in 8 bits with a float32 for every 256 of them. Embeddings, output
layer, norms and biases stay in `model.dtype`. What is sharded how: ZeRO
(https://arxiv.org/abs/1910.02054). The constants of NF4 are no parameters, so nothing shards them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from medtrain.config.training import Strategy
from medtrain.memory import layers
from medtrain.memory.architecture import Architecture
from medtrain.memory.work import Work

GIB = float(2**30)
CONTEXT = 0.7 * GIB
"""CUDA's context with its kernels, and the work spaces of cuBLAS."""
COMMUNICATION = 0.6 * GIB
"""NCCL's buffers, where there are several GPUs."""
FRAGMENTATION = 0.05
"""Of what is allocated: what PyTorch's allocator holds and cannot use."""

_FLOAT32 = 4
_LIVE_ELEMENTS = 1e9
"""ZeRO-3 gathers up to so many elements (`stage3_max_live_parameters`)."""

_SHARDED: dict[Strategy, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "zero3": frozenset({"weights", "adapter", "gradients", "optimizer"}),
    "zero3-offload": frozenset({"gradients", "optimizer"}),
    "fsdp2": frozenset({"weights", "adapter", "gradients", "optimizer"}),
}
_OFFLOADED: dict[Strategy, frozenset[str]] = {
    "zero3-offload": frozenset({"weights", "adapter"}),
}
"""Waiting in main memory; what is gathered of it comes to the GPU."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on one GPU."""

    strategy: Strategy
    checkpointing: bool
    weights: float
    """Of the base, while it trains."""
    adapter: float
    """In float32, and the copy that autocast keeps in the compute dtype."""
    gradients: float
    """And the buffers in which they are summed over GPUs."""
    optimizer: float
    gathered: float
    """Weights of all GPUs that a strategy has at hand while it needs them."""
    activations: float
    """Kept from the forward for the backward pass."""
    logits: float
    """Tiles of the output layer, and the gradient of its input."""
    new_rows: float
    """What training the rows of new tokens adds to the output layer's work."""
    temporary: float
    """What a layer needs beside what it keeps; with checkpointing, what it keeps as well."""
    evaluation: float
    """What an evaluation's forward pass has alive, in place of the four before."""
    overhead: float
    """Of CUDA, NCCL and fragmentation: PyTorch does not count it as allocated."""
    load: float
    """Most that is alive while the model is loaded, overhead included."""

    @property
    def resident(self) -> float:
        """What lies there all the time."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.gathered

    @property
    def allocated(self) -> float:
        """At the fullest moment of training, as torch.cuda.max_memory_allocated() counts it.

        The output layer's work and a layer's are not alive at the same time.
        """
        step = self.activations + max(self.logits + self.new_rows, self.temporary)
        return self.resident + max(step, self.evaluation)

    @property
    def peak(self) -> float:
        """Most that the GPU has to hold, loading included."""
        return max(self.allocated + self.overhead, self.load)

    def to_json(self) -> dict[str, int | str | bool]:
        """Every part in bytes, and the peak."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        rounded = {k: round(v) if isinstance(v, float) else v for k, v in parts.items()}
        return {**rounded, "allocated": round(self.allocated), "peak": round(self.peak)}


def estimate(
    architecture: Architecture,
    work: Work,
    strategy: Strategy = "ddp",
    *,
    gpus: int = 1,
    checkpointing: bool = False,
) -> Estimate:
    """Bytes on one GPU.

    Args:
        architecture: of the base.
        work: of one process.
        strategy: how weights, gradients and state lie on the GPUs.
        gpus: on all nodes together.
        checkpointing: whether layers are computed again in the backward pass.
    """

    if "weights" in _SHARDED[strategy] or strategy in _OFFLOADED:
        work = replace(work, fused=False)

    def share(part: str, size: float) -> float:
        if part in _OFFLOADED.get(strategy, ()):
            return 0.0
        return size / gpus if part in _SHARDED[strategy] else size

    stored, constants = base_bytes(architecture, work)
    trained = trained_parameters(architecture, work)
    copies = _FLOAT32 + (work.dtype_bytes if work.dtype_bytes < _FLOAT32 else 0)
    # 8-bit optimisers know no weights that FSDP2 shards.
    moments = 2 * _FLOAT32 if strategy == "fsdp2" else work.state_bytes
    state = moments + (_FLOAT32 if strategy.startswith("zero") else 0)
    kept, inner = _kept(architecture, work, checkpointing)
    resident = {
        "weights": share("weights", stored) + constants,
        "adapter": share("adapter", trained * copies),
        "gradients": share("gradients", trained * _FLOAT32) + _buffers(trained, strategy, gpus),
        "optimizer": share("optimizer", trained * state),
        "gathered": _gathered(architecture, work, stored, strategy, checkpointing),
    }
    step = {
        "activations": kept,
        "logits": layers.output_layer(architecture, work, tokens=work.tokens, trained=True),
        "new_rows": layers.new_rows(architecture, work),
        "temporary": inner
        + work.tokens * layers.working_a_token(architecture, work)
        + layers.dequantized(architecture, work),
        "evaluation": _evaluation(architecture, work),
    }
    bare = Estimate(strategy, checkpointing, **resident, **step, overhead=0.0, load=0.0)
    overhead = _overhead(bare.allocated, gpus)
    shards = resident["weights"] if strategy == "fsdp2" else 0.0
    load = _load(architecture, work, stored + constants, gpus, shards)
    return Estimate(strategy, checkpointing, **resident, **step, overhead=overhead, load=load)


def base_bytes(architecture: Architecture, work: Work) -> tuple[float, float]:
    """What the base is stored in: parameters, which may be sharded, and the constants of NF4."""
    linear, total = architecture.linear_weights, architecture.parameters.total
    if not work.quantized:
        return float(total * work.dtype_bytes), 0.0
    blocks = linear / 64
    constants = blocks * (1 + _FLOAT32 / 256) if work.double_quantization else blocks * _FLOAT32
    return linear / 2 + (total - linear) * work.dtype_bytes, constants


def trained_parameters(architecture: Architecture, work: Work) -> int:
    """Elements that the optimiser changes."""
    rows = 2 * architecture.hidden * (1 if architecture.tied else 2) if work.new_rows else 0
    return layers.adapter_weights(architecture, work) + rows


def _kept(architecture: Architecture, work: Work, checkpointing: bool) -> tuple[float, float]:
    """What all layers keep, and what one of them keeps while it is computed again."""
    a_layer = work.tokens * layers.kept_a_token(architecture, work)
    last = work.tokens * architecture.hidden * (_FLOAT32 + work.dtype_bytes)  # norm, and its output
    if not checkpointing:
        return architecture.layers * a_layer + last, 0.0
    inputs = work.tokens * architecture.hidden * work.dtype_bytes
    return architecture.layers * inputs + last, a_layer


def _evaluation(architecture: Architecture, work: Work) -> float:
    tokens = work.evaluated_tokens
    if not tokens:
        return 0.0
    layer = tokens * layers.forward_a_token(architecture, work)
    output = layers.output_layer(architecture, work, tokens=tokens, trained=False)
    if work.new_rows:
        output += architecture.vocab * architecture.hidden * work.dtype_bytes
    hidden = tokens * architecture.hidden * work.dtype_bytes
    return max(layer + layers.dequantized(architecture, work), hidden + output)


def _gathered(
    architecture: Architecture, work: Work, stored: float, strategy: Strategy, checkpointing: bool
) -> float:
    """Weights of all GPUs that are at hand at a time.

    bitsandbytes keeps a view of a 4-bit weight for the backward pass, and by it what ZeRO-3 has
    gathered, unless the layer is computed again.
    """
    if strategy.startswith("zero3") and work.quantized and not checkpointing:
        return stored
    if strategy in ("zero3", "zero3-offload"):
        # What lies below new tokens stays whole (medtrain.train.sharded).
        whole = architecture.embedding_weights * work.dtype_bytes if work.new_rows else 0
        return whole + min(stored - whole, _LIVE_ELEMENTS * work.dtype_bytes)
    if strategy == "fsdp2":  # a layer, the next one, and what belongs to no layer
        outside = architecture.embedding_weights * work.dtype_bytes
        return outside + 2 * (stored - outside) / architecture.layers
    return 0.0


def _buffers(trained: int, strategy: Strategy, gpus: int) -> float:
    """Where gradients are summed over GPUs."""
    return float(trained * _FLOAT32) if strategy != "fsdp2" and gpus > 1 else 0.0


def _overhead(allocated: float, gpus: int) -> float:
    return CONTEXT + (COMMUNICATION if gpus > 1 else 0.0) + FRAGMENTATION * allocated


def _load(architecture: Architecture, work: Work, base: float, gpus: int, shards: float) -> float:
    """The base is loaded whole on every GPU before anything shards it. Growing the vocabulary needs
    an embedding matrix twice."""
    matrix = architecture.vocab * architecture.hidden * work.dtype_bytes
    alive = base + (matrix if work.new_rows else layers.dequantized(architecture, work))
    # FSDP2 is given the shards while the whole base is still there.
    alive += shards
    return alive + _overhead(alive, gpus)
