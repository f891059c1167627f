"""Others' own clients play episodes of the tabletop through `agra serve`.

For an environment with `agra[tabletop]` and Physical Intelligence's `openpi-client`, or `strands-robots` for GR00T's wire,
without torch: python benchmarks/client_episode.py openpi|groot PORT [EPISODES]
"""

import sys
from collections.abc import Callable

import numpy as np

from agra.simulators.registry import make
from agra.types import Observation

EXECUTE_STEPS = 8


def openpi(port: int) -> Callable[[Observation, int | None], np.ndarray]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    client = WebsocketClientPolicy("127.0.0.1", port)
    print("the server says:", client.get_server_metadata()["policy"])

    def ask(seen: Observation, seed: int | None) -> np.ndarray:
        request = {"observation/image": seen.frame, "observation/state": seen.state, "prompt": seen.instruction}
        if seed is not None:
            request["seed"] = seed
        return client.infer(request)["actions"]

    return ask


def groot(port: int) -> Callable[[Observation, int | None], np.ndarray]:
    from strands_robots.policies.groot.client import GR00TClient

    client = GR00TClient("127.0.0.1", port)
    print("the server answers a ping:", client.ping())

    def ask(seen: Observation, seed: int | None) -> np.ndarray:
        # Without the means to begin an episode, this client's episodes are one sequence of random numbers.
        request = {"video.ego_view": seen.frame[None], "state.state": seen.state[None]}
        request["annotation.human.action.task_description"] = [seen.instruction]
        return client.get_action(request)["action.action"]

    return ask


def main() -> None:
    """Play, and say how it went."""
    wire, port, episodes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    ask, world = {"openpi": openpi, "groot": groot}[wire](port), make("tabletop")
    successes = 0
    for trial in world.trials("in_distribution")[:: 50 // episodes][:episodes]:
        seen, step, number = world.reset(trial), None, 0
        while number < world.max_steps and not (step and step.success):
            for action in ask(seen, None if number else trial.seed)[:EXECUTE_STEPS]:
                step, number = world.step(action), number + 1
                if step.success or number == world.max_steps:
                    break
            seen = step.observation
        successes += step.success
        print(f"{trial.name}: {'success' if step.success else 'no success'} after {number} steps", flush=True)
    world.close()
    print(f"{wire}: {successes} of {episodes}; torch is {'' if 'torch' in sys.modules else 'not '}loaded here")


if __name__ == "__main__":
    main()
