"""`train --config gsm`: its options, checked, and the recipe that they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dmax_kernels.gsm.place import Place
from dmax_kernels.gsm.recipe import LOG, run_recipe
from dmax_kernels.gsm.rows import ROWS
from dmax_kernels.gsm.stages import Recipe


def run(options: dict[str, Any], output: Path, threads: int) -> int:
    scale, base_scale = (options.get(name, 1.0) for name in ("scale", "base_scale"))
    for name, value in (("--scale", scale), ("--base-scale", base_scale)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value:g}")
    workers = options.get("workers", 1)
    paths = options.get("data") or []
    if len(paths) != 1:
        raise ValueError(
            "--data must be the one file that `python -m dmax_kernels.gsm.problems` wrote, got "
            f"{len(paths)} files"
        )
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where torch finds no GPU, got cuda")
    more, base = options.get("base_steps", 0), options.get("base")
    if more < 0 or (more and base is None):
        raise ValueError(f"--base-steps must be at least 0, and need --base, got {more}")
    recipe = Recipe().small() if options.get("small") else Recipe()
    plan = recipe if base is None else recipe.continued(more)
    place = Place(
        paths[0],
        output,
        options.get("export", output),
        device,
        options.get("ops", "reference"),
        plan.scaled(scale * base_scale, scale),
        base,
    )
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value[0] if name == "data" else value))
    command = " ".join(("python -m dmax_kernels train", *words))
    run_recipe(place, workers=workers, threads=threads, command=command)
    print(f"wrote the models, {LOG} and {ROWS} into {place.export}")
    return 0
