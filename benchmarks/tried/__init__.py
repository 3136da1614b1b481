"""Networks beyond those of the tests, and situations from public bug reports: ``python -m benchmarks.tried --help``.

`networks` has networks that need no package; `benchmarks.coverage_networks` has the others. `trial` tries a network,
`situations` reproduces the reports, `page` writes the page.
"""
