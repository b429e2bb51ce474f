"""Stage 4: all blocks at once against the teacher's logits; only levels, clips and knees move.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

end_to_end = Step("end_to_end")
