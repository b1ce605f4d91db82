"""How good a file is: accuracy, latency, and the reasons for both."""
