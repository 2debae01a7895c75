"""Modules that stand in for an engine: its documented signatures, none of its code."""

import sys
import types


def install(monkeypatch, name, **contents):
    """Make `import name` give a module with these contents, its parent packages included."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]
