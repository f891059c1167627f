"""Initial weights of bridge and action DiT from GR00T-N1.5's action head (docs/paper.md #4-#7, #22), or from N1.6's.

N1.5 predicts actions - noise and its time 1 is data. The paper predicts noise - actions and its level 1 is noise. The
action DiT converts levels to N1.5's time buckets, so only the sign of the velocity differs. `load_groot_head` negates
the decoder's last layer.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from agra.hub import model_folder, weight_files
from agra.wam.action_dit import ActionDiT
from agra.weights import check_fit, stored_tensors

GR1_ROW = 24
"""N1.5's embodiment row for GR1 with arms and hands. Row 31 is its row for new embodiments."""
_BANKS = ("state_encoder", "action_encoder", "action_decoder")
RENAMED = (  # (name here, name in N1.5): parts of names, applied in this order
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
    bridge: nn.Module,
    action_dit: ActionDiT,
    source: str,
    *,
    revision: str | None = None,
    rows: Sequence[int] = (GR1_ROW,),
) -> tuple[str, ...]:
    """Copy N1.5's head from a folder or a hub id. Return the names of its tensors that have no counterpart here.

    `bridge` is a `Bridge`, or a module with its `norm` alone for the head of N1.6, which has no self-attention there.
    `rows` are the N1.5 embodiments that the embodiments here start from, one for each or one for all. Empty `rows`
    leave state encoder, action encoder and decoder unchanged. Raises FileNotFoundError if the weights cannot be read,
    ValueError if their shapes differ.
    """
    if action_dit.config.self_attention_first or action_dit.config.time_grows_with_noise:
        raise ValueError(
            "GR00T head: expected an action DiT with cross-attention first and time that grows with the data"
        )
    targets = {name: tensor for name, tensor in _named(bridge, action_dit) if rows or not _in_bank(name)}
    num_embodiments = action_dit.config.num_embodiments
    bank_rows = list(rows) * (num_embodiments if len(rows) == 1 else 1)
    if rows and len(bank_rows) != num_embodiments:
        raise ValueError(f"rows: expected 1 or {num_embodiments} of GR00T's embodiment rows, got {list(rows)}")
    folder = model_folder("GR00T head", source=source, revision=revision)
    what = f"{source}: its action head"
    with stored_tensors(weight_files(folder), what) as stored, torch.no_grad():
        head = {k.removeprefix("action_head."): v for k, v in stored.items() if k.startswith("action_head.")}
        by_groot_name = {_groot_name(name): (name, tensor) for name, tensor in targets.items()}
        shapes = {}
        for groot_name in by_groot_name.keys() & head.keys():
            shape = head[groot_name].get_shape()
            shapes[groot_name] = (len(bank_rows), *shape[1:]) if _in_bank(groot_name) else shape
        check_fit(shapes, {groot_name: tensor for groot_name, (_, tensor) in by_groot_name.items()}, what)
        for groot_name, (name, tensor) in by_groot_name.items():
            stored_value = head[groot_name]
            value = stored_value[...]
            if _in_bank(groot_name):
                value = torch.cat([stored_value[row : row + 1] for row in bank_rows])
            tensor.copy_(-value if name.startswith("action_dit.action_decoder.layer2.") else value)
    return tuple(sorted(head.keys() - by_groot_name.keys()))


def _named(bridge: nn.Module, action_dit: ActionDiT) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in (("bridge", bridge), ("action_dit", action_dit)):
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in module.state_dict().items())


def _in_bank(name: str) -> bool:
    return name.removeprefix("action_dit.").startswith(_BANKS)


def _groot_name(name: str) -> str:
    bank = _in_bank(name)
    for part, groot_part in RENAMED:
        name = name.replace(part, groot_part)
    return name.replace(".weight", ".W").replace(".bias", ".b") if bank else name
