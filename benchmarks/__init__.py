"""What this project costs and saves, measured side by side with the way it would be done otherwise.

``python -m benchmarks`` runs everything; ``docs/benchmarks.md`` says what each row means.
"""
