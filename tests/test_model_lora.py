"""LoRA roles over one base, and their way out to stock pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers import Krea2Pipeline
from peft.tuners.lora import Linear
from test_model_krea import PROMPTS, SIZE, half_pipeline, tiny_pipeline
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import load_lora, save_lora
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model, from_pipeline
from rlhf_img.model.lora import (
    TARGETS,
    TIME_TARGETS,
    FusedLinear,
    active_role,
    add_role,
    drawing,
    role,
    role_parameters,
    roles,
)
from rlhf_img.model.sampling import initial_noise, sample


@pytest.fixture
def model() -> Model:
    return from_pipeline(tiny_pipeline(), default_size=SIZE)


def look(model: Model, images: int = 1) -> Tensor:
    """Velocities of images of one prompt under whatever role is active."""
    text = Conditioner(model).encode(["a red circle"])[0].expand(images, -1, -1)
    x = torch.randn(images, 4, 64, generator=torch.Generator().manual_seed(1))
    return velocity(model.transformer, x, torch.tensor(0.6), text, (2, 2))


def disturb(model: Model, name: str, seed: int) -> None:
    """Give a role's B matrices values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in role_parameters(model.transformer, name).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_a_new_role_is_the_reference_and_is_not_active(model: Model) -> None:
    before = look(model)
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    assert roles(model.transformer) == ["policy"] and active_role(model.transformer) is None
    assert torch.equal(look(model), before)
    with role(model.transformer, "policy"):
        assert active_role(model.transformer) == "policy"
        assert torch.equal(look(model), before)  # B = 0: exactly nothing is added


def test_switching_roles_leaks_nothing_bit_for_bit(model: Model) -> None:
    transformer = model.transformer
    base = look(model)
    add_role(transformer, "a", rank=4, alpha=8.0, seed=1)
    disturb(model, "a", 1)
    with role(transformer, "a"):
        alone = look(model)
    add_role(transformer, "b", rank=2, alpha=2.0, targets=("attn.to_q", "ff.down"), seed=2)
    disturb(model, "b", 2)
    with role(transformer, "b"):
        b = look(model)
    assert not torch.equal(alone, base) and not torch.equal(b, base) and not torch.equal(alone, b)
    for _ in range(2):
        with role(transformer, "a"):
            assert torch.equal(look(model), alone)
            with role(transformer, None):
                assert torch.equal(look(model), base)
            with role(transformer, "b"):
                assert torch.equal(look(model), b)
            assert torch.equal(look(model), alone)
        assert torch.equal(look(model), base)
    with pytest.raises(KeyError), role(transformer, "a"):
        raise KeyError
    assert active_role(transformer) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_pefts_with_fewer_passes(dtype: torch.dtype) -> None:
    model = from_pipeline(tiny_pipeline() if dtype == torch.float32 else half_pipeline(), default_size=SIZE)
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    disturb(model, "policy", 1)
    parameters = list(role_parameters(model.transformer, "policy").values())

    def found() -> tuple[Tensor, Tensor, Tensor]:
        with role(model.transformer, "policy"):
            v = look(model)
            with drawing():  # float32: the adapter is added to the weights where that is less work
                drawn = look(model, images=64)
        gradients = torch.autograd.grad(v.square().sum(), parameters)
        return v.detach(), torch.cat([g.flatten() for g in gradients]), drawn

    fused = found()
    layers = [layer for layer in model.transformer.modules() if isinstance(layer, FusedLinear)]
    assert len(layers) == len(parameters) // 2
    for layer in layers:
        layer.__class__ = Linear
    for ours, stock in zip(fused, found(), strict=True):
        assert float((ours - stock).norm() / stock.norm()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_fused_layer_takes_what_only_pefts_own_way_can(model: Model) -> None:
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    disturb(model, "policy", 1)
    layer = next(layer for layer in model.transformer.modules() if isinstance(layer, FusedLinear)).bfloat16()
    layer.lora_A["policy"].float(), layer.lora_B["policy"].float()
    layer.set_adapter("policy")
    layer.enable_adapters(True)
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    half = layer(x)  # no autocast: two dtypes
    assert half.dtype == torch.bfloat16 and torch.equal(half, Linear.forward(layer, x))
    layer.merge()
    assert torch.allclose(layer(x), half, atol=0.05, rtol=0.05)  # merged: not added a second time


def test_a_step_of_one_role_changes_nothing_else(model: Model) -> None:
    transformer = model.transformer
    for name in ("a", "b"):
        add_role(transformer, name, rank=4, alpha=8.0)
        disturb(model, name, 3)
    parameters = role_parameters(transformer, "a")
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    with role(transformer, "a"):
        loss = look(model).square().sum()
    loss.backward()  # after the block: the graph keeps its gradients
    optimizer.step()
    own = {id(p) for p in parameters.values()}
    assert all(p.grad is not None for p in parameters.values())
    assert all(p.grad is None for p in transformer.parameters() if id(p) not in own)
    changed = {key for key, value in transformer.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".a." in key for key in changed)
    assert len(changed) == len(parameters)


def test_only_roles_are_trainable_and_float32_whatever_the_base(model: Model) -> None:
    half = from_pipeline(half_pipeline(), default_size=SIZE)
    add_role(half.transformer, "policy", rank=4, alpha=8.0)
    parameters = role_parameters(half.transformer, "policy")
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    trainable = {id(p) for p in half.transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters.values()}
    blocks = len(half.transformer.transformer_blocks)
    assert len(parameters) == 2 * (len(TARGETS) * blocks + len(TIME_TARGETS))
    with role(half.transformer, "policy"):
        look(half).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())


def test_a_role_depends_on_its_seed_alone(model: Model) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        add_role(model.transformer, name, rank=4, alpha=8.0, seed=seed)
    assert torch.equal(torch.rand(3), expected)  # the global generator was left alone
    a, b, c = (role_parameters(model.transformer, name) for name in "abc")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(a[key], c[key]) == key.endswith("lora_B") for key in a)  # B is 0 in both


def test_gradient_checkpointing_reaches_a_role(model: Model) -> None:
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    disturb(model, "policy", 1)
    parameters = list(role_parameters(model.transformer, "policy").values())
    with role(model.transformer, "policy"):
        plain = torch.autograd.grad(look(model).square().sum(), parameters)
        model.transformer.enable_gradient_checkpointing()
        again = torch.autograd.grad(look(model).square().sum(), parameters)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_role_errors_are_clear(model: Model) -> None:
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    with (
        pytest.raises(RlhfImgError, match='there is no role "polic"; did you mean "policy"'),
        role(model.transformer, "polic"),
    ):
        pass
    with pytest.raises(RlhfImgError, match='needs a new name .*got "policy"'):
        add_role(model.transformer, "policy")
    with pytest.raises(RlhfImgError, match='is called "attn.to_qq"; did you mean "attn.to_q"'):
        add_role(model.transformer, "student", targets=("attn.to_qq",))
    with pytest.raises(RlhfImgError, match="rank of 1 or more"):
        add_role(model.transformer, "student", rank=0)


@pytest.mark.parametrize("targets", [TARGETS, ("attn.to_v", "ff.up", *TIME_TARGETS)])
def test_an_exported_lora_is_the_role_in_a_stock_pipeline(
    model: Model, targets: tuple[str, ...], tmp_path: Path
) -> None:
    transformer = model.transformer
    add_role(transformer, "other", rank=2, alpha=2.0, seed=5)  # must not find its way into the file
    disturb(model, "other", 5)
    add_role(transformer, "policy", rank=4, alpha=12.0, targets=targets)  # a scale of 3, so that a lost alpha shows
    disturb(model, "policy", 1)
    file = save_lora(model, "policy", tmp_path / "lora")
    assert [path.name for path in file.parent.iterdir()] == ["pytorch_lora_weights.safetensors"]
    seeds = [1, 2, 3, 4]
    with role(transformer, "policy"):
        ours = sample(model, Conditioner(model), PROMPTS, seeds, num_steps=4)
    base = sample(model, Conditioner(model), PROMPTS, seeds, num_steps=4)
    assert (ours - base).abs().max() > 1e-2

    stock: Krea2Pipeline = tiny_pipeline()
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path / "lora")
    x = initial_noise(model, seeds, SIZE, SIZE)
    arguments = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "output_type": "latent",
    }
    expected = stock(PROMPTS, latents=x, **arguments).images
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    fresh = from_pipeline(tiny_pipeline(), default_size=SIZE)
    load_lora(fresh, tmp_path / "lora", "again")
    assert active_role(fresh.transformer) is None
    with role(fresh.transformer, "again"):
        loaded = sample(fresh, Conditioner(fresh), PROMPTS, seeds, num_steps=4)
    assert torch.equal(loaded, ours)
    saved, read = role_parameters(transformer, "policy"), role_parameters(fresh.transformer, "again")
    assert saved.keys() == read.keys() and all(p.requires_grad for p in read.values())


def test_lora_files_that_cannot_be_used_are_said_clearly(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match='there is no role "policy"'):
        save_lora(model, "policy", tmp_path)
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RlhfImgError, match="give a writable folder"):
        save_lora(model, "policy", tmp_path / "file")
    with pytest.raises(RlhfImgError, match="holds no pytorch_lora_weights.safetensors"):
        load_lora(model, tmp_path, "new")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(RlhfImgError, match="is not a LoRA for this model"):
        load_lora(model, tmp_path, "new")
    assert roles(model.transformer) == ["policy"]
