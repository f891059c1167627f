"""Policies in simulators, both opened by name: the functions behind `agra evaluate`.

Imports torch only to open a checkpoint, so that it works in a simulator's own environment.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agra import files
from agra.evaluation.protocols import Protocol, Shard, default_protocol, regime_trials
from agra.evaluation.results import Results
from agra.evaluation.rollout import evaluate as evaluate_trials
from agra.simulators.registry import expert, make
from agra.types import ActionNoise, Policy, Simulator, VideoNoise

EXPERT = "expert"
"""The name under which a simulator's scripted expert is opened."""


def make_simulator(name: str, **options: Any) -> Simulator:
    """Make a simulator of `agra.simulators.registry` with its suite's `options`, such as the tabletop's frame_size.

    Raises ValueError for an unknown name, and ImportError if the suite or OpenGL is not installed.
    """
    return make(name, **options)


def open_policy(
    policy: str | Path,
    simulator: Simulator,
    *,
    name: str | None = None,
    key_mapping: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
    timeout: float = 10.0,
) -> Policy:
    """Open a policy: a checkpoint or run folder, a bundled policy, a server's address, or `expert`.

    Servers are ws://HOST:PORT, or with a `key_mapping` (`agra.serving.remote_policies`) those of other packages. They
    receive the key in the variable AGRA_API_KEY and have `timeout` seconds for an answer. `name`, `device`, `threads`
    (of torch, for the whole process), `action_noise` and `video_noise` (`agra.policies.policy.MethodPolicy`) apply to
    checkpoints.
    """
    address = str(policy)
    if address == EXPERT:
        return expert(simulator)
    api_key = os.environ.get("AGRA_API_KEY")
    if key_mapping is not None:
        from agra.serving.remote_policies import connect_policy, read_key_mapping

        return connect_policy(address, read_key_mapping(key_mapping), api_key=api_key)
    if "://" in address:
        from agra.serving.client import PolicyClient

        return PolicyClient(address, api_key=api_key, timeout=timeout)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from agra.policies.load import load_policy

    return load_policy(policy, name=name, device=device, action_noise=action_noise, video_noise=video_noise)


def evaluate(
    policy: Policy | str | Path,
    simulator: Simulator | str = "tabletop",
    *,
    output: str | Path | None = None,
    name: str | None = None,
    regimes: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    protocol: Protocol | None = None,
    videos: int = 0,
    workers: int = 1,
    simulator_options: Mapping[str, Any] | None = None,
    key_mapping: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
    checkpoint_sha256: str | None = None,
    computed_on: str | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> Results:
    """Play a benchmark's trials and write the results file `output`. The same call resumes an interrupted evaluation.

    `policy` and `simulator` are objects or names (see `open_policy` and `make_simulator`, which receives
    `simulator_options`). `regimes`, `tasks` and `limit` choose the trials (`agra.evaluation.protocols.regime_trials`).
    By default, `output` is results.jsonl in the folder of the policy's run, `name` (of the policy, in the results) is the
    name of that folder, and the protocol is the simulator's usual one, with a single executed action for the expert.
    `action_noise` and `video_noise` are those of `agra.policies.policy.MethodPolicy`. A server has chosen its own, which
    must agree. For a server of another package they are only recorded in the results.
    `videos` trials of each regime are saved as mp4. A `shard` plays its part of the trials
    (`agra.evaluation.protocols`). A run folder means its newest checkpoint at the time of the call, and the results name
    that checkpoint, and the device's type and precision (`agra.evaluation.results.CHECKPOINT`, `COMPUTED_ON`). Results of
    others are not continued. For a server, `checkpoint_sha256` and `computed_on` name them, if they are known.

    With several `workers`, each process opens its own policy and simulator, so both must be names. The episodes are the
    same for any number of workers. Raises what `agra.evaluation.rollout.evaluate` raises.
    """
    output, name = results_file(policy, output, name, key_mapping)
    checkpoint = checkpoint_of(policy, key_mapping)
    for given, value in (("checkpoint_sha256", checkpoint_sha256), ("computed_on", computed_on)):
        if value is not None and (checkpoint is not None or policy == EXPERT):
            raise ValueError(f"{given}: expected none for {policy}, because it is for policies behind a server")
    if checkpoint is not None:
        policy = checkpoint  # the same one for all workers, whatever a training run adds
        checkpoint_sha256, computed_on = manifest_sha256(checkpoint), device_and_precision(checkpoint, device)
    policy_settings = {"key_mapping": key_mapping} if key_mapping else {}
    noise = _noise(policy, {"action_noise": action_noise, "video_noise": video_noise}, key_mapping)
    policy_settings |= {name: kind for name, kind in noise.items() if kind != "random"}
    options = dict(simulator_options or {})
    make_player = None
    if not isinstance(policy, Policy) and isinstance(simulator, str):
        settings = {
            "name": name,
            "key_mapping": key_mapping,
            "device": device,
            "threads": threads,
            "timeout": 120.0,
            **noise,
        }
        make_player = partial(_open_player, policy, simulator, options, settings)
    elif workers > 1:
        raise ValueError(f"workers: {workers} processes open their own policy and simulator; give both by name")
    env = make(simulator, **options) if isinstance(simulator, str) else simulator
    try:
        opened = None
        if isinstance(policy, Policy):
            opened = policy
        elif workers == 1:
            opened = open_policy(
                policy,
                env,
                name=name,
                key_mapping=key_mapping,
                device=device,
                threads=threads,
                timeout=120.0,
                **noise,
            )
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        return evaluate_trials(
            opened,
            env,
            regime_trials(env, regimes, tasks=tasks, limit=limit),
            output=output,
            protocol=protocol or usual_protocol(policy, env.name),
            videos=videos,
            workers=workers,
            make_player=make_player,
            policy_name=name,
            policy_settings=policy_settings,
            checkpoint_sha256=checkpoint_sha256,
            computed_on=computed_on,
            shard=shard,
            progress=progress,
        )
    finally:
        if isinstance(simulator, str):
            env.close()


def usual_protocol(policy: Policy | str | Path, simulator: str) -> Protocol:
    """The protocol of a simulator's published evaluations. The expert is called at every step."""
    usual = default_protocol(simulator)
    return replace(usual, execute_steps=1) if policy == EXPERT else usual


def results_file(
    policy: Policy | str | Path, output: str | Path | None, name: str | None, key_mapping: str | None = None
) -> tuple[Path, str]:
    """The results file of an evaluation and the policy's name in it.

    Raises ValueError if the policy does not decide them.
    """
    by_path = not isinstance(policy, Policy) and policy != EXPERT and "://" not in str(policy)
    if output is None and not by_path:
        raise ValueError(
            f"output: give a results file; only a checkpoint or run folder has a default, {policy} has none"
        )
    if str(policy).startswith("tcp://") and key_mapping is None:
        raise ValueError(f"key mapping: {policy} needs the keys of its messages, e.g. groot_gr1")
    if name is None:
        if not by_path and policy != EXPERT:
            raise ValueError(f"name: give the name of the policy {policy} in the results")
        name = Path(str(policy)).name
    if output is None:
        from agra.checkpoints.folder import artifact_dir

        output = artifact_dir(str(policy)) / "results.jsonl"
    return Path(output), name


def checkpoint_of(policy: Policy | str | Path, key_mapping: str | None = None) -> Path | None:
    """Return the checkpoint folder of a policy given by a folder or a bundled policy's name, None for any other."""
    if isinstance(policy, Policy) or policy == EXPERT or key_mapping is not None or "://" in str(policy):
        return None
    from agra.checkpoints.folder import resolve

    return resolve(policy)


def manifest_sha256(checkpoint: Path) -> str:
    """Return the checksum of a checkpoint's manifest, which holds the checksums of its files."""
    return files.sha256(checkpoint / "manifest.json")


def device_and_precision(checkpoint: Path, device: str) -> str:
    """Return the type of a checkpoint's device and the precision of its weights there, such as "cuda, bfloat16"."""
    from agra.checkpoints.read import read_config
    from agra.precision import compute_dtype, local_device

    local = local_device(device)
    dtype = compute_dtype(local, read_config(checkpoint).stage.precision)
    return f"{local.type}, {str(dtype).removeprefix('torch.')}"


def _noise(policy: Policy | str | Path, requested: Mapping[str, str | None], key_mapping: str | None) -> dict[str, Any]:
    """Return the kinds of noise of a policy's answers, by setting: the `requested` ones, by default its own.

    Raises ValueError where a request differs from what a policy object, a server or the expert has.
    """
    served = key_mapping is None and "://" in str(policy)
    own: Any = None
    if isinstance(policy, Policy):
        own = getattr(policy, "spec", None)
    elif served:
        from agra.serving.client import PolicyClient

        client = PolicyClient(str(policy), api_key=os.environ.get("AGRA_API_KEY"))
        own = client.spec
        client.close()
    elif policy != EXPERT and key_mapping is None:
        from agra.checkpoints.folder import resolve
        from agra.checkpoints.read import read_config

        own = read_config(resolve(policy))
    noise = {}
    for setting, kind in requested.items():
        noise[setting] = getattr(own, setting, "random")
        if kind is None or kind == noise[setting]:
            continue
        if policy == EXPERT:
            raise ValueError(f"{setting}: the expert has none, got {kind}")
        if isinstance(policy, Policy) or served:
            raise ValueError(f"{setting}: {policy} has {noise[setting]} noise; choose {kind} where it is loaded")
        noise[setting] = kind
    return noise


def _open_player(
    policy: str | Path, simulator: str, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Policy, Simulator]:
    """The policy and the simulator of one process."""
    env = make(simulator, **options)
    return open_policy(policy, env, **settings), env
