"""The workspace budget, the launch table, and where kernels run."""

from __future__ import annotations

import operator
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from processes import can_fork, in_forked_child

import fastgemma.kernels.backend as backend
import fastgemma.kernels.launch as launch_module
from fastgemma.kernels.backend import (
    Kernel,
    Prepared,
    as_rows,
    cdiv,
    check_dtype,
    compiling_ahead,
    next_power_of_2,
    runs_kernel,
    tl,
)
from fastgemma.kernels.launch import TABLE, Launch, architecture, launch
from fastgemma.kernels.workspace import set_workspace_bytes, workspace_bytes

MIB, GIB = 1 << 20, 1 << 30
CARD = torch.device("cuda", 0)  # only named, never used

# The workspace


@pytest.fixture
def card(monkeypatch):
    """Pretends a CUDA card of so many bytes, of which the process may use a fraction."""

    def pretend(total_memory, fraction=1.0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=int(total_memory))
        )
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: fraction)

    yield pretend
    set_workspace_bytes(None)


@pytest.mark.parametrize(
    "marketed_gib, budget_mib", [(6, 256), (8, 256), (12, 512), (16, 512), (24, 1024), (48, 1024), (80, 1024)]
)
@pytest.mark.parametrize("reported", [1.0, 0.96])  # drivers report a little less than the box says
def test_budget_of_a_card(marketed_gib, budget_mib, reported, card):
    card(marketed_gib * GIB * reported)
    assert workspace_bytes() == workspace_bytes(CARD) == budget_mib * MIB


@pytest.mark.parametrize("fraction, budget_mib", [(1.0, 1024), (0.5, 512), (0.1, 256)])
def test_memory_fraction_counts_as_a_smaller_card(fraction, budget_mib, card):
    card(80 * GIB * 0.3, fraction)
    assert workspace_bytes() == budget_mib * MIB


def test_the_card_asked_for_is_the_card_read(card, monkeypatch):
    card(24 * GIB)
    sizes = {0: 8, 3: 24}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=sizes[index] * GIB)
    )
    assert workspace_bytes(CARD) == 256 * MIB
    assert workspace_bytes() == workspace_bytes(torch.device("cuda")) == 1024 * MIB


def test_budget_in_a_forked_child_of_a_process_that_uses_the_card(card, monkeypatch):
    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    card(80 * GIB)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    assert workspace_bytes() == 256 * MIB


def test_budget_without_a_card(card, monkeypatch):
    card(80 * GIB)
    assert workspace_bytes(torch.device("cpu")) == 256 * MIB
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workspace_bytes() == 256 * MIB


def test_override(card):
    card(24 * GIB)
    set_workspace_bytes(5 * MIB)
    assert workspace_bytes() == workspace_bytes(CARD) == workspace_bytes(torch.device("cpu")) == 5 * MIB
    for too_small in (MIB - 1, 0, -1):
        with pytest.raises(ValueError, match="1 MiB"):
            set_workspace_bytes(too_small)
    assert workspace_bytes() == 5 * MIB
    set_workspace_bytes(None)
    assert workspace_bytes() == 1024 * MIB


# The launch table


@pytest.fixture
def on(monkeypatch):
    """Pretends that every device has this architecture."""

    def pretend(arch):
        monkeypatch.setattr(launch_module, "architecture", lambda device: arch)
        launch.cache_clear()

    launch.cache_clear()
    yield pretend
    launch.cache_clear()


@pytest.mark.parametrize("kernel, shape, arch", list(TABLE), ids=lambda part: str(part))
def test_every_row_resolves_and_is_well_formed(kernel, shape, arch, on):
    on("sm_00" if arch == "any" else arch)
    row = launch(kernel, shape, CARD)
    assert row is TABLE[kernel, shape, arch]
    assert row.blocks and all(size >= 1 for size in row.blocks.values())
    assert all(size & (size - 1) == 0 for name, size in row.blocks.items() if not name.endswith("STAGES"))
    assert row.num_warps in (1, 2, 4, 8, 16, 32) and row.num_stages >= 1
    assert row.kwargs() == {**row.blocks, "num_warps": row.num_warps, "num_stages": row.num_stages}


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _, _ in TABLE}))
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_89", "sm_90", "sm_120", "interpreter"])
def test_every_kernel_has_a_row_everywhere(kernel, arch, on):
    on(arch)
    row = launch(kernel, "a shape without a row", CARD)
    assert row is TABLE[kernel, "any", arch if (kernel, "any", arch) in TABLE else "any"]
    names = {tuple(sorted(TABLE[key].blocks)) for key in TABLE if key[0] == kernel}
    assert len(names) == 1, "rows of one kernel must name the same blocks"


def test_most_specific_row_wins(on, monkeypatch):
    rows = {
        ("made_up", "any", "any"): Launch({"BLOCK": 1}),
        ("made_up", "256", "any"): Launch({"BLOCK": 2}),
        ("made_up", "any", "sm_89"): Launch({"BLOCK": 4}),
        ("made_up", "256", "sm_89"): Launch({"BLOCK": 8}),
        ("made_up", "any", "sm_86"): Launch({"BLOCK": 32}),
        ("made_up", "any", "interpreter"): Launch({"BLOCK": 16}),
    }
    for key, row in rows.items():
        monkeypatch.setitem(TABLE, key, row)
    expected = {
        ("512", "sm_90"): 1,
        ("256", "sm_90"): 2,
        ("512", "sm_89"): 4,
        ("256", "sm_89"): 8,
        ("256", "sm_86"): 2,
        ("256", "interpreter"): 16,
    }
    for (shape, arch), block in expected.items():
        on(arch)
        assert launch("made_up", shape, CARD).blocks == {"BLOCK": block}


@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_unknown_kernel(arch, on):
    on(arch)
    with pytest.raises(LookupError, match="no row for kernel 'no_such_kernel'"):
        launch("no_such_kernel", "any", CARD)


def test_names_of_architectures(monkeypatch):
    architecture.cache_clear()
    assert architecture(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(launch_module, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert architecture(CARD) == "sm_120"
    architecture.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert architecture(CARD) == "gfx942"
    architecture.cache_clear()
    monkeypatch.setattr(launch_module, "interpreting", lambda: True)
    assert architecture(CARD) == "interpreter"
    architecture.cache_clear()


def test_interpreter_row_on_the_cpu(on):
    assert launch("rms_norm", "256", torch.device("cpu")) is TABLE["rms_norm", "any", "interpreter"]


# Launching


class FakeTensor:
    """What a launch reads of a CUDA tensor."""

    is_cuda = True

    def __init__(self, dtype=torch.float32, pointer=1024, index=0):
        self.dtype, self.pointer, self.index = dtype, pointer, index

    def get_device(self):
        return self.index


@pytest.fixture(params=[True])
def fake_kernel(monkeypatch, request):
    """A kernel whose compilations and direct launches are written down, on one pretended card; by name of thread those
    that are ahead of a launch."""
    monkeypatch.setattr(backend, "_several_devices", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(backend, "_data_ptr", operator.attrgetter("pointer"))

    def function(x_ptr, y_ptr, x_desc, n_rows, eps, BLOCK: tl.constexpr):
        raise AssertionError("never run")

    kernel = Kernel(function, specialise=request.param)
    compiled, ahead, direct, official = [], [], [], []

    class Variant:
        function, packed_metadata = "function", "metadata"

        def __getitem__(self, grid):
            return lambda *args: official.append((grid, args))

        def run(self, x, y, z, *args):
            assert args[:6] == (77, "function", "metadata", None, None, None)
            direct.append(((x, y, z), args[6:]))

    class Function:
        def __getitem__(self, grid):
            return lambda **kwargs: compiled.append((grid, kwargs)) or Variant()

        def warmup(self, grid, **kwargs):
            ahead.append(threading.current_thread().name)
            if kwargs["eps"] < 0:
                raise RuntimeError("does not compile")
            return Variant()

    kernel.function = Function()
    return SimpleNamespace(kernel=kernel, compiled=compiled, ahead=ahead, direct=direct, official=official)


def _rows(dtype=torch.float32, block=(4, 8), shape=(6, 8)):
    """What a launch reads of a descriptor; comparing or hashing one would be a mistake."""

    class Rows:
        __hash__ = None
        base, block_shape = SimpleNamespace(dtype=dtype), list(block)

    Rows.shape = list(shape)
    return Rows()


ARGUMENTS = {
    "x_ptr": FakeTensor(),
    "y_ptr": FakeTensor(),
    "x_desc": _rows(),
    "n_rows": 5,
    "eps": 1e-6,
    "BLOCK": 8,
    "num_warps": 4,
}


def _launched(arguments):
    """What a launch of these arguments hands on: addresses, then values."""
    values = (arguments[name] for name in ("x_desc", "n_rows", "eps", "BLOCK"))
    return arguments["x_ptr"].pointer, arguments["y_ptr"].pointer, *values


def plain(kernel, grid, arguments):
    kernel[grid](**arguments)


def prepared(kernel, grid, arguments):
    pointers = {name: value for name, value in arguments.items() if name.endswith(("_ptr", "_desc"))}
    numbers = {name: value for name, value in arguments.items() if name not in pointers}
    kernel[Prepared(grid, **numbers)](**pointers)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("launch_once", [plain, prepared])
@pytest.mark.parametrize(
    "change, recompiles",
    [
        ({}, False),
        ({"eps": 0.5}, False),
        ({"n_rows": 7}, False),
        ({"x_ptr": FakeTensor(pointer=4096)}, False),
        ({"x_desc": _rows(shape=(9, 8))}, False),
        ({"x_desc": _rows(block=(2, 8))}, True),
        ({"x_desc": _rows(torch.float16)}, True),
        ({"x_desc": None}, True),
        ({"n_rows": 1}, True),
        ({"n_rows": 32}, True),
        ({"n_rows": 2**31}, True),
        ({"n_rows": 2**31 + 1}, True),
        ({"BLOCK": 16}, True),
        ({"num_warps": 8}, True),
        ({"x_ptr": FakeTensor(torch.float16)}, True),
        ({"y_ptr": FakeTensor(torch.float16)}, True),
        ({"y_ptr": FakeTensor(pointer=1028)}, True),
        ({"x_ptr": FakeTensor(index=1)}, True),
    ],
)
def test_a_variant_serves_exactly_what_it_was_compiled_for(change, recompiles, launch_once, fake_kernel):
    arguments = ARGUMENTS | change
    launch_once(fake_kernel.kernel, (3,), ARGUMENTS)
    launch_once(fake_kernel.kernel, (9, 2), arguments)
    assert len(fake_kernel.compiled) == 1 + recompiles
    if recompiles:
        assert fake_kernel.compiled[1] == ((9, 2), arguments)
    else:
        assert fake_kernel.direct == [((9, 2, 1), _launched(arguments))]


POINTERS = {name: ARGUMENTS[name] for name in ("x_ptr", "y_ptr", "x_desc")}
NUMBERS = {name: value for name, value in ARGUMENTS.items() if name not in POINTERS}


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_what_is_prepared_is_found_by_what_can_differ_between_pointers(fake_kernel, monkeypatch):
    launched = Prepared((9, 2), **NUMBERS)
    kernel = fake_kernel.kernel
    kernel[launched](**POINTERS)  # compiles
    kernel[launched](**POINTERS)  # a full launch, which the next ones repeat
    assert len(fake_kernel.compiled) == 1 and len(fake_kernel.direct) == 1

    def full(*args, **kwargs):
        raise AssertionError("a full launch")

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "_launch", full)
        for change in ({}, {"x_ptr": FakeTensor(pointer=4096)}, {"x_desc": _rows(shape=(9, 8))}):
            kernel[launched](**POINTERS | change)
            assert fake_kernel.direct[-1] == ((9, 2, 1), _launched(ARGUMENTS | change))
        for change in (
            {"x_ptr": FakeTensor(torch.float16)},
            {"y_ptr": FakeTensor(torch.float16)},
            {"y_ptr": FakeTensor(pointer=1028)},
            {"x_ptr": FakeTensor(index=1)},
        ):
            with pytest.raises(AssertionError, match="a full launch"):
                kernel[launched](**POINTERS | change)
    assert len(fake_kernel.direct) == 4


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_pointers_of_what_is_prepared_in_another_order_are_refused(fake_kernel):
    launched = Prepared((3,), **NUMBERS)
    given = {name: POINTERS[name] for name in ("y_ptr", "x_ptr", "x_desc")}
    with pytest.raises(TypeError, match="x_ptr, y_ptr, x_desc in this order"):
        fake_kernel.kernel[launched](**given)
    with pytest.raises(TypeError, match="got x_ptr"):
        fake_kernel.kernel[launched](x_ptr=FakeTensor())
    with compiling_ahead():
        fake_kernel.kernel[launched](**POINTERS)
    fake_kernel.kernel[launched](**POINTERS)
    assert not fake_kernel.compiled and len(fake_kernel.ahead) == len(fake_kernel.direct) == 1


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("fake_kernel", [False], indirect=True)
@pytest.mark.parametrize("number, recompiles", [(1, False), (32, False), (7, False), (2**31, True)])
def test_one_variant_for_any_number(number, recompiles, fake_kernel):
    fake_kernel.kernel[(3,)](**ARGUMENTS)
    fake_kernel.kernel[(3,)](**ARGUMENTS | {"n_rows": number})
    assert len(fake_kernel.compiled) == 1 + recompiles


def test_integers_that_the_compiler_does_not_look_at():
    def function(x_ptr, x_desc, n_rows, eps, BLOCK: tl.constexpr):
        raise AssertionError("never run")

    if not backend.HAS_TRITON or backend.interpreting():
        pytest.skip("needs Triton's compiler")
    assert [p.do_not_specialize for p in Kernel(function, specialise=False).function.params] == [
        False, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_compiled_ahead_in_another_thread_and_launched_here(fake_kernel):
    with compiling_ahead():
        fake_kernel.kernel[(3,)](**ARGUMENTS)
        fake_kernel.kernel[(3,)](**ARGUMENTS | {"n_rows": 7})  # the same variant
    assert not fake_kernel.compiled and not fake_kernel.direct
    fake_kernel.kernel[(9, 2)](**ARGUMENTS)
    assert fake_kernel.direct == [((9, 2, 1), _launched(ARGUMENTS))] and not fake_kernel.compiled
    assert len(fake_kernel.ahead) == 1 and fake_kernel.ahead[0].startswith("fastgemma-compile")
    fake_kernel.kernel[(3,)](**ARGUMENTS | {"BLOCK": 16})  # not foreseen
    assert len(fake_kernel.compiled) == 1


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_what_failed_ahead_compiles_at_its_launch(fake_kernel):
    arguments = ARGUMENTS | {"eps": -1.0}
    with pytest.raises(KeyError, match="mine"), compiling_ahead():
        fake_kernel.kernel[(3,)](**arguments)
        raise KeyError("mine")
    fake_kernel.kernel[(3,)](**arguments)  # outside again, though left by an exception
    assert len(fake_kernel.ahead) == len(fake_kernel.compiled) == 1


@can_fork
@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("busy", [True, False])
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(busy, fake_kernel, monkeypatch):
    """Neither for one that compiles, nor for one that would be given the next kernel."""
    compiling, go_on = threading.Event(), threading.Event()

    def warmup(self, grid, **kwargs):
        compiling.set()
        assert go_on.wait(30)

    monkeypatch.setattr(type(fake_kernel.kernel.function), "warmup", warmup)
    with compiling_ahead():
        fake_kernel.kernel[(3,)](**ARGUMENTS)
    assert compiling.wait(10)
    if not busy:
        go_on.set()
        time.sleep(0.2)  # until the thread waits for work

    def launch():
        go_on.set()  # for threads of the child's own
        fake_kernel.kernel[(3,)](**ARGUMENTS)
        with compiling_ahead():
            fake_kernel.kernel[(3,)](**ARGUMENTS | {"BLOCK": 16})
        fake_kernel.kernel[(3,)](**ARGUMENTS | {"BLOCK": 16})
        return len(fake_kernel.compiled)

    try:
        assert in_forked_child(launch, seconds=10) == 2
    finally:
        go_on.set()


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_arguments_may_be_named_in_any_order(fake_kernel):
    fake_kernel.kernel[(3,)](**ARGUMENTS)
    swapped = {name: ARGUMENTS[name] for name in ("BLOCK", "eps", "y_ptr", "n_rows", "x_desc", "x_ptr", "num_warps")}
    fake_kernel.kernel[(3,)](**swapped)
    assert len(fake_kernel.compiled) == 1 and fake_kernel.direct == [((3, 1, 1), _launched(ARGUMENTS))]


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_launches_go_through_a_profilers_hooks(fake_kernel, monkeypatch):
    fake_kernel.kernel[(3,)](**ARGUMENTS)
    monkeypatch.setattr(backend.triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    fake_kernel.kernel[(3,)](**ARGUMENTS)
    assert not fake_kernel.direct and fake_kernel.official == [((3, 1, 1), _launched(ARGUMENTS))]


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")
def test_a_tensor_elsewhere_is_refused(fake_kernel):
    elsewhere = FakeTensor()
    elsewhere.is_cuda, elsewhere.device = False, "cpu"
    with pytest.raises(ValueError, match="got a tensor on cpu"):
        fake_kernel.kernel[(3,)](**ARGUMENTS | {"y_ptr": elsewhere})


def test_host_arithmetic():
    for n in range(1, 300):
        assert [cdiv(n, b) for b in (1, 7, 64)] == [n, (n + 6) // 7, (n + 63) // 64]
        power = next_power_of_2(n)
        assert power >= n > power // 2 and power & (power - 1) == 0
    assert cdiv(0, 7) == 0


# Where kernels run


def test_runs_kernel(monkeypatch):
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    assert runs_kernel(cpu, None, cpu) and not runs_kernel(meta) and not runs_kernel() and not runs_kernel(None)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    assert not runs_kernel(cpu)
    with pytest.raises(ValueError, match="tensors on cpu and on meta"):
        runs_kernel(None, cpu, meta)


@pytest.mark.parametrize("variable, expected", [("1", True), ("0", False), (None, False)])
def test_interpreting(variable, expected, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRITON_INTERPRET", variable)
    assert backend.interpreting() is expected
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert not backend.interpreting() and not runs_kernel(torch.zeros(1))


def test_jit_without_triton_leaves_the_function(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.jit(len) is len


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_check_dtype(dtype):
    with pytest.raises(TypeError, match=f"x is {dtype}"):
        check_dtype("x", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize(
    "tensor, is_view",
    [
        (torch.randn(4, 6), True),
        (torch.randn(2, 3, 6), True),
        (torch.randn(2, 3, 5, 6)[:, :, 2], True),
        (torch.randn(4, 9)[:, :6], True),
        (torch.randn(6), True),
        (torch.randn(6, 4).t(), False),
        (torch.randn(4, 12)[:, ::2], False),
        (torch.randn(3, 2, 6).transpose(0, 1), False),
        (torch.randn(0, 6), True),
    ],
)
def test_as_rows(tensor, is_view):
    rows = as_rows(tensor)
    assert rows.stride(-1) == 1 and torch.equal(rows, tensor.reshape(-1, 6))
    assert (rows.data_ptr() == tensor.data_ptr()) == is_view
