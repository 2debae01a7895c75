"""Ops that write in place behave as PyTorch's own: version counters, histories, overlap."""

import pytest
import torch

import dmax_kernels

V, D, B, K = 37, 8, 2, 4


def step_arguments():
    """logits, embedding, and the state of spd_step_ by name."""
    generator = torch.manual_seed(0)
    embedding = torch.randn(V, D, generator=generator)
    state = {
        "editable": torch.ones(B, K, dtype=torch.bool),
        "masked": torch.ones(B, K, dtype=torch.bool),
        "token": torch.full((B, K), V - 1),
        "confidence": torch.zeros(B, K),
        "converged": torch.zeros(B, dtype=torch.bool),
        "step": torch.zeros(B, dtype=torch.int32),
        "inputs_embeds": embedding[V - 1].expand(B, K, D).clone(),
    }
    return torch.randn(B, K, V, generator=generator), embedding, state


def step_(logits, embedding, state, **options):
    dmax_kernels.spd_step_(
        logits, embedding, **state, mask_token_id=V - 1, tau_dec=0.1, tau_acc=0.9, **options
    )


def losses():
    generator = torch.manual_seed(1)
    return torch.randn(6, V, generator=generator), torch.randint(0, V, (6,), generator=generator)


# ---- Versions and histories ----


@pytest.mark.parametrize("direct", [False, True], ids=["function", "op"])
def test_versions_of_what_is_written_go_up(direct):
    logits, embedding, state = step_arguments()
    if direct:
        torch.ops.dmax.spd_step_(logits, embedding, *state.values(), V - 1, 0.1, 0.9)
    else:
        step_(logits, embedding, state)
    assert state.pop("editable")._version == logits._version == embedding._version == 0
    assert [t._version for t in state.values()] == [1] * len(state)

    logits, target = losses()
    loss = torch.ops.dmax if direct else dmax_kernels
    loss.oput_loss_and_grad_(logits, None, target)
    assert logits._version == 1
    assert target._version == 0


def test_a_backward_pass_that_saved_an_overwritten_tensor_raises():
    weight = torch.randn(8, V, requires_grad=True)
    logits = torch.randn(6, 8) @ weight
    z_loss = logits.logsumexp(-1).square().mean()
    dmax_kernels.oput_loss_and_grad_(logits.detach(), None, losses()[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z_loss.backward()

    logits, embedding, state = step_arguments()
    head = torch.randn(D, V, requires_grad=True)
    projected = state["inputs_embeds"] @ head
    step_(projected.detach(), embedding, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        projected.sum().backward()


@pytest.mark.parametrize("leaf", [True, False])
def test_a_written_tensor_must_not_require_a_gradient(leaf):
    logits, target = losses()
    logits = logits.requires_grad_()
    predicted = logits if leaf else logits * 1
    before = predicted.detach().clone()
    with pytest.raises(RuntimeError, match="^oput_loss_and_grad_: logits_predicted is written in"):
        dmax_kernels.oput_loss_and_grad_(None, predicted, target)
    assert torch.equal(predicted, before)
    with torch.no_grad():  # as PyTorch's own
        dmax_kernels.oput_loss_and_grad_(None, predicted, target)
    assert not torch.equal(predicted, before)


def test_an_embedding_that_requires_a_gradient_is_only_read():
    logits, embedding, state = step_arguments()
    step_(logits, embedding.requires_grad_(), state)
    assert not state["inputs_embeds"].requires_grad


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        logits, embedding, state = step_arguments()
        step_(logits, embedding, state)
        logits, target = losses()
        dmax_kernels.oput_loss_and_grad_(logits, None, target)
    assert state["step"].tolist() == [1, 1]


def test_compiled_in_place_ops_count_versions():
    logits, embedding, state = step_arguments()
    expected = {name: t.clone() for name, t in state.items()}
    step_(logits, embedding, expected)
    torch.compile(step_, fullgraph=True)(logits, embedding, state)
    for name, t in state.items():
        assert torch.equal(t, expected[name]), name
    assert state["masked"]._version > 0
    assert state["inputs_embeds"]._version > 0


# ---- Memory ----


@pytest.mark.parametrize("written", ["masked", "token", "confidence", "converged", "inputs_embeds"])
def test_a_state_buffer_must_not_overlap_with_another_argument(written):
    logits, embedding, state = step_arguments()
    if written == "masked":  # one tensor for both
        state["masked"], other = state["editable"], "editable"
    elif written == "token":  # the last byte of one is the first of the other
        memory = torch.zeros(B * K * 8 + B * K * 4 - 1, dtype=torch.uint8)
        state["token"] = memory[: B * K * 8].view(torch.int64).view(B, K)
        state["confidence"] = memory[B * K * 8 - 4 :][: B * K * 4].view(torch.float32).view(B, K)
        other = "confidence"
    elif written == "confidence":
        state["confidence"], other = logits.view(-1)[5 : 5 + B * K].view(B, K), "logits"
    elif written == "converged":
        state["converged"], other = state["editable"].view(-1)[1 : 1 + B], "editable"
    else:
        state["inputs_embeds"], other = embedding.view(-1)[: B * K * D].view(B, K, D), "embedding"
    before = {name: t.clone() for name, t in state.items()}
    message = (
        f"^spd_step_: {written} is written in place and must not share memory with another "
        f"argument, got overlap with {other}$"
    )
    with pytest.raises(RuntimeError, match=message):
        step_(logits, embedding, state)
    assert all(torch.equal(t, before[name]) for name, t in state.items())


def test_thresholds_and_state_cut_from_one_buffer():
    logits, embedding, state = step_arguments()
    memory = torch.zeros(2 * B + B * K)
    state["confidence"] = memory[: B * K].view(B, K)
    step_(logits, embedding, state, thresholds=memory[B * K :].view(B, 2))
    with pytest.raises(RuntimeError, match="confidence is written .* got overlap with thresholds"):
        step_(logits, embedding, state, thresholds=memory[B * K - 1 : -1].view(B, 2))


def test_passes_of_the_loss_must_not_overlap():
    logits, target = losses()
    memory = torch.cat([logits, logits[:1]])
    for masked, predicted in ((memory[:6], memory[:6]), (memory[:6], memory[1:])):
        with pytest.raises(
            RuntimeError, match="logits_masked .* got overlap with logits_predicted"
        ):
            dmax_kernels.oput_loss_and_grad_(masked, predicted, target)
    assert torch.equal(memory[:6], logits)
    with pytest.raises(RuntimeError, match="logits_masked .* got overlap with grad_predicted"):
        dmax_kernels.oput_loss_and_grad_(logits, memory[:6], target, None, logits[:, 3])


def test_interleaved_rows_do_not_overlap():
    """Rows of both passes alternate in one tensor, with a gradient's column between them."""
    logits, target = losses()
    width = 2 * V + 1
    memory = torch.zeros(6, width)
    passes = memory[:, :V], memory[:, V + 1 :]
    grad = memory[:, V].fill_(2.0)
    for logits_of_pass in passes:
        logits_of_pass.copy_(logits)
    apart = logits.clone(), logits.clone()
    expected = dmax_kernels.oput_loss_and_grad_(*apart, target, grad.clone(), None)
    actual = dmax_kernels.oput_loss_and_grad_(*passes, target, grad, None)
    for a, e in zip((*actual, *passes), (*expected, *apart), strict=True):
        assert torch.equal(a, e)
    assert grad.eq(2.0).all()
    with pytest.raises(RuntimeError, match="logits_masked .* got overlap with grad_masked"):
        dmax_kernels.oput_loss_and_grad_(*passes, target, memory[:, V - 1])


def test_expanded_and_empty_arguments_do_not_overlap():
    logits, target = losses()
    grad = torch.ones(1).expand(6)
    dmax_kernels.oput_loss_and_grad_(logits, None, target[:1].expand(6), grad)
    empty = torch.empty(0, V)
    dmax_kernels.oput_loss_and_grad_(empty, empty, target[:0])
    with pytest.raises(RuntimeError, match="got overlap with grad_masked"):
        dmax_kernels.oput_loss_and_grad_(logits, None, target, logits[2, 5:6].expand(6))
