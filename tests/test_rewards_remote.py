"""Rewards on other machines: pairing under shuffled delays, servers that misbehave in every way, what is refused."""

import base64
import io
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from test_training import files, run  # noqa: F401 - `files` is a fixture

from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import requests
from rlhf_img.model.policy import LoRAConfig
from rlhf_img.rewards import Images, Reward, Scoring, load_rewards, score
from rlhf_img.rewards.protocol import Verdict
from rlhf_img.rewards.server import Limits, make_app
from rlhf_img.rewards.wire import TOKEN
from rlhf_img.rubrics import decompose
from rlhf_img.training import grpo

SEEN = """
import zlib

def seen(prompts, images, **columns):
    return [zlib.crc32(p.encode() + a.tobytes()) / 2**32 for p, a in zip(prompts, images.arrays)]
"""
"""A reward that any other prompt or pixel changes."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_backoff", lambda state: 0.02)
    monkeypatch.delenv(TOKEN, raising=False)


def numbered(count: int) -> Images:
    """Images of which every pixel of the i-th is i."""
    return Images(torch.arange(count).div(255).reshape(count, 1, 1, 1).expand(count, 3, 16, 20))


def prompts_of(count: int) -> list[str]:
    return [f"image {i}" for i in range(count)]


def pixels(item: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["image"])), formats=["PNG"]))


def scored(items: Sequence[dict], value: Callable[[dict], object] = lambda item: 0.5) -> dict:
    return {"protocol": 1, "scores": [{"id": item["id"], "value": value(item)} for item in items]}


class Fake(ThreadingHTTPServer):
    """A reward server that says what `reply` tells it to; `seen` are the requests."""

    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def __init__(self, reply: Callable[["Handler", dict], object], port: int = 0, **described: object) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.seen, self.headers, self.protocol = reply, [], [], 1
        self.described = {
            "name": "seen", "range": [0, 1], "role": "objective", "group": False, "floor": 0.02, "below": 0.5,
            "cap": 0.2, "about": "", "needs": "none",
        } | described  # fmt: skip

    @property
    def spec(self) -> str:
        return f"remote:http://127.0.0.1:{self.server_address[1]}/seen"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        told = {"protocol": self.server.protocol, "version": "9", "rewards": [self.server.described],
                "max_images": 64, "max_bytes": 10**7}  # fmt: skip
        self.send(200, json.dumps(told).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.headers.append(dict(self.headers))
        if (answer := self.server.reply(self, body)) is not None:
            self.send(200, json.dumps(answer).encode())

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(reply: Callable[[Handler, dict], object], port: int = 0, **described: object) -> Iterator[Fake]:
    with Fake(reply, port, **described) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def remote(server: Fake, **options: object) -> Reward:
    (reward,) = load_rewards([{"reward": server.spec, "options": {"attempts": 1, "timeout_s": 20} | options}])
    return reward


# Order and pairing.


def test_each_image_gets_its_own_score_in_whatever_order_answers_come() -> None:
    chance = random.Random(0)
    delays = [0.2, 0.0, 0.15, 0.05, 0.1, 0.0, 0.12, 0.03] * 4
    at_once, most, lock = [], [], threading.Lock()

    def reply(handler: Handler, body: dict) -> dict:
        with lock:
            at_once.append(body)
            most.append(len(at_once))
            delay = delays.pop()
        time.sleep(delay)
        items = body["items"]
        for item in items:
            # The prompt that comes with an image is that image's.
            assert item["prompt"] == f"image {pixels(item)[0, 0, 0]}"
        answer = scored(chance.sample(items, len(items)), lambda item: float(pixels(item)[0, 0, 0]) / 255)
        with lock:
            at_once.remove(body)
        return answer

    rows = [list(range(8, 16)), list(range(24, 32)), list(range(8)), list(range(16, 24))]
    images = numbered(32)
    with serving(reply) as server:
        rewards = [remote(server, images=3, concurrency=3)]
        with Scoring(rewards, 32, prompts_of(32)) as scoring:
            for part in rows:
                scoring.add(part, Images(images.tensor[part]))
            values = scoring.result().values_BK[:, 0]
    assert torch.equal(values, torch.arange(32).double().div(255).float())
    assert max(most) == 3 and len(server.seen) == 4 * 3
    assert torch.equal(scoring.images.tensor, images.tensor)


def test_an_answer_about_another_image_is_no_answer() -> None:
    with serving(lambda h, body: scored([item | {"id": item["id"] ^ 1} for item in body["items"]])) as server:
        scores = score([remote(server, images=1)], prompts_of(4), numbered(4), max_unscored=1)
    assert scores.values_BK.isnan().all()
    assert scores.unscored["seen"] == {"the reply scores other images than were sent": 4}


def test_a_run_with_a_slow_remote_reward_that_dies_and_comes_back_is_the_local_run_to_the_bit(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    (tmp_path / "mine.py").write_text(SEEN)
    chance, dead, over, answered = random.Random(1), threading.Event(), threading.Event(), []

    def reply(handler: Handler, body: dict) -> dict | None:
        if len(server.seen) == 6:  # in the second iteration; nothing is answered any more
            dead.set()
        if dead.is_set():
            handler.close_connection = True
            return None
        time.sleep(chance.random() * 0.1)
        items = body["items"]
        return scored(chance.sample(items, len(items)), value)

    def come_back() -> None:
        dead.wait(60)
        server.shutdown()
        server.server_close()
        time.sleep(0.2)
        with serving(lambda h, body: scored(body["items"], value), server.server_address[1]) as again:
            over.wait(60)
        answered.append(len(again.seen))

    def value(item: dict) -> float:
        return zlib.crc32(item["prompt"].encode() + pixels(item).tobytes()) / 2**32

    here = iterated(files, f"{tmp_path / 'mine.py'}:seen")
    with serving(reply) as server:
        healer = threading.Thread(target=come_back)
        healer.start()
        there = iterated(files, ({"reward": server.spec, "options": {"attempts": 1000}},))
        over.set()
        healer.join()
    assert dead.is_set() and answered[0] > 0
    assert here == there and there[0][-1]["reward/seen/unscored"] == 0


def iterated(files: Path, rewards: object) -> tuple[list[dict[str, float]], list[list[float]]]:  # noqa: F811
    """Metrics of two iterations, without times, and the weights after them."""
    config = grpo.Config(
        model=str(files / "model"), prompts=str(files / "prompts.txt"), eval_prompts=str(files / "prompts.txt"),
        rewards=rewards, steps=2, tracker="none", lora=LoRAConfig(rank=4),
        grpo=GRPOConfig(prompts=4, group=2, num_steps=3, draws=1, batch_size=2),
    )  # fmt: skip
    parts, job = grpo.prepare(config)
    metrics = [job.iterate(step) for step in (1, 2)]
    weights = [p.flatten().tolist() for p in parts.policy.parameters.values()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics], weights


# Servers that misbehave.


def raw(content: bytes, status: int = 200, length: int | None = None, **headers: str) -> Callable[..., None]:
    return lambda handler, body: handler.send(status, content, length, **headers)


FAULTS = {
    "hang": (lambda h, b: time.sleep(1), "no whole reply within 0.3 s"),
    "500": (raw(b"out of memory", 500), "HTTP 500: out of memory"),
    "404": (raw(b"moved out", 404), "HTTP 404: moved out"),
    "redirect": (raw(b"", 302, Location="http://127.0.0.1:1/"), "HTTP 302"),
    "garbage": (raw(b"<html>welcome</html>"), "the reply is none: the body: Invalid JSON"),
    "a list": (raw(b"[0.5]"), "the reply is none: the body"),
    "text for a value": (lambda h, b: scored(b["items"], lambda item: "0.5"), "scores.0.value"),
    "yes for a value": (lambda h, b: scored(b["items"], lambda item: True), "scores.0.value"),
    "too few": (lambda h, b: scored(b["items"][1:]), "other images than were sent"),
    "too many": (lambda h, b: scored([*b["items"], {"id": 99}]), "other images than were sent"),
    "one twice": (lambda h, b: scored([*b["items"], b["items"][0]]), "other images than were sent"),
    "NaN": (lambda h, b: scored(b["items"], lambda item: math.nan), "not a finite number: nan"),
    "infinite": (lambda h, b: scored(b["items"], lambda item: math.inf), "not a finite number: inf"),
    "out of range": (lambda h, b: scored(b["items"], lambda item: 1.5), "out of its declared range"),
    "truncated": (raw(b'{"protocol": 1, "sco', length=500), "RemoteProtocolError"),
    "another version": (lambda h, b: scored(b["items"]) | {"protocol": 2}, "protocol: Input should be 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_misbehaves_gives_no_scores_and_never_zero(fault: str) -> None:
    reply, reason = FAULTS[fault]
    with serving(reply) as server:
        reward = remote(server, timeout_s=0.3 if fault == "hang" else 20)
        scores = score([reward], prompts_of(3), numbered(3), max_unscored=1)
        assert scores.values_BK.isnan().all()
        ((said, count),) = scores.unscored["seen"].items()
        assert reason in said and count == 3
        with pytest.raises(RunStopped, match="left 3 of 3 images unscored"):
            score([reward], prompts_of(3), numbered(3))


def test_a_failure_costs_its_own_images_only_or_stops_the_run_at_once() -> None:
    def reply(handler: Handler, body: dict) -> dict | None:
        return handler.send(500, b"boom") if body["items"][0]["id"] == 2 else scored(body["items"])

    with serving(reply) as server:
        values = score([remote(server, images=2)], prompts_of(6), numbered(6)).values_BK[:, 0].tolist()
        assert [v for i, v in enumerate(values) if i not in (2, 3)] == [0.5] * 4
        assert math.isnan(values[2]) and math.isnan(values[3])
        with pytest.raises(RunStopped, match=r"gave no scores: HTTP 500: boom.*--resume"):
            score([remote(server, images=2, on_failure="stop")], prompts_of(6), numbered(6), max_unscored=1)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_wait_is_waited_for_and_asked_again(status: int) -> None:
    def reply(handler: Handler, body: dict) -> dict | None:
        times.append(time.monotonic())
        return handler.send(status, b"later", Retry_After="30") if len(times) == 1 else scored(body["items"])

    times: list[float] = []
    with serving(reply) as server:
        scores = score([remote(server, attempts=2, max_wait_s=0.3)], ["p"], numbered(1))
    assert scores.values_BK.tolist() == [[0.5]] and times[1] - times[0] >= 0.3


def test_a_server_that_is_killed_and_started_again_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SEEN)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "rlhf_img.cli.main", "reward", "serve", "--rewards",
               f"{tmp_path / 'mine.py'}:seen", "--port", str(port)]  # fmt: skip
    images, prompts = numbered(9), prompts_of(9)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"remote:http://\S+", process.stdout.readline())
            assert found is not None
            (reward,) = load_rewards([{"reward": found[0], "options": {"attempts": 60, "timeout_s": 20}}])
            first = score([reward], prompts, images).values_BK
            process.send_signal(signal.SIGKILL)
            process.wait(20)
        finally:
            process.kill()
    with Scoring([reward], 9, prompts) as scoring:
        scoring.add(range(9), images)
        time.sleep(0.2)  # it is refused meanwhile
        app = make_app(load_rewards(f"{tmp_path / 'mine.py'}:seen"), Limits(), None, ["*"])
        with real_server(app, port):
            again = scoring.result().values_BK
    local = score(load_rewards(f"{tmp_path / 'mine.py'}:seen"), prompts, images).values_BK
    assert torch.equal(first, local) and torch.equal(again, local)


# Who may ask, and what is declared.


@contextmanager
def real_server(app: object, port: int = 0) -> Iterator[str]:
    """The package's server in a thread, and its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", port)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def logit(prompts: Sequence[str], images: Images, **columns: object) -> list[Verdict]:
    """The grey level of an image, or why there is none."""
    return [Verdict(value=None, reason="too dark") if a[0, 0, 0] == 0 else Verdict(value=float(a[0, 0, 0]))
            for a in images.arrays]  # fmt: skip


async def in_group(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
    assert len(set(prompts)) == 1
    return [len(images) / 10] * len(images)


def test_what_a_reward_declares_there_is_declared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    served = [
        Reward(name="logit", fn=logit, range=(-math.inf, math.inf), role="gate", floor=0.7, below=3.0, cap=0.1,
               needs="4 GB"),
        Reward(name="group", fn=in_group, group=True), *load_rewards("rubric"),
    ]  # fmt: skip
    # A proxy is for the web: nobody listens at this one.
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with real_server(make_app(served, Limits(images=4), None, ["127.0.0.1"])) as at:
        dark, group, rubric = load_rewards(f"remote:{at}/logit:2,remote:{at}/group,remote:{at}/rubric:0.5")
        assert (dark.name, dark.range, dark.role, dark.weight) == ("logit", (-math.inf, math.inf), "gate", 2.0)
        assert (dark.floor, dark.below, dark.cap, dark.group, group.group) == (0.7, 3.0, 0.1, False, True)
        assert dark.source == f"remote:{at}/logit" and "4 GB" in dark.needs
        scores = score([dark], prompts_of(9), numbered(9), max_unscored=1)
        assert math.isnan(scores.values_BK[0, 0]) and scores.values_BK[1:, 0].tolist() == list(range(1, 9))
        assert scores.unscored["logit"] == {"too dark": 1}
        pairs = ["a", "a", "b", "b"]
        assert score([group], pairs, numbered(4), group_size=2).values_BK[:, 0].tolist() == pytest.approx([0.2] * 4)
        with pytest.raises(RlhfImgError, match="start it with --max-images 5"):
            score([group], ["a"] * 5, numbered(5))
        own = decompose("a red circle").rubric
        asked = {"rubrics": [own, None, own]}
        there = score([rubric], ["x", "two blue stars", "x"], numbered(3), asked, max_unscored=1)
        here = score(load_rewards("rubric"), ["x", "two blue stars", "x"], numbered(3), asked, max_unscored=1)
        assert torch.equal(there.values_BK, here.values_BK) and there.details == here.details


def test_a_server_with_a_token_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app([Reward(name="logit", fn=logit, range=(0, 255))], Limits(), "s3cret", ["127.0.0.1"])
    with real_server(app) as at:
        for wrong in ("", "s3cre"):
            monkeypatch.setenv(TOKEN, wrong)
            with pytest.raises(RlhfImgError, match=r"401.*set RLHF_IMG_REWARD_TOKEN"):
                load_rewards(f"remote:{at}/logit")
        monkeypatch.setenv(TOKEN, "s3cret ")
        (reward,) = load_rewards(f"remote:{at}/logit")
        assert score([reward], ["p"], numbered(8)[7:]).values_BK.tolist() == [[7.0]]
        monkeypatch.setenv("MINE", "s3cret")
        load_rewards([{"reward": f"remote:{at}/logit", "options": {"token_env": "MINE"}}])
        with pytest.raises(RlhfImgError, match="environment variable THEIRS, which is not set"):
            load_rewards([{"reward": f"remote:{at}/logit", "options": {"token_env": "THEIRS"}}])


def test_a_token_is_not_repeated_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "s3cret")
    with serving(raw(b"refused: s3cret", 401)) as server:
        scores = score([remote(server)], ["p"], numbered(1), max_unscored=1)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert scores.unscored["seen"] == {"HTTP 401: refused: ***": 1}


def test_another_version_of_the_protocol_is_refused_before_anything_is_asked() -> None:
    with serving(lambda h, b: scored(b["items"])) as server:
        server.protocol = 2
        with pytest.raises(RlhfImgError, match=r"speaks version 2 .* this is version 1: install one version"):
            remote(server)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("remote:http://127.0.0.1:9/seen", "does not say what rewards it has .*rlhf-img reward serve"),
        ("remote:http://127.0.0.1:9", "no address of a reward; expected one such as remote:http://box:8131/artifact"),
        ("remote:ftp://127.0.0.1/seen", "no address of a reward"),
        ("remote:http://127.0.0.1:99999/seen", "no address of a reward"),
        ("remote:http://me:pw@127.0.0.1:9/seen", "a token in an address ends up in files"),
        ("remote:http://127.0.0.1:9/seen:heavy", '"heavy" in .* is not a weight'),
        ([{"reward": "remote:http://127.0.0.1:9/seen", "options": {"retries": 3}}], 'unknown key "retries"'),
        ([{"reward": "remote:http://127.0.0.1:9/seen", "options": {"attempts": 0}}], "attempts is at least 1"),
    ],
)
def test_what_a_spec_gets_wrong_is_said(spec: object, message: str) -> None:
    with pytest.raises(RlhfImgError, match=message) as told:
        load_rewards(spec)  # type: ignore[arg-type]
    assert "me:pw" not in str(told.value)


def test_a_reward_that_is_not_served_and_a_server_that_is_none() -> None:
    with serving(raw(b"")) as server:
        with pytest.raises(RlhfImgError, match='serves no reward "sene"; did you mean "seen"'):
            load_rewards(server.spec.replace("/seen", "/sene"))
        server.described["role"] = "king"
        with pytest.raises(RlhfImgError, match="is no reward server: rewards.0.role"):
            remote(server)


# What the server refuses.


def png(width: int = 6, height: int = 4, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


def item(data: bytes, **more: object) -> dict[str, object]:
    return {"id": 0, "prompt": "p", "image": base64.b64encode(data).decode()} | more


CUSTOM = {"prompt": "p", "requirements": [{"id": "a", "check": "/etc/evil.py:run"}]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"protocol": 2, "items": []}, 409, "version 1 .* install one version"),
        ({"items": [item(png())]}, 409, "version 1"),
        ({"protocol": 1}, 422, "items: Field required"),
        ({"protocol": 1, "items": []}, 422, "1 to 4 images; given 0"),
        ({"protocol": 1, "items": [item(png())] * 5}, 422, "1 to 4 images; given 5"),
        ({"protocol": 1, "items": [item(png()[:-30])]}, 422, "item 0: its image is no base64 of a whole PNG"),
        ({"protocol": 1, "items": [item(png(kind="JPEG"))]}, 422, "no base64 of a whole PNG"),
        ({"protocol": 1, "items": [item(b"") | {"image": "?"}]}, 422, "no base64 of a whole PNG"),
        ({"protocol": 1, "items": [item(png(200, 200))]}, 413, "200 x 200 px, more than 10000"),
        ({"protocol": 1, "items": [item(png()), item(png(8, 8), id=1)]}, 422, "images of one size"),
        ({"protocol": 1, "items": [item(png(), rubric=CUSTOM)]}, 422, "the check /etc/evil.py:run is a file's"),
        ({"protocol": 1, "items": [item(png(), rubric={"prompt": 1})]}, 422, "items.0.rubric"),
        ({"protocol": 1, "items": [item(bytes(60_000))]}, 413, "at most 50000 bytes: send fewer images"),
    ],
)  # fmt: skip
def test_what_a_server_cannot_take_is_said(body: dict, status: int, message: str) -> None:
    limits = Limits(images=4, bytes=50_000, pixels=10_000)
    client = TestClient(make_app([Reward(name="logit", fn=logit, range=(0, 255))], limits, None, ["testserver"]))
    reply = client.post("/rewards/logit", json=body)
    assert reply.status_code == status and re.search(message, reply.json()["error"])


def test_other_doors_are_shut() -> None:
    rewards = [Reward(name="logit", fn=logit, range=(0, 255))]
    client = TestClient(make_app(rewards, Limits(), "s3cret", ["127.0.0.1"]), base_url="http://127.0.0.1")
    assert client.get("/health").json() == {"status": "ok", "protocol": 1}
    for reply in (client.get("/rewards"), client.post("/rewards/logit", json={"protocol": 1, "items": []})):
        assert reply.status_code == 401
    client.headers["Authorization"] = "Bearer s3cret"
    assert client.get("/rewards").json()["rewards"][0]["name"] == "logit"
    assert client.post("/rewards/logid", json={}).status_code == 404
    # A page from elsewhere can send a form unasked, but no JSON, and not under this machine's name.
    assert client.post("/rewards/logit", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400


def test_a_reward_that_cannot_score_says_why() -> None:
    def fussy(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
        raise {"size": RlhfImgError("images are too small"), "judge": RunStopped("the judge is away"),
               "bug": KeyError("x")}[prompts[0]]  # fmt: skip

    client = TestClient(make_app([Reward(name="fussy", fn=fussy)], Limits(), None, ["testserver"]))

    def said(prompt: str) -> tuple[int, dict]:
        reply = client.post("/rewards/fussy", json={"protocol": 1, "items": [item(png(), prompt=prompt)]})
        return reply.status_code, reply.json()

    assert said("size") == (422, {"error": "images are too small"})
    assert said("judge") == (503, {"error": "the judge is away"})
    assert said("bug") == (200, {"protocol": 1, "scores": [{"id": 0, "value": None, "reason": "raised KeyError: 'x'"}]})


def test_serving_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(monkeypatch, ["reward", "serve", "--rewards", "rubric", "--port", str(taken.getsockname()[1])]) == 2
    assert "give another --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(monkeypatch, ["reward", "serve"]) == 2
    assert "rlhf-img[remote]" in capsys.readouterr().err
