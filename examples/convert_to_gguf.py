"""Convert a pruned model to GGUF with llama.cpp's own converter, which is in the source archive of llama-cpp-python.

    pip install gguf sentencepiece
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    python examples/convert_to_gguf.py pruned pruned.gguf llama_cpp_python-0.3.36.tar.gz

With a checkout of llama.cpp: `python llama.cpp/convert_hf_to_gguf.py pruned --outfile pruned.gguf`.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from gguf import GGUFReader

source, target, archive = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    [converter] = Path(folder).glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    subprocess.run([sys.executable, converter, source, "--outfile", target, "--outtype", "f32"], check=True)

reader = GGUFReader(target)
architecture = reader.get_field("general.architecture").contents()
layers = reader.get_field(f"{architecture}.block_count").contents()
print(f"{target}: {architecture}, block_count = {layers}, {len(reader.tensors)} tensors")
