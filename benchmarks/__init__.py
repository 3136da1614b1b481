"""The cost of Kalman Normalization compared with its alternatives: ``python -m benchmarks --help``.

`cases` lists the measurements, `networks` and `sides` build the networks, `steps` builds their steps, `timing` and
`memory` measure, `rows` writes the CSV; `goals`, `tables`, `figures` and `plot` read it.
"""
