"""Benchmarks: each area is a module `bench_<area>.py` with `run(report)`; `__main__` runs them.

Nothing else imports this package. The other modules start meshes, make load and read `/proc`.
"""
