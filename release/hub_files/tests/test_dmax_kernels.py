"""The ops against their reference, on the device of the build."""

import kernels
import pytest
import torch

dmax = kernels.get_kernel("@REPO_ID@", version=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# One tile of the vocabulary, and several with a rest
@pytest.mark.parametrize("vocab", [127, 20011])
def test_top1_confidence(dtype, vocab):
    logits = torch.randn(2, 32, vocab, device=DEVICE, generator=torch.Generator(DEVICE)).to(dtype)
    token, confidence = dmax.top1_confidence(logits)
    expected_token, expected_confidence = dmax.reference.top1_confidence(logits)
    assert token.equal(expected_token)
    torch.testing.assert_close(confidence, expected_confidence, rtol=4e-6, atol=0)


@pytest.mark.kernels_ci
def test_oput_loss_and_its_gradient():
    generator = torch.Generator(DEVICE)
    masked, predicted = torch.randn(2, 16, 2003, device=DEVICE, generator=generator)
    target = torch.randint(0, 2003, (16,), device=DEVICE, generator=generator)
    target[3] = -100
    gradients = []
    for module in (dmax, dmax.reference):
        inputs = [t.clone().requires_grad_() for t in (masked, predicted)]
        module.oput_loss(*inputs, target, reduction="mean").backward()
        gradients.append([t.grad for t in inputs])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.kernels_ci
def test_no_graph_break():
    def step(embedding, logits, masked):
        token, confidence = dmax.top1_confidence(logits)
        promoted = dmax.prefix_promote(confidence, masked, 0.5)
        return dmax.hybrid_embedding(embedding, token, confidence, masked & ~promoted, 3)

    embedding = torch.randn(257, 64, device=DEVICE)
    logits = 9 * torch.randn(2, 32, 257, device=DEVICE)
    masked = torch.ones(2, 32, dtype=torch.bool, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(embedding, logits, masked), step(embedding, logits, masked), rtol=0, atol=0
    )
