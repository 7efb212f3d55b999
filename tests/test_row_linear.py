"""The proof of models/utils/kernels/row_linear.py and its C++, against torch's own product in fp64."""

import pytest
import torch
import torch.nn.functional as F

from models.utils.kernels import row_linear as page
from models.utils.kernels.row_linear import linear_fits, load_row_linear, row_linear

pytestmark = pytest.mark.skipif(load_row_linear() is not None, reason=str(load_row_linear()))
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of a result, half of its last bit


def close(out, expected, dtype):
    """Within one rounding of the result, and what fp32 loses while it sums."""
    scale = expected.abs().amax()
    return ((out.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2e-6 * scale).all()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 21, 32])
def test_it_is_the_product(num_rows, dtype, plain):
    for N, K in [(1, 32), (15, 64), (16, 96), (33, 768), (130, 1056)]:
        # Unlike in size and sign from input to input, so that no two of them can be taken for each other.
        x = (torch.randn(num_rows, K) * torch.linspace(0.1, 2, K)).to(dtype)
        weight = (torch.randn(N, K) + torch.linspace(-1, 1, N)[:, None]).to(dtype)
        out = torch.ops.zoo.row_linear(x, weight, None, plain)
        assert out.dtype == dtype and out.shape == (num_rows, N)
        assert close(out, x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("plain", [False, True])
def test_bf16_is_summed_in_fp32(plain):
    # 257 ones: bf16 has no 257, a sum in bf16 stays at 256.
    x = torch.cat([torch.ones(257), -torch.ones(127)]).bfloat16()[None]
    assert torch.ops.zoo.row_linear(x, torch.ones(1, 384).bfloat16(), None, plain) == 130


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone(dtype):
    x, weight = torch.randn(13, 96).to(dtype), torch.randn(40, 96).to(dtype)
    together = torch.ops.zoo.row_linear(x, weight)
    for row, alone in zip(together, x):
        assert torch.equal(row, torch.ops.zoo.row_linear(alone[None], weight)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(bad):
    x, weight = torch.ones(3, 64), torch.ones(20, 64)
    x[1, 40] = bad
    finite = torch.ops.zoo.row_linear(x, weight).isfinite()
    assert finite[[0, 2]].all() and not finite[1].any()


def test_shapes_and_bias():
    x, weight, bias = torch.randn(2, 5, 64), torch.randn(24, 64), torch.randn(24)
    torch.testing.assert_close(row_linear(x, weight, bias), F.linear(x, weight, bias))
    # The bias is added before the sum is rounded to bf16: 256 + 1 + 1 are 258, and 256 + 1 is 256.
    one = torch.ones(1, dtype=torch.bfloat16)
    halves = torch.cat([torch.full((256,), 1.0), torch.ones(1), torch.zeros(31)]).bfloat16()
    assert row_linear(halves[None], torch.ones(1, 288).bfloat16(), one) == 258
    across = torch.randn(64, 3).T  # whose rows do not lie side by side
    torch.testing.assert_close(row_linear(across, weight), F.linear(across, weight))
    torch.library.opcheck(torch.ops.zoo.row_linear, (x, weight))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 50])
def test_rows_go_through_the_matrices_of_their_experts(num_rows, dtype, plain):
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(num_rows, 96).to(dtype), torch.randn(7, 33, 96).to(dtype)
    bias, experts = torch.randn(7, 33).to(dtype), torch.randint(7, (num_rows,), generator=generator)
    out = torch.ops.zoo.row_linear(x, weight, bias, plain, False, experts)
    for row, one, expert in zip(out, x, experts):
        alone = torch.ops.zoo.row_linear(one[None], weight[expert], bias[expert], plain)
        assert torch.equal(row, alone[0])


def test_matrices_of_experts_may_lie_apart_and_those_of_no_row_are_not_read():
    memory = torch.full((5, 3, 20, 64), torch.nan)
    weight = memory[:, 1]  # every third matrix in memory
    weight[[1, 4]] = torch.randn(2, 20, 64)
    x = torch.randn(3, 64)
    out = row_linear(x, weight, experts=torch.tensor([4, 1, 4]))
    torch.testing.assert_close(out, torch.stack([weight[n] @ row for n, row in zip((4, 1, 4), x)]))
    torch.library.opcheck(torch.ops.zoo.row_linear, (x, weight, None, False, False, torch.tensor([4, 1, 4])))


@pytest.mark.parametrize(
    "experts, said", [([0, 1], "needs an expert"), ([0, 1, 5], "no such"), ([-1, 0, 0], "no such")]
)
def test_experts_that_are_not_there_are_told(experts, said):
    with pytest.raises(RuntimeError, match=said):
        row_linear(torch.randn(3, 64), torch.randn(5, 20, 64), experts=torch.tensor(experts))


def test_what_fits():
    x, weight = torch.randn(32, 64), torch.randn(24, 64)
    assert linear_fits(x, weight) and linear_fits(x.bfloat16(), weight.bfloat16())
    assert not linear_fits(torch.randn(33, 64), weight)
    assert not linear_fits(torch.randn(1, 48), torch.randn(24, 48))
    assert not linear_fits(x.half(), weight.half()) and not linear_fits(x.bfloat16(), weight)
    assert not linear_fits(x, torch.randn(64, 24).T)
    assert not linear_fits(x.to("meta"), weight.to("meta"))


@pytest.mark.parametrize(
    "x, weight, said",
    [
        (torch.ones(1, 48), torch.ones(4, 48), "48 inputs are no multiple of 32"),
        (torch.ones(1, 64), torch.ones(4, 32), "x has 64 inputs, not 32"),
        (torch.ones(1, 32), torch.ones(4, 32).bfloat16(), "do not fit"),
        (torch.ones(1, 32), torch.ones(32, 4).T, "do not fit"),
    ],
)
def test_wrong_arguments_are_told(x, weight, said):
    with pytest.raises(RuntimeError, match=said):
        torch.ops.zoo.row_linear(x, weight)


def test_a_bias_of_another_size_is_told():
    with pytest.raises(RuntimeError, match="the bias does not fit"):
        torch.ops.zoo.row_linear(torch.ones(1, 32), torch.ones(4, 32), torch.ones(3))


def test_without_a_compiler_nothing_fits(monkeypatch):
    monkeypatch.setattr(page, "load_row_linear", lambda: "no C++ compiler")
    assert not linear_fits(torch.randn(1, 64), torch.randn(24, 64))
