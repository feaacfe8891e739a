"""Real servers on this machine: `transformers serve` answers questions about images, vLLM writes rubrics as JSON.

The models are made by hand, so that what they must say is known: no weights are downloaded, nothing is trained.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from test_judges_local import tiny_llava
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from rlhf_img.cli.rubric import app
from rlhf_img.judges import Ask, JudgeConfig
from rlhf_img.judges.local import LocalJudge
from rlhf_img.judges.openai import OpenAIJudge

VLLM_PYTHON = "RLHF_IMG_VLLM_PYTHON"
"""The environment variable with the interpreter of the environment that `make vllm` builds."""
START_S = 300


@contextmanager
def served(folder: Path, *command: str, **env: str) -> Iterator[str]:
    """The URL of a server that the command starts, with --host and --port, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    where = ("--host", "127.0.0.1", "--port", str(port))
    with log.open("w") as out, subprocess.Popen([*command, *where], stdout=out, stderr=out, env=os.environ | env) as it:
        try:
            deadline = time.monotonic() + START_S
            while not _ready(port):
                if it.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"no server after {START_S} s, or it ended:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            it.terminate()
            try:
                it.wait(20)
            except subprocess.TimeoutExpired:
                it.kill()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


RNG = np.random.default_rng(0)
TWO_IMAGES = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
ASKS = [Ask(image=image, question=question) for image in TWO_IMAGES for question in ("Is there a cat?", "Is it red?")]
TRUTH = [1.0, 0.0, 0.0, 1.0]  # neither the image nor the question tells alone


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that answers `ASKS` by `TRUTH`, with one word. Of Qwen3-VL the server wants torchvision."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    model, (processor,) = tiny_llava()
    words = processor.tokenizer
    yes, no, end = words.convert_tokens_to_ids(["Yes", "No", words.eos_token])
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.normal_(std=weight[0].numel() ** -0.5)
        # The last channel says whether the reply has been given; nothing else writes to it.
        layer, embedding = model.model.language_model.layers[0], model.get_input_embeddings().weight
        for weight in (layer.self_attn.o_proj, layer.mlp.down_proj, model.model.multi_modal_projector.linear_2):
            weight.weight[-1] = 0.0
        model.model.multi_modal_projector.linear_2.bias[-1] = 0.0
        embedding[:, -1] = 0.0
        embedding[[yes, no], -1] = 10.0
        judge, seen = LocalJudge(model, processor, JudgeConfig(model="seeing", concurrency=1)), []
        hook = model.lm_head.register_forward_hook(lambda module, given, out: seen.append(given[0][0, -1]))
        judge.ask(ASKS)
        hook.remove()
        # The direction in which the four states lie on the sides where the truth wants them.
        side = torch.linalg.lstsq(torch.stack(seen), 2 * torch.tensor(TRUTH) - 1).solution
        model.lm_head.weight.zero_()
        model.lm_head.weight[yes], model.lm_head.weight[no] = 12 * side, -12 * side
        model.lm_head.weight[end, -1] = 1e4
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = words.pad_token_id
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


def test_transformers_serve_answers_about_images_as_the_model_does_in_process(seeing: Path) -> None:
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install -e '.[dev]'")
    here = LocalJudge.load(JudgeConfig(model=str(seeing))).ask(ASKS)
    assert [a.p_yes for a in here] == pytest.approx(TRUTH, abs=1e-3)
    command = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(seeing), "--device", "cpu")
    with served(seeing, *command, HF_HUB_OFFLINE="1") as url:
        votes = OpenAIJudge(JudgeConfig(url=url, model=str(seeing), votes=2, concurrency=4))
        assert [a.p_yes for a in votes.ask(ASKS)] == TRUTH
        # It leaves logprobs out without a word; that is unscored, and the reason says what to do.
        (answer,) = OpenAIJudge(JudgeConfig(url=url, model=str(seeing))).ask(ASKS[:1])
        assert answer.p_yes is None and "votes" in str(answer.reason)
    assert votes.usage.failures == 0 and votes.usage.prompt_tokens > 0 and votes.usage.completion_tokens > 0


REPLY = ('{"requirements":[', '{"id":"cat",', '"check":"object",', '"target":"cat",', '"expect":"present",',
         '"needs":[]}', '],"uncovered":[', '"stunning"]}')  # fmt: skip
"""A reply, cut so that each part is a token."""
P_YES = 0.75


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 that says "Sure!" and `REPLY` after a system prompt, and Yes or No to others.

    Each token is chosen by the one before it alone.
    """
    folder = tmp_path_factory.mktemp("reciting")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_tokens([AddedToken(text, normalized=False) for text in ("Sure!", "Yes", "No", *REPLY)])
    template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        "{% if messages[0].role == 'system' %}<|reply|>{% else %}<|answer|>{% endif %}"
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", chat_template=template,
        additional_special_tokens=["<|reply|>", "<|answer|>"],
    )  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, tie_word_embeddings=False,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    ))  # fmt: skip
    follows = {before: [(after, 20.0)] for before, after in zip(REPLY, [*REPLY[1:], "<|end|>"], strict=True)}
    follows |= {"<|reply|>": [("Sure!", 40.0), (REPLY[0], 20.0)], "Sure!": [(REPLY[0], 20.0)]}
    follows |= {"<|answer|>": [("Yes", 20 + float(np.log(P_YES))), ("No", 20 + float(np.log(1 - P_YES)))]}
    with torch.no_grad():
        for weight in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            weight.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, -1] = 1.0
        model.lm_head.weight.zero_()
        for channel, (before, choices) in enumerate(follows.items()):
            place = words.convert_tokens_to_ids(before)
            model.model.embed_tokens.weight[place] = torch.eye(64)[channel]
            for after, logit in choices:  # the norm makes a channel that is alone sqrt(64) = 8
                model.lm_head.weight[words.convert_tokens_to_ids(after), channel] = logit / 8
    for part in (model, words):
        part.save_pretrained(folder)
    return folder


def test_vllm_writes_rubrics_in_the_schema_and_gives_token_probabilities(reciting: Path) -> None:
    if not (python := os.environ.get(VLLM_PYTHON)):
        pytest.skip(f"{VLLM_PYTHON} names no interpreter with vLLM: make vllm")
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(reciting), "--served-model-name",
               "reciting", "--enforce-eager", "--dtype", "float32")  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}  # fmt: skip
    with served(reciting, *command, **settings) as url:
        options = ["--decomposer", "llm", "--judge-url", url, "--judge-model", "reciting"]
        done = CliRunner().invoke(app, ["decompose", "a cat, stunning", *options])
        judge = OpenAIJudge(JudgeConfig(url=url, model="reciting", attempts=1))
        (unseen,) = judge.ask(ASKS[:1])
        free, p_yes = asyncio.run(_without_schema_and_image(judge, url))
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    assert "target: cat" in done.stdout and "stunning" in done.stderr and "not valid" not in done.stderr
    assert free.startswith("Sure!")  # so it was the schema that kept this out above
    # A model without eyes refuses the image, and nothing is made up.
    assert unseen.p_yes is None and "HTTP 4" in str(unseen.reason)
    assert p_yes == pytest.approx(P_YES, abs=1e-3)


async def _without_schema_and_image(judge: OpenAIJudge, url: str) -> tuple[str, float]:
    """What the model says when no schema binds it, and its P(yes) for a question without an image."""
    async with httpx.AsyncClient(timeout=60) as client:
        talk = {"model": "reciting", "messages": [{"role": "system", "content": "hi"}], "temperature": 0}
        reply = (await client.post(f"{url}/chat/completions", json=talk | {"max_tokens": 20})).json()
        p_yes = await judge._read(client, [{"role": "user", "content": "Is it dawn?"}])
        return reply["choices"][0]["message"]["content"], p_yes
