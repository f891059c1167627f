"""A stand-in for the package vla-eval 0.8: the documented behaviour of its model servers, written from its docstrings.

It checks what the package checks, keeps the chunk of each session and answers one action per observation. Messages pass as
Python objects. tests/integrations/test_vla_evaluation_harness.py plays over the package's own websocket where it is installed.
"""

import asyncio
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class DimSpec:
    name: str
    dims: int
    format: str
    range: tuple | None = None
    accepts: frozenset | None = None
    description: str = ""

    @classmethod
    def from_dict(cls, data):
        known = {key: data[key] for key in ("name", "dims", "format")}
        return cls(**known, range=tuple(data["range"]) if "range" in data else None)


class SessionContext:
    """One episode of a session: `sent` collects its answers."""

    def __init__(self, session_id, episode_id="episode"):
        self.session_id, self.episode_id, self.step, self.sent = session_id, episode_id, 0, []

    async def send_action(self, action):
        self.sent.append(action)


class PredictModelServer:
    def __init__(self, *, chunk_size=None, max_batch_size=1, max_wait_time=0.01):
        self.chunk_size, self.max_batch_size, self.max_wait_time = chunk_size, max_batch_size, max_wait_time
        self._chunks = {}

    async def on_serve_start(self, tg):
        self._chunks.clear()

    async def on_episode_start(self, config, ctx):
        self._chunks.pop(ctx.session_id, None)

    async def on_episode_end(self, result, ctx):
        self._chunks.pop(ctx.session_id, None)

    async def on_observation(self, obs, ctx):
        chunk = self._chunks.setdefault(ctx.session_id, [])
        if not chunk:
            (result,) = await asyncio.to_thread(self.predict_batch, [obs], [ctx])
            actions = np.asarray(result["actions"], np.float32)
            assert actions.ndim == 2
            chunk += list(actions[: self.chunk_size])
        await ctx.send_action({"actions": chunk.pop(0)})


def install():
    """Put the stand-in in place of the package, for this process."""
    contents = {
        "vla_eval": {},
        "vla_eval.model_servers": {},
        "vla_eval.model_servers.base": {"SessionContext": SessionContext},
        "vla_eval.model_servers.predict": {"PredictModelServer": PredictModelServer},
        "vla_eval.specs": {
            "DimSpec": DimSpec,
            "IMAGE_RGB": DimSpec("image", 0, "rgb_hwc_uint8"),
            "LANGUAGE": DimSpec("language", 0, "language"),
        },
        "vla_eval.types": {"Action": dict, "Observation": dict},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
