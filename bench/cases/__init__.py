"""What is measured: cases, suites, budgets, and the jobs that a worker is given."""
