"""What a written artifact holds: its tensors by name, whether it is an ONNX graph, an OpenVINO IR or a plain checkpoint."""

from __future__ import annotations

import onnx_ir as ir

from flora_export.artifact import DATA, IR, MODEL, UNLISTED, Artifact
from flora_export.errors import ArtifactError
from flora_export.ledger import load_graph
from flora_export.openvino_ir import read_constants
from flora_export.shards import read_shards

Tensors = dict[str, ir.TensorProtocol]
NUMBERS_PER_BYTE = 4  # at most: of two bits each
LARGEST_UNKNOWN = 64  # bytes of a constant in an IR that no ledger needs to explain: OpenVINO puts in sizes, axes and scalars


def read_written(artifact: Artifact) -> tuple[Tensors, str, list[str]]:
    """(tensors, read when they are asked for; where they are; what does not belong there, a line each).

    Raises:
        ArtifactError: the file, or a shard, cannot be read at all.
    """
    if artifact.is_checkpoint:
        return read_shards(artifact.path, list(artifact.manifest.files)), "the checkpoint", _strangers(artifact)
    if artifact.is_ir:
        known = {entry.initializer for entry in artifact.manifest.ledger}
        constants = read_constants(artifact.path).items()
        return {name: tensor for name, tensor in constants if name in known or tensor.nbytes > LARGEST_UNKNOWN}, IR, _strangers(artifact)
    return _initializers(artifact), MODEL, []


def _strangers(artifact: Artifact) -> list[str]:
    """Loaders of a checkpoint or an IR look for files by name, so one that was not built can come before those that were."""
    known = {*artifact.manifest.files, *UNLISTED}
    return [f"{file.name} was not built, and a loader may take it" for file in artifact.path.iterdir() if file.name not in known]


def _initializers(artifact: Artifact) -> Tensors:
    found: Tensors = {}
    graph = load_graph(artifact).graph
    most = NUMBERS_PER_BYTE * artifact.model.stat().st_size
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or (isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != DATA):
            raise ArtifactError(f"{artifact.model}: {name} is not in {DATA}. Only files of the artifact itself are read.")
        if isinstance(tensor, ir.ExternalTensor) and tensor.length not in (None, _needed(artifact, tensor)):
            raise ArtifactError(f"{artifact.model}: {name} has {tensor.length} bytes in {DATA}, but needs {tensor.nbytes}. Build it again.")
        if not isinstance(tensor, ir.ExternalTensor) and tensor.size > most:
            raise ArtifactError(f"{artifact.model}: {name} is to have {tensor.size} numbers, more than the file can hold. Build it again.")
        found[name] = tensor
    return found


def _needed(artifact: Artifact, tensor: ir.ExternalTensor) -> int:
    """How many bytes a tensor's type and shape take. Raises ArtifactError: its type has none, such as texts."""
    try:
        return tensor.nbytes
    except TypeError as error:
        raise ArtifactError(f"{artifact.model}: {tensor.name} is no array of numbers ({error}). Build it again.") from error
