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
                parent = sys.modules[".".join(parts[: depth - 1])]
                monkeypatch.setattr(parent, parts[depth - 1], module, raising=False)
    for key, value in contents.items():  # in an engine that is installed, until the test ends
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]
