"""Records episodes of a robot as a LeRobot v3.0 dataset."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from agra.data.lerobot.writer import EGO_VIEW, EncodedEpisode, GrowingVideo, LeRobotWriter
from agra.serving.robot.control import ControlStep
from agra.serving.robot.robots import NamesCamera, Robot
from agra.types import NO_FRAME

IMAGES = "observation.images."
MAX_BEHIND = 100
"""Frames that wait for the encoder. Beyond that `add` waits, which bounds memory on a slow machine."""


class DatasetRecorder:
    """Collects control steps and writes each episode when it ends. A context manager, which finishes the dataset.

    Each run of `control` is an episode. It ends when the next one begins, at `end_episode`, or with the block. Frames
    are encoded as they arrive, in a thread of their own: an hour takes the memory of its mp4, and no control step
    waits. Each camera has a video under its own name: that of the frame is the robot's `camera`, or ego_view for a
    robot without one.

    Beside states and actions, the columns are `held`, `sent` and `clipped` (bool), `action_age` and `answer_delay`
    (control steps, -1 without a new chunk) and `late` (seconds). `sent` is false where the robot got no command: while
    it held, and in a dry run, whose actions are those that it would have got. Steps without an action are left out: the
    robot had no command yet and does not know its pose.
    """

    def __init__(self, path: str | Path, robot: Robot, *, fps: int) -> None:
        self._writer = LeRobotWriter(path, embodiment=robot.embodiment, fps=fps)
        self._fps = fps
        self._camera = f"{IMAGES}{robot.camera}" if isinstance(robot, NamesCamera) else EGO_VIEW
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._clear()

    def _clear(self) -> None:
        self._steps: list[ControlStep] = []
        self._videos: dict[str, GrowingVideo] = {}
        self._encoding: deque[Future[None]] = deque()

    def begin_episode(self) -> None:
        """Begin an episode. Writes the last one, if it has steps."""
        self.end_episode()

    def add(self, step: ControlStep) -> None:
        """Add a control step. Raises ValueError for a frame of an odd or changed size, and for other cameras."""
        if not step.action.size:
            return
        views = {f"{IMAGES}{name}": view for name, view in step.observation.views.items()}
        frames = {self._camera: step.observation.frame, **views}
        if not self._steps:
            self._videos = {name: GrowingVideo(*frame.shape[:2], fps=self._fps) for name, frame in frames.items()}
        if frames.keys() != self._videos.keys():
            raise ValueError(
                f"recorder: expected the cameras {', '.join(self._videos)}, as in the first step, got"
                f" {', '.join(frames)}"
            )
        for name, frame in frames.items():
            if frame.shape != (size := (*self._videos[name].size, 3)):
                raise ValueError(
                    f"recorder: expected frames of {size} of {name}, as in the first step, got {frame.shape}"
                )
        for name, frame in frames.items():  # copied, because drivers reuse their buffers
            self._encoding.append(self._thread.submit(self._videos[name].add, frame.copy()))
        while self._encoding and (self._encoding[0].done() or len(self._encoding) > MAX_BEHIND):
            self._encoding.popleft().result()
        self._steps.append(replace(step, observation=replace(step.observation, frame=NO_FRAME, views={})))

    def end_episode(self) -> None:
        """Write the steps so far as an episode, if there are any."""
        steps, videos = self._steps, self._videos
        if not steps:
            return
        while self._encoding:
            self._encoding.popleft().result()
        self._clear()
        delays = [-1 if step.command.delay is None else step.command.delay for step in steps]
        episode = EncodedEpisode(
            states=np.stack([step.observation.state for step in steps]).astype(np.float32),
            actions=np.stack([step.action for step in steps]).astype(np.float32),
            instruction=steps[0].observation.instruction,
            videos={name: video.finish() for name, video in videos.items()},
            extra={
                "held": np.array([step.held for step in steps]),
                "sent": np.array([step.sent for step in steps]),
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
