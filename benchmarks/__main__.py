"""``python -m benchmarks``: see `command`."""

from benchmarks.environment import keep_memory

if __name__ == "__main__":
    keep_memory()
    from benchmarks.command import main

    raise SystemExit(main())
