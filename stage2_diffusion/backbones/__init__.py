"""What may be diffused with: a network each, `(x, t, cond) -> like x`, that knows nothing of noise schedules."""
