"""What the ops share: dtypes, memory formats, the choice of an implementation, and the build of the C++ library.

The *.cpp files of this folder become one shared library with a plain C interface, which Python calls through ctypes.
The first op that needs the library compiles it, with ninja through torch.utils.cpp_extension. The library is kept in
$TORCH_EXTENSIONS_DIR (default: ~/.cache/torch_extensions). Its file name holds a hash of the sources, the compiler's
flags, the torch version and the processor, so machines that share a home directory never load each other's library.

Each build runs in a folder of its own and its result is renamed into place, so a killed build leaves nothing that a
later process could load or wait for. Processes that start together wait for the first one's build behind a file lock.
"""

import contextlib
import ctypes
import errno
import functools
import glob
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the other implementations do without it
    triton = tl = None

IMPLS = ("auto", "ref", "triton", "cpp")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what the elementwise ops are compiled for
# Triton reads this variable where a kernel is defined, so it must be set before the ops are imported.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Without errno and traps the compiler may vectorise sqrt and conditional expressions.
# Not -ffast-math: it would reorder sums and take NaN for a number.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # the compiler's default is 256, even where there is AVX-512
LOCK_SECONDS = 120  # a build took 20 s on two busy cores


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes and memory formats.


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in, and in which it takes coefficients and biases: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # sums in 16 bits lose small terms


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype). Testing the dtype first saves a microsecond where there is nothing to do, which is usual."""
    return x if x.dtype == dtype else x.to(dtype)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its memory is dense in NCHW or channels_last order, else a copy that is."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    # A part of a channels_last tensor has gaps, but channels side by side: it keeps that order.
    channels_last = x.ndim == 4 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format of a dense tensor. NCHW where it is both, as with one channel or one pixel."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def empty_signs(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Uninitialised memory for one bit per element of a [rows, columns] matrix: int32, each row in words of its own.

    The C++ ops keep these signs of their output for the gradient, a 32nd of the memory that the output would take.
    """
    return x.new_empty(rows * ((columns + 31) // 32), dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The choice of an implementation.


def choose(impl: str, device: str) -> str:
    """The implementation to run on a device type: 'auto' becomes 'triton' on CUDA, 'cpp' elsewhere, 'ref' if it must.

    Raises ValueError for an unknown name, and RuntimeError with the reason if the one that was named cannot run here.
    'auto' warns once, with the reason, when it falls back to 'ref'.
    """
    if impl == "ref":  # first: it needs neither Triton nor a compiler
        return impl
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    wanted = impl if impl != "auto" else "triton" if device == "cuda" else "cpp"
    reason = _why_not(wanted, device)
    if reason is None:
        return wanted
    # Who names one relies on it: a fallback would be timed or tested in its place.
    if impl != "auto":
        raise RuntimeError(f"impl='{impl}' cannot run on {device} tensors: {reason}")
    _warn_once(f"fused ops fall back to the PyTorch reference on {device}: {reason}")
    return "ref"


# What torch.compiler.assume_constant_result does, less its import of the compiler, which takes a second: torch.compile
# cannot trace the build, and the answer never changes.
choose._dynamo_marked_constant = True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # names the line that called the op


@functools.cache  # starting Triton and loading the library take far longer than an op
def _why_not(impl: str, device: str) -> str | None:
    """Why 'triton' or 'cpp' cannot run on this device type, or None if it can."""
    if impl == "triton":
        if triton is None:
            return "Triton is not installed (pip install triton)"
        if INTERPRET:  # the interpreter takes tensors of any device
            return None
        if device != "cuda":
            return "Triton needs CUDA tensors (or TRITON_INTERPRET=1 when the ops are imported)"
        try:
            triton.runtime.driver.active.get_current_target()  # compiles Triton's launcher, which needs a C compiler
        except Exception as e:
            return f"Triton cannot start: {e}"
        return None
    if device != "cpu":
        return "the C++ ops need CPU tensors"
    try:
        library()  # compiles, if need be; whatever goes wrong there is the reason
    except Exception as e:
        return str(e)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The C++ library.


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops. Raises RuntimeError or OSError with the reason if they cannot be compiled or loaded."""
    sources = sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.cpp")))
    if not sources:
        raise RuntimeError("no .cpp file beside ops/build.py")
    name = f"ops_{_key(sources)}.so"
    # First just look: an administrator may have built it in a folder that is read-only here.
    path = os.path.join(_usual_folder(), name)
    if not os.path.exists(path):
        path = os.path.join(_writable_folder(), name)
    if not os.path.exists(path):
        with _lock(path + ".lock"):
            if not os.path.exists(path):  # else another process built it while this one waited
                _build(sources, path)
    # CDLL releases Python's lock while a function runs, so other threads go on.
    return ctypes.CDLL(path)


@functools.cache
def c_function(name: str, dtype: torch.dtype, arguments: str):
    """The compiled function of this name and dtype. `arguments` has one letter each: p pointer, i int64, d double."""
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    # Without these, ctypes would cut pointers and sizes to 32 bits.
    function.argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}[a] for a in arguments]
    function.restype = None  # by default ctypes expects an int
    return function


def _usual_folder() -> str:
    """Where PyTorch's extensions go, whether or not it exists."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")  # as torch.utils.cpp_extension has it
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(cache, "torch_extensions")
    return os.path.join(root, "infoscc_ops")


def _writable_folder() -> str:
    """The usual folder, made if need be. If it cannot be written, a private one in the system's temporary folder.

    Raises RuntimeError if that one exists and is not private: code is loaded from there, so it must be this user's.
    """
    folder = _usual_folder()
    try:
        if folder.startswith("~"):  # what expanduser leaves of a user without HOME and without a passwd entry
            raise OSError(errno.ENOENT, "no home directory")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # read-only file systems refuse here, also to root
            return folder
    except OSError as error:
        private = os.path.join(tempfile.gettempdir(), f"infoscc_ops_{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(private, mode=0o700)  # closed to others from the start
        info = os.lstat(private)  # a link could be turned elsewhere after this check
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise RuntimeError(
                f"{folder} cannot be written ({error.strerror}), and {private} is no private folder of this user: "
                "remove it, or set TORCH_EXTENSIONS_DIR to a folder that can be written"
            ) from None
        # On stderr, so that a program's output stays its own.
        print(f"{folder} cannot be written ({error.strerror}): using {private}", file=sys.stderr, flush=True)
        return private


def _key(sources: list[str]) -> str:
    """16 hex digits that change with the sources, the flags, PyTorch's version and the processor."""
    key = hashlib.sha256(repr((FLAGS, torch.__version__, platform.machine(), _cpu())).encode())
    # Headers count: a change in one changes every op.
    for source in sources + sorted(glob.glob(os.path.join(os.path.dirname(sources[0]), "*.h"))):
        with open(source, "rb") as f:
            key.update(f.read())
    return key.hexdigest()[:16]  # 64 bits: chance will not give two builds one name


def _cpu() -> str:
    """The processor's model and instruction sets, which -march=native compiles for."""
    try:
        with open("/proc/cpuinfo") as f:
            first = f.read().split("\n\n")[0]  # one core stands for all
    except OSError:
        return platform.processor()
    # Not every line: the clock's frequency, for one, changes all the time.
    # 'CPU ' (implementer, part) and 'Features' are lines of ARM, the others of x86.
    wanted = ("vendor", "cpu family", "model", "CPU ", "flags", "Features")
    return "\n".join(line for line in first.split("\n") if line.startswith(wanted))


@contextlib.contextmanager
def _lock(path: str):
    """Waits while another process builds, but not for ever: without the lock both build, and nothing else happens."""
    with open(path, "w") as f:
        try:
            import fcntl

            # Asked again and again, because a flock() that waits has no time limit.
            deadline = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it if this process dies
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        except (ImportError, OSError):  # no locks on this system or file system
            pass
        yield


def _build(sources: list[str], path: str) -> None:
    """Compiles the sources to `path`. Raises RuntimeError with the compiler's last error line."""
    # As cpp_extension finds it, but with a message that says what to install.
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: '{compiler}' is not on PATH (install g++, or set CXX)")
    # Else PyTorch warns of compilers that it does not know, though they work.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension  # takes half a second, only needed here

    print("Compiling the fused C++ ops, once for this machine ...", file=sys.stderr, flush=True)
    # Beside the result: a rename is atomic within one file system only.
    folder = tempfile.mkdtemp(prefix="build_", dir=os.path.dirname(path))
    environ_path = os.environ.get("PATH", "")
    try:
        # pip installs ninja beside the interpreter, which is not on PATH where no environment is activated.
        scripts = [os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
        os.environ["PATH"] = os.pathsep.join([environ_path, *scripts])
        name = os.path.splitext(os.path.basename(path))[0]
        # No Python module: ctypes calls the functions by name.
        cpp_extension.load(name, sources, extra_cflags=FLAGS, build_directory=folder, is_python_module=False)
        os.replace(os.path.join(folder, name + ".so"), path)
    except Exception as e:
        # A compiler prints pages; the last line with 'error' usually says what is wrong.
        lines = [line for line in str(e).splitlines() if "error" in line.lower()] or [str(e)]
        raise RuntimeError(f"compilation of the C++ ops failed: {lines[-1].strip()}") from e
    finally:
        os.environ["PATH"] = environ_path
        shutil.rmtree(folder, ignore_errors=True)
