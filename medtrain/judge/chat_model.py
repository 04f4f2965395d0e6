"""A chat model loaded with transformers: message lists in, greedy replies out.

messages → chat template → left-padded batch → greedy generation → text up to the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medtrain.config import JudgeConfig
from medtrain.data.examples import Message
from medtrain.errors import EndpointError
from medtrain.judge.protocol import RowFailedError
from medtrain.judge.replies import RawReply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ChatModel:
    """A causal language model with a chat template, answering message lists."""

    def __init__(self, config: JudgeConfig, dtype: str) -> None:
        """Load it.

        Raises:
            EndpointError: it cannot be read or fetched, or it has no chat template.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from medtrain.attention.kernels import leave_cudnn_out

        leave_cudnn_out()
        on_gpu = torch.cuda.is_available()
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                config.model, padding_side="left"
            )
            self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                config.model,
                dtype=getattr(torch, dtype),
                device_map="auto" if on_gpu else None,
                use_safetensors=True,
            ).eval()
        except (OSError, ValueError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise EndpointError(
                f"The judge model {config.model!r} cannot be loaded: {first_line}",
                fix="judge.model must be a directory or hub id of a chat model with safetensors "
                "weights; a hub id needs a network, and a gated one HF_TOKEN.",
            ) from error
        if not self._tokenizer.chat_template:
            raise EndpointError(
                f"The judge model {config.model!r} has no chat template",
                fix="Use a model that was trained to chat (usually named -Instruct or -chat).",
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_new_tokens = config.max_tokens
        self._max_positions = getattr(self._model.config, "max_position_embeddings", None)

    @property
    def control_tokens(self) -> list[str]:
        """What the tokenizer would turn into one of its special tokens, longest first."""
        special = set(self._tokenizer.all_special_tokens) | {
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special
        }
        return sorted(special, key=lambda token: (-len(token), token))

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[RawReply | RowFailedError]:
        """One greedy reply for each conversation; RowFailedError in the place of a too long one."""
        prompts = [self._prompt_ids(conversation) for conversation in conversations]
        limit = self._max_positions
        fitting = [
            row
            for row, ids in enumerate(prompts)
            if limit is None or len(ids) + self._max_new_tokens <= limit
        ]
        replies: list[RawReply | RowFailedError] = [
            RowFailedError(f"{len(ids)} tokens do not fit the judge model") for ids in prompts
        ]
        if fitting:
            generated = self._generate([prompts[row] for row in fitting])
            for row, reply in zip(fitting, generated, strict=True):
                replies[row] = reply
        return replies

    def _generate(self, prompts: list[list[int]]) -> list[RawReply]:
        import torch

        batch = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        batch = batch.to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        replies = output[:, batch["input_ids"].shape[1] :]  # (batch, new tokens)
        return [
            self._raw_reply(ids.tolist(), len(prompt))
            for ids, prompt in zip(replies, prompts, strict=True)
        ]

    def _raw_reply(self, ids: list[int], prompt_tokens: int) -> RawReply:
        ends = self._model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = self._tokenizer.decode(ids[:length], skip_special_tokens=True)
        return RawReply(str(text), prompt_tokens + length, cut=length >= self._max_new_tokens)

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        text = self._render(list(messages))
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message]) -> str:
        """The chat template's text; without a system turn where the template refuses one."""
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError:
            system, user, *rest = messages
            merged = Message(role="user", content=f"{system['content']}\n\n{user['content']}")
            rendered = self._tokenizer.apply_chat_template(
                [merged, *rest], tokenize=False, add_generation_prompt=True
            )
        return str(rendered)
