"""Every CUDA kernel once, on small inputs: what compute-sanitizer runs (bench/gpu_session.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]

import dmax_kernels  # noqa: E402


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (7, 2049, 20_001):
            logits = torch.randn(4, vocab, device="cuda", generator=generator).to(dtype)
            seed = torch.tensor([1, 2], device="cuda")
            target = torch.tensor([0, 1, -100, vocab - 1], device="cuda")
            dmax_kernels.top1_confidence(logits, suppress_token=3)
            dmax_kernels.topk_confidence(logits, 3)
            dmax_kernels.row_statistics(logits)
            dmax_kernels.sample_tokens(logits, seed)
            parts = dmax_kernels.top1_partial(logits, 0)
            dmax_kernels.top1_merge(*(torch.stack([x, x]) for x in parts))
            for start in (0, 1):
                parts = dmax_kernels.sample_partial(logits, seed, start)
            dmax_kernels.sample_merge(*(torch.stack([x, x]) for x in parts))
            leaf = logits.clone().requires_grad_()
            dmax_kernels.oput_loss(leaf, None, target)[0].sum().backward()
            dmax_kernels.oput_loss_and_grad_(logits.clone(), logits.clone(), target)
        for dim in (13, 264):
            embedding = torch.randn(50, dim, device="cuda", generator=generator).to(dtype)
            leaves = [embedding.requires_grad_(), torch.rand(6, 2, device="cuda") / 2]
            token = torch.randint(0, 50, (6, 2), device="cuda")
            masked = torch.arange(6, device="cuda") % 3 == 0
            dmax_kernels.hybrid_embedding(leaves[0], token, leaves[1], masked, 49).sum().backward()
        for semantics in ("settled", "paper", "released"):
            for top_k in (1, 3):
                step(dtype, semantics, top_k)
    confidence = torch.rand(3, 40, device="cuda")
    dmax_kernels.prefix_promote(confidence, confidence < 0.7, 0.5)
    torch.cuda.synchronize()
    print("small cases: done")


def step(dtype: torch.dtype, semantics: str, top_k: int) -> None:
    from test_simt_embeddings import spd_case

    logits, embedding, state = spd_case(3, 4, vocab=20_001, dtype=dtype)
    state = {name: tensor.cuda() for name, tensor in state.items()}
    dmax_kernels.spd_step_(
        logits.cuda(), embedding.cuda(), **state, mask_token_id=39, tau_dec=0.5, tau_acc=0.9,
        semantics=semantics, top_k=top_k,
    )  # fmt: skip


if __name__ == "__main__":
    main()
