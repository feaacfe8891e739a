"""Judges: the arithmetic of P(yes), a server that misbehaves in every way, and an account that never hides it."""

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import (
    Ask,
    Canary,
    Drift,
    FakeJudge,
    JudgeConfig,
    accounted,
    canary,
    loading,
    only_model,
    open_judge,
)
from rlhf_img.judges.openai import OpenAIJudge
from rlhf_img.judges.protocol import Usage, p_yes_from_logprobs, verdict_of

IMAGE = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
ASK = Ask(image=IMAGE, question="Is there a cat in the image?")


def completion(content="Yes", top=None, **choice):
    """A chat completion as OpenAI's interface defines it; `top` are the first token's alternatives."""
    if top is not None:
        listed = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top.items()]
        choice["logprobs"] = {"content": [{"token": "Yes", "logprob": -0.1, "bytes": None, "top_logprobs": listed}]}
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"} | choice]
    return {"id": "x", "object": "chat.completion", "choices": choices,
            "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}}  # fmt: skip


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, reply: Callable[["Handler", dict, int], object]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.headers = reply, [], []

    def handle_error(self, request, client_address) -> None:
        """A client that gives up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        answer = self.server.reply(self, body, len(self.server.requests))
        if answer is not None:
            self.send(200, json.dumps(answer).encode())

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(reply: Callable[[Handler, dict, int], object]) -> Iterator[Server]:
    with Server(reply) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def judge_at(server: Server, **settings) -> OpenAIJudge:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    quick = {"attempts": 1, "timeout_s": 3.0, "connect_s": 3.0}
    return OpenAIJudge(JudgeConfig(url=url, model="eye-1", **quick | settings))


@pytest.mark.parametrize(
    "text, verdict",
    [(" YES", "yes"), ("Yes.", "yes"), ("**No**", "no"), ("▁no", "no"), ("Ġyes", "yes"), ("yesterday", None),
     ("", None), ("Not", None), ("yes and no", None)],
)  # fmt: skip
def test_what_counts_as_yes_and_no(text, verdict):
    assert verdict_of(text) == verdict


def test_p_yes_sums_all_ways_to_write_it_and_renormalises():
    tokens = [("Yes", 0.30), (" yes", 0.20), ("YES", 0.10), ("No", 0.15), (" no", 0.05), ("Maybe", 0.20)]
    answer = p_yes_from_logprobs((t, math.log(p)) for t, p in tokens)
    assert answer.p_yes == pytest.approx(0.6 / 0.8)
    assert p_yes_from_logprobs([("No", math.log(0.9))]).p_yes == 0
    assert p_yes_from_logprobs([("Yes", 0.0), ("No", -9999.0)]).p_yes == 1


@pytest.mark.parametrize("tokens", [[], [("The", 0.0)], [("The", -0.05), ("Yes", math.log(0.04)), ("No", -9.0)]])
def test_without_mass_on_yes_or_no_there_is_no_p_yes(tokens):
    answer = p_yes_from_logprobs(tokens)
    assert answer.p_yes is None and "neither" in answer.reason


def test_the_request_is_the_wire_format_with_the_image_first_and_the_question_last(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda h, body, n: completion(top={"Yes": 0.6, "No": 0.2})) as server:
        judge = judge_at(server, api_key_env="MY_KEY")
        (answer,) = judge.ask([ASK])
    (body,) = server.requests
    image, text = body["messages"][0]["content"]
    assert image["type"] == "image_url" and image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"].startswith(ASK.question)
    assert (body["model"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == ("eye-1", True, 20, 1)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret" and "sk-secret" not in judge.id
    assert answer.p_yes == pytest.approx(0.75) and answer.seconds > 0
    assert (judge.usage.calls, judge.usage.failures, judge.usage.prompt_tokens) == (1, 0, 7)


def test_a_conversation_asks_for_json_of_the_schema():
    schema = {"type": "object", "properties": {}}
    replies = [completion('{"a": 1}'), completion('{"a"', finish_reason="length")]
    with serving(lambda h, body, n: replies[n - 1]) as server:
        judge = judge_at(server, concurrency=1)
        whole, cut = judge.chat([[{"role": "user", "content": "hi"}]] * 2, schema)
    expected = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    assert server.requests[0]["response_format"] == expected
    assert whole.text == '{"a": 1}' and cut.text is None and "max_tokens" in cut.reason


def test_votes_are_the_share_of_yes_among_samples_with_different_seeds():
    said = ["Yes", "no", "yes.", "What?"]
    with serving(lambda h, body, n: completion(said[body["seed"]])) as server:
        judge = judge_at(server, votes=4)
        (answer,) = judge.ask([ASK])
    assert answer.p_yes == pytest.approx(2 / 3) and "votes4" in judge.id
    with serving(lambda h, body, n: completion("What?" if body["seed"] else "Yes")) as server:
        (answer,) = judge_at(server, votes=4).ask([ASK])
    assert answer.p_yes is None and "neither" in answer.reason


def drip(handler: Handler, body: dict, n: int) -> None:
    content = json.dumps(completion(top={"Yes": 0.9})).encode()
    handler.send(200, b"", len(content))
    for byte in content:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


FAULTS = {
    "500": (lambda h, b, n: h.send(500, b"boom"), "HTTP 500: boom"),
    "400": (lambda h, b, n: h.send(400, b"no such model"), "no such model"),
    "hang": (lambda h, b, n: time.sleep(0.8), "within 0.4 s"),
    "drip": (drip, "within 0.4 s"),
    "disconnect": (lambda h, b, n: h.connection.close(), "Error"),
    "cut off in transit": (lambda h, b, n: h.send(200, b'{"choices": [', 500), "Error"),
    "half-written JSON": (lambda h, b, n: h.send(200, b'{"choices": [{"mess'), "no chat completion"),
    "no JSON": (lambda h, b, n: h.send(200, b"<html>"), "no chat completion"),
    "wrong schema": (lambda h, b, n: {"choices": [{"text": "Yes"}]}, "no chat completion: choices.0.message"),
    "no choice": (lambda h, b, n: {"choices": []}, "no chat completion: choices"),
    "two choices": (lambda h, b, n: {"choices": completion()["choices"] * 2}, "no chat completion: choices"),
    "no logprobs": (lambda h, b, n: completion("Yes"), "votes"),
    "no tokens": (lambda h, b, n: completion(logprobs={"content": []}), "votes"),
    "NaN": (lambda h, b, n: completion(logprobs={"content": [{"top_logprobs": [
        {"token": "Yes", "logprob": math.nan}]}]}), "no chat completion"),
    "probability above 1": (lambda h, b, n: completion(top={"Yes": 3.0}), "no chat completion"),
    "neither": (lambda h, b, n: completion("The", top={"The": 0.9}), "neither"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_unscored_with_its_reason_and_counted(fault):
    reply, reason = FAULTS[fault]
    with serving(reply) as server:
        # Short only where the reply never comes: a busy machine may need more than that for one that does.
        judge = judge_at(server, timeout_s=0.4 if fault in ("hang", "drip") else 3.0)
        (answer,) = judge.ask([ASK])
    assert answer.p_yes is None and reason in answer.reason
    assert (judge.usage.calls, judge.usage.failures) == (1, 1) and judge.usage.reasons == {answer.reason: 1}


def test_nobody_listening_is_unscored():
    with serving(lambda h, b, n: completion()) as server:
        judge = judge_at(server)
    (answer,) = judge.ask([ASK])
    assert answer.p_yes is None and "Connect" in answer.reason


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status):
    def reply(handler, body, n):
        return handler.send(status, b"later") if n == 1 else completion(top={"No": 0.5})

    with serving(reply) as server:
        judge = judge_at(server, attempts=3)
        (answer,) = judge.ask([ASK])
    assert answer.p_yes == 0 and judge.usage.retries == 1 and judge.usage.failures == 0


def in_seconds(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    "status, header, seconds",
    [
        (429, lambda: "7", 7), (503, lambda: " 7 ", 7), (429, lambda: in_seconds(20), 20), (503, lambda: "0", 0),
        (429, lambda: in_seconds(-20), 0), (429, lambda: "9" * 5000, 30), (429, lambda: in_seconds(9e6), 30),
        (503, lambda: "soon", 0), (503, lambda: "-3", 0), (503, lambda: "nan", 0), (503, lambda: "", 0),
        (503, lambda: "Wed, 21 Oct 99999 07:28:00 GMT", 0), (500, lambda: "7", 0),
    ],
)  # fmt: skip
def test_a_server_may_ask_to_wait_but_not_for_ever(status, header, seconds, monkeypatch):
    waits, real = [], asyncio.sleep

    def sleep(asked, *result):
        waits.append(asked)
        return real(0, *result)

    monkeypatch.setattr("asyncio.sleep", sleep)

    def reply(handler, body, n):
        return handler.send(status, b"later", Retry_After=header()) if n == 1 else completion(top={"Yes": 0.5})

    with serving(reply) as server:
        (answer,) = judge_at(server, attempts=2, max_wait_s=30, timeout_s=20, connect_s=20).ask([ASK])
    # A date has whole seconds, and time goes by until it is read; 0 to 0.5 s are added by chance.
    assert answer.p_yes == 1 and seconds - 4 <= max(waits) <= seconds + 0.5


def test_the_wait_that_a_server_asks_for_is_really_waited():
    def reply(handler, body, n):
        times.append(time.monotonic())
        return handler.send(429, b"later", Retry_After="30") if n == 1 else completion(top={"Yes": 0.5})

    times = []
    with serving(reply) as server:
        (answer,) = judge_at(server, attempts=2, max_wait_s=0.3, timeout_s=20, connect_s=20).ask([ASK])
    assert answer.p_yes == 1 and 0.3 <= times[1] - times[0] < 15 and answer.seconds >= 0.3


def test_what_will_not_pass_is_not_tried_again():
    with serving(lambda h, b, n: h.send(404, b"unknown model")) as server:
        judge_at(server, attempts=3).ask([ASK])
    assert len(server.requests) == 1


def test_no_more_requests_are_in_flight_than_allowed():
    now, most = [0], [0]

    def reply(handler, body, n):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.03)
        now[0] -= 1
        return completion(top={"Yes": 0.9})

    with serving(reply) as server:
        answers = judge_at(server, concurrency=4).ask([ASK] * 16)
    assert {a.p_yes for a in answers} == {1.0} and 1 < most[0] <= 4


def test_too_many_failures_stop_the_run_and_say_what_to_do():
    with serving(lambda h, b, n: h.send(500, b"boom") if n % 5 else completion(top={"Yes": 1.0})) as server:
        with pytest.raises(RunStopped, match="HTTP 500.*doctor") as stopped:
            judge_at(server, concurrency=1).ask([ASK] * 40)
        assert stopped.value.exit_code == 3 and len(server.requests) <= 21  # one may be under way
        few = judge_at(server, concurrency=1).ask([ASK] * 19)
        allowed = judge_at(server, concurrency=1, max_failed=0.9).ask([ASK] * 40)
    assert {a.p_yes for a in few} == {a.p_yes for a in allowed} == {None, 1.0}


def test_half_of_the_calls_may_fail_but_not_more():
    usage = Usage(max_failed=0.5)
    for i in range(100):
        usage.record("bad" if i % 2 else None)
    with pytest.raises(RunStopped, match="51 of its last 101"):
        usage.record("bad")


def test_it_works_inside_a_running_loop():
    async def caller():
        return judge_at(server).ask([ASK])

    with serving(lambda h, body, n: completion(top={"Yes": 0.9})) as server:
        assert asyncio.run(caller())[0].p_yes == 1


def test_the_key_is_never_told(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda h, b, n: h.send(401, b"wrong key sk-secret")) as server:
        judge = judge_at(server, api_key_env="MY_KEY")
        (answer,) = judge.ask([ASK])
    assert "wrong key ***" in answer.reason and "sk-secret" not in f"{judge.usage}{judge.config}{answer}"


def test_settings_that_cannot_work_are_user_errors(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RlhfImgError, match="MY_KEY, which is not set"):
        open_judge(JudgeConfig(url="http://localhost:1/v1", model="m", api_key_env="MY_KEY"))
    for url in ("localhost:8000", "ftp://x", "http://", "http://a:b/v1"):
        with pytest.raises(RlhfImgError, match="expected one such as"):
            open_judge(JudgeConfig(url=url, model="m"))
    with pytest.raises(ValueError, match="concurrency"):
        JudgeConfig(model="m", concurrency=0)


def test_a_server_with_one_model_need_not_be_told_which(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    replies = {"one": {"data": [{"id": "eye-1", "object": "model"}]}, "two": {"data": [{"id": "a"}, {"id": "b"}]},
               "none": {"data": []}, "wrong": {"models": ["eye-1"]}}  # fmt: skip

    class Listing(Handler):
        def do_GET(self) -> None:
            self.server.headers.append(dict(self.headers))
            kind = self.path.split("/")[1]
            if kind == "refused":
                return self.send(401, b"wrong key sk-secret")
            return self.send(200, json.dumps(replies[kind]).encode())

    with serving(lambda h, body, n: completion()) as server:
        server.RequestHandlerClass = Listing
        root = f"http://127.0.0.1:{server.server_address[1]}"
        assert only_model(f"{root}/one", "MY_KEY") == "eye-1"
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        for kind, said in (("two", "it has a, b"), ("none", "it names none"), ("wrong", "no list of models")):
            with pytest.raises(RlhfImgError, match=f"{said}.*"):
                only_model(f"{root}/{kind}")
        with pytest.raises(RlhfImgError, match="--judge-model NAME") as refused:
            only_model(f"{root}/refused", "MY_KEY")
    assert "sk-secret" not in str(refused.value)
    assert only_model("fake:") == "fake"


def test_the_same_config_gives_the_same_judge_and_the_fake_one_needs_no_model():
    config = JudgeConfig(url="fake:", model="any")
    assert open_judge(config) is open_judge(config)
    first, again = (open_judge(config).ask([ASK])[0].p_yes for _ in range(2))
    assert first == again and 0 <= first <= 1


def test_the_fake_judge_fails_and_dawdles_as_told():
    images = [np.full((16, 16, 3), i, np.uint8) for i in range(100)]
    judge = FakeJudge(failing=0.3, seconds=0.001)
    answers = judge.ask([Ask(image=image, question="?") for image in images])
    assert 15 < judge.usage.failures < 45 and judge.usage.seconds >= 0.1
    assert all((a.p_yes is None) == (a.reason is not None) for a in answers)


def test_the_canary_reports_the_mean_absolute_change(caplog):
    given = iter([0.5, 0.2, None, 0.9] + [0.7] * 14 + [0.4, 0.6, None] + [0.7] * 13)  # two of them flip
    judge = Canary(FakeJudge(answer=lambda ask: next(given)), every=18)
    judge.ask([ASK] * 4)
    assert judge.usage.drift == []
    judge.ask([ASK] * 14)  # kept: 0.5, 0.2, 0.9 and 13 times 0.7; then these are asked again
    assert judge.usage.drift == [pytest.approx(Drift(change=(0.1 + 0.4) / 15, flipped=2 / 15))] and not caplog.text
    moved = Canary(FakeJudge(answer=lambda ask: 1.0 if moved.usage.calls else 0.0), every=2)
    moved.ask([ASK] * 2)
    assert moved.usage.drift == [Drift(change=0.5, flipped=0.5)] and "not comparable" in caplog.text


def test_the_canary_questions_are_about_images_of_the_whole_batch_and_outlive_it():
    batch = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(3, axis=3)
    seen = []
    judge = Canary(FakeJudge(answer=lambda ask: seen.append(int(ask.image[0, 0, 0])) or 0.5), every=40)
    asks = [Ask(image=image, question=q) for image in batch for q in ("cat?", "dog?", "sun?")]
    judge.ask(asks)
    again = seen[len(asks) :]
    assert len(again) == canary.SIZE and len(set(again)) == canary.SIZE and max(again) >= 35
    batch[:] = 0
    judge.ask(asks)
    assert seen[-canary.SIZE :] == again


def test_the_account_of_a_block_holds_what_judges_did_in_it(monkeypatch):
    monkeypatch.setattr(loading, "_usages", [])
    with accounted() as nothing:
        FakeJudge().ask([ASK])
    assert nothing == {}
    retried = []

    def reply(handler, body, n):
        if n % 10 == 5 and n not in retried:
            return retried.append(n) or handler.send(404 if n == 5 else 503, b"no")
        time.sleep(0.1 if n == 8 else 0)
        return completion(top={"Yes": 0.8})

    with serving(reply) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        config = JudgeConfig(url=url, model="m", concurrency=1, attempts=2, canary_every=9)
        with accounted() as first:
            open_judge(config).ask([ASK] * 4)
        with accounted() as second:
            open_judge(config).ask([ASK] * 5)
            open_judge(JudgeConfig(url="fake:", model="m", canary_every=0)).ask([ASK] * 2)
        with accounted() as third:
            pass
    assert (first["judge/calls"], first["judge/failed"], first["judge/prompt_tokens"]) == (4, 0, 28)
    assert "judge/drift" not in first
    # 5 questions, of which the first failed, 2 to the fake, and 8 canary questions, of which one was asked twice.
    assert (second["judge/calls"], second["judge/failed"], second["judge/retries"]) == (15, 1, 1)
    assert (second["judge/drift"], second["judge/flipped"]) == (0, 0) and second["judge/prompt_tokens"] == 12 * 7
    assert second["judge/seconds_mean"] < second["judge/seconds_p95"] and second["judge/seconds_p95"] > 0.02
    assert third == {}


def test_opening_the_room_loads_neither_torch_nor_a_client():
    code = "import sys, rlhf_img.judges; sys.exit(any(m in sys.modules for m in ('torch', 'httpx', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_resumed_run_compares_with_the_same_first_answers(monkeypatch, tmp_path):
    def started(answers):
        """As in a new process: no judge is open, and the next one to be opened gives these answers."""
        monkeypatch.setattr(loading, "_canaries", {})
        monkeypatch.setattr(loading, "_baselines", {})
        monkeypatch.setattr(loading, "_open", lambda config: FakeJudge(answer=lambda ask: next(answers)))
        open_judge.cache_clear()

    config, file = JudgeConfig(url="fake:", model="resumed", canary_every=3), tmp_path / "canaries.safetensors"
    started(iter([0.9, 0.1]))
    loading.save_canaries(file)
    assert not file.exists()
    open_judge(config).ask([ASK] * 2)
    loading.save_canaries(file)
    started(iter([0.5, 0.4, 0.1, 0.5]))  # one more question, then the three again: two from before, and this one
    loading.load_canaries(file)
    loading.save_canaries(tmp_path / "again")  # before the judge is asked
    judge = open_judge(config)
    judge.ask([ASK])
    assert judge.usage.drift == [pytest.approx(Drift(change=(0.5 + 0 + 0) / 3, flipped=1 / 3))]
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    file.write_bytes(b"torn")
    with pytest.raises(RlhfImgError, match="delete it"):
        loading.load_canaries(file)
    open_judge.cache_clear()
