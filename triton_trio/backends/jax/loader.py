"""``model.py``: imported under a name of its own, and recognised by the functions it has.

Three forms, told apart by function names alone::

    apply(params, inputs) -> outputs                                    one program

    init(params, inputs) -> carry                                       a step model
    step(params, carry) -> carry
    done(carry) -> bool            may be left out with parameter max_steps
    finish(params, carry) -> outputs
    emit(params, carry) -> outputs only if the model is decoupled; then finish may be left out

    async run(ctx, params, inputs) -> outputs                           explicit checkpoints

and in each, if wanted, ``load(context) -> params``.

In a model with ``sequence_batching`` the control inputs and the states are inputs like the others, of shape ``[1]`` and of
the state's dims, and the new states are outputs like the others.  A row that no request fills (READY false) is computed
with another row's tensors, and its outputs are dropped.  With ``iterative_sequence`` an async ``run`` may call
``ctx.reschedule()`` and return states instead of outputs: the request is executed again when its turn comes.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import InvalidArgument

if TYPE_CHECKING:
    import jax

    from ...config import ModelConfig

_serial = itertools.count(1)
#: Imports of models change sys.path and sys.modules for a moment; one at a time.
_importing = threading.Lock()


class Form(StrEnum):
    APPLY = "apply"
    STEPS = "steps"
    EXPLICIT = "explicit"


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What ``load`` in model.py gets.  It runs in a worker thread, once for each device."""

    config: ModelConfig
    directory: Path  #: the version's directory, where model.py and its files are
    version: int
    device: jax.Device  #: JAX's default device while ``load`` runs


@dataclass(frozen=True, slots=True)
class ModelFunctions:
    """The functions of one model.py; those that its form does not have are None."""

    path: Path
    form: Form
    load: Callable[[LoadContext], Any] | None
    apply: Callable[..., Any] | None = None
    init: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    done: Callable[..., Any] | None = None
    finish: Callable[..., Any] | None = None
    emit: Callable[..., Any] | None = None
    run: Callable[..., Any] | None = None


_ARGUMENTS = {
    "load": ("context",),
    "apply": ("params", "inputs"),
    "init": ("params", "inputs"),
    "step": ("params", "carry"),
    "done": ("carry",),
    "finish": ("params", "carry"),
    "emit": ("params", "carry"),
    "run": ("ctx", "params", "inputs"),
}
_STEPS = ("init", "step", "done", "finish", "emit")


@contextlib.contextmanager
def imported(path: Path, model_name: str, version: int) -> Iterator[ModuleType]:
    """Import ``path`` as a module of its own; leaving the block forgets it.

    Modules next to it can be imported at its top; each load has its own copies of them, too, so that two models may
    both have a ``utils.py`` and a reload sees new code.  Blocking: call it in a worker thread.

    Raises:
      InvalidArgument: there is no such file, or importing it raised.
    """
    module = _import(path, model_name, version)
    try:
        yield module
    finally:
        sys.modules.pop(module.__name__, None)


def _import(path: Path, model_name: str, version: int) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(
            f"model '{model_name}' version {version}: cannot read {path}: {exc.strerror}; the jax backend needs it"
        ) from None
    module = ModuleType(f"triton_trio_model_{re.sub(r'[^0-9a-zA-Z]', '_', model_name)}_{version}_{next(_serial)}")
    module.__file__ = str(path)
    with _importing, _siblings(path.parent):
        sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
        try:
            # Compiled here, not by importlib: a .pyc of a file changed twice within a second would be the old one's.
            exec(compile(source, str(path), "exec"), module.__dict__)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # whatever the author's file raises
            sys.modules.pop(module.__name__, None)
            raise InvalidArgument(
                f"model '{model_name}': importing {path} failed{at_line(exc, path)}: {type(exc).__name__}: {exc}"
            ) from None
    return module


def at_line(exc: BaseException, path: Path) -> str:
    """`` at line 12``: where in ``path`` it was raised; empty if it was not."""
    if isinstance(exc, SyntaxError):
        return ""  # its text has the line
    lines = (
        [frame.lineno for frame in inspect.getinnerframes(exc.__traceback__) if frame.filename == str(path)]
        if (exc.__traceback__)
        else []
    )
    return f" at line {lines[-1]}" if lines else ""


@contextlib.contextmanager
def _siblings(directory: Path) -> Iterator[None]:
    """Make the modules in ``directory`` importable, and forget them afterwards: model.py has its references."""
    names = {child.stem for child in directory.glob("*.py")} | {
        child.parent.name for child in directory.glob("*/__init__.py")
    }

    def take() -> dict[str, ModuleType]:
        # A copy: other threads import, too.
        found = {name: module for name, module in sys.modules.copy().items() if name.partition(".")[0] in names}
        for name in found:
            del sys.modules[name]
        return found

    hidden = take()
    path = str(directory)
    sys.path.insert(0, path)
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = write_bytecode
        sys.path.remove(path)
        take()
        sys.modules.update(hidden)
        sys.path_importer_cache.pop(path, None)


def find_functions(module: ModuleType, path: Path, config: ModelConfig, *, max_steps: int | None) -> ModelFunctions:
    """Recognise the form.

    Raises:
      InvalidArgument: functions of two forms, a missing one, one too many, or one that takes other arguments.
    """
    found = {name: value for name in _ARGUMENTS if callable(value := getattr(module, name, None))}

    def bad(text: str) -> InvalidArgument:
        return InvalidArgument(f"model '{config.name}': {path}: {text}")

    for name, function in found.items():
        _check_arguments(name, function, bad)
    steps = [name for name in _STEPS if name in found]
    forms = [
        form
        for form, here in (("apply", "apply" in found), ("run", "run" in found), (steps and steps[0], steps))
        if here
    ]
    if not forms:
        raise bad(
            "no model found; write apply(params, inputs), or init, step, done and finish, or async def run(ctx, params, "
            "inputs)"
        )
    if len(forms) > 1:
        raise bad(
            f"has {' and '.join(f'{name}()' for name in forms)}, which belong to different forms; keep one form and "
            "rename the other functions"
        )
    if "run" in found:
        return ModelFunctions(path, Form.EXPLICIT, **_with_load(found))
    if config.sequence_batching is not None and config.sequence_batching.iterative_sequence:
        raise bad(
            f"has {forms[0]}(), which cannot ask for another turn, and config.pbtxt says iterative_sequence; write async "
            "def run(ctx, params, inputs) and call ctx.reschedule(), or remove iterative_sequence"
        )
    if "apply" in found:
        return ModelFunctions(path, Form.APPLY, **_with_load(found))
    needed = ["init", "step"]
    if max_steps is None:
        needed.append("done")
    needed.append("emit" if config.decoupled else "finish")
    if missing := [f"{name}({', '.join(_ARGUMENTS[name])})" for name in needed if name not in found]:
        hint = "; or set the parameter max_steps in config.pbtxt" if missing == ["done(carry)"] else ""
        raise bad(f"has {_list(steps)}, but a step model also needs {' and '.join(missing)}{hint}")
    if "emit" in found and not config.decoupled:
        raise bad(
            "has emit(), which sends a response after every step; that needs "
            "'model_transaction_policy { decoupled: true }' in config.pbtxt"
        )
    return ModelFunctions(path, Form.STEPS, **_with_load(found))


def _with_load(found: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    return {"load": None, **found}


def _list(names: list[str]) -> str:
    return ", ".join(f"{name}()" for name in names)


def _check_arguments(name: str, function: Callable[..., Any], bad: Callable[[str], InvalidArgument]) -> None:
    arguments = _ARGUMENTS[name]
    is_async = inspect.iscoroutinefunction(function)
    if is_async != (name == "run"):
        what = "'async def'" if name == "run" else "a plain 'def': it is a function of arrays and cannot wait"
        raise bad(f"{name}() must be {what}")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        raise bad(f"{name}() must take ({', '.join(arguments)}), it takes {inspect.signature(function)}") from None
    except ValueError:
        return  # a callable without a signature; tracing will tell
