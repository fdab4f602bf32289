"""Cleansing a trained global model: a chain of pure transforms.

statistics (`reports`) -> scores -> order -> mask (`pruning`) -> params;
`selection` chooses how far to go, `weights` zeroes extreme weights, and
`pipeline` puts the steps together for one model. Scores may come from the
weights as well (`weights.gains`). Nothing here knows what attack was run.
"""
