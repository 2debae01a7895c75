"""Hybrid embeddings and their gradients where a row or a confidence is 0, infinite or NaN."""

import pytest
import torch
from fuzzing import FUNCTIONS, INF, NAN, everywhere, on
from tolerances import assert_close

import dmax_kernels
from dmax_kernels import reference

# The interpreter warns of 0 * inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KINDS = ("finite", "zero", "inf", "-inf", "nan")
CONFIDENCES = (0.0, 0.5, 1.0, 1.25, NAN, INF)
MASK = len(KINDS)


def row_of(kind, dim, seed=0):
    """One element decides, at which a kernel's last vector or its only tail begins."""
    row = torch.randn(dim, generator=torch.manual_seed(seed))
    if kind == "zero":
        return row.zero_()
    if kind != "finite":
        row[dim - 4] = float(kind)
    return row


def table_of(mask_kind, dim):
    """A row of each kind, then the mask's."""
    rows = [row_of(kind, dim, seed) for seed, kind in enumerate(KINDS)]
    return torch.stack([*rows, row_of(mask_kind, dim, MASK)])


def run(backend, op, *arguments):
    """The op on copies on the backend's device; results on the CPU."""
    functions, device = FUNCTIONS[backend]
    if functions is dmax_kernels:
        functions = torch.ops.dmax
    results = getattr(functions, op)(*(on(device, argument) for argument in arguments))
    if torch.is_tensor(results):
        return results.cpu()
    return tuple(result.cpu() for result in results)


def in_float64(table, token, confidence):
    e, e_mask, p = table[token].double(), table[MASK].double(), confidence.double()
    rest = (1 - p.sum(-1)).clamp(min=0)
    mix = (p.unsqueeze(-1) * e).sum(-2) + rest.unsqueeze(-1) * e_mask
    target = (p * e.norm(dim=-1)).sum(-1) + rest * e_mask.norm()
    norm = mix.norm(dim=-1)
    return mix * torch.where(norm == 0, 0, target / norm).unsqueeze(-1)


# 5: rows that are not aligned; 40: vectors of 16 bytes
@everywhere
@pytest.mark.parametrize("mask_kind", KINDS)
@pytest.mark.parametrize("dim", [5, 40])
def test_a_row_is_nan_where_anything_in_it_is_not_finite(backend, mask_kind, dim):
    """Whatever the weight of that row is: the product 0 * inf is NaN."""
    table = table_of(mask_kind, dim)
    token = torch.arange(MASK).repeat_interleave(len(CONFIDENCES))
    confidence = torch.tensor(CONFIDENCES).repeat(MASK)
    # Beside the finite token, without weight, or with all of it
    beside = torch.stack([token, 0 * token], -1), torch.stack([0 * token, token], -1)
    weights = torch.stack([confidence, 0 * confidence], -1)
    of_one = token.unsqueeze(-1), confidence.unsqueeze(-1)
    for ids, p in (of_one, (torch.cat(beside), weights.repeat(2, 1))):
        masked = torch.zeros(len(ids), dtype=torch.bool)
        hybrid = run(backend, "hybrid_embedding", table, ids, p, masked, MASK)
        finite = table.isfinite().all(-1)
        fine = p.isfinite().all(-1) & finite[ids].all(-1) & finite[MASK]
        assert torch.equal(hybrid.isnan().all(-1), ~fine)
        assert_close(hybrid[fine], in_float64(table, ids, p)[fine], 2e-6, 1e-6)
    if finite[MASK]:
        assert fine.any()


@everywhere
@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("of_mask", [False, True])
def test_gradients_of_such_a_row_are_nan(backend, kind, confidence, of_mask):
    table = table_of(kind if of_mask else "finite", 5)
    token = torch.tensor([KINDS.index("finite" if of_mask else kind)])
    p, masked = torch.tensor([confidence]), torch.tensor([False])
    grad = torch.ones(1, 5)
    if backend == "reference":
        leaves = [table.requires_grad_(), p.requires_grad_()]
        output = reference.hybrid_embedding(table, token, p, masked, MASK)
        of_table, of_confidence = torch.autograd.grad(output, leaves, grad)
    else:
        of_table, of_confidence = run(
            backend, "hybrid_embedding_backward", grad, table, token, p, masked, MASK
        )
    expected = torch.zeros(len(table), dtype=torch.bool)
    expected[token] = expected[MASK] = True
    assert torch.equal(of_table.isnan().all(-1), expected)
    assert (of_table[~expected] == 0).all()
    assert of_confidence.isnan().all()


@everywhere
@pytest.mark.parametrize("mask_kind", KINDS)
def test_a_step_has_the_same_rows(backend, mask_kind):
    """spd_step_ with decoded tokens of confidence 1 (each kind) and 0.5."""
    table = table_of(mask_kind, 5)
    logits = torch.full((1, MASK + 1, MASK + 1), -INF)
    logits[0, torch.arange(MASK), torch.arange(MASK)] = 0
    logits[0, MASK, :2] = 0  # "finite" before "zero", with one half
    editable = torch.ones(1, MASK + 1, dtype=torch.bool)
    state = {
        "editable": editable,
        "masked": ~editable,
        "token": torch.zeros(1, MASK + 1, dtype=torch.int64),
        "confidence": torch.zeros(1, MASK + 1),
        "converged": torch.zeros(1, dtype=torch.bool),
        "step": torch.zeros(1, dtype=torch.int32),
        "inputs_embeds": torch.zeros(1, MASK + 1, 5),
    }
    functions, device = FUNCTIONS[backend]
    state = {name: on(device, tensor) for name, tensor in state.items()}
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9}
    functions.spd_step_(on(device, logits), on(device, table), **state, **options)
    token = torch.tensor([*range(MASK), 0])
    confidence = torch.tensor([*[1.0] * MASK, 0.5])
    masked = torch.zeros(MASK + 1, dtype=torch.bool)
    assert torch.equal(state["token"][0].cpu(), token)
    expected = reference.hybrid_embedding(table, token, confidence, masked, MASK)
    assert_close(state["inputs_embeds"][0].cpu(), expected, 2e-6, 1e-6)
