"""bench/sass.py and bench/kernels.py on machine code written for the test; nvcc is not needed."""

import pytest

from bench import kernels, sass

VECTOR = ["LDG.E.128 R4, desc[UR4][R2.64]"]
WEIGH = ["MUFU.EX2 R6, R5", "FADD R7, R6, R7"]


def code(lines):
    """Instructions 16 bytes apart; `name:` marks the next one, which a branch then names."""
    places, plain = {}, []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(plain)
        else:
            plain.append(line)
    texts = [
        " ".join(hex(places[word]) if word in places else word for word in line.split())
        for line in plain
    ]
    return [sass.parse(16 * index, text) for index, text in enumerate(texts)]


def a_loop(slow_way=(), after_loads=()):
    body = ["S2R R0, SR_TID.X", "loop:", "@!P0 BRA edge", *VECTOR * 8, "BRA loaded", "edge:"]
    body += [*VECTOR * 8, *["LDG.E.U16 R1, R2"] * 40, *slow_way, "loaded:", *after_loads]
    body += [*WEIGH * 32, "@P1 BRA loop", "EXIT", "end:", "BRA end"]
    return code(body)


def test_the_cheapest_way_round_the_loop():
    count = sass.per_tile(a_loop(), width=4)
    assert count == sass.Count(instructions=1 + 8 + 1 + 64 + 1, mufu=32, alu=0)


def test_rare_ways_do_not_count():
    """An inner loop, the way of a diverged warp, and a skipped tile without exponentials."""
    found = a_loop(
        slow_way=["inner:", "IADD3 R1, R1, 0x1, RZ", "@P2 BRA inner"],
        after_loads=["@P3 BRA end", "BRA.DIV UR4, end", "FSETP.GT.AND P1, PT, R4, R5, PT"],
    )
    count = sass.per_tile(found, width=4)
    assert count == sass.Count(instructions=75 + 3, mufu=32, alu=1)


def test_a_kernel_without_a_loop_counts_from_its_start():
    lines = ["@P0 EXIT", *VECTOR * 8, *WEIGH * 32, *["STG.E.128 [R2.64], R4"] * 8, "EXIT"]
    assert sass.per_tile(code(lines), width=4).instructions == 1 + 8 + 64 + 8 + 1


def test_a_kernel_that_writes_its_tile_in_a_second_loop():
    second = ["again:", *["LDS.128 R4, [R2]"] * 8, *WEIGH * 32]
    second += [*["STG.E.128 [R2.64], R4"] * 8, "@P1 BRA again", "EXIT"]
    lines = ["first:", *VECTOR * 8, *WEIGH * 32, "@P0 BRA first", *second]
    assert sass.per_tile(code(lines), width=4).instructions == (8 + 64 + 1) + (8 + 64 + 8 + 1)


def test_no_tile_no_count():
    assert sass.per_tile(code([*VECTOR * 3, "EXIT"]), width=4) is None


# From the tables of NVIDIA's occupancy calculator for compute capability 9.0
@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(64, 256, 0, 4), (65, 256, 0, 3), (80, 256, 0, 3), (32, 1024, 0, 2), (64, 320, 0, 3),
     (40, 256, 72 * 1024, 3), (32, 32, 0, 32)],
)  # fmt: skip
def test_blocks_that_share_a_multiprocessor(registers, threads, shared, blocks):
    kernel = kernels.Kernel("top1_rows_kernel<float>", registers, 0, None)
    assert kernel.resident(threads, shared) == blocks


def test_what_bounds_a_kernel():
    gpu = kernels.Gpu("one", 1, 1e9, 1e9)
    count = sass.Count(instructions=4 * 4096, mufu=100, alu=0)
    kernel = kernels.Kernel("top1_rows_kernel<float>", 64, 0, count)
    assert kernel.busiest(gpu) == (1.0, "issue")
    kernel = kernels.Kernel("top1_rows_kernel<float>", 64, 0, sass.Count(1, 4096, 0))
    assert kernel.busiest(gpu) == (2.0, "MUFU")


def test_every_target_of_the_design_is_predicted():
    goals = {(target.workload, target.sizes) for target in kernels.targets()}
    wanted = {
        (case.workload, case.sizes)
        for case in kernels.GPU_CASES
        if case.target_us or case.bandwidth_target
    }
    # The fused product has one target up to 64 rows
    rest = {each for each in wanted - goals if each[0] != "linear_top1_confidence"}
    assert not rest
