"""Blocks in the middle of decoding, for the tests of edit_step_."""

import torch

EDIT_OPTIONS = {
    "mask_token_id": 39,
    "threshold": 0.3,
    "edit_threshold": 0.2,
    "tokens_per_step": 2,
    "max_post_edit_steps": 1,
}


def new_state(token, editable):
    batch = len(token)
    return {
        "editable": editable,
        "token": token,
        "prediction": torch.full(token.shape, -7),
        "confidence": torch.full(token.shape, -7.0),
        "post_edit_steps": torch.zeros(batch, dtype=torch.int32),
        "done": torch.zeros(batch, dtype=torch.bool),
    }


def edit_case(batch, block, vocab=40, dtype=torch.float32, seed=0, mask_token_id=39):
    """Logits, and rows with prompts, masks and tokens: the second has no mask, the third is done.

    One to eight ids of a position share its mass, and the others have next to none: a probability
    of 1, 1/2, 1/4 or 1/8 is the same to the last bit on every backend, and so is every decision.
    """
    generator = torch.manual_seed(seed)

    def random(*shape):
        return torch.rand(batch, block, *shape, generator=generator)

    token = torch.randint(0, vocab, (batch, block), generator=generator)
    token[token == mask_token_id] = 0
    masked = random() < 0.6
    if batch > 1:
        masked[1] = False
    token[masked] = mask_token_id
    state = new_state(token, random() < 0.85)
    state["done"][2:3] = True
    logits = 3 * torch.randn(batch, block, vocab, generator=generator) - 80
    first = (random(1) * max(vocab - 8, 1)).long()
    sharing = 2 ** (4 * random(1)).long()
    stride = ((vocab - first) // 8).clamp(min=1)  # over all tiles of the vocabulary
    ids = (first + stride * torch.arange(8).minimum(sharing - 1)).clamp(max=vocab - 1)
    return logits.scatter(-1, ids, 0.0).to(dtype), state


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}
