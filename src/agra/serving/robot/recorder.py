"""Records episodes of a robot as a LeRobot v3.0 dataset."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from agra.data.lerobot.writer import EGO_VIEW, EncodedEpisode, GrowingVideo, LeRobotWriter
from agra.serving.robot.control import ControlStep
from agra.serving.robot.robots import Robot
from agra.types import NO_FRAME

MAX_BEHIND = 100
"""Frames that wait for the encoder. Beyond that `add` waits, which bounds memory on a slow machine."""


class DatasetRecorder:
    """Collects control steps and writes each episode when it ends. A context manager, which finishes the dataset.

    Frames are encoded as they arrive, in a thread of their own: an hour takes the memory of its mp4, and no control
    step waits. Beside states and actions, the columns are `held` and `clipped` (bool), `action_age` and `answer_delay`
    (control steps, -1 without a new chunk) and `late` (seconds). Steps without an action are left out: the robot had no
    command yet and does not know its pose.
    """

    def __init__(self, path: str | Path, robot: Robot, *, fps: int) -> None:
        self._writer = LeRobotWriter(path, embodiment=robot.embodiment, fps=fps)
        self._fps = fps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._begin()

    def _begin(self) -> None:
        self._steps: list[ControlStep] = []
        self._video: GrowingVideo | None = None
        self._encoding: deque[Future[None]] = deque()

    def add(self, step: ControlStep) -> None:
        """Add a control step. Raises ValueError for a frame of an odd or changed size."""
        if not step.action.size:
            return
        frame = step.observation.frame
        if self._video is None:
            self._video = GrowingVideo(*frame.shape[:2], fps=self._fps)
        if frame.shape != (*self._video.size, 3):
            raise ValueError(
                f"recorder: expected frames of {(*self._video.size, 3)}, as in the first step, got {frame.shape}"
            )
        self._encoding.append(self._thread.submit(self._video.add, frame.copy()))  # drivers reuse their buffers
        while self._encoding and (self._encoding[0].done() or len(self._encoding) > MAX_BEHIND):
            self._encoding.popleft().result()
        self._steps.append(replace(step, observation=replace(step.observation, frame=NO_FRAME, views={})))

    def end_episode(self) -> None:
        """Write the steps so far as an episode, if there are any."""
        steps, video = self._steps, self._video
        if video is None:
            return
        while self._encoding:
            self._encoding.popleft().result()
        self._begin()
        delays = [-1 if step.command.delay is None else step.command.delay for step in steps]
        episode = EncodedEpisode(
            states=np.stack([step.observation.state for step in steps]).astype(np.float32),
            actions=np.stack([step.action for step in steps]).astype(np.float32),
            instruction=steps[0].observation.instruction,
            videos={EGO_VIEW: video.finish()},
            extra={
                "held": np.array([step.held for step in steps]),
                "clipped": np.array([step.clipped for step in steps]),
                "action_age": np.array([step.command.age for step in steps], np.int64),
                "answer_delay": np.array(delays, np.int64),
                "late": np.array([step.late for step in steps], np.float32),
            },
        )
        self._writer.add(episode)

    def __enter__(self) -> "DatasetRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The steps before a failure are written too, because they show its cause. Without any step there is no dataset.
        try:
            self.end_episode()
            if self._writer.num_frames:
                self._writer.close()
            else:
                self._writer.__exit__(kind, value, trace)
        finally:
            self._thread.shutdown()
