"""Which models have layers that do not attend to all positions."""

from __future__ import annotations

from typing import Any


def attention_window(model_config: Any) -> int | None:
    """The fewest positions that any layer attends to; None if every layer attends to all.

    transformers builds windows into the masks that it makes itself, and passes a 4-D mask to every
    layer as it is. Under such a mask a sequence longer than the window would get full attention.
    """
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    layer_types = getattr(model_config, "layer_types", None)
    windows = []
    for option, layer_type in (
        ("sliding_window", "sliding_attention"),
        ("attention_chunk_size", "chunked_attention"),
    ):
        window = getattr(model_config, option, None)
        # Qwen2's config of transformers 4.51, and LLaDA2's, name a window that this turns off
        if option == "sliding_window" and not getattr(model_config, "use_sliding_window", True):
            continue
        # Configs without layer_types (Mistral, Phi3) mean every layer
        if window is not None and (layer_types is None or layer_type in layer_types):
            windows.append(window)
    return min(windows, default=None)
