"""The softmax denominators that sparse attention can return: they join what was drawn from two sets of keys."""

import pytest
import torch

from zoo.kernels import sparse_attention
from zoo.kernels.sparse_attention import Pattern

BACKENDS = ["reference", "torch", "numba"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sets_of_keys_are_joined(backend: str, dtype: torch.dtype) -> None:
    q = torch.randn(2, 21, 4, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 30, 2, 8, dtype=dtype)
    lo, cut, hi = torch.randint(31, (3, 1, 21)).sort(dim=0).values
    (near, a), (far, b) = (
        sparse_attention(q, k, v, pattern, backend=backend, return_lse=True)
        for pattern in (Pattern(lo, cut), Pattern(cut, hi))
    )
    whole, lse = sparse_attention(q, k, v, Pattern(lo, hi), backend="reference", return_lse=True)
    assert (a == -torch.inf).any() == (lo == cut).any(), "a query that sees nothing"
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.logaddexp(a, b), lse, **tolerance)
    share = torch.exp(b - lse).nan_to_num().transpose(1, 2)[..., None]
    torch.testing.assert_close(near * (1 - share) + far * share, whole, **tolerance)
    y, lse = sparse_attention(q.requires_grad_(), k, v, Pattern(lo, hi), backend=backend, return_lse=True)
    assert (y.requires_grad, lse.requires_grad) == (True, False)
