"""What a block of vocabulary columns contributes to the loss, and its part of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmax_kernels import ops
from dmax_kernels.distributed.layout import VocabShard, at_least_one_column
from dmax_kernels.reference.loss import combined_loss

_IGNORED = -1  # marks a target that is not on this shard, whose ids begin at 0


class Targets(NamedTuple):
    """Targets as ids of the whole vocabulary, flat."""

    ids: Tensor  # int64 [rows]
    kept: Tensor  # bool: not ignore_index
    outside: Tensor  # bool: not a token id. On a GPU the row's loss is then NaN
    shape: torch.Size

    @classmethod
    def of(cls, op: str, target: Tensor, ignore_index: int, vocab_size: int) -> Targets:
        if target.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: target must be int64 or int32, got {target.dtype}")
        ids = target.reshape(-1).long()
        kept = ids != ignore_index
        outside = kept & ((ids < 0) | (ids >= vocab_size))
        if target.device.type == "cpu" and outside.any():
            place = int(outside.nonzero()[0])
            raise ValueError(
                f"{op}: target must be {ignore_index} (ignore_index) or a token id in "
                f"[0, {vocab_size}), got {int(ids[place])} at position {place}"
            )
        return cls(ids, kept, outside, target.shape)


class LossParts:
    """The arithmetic of one loss: forward fields, their merge, and the gradient of a block."""

    def __init__(
        self, op: str, shard: VocabShard, *, label_smoothing: float, z_loss: float,
        temperature: float,
    ):  # fmt: skip
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing:g}")
        if not 0 <= z_loss < float("inf"):
            raise ValueError(f"{op}: z_loss must be zero or positive and finite, got {z_loss:g}")
        if not 1e-30 <= temperature <= 1e30:
            raise ValueError(f"{op}: temperature must be 1e-30 to 1e30, got {temperature:g}")
        self.op, self.shard = op, shard
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.temperature = temperature

    def _on_block(self, ids: Tensor, begin: int, width: int) -> tuple[Tensor, Tensor]:
        """(targets as places in the block, whether they lie there)."""
        local = ids - (self.shard.start + begin)
        on_block = (local >= 0) & (local < width)
        return torch.where(on_block, local, 0), on_block

    def fields(self, logits: Tensor, ids: Tensor, begin: int) -> Tensor:
        """[3 or 4, rows] float64: maximum, sum of exponentials, the target's logit if it is here,
        and for smoothing the sum of the logits.
        """
        place, on_block = self._on_block(ids, begin, logits.shape[1])
        columns = at_least_one_column(logits)
        maximum, sum_exp, _ = ops.top1_partial(columns.detach(), 0, temperature=self.temperature)
        at_target = columns.gather(1, place.unsqueeze(1)).squeeze(1).double()
        fields = [maximum.double(), sum_exp.double(), torch.where(on_block, at_target, 0.0)]
        if self.label_smoothing:
            fields.append(logits.sum(dim=1, dtype=torch.float64))
        return torch.stack(fields)

    def merge(self, fields: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """[blocks, 3 or 4, rows] -> loss, logsumexp and cross-entropy, float32 [rows], of the
        logits / temperature.
        """
        maximum, sum_exp, at_target = fields[:, 0], fields[:, 1], fields[:, 2].sum(dim=0)
        best = maximum.amax(dim=0)
        # exp(-inf - -inf) would be NaN, but a block that is all -inf has no mass
        depth = (maximum - best) / self.temperature
        factor = torch.where(maximum == -torch.inf, 0.0, torch.exp(depth))
        log_sum = (sum_exp * factor).sum(dim=0).log()
        undefined = ~best.isfinite() | targets.outside
        log_sum = log_sum.masked_fill(undefined, torch.nan)
        # Take the difference first: a common offset of the logits then cancels exactly
        nll = (best - at_target) / self.temperature + log_sum
        logsumexp = best / self.temperature + log_sum
        mean_logit = None
        if self.label_smoothing:
            mean_logit = fields[:, 3].sum(dim=0) / (self.shard.vocab_size * self.temperature)
        loss = combined_loss(nll, logsumexp, mean_logit, self.label_smoothing, self.z_loss)
        loss = torch.where(targets.kept, loss, 0.0)
        return loss.float(), logsumexp.float(), nll.float()

    def grad_logits(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        targets: Targets,
        begin: int,
        logsumexp: Tensor,
        nll: Tensor,
    ) -> Tensor:
        """``g [(1 + 2 z lse) softmax - (1 - s) onehot - s / V] / T`` of a block, in logits' dtype.

        This is the op's gradient with the block's share of the smoothing, because the op's V is the
        block's width. Then the column of each row's target, if it is in this block, is overwritten.
        """
        width = logits.shape[1]
        if width == 0 or logits.numel() == 0:
            return torch.zeros_like(logits)
        place, on_block = self._on_block(targets.ids, begin, width)
        share = self.label_smoothing / self.shard.vocab_size
        grad = torch.ops.dmax.oput_loss_backward(
            grad_loss.float(),
            logits,
            torch.where(targets.kept, place, _IGNORED),
            logsumexp,
            ignore_index=_IGNORED,
            label_smoothing=share * width,
            z_loss=self.z_loss,
            temperature=self.temperature,
        )
        # p - 1 without cancellation is expm1(-loss) at the target; other columns hold p alone
        lse = logsumexp.double()
        x = logits.gather(1, place.unsqueeze(1)).squeeze(1).double() / self.temperature
        log_p = torch.where(on_block, -nll.double(), x - lse)
        p_minus_target = torch.where(
            on_block, torch.expm1(log_p) + self.label_smoothing, torch.exp(log_p)
        )
        column = p_minus_target + 2 * self.z_loss * lse * torch.exp(log_p) - share
        column = column / self.temperature
        column = torch.where(targets.kept, grad_loss.double() * column, 0.0)
        return grad.scatter_(1, place.unsqueeze(1), column.unsqueeze(1).to(grad.dtype))
