"""Networks that no test names, and situations from public bug reports: ``python -m benchmarks.tried --help``.

`networks` has those that need no package; `benchmarks.coverage_networks` builds the others. `trial` tries a
network, `situations` makes what was reported, `page` writes the table.
"""
