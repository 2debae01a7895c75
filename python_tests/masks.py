"""Masks of tokens as the ops take them (``allowed``), and as bool tensors."""

import torch


def packed(bits):
    """Bits [..., V] as the int32 words of ``allowed``."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (padded.long() << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def random_mask(num_rows, vocab_size, density=0.5):
    """(allowed [rows, words], the same as bool [rows, V]); garbage in the bits past the end."""
    words = -(-vocab_size // 32)
    bits = torch.rand(num_rows, 32 * words, generator=torch.manual_seed(8)) < density
    return packed(bits), bits[:, :vocab_size]


def grammar_mask(num_rows, vocab_size):
    """(allowed, bits) with what kernels treat in different ways: of the tiles of 2,048 ids, some
    are allowed as a whole, some not at all, and of the others a third, words and vectors of which
    nothing is allowed among them.
    """
    allowed, _ = random_mask(num_rows, vocab_size, 1 / 3)
    words = allowed.shape[-1]
    generator = torch.manual_seed(9)
    tile = torch.randint(0, 3, (num_rows, -(-words // 64)), generator=generator)
    tile = tile.repeat_interleave(64, dim=-1)[:, :words]
    word = torch.randint(0, 2, (num_rows, words), generator=generator)
    allowed = torch.where(tile == 0, -1, torch.where((tile == 1) | (word == 0), 0, allowed)).int()
    shifted = allowed.unsqueeze(-1) >> torch.arange(32)
    return allowed, (shifted & 1).bool().flatten(-2)[:, :vocab_size]
