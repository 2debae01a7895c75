"""Helpers for the Python half of an op: what LibTorch's stable C++ API has no call for."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

# The registrations live as long as this object
_library = torch.library.Library("dmax", "IMPL")

# op -> the file of this folder, of reference/ and of triton/ that holds it; gradients included
FAMILY_OF: dict[str, str] = {}


def register_fake(name: str) -> Callable:
    """The op's shapes and dtypes without data, for torch.compile and meta tensors.

    The op's check is left out, because it reads data, which neither of the two has.
    """

    def register(fake: Callable) -> Callable:
        FAMILY_OF[name] = fake.__module__.rpartition(".")[2]
        torch.library.register_fake(f"dmax::_check_{name}")(lambda *args, **options: None)
        return torch.library.register_fake(f"dmax::{name}")(fake)

    return register


def empty_per_row(rows: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    """One element per row [..., V] of each dtype."""
    return tuple(rows.new_empty(rows.shape[:-1], dtype=dtype) for dtype in dtypes)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """The op's gradient: ``setup_context(ctx, inputs, options, output)`` keeps what
    ``backward(ctx, *grads)`` needs to return a gradient for each of ``inputs``, the op's positional
    arguments; ``options`` are the keyword-only ones.

    torch.library.register_autograd would do, were it not for torch.func: under grad, jacrev and
    vmap(grad) its function raises (pytorch issues 168393 and 170834), and under jvp and jacfwd the
    tangents are dropped and the derivative is silently 0.
    """
    op = getattr(torch.ops.dmax, name).default
    positional = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    keyword_only = [argument for argument in op._schema.arguments if argument.kwarg_only]

    redispatch, after = op._handle.redispatch_boxed, torch._C._after_autograd_keyset
    is_grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad

    def below_autograd(keyset, args, options):
        with torch._C._AutoDispatchBelowAutograd():
            return redispatch(keyset & after, *args, **options)

    class Differentiable(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, *args_keyset_options):
            *inputs, keyset, options = args_keyset_options
            # A Function turns both off, yet an outer torch.func transform may record this call too
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below_autograd(keyset, inputs, options)
            setup_context(ctx, inputs, options, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None, None

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(f"{name}: has no forward-mode derivative")

    def autograd(keyset, *args, **options):
        # Most calls: with nothing to record, the op needs no guard, which takes a microsecond
        differentiated = is_grad_enabled() and any_requires_grad(*args)
        if not differentiated and forward_ad._current_level < 0:
            return redispatch(keyset & after, *args, **options)
        # The dispatcher drops arguments that equal their defaults
        args = (*args, *(argument.default_value for argument in positional[len(args) :]))
        options = {a.name: options.get(a.name, a.default_value) for a in keyword_only}
        # A torch.func transform calls this once per level, with tensors of that level
        with enable_single_level_autograd_function():
            return Differentiable.apply(*args, keyset, options)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def register_not_differentiable(name: str, advice: str) -> None:
    """Make a backward pass through the op raise one clear line instead of giving a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: has no gradient; {advice}")

    register_autograd(name, backward, setup_context=lambda *_: None)


def once_differentiable(name: str) -> Callable:
    """Makes the second derivative an error, for a backward pass (ctx, *grads) of whose parts not
    every one is an op that refuses it.

    PyTorch's decorator of this name raises only where the upstream gradient requires a gradient
    itself. Elsewhere the second derivative would silently lack what this backward pass adds to it.
    """
    problem = f"{name}: has no second derivative"

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def wrapper(ctx, *grads):
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return outputs
            refuse = torch._C._functions.DelayedError(problem, len(outputs))
            return refuse(*(None if t is None else t.detach().requires_grad_() for t in outputs))

        return wrapper

    return decorate


def register_in_place(name: str) -> None:
    """Tell autograd what the op writes, as PyTorch does for its own in-place ops.

    The version counters rise, so a backward pass that saved an overwritten tensor raises instead of
    using the new values. A written tensor that requires a gradient is an error: its history would
    no longer be true.
    """
    op = getattr(torch.ops.dmax, name).default
    written = {
        i: argument.name
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }

    redispatch, after = op._handle.redispatch_boxed, torch._C._after_ADInplaceOrView_keyset
    increment_version = torch.autograd.graph.increment_version

    def count_versions(keyset, *args, **kwargs):
        given = [args[i] for i in written if args[i] is not None]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
            leaf = next(
                n for i, n in written.items() if args[i] is not None and args[i].requires_grad
            )
            raise RuntimeError(
                f"{name}: {leaf} is written in place and must not require a gradient, got one that "
                "does: detach it, or call the op under torch.no_grad()"
            )
        increment_version(given)
        return redispatch(keyset & after, *args, **kwargs)

    _library.impl(name, count_versions, "ADInplaceOrView", with_keyset=True)
