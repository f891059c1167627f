"""What we write, read by LeRobot's own reader: every row, frame and statistic as dataset has them.

Runs where the package `lerobot` (0.4, whose datasets are v3.0) and torchvision are installed; `agra` needs neither.
"""

import numpy as np
import pytest

from agra.data.lerobot.dataset import LeRobotDataset
from agra.evaluation.collect import collect

theirs_module = pytest.importorskip(
    "lerobot.datasets.lerobot_dataset", reason="LeRobot's own reader is not installed: pip install lerobot==0.4.4"
)


@pytest.mark.slow
def test_lerobot_reads_what_we_collect(tmp_path):
    collect("tabletop", tmp_path / "set", episodes=4, seed=0, workers=1, progress=False)
    dataset = LeRobotDataset(tmp_path / "set")
    lerobot_dataset = theirs_module.LeRobotDataset("local/set", root=tmp_path / "set", video_backend="pyav")
    assert (lerobot_dataset.num_episodes, lerobot_dataset.fps) == (4, dataset.fps)
    assert lerobot_dataset.num_frames == sum(dataset.lengths)
    row = 0
    for index in range(4):
        episode, meta = dataset.episode(index), lerobot_dataset.meta.episodes[index]
        assert meta["tasks"] == [episode.instruction]
        assert (meta["dataset_from_index"], meta["dataset_to_index"]) == (row, row + len(episode))
        for step in range(len(episode)):
            item = lerobot_dataset[row]
            assert [int(item[k]) for k in ("index", "episode_index", "frame_index")] == [row, index, step]
            assert item["task"] == episode.instruction
            assert float(item["timestamp"]) == pytest.approx(step / dataset.fps, abs=1e-4)
            assert np.array_equal(item["observation.state"].numpy(), episode.states[step])
            assert np.array_equal(item["action"].numpy(), episode.actions[step])
            frame = (item[dataset.camera].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
            assert np.array_equal(frame, episode.frames[step])
            row += 1
    assert row == lerobot_dataset.num_frames
    for name, read in (("observation.state", dataset.states), ("action", dataset.actions)):
        rows = np.concatenate([read(index) for index in range(4)])
        for statistic in ("min", "max", "mean", "std"):
            expected = getattr(rows, statistic)(axis=0)
            np.testing.assert_allclose(lerobot_dataset.meta.stats[name][statistic], expected, rtol=1e-5, atol=1e-5)
