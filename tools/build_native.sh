#!/bin/bash
# Builds jax_flash/_native.abi3.so in the source tree, without installing anything: then `PYTHONPATH=. python ...`.
# Needs a Python (PYTHON, default python3) with nanobind, cmake and ninja. JAX_FLASH_FFI_INCLUDE names the folder
# jaxlib/include of the oldest supported jaxlib (see pyproject.toml); by default that of this Python's own jaxlib, which
# gives a module for that jaxlib and newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
PATH="$(dirname "$python"):$PATH"
cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$python" \
  ${JAX_FLASH_FFI_INCLUDE:+-DJAX_FLASH_FFI_INCLUDE="$JAX_FLASH_FFI_INCLUDE"} --log-level=WARNING
cmake --build build/native
cp --remove-destination build/native/_native*.so jax_flash/  # a running Python keeps the file it has mapped
