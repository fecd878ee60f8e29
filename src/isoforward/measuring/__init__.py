"""How numbers are taken: clocks' rounds, counters, ledgers, and the verdict on all of them."""
