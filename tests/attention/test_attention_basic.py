import pytest, torch
from implementations.attention_basic import attention_naive


def test_a():
    q = torch.randn(1, 2, 3, 4)
    attention_naive(q, q, q, mask=torch.ones(3, 3, dtype=torch.bool))


def test_b():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(Exception) as e:
        attention_naive(q, q[..., :2], q)
    print(type(e.value), e.value)
