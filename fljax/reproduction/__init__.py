"""The paper's tables and figures: what they need, and what they show.

`paper` holds the published numbers, `plan` says what a table or figure is made
of, `tables`, `figures`, `discussion` and `beyond` name the experiments behind
each, `catalogue` lists them all, `store` runs them and keeps their results,
`render` draws.
"""
