"""What a Llama layer under LoRA has alive while it is computed, in bytes.

architecture + work → what a forward pass keeps for the backward pass, what a layer needs beside it,
what the output layer needs. The formulas follow what PyTorch's autograd keeps: a frozen linear
layer keeps no input; a norm keeps its input in float32; SiLU and the product after it keep theirs;
attention keeps queries, keys, values, its output and a number a head. By PEFT's path every adapter
keeps its input after dropout, and dropout its mask; fused (medtrain.train.lora_function), layers
that read one tensor keep that, and one mask.
"""

from __future__ import annotations

from medtrain.memory.architecture import Architecture
from medtrain.memory.work import Work

_FLOAT32 = 4
_READ_ALIKE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"),
               ("down_proj",))  # fmt: skip
"""Linear layers by the tensor that they read."""

_TILE_TOKENS, _TILE_VOCAB = 4096, 32_768
"""A tile of TRL's fused output layer: trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE and
trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE."""
_CPU_TILES, _CPU_FORWARD_TILES = 7, 3
"""Float32 tiles that it has alive on a CPU, where PyTorch folds them and not Triton: with gradients
and without."""


def targets_of(architecture: Architecture, work: Work) -> list[str]:
    """The linear layers of a layer that have an adapter."""
    names = list(architecture.linear)
    wanted = work.lora.targets
    if isinstance(wanted, str):
        return names
    return [name for name in names if any(name == w.rpartition(".")[2] for w in wanted)]


def adapter_weights(architecture: Architecture, work: Work) -> int:
    """Elements of LoRA's matrices, DoRA's magnitudes included."""
    linear = [architecture.linear[name] for name in targets_of(architecture, work)]
    each = sum(work.lora.r * (one.inputs + one.outputs) for one in linear)
    each += sum(one.outputs for one in linear) if work.lora.dora else 0
    return architecture.layers * each


def kept_a_token(architecture: Architecture, work: Work) -> float:
    """What one layer keeps for the backward pass, for every token."""
    b, linear = work.dtype_bytes, architecture.linear
    q, kv = linear["q_proj"].outputs, linear["k_proj"].outputs
    norms = 2 * architecture.hidden * _FLOAT32
    attention = (2 * q + 2 * (q if work.repeats_groups else kv)) * b + architecture.heads * _FLOAT32
    mlp = 3 * architecture.intermediate * b
    return norms + attention + mlp + _adapters_a_token(architecture, work)


def _adapters_a_token(architecture: Architecture, work: Work) -> float:
    """Inputs of LoRA's matrices, and dropout's masks."""
    b, dropout = work.dtype_bytes, work.lora.dropout > 0
    mask = (1 if work.device == "cuda" else b) if dropout else 0
    kept = 0.0
    targets = set(targets_of(architecture, work))
    for group in _READ_ALIKE:
        named = [architecture.linear[name] for name in group if name in targets]
        inputs = [one.inputs for one in named]
        if work.fused:
            # What attention's kernels give on a GPU is kept by them already.
            own = 0 if group == ("o_proj",) and work.device == "cuda" else b
            kept += max(inputs, default=0) * (own + mask)
        else:
            kept += sum(inputs) * (b + mask) if dropout else max(inputs, default=0) * b
        kept += len(named) * work.lora.r * b
        if work.lora.dora:
            kept += 2 * sum(one.outputs for one in named) * b
    return kept


def working_a_token(architecture: Architecture, work: Work) -> float:
    """What a layer needs beside what it keeps, in its MLP's backward pass: gradients of the two
    factors of the gate's product, and of the layer's input and output."""
    return (2 * architecture.intermediate + 2 * architecture.hidden) * work.dtype_bytes


def forward_a_token(architecture: Architecture, work: Work) -> float:
    """What a forward pass without a backward pass has alive: in an MLP, its input and the residual
    stream, SiLU's output, and an adapter's sum with its two summands and the scaled one."""
    hidden, b = architecture.hidden, work.dtype_bytes
    return 4 * architecture.intermediate * b + hidden * (3.5 * b + _FLOAT32)


def dequantized(architecture: Architecture, work: Work) -> float:
    """The largest weight of a layer in the compute dtype, and its constants in float32."""
    if not work.quantized:
        return 0.0
    largest = max(layer.weights for layer in architecture.linear.values())
    return largest * work.dtype_bytes + largest / 64 * _FLOAT32


def output_layer(architecture: Architecture, work: Work, *, tokens: int, trained: bool) -> float:
    """What TRL's fused output layer has alive: a tile of logits, and the gradient of its input."""
    rows = min(tokens, _TILE_TOKENS)
    tile = rows * _TILE_VOCAB * work.dtype_bytes
    if work.device == "cpu":
        tiles = _CPU_TILES if trained else _CPU_FORWARD_TILES
        tile += tiles * rows * min(architecture.vocab, _TILE_VOCAB) * _FLOAT32
    gradient = architecture.hidden * (_FLOAT32 + 2 * work.dtype_bytes)
    return tile + (tokens * gradient if trained else 0)


def new_rows(architecture: Architecture, work: Work) -> float:
    """What PEFT's trainable tokens cost beside their few rows: the output layer's matrix is merged
    with them, and its gradient, in float32 and then in the matrix's dtype, is that of all rows."""
    if not work.new_rows:
        return 0.0
    matrix = architecture.vocab * architecture.hidden
    b = work.dtype_bytes
    return matrix * (b + _FLOAT32 + (b if b < _FLOAT32 else 0))
