"""A stand-in for XPolicyLab: what its server imports, its debug client's observation, and that client's checks of actions.

Written from the format of its README (observation data v1.0) and the checks of its debug client.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np

ROBOTS = {
    "arx_x5": {"arm_dim": [6, 6], "ee_dim": [1, 1]},
    "one_arm": {"arm_dim": [6], "ee_dim": [1]},
    "tabletop": {"arm_dim": [4, 4], "ee_dim": [1, 1]},
}


class ModelTemplate:
    def __init__(self):
        self.model = None


def resolve_checkpoint_root(cfg, checkpoints, *, policy_dir):
    """The first existing folder of those that XPolicyLab tries, in its order."""
    name = cfg["ckpt_name"]
    run = "-".join(str(cfg[key]) for key in ("bench_name", "ckpt_name", "env_cfg_type", "action_type", "seed"))
    tried = [Path(policy_dir) / name] if "/" in name else [Path(checkpoints) / run, Path(checkpoints) / name]
    for folder in tried:
        if folder.exists():
            return folder
    raise FileNotFoundError(f"could not resolve a checkpoint: {tried}")


def observation(robot, env_idx=0, seed=0):
    """An observation in data format v1.0."""
    rng = np.random.default_rng([seed, env_idx])
    state = {"mobile": {"base_pose": [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]}}
    arms, hands = ROBOTS[robot]["arm_dim"], ROBOTS[robot]["ee_dim"]
    for side, arm, hand in zip(("left_", "right_") if len(arms) == 2 else ("",), arms, hands, strict=True):
        state[f"{side}arm_joint_state"] = rng.normal(size=arm).astype(np.float32)
        state[f"{side}ee_joint_state"] = rng.normal(size=hand).astype(np.float32)
        state[f"{side}ee_pose"] = rng.normal(size=7).astype(np.float32)
    cameras = ("cam_head", "cam_left_wrist", "cam_right_wrist")
    return {
        "data_format_version": "v1.0",
        "instruction": "stack the bowls",
        "env_idx": env_idx,
        "additional_info": {"frequency": 30},
        "vision": {name: {"color": rng.integers(0, 256, (48, 64, 3), np.uint8)} for name in cameras},
        "state": state,
    }


def check_action(action, robot):
    """Raise ValueError as the debug client does: an unknown key, a value that is not (n,), or a wrong n."""
    arms, hands = ROBOTS[robot]["arm_dim"], ROBOTS[robot]["ee_dim"]
    sides = ("left_", "right_") if len(arms) == 2 else ("",)
    sizes = {f"{side}arm_joint_state": size for side, size in zip(sides, arms, strict=True)}
    sizes |= {f"{side}ee_joint_state": size for side, size in zip(sides, hands, strict=True)}
    sizes |= {f"{side}{pose}": 7 for side in sides for pose in ("ee_pose", "tcp_pose", "delta_ee_pose")}
    for key, value in action.items():
        if key not in sizes:
            raise ValueError(f"unexpected key {key}")
        if np.asarray(value).shape != (sizes[key],):
            raise ValueError(f"{key}: expected ({sizes[key]},), got {np.asarray(value).shape}")


def install(monkeypatch):
    """Put the stand-in in place of the package, for one test."""
    contents = {
        "XPolicyLab": {},
        "XPolicyLab.utils": {},
        "XPolicyLab.model_template": {"ModelTemplate": ModelTemplate},
        "XPolicyLab.utils.process_data": {"get_robot_action_dim_info": ROBOTS.__getitem__},
        "XPolicyLab.utils.checkpoint_resolver": {"resolve_checkpoint_root": resolve_checkpoint_root},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
