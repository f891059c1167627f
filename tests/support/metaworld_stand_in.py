"""A stand-in for the package metaworld: the same interface with one small MuJoCo model for all tasks.

The hand follows a mocap body and reaches a goal beside a loose puck. The physics, the tasks and the pictures are not
Meta-World's. What is tested with it is the adapter: rows, rehearsals, resets, masks, collection.
"""

import sys
from types import ModuleType

import mujoco
import numpy as np

from agra.simulators.metaworld.metaworld_tasks import INSTRUCTIONS

MODEL = """
<mujoco>
  <option timestep="0.0025"/>
  <visual><quality shadowsize="4096"/><global offwidth="480" offheight="480"/></visual>
  <worldbody>
    <light pos="0 0.6 2" dir="0 0 -1" diffuse="0.8 0.8 0.8"/>
    <camera name="corner2" pos="0.75 0.075 0.7" xyaxes="0.525 0.75 0 -0.4125 0.28875 0.838"/>
    <geom type="plane" size="2 2 0.1" rgba="0.6 0.5 0.4 1"/>
    <body name="base" pos="0 0.2 0">
      <geom type="box" size="0.1 0.1 0.1" rgba="0.3 0.3 0.3 1" contype="0" conaffinity="0"/>
      <body name="hand" pos="0 0.4 0.2">
        <joint type="slide" axis="1 0 0" damping="20"/>
        <joint type="slide" axis="0 1 0" damping="20"/>
        <joint type="slide" axis="0 0 1" damping="20"/>
        <geom type="box" size="0.05 0.05 0.05" mass="1" rgba="0.8 0.1 0.1 1"/>
      </body>
    </body>
    <body name="mocap" mocap="true" pos="0 0.6 0.2"/>
    <body name="puck" pos="0.2 0.6 0.03">
      <freejoint/>
      <geom type="cylinder" size="0.03 0.02" mass="0.1" rgba="0.1 0.1 0.8 1"/>
    </body>
  </worldbody>
  <equality><weld body1="mocap" body2="hand" solref="0.01 1"/></equality>
</mujoco>
"""
FRAME_SKIP, MAX_PATH_LENGTH = 5, 500


class SmallEnv:
    """One task. The attributes that the adapter sets are those of metaworld's SawyerXYZEnv."""

    task = 0

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)
        self._partially_observable, self._freeze_rand_vec, self.seeded_rand_vec = True, True, False
        self._set_task_called = False
        self.curr_path_length = 0

    def seed(self, seed):
        self.np_random = np.random.default_rng([seed, self.task])

    def reset(self):
        assert self._set_task_called
        assert self.seeded_rand_vec
        assert not self._freeze_rand_vec
        self.curr_path_length = 0
        mujoco.mj_resetData(self.model, self.data)
        self.goal = self.np_random.uniform((-0.3, 0.4, 0.1), (0.3, 0.9, 0.4))
        self.data.qpos[3:5] += self.np_random.uniform(-0.05, 0.05, 2)
        mujoco.mj_forward(self.model, self.data)
        return self._observation(), {}

    def step(self, action):
        assert action.shape == (4,)
        if self.curr_path_length >= MAX_PATH_LENGTH:
            raise ValueError("You must reset the env manually once truncate==True")
        self.data.mocap_pos[0] += action[:3] / 100
        mujoco.mj_step(self.model, self.data, nstep=FRAME_SKIP)
        mujoco.mj_forward(self.model, self.data)
        self.curr_path_length += 1
        observation = self._observation()
        distance = np.linalg.norm(observation[:3] - self.goal)
        return observation, 0.0, False, False, {"success": float(distance < 0.03), "grasp_success": 0.0}

    def _observation(self):
        goal = np.zeros(3) if self._partially_observable else self.goal
        puck = self.data.body("puck").xpos
        return np.concatenate([self.data.body("hand").xpos, [1.0], puck, np.zeros(29), goal])


class SmallExpert:
    """Moves to the goal with the gripper closed."""

    def get_action(self, observation):
        return np.array([*np.clip(20 * (observation[-3:] - observation[:3]), -2, 2), 1.0])


def install():
    """Put the stand-in into `sys.modules`. Returns the names of its modules."""
    modules = {name: ModuleType(name) for name in ("metaworld", "metaworld.env_dict", "metaworld.policies")}
    environments = {task: type(f"SmallEnv{i}", (SmallEnv,), {"task": i}) for i, task in enumerate(INSTRUCTIONS)}
    modules["metaworld.env_dict"].ALL_V3_ENVIRONMENTS = environments
    modules["metaworld.policies"].ENV_POLICY_MAP = dict.fromkeys(INSTRUCTIONS, SmallExpert)
    sys.modules.update(modules)
    return tuple(modules)
