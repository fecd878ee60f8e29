"""What every room stands on: errors, typed configs, rows of results, statistics, storage, the machine."""
