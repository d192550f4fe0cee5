"""Detects external tensor data in an ONNX file from its bytes alone.

onnxruntime opens such external files itself while it loads a model, and running a student does not require the onnx
package.
"""

from __future__ import annotations

from collections.abc import Iterator

# The fields of each message that are messages which can contain tensors (onnx.proto3).
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}


def external_data(message: memoryview, kind: str = "Model", depth: int = 0) -> bool:
    """Returns whether a serialized ONNX message has external tensor data. Raises `ValueError` for an invalid message."""
    if depth > 100:  # protobuf's own limit
        raise ValueError("nested too deeply")
    for field, value in _wire(message):
        if kind == "Tensor" and (field == 13 or (field == 14 and value != 0)):  # external_data, data_location
            return True
        inner = _FIELDS[kind].get(field)
        if inner and isinstance(value, memoryview) and external_data(value, inner, depth + 1):
            return True
    return False


def _wire(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the fields (number, value) of a message in protobuf's wire format."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if not 8 <= tag < 1 << 32:
            raise ValueError("no field")
        kind = tag & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield tag >> 3, number
            continue
        size, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(message, at) if kind == 2 else (-1, at)
        if size < 0 or at + size > len(message):
            raise ValueError("no field")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        number, at = number | (byte & 127) << shift, at + 1
        if byte < 128:
            return number, at
    raise ValueError("no number")
