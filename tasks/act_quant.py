"""Stage 3: 4-bit activations (and cache) on, codes frozen; levels, clips and knees learn block by block.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

act_quant = Step("act_quant")
