"""What an engine is, and which one a configuration asks for.

batches of prompts → engine → the answers of every prompt, as they are finished. An engine loads its
model, or looks for its endpoint, when answers are asked for and not before: a stage with nothing
left to do costs nothing. It does so before it takes a batch: what is taken is in flight, and blamed
where its process dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from medtrain.config import EngineConfig, ModelConfig
from medtrain.console import Console
from medtrain.data.examples import Message
from medtrain.generate.sampling import Sampling

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered."""

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """The messages in the chat format, up to where the answer begins."""
    seeds: tuple[int, ...]
    """One for every answer wanted."""


class Answer(NamedTuple):
    """One answer."""

    text: str
    """Without the end token, and without white space at its ends."""
    tokens: int
    """Its length, the end token not counted."""
    finish: Finish
    """Whether the model ended it (`stop`), or the limit did (`length`)."""


class Answered(NamedTuple):
    """What became of one prompt."""

    id: str
    answers: tuple[Answer, ...]
    """In the order of the prompt's seeds; none where it failed."""
    error: str = ""
    """Why this prompt has no answer although others do; never its text."""

    @classmethod
    def too_long(cls, prompt: Prompt, context: int) -> Answered:
        """The prompt leaves no room for an answer."""
        return cls(
            prompt.id,
            (),
            f"the prompt has {len(prompt.token_ids)} tokens, and the model's context ends at "
            f"{context}",
        )


class Engine(Protocol):
    """Answers prompts."""

    def answer(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Answered]:
        """Answer all prompts of all batches, each once, in any order.

        Raises:
            MedtrainError: it cannot go on with any prompt; what was yielded stands.
        """

    def close(self) -> None:
        """Let go of the model's memory, or of the connections."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model that answers, in the forms in which engines want it."""

    path: str
    """Directory or hub id: what vLLM loads, and the name an endpoint may know it by."""
    digest: str
    """Tells it from other models: part of every plan."""
    load: Callable[[], Any]
    """Makes the transformers model. The caller's, since a base must first be grown to the chat
    format's tokens."""
    name: str = ""
    """A short name an endpoint may serve it under, such as `sft`."""
    revision: str | None = None
    """Of a hub id."""


def make_engine(
    section: EngineConfig,
    model: ModelConfig,
    source: ModelSource,
    chat: ChatTokenizer,
    sampling: Sampling,
    console: Console | None = None,
    in_all: int | None = None,
) -> Engine:
    """The engine that a section of the configuration asks for; nothing is loaded yet.

    Args:
        section: names the engine, and how it decodes.
        model: how models are loaded.
        source: the model that answers.
        chat: its chat format.
        sampling: how to draw.
        console: is told how answers are decoded; None tells nobody.
        in_all: prompts that the whole stage has; None where nobody knows.

    Raises:
        ConfigError: engine `vllm` is asked for and not installed.
    """
    if section.engine == "openai":
        from medtrain.generate.openai_engine import OpenAIEngine

        return OpenAIEngine(section, source, chat, sampling)
    if section.engine == "vllm":
        from medtrain.generate.vllm_engine import VLLMEngine

        return VLLMEngine(model, source, chat, sampling)
    from medtrain.generate.transformers_engine import TransformersEngine

    return TransformersEngine(
        source,
        chat,
        sampling,
        console=console,
        batch_size=section.batch_size,
        in_all=in_all,
        way=section.decoding,
    )
