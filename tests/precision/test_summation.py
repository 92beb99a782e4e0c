"""Sums against math.fsum, which is correctly rounded, and against the bounds that are proven."""

import math

import pytest
import torch

from implementations.precision.formats import BF16, rounded, stochastic
from implementations.precision.summation import (
    bound_in_order,
    bound_neumaier,
    bound_pairwise,
    gamma,
    kahan_add,
    sum_in_order,
    sum_kahan,
    sum_neumaier,
    sum_pairwise,
    unit_roundoff,
)

BOUNDED = {
    "in order": (sum_in_order, bound_in_order),
    "pairwise": (sum_pairwise, bound_pairwise),
    "Neumaier": (sum_neumaier, bound_neumaier),
}
SUMS = {name: add for name, (add, _) in BOUNDED.items()} | {"Kahan": sum_kahan}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1, 2, 63, 100, 257)
WITHIN_BOUNDS = [(n, dtype) for n in LENGTHS for dtype in DTYPES if n * unit_roundoff(dtype) < 1]


def exact(x: torch.Tensor) -> torch.Tensor:
    """The sums of the rows, correctly rounded to float64."""
    return torch.tensor([math.fsum(row) for row in x.double().tolist()], dtype=torch.float64)


def off(add, x: torch.Tensor) -> torch.Tensor:
    """By how much each row's sum is off. The subtraction is exact: fsum does it too."""
    pairs = zip(x.double().tolist(), add(x).double().tolist(), strict=True)
    return torch.tensor([abs(math.fsum([*row, -got])) for row, got in pairs], dtype=torch.float64)


def hard_rows(terms: int, dtype: torch.dtype) -> torch.Tensor:
    """Both signs, sizes over many powers of two, and in half of the rows a sum near zero."""
    x = torch.randn(64, terms, dtype=torch.float64) * torch.exp2(torch.randint(-6, 7, (64, terms)))
    x[32:, terms // 2 : terms // 2 * 2] = -x[32:, : terms // 2].flip(-1)
    return x.to(dtype)


@pytest.mark.parametrize("terms, dtype", WITHIN_BOUNDS, ids=str)
@pytest.mark.parametrize("name", BOUNDED)
def test_no_sum_is_off_by_more_than_its_bound(name, terms, dtype):
    add, bound = BOUNDED[name]
    x = hard_rows(terms, dtype)
    assert (off(add, x) <= bound(x)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("terms", [2, 63, 257])
def test_kahan_is_off_by_two_roundings(terms, dtype):
    """Its second term, O(n u²), is below a thousandth of the first at these lengths."""
    x = hard_rows(terms, dtype)
    bound = 2.002 * unit_roundoff(dtype) * x.double().abs().sum(-1)
    assert (off(sum_kahan, x) <= bound).all()


def test_the_bound_of_a_sum_in_order_is_reached():
    """One, then terms of exactly half its spacing: each is a tie, and each tie goes back to one."""
    u, terms = unit_roundoff(torch.float32), 1000
    x = torch.full((1, terms), u)
    x[0, 0] = 1
    assert sum_in_order(x).item() == 1
    assert off(sum_in_order, x).item() == (terms - 1) * u
    # The bound exceeds (n - 1) u by its second order, a factor of 1 + 2 (n - 1) u = 1.00012.
    assert off(sum_in_order, x).item() > 0.9998 * bound_in_order(x).item()
    for add in (sum_pairwise, sum_kahan, sum_neumaier):
        assert off(add, x).item() <= 2 * u


def test_errors_grow_as_the_root_of_n_and_hardly_at_all():
    """Errors of random sign: for 16 times the terms 4 times the relative error; the bound says 16.

    The root mean squares of 256 rows have a standard error of 1/√512 = 4.4 %, two of them 6.3 % of
    their ratio: 4 ± 5 of those. The tree's ratio stays below √(log2 2048 / log2 128) = 1.25 + 5.
    """
    ratios = {}
    for name, add in SUMS.items():
        spread = []
        for terms in (128, 2048):
            x = torch.rand(256, terms)
            spread.append((off(add, x) / exact(x)).square().mean().sqrt())
        ratios[name] = (spread[1] / spread[0]).item()
    slack = 5 * math.sqrt(2 / 512)
    assert 4 * (1 - slack) < ratios["in order"] < 4 * (1 + slack)
    assert ratios["pairwise"] < 1.25 * (1 + slack)
    assert ratios["Kahan"] < 1 + slack and ratios["Neumaier"] < 1 + slack


def test_neumaiers_own_example():
    """1 + 10¹⁰⁰ + 1 - 10¹⁰⁰ = 2: Kahan loses both ones, as one term exceeds the total before it."""
    x = torch.tensor([[1.0, 1e100, 1.0, -1e100]], dtype=torch.float64)
    assert sum_neumaier(x).tolist() == [2.0]
    assert sum_kahan(x).tolist() == [0.0] == sum_in_order(x).tolist()


def test_the_tree_adds_neighbours():
    """In bf16, where 256 + 1 is a tie that goes down: only the pair of ones makes two."""
    x = torch.tensor([[256.0, 0.0, 1.0, 1.0]]).bfloat16()
    assert sum_pairwise(x).tolist() == [258.0]
    assert sum_in_order(x).tolist() == [256.0]


def test_bf16_weights_learn_again():
    """400 updates of an eighth of a spacing: lost by bf16, kept by Kahan in bf16, and by stochastic
    rounding on average (5 standard errors of the mean of 200 weights)."""
    step = BF16.epsilon / 8
    weight, lost, updates = torch.ones(1).bfloat16(), torch.zeros(1).bfloat16(), 400
    swamped, kept = weight, weight
    random = torch.ones(200)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        update = torch.full((1,), step).bfloat16()
        swamped = swamped + update
        kept, lost = kahan_add(kept, lost, update)
        random = rounded(random + step, BF16, rounding=stochastic(generator))
    want = 1 + updates * step
    assert swamped.item() == 1
    assert abs(kept.item() + lost.item() - want) < BF16.epsilon / 2
    error = random.std() / math.sqrt(len(random))
    assert abs(random.mean() - want) < 5 * error and error < 0.02 * (want - 1)


@pytest.mark.parametrize("name", SUMS)
def test_shapes_dtypes_and_emptiness(name):
    add, x = SUMS[name], torch.randn(2, 3, 5)
    assert torch.equal(add(x), torch.stack([add(row) for row in x]))
    assert add(x).shape == (2, 3) and add(x[0, 0]).shape == ()
    assert add(x[..., :0]).tolist() == [[0.0] * 3] * 2
    assert add(x[:0]).shape == (0, 3)
    assert add(x.bfloat16()).dtype is torch.bfloat16


def test_a_sum_too_long_for_its_dtype_has_no_bound():
    assert gamma(3, 0.25) == 3.0
    with pytest.raises(ValueError, match="have no bound"):
        bound_in_order(torch.ones(1, 257).bfloat16())
