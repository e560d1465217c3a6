"""Tests run side by side, one file on one core: each process has one thread, or all would wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
