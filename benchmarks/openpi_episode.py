"""Physical Intelligence's own `openpi-client` plays episodes of the tabletop through `agra serve`.

For an environment with `openpi-client` and `agra[tabletop]`, without torch: python benchmarks/openpi_episode.py PORT [EPISODES]
"""

import sys

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from agra.simulators.registry import make

EXECUTE_STEPS = 8


def main() -> None:
    """Play, and say how it went."""
    port, episodes = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    server = WebsocketClientPolicy("127.0.0.1", port)
    print("the server says:", server.get_server_metadata()["policy"])
    policy, world = ActionChunkBroker(server, EXECUTE_STEPS), make("tabletop")
    successes = 0
    for trial in world.trials("in_distribution")[:: 50 // episodes][:episodes]:
        seen, step = world.reset(trial), None
        policy.reset()
        for number in range(world.max_steps):
            request = {"observation/image": seen.frame, "observation/state": seen.state, "prompt": seen.instruction}
            if number == 0:
                request["seed"] = trial.seed
            step = world.step(policy.infer(request)["actions"])
            seen = step.observation
            if step.success:
                break
        successes += bool(step and step.success)
        print(
            f"{trial.name}: {'success' if step and step.success else 'no success'} after {number + 1} steps", flush=True
        )
    world.close()
    print(f"{successes} of {episodes}; torch is {'' if 'torch' in sys.modules else 'not '}loaded here")


if __name__ == "__main__":
    main()
