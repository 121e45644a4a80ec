"""Rows on a GPU: what the driver is asked for, with a recorded driver in the place of NVIDIA's.

Each program below runs in a process of its own, where `libcuda.so.1` is the recorded driver: it prints what it is asked for. The
tensors are DLPack capsules of addresses that nobody reads.
"""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import WIDTH

import emaudit

try:
    import torch
except ImportError:
    torch = None

CPU, CUDA, METAL, MANAGED = 1, 2, 8, 13
READ_ONLY, COPIED = 1, 2
KINDS = {"uint8": (1, 8), "int32": (0, 32), "float16": (2, 16), "float32": (2, 32), "float64": (2, 64), "bfloat16": (4, 16)}
ROWS = 3


class Tensor(ctypes.Structure):
    """DLTensor, and the two fields of DLManagedTensor behind it."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Fake:
    """A tensor somewhere, by its address. Without `flags` it is of the time before DLPack 1.0."""

    def __init__(self, address, shape, kind="float32", *, strides=None, device=(CUDA, 0), flags=None, offset=0):
        self.device, self.flags, self.streams = device, flags, []
        numbers = lambda values: (ctypes.c_int64 * len(values))(*values)
        self.shape, self.strides = numbers(shape), None if strides is None else numbers(strides)
        tensor = Tensor(
            data=address, device_type=device[0], device_id=device[1], ndim=len(shape), code=KINDS[kind][0], bits=KINDS[kind][1],
            lanes=1, shape=self.shape, strides=self.strides, byte_offset=offset,
        )
        self.struct = tensor if flags is None else Versioned(major=1, minor=0, flags=flags, tensor=tensor)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **options):
        if self.flags is None and options:
            raise TypeError(f"no option {list(options)}")
        assert self.flags is None or options == {"max_version": (1, 0)}
        self.streams.append(stream)
        return new_capsule(ctypes.addressof(self.struct), b"dltensor" if self.flags is None else b"dltensor_versioned", None)


def say(text):
    """Through the driver's own buffer, so that the order of the lines is that of the events."""
    ctypes.CDLL(None).puts(text.encode())


def refused(call, sentence, status=1):
    try:
        call()
    except emaudit.Error as error:
        assert sentence in str(error) and error.status == status, (str(error), error.status)
    else:
        raise AssertionError(f"not refused: {sentence}")


def made(**options):
    direction = np.zeros(WIDTH, dtype="f4")
    direction[0] = 2.0
    probe = emaudit.Probe.from_vectors(direction, np.zeros(WIDTH), 0.5)
    return probe, emaudit.Steering(probe, allow_nonspecific=True, **(options or {"subtract": 1.0}))


def arrays(**options):
    """Scores, strengths and statuses."""
    return Fake(0x20000, [ROWS], **options), Fake(0x30000, [ROWS], **options), Fake(0x40000, [ROWS], "uint8", **options)


def program_launches():
    probe, steering = made()
    device = probe.to_device()
    assert repr(device) == f"<DeviceProbe of vectors, width {WIDTH}>"
    assert 0 < device.error_bound(10.0) < 100 * probe.error_bound(10.0)
    scores, strengths, status = arrays()
    rows = Fake(0x10000, [ROWS, WIDTH])
    say("calls")
    assert device.score(rows, scores, stream=0x40) is None
    device.score(Fake(0x10000, [ROWS, WIDTH], "float16"), scores, unit="raw", status=status)
    device.steer(steering, Fake(0x10000, [ROWS, WIDTH], "bfloat16"), status, strengths=strengths, stream=2)
    device.score_and_steer(steering, rows, scores, status, strengths=strengths, unit="raw", stream=0x40)
    # The producer orders its work before ours; 0 has no meaning there.
    assert (rows.streams, scores.streams) == ([0x40, 0x40], [0x40, 1, 0x40])
    assert strengths.streams == [2, 0x40] and status.streams == [1, 2, 0x40]
    # Rows of any even stride, in several dimensions; one row alone; behind an offset; versioned; in managed memory.
    device.score(Fake(0x10000, [2, ROWS, WIDTH], strides=[ROWS * 40, 40, 1]), Fake(0x20000, [2, ROWS]))
    device.score(Fake(0x10000, [2, ROWS, WIDTH], offset=0x100), Fake(0x20000, [6], strides=[1]))
    device.score(Fake(0x11000, [WIDTH]), Fake(0x20000, []))
    device.score(Fake(0x12000, [WIDTH], flags=READ_ONLY), Fake(0x20000, [1], flags=0, device=(MANAGED, 0)))
    device.score(Fake(None, [0, WIDTH]), Fake(None, [0]), status=Fake(None, [0], "uint8"))
    say("end")
    del device


def program_refusals():
    probe, steering = made()
    device = probe.to_device()
    scores, strengths, status = arrays()
    rows = Fake(0x10000, [ROWS, WIDTH])
    say("calls")
    # Where it is.
    on_cpu, metal = Fake(0x10000, [ROWS, WIDTH], device=(CPU, 0)), Fake(0x20000, [ROWS], device=(METAL, 1))
    refused(lambda: device.score(on_cpu, scores), "`rows` is on the CPU, not on a CUDA device")
    refused(lambda: device.score(rows, metal), "`scores` is on DLPack device 8, number 1, not on a CUDA device")
    refused(lambda: device.score(np.zeros((ROWS, WIDTH), "f4"), scores), "`rows` is on the CPU")
    refused(lambda: device.score(rows, np.zeros(ROWS, "f4")), "`scores` is on the CPU")
    refused(lambda: device.steer(steering, rows, np.zeros(ROWS, "u1")), "`status` is on the CPU")
    refused(lambda: device.steer(steering, rows, status, strengths=np.ones(ROWS, "f4")), "`strengths` is on the CPU")
    refused(lambda: device.score(rows, [0.0] * ROWS), "cannot view <class 'list'> as scores")
    second = Fake(0x20000, [ROWS], device=(CUDA, 1))
    refused(lambda: device.score(rows, second), "`scores` is on CUDA device 1, the rows are on CUDA device 0")
    liar = Fake(0x20000, [ROWS], device=(CPU, 0))
    liar.device = (CUDA, 0)
    refused(lambda: device.score(rows, liar), "`scores` is on the CPU")
    refused(lambda: probe.score(rows), "the tensor is on CUDA device 0; rows are read on the CPU: move it there, or use probe.to_d")
    assert on_cpu.streams == metal.streams == []
    # What it is.
    doubles = Fake(0x10000, [ROWS, WIDTH], "float64")
    refused(lambda: device.score(doubles, scores), "rows are float32, float16 or bfloat16, not float64")
    refused(lambda: device.score(rows, Fake(0x20000, [ROWS], "float16")), "`scores` is float16, not float32")
    refused(lambda: device.score(rows, scores, status=Fake(0x40000, [ROWS], "int32")), "`status` is int32, not uint8")
    integers = Fake(0x30000, [ROWS], "int32")
    refused(lambda: device.steer(steering, rows, status, strengths=integers), "`strengths` is int32, not float32")
    refused(lambda: device.score(rows, scores, unit="furlongs"), "no score unit")
    # Its shape.
    refused(lambda: device.score(Fake(0x10000, [ROWS, WIDTH + 1]), scores), "width mismatch", 10)
    refused(lambda: device.score(Fake(0x10000, []), scores), "the last dimension is the width")
    refused(lambda: device.score(rows, Fake(0x20000, [ROWS + 1])), "`scores` of shape [4] for rows of shape [3]")
    refused(lambda: device.steer(steering, rows, Fake(0x40000, [ROWS, 1], "uint8")), "`status` of shape [3, 1]")
    refused(lambda: device.score(Fake(0x10000, [ROWS, WIDTH], strides=[WIDTH * 2, 2]), scores), "make rows contiguous")
    refused(lambda: device.score(Fake(0x10000, [ROWS, WIDTH], strides=[0, 1]), scores), "overlap")
    refused(lambda: device.score(Fake(0x10000, [2, ROWS, WIDTH], strides=[99, 40, 1]), Fake(0x20000, [6])), "evenly")
    refused(lambda: device.score(rows, Fake(0x20000, [ROWS], strides=[2])), "`scores` lie apart")
    refused(lambda: device.score(Fake(0x10002, [ROWS, WIDTH]), scores), "not aligned")
    refused(lambda: device.score(Fake(None, [ROWS, WIDTH]), scores), "null")
    refused(lambda: device.score(rows, Fake(None, [ROWS])), "null")
    # Who may write there.
    constant = Fake(0x10000, [ROWS, WIDTH], flags=READ_ONLY)
    refused(lambda: device.steer(steering, constant, status), "read-only; rows are edited in place")
    refused(lambda: device.score(rows, Fake(0x20000, [ROWS], flags=READ_ONLY)), "`scores` is read-only")
    refused(lambda: device.steer(steering, rows, Fake(0x40000, [ROWS], "uint8", flags=READ_ONLY)), "`status` is read-only")
    refused(lambda: device.score(Fake(0x10000, [ROWS, WIDTH], flags=COPIED), scores), "`rows` exports a copy")
    refused(lambda: device.score(rows, Fake(0x10010, [ROWS])), "`scores` and `rows` overlap")
    refused(lambda: device.score_and_steer(steering, rows, scores, status, strengths=scores), "`strengths` and `scores` overlap")
    # With what.
    refused(lambda: device.steer(made()[1], rows, status), "the steering was made from another probe")
    refused(lambda: device.score_and_steer(made()[1], rows, scores, status), "the steering was made from another probe")
    for stream, kind in ((-1, OverflowError), (None, TypeError)):
        try:
            device.score(rows, scores, stream=stream)
        except kind:
            continue
        raise AssertionError(f"stream {stream} is not refused")
    say("end")


def program_nobody():
    refused(made()[0].to_device, "no GPU can be used", 23)
    try:
        made()[0].to_device()
    except emaudit.Error as error:
        assert error.status_name == "DeviceUnavailable"


def output_of(program, library_path):
    environment = os.environ | {"LD_LIBRARY_PATH": str(library_path)}
    done = subprocess.run([sys.executable, __file__, program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removeprefix("driver: ") for line in done.stdout.splitlines()]


def between(lines):
    return lines[lines.index("calls") + 1 : lines.index("end")]


@pytest.fixture(scope="module")
def recorded_driver(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("SKIPPED LOUDLY: the recorded driver needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = pathlib.Path(__file__).parents[3] / "tests" / "c" / "recorded_driver.c"
    subprocess.run([compiler, "-std=c11", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def test_every_call_is_one_launch_on_its_stream(recorded_driver):
    lines = output_of("launches", recorded_driver)
    assert "upload to 0x100000, 192 bytes, the first 1" in lines
    assert between(lines) == [
        "launch score_f32_wide x 1 on 0x40 at 0x10000",
        "launch score_f16_wide x 1 on 0 at 0x10000",
        "launch steer_bf16_wide x 1 on 0x2 at 0x10000",
        "launch steer_f32_wide x 1 on 0x40 at 0x10000",
        "launch score_f32_wide x 2 on 0 at 0x10000",
        "launch score_f32_wide x 2 on 0 at 0x10100",
        "launch score_f32_wide x 1 on 0 at 0x11000",
        "launch score_f32_wide x 1 on 0 at 0x12000",
    ]
    # What was loaded and allocated is given back with the probe.
    assert lines[lines.index("end") + 1 :] == ["free 0x100000", "unload 0x20"]


def test_what_is_refused_launches_nothing(recorded_driver):
    assert between(output_of("refusals", recorded_driver)) == []


def test_without_a_driver_there_is_no_device(tmp_path):
    # Whatever this machine has, this is what is found first.
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert output_of("nobody", tmp_path) == []


@pytest.mark.skipif(torch is None or not torch.cuda.is_available(), reason="SKIPPED LOUDLY: torch sees no GPU")
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_gpu_agrees_with_the_processor(probe, name):
    rows = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(5)).to(getattr(torch, name))
    rows[7, 3] = torch.nan
    on_gpu = rows.cuda()
    device, stream = probe.to_device(), torch.cuda.current_stream().cuda_stream
    steering = emaudit.Steering(probe, project_out=1.0, allow_nonspecific=True)
    scores, status = torch.empty(50, device="cuda"), torch.empty(50, dtype=torch.uint8, device="cuda")
    device.score_and_steer(steering, on_gpu, scores, status, unit="raw", stream=stream)
    torch.cuda.synchronize()
    finite = torch.arange(50) != 7
    assert status.cpu().tolist() == [int(not fine) for fine in finite] and scores[7].isnan()
    norm = rows[finite].double().norm(dim=1).max().item()
    close = device.error_bound(norm) + probe.error_bound(norm)
    assert abs(scores.cpu()[finite].numpy() - probe.score(rows[finite], unit="raw")).max() <= close
    steering.check_landed(rows[finite], on_gpu.cpu()[finite])


if __name__ == "__main__":
    {"launches": program_launches, "refusals": program_refusals, "nobody": program_nobody}[sys.argv[1]]()
