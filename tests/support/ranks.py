"""Several processes of one run on one machine, for tests: a launcher that forks them as torchrun would start them.

The launcher imports everything once. It reads a JSON task per line, prints the processes' ids, and prints their exit codes
when all have ended. `Launcher` is the client for tests.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__)
SAMPLES = 8


class Launcher:
    """Starts groups of processes. `errors` is their present output on stderr."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, size, output, **task):
        """Start `size` processes and return their ids. Call `wait` afterwards."""
        self.process.stdin.write(json.dumps({"size": size, "output": str(output), **task}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self):
        return json.loads(self.process.stdout.readline())

    def run(self, size, output, **task):
        """Start processes, wait, and return the exit codes."""
        self.start(size, output, **task)
        return self.wait()

    @property
    def errors(self):
        return self.log.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def task_config(task):
    """Return the small config with every kind of noise, for batches of 8."""
    from agra.lora import LoRAConfig
    from tests.support.small import make_small_config, with_model, with_objective

    config = make_small_config()
    model = config.method.model
    config = with_model(
        with_objective(config, video_batch_fraction=0.5),
        video_dit=replace(model.video_dit, num_layers=2),
        bridge=replace(model.bridge, layers=(0, 1)),
        action_dit=replace(model.action_dit, state_dropout=0.5),
    )
    asked = {"batch_size": SAMPLES, **task.get("stage", {})}
    if "lora" in asked:
        asked["lora"] = LoRAConfig(**asked["lora"])
    return replace(config, stage=replace(config.stage, **asked))


def task_batch(config, step, poisoned=()):
    """Return a step's whole batch, with actions of different lengths and targets of even rows. `poisoned` rows are not finite."""
    import torch

    from tests.support.small import random_batch

    batch = random_batch(config, count=SAMPLES, seed=step)
    keep = torch.arange(config.method.model.action_dit.horizon)[None, :] <= torch.arange(SAMPLES)[:, None] % 4
    for row in poisoned:
        batch.state[row] = float("nan")
    return replace(batch, action_mask=batch.action_mask & keep[:, :, None], target_rows=torch.arange(0, SAMPLES, 2))


def make_method(config):
    from agra.rng import seed_everything

    seed_everything(config.stage.seed, 2**31 + 1)
    return config.method.build()


def train(task):
    """Train as `agra.api.train` does, on random batches."""
    import torch

    from agra.checkpoints.folder import newest
    from agra.training.distributed import distributed_context
    from agra.training.parallelize import ParallelConfig, build
    from agra.training.trainer import Trainer

    config, parallel = task_config(task), ParallelConfig(**task.get("parallel", {}))
    poison = {int(step): rows for step, rows in task.get("poison", {}).items()}
    if task.get("bytes") is not None:  # a limit of the file size, which fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["bytes"], task["bytes"]))
    options = {"shard_degree": parallel.shard_degree, "deterministic": parallel.deterministic}
    with distributed_context("cpu", **options) as context:
        rank, size = context.rank, context.world_size

        def batch(step):
            if task.get("stop") == [rank, step]:
                os.kill(os.getpid(), signal.SIGTERM)
            part = task_batch(config, step, poison.get(step, ())).micro_batch(rank, size)
            with (Path(task["output"]) / f"seen_{rank}.jsonl").open("a") as handle:
                handle.write(json.dumps([step, part.latents[:, 0, 0, 0, 0].tolist()]) + "\n")
            return part

        if context.is_main:
            Path(task["output"]).mkdir(parents=True, exist_ok=True)
        fresh = newest(Path(task["output"])) is None
        initialize = (lambda method: None) if fresh else None
        trainer = Trainer(
            config,
            build(lambda: make_method(config), config.stage, parallel, context, initialize),
            batch=batch,
            output=Path(task["output"]),
            validation=lambda: task_batch(config, 999).micro_batch(rank, size),
            extra_files={"norm_stats.json": lambda path: path.write_text("{}")},
            context=context,
            parallel=parallel,
            sample_names=lambda step: [f"sample {i} of step {step}" for i in range(rank, SAMPLES, size)],
        )
        if task.get("gradients"):
            trainer.optimizer.register_step_pre_hook(once(lambda: write_gradients(trainer, Path(task["output"]))))
        trainer.run()
    assert not torch.distributed.is_initialized()


def once(action):
    """Return an optimizer hook that acts once."""
    done = []

    def hook(*_):
        if not done:
            done.append(action())

    return hook


def write_gradients(trainer, output):
    """Write the clipped gradients of every parameter, whole, by the main process."""
    from agra.training.optimization import named_parameters
    from agra.weights import write_tensors

    whole = {}
    for name, parameter in named_parameters(trainer.method):
        if (grad := parameter.grad) is not None:
            whole[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if trainer.context.is_main:
        write_tensors(output / "gradients.safetensors", whole)


def worker(rank, size, port, task):
    """Run one process in torchrun's environment."""
    os.dup2(2, 1)  # standard output is the launcher's
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        train(task)
    except (ValueError, OSError) as error:  # as the command line does
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    os._exit(0)


def main():
    sys.path.insert(0, str(HERE.parents[2]))
    import torch.distributed.checkpoint
    import torch.utils.tensorboard

    import agra.training.trainer  # noqa: F401
    import tests.support.small  # noqa: F401

    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        task = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [fork.Process(target=worker, args=(r, task["size"], port, task)) for r in range(task["size"])]
        for process in ranks:
            process.start()
        print(json.dumps([process.pid for process in ranks]), flush=True)
        for process in ranks:
            process.join()
        print(json.dumps([process.exitcode for process in ranks]), flush=True)


if __name__ == "__main__":
    main()
