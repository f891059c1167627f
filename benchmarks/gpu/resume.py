"""Section 6: a run that is killed and resumed equals one that was not, and its checkpoint can be served and diagnosed.

Latents are encoded while training, by the codec on the GPU in two threads, as a run without a cache does. The networks have
the paper's widths and tokens and two blocks each, so that a checkpoint is written in seconds.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import torch

from agra.batch import Batch
from agra.checkpoints.folder import newest
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.data.sampling.prefetch import Prefetched
from agra.methods.method import ReadsTokens
from agra.policies.instructions import FILE as INSTRUCTIONS
from agra.policies.instructions import Instructions
from agra.policies.load import load_policy
from agra.precision import allow_tensor_cores
from agra.rng import seed_everything
from agra.training.distributed import distributed_context
from agra.training.memory_estimate import fake_batch
from agra.training.parallelize import ParallelConfig, build
from agra.training.trainer import Trainer
from agra.types import Observation
from agra.wam.codec import load_codec, to_video
from agra.weights import read_tensors, write_tensors
from benchmarks.gpu.frozen import text_encoder
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting, shallow, wam_of

STEPS, SAVE, KILLED_AT = 20, 10, 13
INSTRUCTION = "put the bottle into the cabinet"


def run(setting: Setting, section: Section) -> None:
    """Train three times: whole, killed, resumed. Then compare, serve and diagnose."""
    setting.codec().vae.save_pretrained(setting.scratch / "codec" / "vae")
    whole, killed = setting.scratch / "whole", setting.scratch / "killed"

    def trained(deterministic: bool) -> Figures:
        figures = _train_killed_and_resumed(setting, whole, killed, deterministic)
        return figures | compare(newest(whole), newest(killed))

    figures = section.measure("resumed after SIGKILL", lambda: trained(True), needs=75)
    if "failed" in figures and section.report.left > 75:
        section.measure("resumed after SIGKILL, not deterministic", lambda: trained(False), needs=75)
    if newest(whole) is None:
        section.skip("serving and diagnosis", "there is no checkpoint")
        return
    section.measure("loaded as a policy", lambda: _answer(setting, whole), needs=10)
    section.measure("served", lambda: _serve(setting, whole), needs=25)
    section.measure("diagnosed", lambda: _diagnose(setting, whole), needs=10)


def run_config(setting: Setting) -> RunConfig:
    """The joint stage for 20 steps. The codec's weights lie in the scratch folder."""
    config = shallow(setting.config())
    method = wam_of(config)
    model = method.model
    codec = replace(model.codec, source=str(setting.scratch / "codec"), revision=None)
    stage = replace(
        config.stage, steps=STEPS, batch_size=4, save_every=SAVE, validate_every=5, log_every=1, keep_checkpoints=1
    )
    method = replace(method, model=replace(model, codec=codec))
    return replace(config, method=method, data=replace(config.data, cached=("targets",)), stage=stage)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run in a process of its own."""

    setting: Setting
    folder: Path
    deterministic: bool
    killed_at: int | None = None

    def __call__(self) -> None:
        """Train to the end, or to the step at which the process kills itself."""
        config = run_config(self.setting)
        parallel = ParallelConfig(compile=False, deterministic=self.deterministic)
        torch.set_num_threads(1)
        device = str(self.setting.device)
        with distributed_context(device, shard_degree=None, deterministic=self.deterministic) as context:
            allow_tensor_cores(context.device)

            def make():
                seed_everything(config.stage.seed)
                return config.method.build()

            codec = load_codec(wam_of(config).model.codec).to(context.device)
            # Made once: torch's global generator belongs to the training step, so worker threads must not draw from it.
            template = fake_batch(config.method, config.stage.batch_size)

            def batch(step: int) -> Batch:
                return windows(config, template, codec.encode, step)

            with Prefetched(batch, workers=2, pin=context.device.type == "cuda") as batches:

                def next_batch(step: int) -> Batch:
                    if step == self.killed_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return batches(step)

                fresh = newest(self.folder) is None
                trainer = Trainer(
                    config,
                    build(make, config.stage, parallel, context, (lambda method: None) if fresh else None),
                    batch=next_batch,
                    validation=lambda: batch(1_000_000),
                    output=self.folder,
                    extra_files=extra_files(config),
                    context=context,
                    parallel=parallel,
                )
                trainer.run()


def windows(config: RunConfig, template: Batch, encode: Callable[[torch.Tensor], torch.Tensor], step: int) -> Batch:
    """A step's samples, made from its number alone: random clips through the codec, the rest random as in `template`."""
    model = wam_of(config).model
    generator = np.random.default_rng(step)
    clips = generator.integers(0, 256, (len(template), model.num_frames, *model.frame_size, 3), dtype=np.uint8)
    values = {
        name: torch.from_numpy(generator.standard_normal(value.shape, dtype=np.float32))
        for name, value in template.tensors.items()
        if value.is_floating_point() and name != "latents"
    }
    latents = encode(to_video(clips, model.frame_size)).half().float().cpu()
    return replace(template, latents=latents, **values)


def extra_files(config: RunConfig) -> dict[str, Callable[[Path], object]]:
    """The files of a checkpoint that a policy needs besides the weights."""
    shapes = config.method.shapes

    def statistics(size: int) -> dict[str, np.ndarray]:
        low, high = -np.ones(size), np.ones(size)
        return {"mean": np.zeros(size), "std": high, "min": low, "max": high, "q01": low, "q99": high, "count": high}

    stats = NormStats(method="mean_std", state=statistics(shapes.state_dim), action=statistics(shapes.action_dim))
    tokens = torch.randn(shapes.instruction, generator=torch.Generator().manual_seed(0))
    return {
        "norm_stats.json": partial(NormStats.save_all, {config.data.embodiments[0]: stats}),
        INSTRUCTIONS: lambda path: write_tensors(path, {INSTRUCTION: tokens.half()}),
    }


def _train_killed_and_resumed(setting: Setting, whole: Path, killed: Path, deterministic: bool) -> Figures:
    started = monotonic()
    first = _start(setting, whole, deterministic)
    second = _start(setting, killed, deterministic, killed_at=KILLED_AT)  # beside the first
    second.join()
    saved = newest(killed)
    if second.exitcode != -signal.SIGKILL or saved is None:
        raise RuntimeError(f"the run to be killed ended with exit code {second.exitcode}, checkpoint {saved}")
    resumed_from = json.loads((saved / "trainer.json").read_text())["step"]
    third = _start(setting, killed, deterministic)
    for process in (first, third):
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a training run ended with exit code {process.exitcode}")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    return {
        "resumed_from": resumed_from,
        "deterministic": deterministic,
        "validations": sum("validation/loss" in row for row in rows),
        "last_loss": rows[-2].get("loss", rows[-1].get("loss")),
        "wall_seconds": monotonic() - started,
    }


def _start(setting: Setting, folder: Path, deterministic: bool, killed_at: int | None = None):
    task = Run(setting=setting, folder=folder, deterministic=deterministic, killed_at=killed_at)
    process = setting.processes().Process(target=task)
    process.start()
    return process


def compare(first: Path | None, second: Path | None) -> Figures:
    """The largest difference of two checkpoints' tensors, weights and moments alike."""
    assert first is not None
    assert second is not None
    tensors = equal = 0
    largest = 0.0
    for path in sorted(first.glob("*.safetensors")):
        ours, theirs = read_tensors(path), read_tensors(second / path.name)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            tensors += 1
            equal += torch.equal(value, theirs[name])
            largest = max(largest, (value.float() - theirs[name].float()).abs().max().item())
    return {"tensors": tensors, "equal_tensors": equal, "largest_difference": largest}


def _observation(setting: Setting, config: RunConfig) -> Observation:
    height, width = wam_of(config).model.frame_size
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    state = np.zeros(config.method.shapes.state_dim, np.float32)
    return Observation(frame=frame, state=state, instruction=INSTRUCTION, embodiment=config.data.embodiments[0])


def _answer(setting: Setting, run: Path) -> Figures:
    policy = load_policy(run, device=setting.device, known_instructions=True)
    chunk = policy.act_and_imagine(_observation(setting, policy.config))
    assert np.isfinite(chunk.actions).all()
    assert chunk.imagined is not None
    return {"actions": list(chunk.actions.shape), "imagined_frames": len(chunk.imagined)}


def _serve(setting: Setting, run: Path) -> Figures:
    """`agra serve` in a process of its own, and an answer over the wire."""
    for package in ("websockets", "msgpack", "prometheus_client", "zmq"):
        import_module(package)
    from agra.serving.client import PolicyClient

    ready = setting.scratch / "ready.json"
    arguments = ["serve", str(run), "--port", "0", "--ready-file", str(ready), "--device", str(setting.device)]
    started = monotonic()
    process = setting.processes().Process(target=_command, args=([*arguments, "--known-instructions"],))
    process.start()
    try:
        while not ready.is_file():
            if not process.is_alive():
                raise RuntimeError(f"agra serve ended with exit code {process.exitcode}")
            sleep(0.05)
        waited = monotonic() - started
        client = PolicyClient(json.loads(ready.read_text())["address"], timeout=30)
        observation = _observation(setting, run_config(setting))
        client.reset(0)
        chunk = client.act(observation)
        trips = [client.act(observation).timings["round_trip"] for _ in range(setting.pick(20, 2))]
        client.close()
    finally:
        process.terminate()
        process.join(20)
    assert np.isfinite(chunk.actions).all()
    return {"seconds": float(np.median(trips)), "ready_after_seconds": waited, "exit_code": process.exitcode}


def _command(arguments: list[str]) -> None:
    from agra.cli.main import main

    torch.set_num_threads(1)
    main(arguments)


def _diagnose(setting: Setting, run: Path) -> Figures:
    """Two samples under every instrument."""
    from agra.diagnostics.diagnosis import diagnose
    from agra.diagnostics.measurement import DiagnosisConfig
    from agra.diagnostics.samples.probe_sample import ProbeSample

    policy = load_policy(run, device=setting.device, known_instructions=True)
    assert policy.instructions is not None
    # The instruments name the words of an instruction by its tokens, for which a small text encoder does.
    encoder = text_encoder(setting, small=True, length=wam_of(policy.config).model.text.length)
    policy.observations.instructions = Instructions(lambda: encoder, policy.instructions.known)
    assert isinstance(policy.method, ReadsTokens)
    frames, _, _ = policy.method.token_grid
    observation = _observation(setting, policy.config)
    height, width = observation.frame.shape[:2]
    mask = np.zeros((frames, height, width), bool)
    mask[:, : height // 2, : width // 2] = True
    samples = [
        ProbeSample(
            trial=f"random-{number}", step=0, regime="in_distribution", instruction=INSTRUCTION,
            embodiment=observation.embodiment, state=observation.state,
            frames=np.random.default_rng(number).integers(0, 256, (frames, *observation.frame.shape), dtype=np.uint8),
            masks=mask,
        )
        for number in range(2)
    ]  # fmt: skip
    settings = DiagnosisConfig(noise_samples=1, background_sets=1, gallery=1, map_kinds=("mean",), imagination_steps=2)
    started = monotonic()
    diagnosis = diagnose(policy, samples, setting.scratch / "diagnosis", config=settings, progress=False)
    ratios = [row["in_mask_ratio"] for row in diagnosis.rows]
    return {"seconds": monotonic() - started, "samples": len(ratios), "in_mask_ratio": float(np.mean(ratios))}
