"""Makes torch believe in an H100, so that inductor writes its Triton code on a machine without one.

`build_stubs` compiles two small libraries: one is loaded before torch's and answers its questions
about devices and streams, the other stands in for libcuda.so.1. `install` then replaces what
Python asks about the device. Tensors are fake ones on "cuda": nothing runs and no memory is taken;
kernels are written, and not executed. Needs torch's CUDA build (the versions of step_counts.py) and
g++.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DEVICE_STUB = r"""
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAFunctions.h>
static int num_devices = 0;
#define API __attribute__((visibility("default")))
extern "C" API void stub_set_count(int n) { num_devices = n; }
namespace c10::cuda {
static CUDAStream fake() {
  return CUDAStream(CUDAStream::UNCHECKED,
                    c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0)));
}
API bool hasPrimaryContext(DeviceIndex) { return false; }
API DeviceIndex device_count() noexcept { return num_devices; }
API DeviceIndex device_count_ensure_non_zero() { return num_devices; }
API DeviceIndex current_device() { return 0; }
API void set_device(DeviceIndex, bool) {}
API cudaError_t GetDeviceCount(int* n) { *n = num_devices; return cudaSuccess; }
API cudaError_t GetDevice(DeviceIndex* d) { *d = 0; return cudaSuccess; }
API cudaError_t SetDevice(DeviceIndex, bool) { return cudaSuccess; }
API cudaError_t MaybeSetDevice(DeviceIndex) { return cudaSuccess; }
API DeviceIndex ExchangeDevice(DeviceIndex) { return 0; }
API DeviceIndex MaybeExchangeDevice(DeviceIndex) { return 0; }
API void SetTargetDevice() {}
API std::optional<DeviceIndex> getDeviceIndexWithPrimaryContext() { return std::nullopt; }
API CUDAStream getCurrentCUDAStream(DeviceIndex) { return fake(); }
API CUDAStream getDefaultCUDAStream(DeviceIndex) { return fake(); }
API void setCurrentCUDAStream(CUDAStream) {}
API void device_synchronize() {}
}
"""
DRIVER_STUB = r"""
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0; *active = 0; return 0;
}
int cuGetErrorString(int error, const char** text) { *text = "stub"; return 0; }
"""
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=85_000_000_000, warp_size=32, regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048, max_threads_per_block=1_024,
    shared_memory_per_block_optin=232_448, shared_memory_per_block=49_152,
    shared_memory_per_multiprocessor=233_472, L2_cache_size=52_428_800, is_integrated=0,
    gcnArchName="sm_90", clock_rate=1_980_000, memory_clock_rate=2_619_000,
    memory_bus_width=5_120, uuid="none",
)  # fmt: skip


def build_stubs(folder: Path) -> tuple[Path, Path]:
    """Compile both libraries into `folder`; returns the one to preload, and libcuda's folder."""
    import torch
    import triton

    site = Path(torch.__file__).parent
    includes = [site / "include", site / "include" / "torch" / "csrc" / "api" / "include"]
    includes += sorted(site.parent.glob("nvidia/*/include"))
    includes.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    (folder / "stub.cpp").write_text(DEVICE_STUB)
    (folder / "driver.c").write_text(DRIVER_STUB)
    flags: list[str | Path] = [f"-I{include}" for include in includes]
    stub, driver = folder / "stub.so", folder / "driver" / "libcuda.so.1"
    driver.parent.mkdir()
    commands: list[list[str | Path]] = [
        ["g++", "-std=c++20", "-shared", "-fPIC", "-o", stub, folder / "stub.cpp", *flags],
        ["gcc", "-shared", "-fPIC", "-o", driver, folder / "driver.c"],
    ]
    for command in commands:
        subprocess.run(command, check=True)
    return stub, driver.parent


def _replace(target: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(target, name, value)


class _Guard:
    """A device guard that guards nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, *error: object) -> None: ...


def _driver() -> Any:
    """What Triton asks of an active driver."""
    import torch
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_device_capability=lambda device=0: CAPABILITY,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda device: limits),
    )


def install(stub: Path) -> None:
    """Replace torch's view of its device; `stub` must have been preloaded."""
    import torch
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.codegen.triton as code
    import torch._inductor.fx_passes.fuse_attention as fused
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.pad_mm as padded
    import torch._subclasses.fake_tensor as fake
    import torch.cuda.random as random
    import torch.utils._triton as triton_utils
    import triton

    def nothing(*arguments: Any, **options: Any) -> None: ...

    ctypes.CDLL(str(stub)).stub_set_count(1)
    _replace(fake, init_gpu_context=nothing)
    _replace(
        torch.cuda, _lazy_init=nothing, is_available=lambda: True, device_count=lambda: 1,
        current_device=lambda: 0, is_bf16_supported=lambda including_emulation=True: True,
        get_device_capability=lambda device=None: CAPABILITY,
        get_device_name=lambda device=None: PROPERTIES.name, set_device=nothing,
        synchronize=nothing, get_device_properties=lambda device=None: PROPERTIES,
        device=_Guard, _DeviceGuard=_Guard,
    )  # fmt: skip
    static: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": nothing, "get_device_properties": lambda device=None: PROPERTIES,
        "get_compute_capability": lambda device=None: 90, "synchronize": nothing,
        "maybe_exchange_device": lambda device: -1, "exchange_device": lambda device: -1,
        "is_triton_capable": lambda device=None: True, "raise_if_triton_unavailable": nothing,
        "get_raw_stream": lambda device: 0,
    }  # fmt: skip
    cuda = interfaces.CudaInterface
    _replace(cuda, device=_Guard, **{name: staticmethod(f) for name, f in static.items()})
    workers = ("current_device", "get_device_properties", "set_device")
    _replace(cuda.Worker, **{name: staticmethod(static[name]) for name in workers})
    state = torch.zeros(16, dtype=torch.uint8)
    _replace(random, _lazy_init=nothing)
    for module in (torch.cuda, random):
        _replace(module, get_rng_state=lambda device="cuda": state, set_rng_state=nothing)
    # These passes would run sample code on the device.
    for module in (fused, joint):
        _replace(module, _sfdp_init=nothing)
    for module in (padded, joint):
        _replace(module, _pad_mm_init=nothing)
    for module in (triton_utils, code):
        _replace(module, triton_hash_with_backend=lambda: "h100")
    triton.runtime.driver.set_active(_driver())
