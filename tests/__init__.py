"""A package, or else the `tests` that torch-fidelity installs comes before it in a new process."""
