"""One page that shows everything measured: figures to look into, rows to sort, and the command behind each number."""
