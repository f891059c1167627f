"""A session of the demo, without its page: several policies on the same scene, an instruction, a mask, and a hand."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from agra.demo.player import OpenPolicy, Player
from agra.evaluation.protocols import default_protocol
from agra.simulators.tabletop.placement import moved, table_point
from agra.simulators.tabletop.tabletop_tasks import tasks_of, training_trials, trials
from agra.types import REGIMES, Trial

Tool = Literal["move", "mask"]
Pixel = tuple[int, int]
"""Column and row in a frame."""
CLICK = 4
"""Pixels. The pointer's way below which a drag is a click."""
LONGEST_INSTRUCTION = 200
"""Characters."""


def all_trials() -> dict[str, Trial]:
    """The evaluation trials of all regimes, by name."""
    return {trial.name: trial for regime in REGIMES for trial in trials(regime)}


class Session:
    """One visitor's scene, which every policy acts on in a simulator of its own.

    All calls must come from one thread, since rendering is bound to it.
    """

    def __init__(self, policies: Sequence[str], open_policy: OpenPolicy, trial: Trial) -> None:
        """Raises ValueError without policies, and for a policy that was not trained on the tabletop's hands."""
        if not policies:
            raise ValueError("policies: expected at least one")
        steps = default_protocol("tabletop").execute_steps
        self.players = [Player(name, open_policy, execute_steps=steps) for name in policies]
        self.playing = False
        self.reset(trial)

    # --- the episode --------------------------------------------------------------------------------------------------

    def reset(self, trial: Trial) -> str:
        """Start an episode of `trial` for every policy, without a mask. Returns a message."""
        self.trial, self.judged, self.mask = trial, True, None
        return self.restart()

    def random(self, seed: int) -> str:
        """Start an episode on a random scene like those of the demonstrations."""
        return self.reset(training_trials(1, seed)[0])

    def restart(self) -> str:
        """Start again with the same instruction and mask. Objects stay where they were put before the first action."""
        self.selected: str | None = None
        self.corner: Pixel | None = None
        self._seconds: deque[float] = deque(maxlen=40)
        for player in self.players:
            player.reset(self.trial, self.mask, judged=self.judged)
        return f"{self.trial.name}: {self.trial.instruction}"

    def step(self) -> None:
        """Execute one action of every policy whose episode is not finished."""
        start = time.perf_counter()
        for player in self.players:
            player.step(self.mask)
        self._seconds.append(time.perf_counter() - start)

    @property
    def finished(self) -> bool:
        """True where the episodes of all policies have ended."""
        return all(player.finished for player in self.players)

    @property
    def rate(self) -> float | None:
        """Control steps a second over the last 40 steps, answers of the policies included. None before the first."""
        return len(self._seconds) / sum(self._seconds) if self._seconds else None

    # --- the instruction ----------------------------------------------------------------------------------------------

    @property
    def instructions(self) -> list[str]:
        """Instructions of the tasks that the scene offers."""
        return list(tasks_of(self.trial.scene))

    def instruct(self, text: str) -> str:
        """Give every policy another instruction, in the running episode. Returns a message.

        Any text is allowed. Success is judged only where it is one of `instructions`. Raises ValueError for an empty or
        too long text.
        """
        text = " ".join(text.split())
        if not 0 < len(text) <= LONGEST_INSTRUCTION:
            raise ValueError(f"instruction: expected 1 to {LONGEST_INSTRUCTION} characters, got {len(text)}")
        tasks = {instruction.lower(): (instruction, scene) for instruction, scene in tasks_of(self.trial.scene).items()}
        task = tasks.get(text.lower().rstrip("."))
        self.judged = task is not None
        instruction, scene = task or (text, self.trial.scene)
        self.trial = replace(self.trial, instruction=instruction, scene=scene)
        for player in self.players:
            player.instruct(self.trial, self.mask, judged=self.judged)
        if task:
            return f"Instruction: {instruction}."
        return f"Instruction: {text}. It is not a task of this scene, so success is not judged."

    # --- mouse --------------------------------------------------------------------------------------------------------

    @property
    def objects(self) -> list[str]:
        """Names of the items and containers on the table."""
        scene = self.players[0].simulator.scene
        return [*scene.items, *scene.containers]

    def select(self, name: str | None) -> str:
        """Select the object that the next click moves. None selects nothing."""
        self.selected = name
        return f"Click where the {name} goes." if name else "Click an object to move it."

    def point(self, player: int, start: Pixel, end: Pixel, tool: Tool) -> str:
        """Use a tool on a player's frame, from the pixel `start` to the pixel `end`. Returns a message.

        `move` drags an object to another place, `mask` spans a patch between its opposite corners. Where the two pixels
        are nearly the same it is a click, and the next click ends what it began. Raises ValueError for a place that the
        scene does not allow, and for a pixel outside of the frame.
        """
        height, width = self.players[player].simulator.frame_size
        for column, row in (start, end):
            if not (0 <= column < width and 0 <= row < height):
                raise ValueError(f"pixel ({column}, {row}): expected one of the {width} x {height} frame")
        if max(abs(start[0] - end[0]), abs(start[1] - end[1])) < CLICK:
            return self._click(player, start, tool)
        if tool == "mask":
            return self.add_mask(start, end)
        name = self.players[player].simulator.object_at(*start)
        return "No object there." if name is None else self.move(name, self._table_point(player, end))

    def _click(self, player: int, pixel: Pixel, tool: Tool) -> str:
        if tool == "mask":
            if self.corner is not None:
                return self.add_mask(self.corner, pixel)
            self.corner = pixel
            return "Click the opposite corner of the patch."
        if self.selected is not None:
            name, self.selected = self.selected, None
            return self.move(name, self._table_point(player, pixel))
        name = self.players[player].simulator.object_at(*pixel)
        return "No object there." if name is None else self.select(name)

    def _table_point(self, player: int, pixel: Pixel) -> np.ndarray:
        simulator = self.players[player].simulator
        return table_point(simulator.scene, *pixel, simulator.frame_size)

    def move(self, name: str, position: Sequence[float] | np.ndarray) -> str:
        """Put an object at `position` (x, y) on every policy's table. Every policy then observes the scene anew.

        Raises ValueError, with nothing moved, where one of the tables does not allow it.
        """
        states = [moved(player.simulator.scene, name, position) for player in self.players]
        for player, state in zip(self.players, states, strict=True):
            player.simulator.scene.data = state
        if self.players[0].steps == 0:
            self.trial = replace(self.trial, scene=_rearranged(self.trial.scene, name, position))
        for player in self.players:
            player.look(self.mask)
        return f"The {name} is at ({position[0]:.2f}, {position[1]:.2f}) m."

    def add_mask(self, corner: Pixel, opposite: Pixel) -> str:
        """Hide the patch between two pixels (column, row), both included, from every policy, and ask them again."""
        mask = np.zeros(self.players[0].simulator.frame_size, bool) if self.mask is None else self.mask.copy()
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(corner, opposite, strict=True))
        mask[top : bottom + 1, left : right + 1] = True
        return self._set_mask(mask, f"{mask.mean():.0%} of the image is masked.")

    def clear_mask(self) -> str:
        """Show the whole image again, and ask every policy again."""
        return self._set_mask(None, "Nothing is masked.")

    def _set_mask(self, mask: np.ndarray | None, message: str) -> str:
        self.mask, self.corner = mask, None
        for player in self.players:
            if not player.finished:
                player.ask(mask)
        return message

    def close(self) -> None:
        """Free the simulators and connections."""
        self.playing = False
        for player in self.players:
            player.close()


def _rearranged(scene: Mapping[str, Any], name: str, position: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A scene's description with an object elsewhere. The steamer's lid has no place in it."""
    at = {"position": [round(float(value), 5) for value in position]}

    def put(placed: Mapping[str, Any]) -> dict[str, Any]:
        return {**placed, **(at if placed["name"] == name else {})}

    lists = {key: [put(placed) for placed in scene[key]] for key in ("distractors", "containers")}
    return {**scene, **lists, "target": put(scene["target"])}
