"""The kernels on the CPU: `start` puts an emulated GPU (tests/emulator/) under this process, for good.

Then `implementation="cuda"` plans, compiles and launches as on a GPU of that architecture, but a C++ compiler makes the
kernels, and fibers run them. A process that does this has no other GPU and emulates no second architecture.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

EMULATOR = Path(__file__).parent / "emulator"


def build(folder: str | Path) -> str:
    """Compiles the emulator into this folder."""
    import jax

    library = Path(folder, "libcuda.so.1")
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    names = [f"-I{jax.ffi.include_dir()}", f'-DEMULATOR_FOLDER="{EMULATOR}"', *EMULATOR.glob("*.cc"), "-o", library]
    subprocess.run([os.environ.get("CXX", "c++"), *options, *names, "-ldl"], check=True)
    return str(library)


def start(
    arch: int, library: str | None = None, kernels: str | None = None, multiprocessors: int = 2, seed: int = 0
) -> None:
    """library: what `build` made; kernels: the folder of their sources. The seed decides the order of all threads."""
    import jax

    from jax_flash import extension

    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        library = library or build(folder)
        emulator = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 now gets this one
        native = extension.native()
        native.configure(nvrtc=[library], kernels=kernels or str(extension.kernel_folder()), cache="", dump="")
        native.nvrtc()  # loads it
    emulator.emulator_configure(arch, multiprocessors, ctypes.c_uint(seed))

    for target, stages in native.registrations().items():
        wrapped = {stage: _for_cpu(emulator, capsule) for stage, capsule in stages.items() if stage != "initialize"}
        jax.ffi.register_ffi_target(target, wrapped, platform="cpu")
    jax.lax.platform_dependent = lambda *arrays, cuda, default: cuda(*arrays)


def _for_cpu(emulator: ctypes.CDLL, capsule: Any) -> Any:
    """A handler that XLA's CPU backend can call."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    wrap = emulator.emulator_wrap
    wrap.restype, wrap.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(wrap(address(capsule, None)), None, None)
