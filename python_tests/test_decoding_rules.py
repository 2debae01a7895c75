"""Every rule against plain Python written from the paper and from the released code's behaviour.

A scripted model plays random logits back, so that rule and loop are tested apart from any network.
"""

import math

import pytest
import torch
from decoding_models import MASK, ScriptedModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dmax_kernels.decoding import RULES, LiveBlocks, RunConfig, Seen, spd_generate
from dmax_kernels.decoding.rules import ABLATIONS

K, V, STEPS = 6, MASK + 1, 12
OPS = ["reference", "fused"]


pytestmark = pytest.mark.usefixtures("one_thread")


def random_script(seed, rows=1):
    """Logits [STEPS, rows, K, V] of a decoding that settles: noise that fades over a fixed answer.

    Sharpness differs by position and grows with time, so confidences cross every threshold, blocks
    converge by either criterion, and some positions are revised on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(0, V, (rows, K), generator=generator)
    noise = torch.randn(STEPS, rows, K, V, generator=generator)
    # Rows settle at different steps; within a row some positions stay less sure than tau_acc
    settled = torch.randint(2, 6, (rows, 1, 1), generator=generator)
    progress = (torch.arange(1, STEPS + 1).view(-1, 1, 1, 1) / settled).clamp(max=1)
    sharpness = 3 + 9 * torch.rand(rows, K, 1, generator=generator)
    return progress * sharpness * F.one_hot(answer, V) + (1.2 - progress) * noise


def most_likely(logits, suppress):
    """Token and probability of one position, written out in float64; ties go to the lowest id."""
    values = logits.double().tolist()
    if suppress is not None:
        values[suppress] = -math.inf
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    return best, 1 / math.fsum(math.exp(x - values[best]) for x in values)


def confident_prefix(masked, passes):
    """Masked positions up to the first that does not pass; the leftmost if that is none."""
    prefix = []
    for j in sorted(masked):
        if not passes(j):
            break
        prefix.append(j)
    return set(prefix or sorted(masked)[:1])


def paper_algorithm_1(
    script, editable, tau_dec, tau_acc, rule, convergence="both", semantics="settled"
):
    """Algorithm 1 and its ablations on script [STEPS, K, V]. Returns tokens and steps taken."""
    masked, decoded, previous = set(editable), {}, None
    for step in range(K):
        undecided = semantics == "settled" and bool(masked)
        top = {j: most_likely(script[step, j], MASK) for j in editable}
        if rule == "threshold":
            top = {j: decoded.get(j, top[j]) for j in editable}
        passing = {j for j in masked if top[j][1] > tau_dec}
        if rule in ("spd", "hard_prefix"):
            promoted = confident_prefix(masked, passing.__contains__)
        else:
            promoted = passing or set(sorted(masked, key=lambda j: -top[j][1])[:1])
        masked -= promoted
        decoded.update({j: top[j] for j in promoted})
        tokens = {j: top[j][0] for j in editable}
        same = tokens == previous and not undecided
        sure = min(top[j][1] for j in editable) > tau_acc
        if rule == "threshold":
            done = not masked
        else:
            done = {"both": same or sure, "consistency": same, "confidence": sure}[convergence]
        if done:
            return tokens, step + 1
        previous = tokens
    return tokens, K


def released_decode_uniform(script, editable, tau_dec, tau_acc):
    """What the authors' released step does to one row's ids: rows 1-6 of its known differences.

    Promotion and acceptance include equality; the mask token may be predicted; only promoted and
    already decoded positions are written; the block stops when every confidence is accepted or when
    nothing that was written changed, and stays as it is then.
    """
    ids = dict.fromkeys(editable, MASK)
    for step in range(K):
        top = {j: most_likely(script[step, j], None) for j in editable}
        masked = {j for j in editable if ids[j] == MASK}
        written = {j for j in editable if ids[j] != MASK}
        written |= confident_prefix(masked, lambda j, top=top: top[j][1] >= tau_dec)
        changed = [j for j in written if top[j][0] != ids[j]]
        for j in written:
            ids[j] = top[j][0]
        if not changed or all(top[j][1] >= tau_acc for j in editable):
            return ids, step + 1
    return ids, K


def play(script, prompt_length, **arguments):
    """One block, prompt_length tokens of it prompt, on script [STEPS, rows, K, V]."""
    model = ScriptedModel(script, eos_token_id=None)
    prompts = torch.arange(2, 2 + script.shape[1])[:, None].repeat(1, prompt_length)
    output = spd_generate(
        model,
        prompts,
        block_length=K,
        max_new_tokens=K - prompt_length,
        use_cache=False,
        **arguments,
    )
    return output, model


# Each threshold above the other once: the semantics differ most where tau_dec is above tau_acc
TAUS = [(0.95, 0.9), (0.5, 0.9), (0.0, 0.9), (0.5, 0.3)]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(("tau_dec", "tau_acc"), TAUS)
@pytest.mark.parametrize("rule", ABLATIONS)
@pytest.mark.parametrize("semantics", ["settled", "paper"])
def test_rule_is_the_papers(semantics, rule, tau_dec, tau_acc, ops):
    for seed in range(15):
        script = random_script(seed, rows=2)
        prompt_length = 1 + seed % 3
        arguments = {"tau_dec": tau_dec, "tau_acc": tau_acc, "rule": rule, "semantics": semantics}
        output, _ = play(script, prompt_length, ops=ops, **arguments)
        for row in range(2):
            editable = range(prompt_length, K)
            tokens, steps = paper_algorithm_1(script[:, row], editable, **arguments)
            assert output.sequences[row, prompt_length:].tolist() == [tokens[j] for j in editable]
            assert output.num_forwards[row] == steps


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("convergence", ["consistency", "confidence"])
@pytest.mark.parametrize("rule", ["spd", "hybrid", "hard"])
@pytest.mark.parametrize("semantics", ["settled", "paper"])
def test_convergence_criteria_apart(semantics, rule, convergence, ops):
    for seed in range(15):
        script = random_script(seed)
        arguments = {
            "tau_dec": 0.5,
            "tau_acc": 0.4,
            "rule": rule,
            "convergence": convergence,
            "semantics": semantics,
        }
        output, _ = play(script, 1, ops=ops, **arguments)
        tokens, steps = paper_algorithm_1(script[:, 0], range(1, K), **arguments)
        assert output.sequences[0, 1:].tolist() == [tokens[j] for j in range(1, K)]
        assert output.num_forwards[0] == steps


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(("tau_dec", "tau_acc"), TAUS)
def test_released_semantics_gives_the_ids_of_the_released_step(tau_dec, tau_acc, ops):
    left_masks = 0
    for seed in range(40):
        script = random_script(seed, rows=2)
        if seed % 4 == 0:  # the released code does not guard against predicting the mask token
            script[:3, :, 1 + seed % 5, MASK] += 15
        prompt_length = 1 + seed % 3
        editable = range(prompt_length, K)
        output, _ = play(
            script,
            prompt_length,
            tau_dec=tau_dec,
            tau_acc=tau_acc,
            semantics="released",
            suppress_mask=False,
            ops=ops,
        )
        for row in range(2):
            ids, steps = released_decode_uniform(script[:, row], editable, tau_dec, tau_acc)
            assert output.sequences[row, prompt_length:].tolist() == [ids[j] for j in editable]
            assert output.num_forwards[row] == steps
            left_masks += MASK in ids.values()
    assert left_masks > 0 or (tau_dec, tau_acc) == (0.0, 0.9)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("rule", ABLATIONS)
def test_the_next_pass_reads_eqs_7_to_10(rule, ops):
    """Mask embeddings where masked, the rule's embedding elsewhere, frozen once converged."""
    script = random_script(3, rows=4)
    output, model = play(script, 2, rule=rule, tau_dec=0.5, ops=ops, trace=True)
    words = model.words.weight.double()
    rows = output.trace.to_dict()["rows"]
    assert len(set(output.num_forwards.tolist())) > 1
    for row, traced in enumerate(rows):
        steps = traced["blocks"][0]["steps"]
        for n, step in enumerate(steps[:-1]):
            confidence = [most_likely(script[n, row, j], MASK)[1] for j in range(K)]
            for j in range(K):
                e = words[step["token"][j]]
                if step["masked"][j]:
                    expected = words[MASK]
                elif j >= 2 and ABLATIONS[rule].soft:
                    p = confidence[j]
                    mix = p * e + (1 - p) * words[MASK]
                    expected = mix / mix.norm() * (p * e.norm() + (1 - p) * words[MASK].norm())
                else:
                    expected = e
                torch.testing.assert_close(
                    model.inputs[n + 1][row][j].double(), expected, rtol=1e-5, atol=1e-6
                )
        seen = [inputs[row] for inputs in model.inputs[len(steps) :] if row in inputs]
        for inputs in seen:  # a frozen row's inputs no longer change
            assert torch.equal(inputs, seen[0])


def random_state(seed, rows=3, length=K, hidden=5, taus=(0.5, 0.9), rule="spd"):
    """A state in the middle of a block, with a converged row now and then, and its logits."""
    generator = torch.Generator().manual_seed(seed)

    def flip(probability, *shape):
        return torch.rand(shape, generator=generator) < probability

    embedding = torch.randn(V, hidden, generator=generator)
    editable = flip(0.8, rows, length)
    logits = 4 * torch.randn(rows, length, V, generator=generator)
    # Half of the positions repeat their token, and in some rows all do: the consistency criterion
    token = torch.where(
        flip(0.5, rows, length) | flip(0.4, rows, 1),
        logits[..., :MASK].argmax(dim=-1),
        torch.randint(0, MASK, (rows, length), generator=generator),
    )
    state = LiveBlocks(
        editable=editable,
        masked=editable & flip(0.5, rows, length),
        token=token,
        confidence=torch.rand(rows, length, generator=generator),
        converged=flip(0.2, rows),
        step=torch.randint(0, 3, (rows,), generator=generator, dtype=torch.int32),
        inputs_embeds=torch.randn(rows, length, hidden, generator=generator),
        row=torch.arange(rows),
        start=torch.zeros(rows, dtype=torch.int64),
        thresholds=torch.tensor([taus]).repeat(rows, 1),
        memory=RULES[rule].memory(rows, run_config(block_length=length), torch.device("cpu")),
    )
    state.editable[:, -1] = True  # a block that decodes nothing never reaches a step
    return state, logits, embedding


def run_config(**changes):
    fields = {
        "max_new_tokens": K,
        "block_length": K,
        "mask_token_id": MASK,
        "eos_token_id": (),
        "pad_token_id": 0,
        "max_steps_per_block": K,
        "ops": "reference",
    }
    return RunConfig(**{**fields, **changes})


def copy_state(state):
    return state.map(torch.clone)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 0.5, 0.95]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["settled", "paper"]),
)
def test_composed_ops_are_the_spd_step(seed, tau, top_k, semantics):
    """The ablations' step with nothing ablated is `spd_step_`."""
    expected, logits, embedding = random_state(seed, taus=(tau, 0.3 + tau / 2))
    actual = copy_state(expected)
    config = run_config(top_k=top_k, semantics=semantics)
    RULES["spd"].update_(logits, embedding, expected, config)
    ABLATIONS["spd"].update_(logits, embedding, actual, config)
    for name, buffer in expected.buffers():
        same = dict(actual.buffers())[name]
        torch.testing.assert_close(same, buffer, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(RULES)),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.sampled_from(["settled", "paper"]),
)
def test_a_step_keeps_its_promises(seed, rule, tau, semantics):
    before, logits, embedding = random_state(seed, taus=(tau, 0.9), rule=rule)
    state = copy_state(before)
    RULES[rule].update_(logits, embedding, state, run_config(semantics=semantics))
    for row in range(len(state.converged)):
        if before.converged[row]:  # frozen: not one bit of the row changes
            for (name, buffer), (_, now) in zip(before.buffers(), state.buffers(), strict=True):
                assert torch.equal(now[row], buffer[row]), name
            continue
        assert state.step[row] == before.step[row] + 1
        masked, left = before.masked[row], state.masked[row]
        promoted = masked & ~left
        assert not (left & ~masked).any()  # no token position goes back to the mask
        assert promoted.any() or not masked.any()
        assert not (left.any() and state.converged[row])
        if rule in ABLATIONS and not state.converged[row] and promoted.sum() > 1:
            assert (state.confidence[row][promoted] > tau).all()
        assert torch.equal(
            state.token[row][~state.editable[row]],
            before.token[row][~state.editable[row]],
        )
        if rule != "spd" and not RULES[rule].revise:
            decoded = before.editable[row] & ~masked
            assert torch.equal(state.token[row][decoded], before.token[row][decoded])
        assert (state.token[row][state.editable[row]] != MASK).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 0.5, 0.9, 1.0, math.nan])),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_threshold_promotes_the_confident_or_the_best(positions, threshold):
    masked, confidence = (torch.tensor(column)[None] for column in zip(*positions, strict=True))
    seen = Seen(masked, confidence=confidence, tau_dec=threshold)
    promoted = ABLATIONS["threshold"].promote(seen)[0].tolist()
    above = [m and c > threshold for m, c in positions]
    if any(above):
        assert promoted == above
    elif any(m for m, _ in positions):
        ranks = [(-2 if not m else -1 if math.isnan(c) else c) for m, c in positions]
        assert promoted == [j == ranks.index(max(ranks)) for j in range(len(ranks))]
    else:
        assert not any(promoted)
