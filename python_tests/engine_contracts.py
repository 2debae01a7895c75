"""What the adapters override in engines that are repositories and not packages, as it was read.

Each is the engine's own parameters, `self` left out, at the commit. A newer commit is compared with
these by hand; the tests hold the adapters to them.
"""

DINFER = {
    "repository": "czg1225/DMax",
    "commit": "82bc29e",
    "methods": {
        "ThresholdParallelDecoder.decode_uniform": (
            "logits",
            "block_start",
            "block_end",
            "x",
            "active_index",
            "embedding_layer",
            "prev_embeddings",
            "iter_threshold",
            "top_k",
        ),
    },
}

DIFFULEX = {
    "repository": "SJTU-DENG-Lab/Diffulex",
    "commit": "184ba97",
    "methods": {
        "LLaDA2DMaxSampler._build_block_writes_map": (
            "reqs",
            "split_logits",
            "temperatures",
            "sample_output",
            "attn_metadata",
            "kwargs",
        ),
        "LLaDA2DMaxSampler._build_dmax_block_outputs": (
            "block",
            "block_tokens",
            "block_logits",
            "temperature",
        ),
    },
}
