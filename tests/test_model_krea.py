"""The model room against the stock pipeline, on a tiny random Krea 2 whose every weight matters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import Krea2Pipeline
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm
from tiny import tiny_pipeline
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model import conditioning
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.forward import fuse_text, velocity, velocity_mixed
from rlhf_img.model.loading import Model, from_pipeline, load
from rlhf_img.model.sampling import initial_noise, sample
from rlhf_img.model.vae import decode, encode, pack, single_frame, unpack
from rlhf_img.playground import build

PROMPTS = ["a red circle", "two blue stars above a green cross on grey", "a pink square", ""]
SIZE = 32  # 2 x 2 tokens of 16 px: small, and enough for rows and columns to differ



def half_pipeline() -> Krea2Pipeline:
    """In bfloat16 but for the norms, as `from_pretrained` keeps them."""
    pipeline = tiny_pipeline().to(dtype=torch.bfloat16)
    for module in pipeline.transformer.modules():
        if isinstance(module, Krea2RMSNorm):
            module.float()
    return pipeline


@pytest.fixture(scope="module")
def model() -> Model:
    return from_pipeline(tiny_pipeline(), default_size=SIZE)


@pytest.fixture(scope="module")
def stock() -> Krea2Pipeline:
    """The same weights in other modules, with the stock attention processor: nothing of ours is in it."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_two_fixtures_are_the_same_model(model: Model, stock: Krea2Pipeline) -> None:
    ours, theirs = model.transformer.state_dict(), stock.transformer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not any(p.requires_grad for p in model.transformer.parameters())
    assert not model.transformer.training and not model.vae.training and not model.text_encoder.training


@pytest.mark.parametrize("guidance", [0.0, 3.5])
def test_sampling_equals_the_stock_pipeline(model: Model, stock: Krea2Pipeline, guidance: float) -> None:
    x = initial_noise(model, [1, 2, 1, 2], SIZE, SIZE)
    expected = stock(
        PROMPTS,
        negative_prompt="" if guidance else None,
        height=SIZE,
        width=SIZE,
        num_inference_steps=8,
        guidance_scale=guidance,
        latents=x,
        output_type="latent",
    ).images
    ours = sample(model, Conditioner(model), PROMPTS, [1, 2, 1, 2], num_steps=8, guidance=guidance)
    assert (expected - x).abs().max() > 0.5  # the model does something
    assert (expected[0] - expected[2]).abs().max() > 0.1  # and reads its prompt
    # Guided latents reach 5 and more, where a float32 is itself only known to 5e-7 a step: hence the relative part.
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_seeds_give_the_stock_noise(model: Model, stock: Krea2Pipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    expected = stock.prepare_latents(2, 16, 48, SIZE, torch.float32, torch.device("cpu"), generators)
    assert torch.equal(initial_noise(model, [5, 9], 48, SIZE), expected)


def test_an_image_depends_on_its_prompt_and_seed_alone(model: Model) -> None:
    conditioner = Conditioner(model)
    together = sample(model, conditioner, PROMPTS, [1, 2, 3, 4], num_steps=3, batch_size=2)
    alone = sample(model, conditioner, [PROMPTS[1]], [2], num_steps=3)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    other_seed = sample(model, conditioner, [PROMPTS[1]], [3], num_steps=3)
    assert (alone - other_seed).abs().max() > 0.1


def test_progress_counts_image_steps(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    sample(
        model,
        Conditioner(model),
        ["a red circle"] * 3,
        [1, 2, 3],
        num_steps=2,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_sampling_refuses_bad_sizes_and_guidance(model: Model) -> None:
    conditioner = Conditioner(model)
    with pytest.raises(RlhfImgError, match="multiples of 16 pixels; got 40 x 32"):
        sample(model, conditioner, ["a"], [0], height=40, width=32)
    with pytest.raises(RlhfImgError, match="guidance must be 0"):
        sample(model, conditioner, ["a"], [0], guidance=-1.0)
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample(model, conditioner, ["a", "b"], [0])


def stock_velocity(stock: Krea2Pipeline, prompts: list[str], x: Tensor, sigma: Tensor, grid: tuple[int, int]) -> Tensor:
    """The stock forward, padded to 512 text tokens and masked."""
    hidden, mask = stock.get_text_hidden_states(prompts)
    ids = stock.prepare_position_ids(hidden.shape[1], *grid, x.device)
    return stock.transformer(x, hidden, sigma, ids, encoder_attention_mask=mask, return_dict=False)[0]


def test_velocity_and_its_gradients_equal_the_stock_forward() -> None:
    ours, stock = from_pipeline(tiny_pipeline()), tiny_pipeline()
    prompts, sigma, grid = (
        ["a red circle", "a pink square on grey", "a red circle"],
        torch.tensor([0.9, 0.2, 0.6]),
        (2, 3),
    )
    x = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(1))
    weigh = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(2))
    ours.transformer.requires_grad_(True)
    texts = Conditioner(ours).encode(prompts)
    v = velocity_mixed(ours.transformer, x, sigma, texts, grid)
    with torch.no_grad():
        hidden_check = stock.get_text_hidden_states(prompts)[0]
    assert hidden_check.shape[1] == 512
    expected = stock_velocity(stock, prompts, x, sigma, grid)
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)
    (v * weigh).sum().backward()
    (expected * weigh).sum().backward()
    for (name, mine), theirs in zip(ours.transformer.named_parameters(), stock.transformer.parameters(), strict=True):
        assert mine.grad is not None, name  # fusion weights too: they are trained here, so nothing was kept
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=2e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_gradient_checkpointing_changes_no_gradient(model: Model) -> None:
    transformer = model.transformer
    (text,) = Conditioner(model).encode(["a red circle"])
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    weight = transformer.transformer_blocks[0].attn.to_k.weight.requires_grad_(True)
    try:
        grads = []
        for checkpointing in (False, True):
            transformer.gradient_checkpointing = False
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            v = velocity(transformer, x, torch.tensor(0.5), text[None], (2, 2))
            grads += torch.autograd.grad(v.square().sum(), weight)
    finally:
        transformer.gradient_checkpointing = False
        weight.requires_grad_(False)
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])


def test_one_sigma_for_all_is_the_same_as_one_each(model: Model) -> None:
    texts = Conditioner(model).encode(["a red circle"] * 3)
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    one = velocity(model.transformer, x, torch.tensor(0.7), torch.stack(texts), (2, 2))
    each = velocity(model.transformer, x, torch.full((3,), 0.7), torch.stack(texts), (2, 2))
    torch.testing.assert_close(one, each, atol=1e-5, rtol=0)


def test_a_mixed_batch_keeps_its_order(model: Model) -> None:
    texts = Conditioner(model).encode([PROMPTS[1], "", PROMPTS[0], PROMPTS[1]])
    x = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.1, 0.4, 0.6, 0.9])
    mixed = velocity_mixed(model.transformer, x, sigma, texts, (2, 2))
    for i in range(4):
        alone = velocity(model.transformer, x[i : i + 1], sigma[i], texts[i][None], (2, 2))
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=0)


def test_velocity_refuses_shapes_that_do_not_fit(model: Model) -> None:
    text = torch.zeros(2, 5, 128)
    with pytest.raises(ValueError, match="2 images of 4 tokens do not fit the grid \\(3, 2\\)"):
        velocity(model.transformer, torch.zeros(2, 4, 64), torch.tensor(0.5), text, (3, 2))
    with pytest.raises(ValueError, match="3 sigmas"):
        velocity(model.transformer, torch.zeros(2, 4, 64), torch.zeros(3), text, (2, 2))


def test_a_table_made_under_inference_mode_can_be_trained_with() -> None:
    model = from_pipeline(tiny_pipeline())
    (text,) = Conditioner(model).encode(["a red circle"])
    x = torch.zeros(1, 10, 64)  # a grid no other test uses, so that the table is made here
    with torch.inference_mode():
        velocity(model.transformer, x, torch.tensor(0.5), text[None], (5, 2))
    weight = model.transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)
    velocity(model.transformer, x, torch.tensor(0.5), text[None], (5, 2)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_bfloat16_base_with_float32_latents() -> None:
    model = from_pipeline(half_pipeline())
    assert model.transformer.img_in.weight.dtype == torch.bfloat16
    texts = Conditioner(model).encode(["a red circle"])
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    v = velocity(model.transformer, x, torch.tensor(0.5), texts[0][None], (2, 2))
    full = from_pipeline(tiny_pipeline())
    expected = velocity(
        full.transformer, x, torch.tensor(0.5), Conditioner(full).encode(["a red circle"])[0][None], (2, 2)
    )
    assert v.dtype == torch.float32
    assert (v - expected).norm() / expected.norm() < 0.03  # bf16 has 8 bits
    latents = sample(model, Conditioner(model), ["a red circle"], [0], num_steps=2, height=SIZE, width=SIZE)
    assert latents.dtype == torch.float32 and decode(model, latents, SIZE, SIZE).dtype == torch.float32


# Conditioning


def test_features_are_the_stock_ones_without_their_padding(model: Model, stock: Krea2Pipeline) -> None:
    features = Conditioner(model).encode(PROMPTS)
    with torch.no_grad():
        hidden, mask = stock.get_text_hidden_states(PROMPTS)
        fused = stock.transformer.txt_in(stock.transformer.text_fusion(hidden, mask[:, None, None, :]))
    for ours, theirs, real in zip(features, fused, mask, strict=True):
        torch.testing.assert_close(ours, theirs[real], atol=1e-5, rtol=0)
    assert len(features[3]) == 5  # the empty prompt is its suffix


def test_a_long_prompt_is_cut_as_in_the_stock_pipeline(model: Model, stock: Krea2Pipeline) -> None:
    long = "a red circle on grey " * 200
    (ours,) = Conditioner(model).encode([long])
    with torch.no_grad():
        hidden, mask = stock.get_text_hidden_states([long])
        fused = stock.transformer.txt_in(stock.transformer.text_fusion(hidden))
    assert mask.all() and len(ours) == conditioning.MAX_TOKENS
    torch.testing.assert_close(ours, fused[0], atol=1e-5, rtol=0)


def test_a_prompt_is_encoded_once_and_the_cache_is_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    forward = model.text_encoder.forward

    def counting(**arguments: Tensor) -> object:
        encoded.append(len(arguments["input_ids"]))
        return forward(**arguments)

    monkeypatch.setattr(model.text_encoder, "forward", counting)
    conditioner = Conditioner(model)
    first = conditioner.encode(["a red circle", "a pink square", "a red circle"])
    again = conditioner.encode(["a pink square"])
    assert sum(encoded) == 2
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])
    conditioner.clear()
    conditioner.encode(["a red circle"])
    assert sum(encoded) == 3

    small = Conditioner(model, cache_bytes=first[0].nbytes)  # room for one
    encoded.clear()
    small.encode(["a red circle"])
    small.encode(["two red circles on grey"])  # too long to be kept: it drives out what was there
    small.encode(["a red circle"])
    small.encode(["a red circle"])
    assert sum(encoded) == 3


def test_trained_fusion_weights_are_never_read_from_the_cache() -> None:
    model = from_pipeline(tiny_pipeline())
    conditioner = Conditioner(model)
    before = conditioner.encode(["a red circle"])[0]
    model.transformer.txt_in.requires_grad_(True)
    live = conditioner.encode(["a red circle"])[0]
    torch.testing.assert_close(live, before, atol=1e-6, rtol=0)
    assert live.requires_grad and not before.requires_grad
    with torch.no_grad():
        model.transformer.txt_in.linear_2.bias += 1
    torch.testing.assert_close(conditioner.encode(["a red circle"])[0], before + 1, atol=1e-5, rtol=0)


def test_fusing_reads_all_tapped_layers(model: Model) -> None:
    hidden = torch.randn(1, 6, 3, 128, generator=torch.Generator().manual_seed(1))
    base = fuse_text(model.transformer, hidden)
    for layer in range(3):
        changed = hidden.clone()
        changed[:, :, layer] = 0
        assert (fuse_text(model.transformer, changed) - base).abs().max() > 1e-3


# Autoencoder


def test_pack_puts_the_channel_slowest_and_rows_first() -> None:
    latents = torch.arange(2 * 4 * 4).float().reshape(1, 2, 4, 4)  # channel 0: 0 to 15, channel 1: 16 to 31
    tokens = pack(latents, 2)
    assert tokens[0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert tokens[0, 2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]
    assert torch.equal(unpack(tokens, (2, 2), 2), latents)


def test_pack_is_the_stock_pipelines(stock: Krea2Pipeline) -> None:
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    tokens = pack(latents, 2)
    assert torch.equal(tokens, stock._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(unpack(tokens, (2, 3), 2), stock._unpack_latents(tokens, 32, 48)[:, :, 0])


def test_decode_equals_the_stock_pipeline(model: Model, stock: Krea2Pipeline) -> None:
    x = initial_noise(model, [1, 2, 3], SIZE, 48)
    expected = stock(
        ["a"] * 3, height=SIZE, width=48, num_inference_steps=1, guidance_scale=0.0, latents=x, output_type="pt"
    ).images
    latents = sample(model, Conditioner(model), ["a"] * 3, [1, 2, 3], num_steps=1, height=SIZE, width=48)
    images = decode(model, latents, SIZE, 48, batch_size=2)
    assert images.shape == (3, 3, SIZE, 48) and images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_encode_equals_the_stock_autoencoder(model: Model, stock: Krea2Pipeline) -> None:
    images = torch.rand(3, 3, SIZE, 48, generator=torch.Generator().manual_seed(1))
    z = stock.vae.encode(images[:, :, None] * 2 - 1).latent_dist.mode()[:, :, 0]
    mean = torch.tensor(stock.vae.config.latents_mean)[:, None, None]
    std = torch.tensor(stock.vae.config.latents_std)[:, None, None]
    expected = stock._pack_latents((z - mean) / std, 3, 16, 4, 6)
    torch.testing.assert_close(encode(model, images, batch_size=2), expected, atol=1e-5, rtol=0)


def test_single_frame_is_the_stock_autoencoder_with_its_gradients_and_leaves_no_trace() -> None:
    vae = tiny_pipeline().vae
    images = torch.rand(2, 3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def reconstruct() -> tuple[Tensor, list[Tensor]]:
        vae.zero_grad()
        out = vae.decode(vae.encode(images).latent_dist.mode()).sample
        out.square().mean().backward()
        return out.detach(), [p.grad.clone() for p in vae.parameters() if p.grad is not None]

    slow, slow_grads = reconstruct()
    with single_frame(vae), single_frame(vae):
        fast, fast_grads = reconstruct()
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    for mine, theirs in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    assert not any("forward" in vars(module) for module in vae.modules())
    assert torch.equal(reconstruct()[0], slow)


def test_single_frame_refuses_a_video() -> None:
    vae = tiny_pipeline().vae
    with single_frame(vae), pytest.raises(ValueError, match="got 4 frames"):
        vae.encode(torch.zeros(1, 3, 5, 32, 32))


# Loading


def test_a_saved_stock_pipeline_loads_and_gives_the_same_latents(model: Model, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "rlhf_img.json").write_text('{"default_size": 48}')
    loaded = load(tmp_path / "model", device="cpu")
    assert (loaded.default_size, loaded.patch_size, loaded.is_distilled) == (48, 2, False)
    assert loaded.text_layers == build.TEXT_LAYERS and loaded.source == str(tmp_path / "model")
    arguments = {"num_steps": 2, "height": SIZE, "width": SIZE}
    ours = sample(loaded, Conditioner(loaded), PROMPTS[:2], [1, 2], **arguments)
    expected = sample(model, Conditioner(model), PROMPTS[:2], [1, 2], **arguments)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    half = load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert half.transformer.img_in.weight.dtype == torch.bfloat16
    (tmp_path / "model" / "rlhf_img.json").write_text('{"default_size": "big"}')
    with pytest.raises(RlhfImgError, match="default_size must be a positive whole number; got 'big'"):
        load(tmp_path / "model")


def test_the_stock_pipeline_over_our_modules_still_takes_masks(model: Model, stock: Krea2Pipeline) -> None:
    x = initial_noise(model, [1, 2], SIZE, SIZE)
    arguments = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
        "output_type": "latent",
    }
    over_ours = model.pipeline()
    over_ours.set_progress_bar_config(disable=True)
    ours = over_ours(PROMPTS[:2], latents=x, **arguments).images
    torch.testing.assert_close(ours, stock(PROMPTS[:2], latents=x, **arguments).images, atol=1e-5, rtol=0)


def test_what_cannot_be_loaded_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match='there is no model "playgrond"; give "playground", a folder'):
        load("playgrond")
    with pytest.raises(RlhfImgError, match="has no model_index.json"):
        load(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(RlhfImgError, match="holds a FluxPipeline; only Krea2Pipeline"):
        load(tmp_path)
    index.write_text("{")
    with pytest.raises(RlhfImgError, match="is not JSON"):
        load(tmp_path)
    index.write_text(json.dumps({"_class_name": "Krea2Pipeline", "vae": ["diffusers", "AutoencoderKLQwenImage"]}))
    with pytest.raises(RlhfImgError, match="has no transformer; copy or save the whole pipeline again"):
        load(tmp_path)


def test_a_missing_embedded_model_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_img.model.loading.resources.files", lambda package: tmp_path)
    with pytest.raises(RlhfImgError, match="rlhf-img playground pretrain"):
        load("playground")
