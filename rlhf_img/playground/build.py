"""The stock classes of a Krea 2 pipeline, in small: configs that `Krea2Pipeline.from_pretrained` reads unchanged."""

from collections.abc import Iterable, Sequence

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLModel

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_LAYERS = (2, 3, 4)
"""Tapped hidden states of the text encoder: the last three of its four layers."""

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's pre-tokenisation, trained on captions and on the pipeline's chat template.

    The template's words become whole tokens, so its prefix is 34 tokens and its suffix 5, as with Qwen's own
    vocabulary; a word that no caption holds falls back to bytes.
    """
    template = (PREFIX + SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe([*captions, *[template] * 200], SPECIAL, min_frequency=20),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="right",
        model_max_length=2048,
    )
    lengths = len(fast(PREFIX).input_ids), len(fast(SUFFIX).input_ids)
    assert lengths == (34, 5), f"the template has {lengths} tokens; Krea 2's has (34, 5)"
    return fast


def train_bpe(texts: Iterable[str], special: Sequence[str], min_frequency: int) -> Tokenizer:
    """A byte-level BPE of at most 1024 tokens with Qwen's pre-tokenisation; the `special` tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_text_encoder(vocab_size: int) -> Qwen3VLModel:
    """A Qwen3-VL of four 128-wide layers; its vision tower is there (the class has one) and as small as it can be."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": 128,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
    )
    return Qwen3VLModel(config)


def build_vae() -> AutoencoderKLQwenImage:
    """The f8, 16-channel Qwen-Image autoencoder with 1.9 M parameters."""
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        dim_mult=[1, 1, 2, 4],
        num_res_blocks=1,
        z_dim=16,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    _init_for_images(vae)
    return vae


def _init_for_images(vae: AutoencoderKLQwenImage) -> None:
    """Gives a one-frame signal unit gain, and the posterior a small variance.

    On one frame a causal 3-D convolution reads only its last temporal tap, so the default initialisation (made for
    all three) shrinks the signal at each layer, and the latents drown in the posterior's noise.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.kaiming_normal_(module.weight.data[:, :, -1], nonlinearity="linear")
    vae.quant_conv.weight.data[vae.config.z_dim :].zero_()
    vae.quant_conv.bias.data[vae.config.z_dim :] = -6.0


def build_transformer() -> Krea2Transformer2DModel:
    """A Krea 2 of six 192-wide blocks, 3.3 M parameters: 6 query heads on 2 key/value heads of 32."""
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
        timestep_embed_dim=64,
        text_hidden_dim=128,
        num_text_layers=len(TEXT_LAYERS),
        text_num_attention_heads=4,
        text_num_key_value_heads=4,
        text_intermediate_size=256,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )
    _init_residuals(transformer)
    return transformer


def _init_residuals(transformer: Krea2Transformer2DModel) -> None:
    """Opens every residual gate, which the default initialisation leaves near zero with a random sign, keeps the sum
    of the branches near unit variance, and starts from the prediction 0."""
    torch.nn.init.zeros_(transformer.time_mod_proj.bias)
    transformer.time_mod_proj.weight.data *= 0.3
    for block in transformer.transformer_blocks:
        block.scale_shift_table.data[[2, 5]] = 1.0
        for last in (block.attn.to_out[0], block.ff.down):
            last.weight.data *= (2 / len(transformer.transformer_blocks)) ** 0.5
    torch.nn.init.zeros_(transformer.final_layer.linear.weight)
    torch.nn.init.zeros_(transformer.final_layer.linear.bias)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler with Krea's resolution-dependent exponential shift."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=6400,
        time_shift_type="exponential",
    )


def build_pipeline(captions: Iterable[str], seed: int = 0) -> Krea2Pipeline:
    """A whole stock pipeline with random weights, the same for the same seed."""
    tokenizer = build_tokenizer(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Krea2Pipeline(
            scheduler=build_scheduler(),
            vae=build_vae(),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=build_transformer(),
            text_encoder_select_layers=TEXT_LAYERS,
            patch_size=2,
        )
