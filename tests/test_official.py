"""Weights in the layout of krea-ai/krea-2 and LoRAs in ComfyUI's: names, shapes and values, both ways."""

from pathlib import Path

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_krea2_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from test_training import run
from tiny import PROMPTS, save_tiny, tiny_model

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import save_comfyui_lora, save_lora
from rlhf_img.model.loading import load
from rlhf_img.model.lora import TARGETS, TIME_TARGETS, add_role, role_parameters
from rlhf_img.model.official import from_official, load_checkpoint, official_module, save_checkpoint, to_official
from rlhf_img.model.sampling import sample

SHAPES = {"wq": 6144, "wk": 1536, "wv": 1536, "gate": 6144, "wo": 6144}
"""Rows of the attention layers of a block, of 6144 columns."""


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Every weight of the 12.8 B checkpoint, written down from the classes of krea-ai/krea-2's mmdit.py."""
    found: dict[str, tuple[int, ...]] = {
        "first.weight": (6144, 64), "first.bias": (6144,), "tmlp.0.weight": (6144, 256), "tmlp.0.bias": (6144,),
        "tmlp.2.weight": (6144, 6144), "tmlp.2.bias": (6144,), "tproj.1.weight": (36864, 6144),
        "tproj.1.bias": (36864,), "txtfusion.projector.weight": (1, 12), "txtmlp.0.scale": (2560,),
        "txtmlp.1.weight": (6144, 2560), "txtmlp.1.bias": (6144,), "txtmlp.3.weight": (6144, 6144),
        "txtmlp.3.bias": (6144,), "last.linear.weight": (64, 6144), "last.linear.bias": (64,),
        "last.norm.scale": (6144,), "last.modulation.lin": (2, 6144),
    }  # fmt: skip
    stacks = [(f"blocks.{i}", 6144, 16384, SHAPES) for i in range(28)]
    stacks += [(f"txtfusion.{stack}_blocks.{i}", 2560, 6912, dict.fromkeys(SHAPES, 2560))
               for stack in ("layerwise", "refiner") for i in range(2)]
    for block, width, inner, rows in stacks:
        found |= {f"{block}.attn.{name}.weight": (count, width) for name, count in rows.items()}
        found |= {f"{block}.attn.qknorm.{name}.scale": (128,) for name in ("qnorm", "knorm")}
        found |= {f"{block}.mlp.{name}.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{block}.mlp.down.weight": (width, inner), f"{block}.prenorm.scale": (width,),
                  f"{block}.postnorm.scale": (width,)}
        if block.startswith("blocks."):
            found[f"{block}.mod.lin"] = (36864,)
    return found


def test_all_names_and_shapes_of_the_full_model_go_there_and_back() -> None:
    with torch.device("meta"):
        state = Krea2Transformer2DModel().state_dict()
    official = to_official(state)
    assert {name: tuple(value.shape) for name, value in official.items()} == official_shapes()
    assert sum(value.numel() for value in official.values()) == pytest.approx(12.82e9, rel=1e-3)
    shapes = {name: value.shape for name, value in state.items()}
    assert {name: value.shape for name, value in from_official(official, state).items()} == shapes
    theirs = convert_krea2_transformer_checkpoint_to_diffusers(dict(official))
    assert {name: value.shape for name, value in theirs.items()} == shapes


def test_values_go_there_and_back_and_diffusers_reads_them(tmp_path: Path) -> None:
    model = tiny_model()
    state = model.transformer.state_dict()
    file = save_checkpoint(model.transformer, tmp_path / "raw.safetensors", torch.float32)
    theirs = convert_krea2_transformer_checkpoint_to_diffusers(load_file(file))
    other = tiny_model().transformer
    for parameter in other.parameters():
        parameter.data.zero_()
    load_checkpoint(other, file)
    assert theirs.keys() == state.keys() == other.state_dict().keys()
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name], value) and torch.equal(theirs[name], value), name
    # As some tools save it, below a prefix.
    prefixed = {f"model.diffusion_model.{name}": value for name, value in load_file(file).items()}
    assert all(torch.equal(value, state[name]) for name, value in from_official(prefixed, state).items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("first.bias"), "first.bias is missing"),
    (lambda s: s.update({"blocks.0.attn.wqq.weight": s["first.bias"]}), "1 are unknown"),
    (lambda s: s.update({"first.bias": s["first.bias"][:-1]}), "first.bias has the shape"),
])  # fmt: skip
def test_what_is_no_checkpoint_of_this_model_is_refused(change: object, message: str) -> None:
    state = tiny_model().transformer.state_dict()
    official = to_official(state)
    change(official)  # type: ignore[operator]
    with pytest.raises(RlhfImgError, match=message):
        from_official(official, state)


def test_every_layer_that_an_adapter_can_change_has_an_official_name() -> None:
    for target in TARGETS:
        assert official_module(f"transformer_blocks.3.{target}").startswith("blocks.3.")
    assert [official_module(target) for target in TIME_TARGETS] == ["tmlp.2", "tproj.1"]
    with pytest.raises(ValueError, match="no layer"):
        official_module("transformer_blocks.3.attn.to_x")


def test_a_comfyui_lora_at_strength_1_is_the_adapter(tmp_path: Path) -> None:
    """What ComfyUI does with the file, W += alpha / rank B A on the official names, is what merging here does."""
    model = tiny_model()
    add_role(model.transformer, "policy", rank=4, alpha=6.0)
    for i, parameter in enumerate(role_parameters(model.transformer, "policy").values()):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    file = load_file(save_comfyui_lora(model, "policy", tmp_path / "comfy.safetensors"))
    ours = load_file(save_lora(model, "policy", tmp_path / "lora"))
    weights = to_official(tiny_model().transformer.state_dict())
    modules = {key.removesuffix(".alpha") for key in file if key.endswith(".alpha")}
    assert len(file) == 3 * len(modules)
    for module in modules:
        a, b, alpha = (file[f"{module}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        weights[f"{module.removeprefix('diffusion_model.')}.weight"] += float(alpha) / len(a) * b @ a
    model.transformer.fuse_lora(adapter_names=["policy"])
    model.transformer.unload_lora()
    merged = to_official(model.transformer.state_dict())
    assert weights.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5, msg=name)
    # The names are those that diffusers, too, takes for ComfyUI's.
    bare = _convert_non_diffusers_krea2_lora_to_diffusers({k: v for k, v in file.items() if not k.endswith(".alpha")})
    assert bare.keys() == ours.keys() and all(torch.equal(bare[key], ours[key]) for key in ours)


def test_models_are_converted_both_ways_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model")
    assert run(monkeypatch, ["export", str(folder), "--out", str(tmp_path / "official")]) == 0
    file = tmp_path / "official" / "checkpoint.safetensors"
    back = tmp_path / "back"
    assert run(monkeypatch, ["export", str(file), "--like", str(folder), "--out", str(back)]) == 0
    one, other = load(folder, dtype=torch.float32), load(back / "pipeline", dtype=torch.float32)
    latents = [sample(model, Conditioner(model), PROMPTS[:1], [3], num_steps=2) for model in (one, other)]
    assert torch.equal(*latents)
    refused = {
        "give --like": [str(file)], "only a run with a LoRA": [str(folder), "--format", "comfyui"],
        "comfyui": [str(folder), "--format", "comfyu"], "--like is for": [str(folder), "--like", str(folder)],
    }  # fmt: skip
    for i, (message, words) in enumerate(refused.items()):
        assert run(monkeypatch, ["export", *words, "--out", str(tmp_path / f"out{i}")]) == 2
        assert message in capsys.readouterr().err
