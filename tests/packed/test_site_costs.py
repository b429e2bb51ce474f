"""Activations quantized at some sites alone: against the float emulation with factors at these sites, and as it was afterwards."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lbllm_core.errors import ModelError
from lbllm_core.evaluation import site_costs as module
from lbllm_core.evaluation.site_costs import CHANNELS, GROUPED, choices, quantized_at, quantized_in_groups, site_costs
from lbllm_core.model import hf_integration
from lbllm_core.model.blocks import SITES
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import load_packed, pack_student


@pytest.fixture(scope="module")
def made(tmp_path_factory, scheme, make_teacher, make_student):
    folder, teacher = tmp_path_factory.mktemp("sites"), make_teacher()
    states = make_student(teacher, scheme)
    pack_student(teacher, states, folder, scheme)
    hf_integration.register()
    return teacher, states, load_packed(folder)


def test_every_choice_rounds_exactly_its_sites(made, make_fake):
    teacher, states, model = made
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    before, expected = model(ids).logits, {}
    for choice, sites in choices().items():
        some = [dataclasses.replace(state, sites={site: f for site, f in state.sites.items() if site in sites}) for state in states]
        expected[choice] = make_fake(teacher, some)(ids).logits
    for choice, sites in choices().items():
        with torch.no_grad(), quantized_at(model, sites):
            got = model(ids).logits
        apart = {other: float((got - logits).norm() / logits.norm()) for other, logits in expected.items()}
        mine = apart.pop(choice)  # not 0: a code at a decision point may fall the other way
        assert mine < 0.5 * min(apart.values()), (choice, mine, apart)
    assert torch.equal(model(ids).logits, before)


def test_groups_of_channels_have_scales_of_their_own(made):
    _, _, model = made
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    path, linear = next((name, linear) for name, linear in packed_linears(model) if name.endswith("down_proj"))
    seen, before = [], model(ids).logits
    with torch.no_grad(), quantized_in_groups(model):
        watch = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        grouped = model(ids).logits
        watch.remove()
    with torch.no_grad(), quantized_at(model, frozenset()):
        plain = model(ids).logits
    assert not torch.equal(grouped, plain)
    assert not torch.equal(grouped, before)
    assert torch.equal(model(ids).logits, before), f"{path} is as it was"
    (x,) = seen
    assert x.shape[-1] > CHANNELS
    for first in range(0, x.shape[-1], CHANNELS):
        assert max(len(token.unique()) for token in x[..., first : first + CHANNELS].flatten(0, 1)) <= 16
    assert max(len(token.unique()) for token in x.flatten(0, 1)) > 16


def test_the_reference_is_the_last_row(made, monkeypatch):
    _, _, model = made
    monkeypatch.setattr(module, "windows", lambda *_: torch.randint(0, 90, (3, 16), generator=torch.Generator().manual_seed(2)))
    monkeypatch.setattr(module, "metric_name", lambda *_: "ppl_x")
    name, found = site_costs(model, SimpleNamespace(evaluation=SimpleNamespace(batch_tokens=64)), None, "ppl_x", 2)
    assert name == "ppl_x"
    assert list(found) == [*choices(), GROUPED]
    assert found[GROUPED][0] not in {ppl for choice, (ppl, _) in found.items() if choice != GROUPED}


def test_sites_come_back_after_an_error(made):
    _, _, model = made
    ids = torch.arange(9)[None]
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError), quantized_at(model, frozenset()):
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, before)


def test_choices_are_none_each_all_but_each_and_all():
    assert len(choices()) == 2 + 2 * len(SITES)
    assert choices()["all but o"] == {"qkv", "gate_up", "down"}


def test_a_model_with_16_bit_activations_is_refused(tmp_path, scheme, make_teacher, make_student):
    sixteen, teacher = dataclasses.replace(scheme, act_bits=16), make_teacher()
    pack_student(teacher, make_student(teacher, sixteen), tmp_path, sixteen)
    with pytest.raises(ModelError, match="16-bit activations"):
        site_costs(load_packed(tmp_path), None, None, "ppl_synthetic")
