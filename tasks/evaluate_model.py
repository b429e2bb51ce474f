"""Perplexity by named protocol and zero-shot tasks of the packed model, beside the teacher's.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

evaluate_model = Step("evaluate_model")
