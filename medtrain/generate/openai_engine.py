"""The engine that computes nothing: an OpenAI-compatible endpoint that serves the model.

which model it serves → messages and a seed, one request a sample, `batch_size` prompts at a time →
texts. The client repeats what may work later (408, 409, 429, 5xx, lost connections, time-outs) with
growing, jittered pauses, and waits as long as Retry-After says. What then still fails is either the
row's failure, and the others go on, or the endpoint's, and the stage ends; finished rows are kept.

What its determinism gives: a finished answer is kept and never asked for again. Whether the same
seed gives the same answer is the server's affair; most only try. The chat format is the server's
too: it applies the template saved with the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import openai

from medtrain.config import EngineConfig
from medtrain.errors import EndpointError
from medtrain.generate.endpoint import KEPT, Endpoint, RowFailedError
from medtrain.generate.engine import Answer, Answered, Finish, ModelSource, Prompt
from medtrain.generate.sampling import Sampling

if TYPE_CHECKING:
    from medtrain.data.chat import ChatTokenizer

REQUEST_TIMEOUT_S = 600.0
MAX_RETRIES = 5
GIVE_UP_AFTER = 20
"""This many failed rows in succession are no longer the rows' fault."""

_SEED_MASK = 0x7FFFFFFF  # some servers keep seeds in 32 bits


class OpenAIEngine:
    """Asks an endpoint, `batch_size` prompts at a time."""

    def __init__(
        self,
        section: EngineConfig,
        source: ModelSource,
        chat: ChatTokenizer,
        sampling: Sampling,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        """Read the key; no request yet.

        Raises:
            ConfigError: the endpoint is not a local one and there is no key for it.
        """
        self._endpoint = Endpoint.of(section, timeout_s, max_retries)
        self._concurrency = section.prompts_together
        self._source, self._chat, self._sampling = source, chat, sampling

    def answer(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Answered]:
        """Answer all prompts, in the order in which replies come; see `Engine.answer`.

        Raises:
            EndpointError: it cannot be reached, refuses, serves another model, or failed on row
                after row.
        """
        prompts = (prompt for batch in batches for prompt in batch)
        loop = asyncio.new_event_loop()
        client = self._endpoint.client()
        pending: set[asyncio.Task[Answered]] = set()
        try:
            model = loop.run_until_complete(self._endpoint.served_name(client, self._source))
            asked = (self._answer_one(client, model, prompt) for prompt in prompts)
            yield from self._giving_up(_window(loop, asked, pending, self._concurrency))
        finally:
            loop.run_until_complete(_wind_up(client, pending))
            loop.close()

    def close(self) -> None:
        """Nothing to let go of: connections end with `answer`."""

    def _giving_up(self, finished: Iterator[Answered]) -> Iterator[Answered]:
        failed = 0
        for done in finished:
            yield done
            failed = failed + 1 if done.error else 0
            if failed >= GIVE_UP_AFTER:
                raise EndpointError(
                    f"{self._endpoint.url} failed on {failed} prompts in succession, at last: "
                    f"{done.error}",
                    fix=f"Look at the server's log; {KEPT}",
                )

    async def _answer_one(self, client: openai.AsyncOpenAI, model: str, prompt: Prompt) -> Answered:
        try:
            answers = [await self._ask(client, model, prompt, seed) for seed in prompt.seeds]
        except RowFailedError as failure:
            return Answered(prompt.id, (), str(failure))
        return Answered(prompt.id, tuple(answers))

    async def _ask(
        self, client: openai.AsyncOpenAI, model: str, prompt: Prompt, seed: int
    ) -> Answer:
        sampling = self._sampling
        top_k = 0 if sampling.greedy else sampling.top_k
        options: dict[str, Any] = {"temperature": sampling.temperature}
        if not sampling.greedy:
            options |= {"top_p": sampling.top_p, "seed": seed & _SEED_MASK}
        if top_k:
            options["extra_body"] = {"top_k": top_k}
        messages: list[Any] = [dict(message) for message in prompt.messages]
        try:
            completion = await client.chat.completions.create(
                model=model, messages=messages, max_tokens=sampling.max_new_tokens, **options
            )
        except openai.OpenAIError as error:
            raise self._endpoint.explained(error, model, top_k) from error
        except ValueError as error:  # a body that says it is JSON and is not
            raise RowFailedError("the endpoint's reply is not JSON") from error
        return self._as_answer(completion)

    def _as_answer(self, completion: Any) -> Answer:
        choices = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if not choices or message is None:
            raise RowFailedError("the endpoint's reply is no chat completion")
        if choices[0].finish_reason == "content_filter":
            raise RowFailedError("the endpoint's content filter withheld the answer")
        text = (message.content or "").strip()
        tokens = self._chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        finish: Finish = "length" if choices[0].finish_reason == "length" else "stop"
        return Answer(text, len(tokens), finish)


def _window(
    loop: asyncio.AbstractEventLoop,
    asked: Iterator[Coroutine[Any, Any, Answered]],
    pending: set[asyncio.Task[Answered]],
    width: int,
) -> Iterator[Answered]:
    """Prompts in flight, `width` at a time; the loop runs while the caller waits for one."""
    while True:
        while len(pending) < width and (one := next(asked, None)) is not None:
            pending.add(loop.create_task(one))
        if not pending:
            return
        finished, _ = loop.run_until_complete(
            asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        )
        pending -= finished
        # What succeeded in the same moment is handed over before an error ends the stage.
        broken = [task for task in finished if task.exception() is not None]
        yield from (task.result() for task in finished if task not in broken)
        for task in broken:
            task.result()


async def _wind_up(client: openai.AsyncOpenAI, pending: set[asyncio.Task[Answered]]) -> None:
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.close()
