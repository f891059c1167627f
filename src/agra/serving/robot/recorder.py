"""What the robot saw, was told and did, as a LeRobot v3.0 dataset: to look at, to learn from, to find out why."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from agra.data.lerobot.writer import EGO_VIEW, EncodedEpisode, GrowingVideo, LeRobotWriter
from agra.serving.robot.control import Row
from agra.serving.robot.robots import Robot

MAX_BEHIND = 100
"""Frames that wait for the encoder; beyond that `add` waits too, so that memory stays bounded on a slow machine."""
_NO_FRAME = np.zeros((0, 0, 3), np.uint8)


class DatasetRecorder:
    """Keeps rows and writes each episode when it ends; a context manager, since the dataset is named when closed.

    Frames are encoded as they come, in a thread of their own, so an hour costs an hour's mp4 of memory and no control
    step waits. Beside states and actions a row has `held` and `clipped` (bool), `action_age`, `answer_delay` (control
    steps; -1 where no answer came) and `late` (seconds). Rows of a robot that was told nothing yet and cannot say where
    it stands have no action and are left out.
    """

    def __init__(self, path: str | Path, robot: Robot, *, fps: int) -> None:
        self._writer = LeRobotWriter(path, embodiment=robot.embodiment, fps=fps)
        self._fps = fps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._begin()

    def _begin(self) -> None:
        self._rows: list[Row] = []
        self._video: GrowingVideo | None = None
        self._encoding: deque[Future[None]] = deque()

    def add(self, row: Row) -> None:
        """Keep one control step. Raises ValueError for frames of odd or changing size."""
        if not row.action.size:
            return
        frame = row.observation.frame
        if self._video is None:
            self._video = GrowingVideo(*frame.shape[:2], fps=self._fps)
        if frame.shape != (*self._video.size, 3):
            raise ValueError(f"recorder: the camera's frames were {(*self._video.size, 3)} and are {frame.shape} now")
        self._encoding.append(self._thread.submit(self._video.add, frame.copy()))  # drivers reuse their buffers
        while self._encoding and (self._encoding[0].done() or len(self._encoding) > MAX_BEHIND):
            self._encoding.popleft().result()
        self._rows.append(replace(row, observation=replace(row.observation, frame=_NO_FRAME, views={})))

    def end_episode(self) -> None:
        """Write the rows so far as an episode; without rows nothing happens."""
        rows, video = self._rows, self._video
        if video is None:
            return
        while self._encoding:
            self._encoding.popleft().result()
        self._begin()
        delays = [-1 if row.command.delay is None else row.command.delay for row in rows]
        episode = EncodedEpisode(
            states=np.stack([row.observation.state for row in rows]).astype(np.float32),
            actions=np.stack([row.action for row in rows]).astype(np.float32),
            instruction=rows[0].observation.instruction,
            videos={EGO_VIEW: video.finish()},
            extra={
                "held": np.array([row.held for row in rows]),
                "clipped": np.array([row.clipped for row in rows]),
                "action_age": np.array([row.command.age for row in rows], np.int64),
                "answer_delay": np.array(delays, np.int64),
                "late": np.array([row.late for row in rows], np.float32),
            },
        )
        self._writer.add(episode)

    def __enter__(self) -> "DatasetRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also of a run that failed: those rows are what one wants to see. If it failed before the first, there is nothing.
        try:
            self.end_episode()
            if self._writer.num_frames:
                self._writer.close()
            else:
                self._writer.__exit__(kind, value, trace)
        finally:
            self._thread.shutdown()
