"""Tiny Cosmos-Predict2.5 and DINOv2: the real classes with random weights, in the layout of the public checkpoints."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

# Equal to Qwen2.5-VL's template for a text-only chat.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Return a Qwen2.5-VL of three thin blocks and a byte-level tokenizer."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    text = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)), tokenizer


def wan() -> AutoencoderKLWan:
    """Return Wan's VAE with four latent channels."""
    torch.manual_seed(0)
    settings = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    return AutoencoderKLWan(**settings, latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[2.0, 0.5, 1.5, 3.0])


def dinov2() -> Dinov2Model:
    """Return a DINOv2 of two thin blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    return Dinov2Model(Dinov2Config(**shape, patch_size=14))


def save_public_models(folder: Path) -> None:
    """Save `cosmos`, in the layout of Cosmos-Predict2.5 for the transformer of `paper_config`, and `dinov2` below `folder`."""
    torch.manual_seed(0)
    paper_config(folder).method.model.video_dit.build().save_pretrained(folder / "cosmos" / "transformer")
    model, tokenizer = qwen()
    model.save_pretrained(folder / "cosmos" / "text_encoder")
    tokenizer.save_pretrained(folder / "cosmos" / "tokenizer")
    wan().save_pretrained(folder / "cosmos" / "vae")
    dinov2().save_pretrained(folder / "dinov2")


def paper_config(folder: Path, **data):
    """Return the paper's default recipe at a tiny size. It reads the models of `save_public_models`.

    `data` sets fields of its `DataConfig`.
    """
    from agra.recipes import agra_dino_l8
    from agra.wam.bridge import bridged_layers

    config, cosmos = agra_dino_l8(), str(folder / "cosmos")
    model = replace(
        config.method.model,
        frame_size=(32, 48),
        num_frames=5,
        codec=replace(config.method.model.codec, source=cosmos, revision=None, channels=4, dtype="float32"),
        text=replace(config.method.model.text, source=cosmos, revision=None, length=160, dtype="float32"),
        video_dit=replace(
            config.method.model.video_dit, latent_channels=4, num_layers=3, num_heads=2, head_dim=24, adaln_lora_dim=16,
            text_dim=20, text_projection_dim=96,
        ),
        bridge=replace(config.method.model.bridge, layers=bridged_layers(3, 2), num_layers=1, num_heads=2, head_dim=24),
        action_dit=replace(
            config.method.model.action_dit, state_dim=4, action_dim=3, horizon=8, num_blocks=2, num_heads=2, head_dim=8,
            guidance_dim=48, hidden_dim=16,
        ),
    )  # fmt: skip
    teacher = replace(
        config.method.alignment.teacher, source=str(folder / "dinov2"), input_size=(28, 42), precision="float32"
    )
    method = replace(
        config.method,
        model=model,
        alignment=replace(config.method.alignment, layers=(1,), hidden_dim=16, teacher=teacher),
    )
    stage = replace(
        config.stage, steps=4, batch_size=8, save_every=2, validate_every=2, log_every=1, precision="float32"
    )
    settings = replace(config.data, frame_stride=1, validation_fraction=0.25, **data)
    return replace(config, method=method, stage=stage, data=settings)
