"""The average against its closed formula."""

import torch

from kontext_min.training.optim import EMA


def test_the_average_is_the_weighted_sum_that_the_decays_make():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA([parameter], decay=0.6)
    values = [parameter.detach().double().clone()]
    for step in range(1, 31):
        parameter.data = torch.tensor([1.0 + step**0.5, step / 7])
        values.append(parameter.detach().double().clone())
        ema.update()
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(30)]
    assert decays[0] == 0.1 and decays[-1] == 0.6
    expected = sum(
        value * (1 - ([0.0] + decays)[i]) * torch.tensor(decays[i:]).double().prod() for i, value in enumerate(values)
    )
    torch.testing.assert_close(ema.shadow[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_small_changes_of_bf16_parameters_are_not_lost():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA([parameter], decay=0.995)
    parameter.data += 2**-7
    for _ in range(50):
        ema.update()
    assert ema.shadow[0].dtype == torch.float32
    assert 1 < ema.shadow[0][0] < 1 + 2**-7


def test_within_the_context_the_parameters_are_the_average_and_afterwards_themselves():
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.9)
    parameter.data = torch.ones(2)
    ema.update()
    with ema.applied():
        assert torch.equal(parameter.detach(), torch.full((2,), 0.9))
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_a_saved_average_goes_on_where_it_was():
    def average(parameter):
        return EMA([parameter], decay=0.99)

    parameter = torch.nn.Parameter(torch.zeros(2))
    first, second = average(parameter), average(parameter)
    for step in range(9):
        parameter.data = torch.full((2,), float(step))
        first.update()
        if step == 5:
            second.load_state_dict({key: value for key, value in first.state_dict().items()})
        elif step > 5:
            second.update()
    assert second.updates == 9 and torch.equal(first.shadow[0], second.shadow[0])
