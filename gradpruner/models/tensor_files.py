"""Safetensors files, read part by part.

Files are read rather than mapped, because the pages of a mapped file count as memory of the process.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradpruner.models.contents import weight_files

MAX_HEADER_BYTES = 100_000_000  # as safetensors itself allows
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPARED_BYTES = 2**20  # of two tensors at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `num_bytes` bytes from byte `start` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.num_bytes // max(1, math.prod(self.shape))

    def parts(self, buffer: memoryview) -> Iterator[memoryview]:
        """Yields the tensor's bytes, at most a `buffer` at a time; each part overwrites the one before."""
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            for done in range(0, self.num_bytes, max(1, len(buffer))):
                part = buffer[: self.num_bytes - done]
                fill(part, stream)
                yield part

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Returns the rows `start` to `stop` - 1 of the first dimension, without reading them."""
        stride = self.num_bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + start * stride, num_bytes=shape[0] * stride)

    def read(self) -> Tensor:
        """Reads the tensor, of one of `FLOAT_DTYPES`, into new memory."""
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        for _ in self.parts(data.numpy().data):
            pass  # there is one part, which fills the whole buffer
        return data.view(FLOAT_DTYPES[self.dtype]).reshape(self.shape)

    def equals(self, other: "StoredTensor") -> bool:
        """Returns whether another tensor has the same dtype, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        buffers = [memoryview(bytearray(COMPARED_BYTES)) for _ in range(2)]
        return all(one == two for one, two in zip(self.parts(buffers[0]), other.parts(buffers[1]), strict=True))


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns a checkpoint's tensors by name; reads the headers of its files only.

    Raises:
        ValueError: if the index or a file is missing or damaged.
    """
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file: 8 bytes with the length N of a JSON header, the header, the data.

    Raises:
        ValueError: if the file is damaged, or longer or shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb", buffering=0) as stream:
            length = int.from_bytes(fill(memoryview(bytearray(8)), stream), "little") if size >= 8 else size
            if length > MAX_HEADER_BYTES:
                stream.seek(0)
                raise _damaged(file, f"a file that starts with {stream.read(16)!r}")
            if size < 8 + length:
                raise _damaged(file, f"{size:,} bytes, which is not even its header")
            header = json.loads(bytes(fill(memoryview(bytearray(length)), stream)))
        tensors, end = {}, 8 + length
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                shape = tuple(map(int, entry["shape"]))
                tensors[name] = StoredTensor(name, file, entry["dtype"], shape, 8 + length + first, last - first)
                end = max(end, 8 + length + last)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"a header that cannot be read ({error})") from error
    if size != end:
        raise _damaged(file, f"{size:,} of {end:,} bytes" if size < end else f"{size - end:,} bytes after its end")
    return tensors


def fill(buffer: memoryview, stream: io.FileIO) -> memoryview:
    """Reads until `buffer` is full; a raw read may stop early."""
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])
        if not count:
            raise ValueError(
                f"{stream.name!s} ended {len(buffer) - filled} bytes too early. Download or save the checkpoint again."
            )
        filled += count
    return buffer


def _damaged(file: Path, problem: str) -> ValueError:
    return ValueError(
        f"{file} must be a whole safetensors file, got {problem}. Download or save the checkpoint again; in a clone "
        "made with git, run `git lfs pull`."
    )
