"""`generate:`, `judge:`, `evaluate:`, `report:` answers, verdicts on them, and what is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medtrain.config.base import Section

AUTO_PROMPTS = 16
"""Prompts of a batch where `batch_size` is `auto`: shards are never smaller than a batch."""
AUTO_VLLM_PROMPTS = 256
"""The same with vLLM, to which a batch is a call."""
_RESERVED_VARIANTS = {"base", "sft", "dpo", "judge", "scores.json", "rows.jsonl"}


class EngineConfig(Section):
    """Who computes answers."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """`transformers` and `vllm` load the model here; `openai` asks an endpoint that serves it."""
    base_url: str | None = None
    """The endpoint of engine `openai`, such as http://127.0.0.1:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Prompts answered at a time; at an endpoint, requests in flight. `auto`: up to 128 answers
    by a GPU's memory, 16 prompts on a CPU, 256 with vLLM, 16 requests at an endpoint. Where memory
    runs out, it goes on with half as many."""
    decoding: Literal["auto", "batches"] = "auto"
    """Of engine `transformers`. `auto`: on a GPU all rows go on at once, step by step by a CUDA
    graph, where the model allows it. `batches`: one batch after the other, as on a CPU."""

    @property
    def prompts_together(self) -> int:
        """Prompts that a plan lays together in a batch; at an endpoint, requests in flight.

        The same on every machine, whatever `auto` finds there: a plan is made on one machine and
        computed on others.
        """
        if self.batch_size != "auto":
            return self.batch_size
        return AUTO_VLLM_PROMPTS if self.engine == "vllm" else AUTO_PROMPTS


class GenerateConfig(EngineConfig):
    """Candidate answers for the preference prompts."""

    num_samples: int = Field(2, ge=2)
    """Answers a prompt."""
    temperature: float = Field(0.7, ge=0)
    """0 is greedy."""
    top_k: int = Field(50, ge=0)
    """Sample among this many most likely tokens; 0 for all."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample among the most likely tokens that hold this share of the probability."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    num_shards: int = Field(1, ge=1)
    """Into how many pieces of work the prompts are cut; does not change a result."""


class JudgeConfig(Section):
    """Who compares and rates answers, and how."""

    kind: Literal["openai", "model", "rules"] = "openai"
    """`openai`: any OpenAI-compatible endpoint. `model`: a local or hub chat model. `rules`: an
    offline stand-in for demonstrations and tests, no judge of medicine."""
    model: str = "gpt-4o-mini"
    """Name at the endpoint, or hub id or directory of kind `model`."""
    base_url: str | None = None
    """The endpoint; null for OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    orders: Literal["both", "single"] = "both"
    """`both`: every pair is shown in both orders, and counts only if the verdicts agree."""
    temperature: float = Field(0.0, ge=0)
    """Of the judge's own sampling, kind `openai`; kind `model` is greedy."""
    max_tokens: int = Field(512, ge=16)
    """Longest verdict, in tokens."""
    concurrency: int = Field(8, ge=1)
    """Requests in flight."""
    timeout_s: float = Field(60.0, gt=0)
    """Of one request."""
    max_retries: int = Field(5, ge=0)
    """Of one request, with growing pauses. Then a time-out fails its row, and a refused connection
    ends the stage; what is finished is kept."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1)
    """More failed rows than this share end the stage with an error."""
    rating_scale: Annotated[int, Field(ge=2)] = 5
    """The single rating of an answer runs from 1 to this."""
    num_shards: int = Field(1, ge=1)
    """Into how many pieces of work the pairs are cut; does not change a result."""


class VariantConfig(Section):
    """A model to evaluate besides the run's own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Its name in the report."""
    path: str
    """A model directory or hub id."""
    revision: str | None = None
    """Of a hub id."""


class EvaluateConfig(EngineConfig):
    """Which models answer the evaluation split, and what is measured."""

    variants: list[Literal["base", "sft", "dpo"] | VariantConfig] = Field(
        ["base", "sft", "dpo"], min_length=1
    )
    """Models in the order of the report; the first is the one others are compared with."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy: the same answers every time."""
    top_k: int = Field(0, ge=0)
    """As in `generate`; used when `temperature` is not 0."""
    top_p: float = Field(1.0, gt=0, le=1)
    """As in `generate`; used when `temperature` is not 0."""
    held_out_loss: bool = True
    """Measure the loss on the reference answers (engine `transformers` only)."""
    bertscore_model: str | None = None
    """A local encoder directory for BERTScore; null skips it."""
    bertscore_layer: int | None = Field(None, ge=1)
    """Layer of that encoder; null takes the one bert-score recommends for a directory of that name,
    or the last."""
    rubric: bool = True
    """Have the judge grade correctness, clarity, safety and empathy, 1 to 10."""
    rating: bool = True
    """Have the judge give one rating, 1 to `judge.rating_scale`."""
    pairwise: bool = True
    """Have the judge compare each variant with the one before it, and the last with the first."""
    max_judged: int | None = Field(None, ge=1)
    """Judge at most this many evaluation rows; null for all."""
    num_shards: int = Field(1, ge=1)
    """Into how many pieces of work the questions are cut; does not change a result."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> EvaluateConfig:
        names = [v if isinstance(v, str) else v.name for v in self.variants]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise ValueError(f"variants named twice: {', '.join(doubled)}")
        reserved = [
            v.name
            for v in self.variants
            if isinstance(v, VariantConfig) and v.name in _RESERVED_VARIANTS
        ]
        if reserved:
            raise ValueError(f"variant names that medtrain uses itself: {', '.join(reserved)}")
        return self


class ReportConfig(Section):
    """What the report shows."""

    title: str | None = None
    """Heading; null takes the run's name."""
    max_examples: int = Field(200, ge=0)
    """Questions shown side by side in the HTML page."""
