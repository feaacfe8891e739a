"""Checkpointing, compilation, attention backends and offloading change no result; damaged files are named."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from tiny import PROMPTS, SIZE, save_tiny, tiny_model, tiny_pipeline
from torch import Tensor

from rlhf_img.algorithms import grpo
from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import noised, rollout
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.compute import ComputeConfig, apply_compute, checkpoint_blocks, use_attention
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.counting import Count
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model, load
from rlhf_img.model.official import save_checkpoint
from rlhf_img.model.policy import LoRAConfig, make_policy
from rlhf_img.model.vae import decode, encode

SETTINGS = GRPOConfig(prompts=2, group=2, num_steps=3, kl=0.1, batch_size=4)


def one_update(model: Model, likelihood: str, count: int | str) -> tuple[list[Tensor], int]:
    """Gradients of a GRPO step with so many blocks checkpointed, and the most bytes that it needed."""
    config = dataclasses.replace(SETTINGS, likelihood=likelihood)
    policy = make_policy(model.transformer, LoRAConfig(rank=4), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    drawn = noised(policy, rollout(model, policy, Conditioner(model), PROMPTS[:2], config, 0), config)
    checkpoint_blocks(model.transformer, count)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.0)
    with Count() as counted:
        grpo.update(policy, optimizer, drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]), config)
    return [p.grad for p in policy.parameters.values() if p.grad is not None], counted.peak


@pytest.mark.parametrize("likelihood", ["forward", "steps"])
def test_checkpointed_blocks_give_grpo_the_same_gradients_for_less_memory(likelihood: str) -> None:
    found = {count: one_update(tiny_model(), likelihood, count) for count in (0, 1, "all")}
    for count in (1, "all"):
        assert len(found[count][0]) == len(found[0][0]) > 0
        assert all(torch.equal(a, b) for a, b in zip(found[count][0], found[0][0], strict=True))
    assert found["all"][1] < found[1][1] < found[0][1]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(RlhfImgError, match="has 2 blocks; got 3"):
        checkpoint_blocks(tiny_model().transformer, 3)
    with pytest.raises(RlhfImgError, match="number of blocks or all; got -1"):
        ComputeConfig(checkpoint_blocks=-1)
    with pytest.raises(RlhfImgError, match='no backend "nativ"; did you mean "native"'):
        ComputeConfig(attention="nativ")
    with pytest.raises(RlhfImgError, match='"flash" cannot be used here: .*"auto" needs nothing'):
        use_attention(tiny_model().transformer, "flash")


COMPILED = """
import dataclasses, sys, torch
sys.path.insert(0, "tests")
from tiny import PROMPTS, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import rollout
from rlhf_img.model.compute import compile_blocks
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.forward import velocity
from rlhf_img.model.policy import LoRAConfig, make_policy
from rlhf_img.training.preflight import check_ratios

model, plain = tiny_model(), tiny_model()
counter = CompileCounterWithBackend("eager")
compile_blocks(model.transformer, backend=counter)
graphs = []
for length in (7, 9, 12, 15, 30):
    text, x = torch.randn(2, length, 128), torch.randn(2, 9, 64)
    with torch.no_grad():
        v = velocity(model.transformer, x, torch.tensor(0.5), text, (3, 3))
        expected = velocity(plain.transformer, x, torch.tensor(0.5), text, (3, 3))
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-5)
    graphs.append(counter.frame_count)
assert graphs == [1, 2, 2, 2, 2], graphs  # the second length makes the graph that serves all

model = tiny_model()
compile_blocks(model.transformer, backend="aot_eager")
policy = make_policy(model.transformer, LoRAConfig(rank=4), 0)
config = GRPOConfig(prompts=2, group=2, num_steps=3, kl=0.0, batch_size=4, likelihood="steps")
drawn = rollout(model, policy, Conditioner(model), PROMPTS[:2], config, 0)
deviation = check_ratios(policy, drawn, config)
assert deviation < 1e-5, deviation
"""


def test_a_compiled_block_serves_all_lengths_and_gives_ratios_of_one() -> None:
    # A process of its own: the hints that tests enforce are code that the compiler would have to follow.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_attention_backends_agree_with_grouped_heads() -> None:
    model = tiny_model()
    x, text = torch.randn(2, 576, 64), torch.randn(2, 5, 128)
    expected = velocity(model.transformer, x, torch.tensor(0.5), text, (24, 24))
    try:
        for backend in ("native", "_native_math"):
            apply_compute(model.transformer, ComputeConfig(attention=backend))
            v = velocity(model.transformer, x, torch.tensor(0.5), text, (24, 24))
            torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-5)
    finally:
        model.transformer.reset_attention_backend()


def test_offloaded_parts_visit_the_device_only_while_they_work(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    here, away = load(folder, device="cpu"), load(folder, device="cpu", offload=True)
    moves: list[str] = []
    for name in ("text_encoder", "vae"):
        part = getattr(away, name)
        part.to = lambda device, name=name: moves.append(f"{name} {torch.device(device).type}")
    texts = [Conditioner(model).encode(PROMPTS[:1])[0] for model in (here, away)]
    assert torch.equal(*texts)
    images = [decode(model, torch.ones(1, 4, 64), SIZE, SIZE) for model in (here, away)]
    assert torch.equal(*images) and torch.equal(encode(here, images[0]), encode(away, images[0]))
    assert moves == ["text_encoder cpu"] * 2 + ["vae cpu"] * 4


def test_stored_prompts_are_read_once_by_the_same_weights(tmp_path: Path) -> None:
    model, calls = tiny_model(), []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    expected = Conditioner(model).encode(PROMPTS)
    calls.clear()
    assert list(Conditioner(model, store=tmp_path).read_ahead([*PROMPTS, PROMPTS[0]]))[-1] == len(set(PROMPTS))
    assert calls
    calls.clear()
    later = Conditioner(model, store=tmp_path)
    assert list(later.read_ahead(PROMPTS)) == [len(set(PROMPTS))]
    for ours, theirs in zip(later.encode(PROMPTS), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not calls
    first = next(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-4])  # damaged: read again
    Conditioner(model, store=tmp_path).encode(PROMPTS)
    assert len(calls) == 1
    with torch.no_grad():
        next(model.transformer.txt_in.parameters()).add_(1)  # other weights, other features
    changed = Conditioner(model, store=tmp_path).encode(PROMPTS[:1])[0]
    assert len(calls) == 2 and not torch.allclose(changed, expected[0])


def test_an_official_checkpoint_is_a_model_with_the_other_parts_of_a_pipeline(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    original = load(folder, device="cpu")
    file = save_checkpoint(original.transformer, tmp_path / "raw.safetensors", torch.float32)
    loaded = load(f"{file}@{folder}", device="cpu", dtype=torch.bfloat16)
    state, kept = loaded.transformer.state_dict(), original.transformer.state_dict()
    assert state["transformer_blocks.0.norm1.weight"].dtype == torch.float32
    assert state["img_in.weight"].dtype == torch.bfloat16
    assert all(torch.equal(value, kept[name].to(value.dtype)) for name, value in state.items())
    assert loaded.default_size == SIZE and loaded.source == f"{file}@{folder}"
    with pytest.raises(RlhfImgError, match="raw2.safetensors cannot be read"):
        load(f"{tmp_path / 'raw2.safetensors'}@{folder}", device="cpu")


def test_files_that_are_cut_short_or_missing_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for content, match in (
        (whole[:-100], "is cut short: it has .* bytes and should have"),
        (whole + b"x", "is damaged: it has"),
        (whole[:50], "is no safetensors file, or its head is damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "is no safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(RlhfImgError, match=f"{file} {match}"):
            load(folder)
    file.unlink()
    with pytest.raises(RlhfImgError, match="transformer\" has no .safetensors file"):
        load(folder)
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text('{"weight_map": {"img_in.weight": "part-1.safetensors"}}')
    with pytest.raises(RlhfImgError, match="part-1.safetensors cannot be read: No such file"):
        load(folder)


LOADING = """
import sys, threading, time, torch
from pathlib import Path
from rlhf_img.model.loading import load

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

load("playground", device="cpu")  # what libraries need for themselves
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], device="cpu", dtype=torch.bfloat16)
done.set()
thread.join()
print(peak - before, sum(p.nbytes for p in model.transformer.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("official", [False, True], ids=["folder", "single file"])
def test_loading_holds_each_weight_once(official: bool, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    config = {**pipeline.transformer.config, "num_layers": 60, "intermediate_size": 2048}
    pipeline.transformer = Krea2Transformer2DModel.from_config(config)
    pipeline.save_pretrained(tmp_path / "model")  # float32: twice what is loaded
    name = str(tmp_path / "model")
    if official:
        file = save_checkpoint(pipeline.transformer, tmp_path / "raw.safetensors", torch.float32)
        name = f"{file}@{name}"
    done = subprocess.run([sys.executable, "-c", LOADING, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, weights = map(int, done.stdout.split())
    assert weights > 80 * 2**20
    assert grown < 1.25 * weights
