"""Section 5: the frozen networks: clips through Wan's VAE, images through DINOv2-B, an instruction through the 7B encoder."""

from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from agra.alignment.teacher import Teacher, TeacherConfig, teacher_shape
from agra.training.memory_estimate import count_flops
from agra.wam.text import CosmosReasonEncoder
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting, num_bytes, wam_of


def run(setting: Setting, section: Section) -> None:
    """Each network alone."""
    section.measure("Wan VAE, clips of a window", lambda: _codec(setting), needs=12)
    section.measure("DINOv2-B, images at 448 x 448", lambda: _teacher(setting), needs=8)
    section.measure("7B text encoder, an instruction", lambda: _text(setting), needs=20)


def _codec(setting: Setting) -> Figures:
    codec, config = setting.codec(), wam_of(setting.config()).model
    count = codec.CHUNK
    video = torch.rand(count, 3, config.num_frames, *config.frame_size, device=setting.device) * 2 - 1
    flops = count_flops(lambda: codec.encode(video))
    setting.reset_peak()
    seconds = median(setting.seconds(lambda: codec.encode(video), rounds=5))
    figures: Figures = {"seconds": seconds, "clips": count, "clips_per_second": count / seconds}
    return figures | {"flops": flops, "bytes": num_bytes(codec.vae.encoder), "peak_bytes": setting.peak()}


def _teacher(setting: Setting) -> Figures:
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = (
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
        if setting.dry
        else {"image_size": 518}
    )
    config = TeacherConfig(input_size=setting.pick((448, 448), (28, 42)), precision="bfloat16")
    with setting.device:
        teacher = Teacher(Dinov2Model(Dinov2Config(**sizes, patch_size=14)), config)
    count, (height, width) = setting.pick(64, 2), setting.config().method.shapes.frame_size
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    on_device = torch.from_numpy(frames).to(setting.device)
    seconds = median(setting.seconds(lambda: teacher(on_device), rounds=10))
    flops = count * teacher_shape(TeacherConfig()).flops
    figures: Figures = {"seconds": seconds, "images": count, "images_per_second": count / seconds}
    return figures | ({} if setting.dry else {"flops": flops, "bytes": num_bytes(teacher.model)})


def _text(setting: Setting) -> Figures:
    encoder = text_encoder(setting, small=setting.dry, length=wam_of(setting.config()).model.text.length)
    encoder.encode(["warm up"])
    setting.reset_peak()
    seconds = median(setting.seconds(lambda: encoder.encode(["open the drawer"]), rounds=5))
    return {
        "seconds": seconds,
        "flops": _text_flops(encoder),
        "bytes": num_bytes(encoder.model),
        "peak_bytes": setting.peak(),
    }


def _text_flops(encoder: CosmosReasonEncoder) -> float:
    """FLOPs of an instruction: two for each weight of the blocks and of the projection and each token, and attention's.

    torch's counter knows no attention of fewer keys than queries before 2.13.
    """
    assert isinstance(encoder.projection, nn.Sequential)
    settings, blocks = encoder.model.config.get_text_config(), encoder.model.get_decoder().layers
    assert isinstance(blocks, nn.ModuleList)
    linear = [m for m in (*blocks.modules(), *encoder.projection) if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    attention = 4 * encoder.length**2 * settings.hidden_size * settings.num_hidden_layers
    return 2.0 * encoder.length * weights + attention


def text_encoder(setting: Setting, *, small: bool, length: int) -> CosmosReasonEncoder:
    """Qwen2.5-VL-7B's language model, or a small one, with random weights, a tokenizer of bytes, and Cosmos's projection."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    of_bytes = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )

    sizes = (
        {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
        if small
        else {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        }
    )  # fmt: skip
    text: dict[str, Any] = {**sizes, "bos_token_id": None, "eos_token_id": None}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": text["hidden_size"],
    }
    width = text["num_hidden_layers"] * text["hidden_size"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with setting.device:
            # Only the language model reads an instruction, so the vision tower is a stub.
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
            projection = nn.Sequential(nn.Linear(width, wam_of(setting.config()).model.video_dit.text_dim), nn.GELU())
    finally:
        torch.set_default_dtype(before)
    return CosmosReasonEncoder(model, tokenizer, length=length, projection=projection)
