"""GR00T-N1.5's action head as the start of ours, in the paper's time convention.           docs/paper.md #4-#7, #22

N1.5 predicts actions - noise and calls its time 1 where the data is; the paper predicts noise - actions and calls its
level 1 where the noise is. The action DiT turns the level into N1.5's time bucket itself, so only the sign of the
velocity is left: the decoder's last layer is negated on the way in.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from agra.hub import model_folder, weight_files
from agra.weights import check_fit, stored_tensors
from agra.wam.action_dit import ActionDiT
from agra.wam.bridge import Bridge

GR1_ROW = 24
"""N1.5's row for GR1 with arms and hands; 31 is the one that it keeps for new embodiments."""
_BANKS = ("state_encoder", "action_encoder", "action_decoder")
_RENAMED = (  # ours, theirs: parts of names, applied in this order
    ("bridge.norm.", "vlln."),
    ("bridge.blocks.", "vl_self_attention.transformer_blocks."),
    ("action_dit.blocks.", "model.transformer_blocks."),
    ("action_dit.time_embedding.0.", "model.timestep_encoder.timestep_embedder.linear_1."),
    ("action_dit.time_embedding.2.", "model.timestep_encoder.timestep_embedder.linear_2."),
    ("action_dit.modulation_out.", "model.proj_out_1."),
    ("action_dit.project_out.", "model.proj_out_2."),
    ("action_dit.action_encoder.layer", "action_encoder.W"),
    ("action_dit.future.", "future_tokens."),
    ("action_dit.", ""),
    (".modulation.", ".norm1.linear."),
    (".norm2.", ".norm3."),
    (".attn.to_out.", ".attn1.to_out.0."),
    (".attn.", ".attn1."),
    (".ff.0.", ".ff.net.0.proj."),
    (".ff.3.", ".ff.net.2."),
)


def load_groot_head(
    bridge: Bridge, action_dit: ActionDiT, source: str, *, revision: str | None = None, rows: Sequence[int] = (GR1_ROW,)
) -> tuple[str, ...]:
    """Take N1.5's head from a folder or a hub id; returns the names there that have no place here.

    `rows` are N1.5's embodiments that ours start from, one for each or one for all; none leaves the state and action
    encoders and the decoder as they are. Raises FileNotFoundError where the weights are out of reach, ValueError where
    they have other shapes.
    """
    ours = {name: tensor for name, tensor in _named(bridge, action_dit) if rows or not _in_bank(name)}
    chosen = list(rows) * (action_dit.config.num_embodiments if len(rows) == 1 else 1)
    if rows and len(chosen) != action_dit.config.num_embodiments:
        raise ValueError(
            f"rows: expected one of GR00T's embodiments or {action_dit.config.num_embodiments}, got {list(rows)}"
        )
    folder = model_folder("GR00T head", source=source, revision=revision)
    what = f"{source}: its action head"
    with stored_tensors(weight_files(folder), what) as stored, torch.no_grad():
        theirs = {k.removeprefix("action_head."): v for k, v in stored.items() if k.startswith("action_head.")}
        wanted = {_their_name(name): (name, tensor) for name, tensor in ours.items()}
        shapes = {}
        for name in wanted.keys() & theirs.keys():
            shape = theirs[name].get_shape()
            shapes[name] = (len(chosen), *shape[1:]) if _in_bank(name) else shape
        check_fit(shapes, {name: tensor for name, (_, tensor) in wanted.items()}, what)
        for name, (our_name, tensor) in wanted.items():
            value = theirs[name]
            read = torch.cat([value[row : row + 1] for row in chosen]) if _in_bank(name) else value[...]
            tensor.copy_(-read if our_name.startswith("action_dit.action_decoder.layer2.") else read)
    return tuple(sorted(theirs.keys() - wanted.keys()))


def _named(bridge: Bridge, action_dit: ActionDiT) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in (("bridge", bridge), ("action_dit", action_dit)):
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in module.state_dict().items())


def _in_bank(name: str) -> bool:
    return name.removeprefix("action_dit.").startswith(_BANKS)


def _their_name(name: str) -> str:
    bank = _in_bank(name)
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return name.replace(".weight", ".W").replace(".bias", ".b") if bank else name
