"""Stage 4's loss over a share of the tokens: as many as were asked for, evenly spaced, and all of them as without a share."""

from __future__ import annotations

import math

import pytest
import torch

from lbllm_core.config import HardwareConfig
from lbllm_core.engine.hardware import resolve
from lbllm_core.model.blocks import Decoder
from lbllm_core.stages.divergence import divergence, positions

CPU = resolve(HardwareConfig(device="cpu", compute_dtype="fp32"))


def states(tokens=50):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, tokens, 32, generator=g) for _ in range(2)]


@pytest.mark.parametrize("share", [0.001, 0.07, 0.1, 0.25, 0.3, 0.4, 0.6, 0.67, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("count", [1, 7, 100, 2048])
def test_a_share_is_what_it_says(share, count):
    chosen = positions(count, share)
    assert len(chosen) == max(1, math.ceil(round(share * count, 6)))
    assert chosen[0] == 0
    assert chosen[-1] < count
    gaps = torch.cat([chosen, torch.tensor([count])]).diff()
    assert int(gaps.min()) >= 1
    assert int(gaps.max() - gaps.min()) <= 1


@pytest.mark.parametrize(("share", "stride"), [(0.5, 2), (0.25, 4), (0.125, 8)])
def test_one_in_so_many_is_a_stride(share, stride):
    assert torch.equal(positions(96, share), torch.arange(0, 96, stride))


@pytest.mark.parametrize(("share", "of"), [(0.6, 60), (0.9, 90), (0.25, 25)])
def test_the_loss_is_the_mean_over_the_chosen_tokens(make_model, share, of):
    decoder = Decoder(make_model("llama"))
    student, teacher = states()
    seen = []

    def logits(x, compute=decoder.logits):
        seen.append(len(x))
        return compute(x)

    decoder.logits = logits
    student.requires_grad_()
    loss = divergence(decoder, CPU, student, teacher, share, None)
    loss.backward()
    assert seen[0] == of
    reached = student.grad.flatten(0, 1).abs().sum(1) > 0
    assert torch.equal(reached.nonzero()[:, 0], positions(100, share))
    s, t = (x.detach().flatten(0, 1)[positions(100, share)][None] for x in (student, teacher))
    assert torch.equal(loss.detach(), divergence(decoder, CPU, s, t, 1.0, None))


def test_all_of_the_tokens_are_their_plain_mean(make_model):
    decoder = Decoder(make_model("llama"))
    student, teacher = states()
    p, q = (decoder.logits(x.flatten(0, 1)).log_softmax(-1) for x in (teacher, student))
    plain = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / 100
    assert torch.equal(divergence(decoder, CPU, student, teacher, 1.0, None), plain)
