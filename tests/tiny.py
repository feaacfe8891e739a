"""A tiny random Krea 2 at 32 px for tests of training: every weight has a value, so that no part can hide."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

from rlhf_img.model.loading import SETTINGS_FILE, Model, from_pipeline
from rlhf_img.playground import build

PROMPTS = ["a red circle", "two blue stars above a green cross on grey", "a pink square", "three red stars"]
SIZE = 32


def tiny_model() -> Model:
    return from_pipeline(tiny_pipeline(), default_size=SIZE)


def tiny_pipeline() -> Krea2Pipeline:
    generator = torch.Generator().manual_seed(7)
    tokenizer = build.build_tokenizer(PROMPTS * 30)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Krea2Transformer2DModel(
            in_channels=64, num_layers=2, attention_head_dim=32, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=128, num_text_layers=3,
            text_num_attention_heads=4, text_num_key_value_heads=2, text_intermediate_size=64,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1, z_dim=16)
        encoder = build.build_text_encoder(len(tokenizer))
        for parameter in [*transformer.parameters(), *vae.parameters()]:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Krea2Pipeline(
        scheduler=build.build_scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer,
        text_encoder_select_layers=build.TEXT_LAYERS, patch_size=2,
    )  # fmt: skip


def save_tiny(folder: Path) -> Path:
    """The tiny pipeline as a folder that `--model` takes."""
    tiny_pipeline().save_pretrained(folder)
    (folder / SETTINGS_FILE).write_text(json.dumps({"default_size": SIZE}))
    return folder
