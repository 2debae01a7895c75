"""The kernels against their eager reference, at LLaDA-2.0's sizes."""

import torch
from kernels.benchmark import Benchmark

VOCAB, HIDDEN, BLOCK, MASK = 157184, 2048, 32, 156895


class Top1ConfidenceBenchmark(Benchmark):
    """Reads rows x V x 2 bytes."""

    seed = 0

    def _rows(self, rows):
        self.logits = 3 * torch.randn(rows, VOCAB, device=self.device, dtype=torch.bfloat16)

    def _run(self):
        _, self.out = self.kernel.top1_confidence(self.logits)

    def _reference(self):
        return self.kernel.reference.top1_confidence(self.logits)[1]

    def setup_one_block(self):
        self._rows(BLOCK)

    def benchmark_one_block(self):
        self._run()

    def verify_one_block(self):
        return self._reference()

    def setup_eight_blocks(self):
        self._rows(8 * BLOCK)

    def benchmark_eight_blocks(self):
        self._run()

    def verify_eight_blocks(self):
        return self._reference()


class HybridEmbeddingBenchmark(Benchmark):
    """Reads two rows of the embedding for each position and writes one."""

    seed = 0

    def setup(self):
        self.embedding = torch.randn(VOCAB, HIDDEN, device=self.device, dtype=torch.bfloat16)
        token = torch.randint(0, VOCAB, (BLOCK,), device=self.device)
        confidence = torch.rand(BLOCK, device=self.device)
        masked = torch.arange(BLOCK, device=self.device) >= BLOCK // 2
        self.arguments = (self.embedding, token, confidence, masked, MASK)

    def benchmark_one_block(self):
        self.out = self.kernel.hybrid_embedding(*self.arguments)

    def verify_one_block(self):
        return self.kernel.reference.hybrid_embedding(*self.arguments)
