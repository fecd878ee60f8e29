"""The forward, what runs it in both lives, and what it costs on paper."""
