"""Every op as a citizen of PyTorch: opcheck, fullgraph compile, meta tensors."""

import pytest
import torch

import dmax_kernels
from dmax_kernels import reference


def spd_arguments():
    generator = torch.manual_seed(0)
    embedding = torch.randn(30, 8, generator=generator)
    editable = torch.tensor([[False, True, True, True], [True, True, True, True]])
    token = torch.where(editable, 29, 3)
    state = (
        editable,
        editable.clone(),
        token,
        torch.zeros(2, 4),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int32),
        embedding[token].clone(),
    )
    return torch.randn(2, 4, 30, generator=generator), embedding, *state, 29, 0.1, 0.9


def edit_arguments():
    editable = torch.tensor([[False, True, True, True], [True, True, True, True]])
    token = torch.tensor([[29, 4, 29, 29], [7, 29, 8, 29]])
    state = (
        editable,
        token,
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 4),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.bool),
    )
    logits = torch.randn(2, 4, 30, generator=torch.manual_seed(0))
    return logits, *state, 29, 0.1, 0.05


def samples():
    """op -> its arguments and keyword arguments, with leaves that require a gradient."""
    generator = torch.manual_seed(1)

    def randn(*shape, grad=False, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    logits = randn(3, 4, 50)
    target = torch.randint(0, 50, (3, 4), generator=generator)
    target[0, 0] = -100
    token = torch.randint(0, 20, (3, 4, 2), generator=generator)
    confidence = (torch.rand(3, 4, 2, generator=generator) / 2).requires_grad_()
    masked = torch.rand(3, 4, generator=generator) < 0.5
    partial = torch.ops.dmax.top1_partial(logits, 0)
    stacked = tuple(torch.stack([t, t + 1]) for t in partial)
    seed = torch.tensor([1, 2])
    mask = torch.tensor([0x7FFFFFF7, -1], dtype=torch.int32)
    sampled = tuple(torch.stack([t, t + 1]) for t in torch.ops.dmax.sample_partial(logits, seed, 0))
    hybrid = (randn(20, 6, grad=True), token, confidence, masked, 5)
    lse = logits.logsumexp(-1)
    return {
        "top1_confidence": ((logits,), {"temperature": 0.5, "suppress_token": 3}),
        "topk_confidence": ((logits, 3), {"allowed": mask}),
        "row_statistics": ((logits,), {"temperatures": confidence[..., 0] + 1, "allowed": mask}),
        "token_logprobs": (
            (randn(3, 4, 50, grad=True), target),
            {"temperature": 0.5, "top_n": 2, "allowed": mask},
        ),
        "prefix_promote": ((torch.rand(3, 4), masked, 0.4), {"inclusive": True}),
        "hybrid_embedding": (hybrid, {}),
        "hybrid_embedding_backward": (
            (randn(3, 4, 6), *(t.detach() if torch.is_tensor(t) else t for t in hybrid)),
            {},
        ),
        "soft_embedding": ((logits, randn(50, 6)), {"temperature": 0.7}),
        "soft_embedding_partial": (
            (logits, randn(50, 6)),
            {"temperatures": confidence[..., 0] + 1},
        ),
        "top_p_cut": ((logits, 0.9), {"temperature": 0.7}),
        "spd_step_": (spd_arguments(), {"top_k": 2, "allowed": mask[:1]}),
        "edit_step_": (edit_arguments(), {"rule": 2, "allowed": mask[:1]}),
        "sample_tokens": (
            (logits, seed),
            {"row_options": torch.tensor([0.7, 9, 0.9, 0.01]).expand(3, 4, 4), "allowed": mask},
        ),
        "transform_logits_": (
            (logits.clone(),),
            {
                "softcap": 5.0,
                "bias": randn(50),
                "output_counts": target.new_ones(3, 50).int(),
                "prompt_tokens": mask,
                "penalties": torch.tensor([1.1, 0.5, 0.1]).expand(3, 3),
            },
        ),
        "oput_loss": (
            (randn(3, 4, 50, grad=True), randn(3, 4, 50, grad=True), target),
            {"label_smoothing": 0.1, "temperature": 0.5},
        ),
        "oput_loss_backward": ((randn(3, 4), logits, target, lse), {}),
        "oput_loss_and_grad_": ((logits.clone(), None, target, randn(3, 4)), {}),
        "top1_partial": ((logits, 100), {"allowed": mask}),
        "top1_merge": (stacked, {"temperature": 0.7}),
        "sample_partial": ((logits, seed, 128), {"temperature": 0.7, "suppress_token": 130}),
        "sample_merge": (sampled, {"temperature": 0.7}),
        "linear_top1_confidence": ((randn(3, 4, 6), randn(50, 6), randn(50)), {"allowed": mask}),
        "linear_oput_loss": (
            (
                randn(3, 4, 6, grad=True),
                randn(3, 4, 6),
                randn(50, 6, grad=True),
                target,
                randn(50, grad=True),
            ),
            {"z_loss": 0.1, "temperature": 0.5},
        ),
        "linear_oput_loss_backward": (
            (lse, lse, randn(3, 4, 6), randn(3, 4, 6), randn(50, 6), target, lse, lse, randn(50)),
            {"needs_predicted": False},
        ),
        "linear_oput_loss_sum": (
            (
                randn(3, 4, 6, grad=True),
                randn(3, 4, 6),
                randn(50, 6, grad=True),
                target,
                randn(50, grad=True),
                randn(3, 4),
            ),
            {"label_smoothing": 0.1, "needs_predicted": False},
        ),
        "linear_oput_loss_scale_": ((randn(50, 6), torch.tensor(0.3)), {}),
        "linear_token_logprobs": (
            (randn(3, 4, 6, grad=True), randn(50, 6, grad=True), target, randn(50, grad=True)),
            {"temperature": 0.5, "top_n": 2, "allowed": mask},
        ),
        "linear_sample_tokens": (
            (randn(3, 4, 6), randn(50, 6), seed),
            {"top_k": 9, "allowed": mask},
        ),
    }


def test_every_op_has_a_sample():
    names = {
        schema.name.removeprefix("dmax::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dmax::")
    }
    ops = {name for name in names if not name.startswith("_check_")}
    assert ops == set(samples())
    assert names - ops == {f"_check_{op}" for op in ops}


# Mutation and aliasing as the schema says, autograd registered, fake and real results of one shape,
# dtype and stride, and AOTDispatch with dynamic shapes
@pytest.mark.parametrize("op", samples())
def test_opcheck(op):
    arguments, options = samples()[op]
    torch.library.opcheck(getattr(torch.ops.dmax, op).default, arguments, options)


@pytest.mark.parametrize("op", samples())
def test_opcheck_of_the_check(op):
    arguments, options = samples()[op]
    check = getattr(torch.ops.dmax, f"_check_{op}").default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(check, arguments, options, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["top1_confidence", "oput_loss", "hybrid_embedding"])
def test_opcheck_of_other_dtypes(op, dtype):
    arguments, options = samples()[op]
    arguments = tuple(
        t.detach().to(dtype).requires_grad_(t.requires_grad)
        if torch.is_tensor(t) and t.is_floating_point() and not (op[0] == "h" and i == 2)
        else t
        for i, t in enumerate(arguments)
    )
    torch.library.opcheck(getattr(torch.ops.dmax, op).default, arguments, options)


def decode(logits, embedding, seed, state):
    """Every decoding op in one graph."""
    token, confidence = dmax_kernels.top1_confidence(logits)
    tokens, confidences = dmax_kernels.topk_confidence(logits, 2)
    statistics = dmax_kernels.row_statistics(logits)
    promoted = dmax_kernels.prefix_promote(confidence, state["masked"], 0.2)
    embeds = dmax_kernels.hybrid_embedding(embedding, tokens, confidences, ~promoted, 29)
    penalized = dmax_kernels.transform_logits_(
        logits.clone(), output_counts=token.new_ones(30).int(), presence_penalty=0.5
    )
    sampled = dmax_kernels.sample_tokens(penalized, seed, top_k=5, suppress_tokens=(1, 2))
    shards = [
        dmax_kernels.top1_partial(shard.contiguous(), start)
        for shard, start in ((logits[..., :20], 0), (logits[..., 20:], 20))
    ]
    merged, _ = dmax_kernels.top1_merge(*(torch.stack(s) for s in zip(*shards, strict=True)))
    dmax_kernels.spd_step_(
        logits, embedding, **state, mask_token_id=29, tau_dec=0.1, tau_acc=0.9, top_k=2
    )
    filled = torch.full_like(token, 29)
    dmax_kernels.edit_step_(
        logits, editable=state["editable"], token=filled, prediction=token.clone(),
        confidence=confidence.clone(), post_edit_steps=torch.zeros_like(state["step"]),
        done=torch.zeros_like(state["converged"]), mask_token_id=29, threshold=0.2,
        rule="joint_threshold",
    )  # fmt: skip
    return (
        token + 0, confidence * 1, promoted, embeds, *sampled, merged, filled,
        statistics.entropy * 1, *statistics,
    )  # fmt: skip


def train(masked, predicted, target):
    return dmax_kernels.oput_loss(masked, predicted, target, reduction="mean")


STATE = ("editable", "masked", "token", "confidence", "converged", "step", "inputs_embeds")


def test_fullgraph_compile_of_decoding():
    logits, embedding, *state = spd_arguments()
    state = dict(zip(STATE, state[:7], strict=True))
    copies = [{k: v.clone() for k, v in state.items()} for _ in range(2)]
    seed = torch.tensor([3, 4])
    expected = decode(logits, embedding, seed, copies[0])
    compiled = torch.compile(decode, fullgraph=True)
    actual = compiled(logits, embedding, seed, copies[1])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for name in STATE:
        assert torch.equal(copies[0][name], copies[1][name]), name


def test_fullgraph_compile_of_training_with_dynamic_rows():
    compiled = torch.compile(train, fullgraph=True, dynamic=True)
    for rows in (3, 7):
        leaves = [torch.randn(rows, 50, requires_grad=True) for _ in range(2)]
        target = torch.randint(0, 50, (rows,))
        loss = compiled(*leaves, target)
        grads = torch.autograd.grad(loss, leaves)
        plain = reference.oput_loss(*leaves, target, reduction="mean")
        torch.testing.assert_close(loss, plain)
        for grad, expected in zip(grads, torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_fullgraph_compile_of_log_probabilities(dynamic):
    """Functions of their own autograd and not ops; a target out of range is an error here too."""

    def scores(hidden, weight, target):
        logits = hidden @ weight.t()
        return (
            *dmax_kernels.target_logprobs(logits, target)[:2],
            *dmax_kernels.linear_target_logprobs(hidden, weight, target)[:2],
            dmax_kernels.certainty_forcing_loss(logits, target),
            dmax_kernels.linear_certainty_forcing_loss(hidden, weight, target, temperature=0.5),
        )

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = [torch.randn(n, 8, requires_grad=True) for n in (6, 40)]
    target = torch.tensor([3, 0, -100, 39, 7, 7])
    results = [of(*leaves, target) for of in (compiled, scores)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(each.sum() for each in result), leaves) for result in results)
    )
    with pytest.raises(RuntimeError, match="^target_logprobs: target must be -100"):
        compiled(*leaves, target + 1)


def test_meta_tensors():
    """Shapes without memory: what a planner asks before it allocates."""
    logits = torch.empty(4096, 157184, dtype=torch.bfloat16, device="meta")
    token, confidence = dmax_kernels.top1_confidence(logits)
    assert (token.shape, token.dtype) == ((4096,), torch.int64)
    assert (confidence.shape, confidence.dtype) == ((4096,), torch.float32)
    loss, absent = dmax_kernels.oput_loss(logits, None, torch.empty(4096, device="meta").long())
    assert loss.shape == (4096,)
    assert absent is None
    hidden, weight = (torch.empty(n, 64, device="meta", requires_grad=True) for n in (4096, 157184))
    target = torch.empty(4096, device="meta").long()
    for total in (
        dmax_kernels.linear_oput_loss(hidden, hidden, weight, target, reduction="mean"),
        dmax_kernels.linear_target_logprobs(hidden, weight, target).logprob.sum(),
        dmax_kernels.linear_token_logprobs(hidden, weight, target).logprob.sum(),
    ):
        grads = torch.autograd.grad(total, (hidden, weight))
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]


def test_inference_mode():
    with torch.inference_mode():
        token, _ = dmax_kernels.top1_confidence(torch.randn(2, 9))
    assert token.shape == (2,)
