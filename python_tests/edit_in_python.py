"""The engines' decoding steps in plain Python: what edit_step_ is compared with.

Each takes one request's block: its ids, which of them the prompt has given, and each position's
top-1 and probability. It returns the ids after the step and whether the engine reports the block.
"""

from dataclasses import dataclass


@dataclass
class Engine:
    """The options that the engines name differently, and one request's state."""

    mask_id: int
    threshold: float
    edit_threshold: float
    tokens_per_step: int
    max_post_edit_steps: int
    post_edit_steps: int = 0
    finished: bool = False

    def masks(self, ids, prompt):
        return [j for j, token in enumerate(ids) if token == self.mask_id and not prompt[j]]

    def surest(self, positions, c):
        """The tokens_per_step surest ones; NaN only alone and first."""
        order = sorted(positions, key=lambda j: (c[j] != c[j], -c[j] if c[j] == c[j] else 0, j))
        chosen = order[: self.tokens_per_step]
        return {j for j in chosen if c[j] == c[j]} or set(chosen[:1])

    def confident(self, positions, c):
        """Those above the threshold, or, where they are too few, the surest ones."""
        above = {j for j in positions if c[j] > self.threshold}
        return above if len(above) >= self.tokens_per_step else above | self.surest(positions, c)


def changed(ids, y, positions):
    return [y[j] if j in positions else token for j, token in enumerate(ids)]


def sglang_low_confidence(engine, ids, prompt, y, c):
    masks = engine.masks(ids, prompt)
    return changed(ids, y, engine.confident(masks, c)), not masks


def fixed_count(engine, ids, prompt, y, c):
    masks = engine.masks(ids, prompt)
    return changed(ids, y, engine.surest(masks, c)), not masks


def sglang_joint_threshold(engine, ids, prompt, y, c):
    if engine.finished:
        return ids, True
    masks = engine.masks(ids, prompt)
    fill = set()
    if masks:
        fill = engine.confident(masks, c)
    else:
        engine.post_edit_steps += 1
        if engine.post_edit_steps > engine.max_post_edit_steps:
            engine.finished = True
            return ids, True
    edit = {
        j
        for j, token in enumerate(ids)
        if j not in masks and not prompt[j] and c[j] > engine.edit_threshold and y[j] != token
    }
    engine.finished = not fill | edit
    return changed(ids, y, fill | edit), engine.finished


def dinfer_threshold(engine, ids, prompt, y, c):
    masks = engine.masks(ids, prompt)
    candidates = [j for j in masks if y[j] != engine.mask_id]
    fill = set()
    if candidates:
        best = max((c[j] for j in candidates if c[j] == c[j]), default=float("nan"))
        bar = min(engine.threshold, best - 1e-5)
        fill = {j for j in candidates if c[j] >= bar} | engine.surest(candidates, c)
    return changed(ids, y, fill), not masks


ENGINES = {
    "threshold": sglang_low_confidence,
    "low_confidence": fixed_count,
    "joint_threshold": sglang_joint_threshold,
    "dinfer_threshold": dinfer_threshold,
}
