"""One file per algorithm: paper and formula, config, pure loss, step."""
