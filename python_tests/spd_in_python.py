"""Soft Parallel Decoding in plain Python: what spd_step_ is compared with."""

import torch

from dmax_kernels import reference


def algorithm_1(p, tau_dec, tau_acc):
    """(y, M, converged) of each turn of the loop; p[t][j] lists the probabilities at position j."""
    B = range(len(p[0]))
    M, T = set(B), set()  # line 1
    y_before = None
    for p_t in p:  # lines 2 and 3
        y = [max(range(len(p_t[j])), key=p_t[j].__getitem__) for j in B]  # line 4
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


def step_of_positions(state, y, c, embedding, mask_token_id, tau_dec, tau_acc, semantics):
    """One step with k = 1 from section 3 of the paper, position by position."""
    released = semantics == "released"
    state = {name: tensor.clone() for name, tensor in state.items()}
    for b in range(y.shape[0]):
        if state["converged"][b]:
            continue
        positions = range(y.shape[1])
        editable = state["editable"][b].tolist()
        masked = state["masked"][b].tolist()
        token = state["token"][b].tolist()
        passes = (lambda p, tau: p >= tau) if released else (lambda p, tau: p > tau)
        promoted = []
        for j in (j for j in positions if masked[j]):
            if not passes(c[b, j], tau_dec):
                break
            promoted.append(j)
        promoted = promoted or [j for j in positions if masked[j]][:1]
        confident = all(passes(c[b, j], tau_acc) for j in positions if editable[j])
        if released:
            updated = [j for j in positions if j in promoted or (editable[j] and not masked[j])]
            consistent = all(y[b, j] == token[j] for j in updated)
        else:
            updated = [j for j in positions if editable[j]]
            decides = semantics == "paper" or not any(masked)
            consistent = (
                state["step"][b] >= 1 and decides and all(y[b, j] == token[j] for j in updated)
            )
        converged = bool(confident or consistent or not any(editable))
        for j in updated:
            token[j] = int(y[b, j])
        for j in positions:
            if released:
                masked[j] = editable[j] and token[j] == mask_token_id
            else:
                masked[j] = masked[j] and j not in promoted and not converged
            if editable[j]:
                state["confidence"][b, j] = c[b, j]
        state["token"][b] = torch.tensor(token)
        state["masked"][b] = torch.tensor(masked)
        state["converged"][b] = converged
        state["step"][b] += 1
        if released and converged and any(editable):
            continue
        for j in positions:
            if masked[j]:
                embed = embedding[mask_token_id]
            elif editable[j]:
                embed = reference.hybrid_embedding(
                    embedding, y[b, j], c[b, j], torch.tensor(False), mask_token_id
                )
            else:
                embed = embedding[token[j]]
            state["inputs_embeds"][b, j] = embed
    return state
