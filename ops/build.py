"""What the fused ops share: memory formats, the choice of an implementation, and the build of the C++ one.

The *.cpp files beside this one become one shared library with a plain C interface, called through ctypes. It is
compiled the first time an op needs it, by ninja through torch.utils.cpp_extension, and kept in $TORCH_EXTENSIONS_DIR
(default ~/.cache/torch_extensions) under a name that holds a hash of the sources, the flags, the torch version and the
processor, so that a home directory shared by different machines never serves the wrong library. Every build runs in a
private folder and its result is renamed into place: a killed build leaves nothing that a later one could load or wait
for. The file lock only spares work where several processes start together; the kernel drops it with its holder.
"""

import contextlib
import ctypes
import functools
import glob
import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

IMPLS = ("auto", "ref", "triton", "cpp")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTERPRET = (
    os.environ.get("TRITON_INTERPRET", "0") == "1"
)  # Triton reads it where a kernel is defined, so later changes have no effect
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # the compiler's default is 256 even where AVX-512 is there
LOCK_SECONDS = 120


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the ops accumulate in, and take coefficients and biases in: float64 for float64, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), without the microsecond that torch takes to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its memory is dense in NCHW or channels_last order, else a copy that is."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous(
        memory_format=torch.channels_last if x.ndim == 4 and x.stride(1) == 1 else torch.contiguous_format
    )


def format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def empty_signs(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Room for a bit an element, 32 a word, every row in words of its own: what the C++ ops keep for the gradient."""
    return x.new_empty(rows * ((columns + 31) // 32), dtype=torch.int32)


@torch.compiler.assume_constant_result
def choose(impl: str, device: str) -> str:
    """Resolves 'auto'. Raises ValueError for an unknown name, RuntimeError with the reason if it cannot run here."""
    if impl == "ref":
        return impl
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    wanted = impl if impl != "auto" else "triton" if device == "cuda" else "cpp"
    reason = _why_not(wanted, device)
    if reason is None:
        return wanted
    if impl != "auto":
        raise RuntimeError(f"impl='{impl}' cannot run on {device} tensors: {reason}")
    _warn_once(f"fused ops fall back to the PyTorch reference on {device}: {reason}")
    return "ref"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@functools.cache
def _why_not(impl: str, device: str) -> str | None:
    if impl == "triton":
        if triton is None:
            return "Triton is not installed (pip install triton)"
        if INTERPRET:
            return None
        if device != "cuda":
            return "Triton needs CUDA tensors (or TRITON_INTERPRET=1 when the ops are imported)"
        try:
            triton.runtime.driver.active.get_current_target()  # compiles its launcher, with a C compiler
        except Exception as e:
            return f"Triton cannot start: {e}"
        return None
    if device != "cpu":
        return "the C++ ops need CPU tensors"
    try:
        library()
    except Exception as e:
        return str(e)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops. Raises RuntimeError or OSError with the reason if they cannot be compiled or loaded."""
    sources = sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.cpp")))
    if not sources:
        raise RuntimeError("no .cpp file beside ops/build.py")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions"
    )
    path = os.path.join(root, "infoscc_ops", f"ops_{_key(sources)}.so")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _lock(path + ".lock"):
            if not os.path.exists(path):
                _build(sources, path)
    return ctypes.CDLL(path)


@functools.cache
def c_function(name: str, dtype: torch.dtype, arguments: str):
    """The compiled function of this name and dtype; arguments has a letter for each: p pointer, i int64, d double."""
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}[a] for a in arguments]
    function.restype = None
    return function


def _key(sources: list[str]) -> str:
    key = hashlib.sha256(repr((FLAGS, torch.__version__, platform.machine(), _cpu())).encode())
    for source in sources + sorted(glob.glob(os.path.join(os.path.dirname(sources[0]), "*.h"))):
        with open(source, "rb") as f:
            key.update(f.read())
    return key.hexdigest()[:16]


def _cpu() -> str:
    """The processor's model and instruction sets, which -march=native compiles for."""
    try:
        with open("/proc/cpuinfo") as f:
            first = f.read().split("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(
        line
        for line in first.split("\n")
        if line.startswith(("vendor", "cpu family", "model", "CPU ", "flags", "Features"))
    )


@contextlib.contextmanager
def _lock(path: str):
    """Waits for other builders, but not for ever: without the lock the work is done twice, and nothing else."""
    with open(path, "w") as f:
        try:
            import fcntl

            deadline = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        except (ImportError, OSError):  # no locks on this system or file system
            pass
        yield


def _build(sources: list[str], path: str) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: '{compiler}' is not on PATH (install g++, or set CXX)")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    print("Compiling the fused C++ ops, once for this machine ...", file=sys.stderr, flush=True)
    folder = tempfile.mkdtemp(prefix="build_", dir=os.path.dirname(path))
    environ_path = os.environ.get("PATH", "")
    try:
        # ninja installed with pip stands beside the interpreter, often not on PATH when no environment is activated.
        os.environ["PATH"] = os.pathsep.join(
            [environ_path, os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
        )
        name = os.path.splitext(os.path.basename(path))[0]
        cpp_extension.load(name, sources, extra_cflags=FLAGS, build_directory=folder, is_python_module=False)
        os.replace(os.path.join(folder, name + ".so"), path)
    except Exception as e:
        lines = [line for line in str(e).splitlines() if "error" in line.lower()] or [str(e)]
        raise RuntimeError(f"compilation of the C++ ops failed: {lines[-1].strip()}") from e
    finally:
        os.environ["PATH"] = environ_path
        shutil.rmtree(folder, ignore_errors=True)
