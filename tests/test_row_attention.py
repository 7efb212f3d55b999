"""The proof of models/utils/kernels/row_attention.py and its C++, against torch's own attention in fp64."""

import pytest
import torch
import torch.nn.functional as F

from models.utils.kernels import row_attention as page
from models.utils.kernels.row_attention import attention_fits, load_row_attention, row_attention

pytestmark = pytest.mark.skipif(load_row_attention() is not None, reason=str(load_row_attention()))
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of a result, half of its last bit


def inputs(B, H, K, T, S, d, dtype=torch.float32):
    """q, k, v and a mask: row b has written S - 3 b slots, and its last T tokens attend causally."""
    q, k, v = torch.randn(B, H, T, d), torch.randn(B, K, S, d), torch.randn(B, K, S, d)
    last = S - 1 - 3 * torch.arange(B)[:, None] - torch.arange(T - 1, -1, -1)  # (B, T)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.arange(S) <= last[:, None, :, None]


def expected(q, k, v, mask, scale=None):
    doubles = (tensor.double() for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*doubles, mask, enable_gqa=True, scale=scale)


def close(out, right):
    return ((out.double() - right).abs() <= ROUNDING[out.dtype] * right.abs() + 3e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 8])
def test_it_is_attention(T, dtype):
    for B, H, K, S, d in [(1, 1, 1, 8, 16), (3, 4, 2, 20, 32), (2, 6, 1, 33, 80), (1, 3, 3, 300, 128)]:
        tensors = inputs(B, H, K, T, S, d, dtype)
        out = row_attention(*tensors)
        assert out.dtype == dtype and out.shape == (B, H, T, d)
        assert close(out, expected(*tensors))


def test_a_mask_with_holes():
    q, k, v, mask = inputs(2, 4, 2, 3, 40, 32)
    mask &= torch.rand(mask.shape) < 0.5
    mask[..., 0] = True
    assert close(row_attention(q, k, v, mask), expected(q, k, v, mask))


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_scores_of_any_size(scale):
    """Up to where one slot takes all, and the others are e^-87 and less of it."""
    q, k, v, mask = inputs(1, 2, 2, 4, 50, 64)
    out, right = row_attention(q, k, v, mask, scale), expected(q, k, v, mask, scale)
    assert (out - right).abs().max() < 1e-5 * max(1, scale)


def test_what_is_not_written_is_not_read():
    q, k, v, mask = inputs(1, 2, 1, 2, 64, 32)
    mask[..., 41:] = False
    right = expected(q, k, v, mask)
    k[:, :, 41:], v[:, :, 41:] = torch.nan, torch.nan
    assert close(row_attention(q, k, v, mask), right)


@pytest.mark.parametrize("slot", [0, 17, 18, 19])
def test_what_is_no_number_spoils_those_that_see_it(slot):
    q, k, v, mask = inputs(1, 2, 2, 3, 20, 32)
    q[:, 0, 1] = torch.nan
    k[:, 1, slot] = torch.nan
    finite = row_attention(q, k, v, mask).isfinite().all(dim=-1)[0]
    assert finite[0].tolist() == [True, False, True]
    assert torch.equal(finite[1], ~mask[0, 0, :, slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_what_it_is_alone(dtype):
    q, k, v, mask = inputs(3, 4, 2, 5, 40, 32, dtype)
    together = row_attention(q, k, v, mask)
    for b in range(3):
        for t in range(5):
            alone = row_attention(q[b, None, :, t, None], k[b, None], v[b, None], mask[b, None, :, t, None])
            assert torch.equal(together[b, :, t], alone[0, :, 0])


def test_tensors_that_lie_otherwise():
    q, k, v, mask = inputs(2, 4, 2, 3, 40, 32)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert not turned[0].is_contiguous()
    assert torch.equal(row_attention(*turned, mask), row_attention(q, k, v, mask))
    torch.library.opcheck(torch.ops.zoo.row_attention, (*turned, mask, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_blocks_that_lie_anywhere_give_the_same_to_the_bit(T, dtype):
    """Rows whose slots are cut into blocks of 5, in any order; one block is in both rows."""
    B, K, S, d = 2, 2, 40, 32
    q, k, v, mask = inputs(B, 6, K, T, S, d, dtype)
    k[1, :, :5], v[1, :, :5] = k[0, :, :5], v[0, :, :5]
    table = 1 + torch.randperm(16).view(B, 8)
    table[1, 0] = table[0, 0]
    blocks = [torch.full((18, K, 5, d), torch.nan, dtype=dtype) for _ in range(2)]
    for pool, slots in zip(blocks, (k, v)):
        pool[table] = slots.view(B, K, 8, 5, d).transpose(1, 2)
    out = row_attention(q, *blocks, mask, table=table)
    assert torch.equal(out, row_attention(q, k, v, mask))
    torch.library.opcheck(torch.ops.zoo.row_attention, (q, *blocks, mask, 0.25, table))


def test_what_fits():
    q, k, _, mask = inputs(2, 4, 2, 3, 40, 32)
    assert attention_fits(q, k, mask) and attention_fits(q.bfloat16(), k.bfloat16(), mask)
    assert not attention_fits(q, k, None)
    assert not attention_fits(q.bfloat16(), k, mask) and not attention_fits(q.half(), k.half(), mask)
    assert not attention_fits(q, k, mask[:, :, :1])
    assert not attention_fits(q[..., :24], k[..., :24], mask)
    assert not attention_fits(q.to("meta"), k.to("meta"), mask.to("meta"))
    q, k, _, mask = inputs(1, 4, 2, 9, 40, 32)
    assert not attention_fits(q, k, mask)


def test_wrong_arguments_are_told():
    q, k, v, mask = inputs(2, 4, 2, 3, 40, 32)
    for wrong, said in [
        ((q.repeat(1, 1, 3, 1), k, v, mask), "9 queries of a head are more than 8"),
        ((q[..., :24], k[..., :24], v[..., :24], mask), "heads of 24"),
        ((q, k, v[:, :, :30], mask), "q, k and v do not fit"),
        ((q[:, :3], k, v, mask), "q, k and v do not fit"),
        ((q, k, v.bfloat16(), mask), "q, k and v do not fit"),
        ((q, k, v, mask[..., :39]), "the mask does not fit"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            torch.ops.zoo.row_attention(*wrong, 1.0)
    for table, said in [
        (torch.tensor([[2], [0]]), "no such block"),
        (torch.tensor([[-1], [0]]), "no such block"),
        (torch.tensor([[0]]), "q, k and v do not fit"),
        (torch.tensor([[0, 1], [1, 0]]), "the mask does not fit"),
        (torch.tensor([[0], [1]], dtype=torch.int32), "the table does not fit"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            torch.ops.zoo.row_attention(q, k, v, mask, 1.0, table)


def test_without_a_compiler_nothing_fits(monkeypatch):
    monkeypatch.setattr(page, "load_row_attention", lambda: "no C++ compiler")
    q, k, _, mask = inputs(1, 2, 2, 1, 8, 16)
    assert not attention_fits(q, k, mask)
