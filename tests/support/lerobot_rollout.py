"""`lerobot-rollout` on the tabletop as a robot of LeRobot. Runs in LeRobot's own environment, `make env-lerobot`.

Usage: lerobot_rollout.py RECORD TRIAL FLAGS..., where FLAGS are lerobot-rollout's. Plays the trial until it succeeds, for
at most 100 steps. Writes JSON to RECORD: `success`, `steps`, and for each request that should continue a chunk the number
of remaining actions, or null if they were not found.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import lerobot_policy_agra.modeling_agra as modeling
import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts.lerobot_rollout import main as rollout

from agra.simulators.tabletop.tabletop_env import Tabletop


@RobotConfig.register_subclass("tabletop")
@dataclass(kw_only=True)
class TableConfig(RobotConfig):
    trial: str


class Table(Robot):
    config_class, name = TableConfig, "tabletop"

    def __init__(self, config):
        super().__init__(config)
        self.simulator, self.steps, self.success = Tabletop(), 0, False
        trials = self.simulator.trials(config.trial.partition("/")[0])
        (self.trial,) = [trial for trial in trials if trial.name == config.trial]
        self.observation, self.connected = self.simulator.reset(self.trial), False
        tables.append(self)

    @property
    def action_features(self):
        return {f"{name}.pos": float for name in self.simulator.embodiment.action_names}

    @property
    def observation_features(self):
        names = {f"{name}.pos": float for name in self.simulator.embodiment.state_names}
        return names | {"ego_view": (*self.simulator.frame_size, 3)}

    @property
    def is_connected(self):
        return self.connected

    @property
    def is_calibrated(self):
        return True

    def connect(self, calibrate=True):
        self.connected = True

    def disconnect(self):
        self.connected = False

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        names = [f"{name}.pos" for name in self.simulator.embodiment.state_names]
        return dict(zip(names, map(float, self.observation.state), strict=True)) | {"ego_view": self.observation.frame}

    def send_action(self, action):
        step = self.simulator.step(np.array([action[name] for name in self.action_features], np.float32))
        self.observation, self.steps, self.success = step.observation, self.steps + 1, step.success
        if self.success or self.steps == self.simulator.max_steps:
            raise KeyboardInterrupt  # ends the rollout as ctrl-C does
        return action


tables, rests = [], []
find = modeling.remaining


def recorded(chunk, handed):
    rest = find(chunk, handed)
    rests.append(None if rest is None else len(rest))
    return rest


def main(target, trial, flags):
    modeling.remaining = recorded
    instruction = next(t.instruction for t in Tabletop().trials(trial.partition("/")[0]) if t.name == trial)
    sys.argv = ["lerobot-rollout", "--robot.type=tabletop", f"--robot.trial={trial}", f"--task={instruction}", *flags]
    rollout()
    (table,) = tables
    Path(target).write_text(json.dumps({"success": bool(table.success), "steps": table.steps, "rests": rests}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
