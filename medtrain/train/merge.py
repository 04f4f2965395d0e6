"""An adapter and its base become one plain model directory.

adapter checked → the trained model's log-probabilities on a few answers → the base again, in 16
bits (on the GPU where it fits) or dequantised layer by layer → PEFT adds the adapter in place →
weights, tokenizer and record in a directory beside the target → loaded back and compared with the
trained model → renamed to its place. There is never more than one model in memory.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from medtrain.config import RunConfig
from medtrain.console import Console
from medtrain.data.base import published_directory, resolve_base
from medtrain.data.tokenizer import load_chat_tokenizer
from medtrain.errors import DataError, MedtrainError
from medtrain.files import sha256_file
from medtrain.gpus import AT_WORK, parameters_of
from medtrain.run import Run, Trained
from medtrain.train.adapter import WEIGHTS_FILE, attach_adapter, read_weights
from medtrain.train.divergence import (
    Divergence,
    choose_references,
    compare_with_trained,
    record_trained,
)
from medtrain.train.merged_files import make_durable, write_model, write_record
from medtrain.train.model import compute_dtype, load_base, load_merged

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

_TEMPORARY = ".tmp-divergence-"

_FAULT_NATS = {torch.float32: 0.001, torch.float64: 0.001}
_FAULT_NATS_16_BIT = 0.05
"""What rounding can make of a merge that changes no weight but by the adapter, and more."""


def merge_adapter(run: Run, config: RunConfig, console: Console, stage: Trained) -> dict[str, Any]:
    """Write `run.merged(stage)`; returns counts and the divergence from the trained model.

    Raises:
        DataError: the adapter, the base or the evaluation rows are missing or damaged.
        AdapterMismatchError: the adapter does not fit the base.
        MedtrainError: the merged model is not the trained one.
    """
    adapter, target = run.adapter(stage), run.merged(stage)
    _check_weights(adapter, stage)
    _clear_leftovers(target)
    chat = load_chat_tokenizer(run)
    references = choose_references(run, config, chat)
    if config.merge.kl_prompts and not references:
        console.warn(
            "divergence_unknown",
            f"merge-{stage}: no evaluation row to compare the merged model with the trained one on",
            stage=stage,
        )
    dtype = merged_dtype(run, config)
    with TemporaryDirectory(prefix=_TEMPORARY, dir=target.parent) as scratch:
        if references:
            record_trained(_trained(run, config, chat, adapter, dtype), references, Path(scratch))
            _free_memory()
        with published_directory(target) as directory:
            model = merged_model(run, config, chat, adapter, dtype)
            written = write_model(model, directory, run.tokenizer, config.merge.max_shard_size)
            del model
            _free_memory()
            divergence = None
            if references:
                device = _device_for(written.weight_bytes / dtype.itemsize, dtype)
                merged = load_merged(directory, config, dtype=dtype, device=device)
                divergence = compare_with_trained(merged, references, Path(scratch))
                del merged
                _check(divergence, config, dtype, console, stage)
            write_record(directory, _facts(config, adapter, dtype, divergence))
            make_durable(directory)
    _free_memory()
    return {**written._asdict(), **(divergence.to_json() if divergence else {})}


def merged_model(
    run: Run, config: RunConfig, chat: ChatTokenizer, adapter: Path, dtype: torch.dtype
) -> Any:
    """The base with the adapter added to its weights, unquantised, in `dtype`.

    Raises:
        DataError: the adapter is missing or damaged, or the sum is no number.
        AdapterMismatchError: the adapter does not fit the base.
    """
    if config.merge.into == "dequantized" and config.model.quantization == "nf4":
        # As it was quantised for training, but no larger than the result.
        loaded = min(dtype, compute_dtype(config), key=lambda kind: kind.itemsize)
        base = _dequantize(load_base(run, config, chat, quantized=True, dtype=loaded), dtype)
    else:
        # Where it fits: the 16-bit base need not fit the GPU that trained it in 4 bits.
        device = _device_for(parameters_of(resolve_base(run, config)), dtype)
        base = load_base(run, config, chat, quantized=False, dtype=dtype, device=device)
    _free_memory()
    # Not `safe_merge`: it rounds the adapter's part to 16 bits before it adds it.
    merged = attach_adapter(base, adapter).merge_and_unload(progressbar=False)
    for name, parameter in merged.named_parameters():
        if not _is_finite(parameter):
            raise DataError(
                f"Merging {adapter} gives numbers in {name} that {dtype} cannot hold",
                fix="Set model.dtype to bfloat16 or float32, or train with a lower learning rate.",
            )
    return merged


def merged_dtype(run: Run, config: RunConfig) -> torch.dtype:
    """The dtype of merged weights: `model.dtype`, or for `auto` the one the base is stored in.

    A base whose configuration names none is taken for float32, which loses nothing.

    Raises:
        DataError: the base's configuration cannot be read.
    """
    if config.model.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.model.dtype)
        return chosen
    base = resolve_base(run, config)
    try:
        stored = AutoConfig.from_pretrained(
            base,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"The configuration of {base} cannot be read: {str(error).splitlines()[0]}",
            fix="Check model.base; a hub id needs the network or a cached copy.",
        ) from error
    dtype = stored.dtype or stored.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _device_for(parameters: float | None, dtype: torch.dtype) -> str | None:
    """The CPU for a model that would not fit the GPU beside what a layer needs at work; None for
    where models go otherwise.

    Args:
        parameters: of the model; None where nobody knows.
        dtype: of its weights.
    """
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    fits = parameters is not None and parameters * dtype.itemsize * AT_WORK < free
    return None if fits else "cpu"


def _trained(
    run: Run, config: RunConfig, chat: ChatTokenizer, adapter: Path, dtype: torch.dtype
) -> Any:
    """The model as it was trained: quantised where it was, the adapter beside the weights."""
    quantized = config.model.quantization == "nf4"
    base = load_base(run, config, chat, quantized=quantized, dtype=None if quantized else dtype)
    return attach_adapter(base, adapter).get_base_model()


def _dequantize(model: Any, dtype: torch.dtype) -> Any:
    """Replace every 4-bit layer by a plain one on the CPU, one at a time.

    transformers' own `dequantize` keeps the 4-bit weights until it is done, and works every layer
    out twice.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name in [n for n, m in model.named_modules() if isinstance(m, Linear4bit)]:
        packed = model.get_submodule(name)
        with torch.device("meta"):
            plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False)
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain.weight = torch.nn.Parameter(weight.to("cpu", dtype), requires_grad=False)
        plain.bias = packed.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    return model.to("cpu", dtype)


def _facts(
    config: RunConfig, adapter: Path, dtype: torch.dtype, divergence: Divergence | None
) -> dict[str, Any]:
    """What the record says besides the files."""
    return {
        "base": _name_of(config.model.base),
        "revision": config.model.revision,
        "into": config.merge.into,
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": sha256_file(adapter / WEIGHTS_FILE),
        "divergence": divergence and divergence.to_json(),
    }


def _check(
    divergence: Divergence, config: RunConfig, dtype: torch.dtype, console: Console, stage: Trained
) -> None:
    """Say how far the merged model is from the trained one; stop where rounding is no excuse."""
    nats, into = divergence.nats, config.merge.into
    console.event(
        "divergence",
        f"merge-{stage}: {nats:.4g} nats a token from the trained model, same likeliest token "
        f"{divergence.top1_agreement:.1%}",
        stage=stage,
        **divergence.to_json(),
    )
    exact = config.model.quantization == "none" or into == "dequantized"
    if exact and nats > _FAULT_NATS.get(dtype, _FAULT_NATS_16_BIT):
        raise MedtrainError(
            f"The merged model is {nats:.3g} nats a token away from the trained one, although both "
            "have the same weights",
            fix="The base or the adapter was changed while they were merged, or the installed "
            "peft merges this kind of adapter wrongly: merge again, or try another version of it.",
        )
    if nats > config.merge.kl_warn_nats:
        other = {"base": "dequantized", "dequantized": "base"}[into]
        console.warn(
            "divergence_large",
            f"The merged {stage.upper()} model answers differently from the one that was trained "
            f"({nats:.3g} nats a token, more than {config.merge.kl_warn_nats:g})"
            + ("" if config.model.quantization == "none" else f": try merge.into={other}"),
            stage=stage,
            kl_nats=nats,
        )


def _check_weights(adapter: Path, stage: Trained) -> None:
    """Refuse a missing or damaged adapter before a large base is loaded for it."""
    if not adapter.is_dir():
        raise DataError(
            f"There is no {stage} adapter ({adapter})",
            fix=f"Train it: medtrain run CONFIG --until {stage}",
        )
    for name, weight in read_weights(adapter).items():
        if not _is_finite(weight):
            raise DataError(
                f"The adapter {adapter} is broken: {name} holds values that are no numbers",
                fix=f"Train it again with a lower {stage}.learning_rate.",
            )


def _is_finite(weight: torch.Tensor) -> bool:
    """Without the temporaries of `torch.isfinite`, which are larger than the weight."""
    return all(bool(torch.isfinite(extreme)) for extreme in weight.detach().aminmax())


def _clear_leftovers(target: Path) -> None:
    """Remove what a killed merge left half done."""
    for pattern in (f".tmp-{target.name}-*", f"{_TEMPORARY}*"):
        for leftover in target.parent.glob(pattern):
            shutil.rmtree(leftover)


def _name_of(base: str) -> str:
    """A hub id as it is; of a directory its name, since the model may be handed to others."""
    path = Path(base).expanduser()
    return path.resolve().name if path.is_dir() else base


def _free_memory() -> None:
    """Give the memory of models that nobody holds any more back to the system."""
    # PEFT's wrappers refer to each other in circles, so counting references does not free them.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed blocks below 32 MB for itself: most of a model's layers.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
