"""Operations in plain torch: without gradients the same bits, and no node for the backward."""

import pytest
import torch

from stackproof.kernels import eager

X = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
ANGLE = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
OPERATIONS = {
    "rms_norm": lambda x: eager.rms_norm(x, torch.linspace(0.5, 2, 8), 1e-6),
    "rope": lambda x: eager.rope(x, ANGLE.cos(), ANGLE.sin()),
    "swiglu": lambda x: eager.swiglu(x, x.flip(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_without_gradients_the_result_is_the_same_and_nothing_is_kept(name, dtype):
    x = X.to(dtype).requires_grad_()
    with_gradients = OPERATIONS[name](x)
    with torch.no_grad():
        without = OPERATIONS[name](x)
    with torch.inference_mode():
        inferred = OPERATIONS[name](x)
    assert with_gradients.grad_fn is not None and without.grad_fn is None
    assert (
        torch.equal(with_gradients, without)
        and torch.equal(with_gradients, inferred)
        and without.dtype == dtype
    )
