"""Base + ledger -> weights: adapters, the untouched base, merging arithmetic, folding, curvature state files."""
