"""The base model as every stage sees it: same dtype, same device rule, same size.

hub id or directory → safetensors weights, quantised to NF4 on the way in where asked → embeddings
grown to the tokenizer's rows, the new ones computed from the old → the model that an adapter is
put on (medtrain.train.adapter) or merged into. A merged directory loads through `load_merged`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from medtrain.attention.families import why_not_packed
from medtrain.attention.kernels import leave_cudnn_out
from medtrain.attention.packed import attention_for
from medtrain.config import RunConfig
from medtrain.data.base import resolve_base
from medtrain.errors import BadNodeError, ConfigError, DataError, EndpointError, MedtrainError
from medtrain.run import Run, Trained
from medtrain.train.growing import grow

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

__all__ = ["compute_dtype", "load_base", "load_merged", "packs"]


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of computation and storage that `model.dtype` stands for on this machine."""
    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def load_base(
    run: Run,
    config: RunConfig,
    chat: ChatTokenizer,
    *,
    quantized: bool,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    packed: bool = False,
) -> Any:
    """The base with its embeddings grown to `chat.vocab_rows`, in evaluation mode.

    Args:
        run: where a base that medtrain built itself lies.
        config: names the base, its dtype and its attention.
        chat: the tokenizer that `prepare` made for this base.
        quantized: NF4 weights in the linear layers; embeddings and output layer stay in `dtype`.
        dtype: of computation and storage; None takes `model.dtype`'s.
        device: where it goes; None takes this process's GPU, or the CPU where there is none.
        packed: its attention keeps apart rows that lie in one sequence (medtrain.train.packed).

    Raises:
        DataError: the directory holds no model that can be loaded, or not the one that `prepare`
            saw.
        EndpointError: the hub is not reachable, or refuses.
        BadNodeError: NF4 is not possible here.
    """
    dtype = dtype or compute_dtype(config)
    model = _load(
        resolve_base(run, config),
        config,
        dtype,
        revision=config.model.revision,
        quantization=_nf4(config, dtype) if quantized else None,
        device=device,
        attention=attention_for(config.model.attention, packed=packed),
    )
    if quantized:
        _keep_weights_as_they_are(model)
    grow(model, chat)
    _name_control_tokens(model, chat)
    return model.eval()


def packs(run: Run, config: RunConfig, stage: Trained) -> bool:
    """Whether a stage computes its rows packed: as told, or where the model keeps them apart.

    Raises:
        ConfigError: it is told to, and the model does not.
    """
    section = getattr(config, stage)
    wanted = section.packing
    if wanted is False or (wanted == "auto" and config.model.attention == "eager"):
        return False
    shape = _architecture(resolve_base(run, config), config)
    why = why_not_packed(shape)
    if why is not None and wanted is True:
        raise ConfigError(
            f"{stage}.packing is not possible: {why}",
            fix=f"Set {stage}.packing=auto or false: rows are then grouped by length and padded.",
        )
    return why is None


def _architecture(name: str, config: RunConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(
            name, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unreadable(name, Path(name).is_dir(), error) from error


def load_merged(
    path: str | Path,
    config: RunConfig,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Any:
    """A plain model directory or hub id in evaluation mode, nothing grown, nothing quantised."""
    dtype = dtype or compute_dtype(config)
    attention = attention_for(config.model.attention, packed=False)
    return _load(str(path), config, dtype, device=device, attention=attention).eval()


def device_map() -> dict[str, int | str]:
    """The whole model on this process's GPU, or on the CPU where there is none."""
    if not torch.cuda.is_available():
        return {"": "cpu"}
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise BadNodeError(
            f"Process {local_rank} of this node has no GPU: {visible} are visible",
            fix="Start one process a GPU, or look at CUDA_VISIBLE_DEVICES.",
        )
    return {"": local_rank}


def _nf4(config: RunConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4-bit NormalFloat (https://arxiv.org/abs/2305.14314), stored as `dtype`.

    Storage in the compute dtype is what lets FSDP shard the quantised weights like all others.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def _load(
    name: str,
    config: RunConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device: str | None = None,
    attention: str | None = None,
) -> Any:
    """from_pretrained, with its many ways to fail turned into ours."""
    leave_cudnn_out()
    local = Path(name).is_dir()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device} if device else device_map(),
        "use_safetensors": True,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if revision is not None and not local:
        arguments["revision"] = revision
    if attention is not None:
        arguments["attn_implementation"] = attention
    if quantization is not None:
        arguments["quantization_config"] = quantization
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, config) from error
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be loaded with this configuration: {_first_line(error)}",
            fix="Install what is missing, or change model.attention or model.quantization.",
        ) from error
    except (OSError, SafetensorError) as error:
        raise _unreadable(name, local, error) from error
    except ValueError as error:
        raise DataError(
            f"transformers cannot load {name} as a causal language model: {_first_line(error)}",
            fix="Check model.base and model.attention; a model with code of its own needs "
            "model.trust_remote_code.",
        ) from error


def _unreadable(name: str, local: bool, error: Exception) -> MedtrainError:
    if local:
        return DataError(
            f"The model directory {name} cannot be loaded: {_first_line(error)}",
            fix="It must hold config.json and the weights as .safetensors files.",
        )
    return EndpointError(
        f"The model {name} cannot be fetched: {_first_line(error)}",
        fix="Check the name and the network; a gated model needs its licence accepted on the hub "
        "and HF_TOKEN in the environment. A local directory works too.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException, config: RunConfig, stage: str = "") -> ConfigError:
    """The one message for a GPU that is too small for the configuration."""
    section = stage or "sft"
    trained = getattr(config, section)
    return ConfigError(
        f"The GPU has too little memory for {config.model.base}"
        + (f" in {stage}" if stage else "")
        + f": {_first_line(error)}",
        fix=f"Halve {section}.batch_size (now {trained.batch_size}) and double "
        f"{section}.gradient_accumulation (now {trained.gradient_accumulation}), lower "
        f"{section}.max_length (now {trained.max_length}), set "
        f"{section}.activation_checkpointing=true, or use model.quantization=nf4.",
    )


def _keep_weights_as_they_are(model: Any) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights in evaluation mode on a CPU.

    On CPUs with AVX512-BF16, `Linear4bit.forward` packs the weights for a fast kernel when it is
    first called in evaluation mode, and unpacks them when they are saved or trained on. The block
    scales go through bfloat16 on the way and their second quantisation is done anew, so the weights
    that come back are not those that went in, and a resumed run is not the run it resumes.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _name_control_tokens(model: Any, chat: ChatTokenizer) -> None:
    """Let the model's configurations name the tokens that the chat format uses."""
    for named in filter(None, (model.config, model.generation_config)):
        named.pad_token_id = chat.pad_token_id
        named.bos_token_id = chat.tokenizer.bos_token_id or named.bos_token_id
    model.config.eos_token_id = chat.tokenizer.eos_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id = list(chat.stop_token_ids)
