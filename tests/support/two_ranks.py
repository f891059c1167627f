"""Training in two gloo processes, for tests. `train_in_two_ranks` runs this file: `two_ranks CONFIG OUTPUT [MODULE]`."""

import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train_in_two_ranks(config, output, *, module=""):
    """Train a config into `output` as torchrun would start it. `module` is imported first, to register its method."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f"{output.name}.json"
    path.write_text(config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.two_ranks", str(path), str(output), *filter(None, [module])]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **common}, check=True, timeout=300)


def assert_same_weights(weights, expected):
    """Compare whole tensors: AdamW turns the rounding of a single gradient near zero into a step."""
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("to_k.bias"):  # it changes no attention, its gradient is rounding, which AdamW makes large
            continue
        assert (weights[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


def main(config, output, *modules):
    """Fork the two processes, which share the seconds of importing."""
    from agra.api import train
    from agra.config import RunConfig

    for module in modules:
        import_module(module)
    ranks = []
    for rank in ("0", "1"):
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            path = Path(config)
            os._exit(not train(RunConfig.from_json(path.read_text(), path), output=Path(output)))
        ranks.append(process)
    codes = [os.waitpid(process, 0)[1] for process in ranks]  # wait for both
    sys.exit(any(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
