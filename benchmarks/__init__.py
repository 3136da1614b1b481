"""What Kalman Normalization costs beside what a user would pick instead: ``python -m benchmarks --help``.

`cases` says what is measured, `networks` and `sides` make both sides of it, `steps` makes a step of them, `timing` and
`memory` measure, `rows` writes the CSV; `goals`, `tables`, `figures` and `page` read it.
"""
