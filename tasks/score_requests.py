"""Log-likelihoods of a requests file by the packed model, or by the teacher: zero-shot tasks that lm-eval aggregates elsewhere.

What it computes is in `lbllm_core/steps.py`; what makes it cached and resumable is in `tasks/step.py`.
"""

from tasks.step import Step

score_requests = Step("score_requests")
