"""The search for clips and knees: which tokens it looks at, and that it finds the best of its grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from lbllm_kernels.activation import ActFactors

from lbllm_core.config import SchemeConfig
from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import HiddenStates
from lbllm_core.model.blocks import NORMS, Decoder, linears_of
from lbllm_core.model.student import BlockState
from lbllm_core.quant.activation import ActQuantizer
from lbllm_core.quant.uniform import round_to_nearest
from lbllm_core.quant.weight import from_real_levels, nearest_codes
from lbllm_core.stages.act_quant import CLIPS, KNEES, SEARCH_SEQUENCES, SEARCH_TOKENS, evenly, search_factors, site_inputs

CPU = Hardware(torch.device("cpu"), torch.float32)
SCHEME = SchemeConfig(name="w1p1a4", act_bits=4, act_variant="piecewise")


def job_and_state(make_model, hidden):
    """The first block, its weights rounded to nearest."""
    decoder = Decoder(make_model("llama"))
    block = decoder.blocks[0]
    linears = {}
    for path, linear in linears_of(block).items():
        levels = round_to_nearest(linear.weight)[:, None]
        linears[path] = from_real_levels(nearest_codes(linear.weight[:, None], levels).squeeze(1), levels, linear.in_features)
    state = BlockState(linears, {name: block.get_submodule(name).weight.clone() for name in NORMS}, {})
    return BlockJob(0, block, HiddenStates.of(hidden.clone()), None, decoder, decoder.surroundings(hidden[:1]), CPU), state


@pytest.mark.parametrize(("length", "count", "places"), [(5, 9, [0, 1, 2, 3, 4]), (1, 4, [0]), (0, 4, []), (10, 4, [0, 3, 6, 9])])
def test_evenly(length, count, places):
    assert evenly(length, count) == places


@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_every_part_of_the_text_is_looked_at(make_model, sequences):
    """Each chosen sequence gives its share of tokens, from its second to its last; the last sequence is among them."""
    hidden = torch.randn(sequences, 40, 32, generator=torch.Generator().manual_seed(1))
    job, state = job_and_state(make_model, hidden)
    chosen = min(sequences, SEARCH_SEQUENCES)
    samples = site_inputs(job, state, SCHEME)
    share = min(39, -(-SEARCH_TOKENS // chosen))
    assert {site: len(x) for site, x in samples.items()} == dict.fromkeys(samples, chosen * share)
    hidden[-1, -1] += 1  # the last token of the last sequence
    moved = site_inputs(job_and_state(make_model, hidden)[0], state, SCHEME)
    for site, x in samples.items():
        differs = (x != moved[site]).any(1)
        assert bool(differs[-1])
        assert int(differs.sum()) == 1
    hidden[:, 0] += 1
    first = site_inputs(job_and_state(make_model, hidden)[0], state, SCHEME)
    assert torch.equal(first["qkv"], moved["qkv"])  # its input is the norm of the token alone


def test_the_search_finds_the_best_of_its_grid(make_model):
    job, state = job_and_state(make_model, torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(2)))
    samples = site_inputs(job, state, SCHEME)
    kept = {site: x.clone() for site, x in samples.items()}
    found = search_factors(job, state, SCHEME, samples)
    for site, x in samples.items():
        assert torch.equal(x, kept[site])

        def error(clip, knee, x=x):
            return float((ActQuantizer(ActFactors("piecewise", clip, clip, knee, knee))(x) - x).square().sum())

        best = min(error(clip, knee) for clip, knee in itertools.product(CLIPS, KNEES))
        assert error(found[site].clip_max, found[site].knee_low) == pytest.approx(best, rel=1e-6)
