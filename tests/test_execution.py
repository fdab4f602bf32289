import jax

from fljax import execution
from fljax import layers


def test_every_backend_has_a_plan():
  for backend in (*execution.PLANS, "another"):
    plan = execution.plan_for(backend)
    assert plan.forms.conv in layers.CONV_FORMS
    assert plan.forms.pooling in layers.POOLING_FORMS
    assert plan.client_chunk >= 0 < plan.evaluation_batch
  assert execution.plan_for() == execution.plan_for(jax.default_backend())
