"""A recipe fitted to a dataset that knows nothing of it: another robot, camera, widths and long instructions."""

from dataclasses import replace

import numpy as np
import pytest

from agra.cli.main import main
from agra.data.fit import fit_to_dataset
from agra.data.lerobot.writer import LeRobotWriter, encode_episode
from agra.policies.load import load_policy
from agra.recipes import RECIPES, tiny, tiny_diffusion_policy
from agra.types import Embodiment, Episode

FRONT, SIDE = "observation.images.front", "observation.images.side"
SENTENCE = "Pick up the orange cube that stands next to the blue plate and put it into the white bowl on the left."


def write(path, *, joints=20, cameras=(FRONT,), instruction=SENTENCE):
    robot = Embodiment(
        name="so101",
        state_names=tuple(f"joint{i}.pos" for i in range(joints)),
        action_names=tuple(f"joint{i}.pos" for i in range(joints)),
    )
    rng = np.random.default_rng(0)
    with LeRobotWriter(path, embodiment=robot, fps=30) as writer:
        for _ in range(3):
            episode = Episode(
                frames=rng.integers(0, 255, (20, 48, 64, 3)).astype(np.uint8),
                states=rng.normal(size=(20, joints)).astype(np.float32),
                actions=rng.normal(size=(20, joints)).astype(np.float32),
                instruction=instruction,
                embodiment="so101",
                fps=30,
            )
            encoded = encode_episode(episode, camera=cameras[0])
            videos = dict.fromkeys(cameras, encoded.videos[cameras[0]])
            writer.add(replace(encoded, videos=videos))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fit") / "so101")


def fit(recipe, path, **changes):
    config = recipe()
    return fit_to_dataset(config.method, replace(config.data, path=str(path), **changes))


@pytest.mark.parametrize("recipe", [tiny, tiny_diffusion_policy])
def test_robot_camera_widths_and_instructions_are_the_datasets(recipe, dataset):
    result = fit(recipe, dataset)
    assert result.data.embodiments == ("so101",)
    assert result.data.camera == FRONT
    assert result.data.early_window_fraction == 0
    assert result.data.target_steps is None
    shapes = result.method.shapes
    assert (shapes.state_dim, shapes.action_dim, shapes.instruction) == (20, 20, (25, 384))
    assert len(result.changes) == 5


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if name.startswith("tiny")))
def test_every_tiny_recipe_fits(name, dataset):
    config = RECIPES[name]()
    result = fit(RECIPES[name], dataset)
    fitted = replace(config, method=result.method, data=result.data)
    assert (fitted.method.shapes.state_dim, fitted.method.shapes.action_dim) == (20, 20)


def test_nothing_is_lowered_and_no_choice_of_the_user_replaced(tmp_path):
    path = write(tmp_path / "set", joints=3, cameras=(FRONT, SIDE), instruction="go")
    result = fit(tiny, path, camera=SIDE, embodiments=("so101", "tabletop"), early_window_fraction=0.4)
    assert result.method == tiny().method
    assert result.data.camera == SIDE
    assert result.data.embodiments == ("so101", "tabletop")
    assert result.data.early_window_fraction == 0.4
    assert result.changes == ()


def test_sines_and_cosines_are_twice_as_wide(dataset):
    shapes = fit(tiny, dataset, normalization="sin_cos").method.shapes
    assert (shapes.state_dim, shapes.action_dim) == (40, 40)


def test_several_cameras_are_listed(tmp_path):
    path = write(tmp_path / "set", cameras=(FRONT, SIDE))
    with pytest.raises(ValueError, match=rf"2 cameras \({FRONT}, {SIDE}\); choose one with --data.camera NAME"):
        fit(tiny, path)


def test_a_mixture_is_left_alone(dataset):
    source = replace(tiny().data.source(""), path=str(dataset), embodiment="tabletop")
    data = replace(tiny().data, mixture=(source,))
    assert fit_to_dataset(tiny().method, data).data == data


def test_from_a_path_to_a_policy_in_one_command(dataset, tmp_path, capsys):
    """Features are prepared first, their cost is printed, and doctor prints this command."""
    main(["doctor", str(dataset)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to train on it: "))
    command = line.removeprefix("to train on it: agra ").split()
    command[command.index("--output") + 1] = str(tmp_path / "run")
    small = ["--stage.steps", "1", "--stage.batch-size", "2", "--data.cache", str(tmp_path / "cache")]
    small += ["--method.alignment.teacher.input-size", "28", "42"]
    with pytest.raises(SystemExit):
        main([*command, *small, "--prepare", "False"])
    assert "run agra prepare" in capsys.readouterr().err
    main([*command, *small])
    said = capsys.readouterr().err
    assert "embodiment so101, windows from whole episodes" in said
    assert "3 episodes to prepare" in said
    assert load_policy(tmp_path / "run").spec.embodiments.keys() == {"so101"}


def test_a_named_embodiment_is_kept(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--data.path", str(dataset), "--data.embodiments", "panda", "--output", str(tmp_path)])
    assert "embodiment 'so101' is not in data.embodiments ('panda',)" in capsys.readouterr().err
