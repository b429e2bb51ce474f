"""Stage 1: smoothing, level fit and error compensation. Calibration text and teacher in, the first student out.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

ptq_init = Step("ptq_init")
