"""What is known of a running server from outside: its gauges, its instruments, the port that shows them."""
