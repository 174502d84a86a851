"""Fixtures of the tests of training."""

from support.trainer_parts import teacher as teacher
