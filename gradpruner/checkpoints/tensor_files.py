"""Safetensors files, read part by part.

Files are read rather than mapped, because the pages of a mapped file count as memory of the process.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # as safetensors itself allows
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        """Reads the tensor into new memory."""
        check_float(self)
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        for _ in self.parts(data.numpy().data):
            pass  # there is one part, which fills the whole buffer
        return data.view(FLOAT_DTYPES[self.dtype]).reshape(self.shape)


def check_float(stored: StoredTensor) -> None:
    """Raises ValueError if torch cannot compute with the dtype."""
    if stored.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"Weights must be one of {', '.join(FLOAT_DTYPES)}, got {stored.dtype} for {stored.name}. "
            "Use a checkpoint that is not quantized."
        )


def locate_tensors(source: Path) -> dict[str, str]:
    """Returns tensor name -> name of the file that holds it."""
    if (source / WEIGHTS_FILE).is_file():
        return dict.fromkeys(read_header(source / WEIGHTS_FILE), WEIGHTS_FILE)
    if (source / INDEX_FILE).is_file():
        try:
            file_names = json.loads((source / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in file_names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The index of the checkpoint must hold a weight_map, got {error!r} from {source / INDEX_FILE}. "
                "The file is damaged: download or save the checkpoint again."
            ) from error
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(source.glob(pattern))]
    found = f"only pickle weights ({', '.join(pickles)})" if pickles else "no weights"
    if not source.is_dir():
        found = "no folder" if not source.exists() else "a file"
    raise ValueError(
        f"The source must be a folder with {WEIGHTS_FILE} or {INDEX_FILE}, got {found} at {source}. "
        "Save the model there with save_pretrained, which writes safetensors."
    )


def find_tensors(source: Path, file_names: Mapping[str, str], used: Iterable[str]) -> dict[str, StoredTensor]:
    """Locates the `used` tensors by name; opens only files that hold some of them."""
    headers: dict[str, dict[str, StoredTensor]] = {}
    stored = {}
    for name in used:
        file_name = file_names[name]
        if file_name not in headers:
            headers[file_name] = read_header(source / file_name)
        if name not in headers[file_name]:
            raise ValueError(
                f"{INDEX_FILE} says that {name} is in {file_name}, which holds {len(headers[file_name])} other "
                f"tensors. The checkpoint in {source} is damaged: download or save it again."
            )
        stored[name] = headers[file_name][name]
        if stored[name].start + stored[name].num_bytes > (source / file_name).stat().st_size:
            raise ValueError(
                f"{source / file_name} ends at byte {(source / file_name).stat().st_size}, before the end of {name} "
                f"at byte {stored[name].start + stored[name].num_bytes}. Download or save the checkpoint again."
            )
    return stored


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file: 8 bytes with the length N of a JSON header, the header, the data."""
    try:
        with file.open("rb", buffering=0) as stream:
            length = int.from_bytes(fill(memoryview(bytearray(8)), stream), "little")
            if length > min(MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(bytes(fill(memoryview(bytearray(length)), stream)))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                shape = tuple(map(int, entry["shape"]))
                tensors[name] = StoredTensor(name, file, entry["dtype"], shape, 8 + length + start, end - start)
        return tensors
    except FileNotFoundError as error:
        raise ValueError(
            f"{INDEX_FILE} names a file that is missing: {file}. Download or save the checkpoint again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} must be a safetensors file, got {error}. It is damaged: download or save the checkpoint again."
        ) from error


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
