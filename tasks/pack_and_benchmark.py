"""The student as a packed model of about two bits a weight, checked against the fake-quantized one, and timed.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

pack_and_benchmark = Step("pack_and_benchmark")
