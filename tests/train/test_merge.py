"""The merged model is the trained one, and loads as a plain model."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from medtrain.config import LoraConfig
from medtrain.console import Console
from medtrain.errors import AdapterMismatchError, DataError, MedtrainError
from medtrain.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from medtrain.generate.digest import model_digest
from medtrain.run import Run
from medtrain.train import merge
from medtrain.train.adapter import (
    FACTS_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    add_adapter,
    attach_adapter,
    trainable_parameters,
    write_adapter,
)
from medtrain.train.dpo import train_dpo
from medtrain.train.merge import merge_adapter
from medtrain.train.merged_files import MERGE_RECORD, full_disk_as_oserror
from medtrain.train.model import load_base, load_merged
from medtrain.train.reference import compute_reference
from medtrain.train.sft import train_sft
from tests.tiny import VOCAB_SIZE
from tests.train.conftest import MakeRun, Ready

PROMPT = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture
def adapted(make_run: MakeRun) -> Any:
    """Make a run that has evaluation rows and a random SFT adapter, far from doing nothing."""

    def make(name: str = "run", lora: dict[str, Any] | None = None, **options: Any) -> Ready:
        ready = make_run(name, **{"merge": {"kl_prompts": 2}, **options})
        write_jsonl(ready.run.eval_rows, list(read_jsonl(ready.run.train_rows))[:4])
        base = load_base(ready.run, ready.config, ready.chat, quantized=False, dtype=torch.float32)
        model = add_adapter(base, LoraConfig(r=4, **(lora or {})), ready.chat, seed=0)
        torch.manual_seed(3)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter += 0.1 * torch.randn_like(parameter)
        write_adapter(model, ready.run.adapter("sft"))
        facts = AdapterFacts(
            ready.config.model.base, None, ready.chat.vocab_rows, ready.chat.new_token_ids, "sft"
        )
        write_json(ready.run.adapter("sft") / FACTS_FILE, facts._asdict())
        return ready

    return make


def random_base(source: Path, target: Path, dtype: str = "float32", **changes: Any) -> Path:
    """A base like another one, with some of its configuration changed."""
    shutil.copytree(source, target)
    config = AutoConfig.from_pretrained(source)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(target)
    return target


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(PROMPT).logits.float()
    return found


def trained_model(ready: Ready, stage: Any = "sft") -> Any:
    quantized = ready.config.model.quantization == "nf4"
    base = load_base(ready.run, ready.config, ready.chat, quantized=quantized)
    return attach_adapter(base, ready.run.adapter(stage))


def directory_bytes(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("quantization", "into", "tied", "lora"),
    [
        ("none", "base", True, {}),
        ("none", "base", False, {"rslora": True}),
        ("none", "base", True, {"dora": True, "targets": ["q_proj", "down_proj"]}),
        ("nf4", "dequantized", True, {}),
        ("nf4", "dequantized", False, {"dora": True}),
    ],
)
def test_the_merged_model_computes_what_the_trained_one_does(
    adapted: Any, base_dir: Path, tmp_path: Path,
    quantization: str, into: str, tied: bool, lora: dict[str, Any],
) -> None:  # fmt: skip
    base = base_dir if tied else random_base(base_dir, tmp_path / "b", tie_word_embeddings=False)
    ready = adapted(
        base=base, lora=lora, model={"quantization": quantization},
        merge={"into": into, "kl_prompts": 2},
    )  # fmt: skip
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")

    merged = AutoModelForCausalLM.from_pretrained(ready.run.merged("sft"), dtype=torch.float32)
    difference = (logits(trained_model(ready)) - logits(merged)).abs().max()
    away = (logits(load_base(ready.run, ready.config, ready.chat, quantized=False))
            - logits(merged)).abs().max()  # fmt: skip
    assert difference < 1e-5 < 1e-2 < away
    assert counts["kl_nats"] == 0.0
    assert counts["top1_agreement"] == 1.0
    assert counts["kl_prompts"] == 2
    assert counts["kl_tokens"] > 20
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert merged.config.tie_word_embeddings == tied
    assert not hasattr(merged.config, "quantization_config")


def test_new_tokens_fit_from_the_base_to_the_last_merge(make_run: MakeRun, base_dir: Path) -> None:
    """The classic size mismatch: ChatML's tokens are new to this tokenizer."""
    ready = make_run(
        rows=24, model={"quantization": "none"}, sft={"max_steps": 3}, dpo={"max_steps": 2},
        merge={"kl_prompts": 2},
    )  # fmt: skip
    write_jsonl(ready.run.eval_rows, list(read_jsonl(ready.run.train_rows))[:2])
    rows = ready.chat.vocab_rows
    assert rows == VOCAB_SIZE + 2

    train_sft(ready.run, ready.config, ready.console)
    merge_adapter(ready.run, ready.config, ready.console, "sft")

    tokenizer = AutoTokenizer.from_pretrained(ready.run.merged("sft"))
    merged = AutoModelForCausalLM.from_pretrained(ready.run.merged("sft"))
    assert len(tokenizer) == rows == merged.config.vocab_size
    assert merged.get_input_embeddings().weight.shape == (rows, 64)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in merged.generation_config.eos_token_id
    assert tokenizer.chat_template == ready.chat.tokenizer.chat_template
    answered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is gout dangerous?"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    merged.generate(**answered, max_new_tokens=4, do_sample=False)

    grown = AutoModelForCausalLM.from_pretrained(base_dir)
    grown.resize_token_embeddings(len(tokenizer))
    by_peft = PeftModel.from_pretrained(grown, ready.run.adapter("sft"))
    assert (logits(by_peft) - logits(merged)).abs().max() < 1e-4

    compute_reference(ready.run, ready.config, ready.console)
    train_dpo(ready.run, ready.config, ready.console)
    merge_adapter(ready.run, ready.config, ready.console, "dpo")
    preferred = AutoModelForCausalLM.from_pretrained(ready.run.merged("dpo"))
    assert preferred.config.vocab_size == rows
    assert (logits(preferred) - logits(trained_model(ready, "dpo"))).abs().max() < 1e-5
    assert (logits(preferred) - logits(merged)).abs().max() > 1e-4


def test_merging_again_gives_the_same_bytes(adapted: Any) -> None:
    ready = adapted()
    merge_adapter(ready.run, ready.config, ready.console, "sft")
    before = directory_bytes(ready.run.merged("sft"))
    merge_adapter(ready.run, ready.config, ready.console, "sft")
    assert directory_bytes(ready.run.merged("sft")) == before
    assert sorted(p.name for p in ready.run.trained("sft").iterdir()) == ["adapter", "merged"]


def test_the_record_tells_what_was_merged(adapted: Any) -> None:
    ready = adapted()
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")
    directory = ready.run.merged("sft")
    record = read_json(directory / MERGE_RECORD)
    assert record["into"] == "base"
    assert record["dtype"] == "float32"
    assert record["base"] == "tiny-base", "the name of a directory, not its path"
    assert record["adapter"] == sha256_file(ready.run.adapter("sft") / WEIGHTS_FILE)
    assert record["divergence"] == {k: v for k, v in counts.items() if k in record["divergence"]}
    assert record["files"] == {
        file.name: sha256_file(file) for file in directory.iterdir() if file.name != MERGE_RECORD
    }
    assert model_digest(directory) == record["digest"]
    for file in directory.glob("*.json"):
        assert str(ready.run.root) not in file.read_text()
        assert "quantization_config" not in file.read_text()


def test_a_large_divergence_is_said_with_the_other_choice(adapted: Any) -> None:
    ready = adapted(merge={"kl_prompts": 2, "kl_warn_nats": 1e-9})
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")
    assert 0 < counts["kl_nats"] < 0.1
    warning = next(
        line for line in ready.run.log.read_text().splitlines() if "divergence_large" in line
    )
    assert "merge.into=dequantized" in warning


def test_a_merge_that_lost_the_adapter_is_not_published(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = adapted(model={"quantization": "none"})

    def forgetful(run: Run, config: Any, chat: Any, adapter: Path, dtype: torch.dtype) -> Any:
        return load_base(run, config, chat, quantized=False, dtype=dtype)

    monkeypatch.setattr(merge, "merged_model", forgetful)
    with pytest.raises(MedtrainError, match="nats a token away"):
        merge_adapter(ready.run, ready.config, ready.console, "sft")
    assert [p.name for p in ready.run.trained("sft").iterdir()] == ["adapter"]


def test_what_a_killed_merge_left_is_removed(adapted: Any) -> None:
    ready = adapted(merge={"kl_prompts": 0})
    for leftover in (".tmp-merged-0a", ".tmp-divergence-0b", "merged"):
        (ready.run.trained("sft") / leftover).mkdir()
        (ready.run.trained("sft") / leftover / "half.safetensors").write_bytes(b"\0" * 10)
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")
    assert sorted(p.name for p in ready.run.trained("sft").iterdir()) == ["adapter", "merged"]
    assert not (ready.run.merged("sft") / "half.safetensors").exists()
    assert "kl_nats" not in counts
    assert read_json(ready.run.merged("sft") / MERGE_RECORD)["divergence"] is None


@pytest.mark.parametrize(
    ("dtype", "stored"), [("auto", "BF16"), ("float32", "F32"), ("float16", "F16")]
)
def test_weights_keep_the_bases_dtype_unless_one_is_set(
    adapted: Any, base_dir: Path, tmp_path: Path, dtype: str, stored: str
) -> None:
    base = random_base(base_dir, tmp_path / "b", dtype="bfloat16")
    ready = adapted(base=base, model={"quantization": "none", "dtype": dtype})
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")
    with safe_open(ready.run.merged("sft") / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {stored}  # noqa: SIM118
    assert counts["kl_nats"] < 0.01


def test_shards_are_no_larger_than_asked(adapted: Any) -> None:
    ready = adapted(merge={"kl_prompts": 0, "max_shard_size": "200KB"})
    counts = merge_adapter(ready.run, ready.config, ready.console, "sft")
    files = list(ready.run.merged("sft").glob("*.safetensors"))
    assert len(files) == counts["weight_files"] > 1
    assert max(file.stat().st_size for file in files) < 210_000
    assert load_merged(ready.run.merged("sft"), ready.config).config.vocab_size == VOCAB_SIZE + 2


def test_a_base_with_a_contradictory_generation_config_is_merged(
    adapted: Any, base_dir: Path, tmp_path: Path
) -> None:
    """Some published bases set a temperature without sampling, which cannot be saved again."""
    base = Path(shutil.copytree(base_dir, tmp_path / "b"))
    write_json(base / "generation_config.json", {"temperature": 0.6, "top_p": 0.9})
    ready = adapted(base=base, merge={"kl_prompts": 0})
    merge_adapter(ready.run, ready.config, ready.console, "sft")
    saved = read_json(ready.run.merged("sft") / "generation_config.json")
    assert saved["eos_token_id"] == ready.chat.stop_token_ids
    assert saved["pad_token_id"] == ready.chat.pad_token_id
    assert "temperature" not in saved


def test_a_bases_own_sampling_is_kept(adapted: Any, base_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_dir, tmp_path / "b"))
    write_json(base / "generation_config.json", {"do_sample": True, "temperature": 0.6})
    ready = adapted(base=base, merge={"kl_prompts": 0})
    merge_adapter(ready.run, ready.config, ready.console, "sft")
    saved = read_json(ready.run.merged("sft") / "generation_config.json")
    assert saved["do_sample"]
    assert saved["temperature"] == 0.6


def test_a_missing_or_damaged_adapter_is_one_clear_error(adapted: Any) -> None:
    ready = adapted()
    weights = ready.run.adapter("sft") / WEIGHTS_FILE
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        merge_adapter(ready.run, ready.config, ready.console, "sft")

    weights.write_bytes(whole)
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(DataError, match="no numbers"):
        merge_adapter(ready.run, ready.config, ready.console, "sft")

    with pytest.raises(DataError, match="There is no dpo adapter") as caught:
        merge_adapter(ready.run, ready.config, ready.console, "dpo")
    assert "--until dpo" in caught.value.fix
    assert not ready.run.merged("sft").exists()


@pytest.mark.parametrize("kl_prompts", [0, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 128}, "hidden size|size mismatch"), ({"vocab_size": 640}, "vocabulary")],
)
def test_an_adapter_of_another_base_is_refused(
    adapted: Any, make_run: MakeRun, base_dir: Path, tmp_path: Path,
    kl_prompts: int, changes: dict[str, int], message: str,
) -> None:  # fmt: skip
    other = adapted("other", base=random_base(base_dir, tmp_path / "b", **changes))
    ready = make_run("run", merge={"kl_prompts": kl_prompts})
    write_jsonl(ready.run.eval_rows, list(read_jsonl(ready.run.train_rows))[:2])
    shutil.copytree(other.run.adapter("sft"), ready.run.adapter("sft"))
    with pytest.raises(AdapterMismatchError, match=message) as caught:
        merge_adapter(ready.run, ready.config, ready.console, "sft")
    assert caught.value.exit_code == 65
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) == 2
    assert [p.name for p in ready.run.trained("sft").iterdir()] == ["adapter"]


def test_a_full_disk_is_called_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, full_disk_as_oserror(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), full_disk_as_oserror(tmp_path):
        raise SafetensorError("invalid header")


def test_a_merge_without_evaluation_rows_says_that_it_was_not_compared(adapted: Any) -> None:
    ready = adapted()
    write_jsonl(ready.run.eval_rows, [])
    counts = merge_adapter(ready.run, ready.config, Console(ready.run.log, quiet=True), "sft")
    assert "kl_nats" not in counts
    assert "divergence_unknown" in ready.run.log.read_text()
    assert json.loads((ready.run.merged("sft") / MERGE_RECORD).read_text())["divergence"] is None


@pytest.mark.parametrize(
    ("parameters", "free_gib", "device"),
    [(8e9, 79, None), (8e9, 16, "cpu"), (None, 79, "cpu"), (1e9, 2.4, None), (1e9, 2.3, "cpu")],
)
def test_the_base_is_merged_on_the_gpu_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, parameters: float | None, free_gib: float, device: str | None
) -> None:
    free = int(free_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
    assert merge._device_for(parameters, torch.bfloat16) == device
