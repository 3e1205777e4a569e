"""Which implementation of an operation runs, and why the others were passed over.

Each operation has up to three implementations: `native` (the C++ core, on the CPU and, for few operations, in CUDA
C++), `triton` (on a GPU) and `reference` (pure torch, anywhere). Every native or triton implementation is a module with
`why_not(device, dtypes)`, which says in a sentence why it cannot serve such tensors, or None if it can; any shape must
be served, or refused with a `BackendError` that names the remedy. `auto` takes the first that can, in the order below.
An operation may name calls that torch serves best; and where the native module has `why_not_call`, because its CUDA
kernels refuse calls that others serve, `auto` asks it about CUDA tensors and passes `native` over where it answers.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from .checks import BackendError, bad_value

log = logging.getLogger("peft_kernels")

BACKENDS = ("native", "triton", "reference")

# operation -> backend -> the module that implements it; `reference` needs no module: it is the public function's twin.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    op: {
        "native": f"peft_kernels.ops.{op}.native_calls",
        "triton": f"peft_kernels.ops.{op}.triton_kernels",
    }
    for op in (
        "bottleneck_adapter",
        "nf4",
        "linear_4bit",
        "lora_linear",
        "scaled_linear",
        "prefix_attention",
        "gated_prompt_attention",
        "prompt_embedding",
    )
}

_requested = os.environ.get("PEFT_KERNELS_BACKEND", "auto")
if _requested not in (*BACKENDS, "auto"):
    raise bad_value("PEFT_KERNELS_BACKEND", f"one of {(*BACKENDS, 'auto')}", repr(_requested), "Unset it.")
_unentered: use_backend | None = None  # what made the setting in force, until a `with` has taken it


class _Recorder(threading.local):
    """This thread's: what `record` is told, or None outside of it; and whether it is for `probe`."""

    def __init__(self) -> None:
        self.steps: list[Explanation | str] | None = None
        self.probing = False


_recorder = _Recorder()
_recorders = 0  # how many threads record: where that is none, a call has no need of the thread's own attributes
_counting = threading.Lock()


class Explanation:
    """What `choose` decided for one operation: the backend taken, and for each one passed over, why."""

    def __init__(self, op: str, chosen: str | None, passed_over: dict[str, str]):
        self.op, self.chosen, self.passed_over = op, chosen, passed_over

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'nothing can run this call'}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


class _Explained(BaseException):
    """Ends a recorded call once the choice is known, before any kernel runs."""


class use_backend:
    """Choose the backend: `with use_backend("reference"): ...`, or `use_backend("reference")` from here on.

    Args:
        name: "native", "triton", "reference", or "auto" (the first that can serve each call). A backend named here
            never falls back: a call that it cannot serve raises `BackendError`. The setting holds for the process;
            the environment variable PEFT_KERNELS_BACKEND sets its start value. It may be kept and entered later.
    """

    def __init__(self, name: str):
        global _requested, _unentered
        if name not in (*BACKENDS, "auto"):
            raise bad_value("name", f"one of {(*BACKENDS, 'auto')}", repr(name), "See peft_kernels.backends().")
        self._name, self._before = name, _requested
        self._restore: list[str] = []  # what was in force where each `with` began
        _requested, _unentered = name, self

    def __enter__(self) -> use_backend:
        global _requested, _unentered
        self._restore.append(self._before if _unentered is self else _requested)
        _requested, _unentered = self._name, None
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _requested, _unentered
        _requested, _unentered = self._restore.pop(), None


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` on `backend` ("native" or "triton")."""
    return importlib.import_module(IMPLEMENTATIONS[op][backend])


def why_not(op: str, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why `backend` cannot run `op` for tensors of these dtypes on this device, or None if it can."""
    if backend == "reference":
        return None
    try:
        module = implementation(op, backend)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return module.why_not(device, dtypes)


def choose(
    op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], vendor: str | None = None, call: tuple = ()
) -> str:
    """The name of the backend that runs `op` for tensors of these dtypes on this device.

    vendor: why torch's own operations serve this call best; `auto` then takes the reference, which is not slow here.
    call: arguments of the native module's `why_not_call`, which is asked for CUDA tensors.
    """
    transformed = None if _requested == "reference" or op == "nf4" else _transformed()  # the codec has no derivative
    if transformed is not None:
        passed = BACKENDS[:-1] if _requested == "auto" else (_requested,)
        chosen, passed_over = "reference" if _requested == "auto" else None, tuple((b, transformed) for b in passed)
    elif vendor is not None and _requested == "auto":
        chosen, passed_over = "reference", (("native", vendor),)
    else:
        not_native = None
        if call and _requested == "auto" and device.type == "cuda":
            # a compiler's tensors have no addresses, on which it depends, and a mode's may have none
            traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
            not_native = _TRACED if traced else implementation(op, "native").why_not_call(*call)
        chosen, passed_over = _found(op, _requested, device, dtypes, not_native)
    if _recorders and _recorder.steps is not None:
        _recorder.steps.append(Explanation(op, chosen, dict(passed_over)))
        raise _Explained
    if chosen is None:
        raise BackendError(
            f"backend {_requested!r} was asked for and cannot run {op}: {passed_over[0][1]}. "
            "Choose another with peft_kernels.use_backend(...) or unset PEFT_KERNELS_BACKEND."
        )
    return chosen


def _transformed() -> str | None:
    """Why a transform in force leaves only what is made of torch's own operations, or None."""
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative, and a level of forward-mode AD is open (torch.func.jvp, dual_level)"
    if _in_functorch():
        return "a transform of torch.func is in force (grad, vmap, jacrev), which takes torch's own operations only"
    return None


def _in_functorch() -> bool:
    """Whether a transform of torch.func is in force; a trace may keep the answer, which the compiler guards."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `_found` below

_TRACED = "its CUDA kernels are not chosen under torch.compile or a dispatch mode"


def _found(
    op: str, requested: str, device: torch.device, dtypes: tuple[torch.dtype, ...], not_native: str | None
) -> tuple:
    """`_search`, evaluated while torch.compile traces: its arguments are constants, and `_requested` is guarded."""
    return _search(op, requested, device, dtypes, not_native)


# torch.compiler.assume_constant_result without its import of the whole compiler (which also loads numpy)
_found._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _search(
    op: str, requested: str, device: torch.device, dtypes: tuple[torch.dtype, ...], not_native: str | None = None
) -> tuple:
    """(backend or None, ((backend passed over, why), ...)); tells the log once when `auto` ends on the reference."""
    passed_over: list[tuple[str, str]] = []
    for backend in BACKENDS if requested == "auto" else (requested,):
        reason = why_not(op, backend, device, dtypes)
        if reason is None and requested == "auto" and backend == "native":
            reason = not_native
        if reason is None:
            break
        passed_over.append((backend, reason))
    else:
        return None, tuple(passed_over)
    if backend == "reference" and requested == "auto":
        reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
        log.warning("%s runs on the reference path (slow): %s", op, reasons)
    return backend, tuple(passed_over)


def observed(*tensors: torch.Tensor | None) -> bool:
    """Whether something has to see the library op itself rather than its result: then the call goes through torch's
    dispatcher, else straight to the kernel, which saves about 15 microseconds.

    That something is a compiler or tracer, a mode (fake tensors, selective checkpointing), a transform of torch.func, a
    profiler, or a tensor subclass among `tensors`.
    """
    if torch.compiler.is_compiling():
        return True
    c = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or c._get_tracing_state() is not None
        or c._functorch.peek_interpreter_stack() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def explain(module_or_function: Any, *args: Any, **kwargs: Any) -> str:
    """Which kernel a call would run, and for each backend passed over, why.

    Args:
        module_or_function: a `peft_kernels.functional` function, a `peft_kernels.nn` module, or any module whose
            forward calls one (a replaced layer, a whole model).
        args, kwargs: the call's arguments. A module with `in_features` may be given none: one row of zeros is assumed.

    Returns:
        str: one line with the choice, then one for each backend passed over. No kernel runs.
    """
    if not args and not kwargs and hasattr(module_or_function, "in_features"):
        parameters = list(module_or_function.parameters()) or [module_or_function.weight]  # a Weight4bit is none
        dtype = next((p.dtype for p in parameters if p.dtype.is_floating_point), torch.get_default_dtype())
        dtype = getattr(module_or_function, "_input_dtype", dtype)  # a replaced layer knows what it computes in
        device = parameters[0].device
        args = (torch.zeros(1, module_or_function.in_features, dtype=dtype, device=device),)
    recorded = record(module_or_function, *args, **kwargs)
    if not recorded:
        name = getattr(module_or_function, "__name__", type(module_or_function).__name__)
        return f"{name}: no peft_kernels operation is called; it runs as it is"
    return "\n".join(str(explanation) for explanation in recorded)


def record(call: Any, *args: Any, **kwargs: Any) -> list[Explanation | str]:
    """What `call` would run, up to its first operation, as `choose` decides it, and the notes that come before."""
    global _recorders
    steps: list[Explanation | str] = []
    with _counting:
        _recorders += 1
    _recorder.steps = steps
    try:
        call(*args, **kwargs)
    except _Explained:
        pass
    except Exception as error:
        if not steps:
            raise
        steps.append(f"  and that fails with {type(error).__name__}: {error}")
    finally:
        _recorder.steps = None
        with _counting:
            _recorders -= 1
    return steps


def probe(call: Any, *args: Any, **kwargs: Any) -> list[Explanation | str]:
    """As `record`, of a call nobody made: a note that it is left to others ends it, so that none of their code runs."""
    _recorder.probing = True
    try:
        return record(call, *args, **kwargs)
    finally:
        _recorder.probing = False


def undirected() -> bool:
    """Whether a layer may do a call as it likes: no backend was asked for by name, and the call is to be done."""
    return _requested == "auto" and (not _recorders or _recorder.steps is None)


def recording() -> bool:
    """Whether this call is only asked which kernel it would run."""
    return bool(_recorders) and _recorder.steps is not None


def note(text: str, *, final: bool = False) -> None:
    """Tell `record` why no operation is called here; `final` ends the recorded call, and so does any in `probe`."""
    if _recorders and _recorder.steps is not None:
        _recorder.steps.append(text)
        if final or _recorder.probing:
            raise _Explained


def backends() -> dict[str, str | None]:
    """What is usable here: backend -> None if it is, else why it is not."""
    from . import native
    from .triton_common import why_not as triton_why_not

    return {"native": native.why_not(), "triton": triton_why_not(), "reference": None}
