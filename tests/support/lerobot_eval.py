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
from lerobot_policy_agra.modeling_agra import AgraPolicy

from agra.evaluation.rollout import RecordedPolicy
from agra.types import Episode


def main(target, flags):
    played = []
    connect, reset, step = AgraPolicy._connect, LeRobotTabletop.reset, LeRobotTabletop.step
    recorders = []

    def recorded_connect(self):
        client = connect(self)
        recorder = RecordedPolicy(client)
        recorder.spec = client.spec
        recorder.act = _with_continuation(recorder.act)
        recorders.append(recorder)
        return recorder

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
            played.append((info["trial"], bool(success), recorders[0].digest(episode)))
        return result

    AgraPolicy._connect, LeRobotTabletop.reset, LeRobotTabletop.step = recorded_connect, recorded_reset, recorded_step
    sys.argv = ["lerobot-eval", *flags]
    register_third_party_plugins()
    eval_main()
    Path(target).write_text(json.dumps(played))


def _with_continuation(act):
    def without(observation, continuation):
        assert continuation is None
        return act(observation)

    return without


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
