"""What the robot saw, was told and did, as a LeRobot v3.0 dataset: to look at, to learn from, to find out why."""

from pathlib import Path

import numpy as np

from agra.data.lerobot_writer import LeRobotWriter, encode_episode
from agra.serving.control import Row
from agra.serving.robots import Robot
from agra.types import Episode


class DatasetRecorder:
    """Keeps rows and writes each episode when it ends; a context manager, since the dataset is named when closed.

    Beside states and actions a row has `held` and `clipped` (bool), `action_age`, `answer_delay` (control steps; -1 where
    no answer came) and `late` (seconds).
    """

    def __init__(self, path: str | Path, robot: Robot, *, fps: int) -> None:
        self._writer = LeRobotWriter(path, embodiment=robot.embodiment, fps=fps)
        self._robot, self._fps = robot, fps
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keep one control step."""
        self._rows.append(row)

    def end_episode(self) -> None:
        """Write the rows so far as an episode; without rows nothing happens."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        episode = Episode(
            frames=np.stack([row.observation.frame for row in rows]),
            states=np.stack([row.observation.state for row in rows]),
            actions=np.stack([row.action for row in rows]),
            instruction=rows[0].observation.instruction,
            embodiment=self._robot.embodiment.name,
            fps=self._fps,
        )
        delays = [-1 if row.command.delay is None else row.command.delay for row in rows]
        extra = {
            "held": np.array([row.held for row in rows]),
            "clipped": np.array([row.clipped for row in rows]),
            "action_age": np.array([row.command.age for row in rows], np.int64),
            "answer_delay": np.array(delays, np.int64),
            "late": np.array([row.late for row in rows], np.float32),
        }
        self._writer.add(encode_episode(episode, extra=extra))

    def __enter__(self) -> "DatasetRecorder":
        return self

    def __exit__(self, *raised: object) -> None:
        # Also of a run that failed: those rows are what one wants to see.
        self.end_episode()
        self._writer.close()
