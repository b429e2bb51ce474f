"""The teacher's own figures, measured first: the ceiling of every row, and a gate (`pipeline.check_gate`).

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

evaluate_teacher = Step("evaluate_teacher")
