"""What each step did to each row, kept on the device while decoding and read back at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.state import LiveBlocks


@dataclass
class _Step:
    start: Tensor  # int64 [b]: position of the block in the row's sequence
    rows: Tensor  # [b]: which rows of the batch these are
    took_part: Tensor  # bool [b]
    converged: Tensor  # bool [b], after the step
    editable: Tensor  # bool [b, K], as the rest
    token: Tensor
    confidence: Tensor
    masked: Tensor
    promoted: Tensor
    revised: Tensor


class Trace:
    """One record per step and row.

    `to_dict()` gives plain JSON types::

        {"rows": [{"blocks": [{"start": 32, "editable": [1, ...], "steps": [
            {"token": [...], "confidence": [...], "masked": [0, 1, ...], "promoted": [...],
             "revised": [...], "converged": false}]}]}]}

    token, confidence: the step's top-1 and its probability (the prompt's tokens where not
    editable; the mask token where still masked under "released" semantics); masked: 1 where still
    masked after the step; promoted and revised: positions inside the block that left the mask in
    this step, or changed the token they already had; converged: this step committed the block (its
    last masks then count as promoted).
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._before: tuple[Tensor, Tensor, Tensor] | None = None

    def before(self, state: LiveBlocks) -> None:
        self._before = (
            state.masked.clone(),
            state.token.clone(),
            state.converged.clone(),
        )

    def after(self, state: LiveBlocks) -> None:
        assert self._before is not None, "Trace.before records the state a step starts from"
        masked, token, converged = self._before
        self._steps.append(
            _Step(
                start=state.start.clone(),
                rows=state.row.clone(),
                took_part=~converged,
                converged=state.converged.clone(),
                editable=state.editable.clone(),
                token=state.token.clone(),
                confidence=state.confidence.clone(),
                masked=state.masked.clone(),
                promoted=masked & ~state.masked,
                revised=state.editable & ~masked & (state.token != token),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        rows: dict[int, list[dict[str, Any]]] = {}
        for step in self._steps:
            for i, (row, start) in enumerate(
                zip(step.rows.tolist(), step.start.tolist(), strict=True)
            ):
                if not step.took_part[i]:
                    continue
                blocks = rows.setdefault(row, [])
                if not blocks or blocks[-1]["start"] != start:
                    editable = step.editable[i].int().tolist()
                    blocks.append({"start": start, "editable": editable, "steps": []})
                blocks[-1]["steps"].append(
                    {
                        "token": step.token[i].tolist(),
                        # Four digits are enough to read and to shade the page's cells with
                        "confidence": [round(c, 4) for c in step.confidence[i].tolist()],
                        "masked": step.masked[i].int().tolist(),
                        "promoted": torch.nonzero(step.promoted[i]).flatten().tolist(),
                        "revised": torch.nonzero(step.revised[i]).flatten().tolist(),
                        "converged": bool(step.converged[i]),
                    }
                )
        return {"rows": [{"blocks": rows[row]} for row in sorted(rows)]}
