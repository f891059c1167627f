"""Small configs and batches for the tests of several packages."""

from dataclasses import replace

import torch

from agra.batch import Batch
from agra.recipes import tiny
from agra.wam.bridge import bridged_layers

TEACHER_WIDTH = 384
"""Width of the packaged DINOv2-S."""


def make_small_config():
    """tiny() at a smaller size: 4 video layers of width 32, 2 action blocks, 32 x 48 frames."""
    config = tiny()
    method, model = config.method, config.method.model
    layers = bridged_layers(4, 2)
    model = replace(
        model,
        frame_size=(32, 48),
        codec=replace(model.codec, channels=4),
        video_dit=replace(
            model.video_dit,
            latent_channels=4,
            num_layers=4,
            num_heads=2,
            head_dim=16,
            adaln_lora_dim=8,
            text_dim=12,
        ),
        bridge=replace(model.bridge, layers=layers, num_layers=1, num_heads=2, head_dim=16, position_grid=(2, 2, 3)),
        action_dit=replace(
            model.action_dit,
            state_dim=5,
            action_dim=3,
            horizon=4,
            num_blocks=2,
            num_heads=2,
            head_dim=16,
            guidance_dim=32,
            hidden_dim=16,
            state_dropout=0.0,
        ),
    )
    alignment = replace(method.alignment, layers=(1,), hidden_dim=16)
    stage = replace(config.stage, steps=6, batch_size=4, log_every=1, validate_every=3, save_every=2)
    return replace(config, method=replace(method, model=model, alignment=alignment), stage=stage)


def with_model(config, **changes):
    """Replace fields of the WAM's model."""
    return replace(config, method=replace(config.method, model=replace(config.method.model, **changes)))


def with_objective(config, **changes):
    """Replace fields of the WAM's objective."""
    return replace(config, method=replace(config.method, objective=replace(config.method.objective, **changes)))


def random_batch(config, count=4, seed=0):
    """Return a batch of noise in the shapes of `config`."""
    generator = torch.Generator().manual_seed(seed)
    shapes, model = config.method.shapes, config.method.model

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return Batch(
        latents=noise(count, *model.latent_shape),
        instruction=noise(count, 5, model.video_dit.text_dim),
        state=noise(count, shapes.state_dim),
        actions=noise(count, shapes.horizon, shapes.action_dim),
        action_mask=torch.ones(count, shapes.horizon, shapes.action_dim, dtype=torch.bool),
        embodiment=torch.zeros(count, dtype=torch.long),
        targets=noise(count, *model.token_grid, TEACHER_WIDTH),
    )


def with_alignment(config, **changes):
    """Replace fields of the WAM's alignment."""
    return replace(config, method=replace(config.method, alignment=replace(config.method.alignment, **changes)))
