"""What several processes do: pytest collects nothing here."""

collect_ignore_glob = ["*.py"]
