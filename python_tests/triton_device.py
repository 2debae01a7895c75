"""Calls a Triton op where it can run: on the GPU, else under the interpreter on the CPU.

The interpreter takes some 10 ms per program. Its vocabularies are therefore few and as small as the
paths through the kernels allow: one tile or several, a last tile that is whole or cut.
"""

import contextlib
import functools
from types import SimpleNamespace

import torch

from dmax_kernels.triton import IMPLEMENTATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(x):
    return x.to(DEVICE) if torch.is_tensor(x) else x


def triton_op(op, *arguments, **options):
    """The op on copies on DEVICE; results on the CPU."""
    results = IMPLEMENTATIONS[op](
        *map(on_device, arguments), **{name: on_device(x) for name, x in options.items()}
    )
    if torch.is_tensor(results):
        return results.cpu()
    return results if results is None else tuple(t.cpu() for t in results)


# The ops by name, as dmax_kernels and dmax_kernels.reference have them
triton = SimpleNamespace(**{op: functools.partial(triton_op, op) for op in IMPLEMENTATIONS})


@contextlib.contextmanager
def chunked_from(rows):
    """linear_* ops take the library's products from `rows` rows on (None: never), in any dtype."""
    from dmax_kernels.triton import linear_rows

    tables = (linear_rows.LEAST_CHUNKED_ROWS, linear_rows.LEAST_CHUNKED_ROWS_SAMPLING)
    before = [dict(table) for table in tables]
    for table in tables:
        table.update(dict.fromkeys(table, rows))
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)


def cpp_op(op, *arguments, **options):
    """The same op of the C++ library, on the CPU."""
    return getattr(torch.ops.dmax, op)(*arguments, **options)
