"""``expected-ttft``: candidates by the time until their first token, learnt from how requests went."""
