"""What several tests take: of `test_keep_worse` and others."""

from __future__ import annotations

# Rates that spoil the student, and nothing that would hold it.
SPOILT = (
    "--set", "distillation.lr=0.5", "--set", "distillation.clip=1e9",
    "--set", "distillation.ema=0", "--set", "distillation.weight_lr=null",
    "--set", "distillation.epochs=6",
)  # fmt: skip
