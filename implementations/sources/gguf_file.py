"""Read a GGUF file: its fields as Python values, its quantized tensors as float32.

    file    =  "GGUF", version, counts | fields | tensor entries | padding | tensor data
    field   =  name, type, value            an array's value is a type, a length and its items
    entry   =  name, shape, type, offset    the fastest-varying axis first, as ggml counts

gguf dequantizes. Its own reader of fields wraps each of SmolLM2's 98,000 strings in arrays: 2.1 s
where this file takes 0.1 s, in every process that needs the vocabulary.

Format  ggml's docs/gguf.md, version 3
Run     uv run python implementations/sources/gguf_file.py
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class Entry(NamedTuple):
    """Where a tensor lies: its shape in torch's order, its quantization, its first byte."""

    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    start: int


class Header(NamedTuple):
    """All of a GGUF file but the tensors' data."""

    fields: dict[str, Any]
    entries: dict[str, Entry]


class Cursor:
    """A place in a file's bytes, which moves on as values are read; little-endian."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def numbers(self, letter: str, count: int) -> list[Any]:
        values = struct.unpack_from(f"<{count}{letter}", self.data, self.place)
        self.place += count * struct.calcsize(letter)
        return list(values)

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def texts(self, count: int) -> list[str]:
        found = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.data, self.place)
            start = self.place + 8
            self.place = start + length
            found.append(self.data[start : self.place].decode())
        return found

    def text(self) -> str:
        return self.texts(1)[0]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        item, count = self.number("I"), self.number("Q")
        return self.texts(count) if item == STRING else self.numbers(NUMBERS[item], count)


def gguf_header(path: Path) -> Header:
    """The fields and the tensors' entries.

    Raises:
        ValueError: the file is not GGUF version 3, or it ends too early.
    """
    cursor = Cursor(path.read_bytes())
    if cursor.data[:4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    cursor.place = 4
    try:
        if (version := cursor.number("I")) != 3:
            raise ValueError(f"{path} is GGUF version {version}, and this reads version 3")
        tensors, count = cursor.number("Q"), cursor.number("Q")
        fields = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(count)}
        infos = {}
        for _ in range(tensors):
            name = cursor.text()
            shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
            infos[name] = tuple(reversed(shape)), cursor.number("I"), cursor.number("Q")
    except (struct.error, KeyError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged: its header cannot be read") from None
    alignment = fields.get("general.alignment", 32)
    data = math.ceil(cursor.place / alignment) * alignment
    entries = {
        name: Entry(shape, gguf.GGMLQuantizationType(kind), data + offset)
        for name, (shape, kind, offset) in infos.items()
    }
    return Header(fields, entries)


def gguf_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name, dequantized to float32, in torch's order of axes.

    Raises:
        ValueError: as `gguf_header`, or the file ends within a tensor.
    """
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, (shape, quantization, start) in gguf_header(path).entries.items():
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        length = math.prod(shape) // block * size
        stored = data[start : start + length]
        if stored.size < length:
            raise ValueError(f"{path} is damaged: it ends within the tensor {name}")
        rows = stored.reshape(*shape[:-1], shape[-1] // block * size)
        values = gguf.dequantize(rows, quantization)
        # What is stored as float32 comes back as a view of the file, which torch could not write.
        tensors[name] = torch.from_numpy(np.require(values, np.float32, "W"))
    return tensors


def main() -> None:
    from implementations.sources.weights import smollm2_file

    fields, entries = gguf_header(smollm2_file())
    print(f"{fields['general.name']}: {len(fields)} fields, {len(entries)} tensors, of which")
    kinds = [entry.quantization.name for entry in entries.values()]
    for kind in sorted(set(kinds)):
        print(f"  {kinds.count(kind):3} are stored as {kind}")


if __name__ == "__main__":
    main()
