"""The seam between the batch loop and what decides tokens: a `Rule`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from dmax_kernels.decoding.settings import Settings
    from dmax_kernels.decoding.state import LiveBlocks


class Rule(ABC):
    """What happens between two forward passes. Pass an instance as `spd_generate(rule=...)`.

    The loop runs the model over the live blocks, calls `update_` once, and looks at
    `state.converged`: a row that is True there has finished its block, whose tokens are then
    `state.token` at its editable positions. The loop does the rest (cache, batches, end of
    sequence, step cap, trace, streaming), so a rule is a function of one block's state.

    A rule gets B live rows, each in a block of its own sequence: rows may be in different blocks,
    and row i of one step may be another request at the next. So it keeps nothing per row itself;
    what is fixed for a row is in the state (`state.row`, `state.start`, `state.thresholds`), and
    `state.step` counts the block's steps. It runs the same operations whatever the values are, and
    never reads one on the host (no `.item()`, no `if tensor`, no boolean index): on a GPU the step
    is captured once as a CUDA graph and replayed.
    """

    def begin_(  # noqa: B027 - a default, not an oversight
        self, state: LiveBlocks, rows: Tensor, embedding: Tensor, settings: Settings
    ) -> None:
        """Change the start of a block where rows, bool [B], is True: all masks until now.

        Called outside of any graph. By default nothing: the block starts fully masked.
        """

    @abstractmethod
    def update_(
        self, logits: Tensor, embedding: Tensor, state: LiveBlocks, settings: Settings
    ) -> None:
        """One step, in place: logits [B, K, V] of the live blocks, embedding [V, D].

        Reads all of `state` and `settings` (`mask_token_id`, `suppress_token`, `ops`: the fused or
        the reference functions, ...). Writes `masked`, `token`, `confidence`, `converged`,
        `inputs_embeds` (what the next pass reads: e(mask), a token's or a hybrid embedding) and
        adds 1 to `step`, for the rows that are not converged; a row that is converged on entry
        stays as it is, to the last bit. `editable`, `row`, `start` and `thresholds` are read only.
        Each step should decide at least one masked position, or the step cap ends the block.
        Returns nothing.
        """
