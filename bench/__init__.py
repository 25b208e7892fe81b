"""Benchmarks: ours against the usual ways, both sides taking turns in one run.

python -m bench            all of them, printed as a table and saved as bench.json
python -m bench --help     some of them, or with fewer repetitions
"""
