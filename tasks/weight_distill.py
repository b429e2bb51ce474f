"""Stage 2: block-wise distillation of weights and levels, activations in full precision. A better student out.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

weight_distill = Step("weight_distill")
