"""Tabletop episodes through `agra serve` by clients of other projects.

For an environment with `agra[tabletop]` and Physical Intelligence's `openpi-client`, or `strands-robots` for GR00T's protocol,
without torch: python benchmarks/client_episode.py openpi|groot PORT [EPISODES]
"""

import sys
from collections.abc import Callable

import numpy as np

from agra.simulators.registry import make
from agra.types import Observation

EXECUTE_STEPS = 8
Infer = Callable[[Observation, int | None], np.ndarray]
"""Returns the actions (K, D) for an observation. A seed begins an episode."""


def openpi(port: int) -> Infer:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy  # pyright: ignore[reportMissingImports]

    client = WebsocketClientPolicy("127.0.0.1", port)
    print("policy of the server:", client.get_server_metadata()["policy"])

    def infer(observation: Observation, seed: int | None) -> np.ndarray:
        request = {
            "observation/image": observation.frame,
            "observation/state": observation.state,
            "prompt": observation.instruction,
        }
        if seed is not None:
            request["seed"] = seed
        return client.infer(request)["actions"]

    return infer


def groot(port: int) -> Infer:
    from strands_robots.policies.groot.client import GR00TClient  # pyright: ignore[reportMissingImports]

    client = GR00TClient("127.0.0.1", port)
    print("reply to a ping:", client.ping())

    def infer(observation: Observation, seed: int | None) -> np.ndarray:
        # This client cannot begin an episode, so all of its episodes share one sequence of random numbers.
        request = {
            "video.ego_view": observation.frame[None],
            "state.state": observation.state[None],
            "annotation.human.action.task_description": [observation.instruction],
        }
        return client.get_action(request)["action.action"]

    return infer


def main() -> None:
    """Play the episodes and print their results."""
    wire, port, episodes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    infer, env = {"openpi": openpi, "groot": groot}[wire](port), make("tabletop")
    successes = 0
    for trial in env.trials("in_distribution")[:: 50 // episodes][:episodes]:
        observation, success, number = env.reset(trial), False, 0
        while number < env.max_steps and not success:
            for action in infer(observation, None if number else trial.seed)[:EXECUTE_STEPS]:
                step, number = env.step(action), number + 1
                observation, success = step.observation, step.success
                if success or number == env.max_steps:
                    break
        successes += success
        print(f"{trial.name}: {'success' if success else 'no success'} after {number} steps", flush=True)
    env.close()
    print(f"{wire}: {successes} of {episodes}; torch is {'' if 'torch' in sys.modules else 'not '}loaded here")


if __name__ == "__main__":
    main()
