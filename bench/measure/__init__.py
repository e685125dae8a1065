"""What runs in the worker of a case: step, timing, memory, clocks. With `bench.parity` it is in a row's code hash."""
