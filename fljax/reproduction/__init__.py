"""The paper's tables and figures: what they need, and what they show.

`paper` holds the published numbers, `plan` the experiments behind every table
and figure, `store` runs them and keeps their results, `render` draws.
"""
