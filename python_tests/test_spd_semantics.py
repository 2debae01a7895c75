"""The three `semantics` of spd_step_ on every backend, and "paper" against Algorithm 1 itself."""

import pytest
import torch
from fuzzing import BACKENDS, on

from dmax_kernels import reference

VOCAB, DIM, MASK, STEPS = 9, 8, 8, 9
# Name -> the functions, their device, how many blocks of each length they decode
IMPLEMENTATIONS = {
    "reference": (reference, "cpu", 200),
    "cpu": (*BACKENDS["cpu"][:2], 200),
    "cuda, emulated": (*BACKENDS["cuda, emulated"][:2], 100),
    "triton": (*BACKENDS["triton"][:2], 8),  # its interpreter takes milliseconds per position
    "cuda": (*BACKENDS["cuda"][:2], 200),
}
EVERYWHERE = pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=[pytest.mark.gpu] * (name == "cuda")) for name in IMPLEMENTATIONS],
)


class Blocks:
    """Fully masked blocks [rows, length], stepped by one implementation."""

    def __init__(self, implementation, rows, length, **options):
        functions, self.device, _ = IMPLEMENTATIONS[implementation]
        self.step_, self.options = functions.spd_step_, options
        embedding = torch.randn(VOCAB, DIM, generator=torch.manual_seed(1))
        self.embedding = on(self.device, embedding)
        state = {
            "editable": torch.ones(rows, length, dtype=torch.bool),
            "masked": torch.ones(rows, length, dtype=torch.bool),
            "token": torch.full((rows, length), MASK),
            "confidence": torch.zeros(rows, length),
            "converged": torch.zeros(rows, dtype=torch.bool),
            "step": torch.zeros(rows, dtype=torch.int32),
            "inputs_embeds": embedding[MASK].expand(rows, length, DIM).clone(),
        }
        self.state = {name: on(self.device, tensor) for name, tensor in state.items()}

    def step(self, logits):
        """The state after a step, without its embeddings, as lists."""
        self.step_(
            on(self.device, logits),
            self.embedding,
            **self.state,
            mask_token_id=MASK,
            **self.options,
        )
        names = ("masked", "token", "converged", "step")
        return {name: self.state[name].tolist() for name in names}


def logits_of(token, probability):
    """[B, K, V] with that probability of the token, and the rest shared by the others."""
    odds = probability * (VOCAB - 1) / (1 - probability)
    return torch.zeros(*token.shape, VOCAB).scatter(
        -1, token.unsqueeze(-1), odds.log().unsqueeze(-1)
    )


# ---- Algorithm 1, line by line ----


def algorithm_1(p, tau_dec, tau_acc):
    """(y, M, converged) of each turn of the loop; p[t][j] lists the probabilities at position j."""
    B = range(len(p[0]))
    M, T = set(B), set()  # line 1
    y_before = None
    for p_t in p:  # lines 2 and 3
        y = [max(range(VOCAB), key=p_t[j].__getitem__) for j in B]  # line 4
        c = [p_t[j][y[j]] for j in B]
        P = set()  # line 5
        for j in sorted(M):
            if not c[j] > tau_dec:
                break
            P.add(j)
        if not P:  # lines 6 to 8
            P = set(sorted(M)[:1])
        T |= P  # line 9
        M = set(B) - T
        converged = y == y_before or min(c) > tau_acc  # line 12
        yield y, M, converged
        if converged:
            return
        y_before = y


def random_script(rows, length, seed):
    """Logits [STEPS, B, K, V] over the words without the mask, some blocks steady, some not."""
    generator = torch.manual_seed(seed)
    shape = (STEPS, rows, length)
    steady = torch.rand(rows, 1, generator=generator) ** 0.125
    kept = torch.rand(shape, generator=generator) < steady
    answer = torch.randint(0, MASK, (rows, length), generator=generator)
    token = torch.where(kept, answer, torch.randint(0, MASK, shape, generator=generator))
    certainty = torch.rand(STEPS, rows, 1, generator=generator)
    probability = 0.2 + 0.79 * (certainty + torch.rand(shape, generator=generator)) / 2
    return torch.stack([logits_of(*step) for step in zip(token, probability, strict=True)])


@EVERYWHERE
@pytest.mark.parametrize("tau_dec", [0.95, 0.7, 0.0])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_paper_is_algorithm_1_to_the_letter(implementation, length, tau_dec):
    rows, tau_acc = IMPLEMENTATIONS[implementation][2], 0.8
    script = random_script(rows, length, seed=length)
    p = script.double().softmax(dim=-1)
    top = p.amax(dim=-1)
    assert (
        min((top - tau).abs().min() for tau in (tau_dec, tau_acc)) > 1e-6
    )  # rounding decides none
    loops = [algorithm_1(p[:, b].tolist(), tau_dec, tau_acc) for b in range(rows)]
    blocks = Blocks(
        implementation, rows, length, semantics="paper", tau_dec=tau_dec, tau_acc=tau_acc
    )
    final, ended_with_masks = {}, 0
    for t, logits in enumerate(script):
        after = blocks.step(logits)
        for b in range(rows):
            if b not in final:
                y, masked, converged = next(loops[b])
                ended_with_masks += converged and bool(masked)
                masked = set() if converged else masked  # line 13 commits every position
                expected = (y, [j in masked for j in range(length)], converged, t + 1)
            else:
                expected = final[b]
            assert (
                tuple(after[name][b] for name in ("token", "masked", "converged", "step"))
                == expected
            )
            if expected[2]:
                final[b] = expected
    assert len(final) >= rows / 2
    if length == 6 and tau_dec == 0.95:  # where the letter matters
        assert ended_with_masks >= rows / 4


# ---- Where the three differ ----

# Predictions at three positions, all with one confidence; the states after each step
UNSURE = [[5, 6, 7], [5, 6, 7], [4, 6, 7], [4, 6, 3], [4, 6, 3]]
M = MASK
BY_HAND = {
    # Both predictions at masks repeat in the second step: that ends the block
    "paper": [([5, 6, 7], 2, False), ([5, 6, 7], 0, True)],
    # The second step starts with masks, the third and the fourth change a token
    "settled": [
        ([5, 6, 7], 2, False), ([5, 6, 7], 1, False), ([4, 6, 7], 0, False), ([4, 6, 3], 0, False),
        ([4, 6, 3], 0, True),
    ],
    # As settled, but a position has no token before it is promoted
    "released": [
        ([5, M, M], 2, False), ([5, 6, M], 1, False), ([4, 6, 7], 0, False), ([4, 6, 3], 0, False),
        ([4, 6, 3], 0, True),
    ],
}  # fmt: skip


@EVERYWHERE
@pytest.mark.parametrize("semantics", BY_HAND)
def test_the_three_by_hand(implementation, semantics):
    blocks = Blocks(implementation, 1, 3, semantics=semantics, tau_dec=0.9, tau_acc=0.95)
    expected = BY_HAND[semantics]
    for step, y in enumerate(UNSURE):
        after = blocks.step(logits_of(torch.tensor([y]), torch.full((1, 3), 0.6)))
        tokens, masks, converged = expected[min(step, len(expected) - 1)]
        assert after["token"] == [tokens]
        assert sum(after["masked"][0]) == masks
        assert after["converged"] == [converged]
        assert after["step"] == [min(step + 1, len(expected))]


@EVERYWHERE
@pytest.mark.parametrize(
    ("semantics", "tokens"), [("paper", [5, 6, 7]), ("settled", [5, 6, 7]), ("released", [5, M, M])]
)
def test_acceptance_below_tau_dec_leaves_masks_only_if_released(implementation, semantics, tokens):
    blocks = Blocks(implementation, 1, 3, semantics=semantics, tau_dec=0.95, tau_acc=0.8)
    after = blocks.step(logits_of(torch.tensor([[5, 6, 7]]), torch.full((1, 3), 0.9)))
    assert after["token"] == [tokens]
    assert after["masked"] == [[token == MASK for token in tokens]]
    assert after["converged"] == [True]
