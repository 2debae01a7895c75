"""How far a result may lie from float64, and why."""

import torch
from torch import Tensor

# Confidence: float32 sums of up to 262,144 exponentials, each rounded a few times
CONFIDENCE_RTOL = 2e-6
# The references sum in whatever order eager PyTorch does
REFERENCE_RTOL = 1e-5
# Loss: maximum - logit + log(sum), each part in double after float32 exponentials
LOSS_RTOL = 1e-6
# A loss next to 0 is the sum of small exponentials, each good to a few float32 roundings
LOSS_ATOL = 1e-7
# Entropy and logsumexp: a float32 sum's relative error is an absolute one of its logarithm
ENTROPY_RTOL, ENTROPY_ATOL = 2e-6, 1e-6
LOGSUMEXP_TOL = 1e-6
# Gradients and embeddings end in one rounding to the output's dtype: half a unit in the last place,
# and a few float32 roundings before it
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
    """Equal to the tolerance in float64; NaN where NaN, infinities where infinities."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_statistics(actual, expected, slack=1.0):
    """Each of the five within its tolerance, ``slack`` times: 2 where both sides are rounded.

    A probability of 1e-9 lies 20 nats below the maximum, where float32's exponent is good to 1e-6.
    """
    token, confidence, runner_up, entropy, logsumexp = zip(actual, expected, strict=True)
    assert token[0].tolist() == token[1].tolist()
    assert token[0].dtype == torch.int64
    assert {each.dtype for each in actual[1:]} == {torch.float32}
    assert_close(*confidence, slack * CONFIDENCE_RTOL)
    assert_close(*runner_up, slack * CONFIDENCE_RTOL, 1e-9)
    assert_close(*entropy, slack * ENTROPY_RTOL, slack * ENTROPY_ATOL)
    assert_close(*logsumexp, slack * LOGSUMEXP_TOL, slack * LOGSUMEXP_TOL)
    assert not (entropy[0] < 0).any()
