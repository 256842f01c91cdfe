"""Compile every kernels/*.cu to a cubin through NVRTC, for the architectures named as arguments. Needs no GPU."""

import ctypes
import glob
import pathlib
import sys


def library():
    found = [p for root in sys.path for p in glob.glob(f"{root}/nvidia/*/lib/libnvrtc.so.*") if "builtins" not in p]
    if not found:
        sys.exit("libnvrtc is not installed: pip install nvidia-cuda-nvrtc==13.0.88")
    return ctypes.CDLL(found[0])


def compile_kernel(nvrtc, path, arch):
    source = pathlib.Path(path).read_bytes()
    headers = sorted(glob.glob("kernels/*.cuh"))
    names = (ctypes.c_char_p * len(headers))(*(pathlib.Path(h).name.encode() for h in headers))
    texts = (ctypes.c_char_p * len(headers))(*(pathlib.Path(h).read_bytes() for h in headers))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, path.encode(), len(headers), texts, names)
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    print(f"{path} {arch}: {'FAILED' if failed else 'ok'}")
    if log.value:
        print(log.value.decode())
    return failed


if __name__ == "__main__":
    nvrtc = library()
    results = [compile_kernel(nvrtc, k, a) for k in sorted(glob.glob("kernels/*.cu")) for a in sys.argv[1:]]
    sys.exit(any(results))
