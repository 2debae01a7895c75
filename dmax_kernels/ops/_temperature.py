"""A temperature for all rows, or one per row."""

from torch import Tensor


def read_temperature(logits: Tensor, temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """(the number, one per row of logits): what the ops take."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    rows = logits.shape[:-1]
    fits = temperature.dim() <= len(rows) and all(
        given in (1, size)
        for given, size in zip(reversed(temperature.shape), reversed(rows), strict=False)
    )
    # What does not fit goes to the op as it is, whose check says so
    return 1.0, temperature.expand(rows) if fits else temperature
