"""What `make test-gpu` checks on a CUDA device. `python -m benchmarks.gpu --device cpu` rehearses it in small."""
