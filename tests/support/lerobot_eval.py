"""`lerobot-eval` with a hash of every episode. Runs in LeRobot's own environment, `make env-lerobot`.

Usage: lerobot_eval.py DIGESTS FLAGS..., where FLAGS are lerobot-eval's, with one synchronous environment. Writes the
JSON list of [trial, success, digest] to DIGESTS, by the recorder that `agra evaluate` uses.
"""

import json
import sys
from pathlib import Path

import numpy as np
from lerobot.scripts.lerobot_eval import eval_main
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_env_agra.environment import LeRobotTabletop
from lerobot_policy_agra import modeling_agra

from agra.evaluation.rollout import RecordedPolicy
from agra.types import Episode, PolicyRequest


class Single:
    """One episode at a time of a `BatchPolicy`, as a `Policy`."""

    def __init__(self, policy):
        self.policy, self.episode = policy, None

    def reset(self, seed):
        self.episode = self.policy.episode(seed)

    def act(self, observation):
        return self.policy.act_batch([PolicyRequest(observation=observation, episode=self.episode)])[0]


class Recorded:
    """A `BatchPolicy` whose only episode is recorded. It stands in for what the plugin opens."""

    def __init__(self, policy):
        self.spec, self.recorder = policy.spec, RecordedPolicy(Single(policy))

    def episode(self, seed):
        self.recorder.reset(seed)

    def act_batch(self, requests):
        (request,) = requests
        assert request.continuation is None
        return [self.recorder.act(request.observation)]


def main(target, flags):
    played, opened = [], []
    reset, step, plain = LeRobotTabletop.reset, LeRobotTabletop.step, modeling_agra._open

    def recorded(config):
        opened.append(Recorded(plain(config)))
        return opened[-1]

    def recorded_reset(self, **options):
        result = reset(self, **options)
        self.rows = []
        return result

    def recorded_step(self, action):
        self.rows.append((self._last.state, np.array(action, np.float32)))
        result = step(self, action)
        success, truncated, info = result[2:]
        if success or truncated:
            states, actions = map(np.stack, zip(*self.rows, strict=True))
            episode = Episode(
                frames=np.empty((len(states), 0, 0, 3), np.uint8),
                states=states,
                actions=actions,
                instruction=self.task_description,
                embodiment=self.simulator.name,
                fps=10,
            )
            played.append((info["trial"], bool(success), opened[0].recorder.digest(episode)))
        return result

    modeling_agra._open, LeRobotTabletop.reset, LeRobotTabletop.step = recorded, recorded_reset, recorded_step
    sys.argv = ["lerobot-eval", *flags]
    register_third_party_plugins()
    eval_main()
    Path(target).write_text(json.dumps(played))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
