"""Checks of arguments, word for word those of csrc/ops/*.h (a test compares them)."""

import math

import torch
from torch import Tensor

MAX_TOP_K = 8
LEAST_TEMPERATURE = 1e-30  # below it, logits / temperature leaves float32's range
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMED = (
    *_FLOATS,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in _NAMED else "an unsupported dtype"


def check_float(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in _FLOATS,
        f"{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(t.dtype)}",
    )


def check_dtype(op: str, name: str, t: Tensor, need: torch.dtype) -> None:
    check(t.dtype == need, f"{op}: {name} must be {dtype_name(need)}, got {dtype_name(t.dtype)}")


def check_integer(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in (torch.int64, torch.int32),
        f"{op}: {name} must be int64 or int32, got {dtype_name(t.dtype)}",
    )


def check_shape(op: str, name: str, t: Tensor, need: list[int] | torch.Size, meaning: str) -> None:
    check(
        list(t.shape) == list(need),
        f"{op}: {name} must have shape {list(need)} ({meaning}), got {list(t.shape)}",
    )


def _device_name(t: Tensor) -> str:
    index = -1 if t.device.index is None else t.device.index
    return f"{'cuda' if t.is_cuda else 'cpu'}:{index}"


def check_same_device(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    check(
        t.device == like.device,
        f"{op}: {name} must be on the same device as {like_name}, "
        f"got {_device_name(t)} and {_device_name(like)}",
    )


def check_contiguous(op: str, name: str, t: Tensor) -> None:
    check(
        t.is_contiguous(),
        f"{op}: {name} is written in place and must be contiguous, "
        f"got strides {list(t.stride())} for shape {list(t.shape)}",
    )


def check_logits(op: str, name: str, logits: Tensor) -> int:
    """Logits [..., V] with V >= 1; returns V."""
    check_float(op, name, logits)
    check(logits.dim() >= 1, f"{op}: {name} must be [..., V], got a 0-D tensor")
    check(
        logits.shape[-1] >= 1,
        f"{op}: {name} must be [..., V] with V >= 1, got {list(logits.shape)}",
    )
    return logits.shape[-1]


def check_temperature(op: str, temperature: float) -> None:
    check(
        temperature >= LEAST_TEMPERATURE and math.isfinite(temperature),
        f"{op}: temperature must be at least 1e-30 and finite, got {temperature:g}",
    )


def check_suppress_token(op: str, suppress_token: int, vocab: int) -> None:
    check(
        -1 <= suppress_token < vocab,
        f"{op}: suppress_token must be -1 (none) or a token id below {vocab}, got {suppress_token}",
    )


def check_shard(
    op: str, logits_shard: Tensor, vocab_start: int, temperature: float, suppress_token: int
) -> tuple[int, int]:
    """The shard's V, and suppress_token's place on it (-1 where it lies elsewhere)."""
    vocab = check_logits(op, "logits_shard", logits_shard)
    check(
        vocab_start >= 0,
        f"{op}: vocab_start must be the id of the shard's first token, got {vocab_start}",
    )
    check_temperature(op, temperature)
    check(
        suppress_token >= -1,
        f"{op}: suppress_token must be -1 (none) or a token id of the whole vocabulary, "
        f"got {suppress_token}",
    )
    local = suppress_token - vocab_start
    return vocab, local if suppress_token >= 0 and 0 <= local < vocab else -1


def check_shard_results(
    op: str, maximum: Tensor, temperature: float, **others: Tensor
) -> tuple[int, torch.Size]:
    """[S, ...] each, ids int64 and the rest float32; returns S and the shape behind it."""
    check_dtype(op, "maximum", maximum, torch.float32)
    for name, t in others.items():
        check_dtype(op, name, t, torch.int64 if name == "token" else torch.float32)
    check(
        maximum.dim() >= 1 and maximum.shape[0] >= 1,
        f"{op}: maximum must be [S, ...] with S >= 1 shards, got {list(maximum.shape)}",
    )
    for name, t in others.items():
        check_shape(op, name, t, maximum.shape, "that of maximum")
        check_same_device(op, name, t, "maximum", maximum)
    check_temperature(op, temperature)
    return maximum.shape[0], maximum.shape[1:]


def check_mask_token_id(op: str, mask_token_id: int, vocab: int) -> None:
    check(
        0 <= mask_token_id < vocab,
        f"{op}: mask_token_id must be a token id in [0, {vocab}), got {mask_token_id}",
    )


def check_threshold(op: str, name: str, threshold: float) -> None:
    check(not math.isnan(threshold), f"{op}: {name} must be a number, got NaN")


def check_top_k(op: str, name: str, k: int, vocab: int) -> None:
    check(
        1 <= k <= min(MAX_TOP_K, vocab),
        f"{op}: {name} must be in 1..{min(vocab, MAX_TOP_K)} "
        f"(at most {MAX_TOP_K} and at most V), got {k}",
    )


def check_seed(op: str, logits: Tensor, seed: Tensor, logits_name: str = "logits") -> bool:
    """True where the seed tensor holds one (seed, offset) per row."""
    check_dtype(op, "seed", seed, torch.int64)
    check_same_device(op, "seed", seed, logits_name, logits)
    per_row = seed.dim() != 1
    need = [*logits.shape[:-1], 2] if per_row else [2]
    check_shape(op, "seed", seed, need, "one (seed, offset), or one per row")
    return per_row


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_name: str = "hidden"
) -> int:
    """hidden [..., D], weight [V, D], bias [V]; returns V."""
    check_float(op, hidden_name, hidden)
    check(
        weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] >= 1,
        f"{op}: weight must be [V, D] with V, D >= 1, got {list(weight.shape)}",
    )
    check_dtype(op, "weight", weight, hidden.dtype)
    check(
        hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1],
        f"{op}: {hidden_name} must be [..., D] with D = {weight.shape[1]} as in weight, "
        f"got {list(hidden.shape)}",
    )
    check_same_device(op, "weight", weight, hidden_name, hidden)
    if bias is not None:
        check_dtype(op, "bias", bias, hidden.dtype)
        check_shape(op, "bias", bias, weight.shape[:1], "one per token")
        check_same_device(op, "bias", bias, hidden_name, hidden)
    return weight.shape[0]


def check_hybrid_embedding(
    embedding: Tensor, token: Tensor, confidence: Tensor, masked: Tensor, mask_token_id: int
) -> int:
    """Returns k, the tokens per position."""
    op = "hybrid_embedding"
    check_float(op, "embedding", embedding)
    check(
        embedding.dim() == 2 and embedding.shape[0] >= 1 and embedding.shape[1] >= 1,
        f"{op}: embedding must be [V, D] with V, D >= 1, got {list(embedding.shape)}",
    )
    check_integer(op, "token", token)
    check_dtype(op, "confidence", confidence, torch.float32)
    check_dtype(op, "masked", masked, torch.bool)
    top_1 = token.dim() == masked.dim()
    need = list(masked.shape)
    if not top_1:
        need.append(token.shape[-1] if token.dim() > 0 else 1)
    check_shape(op, "token", token, need, "masked's shape, or that with k tokens behind")
    check_shape(op, "confidence", confidence, token.shape, "that of token")
    check_mask_token_id(op, mask_token_id, embedding.shape[0])
    for name, t in (("token", token), ("confidence", confidence), ("masked", masked)):
        check_same_device(op, name, t, "embedding", embedding)
    k = 1 if top_1 else need[-1]
    check(
        1 <= k <= MAX_TOP_K,
        f"{op}: token must hold 1..{MAX_TOP_K} tokens per position, got {k}",
    )
    return k


def check_loss_options(op: str, label_smoothing: float, z_loss: float) -> None:
    check(
        0 <= label_smoothing <= 1,
        f"{op}: label_smoothing must be in [0, 1], got {label_smoothing:g}",
    )
    check(
        z_loss >= 0 and math.isfinite(z_loss),
        f"{op}: z_loss must be zero or positive and finite, got {z_loss:g}",
    )


def check_target(
    op: str,
    target: Tensor,
    logits_name: str,
    logits: Tensor,
    meaning: str = "one token per row of logits",
) -> None:
    check_integer(op, "target", target)
    check_shape(op, "target", target, logits.shape[:-1], meaning)
    check_same_device(op, "target", target, logits_name, logits)


def check_oput_loss(
    op: str,
    logits_masked: Tensor | None,
    logits_predicted: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> None:
    check(
        logits_masked is not None or logits_predicted is not None,
        f"{op}: logits_masked or logits_predicted must be given, got neither",
    )
    both = logits_masked is not None and logits_predicted is not None
    first_name = "logits_masked" if logits_masked is not None else "logits_predicted"
    first = logits_masked if logits_masked is not None else logits_predicted
    check_logits(op, first_name, first)
    if both:
        check_logits(op, "logits_predicted", logits_predicted)
        check_shape(op, "logits_predicted", logits_predicted, first.shape, "that of logits_masked")
        check_dtype(op, "logits_predicted", logits_predicted, first.dtype)
        check_same_device(op, "logits_predicted", logits_predicted, "logits_masked", first)
    check_target(op, target, first_name, first)
    check_loss_options(op, label_smoothing, z_loss)


def check_like_target(op: str, name: str, t: Tensor, target: Tensor) -> None:
    check_dtype(op, name, t, torch.float32)
    check_shape(op, name, t, target.shape, "that of target")


def check_linear_oput_loss(
    op: str,
    hidden_masked: Tensor | None,
    hidden_predicted: Tensor | None,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> int:
    """Returns V."""
    check(
        hidden_masked is not None or hidden_predicted is not None,
        f"{op}: hidden_masked or hidden_predicted must be given, got neither",
    )
    first_name = "hidden_masked" if hidden_masked is not None else "hidden_predicted"
    first = hidden_masked if hidden_masked is not None else hidden_predicted
    vocab = check_linear(op, first, weight, bias, first_name)
    if hidden_masked is not None and hidden_predicted is not None:
        check_dtype(op, "hidden_predicted", hidden_predicted, first.dtype)
        check_shape(op, "hidden_predicted", hidden_predicted, first.shape, "that of hidden_masked")
        check_same_device(op, "hidden_predicted", hidden_predicted, "hidden_masked", first)
    check_target(op, target, first_name, first, "one token per row of hidden states")
    check_loss_options(op, label_smoothing, z_loss)
    return vocab
