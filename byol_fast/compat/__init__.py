"""Other packages' names, signatures and numbers: a practical guide's script, lightly, timm, torch."""
