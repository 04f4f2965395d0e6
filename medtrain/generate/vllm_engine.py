"""The engine for big models on a GPU: vLLM (https://docs.vllm.ai), loaded in this process.

token ids and one seed a sample → `LLM.generate`, one batch of the plan a call → token ids → texts.

What its determinism gives: every sample has its own seed, so no sample's random numbers depend on
its neighbours. Scheduling is made deterministic (no engine process of its own), the prefix cache,
which changes the order of sums when it is hit, is off, and a call holds exactly one batch of the
plan; the same plan then gives the same answers on the same kind of GPU with the same vLLM, for any
number of shards and after a resume. Other batches move last bits, unless VLLM_BATCH_INVARIANT=1 is
set (a beta of vLLM's, for some GPUs only). The draws are vLLM's own and not those of engine
`transformers`. A batch is a call, so this engine wants a `batch_size` of hundreds; `auto` is 256.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from medtrain.config import ModelConfig
from medtrain.errors import ConfigError, MedtrainError
from medtrain.generate.engine import Answer, Answered, Finish, ModelSource, Prompt
from medtrain.generate.sampling import Sampling

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer


class VLLMEngine:
    """One vLLM engine on one GPU."""

    def __init__(
        self, model: ModelConfig, source: ModelSource, chat: ChatTokenizer, sampling: Sampling
    ) -> None:
        """Look whether vLLM is there; nothing is loaded yet.

        Raises:
            ConfigError: it is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "engine=vllm needs vLLM, which is not installed",
                fix="pip install 'medtrain[vllm]', or use engine=transformers.",
            )
        self._config, self._source, self._chat = model, source, chat
        self._sampling = sampling
        self._llm: Any = None

    def answer(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Answered]:
        """Answer batch by batch; see `Engine.answer`.

        Raises:
            ConfigError: the model has fewer vocabulary rows than the chat format needs.
            MedtrainError: vLLM cannot load the model.
        """
        # Before the first batch is taken: a death while loading is not the fault of its rows.
        if self._llm is None:
            self._llm = self._load()
        for batch in batches:
            context = int(self._llm.llm_engine.model_config.max_model_len)
            fitting = [prompt for prompt in batch if len(prompt.token_ids) < context]
            for prompt in batch:
                if len(prompt.token_ids) >= context:
                    yield Answered.too_long(prompt, context)
            if fitting:
                yield from self._generate(fitting, context)

    def close(self) -> None:
        """Drop the engine."""
        self._llm = None

    def _load(self) -> Any:
        # Read when vLLM starts its engine: one process, so that scheduling is deterministic.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        try:
            llm = LLM(
                model=self._source.path,
                revision=self._source.revision,
                dtype=self._config.dtype,
                trust_remote_code=self._config.trust_remote_code,
                enable_prefix_caching=False,
                seed=0,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise MedtrainError(
                f"vLLM cannot load {self._source.path}: {str(error).strip().splitlines()[0]}",
                fix="Check that the model fits the GPU, or use engine=transformers.",
            ) from error
        rows = int(llm.llm_engine.model_config.get_vocab_size())
        if rows < self._chat.vocab_rows:
            raise ConfigError(
                f"{self._source.path} has {rows} vocabulary rows and the chat format needs "
                f"{self._chat.vocab_rows}: vLLM loads a base as it is and cannot grow it",
                fix="Answer with this model by engine=transformers.",
            )
        return llm

    def _generate(self, batch: Sequence[Prompt], context: int) -> Iterator[Answered]:
        prompts, parameters = [], []
        for prompt in batch:
            limit = min(self._sampling.max_new_tokens, context - len(prompt.token_ids))
            for seed in prompt.seeds:
                prompts.append({"prompt_token_ids": list(prompt.token_ids)})
                parameters.append(self._parameters(seed, limit))
        outputs = iter(self._llm.generate(prompts, parameters, use_tqdm=False))
        for prompt in batch:
            answers = tuple(self._as_answer(next(outputs).outputs[0]) for _ in prompt.seeds)
            yield Answered(prompt.id, answers)

    def _parameters(self, seed: int, limit: int) -> Any:
        from vllm import SamplingParams

        drawn = {} if self._sampling.greedy else {
            "top_k": self._sampling.top_k or -1,
            "top_p": self._sampling.top_p,
            "seed": seed,
        }  # fmt: skip
        return SamplingParams(
            n=1,
            temperature=self._sampling.temperature,
            max_tokens=limit,
            # The model's own EOS ids are ignored: the chat format's stop tokens hold, no others.
            stop_token_ids=list(self._chat.stop_token_ids),
            ignore_eos=True,
            detokenize=False,
            **drawn,
        )

    def _as_answer(self, output: Any) -> Answer:
        stops = set(self._chat.stop_token_ids)
        token_ids = [token for token in output.token_ids if token not in stops]
        finish: Finish = "stop" if output.finish_reason == "stop" else "length"
        return Answer(self._chat.decode_answer(token_ids), len(token_ids), finish)
