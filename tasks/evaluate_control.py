"""Perplexity by named protocol and zero-shot tasks of the teacher with its linears in a format of bitsandbytes.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

evaluate_control = Step("evaluate_control")
