from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from medtrain.config import GenerateConfig
from medtrain.data.chat import ChatTokenizer
from medtrain.errors import ConfigError, EndpointError
from medtrain.generate.engine import Answered, ModelSource, Prompt
from medtrain.generate.openai_engine import GIVE_UP_AFTER, OpenAIEngine
from medtrain.generate.sampling import Sampling
from tests.generate.endpoint import HANG_UP, Body, Reply, echo, fails, says, serving
from tests.generate.models import load_chat, prompt_of

SAMPLED = Sampling(0.7, 50, 0.9, max_new_tokens=16, num_samples=2)
GREEDY = Sampling(0, 50, 0.9, max_new_tokens=16)


@pytest.fixture(scope="module")
def chat(base_dir: Path) -> ChatTokenizer:
    return load_chat(base_dir)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def never_loaded() -> Any:
    raise AssertionError("an endpoint's model is not loaded here")


SOURCE = ModelSource("models/tiny", "digest", never_loaded, name="sft")


def engine(url: str, chat: ChatTokenizer, sampling: Sampling = SAMPLED, **options: Any) -> Any:
    concurrency = options.pop("concurrency", 4)
    section = GenerateConfig(engine="openai", base_url=url, batch_size=concurrency)
    options = {"timeout_s": 20.0, "max_retries": 2, **options}
    return OpenAIEngine(section, SOURCE, chat, sampling, **options)


def prompts(chat: ChatTokenizer, count: int) -> list[Prompt]:
    return [prompt_of(chat, f"r{i}", f"Question {i}?", i, 2**40 + 100 + i) for i in range(count)]


def ask(url: str, chat: ChatTokenizer, count: int = 3, **options: Any) -> dict[str, Answered]:
    batches = [prompts(chat, count)[i : i + 2] for i in range(0, count, 2)]
    return {done.id: done for done in engine(url, chat, **options).answer(batches)}


def test_every_sample_is_one_request_with_its_own_seed(chat: ChatTokenizer) -> None:
    with serving() as server:
        done = ask(server.url, chat, count=5)
    assert {i: [a.text for a in done[i].answers] for i in done} == {
        f"r{i}": [f"Question {i}? / {i}", f"Question {i}? / {100 + i}"] for i in range(5)
    }
    request = server.requests[0]
    assert request["model"] == "models/tiny"
    assert (request["temperature"], request["top_p"], request["top_k"]) == (0.7, 0.9, 50)
    assert request["max_tokens"] == 16
    assert len(server.requests) == 10


def test_greedy_asks_for_no_sampling(chat: ChatTokenizer) -> None:
    with serving() as server:
        ask(server.url, chat, sampling=GREEDY)
    assert server.requests[0]["temperature"] == 0
    assert not {"top_k", "top_p", "seed"} & set(server.requests[0])


def test_answers_are_trimmed_counted_and_marked(chat: ChatTokenizer) -> None:
    replies = {"Question 0?": says("  Yes.\n"), "Question 1?": says("cut", "length"),
               "Question 2?": says(None)}  # fmt: skip
    with serving(lambda body, n: replies[body["messages"][-1]["content"]]) as server:
        done = ask(server.url, chat)
    assert [a.text for a in done["r0"].answers] == ["Yes.", "Yes."]
    assert done["r0"].answers[0].tokens == len(chat.tokenizer("Yes.")["input_ids"])
    assert [done[f"r{i}"].answers[0].finish for i in range(3)] == ["stop", "length", "stop"]
    assert done["r2"].answers[0] == ("", 0, "stop")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_costs_nothing(chat: ChatTokenizer, status: int) -> None:
    def flaky(body: Body, asked_before: int) -> Reply:
        return fails(status) if asked_before == 0 else echo(body, asked_before)

    with serving(flaky) as server:
        done = ask(server.url, chat)
    assert not any(d.error for d in done.values())
    assert len(server.requests) == 2 * 3 * 2


def test_retry_after_is_waited_for(chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float, *args: Any) -> None:
        slept.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)

    def busy(body: Body, asked_before: int) -> Reply:
        return Reply(429, {}, {"Retry-After": "7"}) if asked_before == 0 else says("ok")

    with serving(busy) as server:
        done = ask(server.url, chat, count=1)
    assert slept == [7.0, 7.0]
    assert not done["r0"].error


def test_a_row_that_always_fails_leaves_the_others_alone(chat: ChatTokenizer) -> None:
    def poisoned(body: Body, asked_before: int) -> Reply:
        bad = body["messages"][-1]["content"] == "Question 1?"
        return fails(500, "worker died") if bad else says("fine")

    with serving(poisoned) as server:
        done = ask(server.url, chat, count=4)
    assert "HTTP 500" in done["r1"].error
    assert "worker died" in done["r1"].error
    assert [bool(done[f"r{i}"].answers) for i in range(4)] == [True, False, True, True]


def test_a_row_that_times_out_leaves_the_others_alone(chat: ChatTokenizer) -> None:
    def slow(body: Body, asked_before: int) -> Reply:
        reply = says("fine")
        reply.delay_s = 30 if body["messages"][-1]["content"] == "Question 1?" else 0
        return reply

    with serving(slow) as server:
        done = ask(server.url, chat, timeout_s=3, max_retries=0)
    assert "3 s" in done["r1"].error
    assert done["r0"].answers
    assert done["r2"].answers


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b"{ not json"),
        Reply(body={"error": "model is loading"}),
        Reply(body={"choices": []}),
        Reply(body=[1, 2]),
        Reply(body={"choices": [{"finish_reason": "stop"}]}),
        says("secret", "content_filter"),
    ],
    ids=["html", "broken json", "an error with status 200", "no choice", "a list", "no message",
         "filtered"],
)  # fmt: skip
def test_garbage_fails_the_row_and_not_the_stage(chat: ChatTokenizer, reply: Reply) -> None:
    with serving(lambda body, n: reply) as server:
        done = ask(server.url, chat, count=2)
    assert all("endpoint" in d.error for d in done.values())


def test_row_after_row_failing_is_the_endpoints_fault(chat: ChatTokenizer) -> None:
    with serving(lambda body, n: fails(400, "no")) as server:
        finished = []
        with pytest.raises(EndpointError, match=f"{GIVE_UP_AFTER} prompts in succession"):
            finished.extend(engine(server.url, chat).answer([prompts(chat, 60)]))
    assert len(server.requests) < 60


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (fails(401, "Incorrect API key: sk-1***9"), "refused the key"),
        (fails(403), "refused the key"),
        (fails(404), "knows no model"),
        (fails(429), "too many requests"),
        (fails(422, "Unexpected keys in the request: {'top_k'}"), "does not take top_k"),
    ],
    ids=["401", "403", "404", "429", "top_k"],
)
def test_what_concerns_every_row_ends_the_stage_with_one_message(
    chat: ChatTokenizer, reply: Reply, message: str
) -> None:
    with serving(lambda body, n: reply) as server, pytest.raises(EndpointError) as caught:
        ask(server.url, chat)
    assert message in caught.value.message
    assert "sk-1" not in str(caught.value)
    assert caught.value.fix
    assert caught.value.exit_code == 69


def test_nobody_listening_is_one_clear_message(chat: ChatTokenizer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match="No connection to http") as caught:
        ask(url, chat, max_retries=0)
    assert "base_url" in caught.value.fix


def test_an_endpoint_that_dies_keeps_what_was_finished(chat: ChatTokenizer) -> None:
    def dying(body: Body, asked_before: int) -> Reply:
        return echo(body, 0) if body["messages"][-1]["content"] == "Question 0?" else HANG_UP

    with serving(dying) as server:
        answers = engine(server.url, chat, concurrency=1, max_retries=0).answer([prompts(chat, 3)])
        assert next(answers).answers
        with pytest.raises(EndpointError, match="No connection"):
            list(answers)


def test_as_many_prompts_are_in_flight_as_the_batch_size_says(chat: ChatTokenizer) -> None:
    def slow(body: Body, asked_before: int) -> Reply:
        deadline = time.monotonic() + 10
        while server.most_at_once < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return Reply(body=says("ok").body, delay_s=0.05)  # a fourth would still be seen

    with serving(slow) as server:
        ask(server.url, chat, count=12, concurrency=3)
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("models", "asked_for"),
    [
        (["other", "models/tiny"], "models/tiny"),
        (["base", "sft"], "sft"),
        ([str(Path("models/tiny").resolve())], str(Path("models/tiny").resolve())),
        ([], "models/tiny"),
        (fails(404), "models/tiny"),
        (fails(500), "models/tiny"),
    ],
    ids=["by path", "by name", "by absolute path", "empty list", "no list", "broken list"],
)
def test_the_model_is_asked_for_by_the_name_it_is_served_under(
    chat: ChatTokenizer, models: Reply | list[str], asked_for: str
) -> None:
    with serving(models=models) as server:
        ask(server.url, chat, count=1)
    assert server.requests[0]["model"] == asked_for


def test_another_model_does_not_answer_in_its_place(chat: ChatTokenizer) -> None:
    with serving(models=["dpo"]) as server:
        with pytest.raises(EndpointError, match="serves dpo, and not models/tiny") as caught:
            ask(server.url, chat)
        assert len(server.requests) == 1, "one question, and none of the prompts"
        assert "Question" not in str(server.requests)
    assert "'sft'" in caught.value.fix


def test_a_server_that_checks_names_need_not_list_the_model(chat: ChatTokenizer) -> None:
    """As transformers serve: it lists the hub cache, and loads what it is asked for."""

    def checking(body: Body, asked_before: int) -> Reply:
        return echo(body, 0) if body["model"] == "models/tiny" else fails(400, "pinned")

    with serving(checking, models=["org/something-cached"]) as server:
        done = ask(server.url, chat, count=1)
    assert done["r0"].answers


@pytest.mark.parametrize("body", [b"<html/>", b"{", b'{"data": 3}', b"[]"])
def test_a_server_that_speaks_something_else_is_told_apart(
    chat: ChatTokenizer, body: bytes
) -> None:
    kind = "text/html" if body.startswith(b"<") else "application/json"
    with (
        serving(models=Reply(body=body, headers={"Content-Type": kind})) as server,
        pytest.raises(EndpointError, match="no OpenAI-compatible endpoint"),
    ):
        ask(server.url, chat)


def test_the_key_comes_from_the_environment(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "word-of-mine")
    with serving() as server:
        ask(server.url, chat)
    assert server.keys == {"Bearer word-of-mine"}


def test_a_key_the_server_quotes_is_not_repeated(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "word-of-mine")
    with serving(lambda body, n: fails(400, "bad word-of-mine")) as server:
        done = ask(server.url, chat, count=1)
    assert "word-of-mine" not in done["r0"].error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "node017", "[::1]"])
def test_a_server_of_ones_own_needs_no_key(chat: ChatTokenizer, host: str) -> None:
    engine(f"http://{host}:8000/v1", chat)


def test_a_far_endpoint_without_a_key_is_an_error_before_any_request(chat: ChatTokenizer) -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set") as caught:
        engine("https://me:secret@api.example.com/v1?token=secret", chat)
    assert "secret" not in str(caught.value)


def test_nothing_to_do_asks_nothing(chat: ChatTokenizer) -> None:
    with serving() as server:
        assert list(engine(server.url, chat).answer([])) == []
    assert server.requests == []
