"""The compiled extension: where it finds NVRTC, the kernels and its cache, and its registration with XLA."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import jax

# Attributes of the environment that the extension heeds, read once.
CACHE_DIR = "JAX_FLASH_CACHE_DIR"  # folder of compiled kernels; empty: none are kept
DUMP_DIR = "JAX_FLASH_DUMP"  # folder for source, cubin and compiler log of each kernel

# Python packages that bring NVRTC, newest first, and the toolkit's usual places.
_NVRTC_PACKAGES = ("nvidia.cu13", "nvidia.cuda_nvrtc")
_NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_TOOLKITS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib", "/opt/cuda/lib64")


def nvrtc_candidates() -> list[str]:
    """Libraries to try, in order: those of Python packages, whatever the loader knows, the system's toolkit."""
    folders = []
    for package in _NVRTC_PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        folders += [Path(place, "lib") for place in (found and found.submodule_search_locations) or ()]
    installed = [str(folder / name) for folder in folders for name in _NVRTC_NAMES if (folder / name).exists()]
    toolkits = [str(Path(folder, name)) for folder in _TOOLKITS for name in _NVRTC_NAMES]
    return installed + list(_NVRTC_NAMES) + [path for path in toolkits if os.path.exists(path)]


def kernel_folder() -> Path:
    """cuda/: beside the package in a source tree, inside it in an installed wheel."""
    package = Path(__file__).parent
    installed = package / "cuda"
    return installed if installed.exists() else package.parent / "cuda"


def cache_folder() -> str:
    """Folder of the disk cache, or '' for none."""
    user_caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get(CACHE_DIR, os.path.join(user_caches, "jax_flash"))


def configure(module: ModuleType) -> None:
    """Tells the extension where NVRTC, the kernels and the cache are."""
    module.configure(
        nvrtc=nvrtc_candidates(),
        kernels=str(kernel_folder()),
        cache=cache_folder(),
        dump=os.environ.get(DUMP_DIR, ""),
    )


@functools.cache
def native() -> ModuleType:
    """The extension module, configured and registered. ImportError where it was not built."""
    module = importlib.import_module("jax_flash._native")
    configure(module)
    for target, stages in module.registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")
    return module
