"""Changes to modules of verl, made when verl itself imports them.

So `import verl` stays as light as it was, a name is changed before anyone can bind the old one, and what has moved
raises there, in sight: verl swallows what a plugin raises while it is loaded.
"""

import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from packaging.version import Version

FIRST, END = Version("0.9.1"), Version("0.10")  # of the versions of verl whose names are known here


class HookMoved(RuntimeError):
    """A name of verl that we change or rely on is gone, or takes other arguments."""


class Hook(NamedTuple):
    what: str  # it gives verl
    change: Callable[[ModuleType], None]


HOOKS: dict[str, list[Hook]] = {}  # by the module of verl that is changed


def after_import(module: str, what: str) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Decorator: call the function with `module` of verl as soon as it is imported, at once if it has been."""

    def decorate(change: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        HOOKS.setdefault(module, []).append(Hook(what, change))
        if module in sys.modules:
            change(sys.modules[module])
        return change

    return decorate


class _Finder(MetaPathFinder):
    """Finds a module of HOOKS as everyone else would, and lets the changes follow its execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in HOOKS:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((found for f in others if (found := f.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_change(module: ModuleType) -> None:
            execute(module)
            for hook in HOOKS[name]:
                hook.change(module)

        spec.loader.exec_module = then_change  # type: ignore[method-assign]
        return spec


def hooked(owner: Any, name: str, parameters: str) -> Any:
    """`owner.name` of verl; raises HookMoved unless it takes the `parameters`, words in this order, first."""
    where = f"{getattr(owner, '__module__', '')}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
    found = getattr(owner, name, None)
    if found is None:
        raise HookMoved(f"verl {version()} must have {where}.{name}, got none; {OFF}")
    got = list(inspect.signature(found).parameters)
    wanted = parameters.split()
    if got[: len(wanted)] != wanted:
        raise HookMoved(f"{where}.{name} of verl {version()} must take ({', '.join(wanted)}), got {got}; {OFF}")
    return found


OFF = "VERL_USE_EXTERNAL_PLUGINS=none runs verl without qrm_fast"


def version() -> str:
    return importlib.metadata.version("verl")


def check_version() -> None:
    """Raise ImportError for a verl that is not there or not known here."""
    try:
        got = Version(version())
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"verl must be installed, {FIRST} or newer and before {END}") from None
    if not FIRST <= got < END:
        raise ImportError(f"verl must be {FIRST} or newer and before {END}, got {got}")


check_version()
sys.meta_path.insert(0, _Finder())
