"""Programs that torchrun starts: pytest collects nothing here."""

collect_ignore_glob = ["*.py"]
