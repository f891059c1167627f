"""The recipes of runs/metaworld.sh."""

import pytest

from agra.recipes import RECIPES, metaworld, metaworld_diffusion_policy, metaworld_wam


@pytest.mark.parametrize("name", ["metaworld", "metaworld_wam", "metaworld_diffusion_policy"])
def test_a_recipe_reads_the_workspace_and_answers_rows_of_four_actions(name):
    """Rows 72 to 408 and columns 144 to 480 of 480, on frames of 320."""
    config = RECIPES[name]()
    assert config.data.crop_rows == (72 * 320 // 480, 408 * 320 // 480)
    assert config.data.crop_columns == (144 * 320 // 480, 480 * 320 // 480)
    shapes = config.method.shapes
    assert (shapes.frame_size, shapes.horizon, shapes.state_dim, shapes.action_dim) == ((112, 112), 8, 4, 4 * 4)
    assert (config.data.early_window_fraction, config.data.early_window_steps) == (0.4, 3)
    assert (config.stage.ema_decay, config.stage.batch_size, config.data.shift) == (0.999, 32, 0)


def test_chunk_and_latent_frames_end_at_the_same_time():
    config = metaworld()
    assert config.method.needs().last_frame * config.data.frame_stride == config.method.shapes.horizon
    assert config.method.model.latent_shape == (32, 2, 14, 14)


def test_the_arms_differ_in_what_their_names_say():
    agra, wam, diffusion = metaworld(), metaworld_wam(), metaworld_diffusion_policy()
    assert agra.method.model == wam.method.model
    assert agra.stage == wam.stage
    assert agra.method.aligns
    assert not wam.method.aligns
    assert wam.method.objective.video_weight == agra.method.objective.video_weight == 0.1
    assert (diffusion.stage.steps, diffusion.stage.batch_size) == (wam.stage.steps, wam.stage.batch_size)
    assert diffusion.method.acts_on_average
