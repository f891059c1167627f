"""A pipeline saved by diffusers in the official layout, loaded part by part, against the tensors of the pipeline."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import diffusers.models.transformers.transformer_cosmos as stock
import diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict as cosmos_pipeline
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from torch.nn.functional import interpolate

from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig
from agra.wam.codec import CodecConfig, load_codec
from agra.wam.model import WAM, WAMConfig
from agra.wam.text import TextConfig, load_text_encoder
from agra.wam.video_dit import VideoDiTConfig, load_text_projection

INSTRUCTION = "put the banana in the box"
LENGTH, SIZE, FRAMES = 160, (32, 48), 9
MEAN, STD = [0.3, -0.2, 0.1, 0.7], [1.5, 0.8, 2.0, 0.5]
CONFIG = WAMConfig(
    frame_size=SIZE,
    num_frames=FRAMES,
    codec=CodecConfig(channels=4),
    video_dit=VideoDiTConfig(
        latent_channels=4,
        num_layers=2,
        num_heads=2,
        head_dim=24,
        adaln_lora_dim=16,
        text_dim=20,
        text_projection_dim=96,
    ),
    bridge=BridgeConfig(layers=(0, 1), num_layers=1, num_heads=2, head_dim=24),
    action_dit=ActionDiTConfig(num_blocks=2, num_heads=2, head_dim=8, guidance_dim=48, hidden_dim=16),
)


class NothingToCheck:
    """Stand-in for the guardrail, a separate package that random weights and a fixed instruction do not need."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True

    def save_pretrained(self, folder, **options):
        Path(folder).mkdir()


@pytest.fixture(autouse=True)
def _resize_without_torchvision(monkeypatch):
    """Replace the nearest resize of the padding mask, for which the stock forward pass needs torchvision."""
    functional = SimpleNamespace(
        resize=lambda mask, size, interpolation: interpolate(mask, size=size, mode=interpolation)
    )
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(stock, "transforms", stand_in, raising=False)


@pytest.fixture(scope="module")
def pipeline(cosmos_reason):
    text_encoder, tokenizer = cosmos_reason
    torch.manual_seed(1)
    transformer = CONFIG.video_dit.build()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with patch.object(cosmos_pipeline, "CosmosSafetyChecker", NothingToCheck):
        made = cosmos_pipeline.Cosmos2_5_PredictBasePipeline(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            vae=AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=MEAN, latents_std=STD),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                use_karras_sigmas=True,
                sigma_max=200.0,
                sigma_min=0.01,
                final_sigmas_type="zero",
            ),
        )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """The saved pipeline, with several shards of the transformer, so that its index is read too."""
    saved = tmp_path_factory.mktemp("official")
    pipeline.save_pretrained(saved, safe_serialization=True, max_shard_size="100KB")
    assert len(list((saved / "transformer").glob("*.safetensors"))) > 1
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= {p.name for p in saved.iterdir()}
    return str(saved)


def run_pipeline(pipeline, video, noise):
    """Run one step of the pipeline and return the transformer's inputs and its velocity."""
    recorded = {}

    def watch(_, __, arguments, output):
        recorded.setdefault("inputs", arguments)
        recorded.setdefault("velocity", output[0])

    handle = pipeline.transformer.register_forward_hook(watch, with_kwargs=True)
    try:
        height, width = SIZE
        pipeline(
            video=video, prompt=INSTRUCTION, height=height, width=width, num_frames=FRAMES, num_inference_steps=2,
            guidance_scale=0.0, latents=noise, num_latent_conditional_frames=1, max_sequence_length=LENGTH,
            output_type="latent",
        )  # fmt: skip
    finally:
        handle.remove()
    return recorded


def test_text_vae_and_transformer_equal_the_pipeline_on_its_own_weights(pipeline, folder):
    torch.manual_seed(2)
    video = torch.rand(1, 3, 1, *SIZE) * 2 - 1
    noise = torch.randn(1, *CONFIG.latent_shape)
    recorded = run_pipeline(pipeline, video, noise)

    torch.manual_seed(3)
    model = WAM(CONFIG).eval()
    model.video_dit.load_pretrained(folder)
    projection = model.video_dit.transformer.crossattn_proj
    plain = load_text_encoder(TextConfig(source=folder, length=LENGTH, dtype="float32"))
    projected = load_text_encoder(TextConfig(source=folder, length=LENGTH, dtype="float32"), projection)
    codec = load_codec(CodecConfig(source=folder, channels=4, dtype="float32"))

    inputs = recorded["inputs"]
    torch.testing.assert_close(plain.encode([INSTRUCTION]), inputs["encoder_hidden_states"], atol=1e-5, rtol=0)
    latent = codec.encode(video)
    torch.testing.assert_close(latent, inputs["hidden_states"][:, :, :1], atol=1e-5, rtol=0)
    assert inputs["timestep"].flatten()[0].item() == pytest.approx(CONFIG.condition_noise_level)
    level = inputs["timestep"].flatten()[1:2]
    # The pipeline starts from `noise` as it is; (1 - level) * 0 + level * (noise / level) is the same.
    latents = torch.cat([latent, torch.zeros_like(noise[:, :, 1:])], dim=2)
    for text in (plain, projected):
        velocity = model.denoise(latents, noise / level, level, text.encode([INSTRUCTION])).velocity
        torch.testing.assert_close(velocity, recorded["velocity"], atol=2e-5, rtol=0)
    assert recorded["velocity"].abs().max() > 0.5


def test_the_text_projection_loads_alone_and_its_result_takes_a_megabyte(folder):
    model = WAM(CONFIG)
    model.video_dit.load_pretrained(folder)
    alone = load_text_projection(CONFIG.video_dit, folder)
    whole = model.video_dit.transformer.crossattn_proj
    for mine, other in zip(alone.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    text = load_text_encoder(TextConfig(source=folder, length=LENGTH, dtype="float32"), alone)
    cached = text.encode([INSTRUCTION])[0].half().numpy()
    assert cached.shape == (LENGTH, CONFIG.video_dit.text_dim)
    real, tokens = VideoDiTConfig(), TextConfig().length
    assert tokens * real.text_dim * cached.itemsize == 2**20
    with pytest.raises(ValueError, match="this video DiT has no text projection"):
        load_text_projection(VideoDiTConfig(text_projection_dim=None), folder)
