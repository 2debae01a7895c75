"""Rows of logits on which kernels go wrong; every op over the vocabulary is tested on all of
them."""

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")

# 1: no neighbours. 7, 127: tails of every vector width. 2,048 +- 1: one tile of the CPU kernels, a
# whole number of vectors of every backend, and one more or less. 5,000: several tiles and a tail.
SMALL_VOCABS = (1, 7, 127, 2047, 2048, 2049, 5000)
# LLaDA-2.0's vocabulary (a multiple of 512), and one less (odd: every second row is misaligned)
LARGE_VOCABS = (157183, 157184)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def logit_rows(vocab_size: int, seed: int = 0) -> dict[str, Tensor]:
    """name -> float32 [V]. Places are taken modulo V, so that every case exists for every V."""
    generator = torch.Generator().manual_seed(seed)
    normal = 3 * torch.randn(vocab_size, generator=generator, dtype=torch.float32)

    def with_values(base: Tensor, values: dict[int, float]) -> Tensor:
        row = base.clone()
        for place, value in values.items():
            row[place % vocab_size] = value
        return row

    last = vocab_size - 1
    half = vocab_size // 2
    flat = torch.zeros(vocab_size, dtype=torch.float32)
    first_tile = torch.arange(vocab_size) < min(2048, last)
    return {
        "normal": normal,
        "peaked": with_values(normal, {3: 60.0}),
        "flat": flat,
        "tie_of_neighbours": with_values(normal, {4: 20.0, 5: 20.0}),
        "tie_across_vectors": with_values(normal, {3: 20.0, 70: 20.0}),
        "tie_across_tiles": with_values(normal, {2047: 20.0, 2048: 20.0, 4097: 20.0}),
        "tie_first_and_last": with_values(normal, {0: 20.0, last: 20.0}),
        "signed_zeros": with_values(flat - 1, {2: -0.0, 5: 0.0}),
        "large_offset": normal + 1e4,
        "large_negative_offset": normal - 1e4,
        "largest_float16": with_values(normal, {1: 65504.0, 9: -65504.0}),
        "nan_first": with_values(normal, {0: NAN}),
        "nan_last": with_values(normal, {last: NAN}),
        "nans": with_values(normal, {6: NAN, half: NAN}),
        "nan_beside_inf": with_values(normal, {1: INF, 6: NAN}),
        "all_nan": flat + NAN,
        "inf": with_values(normal, {6: INF}),
        "infs": with_values(normal, {6: INF, last: INF}),
        "one_minus_inf": with_values(normal, {2: -INF}),
        "minus_inf_but_last": with_values(flat - INF, {last: -3.0}),
        "minus_inf_first_tile": normal.masked_fill(first_tile, -INF),
        "all_minus_inf": flat - INF,
    }


def stacked_rows(vocab_size: int, dtype: torch.dtype) -> tuple[list[str], Tensor]:
    """All cases as one tensor [cases, V] in the dtype (its rounding makes further ties)."""
    rows = logit_rows(vocab_size)
    return list(rows), torch.stack(list(rows.values())).to(dtype)


def strided_copies(x: Tensor) -> dict[str, Tensor]:
    """The same values [N, M] at other strides and alignments."""
    n, m = x.shape
    unaligned = torch.empty(n * m + 1, dtype=x.dtype, device=x.device)[1:].view(n, m).copy_(x)
    padded = torch.full((n, m + 5), 77.0, dtype=x.dtype, device=x.device)[:, :m].copy_(x)
    every_second = torch.full((n, 2 * m), 77.0, dtype=x.dtype, device=x.device)[:, ::2].copy_(x)
    return {
        "contiguous": x.contiguous(),
        "unaligned": unaligned,
        "padded_rows": padded,
        "every_second": every_second,
        "transposed": x.t().contiguous().t(),
        "rows_reversed_twice": x.flip(0).contiguous().flip(0),
    }
